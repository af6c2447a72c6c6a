// What the reader can do, and the first picture.

/** Pins a vertex, or none. Tokens and answers are not pinned. */
function pin(vertex) {
  const cameByLink = document.activeElement?.matches(".link") ?? false;
  const wasHidden = vertex && !vertex.terminal && !isLeft(vertex);
  const hidesAnother = state.pinned && !isKeptWithoutPin(state.pinned);
  state.pinned = vertex?.terminal ? null : (vertex ?? null);
  state.hover = null;
  if (wasHidden || hidesAnother) refreshGraph();
  else {
    light();
    placeCaptions(d3.zoomTransform(svg.node()));
  }
  if (state.pinned) reveal(state.pinned);
  byId("said").textContent = state.pinned ? spokenName(state.pinned) : "";
  writePermalink(true);
  showPanel();
  showPrompts();
  // The link is gone with what it stood in, so the focus goes where it led.
  if (cameByLink) document.querySelector("#panel h2").focus({ preventScroll: true });
}

/** What a screen reader says of a node that is pinned. */
function spokenName(vertex) {
  const { node } = vertex;
  const effect = node.effect == null ? "" : `, effect ${signed(node.effect)}`;
  const [into, from] = [vertex.in, vertex.out].map((side) => side.filter(isDrawn).length);
  return `${nameWithLabel(node)}${effect}; ${into} links in, ${from} out`;
}

/** Whether a vertex would be left if it were not pinned. */
function isKeptWithoutPin(vertex) {
  const { pinned } = state;
  state.pinned = null;
  const isKeptThen = isLeft(vertex);
  state.pinned = pinned;
  return isKeptThen;
}

/** Draws the graph again, with what is then left of it. */
function refreshGraph() {
  drawGraph();
  light();
  markFound();
  if (prompts.length) shadeNodes(prompts[state.pair]);
  const drawn = picture.drawn.filter((link) => link.kind === "edge").length;
  const left = picture.shown.filter((v) => v.node).length;
  byId("shown").textContent =
    `${left} of ${count(nodes.length, "node")}, ` +
    `${drawn.toLocaleString("en")} of ${count(edges.length, "edge")}`;
  byId("weight-value").textContent = number(state.weight);
  byId("effect-value").textContent = number(state.effect);
  showThreshold(drawn, left);
}

/** Says what the weight's threshold leaves out. */
function showThreshold(drawn, left) {
  byId("threshold").hidden = state.weight === 0;
  const important = mostImportant.size
    ? `those they join and the ${mostImportant.size} of the largest effect`
    : "those they join";
  let text =
    `Drawn are the ${count(drawn, "edge")} of absolute weight ${number(state.weight)} or more, ` +
    `with ${count(left, "node")}: ${important}.`;
  if (state.weight === automaticThreshold()) {
    text += " Chosen because the circuit is large; the weight slider changes it.";
  }
  byId("threshold-text").textContent = text;
}

// -------------------------------------------------------------------------------------- sliders

const sortedEffects = d3.sort(nodes.map(cost));

/** The threshold at a place of its slider: by rank, so that each step hides as many. */
function thresholdAt(place, sorted) {
  if (place === 0 || !sorted.length) return 0;
  return sorted[Math.min(sorted.length - 1, Math.round((place / 100) * sorted.length))];
}

function chooseWeight(place) {
  state.weight = thresholdAt(place, sortedWeights);
  refreshGraph();
}

function chooseEffect(place) {
  state.effect = thresholdAt(place, sortedEffects);
  refreshGraph();
}

/** Draws all edges. */
function drawAll() {
  byId("weight").value = 0;
  chooseWeight(0);
  byId("weight").focus();
}

// ----------------------------------------------------------------------------------------- keys

