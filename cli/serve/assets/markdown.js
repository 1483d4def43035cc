"use strict";
// Markdown as elements. Whatever the text says, it becomes text nodes of elements that are made here: never markup.
const Markdown = (() => {
  const made = (name, ...children) => {
    const element = document.createElement(name);
    element.append(...children);
    return element;
  };
  const INLINE = /(`+)([\s\S]*?[^`])\1(?!`)|\*\*([^*\n][\s\S]*?)\*\*|\*([^*\s][^*\n]*?)\*|(?<![\w])_([^_\s][^_\n]*?)_(?![\w])|~~([^~\n]+)~~|\[([^\]\n]+)\]\(([^()\s]+)\)|(https?:\/\/[^\s<>()"']+[^\s<>()"'.,:;!?])/;
  const link = (address, ...children) => {
    let target = null;
    try { target = new URL(address); } catch { /* none */ }
    if (target === null || !["http:", "https:", "mailto:"].includes(target.protocol)) return made("span", ...children);
    const element = made("a", ...children);
    element.href = target.href;
    element.target = "_blank";
    element.rel = "noopener noreferrer nofollow";
    return element;
  };
  const inline = (text, depth = 0) => {
    const parts = [];
    while (text) {
      const found = depth < 6 ? INLINE.exec(text) : null;
      if (found === null) { parts.push(text); break; }
      if (found.index) parts.push(text.slice(0, found.index));
      const [whole, , code, bold, star, low, gone, label, address, bare] = found;
      if (code !== undefined) parts.push(made("code", code.trim()));
      else if (bold !== undefined) parts.push(made("strong", ...inline(bold, depth + 1)));
      else if (star !== undefined || low !== undefined) parts.push(made("em", ...inline(star ?? low, depth + 1)));
      else if (gone !== undefined) parts.push(made("del", gone));
      else if (label !== undefined) parts.push(link(address, ...inline(label, depth + 1)));
      else parts.push(link(bare, bare));
      text = text.slice(found.index + whole.length);
    }
    return parts;
  };
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
  const blocks = (lines, depth = 0) => {
    const out = [];
    let at = 0;
    const text = [];
    const flush = () => {
      if (text.length) out.push(made("p", ...inline(text.join("\n"))));
      text.length = 0;
    };
    while (at < lines.length) {
      const line = lines[at];
      const fence = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)/.exec(line);
      const heading = /^(#{1,6})\s+(.*?)\s*#*$/.exec(line);
      const item = ITEM.exec(line);
      if (fence) {
        flush();
        const body = [];
        at += 1;
        while (at < lines.length && !lines[at].trim().startsWith(fence[1])) body.push(lines[at++]);
        at += 1;
        const pre = made("pre", made("code", body.join("\n")));
        pre.tabIndex = 0;
        pre.setAttribute("role", "group");
        pre.setAttribute("aria-label", fence[2] ? `Code, ${fence[2]}` : "Code");
        out.push(pre);
      } else if (heading) {
        flush();
        out.push(made(`h${Math.min(6, heading[1].length + 2)}`, ...inline(heading[2])));
        at += 1;
      } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
        flush();
        out.push(made("hr"));
        at += 1;
      } else if (/^\s*>/.test(line) && depth < 6) {
        flush();
        const body = [];
        while (at < lines.length && /^\s*>/.test(lines[at])) body.push(lines[at++].replace(/^\s*> ?/, ""));
        out.push(made("blockquote", ...blocks(body, depth + 1)));
      } else if (item && depth < 6) {
        flush();
        const list = made(item[2] === undefined ? "ul" : "ol");
        if (item[2] !== undefined) list.start = Number(item[2]);
        const indent = item[1].length;
        while (at < lines.length) {
          const next = ITEM.exec(lines[at]);
          if (!next || next[1].length > indent + 1 || (next[2] === undefined) !== (item[2] === undefined)) break;
          const body = [next[3]];
          at += 1;
          while (at < lines.length && (/^\s{2,}\S/.test(lines[at]) && !(ITEM.exec(lines[at])?.[1].length <= indent))) {
            body.push(lines[at++].replace(/^ {2,4}/, ""));
          }
          const inner = blocks(body, depth + 1);
          list.append(made("li", ...(inner.length === 1 && inner[0].tagName === "P" ? inner[0].childNodes : inner)));
          while (at + 1 < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1])) at += 1;
        }
        out.push(list);
      } else if (line.includes("|") && /^\s*\|?\s*:?-{2,}/.test(lines[at + 1] ?? "") && lines[at + 1].includes("|")) {
        flush();
        const head = made("tr", ...cells(line).map((cell) => made("th", ...inline(cell))));
        const body = [];
        at += 2;
        while (at < lines.length && lines[at].includes("|")) {
          body.push(made("tr", ...cells(lines[at++]).map((cell) => made("td", ...inline(cell)))));
        }
        const table = made("div", made("table", made("thead", head), made("tbody", ...body)));
        table.className = "scroll";
        table.tabIndex = 0;
        table.setAttribute("role", "group");
        table.setAttribute("aria-label", "Table");
        out.push(table);
      } else if (!line.trim()) {
        flush();
        at += 1;
      } else {
        text.push(line);
        at += 1;
      }
    }
    flush();
    return out;
  };
  return { blocks: (text) => blocks(text.replace(/\r\n?/g, "\n").split("\n")) };
})();
