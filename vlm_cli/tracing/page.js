// Show a word: its maps over the pictures, its tokens, and to what it attends at each layer.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const words = [...document.querySelectorAll("[data-word]")], figures = [...document.querySelectorAll("[data-picture]")];
const charts = [...document.querySelectorAll(".shares")], strength = document.getElementById("strength");
const SIDE = 160; // pixels of the longer side of a drawn map; the browser smooths the rest
const SVG = "http://www.w3.org/2000/svg";
let pinned = 0, shown = -1;

const decode = text => Uint8Array.from(atob(text), x => x.charCodeAt(0));
for (const measure of Object.values(data.measures)) {
  measure.cells = decode(measure.cells);
  measure.size = measure.grids.reduce((sum, [rows, columns]) => sum + rows * columns, 0); // cells of a word
}
for (const layer of data.layers) layer.shares = decode(layer.shares);

const chosen = () => document.querySelector("[name=measure]:checked")?.value;
const percent = x => x >= 0.001 || x === 0 ? `${(100 * x).toFixed(1)} %` : `${(100 * x).toPrecision(1)} %`;
const amount = (measure, x) => measure === "attention" ? percent(x) : x.toFixed(2).replace("-0.00", "0.00").replace("-", "−");

function make(tag, text = "", name = "") {
  const found = document.createElement(tag);
  found.textContent = text;
  found.className = name;
  return found;
}

// The value of a grid of bytes between its cells, as a share of the scale: linear from centre to centre.
function sample(cells, start, rows, columns, y, x) {
  const r = Math.min(Math.max(y * rows - 0.5, 0), rows - 1), c = Math.min(Math.max(x * columns - 0.5, 0), columns - 1);
  const top = Math.floor(r), left = Math.floor(c), down = Math.min(top + 1, rows - 1), right = Math.min(left + 1, columns - 1);
  const at = (i, j) => cells[start + i * columns + j] - 127;
  const upper = at(top, left) * (1 - c + left) + at(top, right) * (c - left);
  const lower = at(down, left) * (1 - c + left) + at(down, right) * (c - left);
  return (upper * (1 - r + top) + lower * (r - top)) / 127;
}

// Yellow to red for what the word comes from, blue for what speaks against it; faint where there is little.
function paint(canvas, cells, start, rows, columns, ratio, heat) {
  const width = canvas.width = Math.max(1, Math.round(ratio >= 1 ? SIDE : SIDE * ratio));
  const height = canvas.height = Math.max(1, Math.round(ratio >= 1 ? SIDE / ratio : SIDE));
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let y = 0, i = 0; y < height; y++) for (let x = 0; x < width; x++, i += 4) {
    const value = sample(cells, start, rows, columns, (y + 0.5) / height, (x + 0.5) / width), size = Math.abs(value);
    image.data[i] = value > 0 ? 255 - 35 * size : 20;
    image.data[i + 1] = value > 0 ? 200 * (1 - size) : 110;
    image.data[i + 2] = value > 0 ? 20 : 255;
    image.data[i + 3] = 255 * heat * size ** 0.7;
  }
  context.putImageData(image, 0, 0);
}

function showMaps(word) {
  const name = chosen(), measure = data.measures[name];
  document.querySelectorAll(".about").forEach(x => { x.hidden = x.dataset.measure !== name; });
  if (!measure) return;
  let start = word * measure.size;
  figures.forEach((figure, i) => {
    const [rows, columns] = measure.grids[i], whole = measure.wholes[word][i];
    const ratio = parseFloat(figure.style.getPropertyValue("--ratio"));
    paint(figure.querySelector("canvas"), measure.cells, start, rows, columns, ratio, strength.value / 100);
    figure.querySelector("output").textContent = whole === null ? ""
      : `${name === "attention" ? "" : "fall "}${amount(name, whole)}`;
    figure.querySelector("output").title = name === "attention" ? "of the word's attention" : "fall of the word's "
      + "log-probability if the whole picture is blanked";
    start += rows * columns;
  });
  const scale = amount(name, measure.scales[word]);
  document.getElementById("legend").replaceChildren(
    ...(name === "attention" ? [make("span", "0")] : [make("span", `−${scale}`), make("span", "", "ramp cold")]),
    make("span", "", "ramp"), make("span", scale));
}

