// Asks one question at a time, and sends every mark as it is given.
const { questions } = data;
let marks = data.marks;
// Of one entity "KEY/ENTITY/mask", of two "KIND/KEY/ENTITY/KEY/ENTITY".
const isPair = name => name.split("/").length === 5;
const keyOf = name => name.split("/")[isPair(name) ? 1 : 0];
const keys = [...new Set(questions.map(keyOf))];
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
  const at = Math.min(position, questions.length - 1);
  shown("progress").textContent = `image ${keys.indexOf(keyOf(questions[at])) + 1} of ${keys.length}, ` +
    `question ${at + 1} of ${questions.length}, ${Object.keys(marks).length} answered`;
  if (ended) {
    shown("question").textContent = "That was the last question.";
    shown("stage").replaceChildren();
    shown("words").textContent = "";
    return;
  }
  if (isPair(questions[position])) return showPair(questions[position]);
  const parts = questions[position].split("/");
  const key = parts[0], what = parts[parts.length - 1];
  const sample = samples[key];
  const entity = parts.length === 3 ? Number(parts[1]) : undefined;
  document.body.dataset.what = what;
  shown("question").textContent = ASKED[what](sample.candidates[entity]);
  shown("words").textContent = sample.caption;
  const width = Math.min(640, document.documentElement.clientWidth - 40);
  shown("stage").replaceChildren(picture(sample, width, 480, entity));
  showGiven();
}

function showPair(name) {
  const [, keyA, entityA, keyB, entityB] = name.split("/");
  const [one, other] = [[keyA, entityA], [keyB, entityB]].map(([key, entity]) => [samples[key], samples[key].entities[entity]]);
  document.body.dataset.what = "pair";
  shown("question").textContent = `Is it the very same ${one[0].candidates[one[1]].tag} in both pictures?`;
  shown("words").textContent = "";
  const width = Math.min(420, (document.documentElement.clientWidth - 50) / 2);
  shown("stage").replaceChildren(...[one, other].map(([sample, entity]) => picture(sample, width, 480, entity)));
  showGiven();
}

function showGiven() {
  for (const [id, mark] of [["right", true], ["wrong", false]]) {
    shown(id).classList.toggle("given", marks[questions[position]] === mark);
  }
}

let unsaved = {};  // what the server has not confirmed; null takes a mark back
let sending = Promise.resolve();
function send(where) {
  sending = sending.then(async () => {
    const changes = unsaved;
    unsaved = {};
    try {
      const body = JSON.stringify(changes);
      const answer = await fetch(where, { method: "POST", headers: { "Content-Type": "application/json" }, body });
      if (!answer.ok) throw new Error(answer.status);
      marks = await answer.json();
      for (const [name, value] of Object.entries(unsaved)) keep(name, value);
      shown("saved").textContent = "saved";
    } catch {
      unsaved = { ...changes, ...unsaved };
      shown("saved").textContent = "NOT SAVED: has `sdd audit` been ended?";
    }
  });
  return sending;
}

function keep(name, value) {
  if (value === null) delete marks[name];
  else marks[name] = value;
}

function mark(value) {
  if (position >= questions.length) return;
  const name = questions[position];
  if (value !== null || name in marks) {
    keep(name, value);
    unsaved[name] = value;
    send("marks");
  }
  step(1);
}

function step(by) {
  position = Math.min(Math.max(position + by, 0), questions.length);
  show();
}

const ACTIONS = { right: () => mark(true), wrong: () => mark(false), skip: () => mark(null), back: () => step(-1) };
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
