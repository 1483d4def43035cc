"use strict";
// What a page gains by a script: readouts under pointer and arrow keys, light or dark, the data as a file, copies.
const read = (id) => JSON.parse(document.getElementById(id).textContent);

{
  const themes = ["auto", "light", "dark"], root = document.documentElement;
  const button = document.getElementById("theme");
  const show = () => { button.textContent = `Theme: ${root.dataset.theme ?? "auto"}`; };
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme ?? "auto") + 1) % themes.length];
    if (next === "auto") delete root.dataset.theme; else root.dataset.theme = next;
    try { localStorage.setItem("coldstream-theme", next); } catch { /* then it holds for this page only */ }
    show();
  });
  show();
}

{
  const link = document.getElementById("download");
  const name = (document.title.split(":")[0] || "report").replace(/[^\w.-]+/g, "-").slice(0, 80);
  link.download = `${name}.json`;
  link.addEventListener("click", () => {
    const text = JSON.stringify(read("report"), null, 1);
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  });
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    getSelection().selectAllChildren(source);
    try { await navigator.clipboard.writeText(source.textContent); } catch { document.execCommand("copy"); }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

// Makes `canvas` tell `texts[i]` where the pointer or the arrow keys are, i counting `texts` from left to right.
const tell = (canvas, texts, out) => {
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
};

{
  const readouts = read("readouts");
  for (const canvas of document.querySelectorAll("[data-readout]")) {
    const name = canvas.dataset.readout;
    tell(canvas, readouts[name], document.getElementById(`${name}-readout`));
  }
}
