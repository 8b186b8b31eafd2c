// The galleries: cards that open to what is known of their sample, and switches for masks, boxes and tags.
const dialog = document.getElementById("sample");
const part = name => dialog.querySelector(`.${name}`);

function facts(sample, note, parent) {
  const list = element("dl", undefined, parent);
  const add = (name, value) => {
    if (!value) return;
    element("dt", name, list);
    return element("dd", value, list);
  };
  add("shown for", note);
  add("key", sample.key);
  add("verdict", sample.verdict);
  add("caption", sample.caption);
  add("alt text", sample.alt_text);
  add("size", sample.width ? `${sample.width} × ${sample.height} px` : "");
  add("license", sample.licence);
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
    if (candidate.desc) element("div", candidate.desc, tag, "desc");
    for (const value of [candidate.score, candidate.text_score, candidate.predicted_iou]) {
      element("td", value === null ? "" : value.toFixed(3), row);
    }
    element("td", candidate.rejected || "entity", row);
    const highlight = on => shown && shown.querySelectorAll("[data-entity]").forEach(node => {
      node.classList.toggle("faint", on && Number(node.dataset.entity) !== index);
    });
    row.addEventListener("pointerenter", () => highlight(true));
    row.addEventListener("pointerleave", () => highlight(false));
  });
}

// The dialog goes through `entries`, each {sample, candidate, note}; `left` is told where it was closed.
let entries = [], position = 0, left = () => {};

function show() {
  const { sample, candidate, note } = entries[position];
  const body = part("sample");
  body.replaceChildren();
  const shown = sample.src ? picture(sample, 460, 560, candidate) : undefined;
  if (shown) body.append(shown);
  const words = element("div", undefined, body);
  facts(sample, note, words);
  entities(sample, words, shown);
  part("place").textContent = `${(position + 1).toLocaleString("en")} of ${entries.length.toLocaleString("en")}`;
  part("previous").disabled = position === 0;
  part("next").disabled = position === entries.length - 1;
  dialog.scrollTop = 0;
}

function open(all, at, whenClosed) {
  entries = all;
  position = at;
  left = whenClosed;
  show();
  dialog.showModal();
}

function step(by) {
  position = Math.min(Math.max(position + by, 0), entries.length - 1);
  show();
}

// Puts the picture into a card's frame.
function fill(card, { sample, candidate }) {
  const frame = card.querySelector(".frame");
  if (!sample.src) element("span", "no picture", frame, "blank");
  else frame.append(picture(sample, Math.max(frame.clientWidth, 60), frame.clientHeight, candidate));
}

for (const gallery of document.querySelectorAll(".gallery")) {
  const cards = [...gallery.querySelectorAll(".card")];
  const all = cards.map(({ dataset, title }) => ({
    sample: samples[dataset.sample],
    candidate: dataset.candidate === undefined ? undefined : Number(dataset.candidate),
    note: title,
  }));
  cards.forEach((card, index) => {
    fill(card, all[index]);
    card.addEventListener("click", () => open(all, index, at => cards[at].focus()));
  });
}
for (const what of ["masks", "boxes", "names"]) {
  const toggle = document.getElementById(what);
  const apply = () => document.body.classList.toggle(`no-${what}`, !toggle.checked);
  toggle.addEventListener("change", apply);
  apply();
}
part("previous").addEventListener("click", () => step(-1));
part("next").addEventListener("click", () => step(1));
part("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => left(position));
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("keydown", event => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  step(by);
});
