// The galleries: cards that open to what is known of their sample, and switches for masks and boxes.
const dialog = document.getElementById("sample");

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
