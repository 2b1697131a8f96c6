// The grid of samples, the choice of two of them, and the path between them.
import { $, ask, fill, latest } from "./page.js";

export function startSamples(model, lookAt) {
  const { classes } = model;
  const picked = { a: null, b: null }; // names of samples
  let first = 0;

  fill($("class"), classes.map((name, i) => [i, `${i} ${name}`]));
  $("class-label").hidden = classes.length === 0;

  const truncation = () => (Number($("truncation").value) > 2.05 ? "none" : $("truncation").value);
  const label = (id) => {
    const [k, seed, index] = id.split(".");
    return `${k === "-" ? "sample" : classes[k]}, seed ${seed}, number ${Number(index) + 1}`;
  };

  const load = latest(async () => {
    const values = { first, seed: $("seed").value || "0", truncation: truncation(), class: $("class").value };
    const found = await ask("/api/samples", values);
    draw(found);
    const end = Math.min(first + model.rows, classes.length);
    $("pages").hidden = $("class").value !== "" || classes.length <= model.rows;
    $("range").textContent = `classes ${first} to ${end - 1} of ${classes.length}`;
    $("earlier").disabled = first === 0;
    $("later").disabled = end >= classes.length;
  }, $("grid"));

  function draw({ samples, columns, rows }) {
    const focused = document.activeElement?.dataset?.id;
    const labelled = rows.length > 1;
    const size = labelled ? samples.length / rows.length : samples.length;
    const parts = [];
    for (let i = 0; i < samples.length; i += size) {
      const cells = document.createElement("div");
      cells.className = "cells";
      cells.style.setProperty("--columns", columns);
      cells.append(...samples.slice(i, i + size).map(cell));
      if (!labelled) { parts.push(cells); continue; }
      const row = document.createElement("div"), name = document.createElement("span");
      row.className = "row";
      name.textContent = rows[i / size];
      row.append(name, cells);
      parts.push(row);
    }
    $("grid").replaceChildren(...parts);
    if (focused) $("grid").querySelector(`[data-id="${focused}"]`)?.focus({ preventScroll: true });
    const ids = samples.map((sample) => sample.id);
    if (!ids.includes(picked.a)) picked.a = ids[0];
    if (!ids.includes(picked.b)) picked.b = ids[labelled ? size + 1 : Math.min(1, ids.length - 1)];
    mark();
    lookAt(picked.a, label(picked.a), truncation());
    between();
  }

  function cell({ id, src }) {
    const button = document.createElement("button"), image = document.createElement("img");
    button.dataset.id = id;
    button.tabIndex = -1; // Tab reaches one sample, the arrow keys the others
    image.src = src;
    image.alt = label(id);
    button.append(image);
    button.addEventListener("click", () => {
      const role = document.querySelector('input[name="role"]:checked').value;
      picked[role] = id;
      mark();
      if (role === "a") lookAt(id, label(id), truncation());
      between();
    });
    return button;
  }

  function mark() {
    for (const button of $("grid").querySelectorAll("button")) {
      button.querySelector(".badge")?.remove();
      if (picked.a === button.dataset.id) reach(button);
      const roles = ["a", "b"].filter((role) => picked[role] === button.dataset.id);
      for (const role of ["a", "b"]) button.classList.toggle(`is-${role}`, roles.includes(role));
      if (roles.length) {
        const badge = document.createElement("span");
        badge.className = `badge ${roles[0]}`;
        badge.textContent = roles.join("+").toUpperCase();
        button.append(badge);
      }
    }
  }

  function reach(button) {
    for (const other of $("grid").querySelectorAll("button")) other.tabIndex = other === button ? 0 : -1;
  }

  // Arrow keys move between samples, as in a table.
  $("grid").addEventListener("keydown", (event) => {
    const all = [...$("grid").querySelectorAll("button")], at = all.indexOf(document.activeElement);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -model.columns, ArrowDown: model.columns }[event.key];
    if (at < 0 || step === undefined) return;
    event.preventDefault();
    if (!all[at + step]) return;
    reach(all[at + step]);
    all[at + step].focus();
  });

  const between = latest(async () => {
    const { frames } = await ask("/api/between", { start: picked.a, end: picked.b, truncation: truncation() });
    const before = $("share").value / $("share").max;
    $("share").max = frames.length - 1;
    $("share").value = Math.round(before * (frames.length - 1));
    $("strip").replaceChildren(...frames.map((src) => Object.assign(new Image(), { src, alt: "" })));
    $("ends").textContent = `A: ${label(picked.a)}. B: ${label(picked.b)}.`;
    move();
  }, $("strip"));

  function move() {
    const frames = [...$("strip").children], at = Number($("share").value);
    if (!frames[at]) return;
    $("frame").src = frames[at].src;
    const share = `${Math.round((100 * at) / (frames.length - 1))} %`;
    $("share-value").textContent = share;
    $("share").setAttribute("aria-valuetext", `${share} of the way from A to B`);
    frames.forEach((frame, i) => frame.classList.toggle("now", i === at));
  }

  $("share").addEventListener("input", move);
  $("truncation").addEventListener("input", () => {
    const text = truncation() === "none" ? "off" : truncation();
    $("truncation-value").textContent = text;
    $("truncation").setAttribute("aria-valuetext", text);
    load();
  });
  $("seed").addEventListener("input", load);
  $("next-seed").addEventListener("click", () => {
    $("seed").value = (Number($("seed").value) + 1) % 2 ** 32;
    load();
  });
  $("class").addEventListener("change", load);
  for (const [id, way] of [["earlier", -1], ["later", 1]]) {
    $(id).addEventListener("click", () => {
      first = Math.max(0, first + way * model.rows);
      load();
    });
  }
  load();
}
