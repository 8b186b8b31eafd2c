// The list of rows: searched, filtered, sorted, and drawn one page at a time.
const PAGE_ROWS = 60;
const listed = id => document.getElementById(`rows-${id}`);
const said = number => number.toLocaleString("en");

const ORDERS = {
  "input order": () => 0,
  "most entities first": (a, b) => b.entities - a.entities,
  "highest score first": (a, b) => (b.score ?? -1) - (a.score ?? -1),
  "lowest score first": (a, b) => (a.score ?? 2) - (b.score ?? 2),
  "largest first": (a, b) => b.width * b.height - a.width * a.height,
  "smallest first": (a, b) => (a.width * a.height || Infinity) - (b.width * b.height || Infinity),
};

for (const row of data.rows) {
  row.words = [row.key, row.fate, row.detail, row.caption, row.alt_text, row.url, ...row.tags].join("\n").toLowerCase();
}

// An option for every value that `values` gives of a row, with the rows that have it.
function options(select, values, group) {
  const counts = new Map();
  for (const row of data.rows) for (const value of values(row)) counts.set(value, (counts.get(value) || 0) + 1);
  const parent = group && counts.size ? element("optgroup", undefined, select) : select;
  if (group) parent.label = group;
  for (const value of [...counts.keys()].sort()) {
    element("option", `${value} (${said(counts.get(value))})`, parent).value = value;
  }
}

element("option", "all rows", listed("fate")).value = "";
options(listed("fate"), row => [row.fate], "rows");
options(listed("fate"), row => row.refused.map(reason => `box: ${reason}`), "rows with a box refused for");
element("option", "all tags", listed("tag")).value = "";
options(listed("tag"), row => row.tags);
for (const name of Object.keys(ORDERS)) element("option", name, listed("order"));

let found = [], page = 0;

function find() {
  const words = listed("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [fate, tag] = [listed("fate").value, listed("tag").value];
  const box = fate.startsWith("box: ") ? fate.slice(5) : "";
  found = data.rows.filter(row =>
    (!fate || (box ? row.refused.includes(box) : row.fate === fate)) &&
    (!tag || row.tags.includes(tag)) &&
    words.every(word => row.words.includes(word)));
  found.sort(ORDERS[listed("order").value]);
  draw(0);
}

const entryOf = row => ({
  sample: samples[row.key] || { ...row, verdict: [row.fate, row.detail].filter(Boolean).join(" "), candidates: [] },
});

function draw(number) {
  page = number;
  const first = page * PAGE_ROWS;
  const rows = found.slice(first, first + PAGE_ROWS);
  const cards = rows.map((row, index) => {
    const card = element("button", undefined, undefined, "card");
    card.type = "button";
    element("span", undefined, card, "frame");
    element("span", row.fate === "kept" ? row.caption : [row.fate, row.detail].filter(Boolean).join(" — "), card, "note");
    card.addEventListener("click", () => open(found.map(entryOf), first + index, at => {
      if (Math.floor(at / PAGE_ROWS) !== page) draw(Math.floor(at / PAGE_ROWS));
      listed("cards").children[at % PAGE_ROWS].focus();
    }));
    return card;
  });
  listed("cards").replaceChildren(...cards);
  cards.forEach((card, index) => fill(card, entryOf(rows[index])));
  listed("found").textContent = found.length
    ? `${said(first + 1)} to ${said(first + rows.length)} of ${said(found.length)} rows` : "No row matches.";
  listed("earlier").disabled = page === 0;
  listed("later").disabled = first + PAGE_ROWS >= found.length;
}

function turn(by) {
  draw(page + by);
  listed("found").scrollIntoView({ block: "nearest" });
}

for (const id of ["search", "fate", "tag", "order"]) listed(id).addEventListener("input", find);
listed("earlier").addEventListener("click", () => turn(-1));
listed("later").addEventListener("click", () => turn(1));
find();
