"use strict";
// Another report beside this one: chosen from a file, or dropped on the page. It is read here and goes nowhere.
if (document.getElementById("compare-open")) {
  const compared = read("compared"), mine = read("report");
  const input = document.getElementById("compare-file");
  const make = (name, text = "", css = "") => {
    const made = document.createElement(name);
    made.textContent = text;
    if (css) made.className = css;
    return made;
  };
  const at = (report, path) => path.split(".").reduce((value, key) => value?.[key], report);
  const digits = (value) => {
    if (value === 0) return "0";
    const places = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
    return value.toLocaleString("en", { maximumFractionDigits: Math.min(places, 6) });
  };
  const said = (value, unit) => {
    if (value === null || value === undefined || value === "") return "–";
    if (typeof value !== "number") return String(value);
    if (unit === "%") return `${digits(100 * value)} %`;
    if (unit === "bytes") {
      const power = value ? Math.min(4, Math.floor(Math.log2(value) / 10)) : 0;
      return `${digits(value / 1024 ** power)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
    }
    return `${digits(value)}${unit ? ` ${unit}` : ""}`;
  };
  const change = (ours, theirs, unit, better) => {
    if (typeof ours !== "number" || typeof theirs !== "number" || ours === theirs) return ["", ""];
    const points = unit === "%";
    if (!points && !theirs) return ["", ""];
    const by = points ? 100 * (ours - theirs) : 100 * (ours / theirs - 1);
    if (Math.abs(by) < 0.05) return ["same", ""];
    const sign = by > 0 ? "+" : "−", size = Math.abs(by);
    const short = (value) => value >= 10 ? value.toFixed(0) : value.toFixed(1);
    const text = !points && by >= 200 ? `${short(ours / theirs)}×` : `${sign}${short(size)} ${points ? "points" : "%"}`;
    const good = better === "" || size < 1 ? "" : (by > 0) === (better === "more") ? "better" : "worse";
    return [good ? `${text}, ${good}` : text, good];
  };

  const parse = (text) => {
    if (!text.trimStart().startsWith("<")) return JSON.parse(text.trim().split("\n").at(-1).startsWith("{")
      ? text.trim().split("\n").at(-1) : text);
    const found = new DOMParser().parseFromString(text, "text/html").getElementById("report");
    if (!found) throw new Error("it has no report in it");
    return JSON.parse(found.textContent);
  };
  const times = (report) =>
    (report.timeline?.ms ?? []).filter((_, step) => report.timeline.phase[step] === "decode");
  const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
  const binned = (values, count) =>
    Array.from({ length: count }, (_, bin) => {
      const start = Math.floor((bin * values.length) / count), end = Math.floor(((bin + 1) * values.length) / count);
      return median(values.slice(start, Math.max(end, start + 1)));
    });

  const table = (name, theirs) => {
    const made = make("table"), head = make("tr"), body = make("tbody");
    for (const title of ["", "This run", name, "This run against it"]) head.append(make("th", title, title ? "number" : ""));
    for (const [label, path, unit, better] of compared) {
      const here = at(mine, path), there = at(theirs, path);
      if ((here ?? "") === "" && (there ?? "") === "") continue;
      if (here === there && !better) continue;
      const row = make("tr"), [text, good] = change(here, there, unit, better);
      row.append(make("th", label));
      row.append(make("td", said(here, unit), "number"), make("td", said(there, unit), "number"));
      row.append(make("td", text || (here === there ? "same" : "differs"), `number ${good}`));
      body.append(row);
    }
    const top = make("thead");
    top.append(head);
    made.append(top, body);
    made.className = "compared";
    return made;
  };
  const plot = (name, theirs) => {
    const both = [times(mine), times(theirs)];
    if (both.some((values) => values.length < 2)) return null;
    const count = Math.min(200, ...both.map((values) => values.length));
    const lines = both.map((values) => binned(values, count));
    const top = 1.15 * Math.max(...lines.map((line) => [...line].sort((a, b) => a - b)[Math.floor(0.98 * (count - 1))]));
    const made = make("div");
    made.append(make("h3", `Time per token, 0 to ${digits(top)} ms, from the first decoded token to the last`));
    const canvas = make("div", "", "canvas low");
    const svg = document.createElementNS(document.querySelector("svg").namespaceURI, "svg");
    svg.setAttribute("viewBox", "0 0 1000 100");
    svg.setAttribute("preserveAspectRatio", "none");
    lines.forEach((line, index) => {
      const path = document.createElementNS(svg.namespaceURI, "path");
      const points = line.map((ms, bin) => `${(1000 * bin) / (count - 1)} ${100 * (1 - Math.min(ms / top, 1))}`);
      path.setAttribute("d", `M${points.join("L")}`);
      path.setAttribute("class", `line ${index ? "theirs" : "plain"}`);
      svg.append(path);
    });
    const cursor = make("div", "", "cursor"), out = make("p", "", "readout");
    canvas.append(svg, cursor);
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Time per token of both runs, up to ${digits(top)} ms`);
    tell(canvas, lines[0].map((ms, bin) => `${Math.round((100 * bin) / (count - 1))} % of the run: ${digits(ms)} ms, ` +
      `${name} ${digits(lines[1][bin])} ms`), out);
    const legend = make("ul", "", "legend");
    [["plain", "This run"], ["theirs", name]].forEach(([css, text]) => {
      const item = make("li");
      item.append(make("span", "", `swatch ${css}`), text);
      legend.append(item);
    });
    made.append(canvas, out, legend);
    // Of what is drawn, as medians of several tokens where these are many.
    const cut = lines.flat().filter((ms) => ms > top);
    if (cut.length) made.append(make("p", `What took longer is cut off: ${digits(Math.max(...cut))} ms at most.`, "quiet"));
    return made;
  };

  const fill = (name, theirs, error) => {
    document.getElementById("comparison")?.remove();
    const made = make("section");
    made.id = "comparison";
    made.tabIndex = -1;
    const close = make("button", "Close");
    close.type = "button";
    close.addEventListener("click", () => { made.remove(); document.getElementById("compare-open").focus(); });
    const head = make("div", "", "head");
    head.append(make("h2", error ? "Not compared" : "Two reports side by side"), close);
    made.append(head);
    if (error) made.append(make("p", error, "doubt banner"));
    else {
      const scroll = make("div", "", "scroll");
      scroll.append(table(name, theirs));
      made.append(scroll);
      const drawn = plot(name, theirs);
      if (drawn) made.append(drawn);
    }
    document.querySelector("main > header").after(made);
    made.focus();
  };
  const open = async (file) => {
    try {
      const theirs = parse(await file.text());
      if (compared.every(([, path]) => typeof at(theirs, path) !== "number")) throw new Error("it is of another kind");
      fill(file.name, theirs, "");
    } catch (error) {
      fill(file.name, null, `${file.name} cannot be compared with this page: expected a report page of the same ` +
        `command, or its JSON (${error.message}).`);
    }
  };

  document.getElementById("compare-open").addEventListener("click", () => input.click());
  input.addEventListener("change", () => { if (input.files.length) open(input.files[0]); input.value = ""; });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  });
}
