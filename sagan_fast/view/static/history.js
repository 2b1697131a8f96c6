// What a run leaves on the disk: curves, scores and pictures, asked for again while the run goes on.
import { $, ask, show } from "./page.js";

const EVERY = 3000; // milliseconds

export function startHistory({ run }) {
  let seen = {};

  async function look() {
    try {
      const now = await ask("/api/status");
      $("reload").hidden = !now.newer;
      if (run) await update(now);
      seen = now;
    } catch (error) { show(error); }
    setTimeout(look, document.hidden ? 5 * EVERY : EVERY);
  }

  async function update(now) {
    if (now.step !== null) {
      const ago = Math.max(0, Math.round(Date.now() / 1000 - (now.time ?? 0)));
      const written = now.time && ago < 600 ? `, written ${ago} s ago` : "";
      const of = now.steps ? ` of ${now.steps.toLocaleString("en")}` : "";
      $("progress").textContent = `Log: step ${now.step.toLocaleString("en")}${of}${written}`;
    }
    if (now.lines !== seen.lines || now.step !== seen.step) $("curves-part").innerHTML = await ask("/parts/curves");
    if (now.scores !== seen.scores) $("scores-part").innerHTML = await ask("/parts/scores");
    if (now.pictures.length !== seen.pictures?.length) setPictures(now);
  }

  function setPictures({ pictures, data }) {
    const atEnd = $("when").value === $("when").max;
    $("no-pictures").hidden = pictures.length > 0;
    $("pictures").hidden = pictures.length === 0;
    $("when").max = Math.max(0, pictures.length - 1);
    if (atEnd || !seen.pictures) $("when").value = pictures.length - 1;
    $("data-figure").hidden = !data;
    if (data && !$("data").src) $("data").src = data;
    seen.pictures = pictures;
    setStep();
  }

  function setStep() {
    const found = seen.pictures?.[Number($("when").value)];
    if (!found) return;
    $("when-value").textContent = found[0].toLocaleString("en");
    $("when").setAttribute("aria-valuetext", `step ${found[0]}`);
    $("then").src = found[1];
    $("then").alt = `Grid of samples after step ${found[0]}`;
  }

  // The legend of a chart shows the values under the pointer.
  $("curves-part").addEventListener("pointermove", (event) => {
    const svg = event.target.closest("svg");
    if (!svg) return;
    const box = svg.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * 400;
    const lines = JSON.parse(svg.dataset.lines), texts = svg.nextElementSibling.querySelectorAll("[data-last]");
    const nearest = ({ at }) => at.reduce((best, place, i) => (Math.abs(place - x) < Math.abs(at[best] - x) ? i : best), 0);
    lines.forEach((line, i) => { texts[i].textContent = line.values[nearest(line)]; });
    const i = nearest(lines[0]);
    texts[texts.length - 1].textContent = `at step ${lines[0].steps[i].toLocaleString("en")}`;
    for (const end of ["x1", "x2"]) svg.querySelector(".cursor").setAttribute(end, lines[0].at[i]);
  });
  $("curves-part").addEventListener("pointerout", (event) => {
    const svg = event.target.closest("svg");
    if (!svg || svg.contains(event.relatedTarget)) return;
    for (const text of svg.nextElementSibling.querySelectorAll("[data-last]")) text.textContent = text.dataset.last;
    for (const end of ["x1", "x2"]) svg.querySelector(".cursor").setAttribute(end, -9);
  });

  $("when").addEventListener("input", setStep);
  $("reload").addEventListener("click", async () => {
    try {
      await ask("/api/reload", {}, { method: "POST" });
      location.reload();
    } catch (error) { show(error); }
  });
  look();
}
