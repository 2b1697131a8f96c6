// Starts the page. What several parts share: asking the server, and showing what went wrong.
import { startAttention } from "./attention.js";
import { startHistory } from "./history.js";
import { startSamples } from "./samples.js";

export const $ = (id) => document.getElementById(id);

export function show(error) {
  $("error").textContent = error ? sentence(error.message) : "";
  $("error").hidden = !error;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");

export async function ask(path, values = {}, options = {}) {
  let answer;
  try {
    answer = await fetch(`${path}?${new URLSearchParams(values)}`, options);
  } catch {
    throw new Error("the server does not answer: start sagan-fast view again");
  }
  if (answer.headers.get("content-type")?.startsWith("text/html")) return answer.text();
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(content.error ?? `the server answered with status ${answer.status}`);
  return content;
}

// Returns a function that runs `work`, never twice at a time: of calls meanwhile, the last one is done afterwards.
export function latest(work, element) {
  let running = false, again = false;
  return async function run() {
    if (running) { again = true; return; }
    running = true;
    element?.classList.add("busy");
    do {
      again = false;
      try { await work(); show(null); } catch (error) { show(error); }
    } while (again);
    running = false;
    element?.classList.remove("busy");
  };
}

export function fill(select, options) {
  for (const [value, text] of options) select.add(new Option(text, value));
}

function start(about) {
  $("name").textContent = about.name;
  document.title = `${about.name} - sagan-fast`;
  const model = about.model;
  $("about").textContent = model
    ? `${model.step === null ? "Generator" : `Weights of step ${model.step.toLocaleString("en")}`}, ` +
      `${model.resolution} x ${model.resolution} pixels, ${model.classes.length || "no"} classes`
    : "";
  for (const part of document.querySelectorAll(".of-run")) part.hidden = !about.run;
  for (const part of document.querySelectorAll(".of-model")) part.hidden = !model;
  $("missing").hidden = !about.missing;
  $("missing").textContent = about.missing;
  if (model) {
    const attention = startAttention(about);
    startSamples(model, attention.lookAt);
  }
  startHistory(about);
}

ask("/api/about").then(start).catch(show);
