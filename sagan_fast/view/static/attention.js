// The picture whose points can be clicked, the map of the chosen point, and real images that are dropped on the page.
import { $, ask, fill, latest, show } from "./page.js";

export function startAttention({ model, run }) {
  const size = model.resolution, layers = model.layers;
  const hasD = layers.d !== undefined;
  let sample = null, real = null; // {of, label, truncation}, {of, label}
  let point = [size / 2, size / 2], cell = 1;

  fill($("real-class"), model.classes.map((name, i) => [i, `${i} ${name}`]));
  $("network").querySelector('[value="d"]').disabled = !hasD;
  $("drop-controls").hidden = !hasD;
  $("drop-help").textContent = hasD
    ? "Drop a real image here to see where the discriminator looks. It stays on this machine, in memory."
    : "Only a run or checkpoint has a discriminator, which looks at real images. This is a generator alone.";

  function setLayers() {
    const names = layers[$("network").value] ?? [];
    $("layer").replaceChildren();
    fill($("layer"), names.map((name) => [name, `${name.replace("attentions.", "")} (map size)`]));
    $("layer").value = names.at(-1) ?? "";
    $("layer-label").hidden = names.length < 2;
    $("no-attention").hidden = names.length > 0;
    $("no-attention").textContent = "This network has no attention layer, so there is nothing to look at.";
    $("pair").hidden = names.length === 0;
    $("found").hidden = names.length === 0;
  }

  const load = latest(async () => {
    const shown = real ?? sample;
    if (!shown || $("pair").hidden) return;
    const values = { network: $("network").value, layer: $("layer").value, of: shown.of, x: point[0], y: point[1],
      truncation: shown.truncation ?? "none", class: $("real-class").value || "0" };
    const found = await ask("/api/attention", values);
    $("picture-image").src = found.picture;
    $("map").src = found.map;
    $("picture-caption").textContent = shown.label;
    cell = size / found.cells;
    $("dot").style.left = `${(100 * found.x) / size}%`;
    $("dot").style.top = `${(100 * found.y) / size}%`;
    const text = words(found);
    $("map").alt = `Attention map. ${text}`;
    $("found").textContent = text;
  }, $("pair"));

  function words({ even, peak, half, gamma, small, score }) {
    const looks = even
      ? `This point looks nearly evenly at the whole picture (peak ${peak.toFixed(2)} times even attention).`
      : `Half of this point's attention is on ${Math.max(1, Math.round(100 * half))} % of the picture; the strongest ` +
        `place has ${peak.toFixed(1)} times even attention.`;
    const weak = small ? ", near 0: the block adds almost nothing, and its map says little" : "";
    const scored = score === null ? "" : ` The discriminator's score is ${score.toFixed(2)}; higher means more real.`;
    return `${looks} Gamma is ${gamma.toFixed(3)}${weak}.${scored}`;
  }

  function moveTo(x, y) {
    point = [x, y].map((value) => Math.min(size - 0.01, Math.max(0, value)));
    load();
  }

  $("picture").addEventListener("click", (event) => {
    const box = $("picture-image").getBoundingClientRect();
    moveTo(((event.clientX - box.left) / box.width) * size, ((event.clientY - box.top) / box.height) * size);
  });
  $("picture").addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way) return;
    event.preventDefault();
    moveTo(point[0] + way[0] * cell, point[1] + way[1] * cell);
  });
  $("layer").addEventListener("change", load);
  $("real-class").addEventListener("change", load);
  $("network").addEventListener("change", () => {
    if ($("network").value === "g") setReal(null);
    setLayers();
    load();
  });

  function setReal(value) {
    real = value;
    $("back").hidden = !real;
    $("real-class-label").hidden = !real || model.classes.length === 0;
  }

  async function take(file) {
    if (!file || !hasD) return;
    try {
      if (file.size > 20 * 2 ** 20) throw new Error("the file is larger than 20 MB: drop a smaller image");
      const headers = { "content-type": "application/octet-stream" };
      const kept = await ask("/api/image", {}, { method: "POST", body: file, headers });
      setReal({ of: kept.of, label: `${file.name}, ${kept.said}` });
      $("network").value = "d";
      setLayers();
      await load();
    } catch (error) { show(error); }
  }

  $("file").addEventListener("change", () => { take($("file").files[0]); $("file").value = ""; });
  $("back").addEventListener("click", () => { setReal(null); load(); });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault(); // or the browser would leave the page for the file
      $("drop").classList.toggle("over", kind === "dragover" && hasD);
      if (kind === "drop") take(event.dataTransfer.files[0]);
    });
  }
  setLayers();

  return {
    lookAt(of, label, truncation) {
      sample = { of, label, truncation };
      setReal(null);
      load();
    },
  };
}
