// The picture to be drawn as an empty square, with a box for each subject to drag and, by its corner, to resize.
// props.value: [{tag, box: [x1, y1, x2, y2]}, …], 0..1.
const SMALLEST = 0.1;
const ARROWS = { ArrowLeft: [-0.02, 0], ArrowRight: [0.02, 0], ArrowUp: [0, -0.02], ArrowDown: [0, 0.02] };
const paper = element.querySelector(".paper");
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

function moved([x1, y1, x2, y2], dx, dy, resizes) {
  if (resizes) return [x1, y1, clamp(x2 + dx, x1 + SMALLEST, 1), clamp(y2 + dy, y1 + SMALLEST, 1)];
  dx = clamp(dx, -x1, 1 - x2);
  dy = clamp(dy, -y1, 1 - y2);
  return [x1 + dx, y1 + dy, x2 + dx, y2 + dy];
}

function place(node, box) {
  const [x1, y1, x2, y2] = box.map((v) => 100 * v);
  Object.assign(node.style, { left: `${x1}%`, top: `${y1}%`, width: `${x2 - x1}%`, height: `${y2 - y1}%` });
}

function settle(index, box) {
  const rounded = box.map((v) => Math.round(1000 * v) / 1000);
  props.value = props.value.map((one, i) => (i === index ? { ...one, box: rounded } : one));
}

function create(index) {
  const node = document.createElement("div");
  const corner = document.createElement("i");
  node.className = `box box-${index}`;
  node.tabIndex = 0;
  node.append(document.createElement("span"), corner);
  node.onpointerdown = (start) => {
    const [side, before] = [paper.getBoundingClientRect(), props.value[index].box];
    let box = before;
    node.setPointerCapture(start.pointerId);
    node.onpointermove = (now) => {
      const [dx, dy] = [(now.clientX - start.clientX) / side.width, (now.clientY - start.clientY) / side.height];
      box = moved(before, dx, dy, start.target === corner);
      place(node, box);
    };
    node.onpointerup = node.onpointercancel = () => {
      node.onpointermove = node.onpointerup = node.onpointercancel = null;
      settle(index, box);
    };
  };
  node.onkeydown = (key) => {
    if (!ARROWS[key.key]) return;
    key.preventDefault();
    settle(index, moved(props.value[index].box, ...ARROWS[key.key], key.shiftKey));
    draw();
  };
  return node;
}

function draw() {
  props.value.forEach((one, index) => {
    const node = paper.children[index] || paper.appendChild(create(index));
    node.firstChild.textContent = one.tag || `subject ${index + 1}`;
    node.setAttribute("aria-label", `where the ${one.tag || "subject"} is drawn; arrow keys move it, with Shift its corner`);
    place(node, one.box);
  });
  while (paper.children.length > props.value.length) paper.lastChild.remove();
}

watch("value", draw);
draw();