function bar(text, probability, written) {
  const row = make("tr", "", written ? "written" : ""), cell = make("td"), meter = make("meter");
  cell.append(make("code", text));
  meter.value = probability;
  row.append(cell, make("td", percent(probability)), make("td"));
  row.lastChild.append(meter);
  return row;
}

function showTokens(word) {
  document.getElementById("word").textContent = `“${word.text.trim() || JSON.stringify(word.text)}”: ${percent(word.probability)}`;
  document.getElementById("tokens").replaceChildren(...word.tokens.map(token => {
    const table = make("table"), others = token.alternatives.filter(([text]) => text !== token.text);
    table.append(make("caption", word.tokens.length > 1 ? `token “${token.text}”, or next best` : "written, or next best"));
    table.append(bar(token.text, token.probability, true), ...others.map(([text, x]) => bar(text, x, false)));
    return table;
  }));
}

// A column for each layer: the shares of text and of each picture, one above the other.
function showShares(word) {
  for (const chart of charts) {
    const layers = data.layers.filter(x => x.kind === chart.dataset.kind), parts = figures.length + 1;
    const drawing = document.createElementNS(SVG, "svg");
    drawing.setAttribute("viewBox", `0 0 ${layers.length * 10} 100`);
    drawing.setAttribute("preserveAspectRatio", "none");
    drawing.setAttribute("role", "img");
    let sums = new Array(parts).fill(0);
    layers.forEach((layer, i) => {
      const own = [...layer.shares.subarray(word * parts, (word + 1) * parts)], all = own.reduce((a, b) => a + b, 0) || 1;
      let top = 0;
      own.forEach((share, part) => {
        const height = 100 * share / all, box = document.createElementNS(SVG, "rect");
        const title = document.createElementNS(SVG, "title");
        title.textContent = `layer ${layer.layer}: ${part ? `picture ${part}` : "text"} ${percent(share / all)}`;
        box.append(title);
        for (const [key, x] of Object.entries({ x: i * 10 + 0.5, y: top, width: 9, height })) box.setAttribute(key, x);
        box.setAttribute("class", part ? `c${(part - 1) % 8}` : "text-share");
        drawing.append(box);
        top += height;
        sums[part] += share / all / layers.length;
      });
    });
    const told = sums.map((x, part) => `${part ? `picture ${part}` : "text"} ${percent(x)}`).join(", ");
    drawing.setAttribute("aria-label", `mean over the layers: ${told}`);
    const axis = make("div", "", "axis");
    axis.append(make("span", `layer ${layers[0].layer}`), make("span", `${layers.at(-1).layer}`));
    chart.replaceChildren(drawing, axis);
  }
}

function show(number, force = false) {
  if (number === shown && !force) return;
  shown = number;
  words.forEach((x, i) => x.classList.toggle("shown", i === number));
  showMaps(number);
  showTokens(data.words[number]);
  showShares(number);
}

function pin(number) {
  pinned = number;
  words.forEach((x, i) => x.setAttribute("aria-pressed", i === number));
  show(number);
}

words.forEach((word, i) => {
  word.addEventListener("mouseenter", () => show(i));
  word.addEventListener("focus", () => show(i));
  word.addEventListener("click", () => pin(i));
  word.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) words[Math.min(Math.max(i + step, 0), words.length - 1)].focus();
  });
});
document.getElementById("answer").addEventListener("mouseleave", () => show(pinned));
document.querySelectorAll("[name=measure], #strength").forEach(x => x.addEventListener("input", () => showMaps(shown)));
const answerBar = document.getElementById("bar");
new ResizeObserver(() => document.body.style.setProperty("--bar", `${answerBar.offsetHeight}px`)).observe(answerBar);
if (words.length) pin(0);
