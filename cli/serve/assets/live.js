"use strict";
// Beside the conversation: where bytes are and what limits the speed, asked for once a second while it can be seen.
{
  const SVG = "http://www.w3.org/2000/svg";
  const NAMES = { vram: "VRAM", ram: "RAM", disk: "Disk" };
  const SPACES = { ...NAMES, disk: "Files" }; // as reports have it: all of the model is there, whatever else holds it
  const map = find("map"), status = find("live-status");
  const size = (bytes) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let at = 0;
    while (bytes >= 1024 && at < 4) { bytes /= 1024; at += 1; }
    return `${bytes.toFixed(at && bytes < 100 ? 1 : 0)} ${units[at]}`;
  };
  const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(share > 0.99 && share < 1 ? 1 : 0)} %`);
  const made = (name, css, ...children) => {
    const element = document.createElement(name);
    if (css) element.className = css;
    element.append(...children);
    return element;
  };
  const figures = (rows) => rows.map(([name, value, unit]) =>
    made("div", "", made("dt", "", name), made("dd", "", made("div", "value", value, " ", made("span", "unit", unit)))));
  // A role has one colour in all tiers: the five that take most in any of them have their own, the rest share one.
  const colours = (memory) => {
    const largest = new Map();
    for (const { name, bytes } of Object.values(memory).flat())
      largest.set(name, Math.max(bytes, largest.get(name) ?? 0));
    const ordered = [...largest].toSorted((one, other) => other[1] - one[1]).map(([name]) => name);
    const own = new Map(ordered.slice(0, 5).map((name, place) => [name, `role${place}`]));
    return (role) => own.get(role.name) ?? "role-other";
  };
  const tier = (name, unsorted, tone) => {
    const sorted = unsorted.toSorted((one, other) => other.bytes - one.bytes);
    const small = sorted.filter((role) => tone(role) === "role-other");
    const roles = sorted.filter((role) => !small.includes(role));
    if (small.length) roles.push({ name: small.length === 1 ? small[0].name : "other",
      bytes: small.reduce((sum, role) => sum + role.bytes, 0) });
    const total = roles.reduce((sum, role) => sum + role.bytes, 0);
    const bar = made("div", `bar ${name}`);
    roles.forEach((role) => {
      const part = made("i", tone(role));
      part.style.flex = `${role.bytes} 1 0`;
      bar.append(part);
    });
    const listed = made("ul", "legend", ...roles.map((role) =>
      made("li", tone(role), made("span", "swatch"), `${role.name} ${size(role.bytes)}`)));
    return made("div", "tier", made("div", "head", made("b", "", SPACES[name]), size(total)), bar, listed);
  };
  const draw = (live) => {
    find("model").textContent = live.model;
    document.title = `${live.model} · Coldstream`;
    const rate = live.tokens_per_s;
    const speed = rate === null ? "–" : rate < 100 ? rate.toPrecision(3) : Math.round(rate).toLocaleString("en");
    find("speeds").replaceChildren(...figures([
      ["Decode", speed, "tokens/s"],
      ["Expert hits", percent(live.hit_rate), ""],
      ["Limited by", live.limited_by, ""],
      ["Answers", String(live.running), live.waiting ? `and ${live.waiting} wait` : "under way"],
    ]));
    const tone = colours(live.memory);
    find("tiers").replaceChildren(...Object.entries(live.memory)
      .filter(([, roles]) => roles.length).map(([name, roles]) => tier(name, roles, tone)));
    const { counts, tiers } = live.experts;
    find("experts").hidden = !counts.length; // of a dense model
    if (!counts.length) return;
    const most = Math.max(1, ...counts.flat()), shapes = new Map(), found = { vram: 0, ram: 0, disk: 0 };
    counts.forEach((row, y) => row.forEach((count, x) => {
      const where = tiers[y][x], inset = where === "disk" ? 0.22 : 0.06, side = 1 - 2 * inset;
      const css = count ? `use ${where} p${Math.min(4, Math.floor((5 * count) / (most + 1)))}` : `none ${where}`;
      found[where] += 1;
      shapes.set(css, `${shapes.get(css) ?? ""}M${x + inset} ${y + inset}h${side}v${side}h${-side}z`);
    }));
    map.setAttribute("viewBox", `0 0 ${counts[0].length} ${counts.length}`);
    map.style.height = `${Math.min(420, counts.length * 18)}px`;
    map.setAttribute("aria-label", `Experts of ${counts.length} layers: ${Object.entries(found)
      .filter(([, count]) => count).map(([name, count]) => `${count} in ${NAMES[name]}`).join(", ")}`);
    map.replaceChildren(...[...shapes].map(([css, path]) => {
      const drawn = document.createElementNS(SVG, "path");
      drawn.setAttribute("class", css);
      drawn.setAttribute("d", path);
      return drawn;
    }));
    find("legend").replaceChildren(...Object.entries(found).filter(([, count]) => count).map(([name, count]) =>
      made("li", name, made("span", "swatch"), `${NAMES[name]}: ${count}`)));
  };
  let asking = false, named = false;
  const look = async () => {
    if (asking || document.hidden || (named && getComputedStyle(find("live")).display === "none")) return;
    asking = true;
    try {
      const response = await fetch("/live", { headers: Access.headers() });
      if (response.status === 401) Access.refused();
      if (response.ok) draw(await response.json());
      named ||= response.ok;
      status.textContent = response.ok || response.status === 401 ? "" : `The live view failed: ${response.status}`;
    } catch {
      status.textContent = "The server does not answer.";
    }
    asking = false;
  };
  setInterval(look, 1000);
  addEventListener("key", look);
  find("show-live").addEventListener("click", look);
  look();
}
