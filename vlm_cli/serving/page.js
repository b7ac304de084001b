"use strict";
const $ = (id) => document.getElementById(id);
let messages = []; // of the conversation, as the server takes them
let pictures = []; // of the next turn: {name, url}
const hint = $("hint");
let running = null; // what stops the answer that is being written

function make(tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

function show(picture) {
  const isClip = picture.url.startsWith("data:video");
  const element = document.createElement(isClip ? "video" : "img");
  element.src = picture.url;
  if (isClip) element.controls = true;
  else element.alt = picture.name;
  return element;
}

function drawPictures() {
  $("pictures").replaceChildren(...pictures.map((picture, i) => {
    const item = make("li");
    const remove = make("button", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${picture.name}`);
    remove.onclick = () => { pictures.splice(i, 1); drawPictures(); $("text").focus(); };
    item.append(show(picture), remove);
    return item;
  }));
}

async function addFiles(files) {
  const others = [];
  for (const file of files) {
    if (!/^(image|video)\//.test(file.type)) { others.push(file.name); continue; }
    const url = await new Promise((done, fail) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => fail(reader.error);
      reader.readAsDataURL(file);
    });
    pictures.push({ name: file.name || "picture", url });
  }
  drawPictures();
  say(others.length ? `Neither a picture nor a clip: ${others.join(", ")}` : "");
}

// A line above the text box, which screen readers read out.
function say(words) {
  $("status").textContent = words;
}

// A page that comes from another machine without TLS has no clipboard of its own.
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const held = make("textarea", text, "unseen");
  document.body.append(held);
  held.select();
  document.execCommand("copy");
  held.remove();
}

function addTurn(role) {
  const turn = make("article", undefined, role);
  turn.setAttribute("aria-label", role === "user" ? "You" : "Model");
  turn.setAttribute("aria-busy", role === "assistant"); // a screen reader reads the answer when it is complete
  hint.remove();
  $("turns").append(turn);
  return turn;
}

function keepInSight() {
  const turns = $("turns");
  turns.scrollTop = turns.scrollHeight;
}

// A bar of the prompt: one part for each picture, as wide as the positions that it takes, and the rest is text.
function drawLayout(usage) {
  const images = usage.vlm.image_tokens;
  const text = usage.prompt_tokens - images.reduce((a, b) => a + b, 0);
  const space = "http://www.w3.org/2000/svg";
  const bar = document.createElementNS(space, "svg");
  bar.setAttribute("class", "layout");
  bar.setAttribute("viewBox", `0 0 ${usage.prompt_tokens} 4`);
  bar.setAttribute("preserveAspectRatio", "none");
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", `The prompt: pictures (${images.length}) and ${text} tokens of text`);
  let start = 0;
  const add = (width, kind, words) => {
    const part = document.createElementNS(space, "rect");
    for (const [name, value] of Object.entries({ x: start, width, height: 4, class: kind })) {
      part.setAttribute(name, value);
    }
    const title = document.createElementNS(space, "title");
    title.textContent = words;
    part.append(title);
    bar.append(part);
    start += width;
  };
  images.forEach((count, i) => add(count, "image", `picture ${i + 1}: ${count} positions`));
  if (text) add(text, "text", `text: ${text} tokens`);
  return bar;
}

function finish(turn, text, usage, seconds, first) {
  turn.setAttribute("aria-busy", "false");
  const cost = make("div", undefined, "cost");
  if (usage) {
    const images = usage.prompt_tokens_details.image_tokens;
    turn.append(drawLayout(usage));
    cost.append(make("span", `${usage.prompt_tokens} positions (${images} of pictures), ${usage.completion_tokens} new`));
  }
  cost.append(make("span", `${first === null ? "" : `first word after ${first.toFixed(2)} s, `}all after ${seconds.toFixed(2)} s`));
  if (text) {
    const button = make("button", "Copy");
    button.type = "button";
    button.onclick = async () => { await copy(text.trimStart()); button.textContent = "Copied"; button.focus(); };
    cost.append(button);
  }
  turn.append(cost);
}

// The events of a stream, as they come.
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask() {
  const said = $("text").value;
  if (running || (!said.trim() && !pictures.length)) return;
  const shown = pictures;
  const content = shown.map((picture) => picture.url.startsWith("data:video")
    ? { type: "video_url", video_url: { url: picture.url } }
    : { type: "image_url", image_url: { url: picture.url } });
  if (said) content.push({ type: "text", text: said });
  const mine = addTurn("user");
  mine.append(...shown.map(show), make("p", said));
  const conversation = messages; // a new chat begins another one
  conversation.push({ role: "user", content });
  pictures = [];
  drawPictures();
  $("text").value = "";
  say("");
  const turn = addTurn("assistant");
  const words = make("p");
  turn.append(words);
  keepInSight();
  running = new AbortController();
  $("stop").hidden = false;
  $("send").disabled = true;
  const started = performance.now();
  const since = () => (performance.now() - started) / 1000;
  let text = "", usage = null, first = null, problem = null, stopped = false;
  try {
    const headers = { "Content-Type": "application/json" };
    if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers, signal: running.signal,
      body: JSON.stringify({
        messages: conversation, stream: true, stream_options: { include_usage: true },
        max_tokens: Number($("most").value) || 256, temperature: Number($("temperature").value) || 0,
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of readEvents(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const piece = event.choices[0]?.delta?.content;
      if (!piece) continue;
      first ??= since();
      text += piece;
      words.textContent = text.trimStart();
      keepInSight();
    }
  } catch (error) {
    stopped = error.name === "AbortError";
    if (!stopped) problem = error.message;
  }
  running = null;
  $("stop").hidden = true;
  $("send").disabled = false;
  if (problem !== null) {
    turn.append(make("p", problem, "error"));
    turn.lastChild.setAttribute("role", "alert");
    conversation.pop(); // the turn was not answered: the next one does not repeat it
    if (!$("text").value && !pictures.length && conversation === messages) {
      $("text").value = said; // to change it and try again
      pictures = shown;
      drawPictures();
    }
  } else {
    conversation.push({ role: "assistant", content: text });
    if (!text.trim()) words.replaceWith(make("p", stopped ? "(stopped)" : "(the answer is empty)", "empty"));
  }
  finish(turn, text, usage, since(), first);
  keepInSight();
  $("text").focus();
}

$("form").onsubmit = (event) => { event.preventDefault(); ask(); };
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
};
document.onkeydown = (event) => { if (event.key === "Escape") running?.abort(); };
$("stop").onclick = () => running?.abort();
$("new").onclick = () => {
  running?.abort();
  messages = [];
  pictures = [];
  drawPictures();
  $("turns").replaceChildren(hint);
  say("");
  $("text").focus();
};
$("file").onchange = async (event) => { await addFiles(event.target.files); event.target.value = ""; };
document.onpaste = (event) => { if (event.clipboardData.files.length) addFiles(event.clipboardData.files); };
document.ondragover = (event) => { event.preventDefault(); document.body.classList.add("over"); };
document.ondragleave = (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); };
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  addFiles(event.dataTransfer.files);
};
$("text").focus();