function theme() {
  const chosen = document.documentElement.dataset.theme;
  if (chosen) return chosen;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function flipTheme() {
  document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
  showPanel(false);
}

/** Goes from the pinned node along its strongest edge, or to its neighbour in the row. */
function walk(key) {
  const vertex = state.pinned;
  if (!vertex) return pin(byEffect[0]);
  if (key === "ArrowUp" || key === "ArrowDown") {
    const [side, end] = key === "ArrowUp" ? ["out", "target"] : ["in", "source"];
    const possible = vertex[side].filter((link) => !link[end].terminal && isDrawn(link));
    const isEdge = (link) => (link.kind === "edge" ? 1 : 0);
    const next = d3.greatest(possible, (link) => isEdge(link) + relativeStrength(link));
    return next && pin(next[end]);
  }
  const row = d3.sort(
    picture.shown.filter((v) => v.row === vertex.row),
    (v) => v.x,
  );
  const next = row[row.indexOf(vertex) + (key === "ArrowRight" ? 1 : -1)];
  return next && pin(next);
}

function focusSearch() {
  byId("search").focus();
}

function showHelp() {
  byId("help").showModal();
}

function zoomBy(factor) {
  svg.call(zoom.scaleBy, factor);
}

/** What is shown of a key, what it does in words, and the keys with their actions. */
const KEYS = [
  ["/", "find a node; Enter goes to it", { "/": focusSearch }],
  [
    "↑ ↓",
    "along the strongest edge",
    { ArrowUp: () => walk("ArrowUp"), ArrowDown: () => walk("ArrowDown") },
  ],
  [
    "← →",
    "to the next node of the row; in a prompt, to the next token",
    { ArrowLeft: () => walk("ArrowLeft"), ArrowRight: () => walk("ArrowRight") },
  ],
  ["Esc", "unpin", { Escape: () => pin(null) }],
  ["n p", "next and previous pair", { n: () => turn(1), p: () => turn(-1) }],
  [
    "[ ]",
    "smaller and larger circuit",
    { "[": () => chooseSize(shownSize() - 1), "]": () => chooseSize(shownSize() + 1) },
  ],
  ["+ −", "zoom", { "+": () => zoomBy(1.3), "-": () => zoomBy(1 / 1.3) }],
  ["0", "show all", { 0: fit }],
  ["t", "light or dark", { t: flipTheme }],
  ["?", "this help", { "?": showHelp }],
];
const actions = Object.assign({}, ...KEYS.map(([, , ofKeys]) => ofKeys));

/** Whether a key belongs to the element that has the focus. */
function isKeyOf(target, key) {
  if (!target.matches?.("input, textarea")) return false;
  if (target.type === "range") return key.startsWith("Arrow");
  return target.type !== "checkbox";
}

function keyInSearch(event) {
  if (event.key === "Enter" && state.found.length) {
    const next = (state.found.indexOf(state.pinned) + 1) % state.found.length;
    pin(state.found[next]);
  }
  if (event.key === "Escape") {
    event.target.value = "";
    event.target.blur();
    find("");
  }
}

function pressKey(event) {
  const isForOthers = event.ctrlKey || event.metaKey || event.altKey;
  if (isForOthers || document.querySelector("dialog[open]")) return;
  if (event.target.id === "search") keyInSearch(event);
  if (event.target.id === "label" && ["Enter", "Escape"].includes(event.key)) event.target.blur();
  if (isKeyOf(event.target, event.key)) return;
  const act = Object.hasOwn(actions, event.key) ? actions[event.key] : null;
  if (!act) return;
  event.preventDefault();
  act();
}

// ---------------------------------------------------------------------------------------- start

const BUTTONS = {
  fit,
  theme: flipTheme,
  previous: () => turn(-1),
  next: () => turn(1),
  "help-button": showHelp,
  svg: downloadSvg,
  png: downloadPng,
  all: drawAll,
};

function listen() {
  document.addEventListener("keydown", pressKey);
  byId("search").addEventListener("input", (event) => find(event.target.value));
  byId("weight").addEventListener("input", (event) => chooseWeight(Number(event.target.value)));
  byId("effect").addEventListener("input", (event) => chooseEffect(Number(event.target.value)));
  byId("size").addEventListener("input", (event) => chooseSize(Number(event.target.value)));
  byId("values").addEventListener("change", () => shadeNodes(prompts[state.pair]));
  for (const [id, act] of Object.entries(BUTTONS)) byId(id).addEventListener("click", act);
  byId("copy").addEventListener("click", () => copyText(summaryText(), byId("copy"), "Summary"));
  addEventListener("hashchange", () => {
    readPermalink();
    showAll();
  });
}

/** Shows the parts for which there are data, and sets the controls. */
function prepare() {
  for (const id of ["prompt-section", "values-label", "halves"]) byId(id).hidden = !prompts.length;
  byId("curve-section").hidden = !ladder.length;
  byId("effect-label").hidden = !hasEffects;
  byId("bigram").hidden = !ends.bigram;
  byId("loose").hidden = !verticesWithoutEdges().length;
  byId("weight").value = state.weight ? 100 - (100 * AUTOMATIC_EDGES) / edges.length : 0;
  fill(
    "keys",
    KEYS.map(([keys, text]) => [make("dt", {}, keys), make("dd", {}, text)]),
  );
  if (ladder.length) {
    byId("size").max = ladder.length - 1;
    byId("curve-note").textContent = sizeNote();
  }
}

function showAll() {
  if (ladder.length) showCurve();
  refreshGraph();
  showPanel();
  showPrompts();
}

prepare();
readPermalink();
showHeading();
showExplanation();
showProgram();
showCertificate();
showAll();
if (state.pinned) reveal(state.pinned);
listen();
let knownWidth = picture.panel.width;
new ResizeObserver(() => {
  const width = byId("graph").getBoundingClientRect().width;
  if (width && width !== knownWidth) refreshGraph();
  knownWidth = width;
}).observe(byId("graph"));
// Milliseconds from the start to the first picture, for the tests.
requestAnimationFrame(() => {
  setTimeout(() => (document.documentElement.dataset.ready = Math.round(performance.now())));
});
