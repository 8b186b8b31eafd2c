"use strict";
// What comes from the web is only ever set as text or as a number; nothing here builds HTML from strings.
const samples = JSON.parse(document.getElementById("data").textContent);
const dialog = document.getElementById("sample");

function svg(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function element(name, text, parent, className) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  if (parent) parent.append(node);
  return node;
}

// Hues a golden angle apart, as in the pictures that `sdd inspect` draws.
const color = index => `hsl(${(7 + index * 222.5) % 360} 90% 48%)`;

// The image with the outlines of some candidates over it: the given one, else the entities, else all of them.
function picture(sample, source, width, height, chosen) {
  const node = element("span", undefined, undefined, "picture");
  const scale = Math.min(width / sample.width, height / sample.height);
  node.style.width = `${sample.width * scale}px`;
  node.style.maxWidth = "100%";
  node.style.aspectRatio = `${sample.width} / ${sample.height}`;
  const image = element("img", undefined, node);
  image.src = source;
  image.alt = sample.caption;
  const overlay = svg("svg", { viewBox: `0 0 ${sample.width} ${sample.height}`, preserveAspectRatio: "none" });
  const entities = sample.candidates.some(c => !c.rejected);
  sample.candidates.forEach((candidate, index) => {
    if (chosen !== undefined ? index !== chosen : entities && candidate.rejected) return;
    const group = svg("g", { "data-entity": index });
    const path = candidate.outlines.map(points => {
      const pairs = [];
      for (let i = 0; i < points.length; i += 2) pairs.push(`${points[i]} ${points[i + 1]}`);
      return `M${pairs.join("L")}Z`;
    }).join("");
    group.append(svg("path", { class: "mask", d: path, fill: color(index), stroke: color(index) }));
    const [x1, y1, x2, y2] = candidate.box;
    group.append(svg("rect", { class: "box", x: x1, y: y1, width: x2 - x1, height: y2 - y1, stroke: color(index) }));
    overlay.append(group);
  });
  node.append(overlay);
  return node;
}

function facts(sample, parent) {
  const list = element("dl", undefined, parent);
  const add = (name, value) => {
    if (!value) return;
    element("dt", name, list);
    return element("dd", value, list);
  };
  add("key", sample.key);
  add("verdict", sample.verdict);
  add("caption", sample.caption);
  add("alt text", sample.alt_text);
  add("size", sample.width ? `${sample.width} × ${sample.height} px` : "");
  add("licence", sample.licence);
  const url = add("URL", sample.url);
  if (url && /^https?:\/\//.test(sample.url)) {
    url.textContent = "";
    const link = element("a", sample.url, url);
    link.href = sample.url;
    link.rel = "noopener noreferrer nofollow";
    link.target = "_blank";
  }
}

function entities(sample, parent, shown) {
  if (!sample.candidates.length) return;
  const table = element("table", undefined, parent);
  const head = element("tr", undefined, element("thead", undefined, table));
  for (const name of ["tag", "score", "text", "IoU", ""]) element("th", name, head);
  sample.candidates.forEach((candidate, index) => {
    const row = element("tr", undefined, table, candidate.rejected ? "refused" : "");
    row.dataset.entity = index;
    const tag = element("td", undefined, row);
    element("span", undefined, tag, "swatch").style.background = color(index);
    tag.append(candidate.tag);
    for (const value of [candidate.score, candidate.text_score, candidate.predicted_iou]) {
      element("td", value === null ? "" : value.toFixed(3), row);
    }
    element("td", candidate.rejected || "entity", row);
    const highlight = on => shown && shown.querySelectorAll("g").forEach(group => {
      group.classList.toggle("faint", on && Number(group.dataset.entity) !== index);
    });
    row.addEventListener("pointerenter", () => highlight(true));
    row.addEventListener("pointerleave", () => highlight(false));
  });
}

function open(card) {
  const sample = samples[card.dataset.sample];
  const body = dialog.querySelector(".sample");
  body.replaceChildren();
  const source = card.querySelector("img");
  const chosen = card.dataset.candidate === undefined ? undefined : Number(card.dataset.candidate);
  const shown = source ? picture(sample, source.src, 460, 560, chosen) : undefined;
  if (shown) body.append(shown);
  const words = element("div", undefined, body);
  facts(sample, words);
  entities(sample, words, shown);
  dialog.showModal();
}

for (const card of document.querySelectorAll(".card")) {
  const image = card.querySelector("img");
  if (image) {
    const chosen = card.dataset.candidate === undefined ? undefined : Number(card.dataset.candidate);
    const frame = card.querySelector(".frame");
    const height = frame.clientHeight;
    image.replaceWith(picture(samples[card.dataset.sample], image.src, Math.max(frame.clientWidth, 60), height, chosen));
  }
  card.addEventListener("click", () => open(card));
}
for (const what of ["masks", "boxes"]) {
  const toggle = document.getElementById(what);
  const apply = () => document.body.classList.toggle(`no-${what}`, !toggle.checked);
  toggle.addEventListener("change", apply);
  apply();
}
dialog.querySelector(".close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
