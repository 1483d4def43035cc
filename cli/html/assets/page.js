"use strict";
// Readouts: the value under the pointer, or under the arrow keys, in words. Without scripts the page lacks
// nothing but these.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const labels = read("readouts");

for (const canvas of document.querySelectorAll("[data-readout]")) {
  const texts = labels[canvas.dataset.readout];
  const out = document.getElementById(canvas.dataset.readout + "-readout");
  const cursor = canvas.querySelector(".cursor");
  let at = -1;
  const show = (index) => {
    at = Math.max(0, Math.min(texts.length - 1, index));
    cursor.style.display = "block";
    cursor.style.left = `${((at + 0.5) / texts.length) * 100}%`;
    out.textContent = texts[at];
  };
  const hide = () => { cursor.style.display = "none"; out.textContent = ""; at = -1; };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    show(Math.floor(((event.clientX - box.left) / box.width) * texts.length));
  });
  canvas.addEventListener("pointerleave", hide);
  canvas.addEventListener("blur", hide);
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: texts.length - 1 };
    if (event.key === "Escape") hide();
    else if (event.key in moves) { event.preventDefault(); show(moves[event.key]); }
  });
}

const heat = document.getElementById("heat");
if (heat) {
  const { moe_layers, counts, tiers } = read("experts");
  const names = { vram: "in VRAM", ram: "in RAM", disk: "on disk" };
  const across = heat.dataset.across;
  const columns = across === "layers" ? moe_layers.length : counts[0].length;
  const rows = across === "layers" ? counts[0].length : moe_layers.length;
  const cell = heat.querySelector(".cell");
  const out = document.getElementById("heat-readout");
  let x = -1, y = 0;
  const show = (column, row) => {
    x = Math.max(0, Math.min(columns - 1, column));
    y = Math.max(0, Math.min(rows - 1, row));
    const [layer, expert] = across === "layers" ? [x, y] : [y, x];
    const total = counts[layer].reduce((sum, count) => sum + count, 0) || 1;
    const count = counts[layer][expert];
    cell.setAttribute("x", x); cell.setAttribute("y", y); cell.style.display = "inline";
    out.textContent = `Layer ${moe_layers[layer]}, expert ${expert}: ${count.toLocaleString("en")} requests, ` +
      `${((100 * count) / total).toFixed(1)} % of its layer, ${names[tiers[layer][expert]]}`;
  };
  const hide = () => { cell.style.display = "none"; out.textContent = ""; x = -1; y = 0; };
  heat.addEventListener("pointermove", (event) => {
    const box = heat.querySelector("svg").getBoundingClientRect();
    show(Math.floor(((event.clientX - box.left) / box.width) * columns),
         Math.floor(((event.clientY - box.top) / box.height) * rows));
  });
  heat.addEventListener("pointerleave", hide);
  heat.addEventListener("blur", hide);
  heat.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: [x + 1, y], ArrowLeft: [x - 1, y], ArrowDown: [x, y + 1], ArrowUp: [x, y - 1],
                    Home: [0, y], End: [columns - 1, y] };
    if (event.key === "Escape") hide();
    else if (event.key in moves) { event.preventDefault(); show(...moves[event.key]); }
  });
}
