// Asks one question at a time, and sends every mark as it is given.
const { questions, marks } = data;
const shown = id => document.getElementById(id);
let position = Math.max(0, questions.findIndex(name => !(name in marks)));

const ASKED = {
  caption: () => "Does the caption say what is in the picture?",
  tag: entity => `Is there a ${entity.tag} here?`,
  box: entity => `Does the box hold the whole ${entity.tag}, and little else?`,
  mask: entity => `Does the mask follow the ${entity.tag}?`,
};

function show() {
  const ended = position >= questions.length;
  document.body.classList.toggle("ended", ended);
  shown("progress").textContent = `${Math.min(position + 1, questions.length)} of ${questions.length}`;
  if (ended) {
    shown("question").textContent = "That was the last question.";
    shown("stage").replaceChildren();
    shown("words").textContent = "";
    return;
  }
  const parts = questions[position].split("/");
  const key = parts[0], what = parts[parts.length - 1];
  const sample = samples[key];
  const entity = parts.length === 3 ? Number(parts[1]) : undefined;
  document.body.dataset.what = what;
  shown("question").textContent = ASKED[what](sample.candidates[entity]);
  shown("words").textContent = sample.caption;
  const source = document.querySelector(`img[data-sample="${CSS.escape(key)}"]`).src;
  const width = Math.min(640, document.documentElement.clientWidth - 40);
  shown("stage").replaceChildren(picture(sample, source, width, 480, entity));
  for (const [id, mark] of [["right", true], ["wrong", false]]) {
    shown(id).classList.toggle("given", marks[questions[position]] === mark);
  }
}

let sending = Promise.resolve();
function send(where) {
  const body = JSON.stringify(marks);
  sending = sending.then(() => fetch(where, { method: "POST", headers: { "Content-Type": "application/json" }, body }))
    .then(answer => answer.ok, () => false)
    .then(ok => { shown("saved").textContent = ok ? "saved" : "NOT SAVED: has `sdd audit` been ended?"; });
  return sending;
}

function mark(value) {
  if (position >= questions.length) return;
  marks[questions[position]] = value;
  send("marks");
  step(1);
}

function step(by) {
  position = Math.min(Math.max(position + by, 0), questions.length);
  show();
}

const ACTIONS = { right: () => mark(true), wrong: () => mark(false), skip: () => step(1), back: () => step(-1) };
const KEYS = { ArrowRight: "right", ArrowLeft: "wrong", ArrowDown: "skip", ArrowUp: "back" };
for (const [id, action] of Object.entries(ACTIONS)) shown(id).addEventListener("click", action);
document.addEventListener("keydown", event => {
  if (!KEYS[event.key] || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  ACTIONS[KEYS[event.key]]();
});
shown("done").addEventListener("click", () => send("done").then(() => {
  shown("question").textContent = "Done; this page may be closed.";
  shown("stage").replaceChildren();
  shown("words").textContent = "";
}));
show();
