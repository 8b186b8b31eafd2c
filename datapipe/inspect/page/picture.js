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
