"use strict";
// What comes from the web is only ever set as text or as a number; nothing here builds HTML from strings.
const data = JSON.parse(document.getElementById("data").textContent);
const samples = data.samples;

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

function outline(candidate, index) {
  const group = svg("g", { "data-entity": index });
  const path = candidate.outlines.map(points => {
    const pairs = [];
    for (let i = 0; i < points.length; i += 2) pairs.push(`${points[i]} ${points[i + 1]}`);
    return `M${pairs.join("L")}Z`;
  }).join("");
  group.append(svg("path", { class: "mask", d: path, fill: color(index), stroke: color(index) }));
  const [x1, y1, x2, y2] = candidate.box;
  group.append(svg("rect", { class: "box", x: x1, y: y1, width: x2 - x1, height: y2 - y1, stroke: color(index) }));
  return group;
}

// Above its box, or just inside at the picture's top; it grows away from the nearer side, so that it is never cut off.
function tagName(candidate, index, sample, parent) {
  const name = element("span", candidate.tag, parent, "name");
  name.dataset.entity = index;
  const [x1, y1, x2] = candidate.box.map((value, i) => 100 * value / (i % 2 ? sample.height : sample.width));
  const [side, gap] = x1 + x2 < 100 ? ["left", Math.max(x1, 0)] : ["right", Math.max(100 - x2, 0)];
  name.style[side] = `${gap}%`;
  name.style.maxWidth = `${100 - gap}%`;
  name.style.top = `max(0px, ${y1}% - 1.45em)`;
  name.style.setProperty("--color", color(index));
}

// The image with the outlines and tags of some candidates: the given one, else the entities, else all of them.
function picture(sample, width, height, chosen) {
  const node = element("span", undefined, undefined, "picture");
  const scale = Math.min(width / sample.width, height / sample.height);
  node.style.width = `${sample.width * scale}px`;
  node.style.maxWidth = "100%";
  node.style.aspectRatio = `${sample.width} / ${sample.height}`;
  const image = element("img", undefined, node);
  image.src = sample.src;
  image.alt = sample.caption;
  const overlay = svg("svg", { viewBox: `0 0 ${sample.width} ${sample.height}`, preserveAspectRatio: "none" });
  node.append(overlay);
  const entities = sample.candidates.some(c => !c.rejected);
  sample.candidates.forEach((candidate, index) => {
    if (chosen !== undefined ? index !== chosen : entities && candidate.rejected) return;
    overlay.append(outline(candidate, index));
    tagName(candidate, index, sample, node);
  });
  return node;
}
