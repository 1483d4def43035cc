"use strict";
// The experts' map: redrawn in the order that was chosen, and read cell by cell.
if (document.getElementById("heat")) {
  const heat = document.getElementById("heat");
  const { moe_layers: layers, counts, tiers, requests } = read("report").expert_map;
  const places = { vram: "in VRAM", ram: "in RAM", disk: "on disk" };
  const names = { vram: "VRAM", ram: "RAM", disk: "disk" };
  const rows = layers.length, columns = counts[0].length;
  const cell = heat.querySelector(".cell"), out = document.getElementById("heat-readout");
  const most = Math.max(...counts.flat());
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const range = (count) => [...Array(count).keys()];
  let down = range(rows), across = layers.map(() => range(columns));

  const shade = (count, tier) =>
    count ? `use ${tier} p${Math.min(4, Math.floor((5 * count) / (most + 1)))}` : `none ${tier}`;
  const square = (x, y, small) => {
    const inset = small ? 0.22 : 0.06, side = 1 - 2 * inset;
    return `M${x + inset} ${y + inset}h${side}v${side}h${-side}z`;
  };
  const path = (css, shapes) => {
    const drawn = document.createElementNS(cell.namespaceURI, "path");
    drawn.setAttribute("class", css);
    drawn.setAttribute("d", shapes);
    return drawn;
  };
  const draw = () => {
    const cells = new Map(), bars = new Map();
    down.forEach((layer, y) => {
      across[layer].forEach((expert, x) => {
        const tier = tiers[layer][expert], css = shade(counts[layer][expert], tier);
        cells.set(css, (cells.get(css) ?? "") + square(x, y, tier === "disk"));
      });
      if (!requests.length) return;
      const total = sum(Object.values(requests[layer])) || 1;
      let left = 0;
      for (const tier of Object.keys(names)) {
        const width = (100 * (requests[layer][tier] ?? 0)) / total;
        if (width) bars.set(tier, (bars.get(tier) ?? "") + `M${left} ${y + 0.12}h${width}v.76h${-width}z`);
        left += width;
      }
    });
    heat.querySelector("g").replaceChildren(...[...cells].sort().map(([css, shapes]) => path(css, shapes)));
    const hits = document.getElementById("hits");
    if (hits) hits.replaceChildren(...[...bars].map(([tier, shapes]) => path(`solid ${tier}`, shapes)));
    const ticks = heat.parentElement.querySelectorAll(".ticks-y span"), step = Math.ceil(rows / ticks.length);
    ticks.forEach((tick, index) => { tick.textContent = layers[down[index * step]]; });
    const numbered = across.every((order) => order.every((expert, x) => expert === x));
    heat.parentElement.querySelector(".ticks-x").style.visibility = numbered ? "" : "hidden";
    heat.parentElement.querySelector(".axis").textContent =
      numbered ? "Expert across, layer down" : "Experts by use, the most used left; layer down";
    hide();
  };

  let x = -1, y = 0;
  const show = (column, row) => {
    x = Math.max(0, Math.min(columns - 1, column));
    y = Math.max(0, Math.min(rows - 1, row));
    const layer = down[y], expert = across[layer][x], count = counts[layer][expert];
    const share = (100 * count) / (sum(counts[layer]) || 1);
    cell.setAttribute("x", x); cell.setAttribute("y", y); cell.style.display = "inline";
    const found = requests.length
      ? `; the layer’s requests: ${Object.entries(names).filter(([tier]) => requests[layer][tier])
          .map(([tier, name]) => `${requests[layer][tier].toLocaleString("en")} from ${name}`).join(", ")}`
      : "";
    out.textContent = `Layer ${layers[layer]}, expert ${expert}: ${count.toLocaleString("en")} requests, ` +
      `${share.toFixed(1)} % of its layer, ${places[tiers[layer][expert]]}${found}`;
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

  const choices = document.querySelector(".choices");
  choices.hidden = false;
  choices.addEventListener("change", ({ target }) => {
    if (target.name === "across") {
      const order = (row) => (target.value === "use" ? range(columns).sort((a, b) => row[b] - row[a]) : range(columns));
      across = counts.map(order);
    } else {
      const rate = (layer) => 1 - (requests[layer].disk ?? 0) / (sum(Object.values(requests[layer])) || 1);
      down = range(rows);
      if (target.value === "hits") down.sort((a, b) => rate(a) - rate(b));
    }
    draw();
  });
}
