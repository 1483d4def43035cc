"use strict";
// The conversation: sent whole each time, answered as a stream, kept nowhere but in this page.
const find = (id) => document.getElementById(id);
const Access = {
  headers() {
    let key = null;
    try { key = sessionStorage.getItem("coldstream-key"); } catch { /* a browser that keeps nothing */ }
    return key ? { Authorization: `Bearer ${key}` } : {};
  },
  refused() {
    find("key-form").hidden = false;
  },
};
{
  const messages = [];
  const log = find("log"), text = find("text"), status = find("status");
  let running = null, editing = null, pictures = []; // data URLs, to be sent with the next message

  const element = (name, css, ...children) => {
    const made = document.createElement(name);
    if (css) made.className = css;
    made.append(...children);
    return made;
  };
  const button = (label, act) => {
    const made = element("button", "", label);
    made.type = "button";
    made.addEventListener("click", act);
    return made;
  };
  const bubble = (message, place) => {
    const mine = message.role === "user";
    const who = element("div", "who", element("span", "", mine ? "You" : "Model"));
    if (mine) {
      const edit = button("Edit", () => begin(place));
      edit.setAttribute("aria-label", `Edit message ${place / 2 + 1}`);
      who.append(edit);
    }
    const made = element("article", `message ${message.role}`, who);
    made.setAttribute("aria-label", mine ? "Your message" : "The model’s answer");
    message.box = made;
    message.body = element("div", "body");
    made.append(message.body);
    show(message);
    return made;
  };
  const show = (message) => {
    if (message.role === "user") message.body.replaceChildren(...message.pictures.map(picture), message.content);
    else message.body.replaceChildren(...Markdown.blocks(message.content));
    if (message.thoughts) {
      if (!message.details) {
        message.details = element("details", "thoughts", element("summary", "", "Thoughts"), element("div"));
        message.box.insertBefore(message.details, message.body);
      }
      message.details.lastChild.textContent = message.thoughts;
    }
  };
  const picture = (url, place) => {
    const made = element("img", "picture");
    made.src = url;
    made.alt = `Image ${place + 1}`;
    return made;
  };
  const hold = (urls) => {
    pictures = urls;
    find("pictures").replaceChildren(...urls.map((url, place) => {
      const drop = button("Remove", () => hold(pictures.filter((other) => other !== url)));
      drop.setAttribute("aria-label", `Remove image ${place + 1}`);
      return element("li", "", picture(url, place), drop);
    }));
  };
  const attach = async (files) => {
    const images = [...files].filter((file) => file.type.startsWith("image/"));
    if (!images.length) return;
    if (!document.body.classList.contains("looks")) {
      status.textContent = "This model takes no images here.";
      return;
    }
    const read = (file) => new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => failed(reader.error);
      reader.readAsDataURL(file);
    });
    try {
      hold([...new Set([...pictures, ...await Promise.all(images.map(read))])]);
      status.textContent = "";
    } catch (error) {
      status.textContent = `Error: ${error.message}`;
    }
  };
  const redraw = () => log.replaceChildren(...messages.map(bubble));
  const begin = (place) => {
    if (running) running.abort();
    editing = place;
    text.value = messages[place].content;
    hold(messages[place].pictures);
    find("cancel").hidden = false;
    status.textContent = "Editing: what was said after this message is replaced.";
    text.focus();
  };
  const endEdit = () => {
    editing = null;
    hold([]);
    find("cancel").hidden = true;
    status.textContent = "";
  };
  const busy = (yes) => {
    find("send").hidden = yes;
    find("stop").hidden = !yes;
    log.setAttribute("aria-busy", String(yes));
  };

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const parts = held.split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
      }
    }
  }
  const ask = async () => {
    const answer = { role: "assistant", content: "", thoughts: "" };
    const said = messages.map(({ role, content, pictures }) => ({ role, content: pictures?.length ? [
      ...pictures.map((url) => ({ type: "image_url", image_url: { url } })),
      { type: "text", text: content },
    ] : content }));
    if (find("system").value.trim()) said.unshift({ role: "system", content: find("system").value });
    const body = { model: "served", messages: said, stream: true };
    if (find("temperature").value) body.temperature = Number(find("temperature").value);
    if (find("tokens").value) body.max_tokens = Number(find("tokens").value);
    messages.push(answer);
    log.append(bubble(answer, messages.length - 1));
    log.scrollTop = log.scrollHeight;
    const stopper = running = new AbortController();
    busy(true);
    status.textContent = "Waiting for the first token …";
    let drawn = true, tokens = 0, timings = null, finish = "";
    const draw = () => {
      drawn = true;
      const below = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      show(answer);
      if (below) log.scrollTop = log.scrollHeight;
    };
    try {
      const response = await fetch("/v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json", ...Access.headers() },
        body: JSON.stringify(body),
        signal: stopper.signal,
      });
      if (response.status === 401) Access.refused();
      if (!response.ok) throw new Error((await response.json()).error.message);
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        timings = event.timings ?? timings;
        finish = event.choices[0]?.finish_reason ?? finish;
        const delta = event.choices[0]?.delta ?? {};
        if (!delta.content && !delta.reasoning_content) continue;
        answer.content += delta.content ?? "";
        answer.thoughts += delta.reasoning_content ?? "";
        tokens += 1;
        status.textContent = "";
        if (drawn) { drawn = false; requestAnimationFrame(draw); }
      }
      const speed = timings ? `${timings.predicted_n} tokens, ${timings.predicted_per_second.toFixed(1)} tokens/s` : "";
      status.textContent = finish === "length" ? `${speed}. Cut off: no more tokens are allowed.` : speed;
    } catch (error) {
      if (error.name === "AbortError") status.textContent = `Stopped after ${tokens} pieces.`;
      else {
        answer.box.classList.add("failed");
        status.textContent = `Error: ${error.message}`;
      }
    }
    draw();
    if (running === stopper) { running = null; busy(false); }
    if (!answer.content && !answer.thoughts && messages.at(-1) === answer) {
      messages.pop();
      answer.box.remove();
    }
  };
  const send = () => {
    const said = text.value, shown = pictures;
    if (!said.trim() || running) return;
    if (editing !== null) {
      messages.length = editing;
      redraw();
      endEdit();
    }
    text.value = "";
    hold([]);
    messages.push({ role: "user", content: said, pictures: shown });
    log.append(bubble(messages.at(-1), messages.length - 1));
    ask();
  };
  find("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (running) running.abort();
    else if (editing !== null) { text.value = ""; endEdit(); }
  });
  find("attach").addEventListener("click", () => find("file").click());
  find("file").addEventListener("change", (event) => {
    attach(event.target.files);
    event.target.value = "";
  });
  text.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) event.preventDefault();
    attach(event.clipboardData.files);
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    attach(event.dataTransfer.files);
  });
  find("stop").addEventListener("click", () => running?.abort());
  find("cancel").addEventListener("click", () => { text.value = ""; endEdit(); text.focus(); });
  find("new").addEventListener("click", () => {
    running?.abort();
    messages.length = 0;
    redraw();
    endEdit();
    text.focus();
  });
  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    try { sessionStorage.setItem("coldstream-key", find("key").value); } catch { /* it is asked for again */ }
    find("key-form").hidden = true;
    status.textContent = "The key is kept until this tab is closed. Send again.";
    dispatchEvent(new Event("key"));
  });
  const themes = ["", "light", "dark"];
  find("theme-switch").addEventListener("click", () => {
    const root = document.documentElement.dataset;
    const next = themes[(themes.indexOf(root.theme ?? "") + 1) % 3];
    if (next) root.theme = next;
    else delete root.theme;
    try { localStorage.setItem("coldstream-theme", next); } catch { /* it holds for this visit */ }
    status.textContent = `Theme: ${next || "as the system says"}`;
  });
  find("show-live").addEventListener("click", (event) => {
    const on = document.body.classList.toggle("watching");
    event.currentTarget.setAttribute("aria-expanded", String(on));
    event.currentTarget.textContent = on ? "Chat" : "Live view";
  });
  const learn = async () => {
    const response = await fetch("/props", { headers: Access.headers() }).catch(() => null);
    if (response?.status === 401) Access.refused();
    if (response?.ok) document.body.classList.toggle("looks", (await response.json()).modalities.vision);
  };
  addEventListener("key", learn);
  learn();
  text.focus();
}
