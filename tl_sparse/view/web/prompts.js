// The prompts of a pair side by side: the answers of model and circuit, and the values of nodes.

const LISTED_VALUES = 12;

function sidesOfPair() {
  return prompts[state.pair].length;
}

/** What a pair is called; a single prompt is one of the user's own. */
function pairName(p) {
  const sameKind = prompts.filter((pair) => pair.length === prompts[p].length);
  const what = prompts[p].length === 1 ? "own prompt" : "pair";
  return `${what} ${sameKind.indexOf(prompts[p]) + 1} of ${sameKind.length}`;
}

/** The chosen token of one prompt of the pair. Positions are counted from the end. */
function chosenToken(s) {
  return prompts[state.pair][s].tokens.length - 1 - state.back;
}

function choosePair(p) {
  state.pair = (p + prompts.length) % prompts.length;
  writePermalink();
  showPrompts();
  showPanel(false);
}

/** The next pair, or the one before. */
function turn(by) {
  if (prompts.length) choosePair(state.pair + by);
}

function chooseToken(back) {
  const shortest = d3.min(prompts[state.pair], (side) => side.tokens.length);
  state.back = clamp(back, 0, shortest - 1);
  showPrompts();
  showPanel(false);
}

function showPrompts() {
  const pair = prompts[state.pair];
  if (!pair) return;
  state.back = Math.min(state.back, d3.min(pair, (side) => side.tokens.length) - 1);
  byId("pair").textContent = pairName(state.pair);
  fill("prompt-note", promptNote(pair));
  const different = pair.length === 2 ? differences(pair[0].tokens, pair[1].tokens) : [new Set()];
  const focused = document.activeElement?.closest(".prompt")?.dataset.side;
  fill(
    "sides",
    pair.map((side, s) => sideElement(side, s, different[s])),
  );
  if (focused != null) document.querySelector(`.prompt[data-side="${focused}"]`)?.focus();
  shadeNodes(pair);
  fill("flow", valuesTable(pair));
}

function promptNote(pair) {
  const node = state.pinned?.node;
  const shaded = node
    ? ["Shaded by ", make("span", { class: "mono" }, node.name), ". "]
    : ["Pin a node to shade the tokens by it. "];
  const differs = pair.length === 2 ? "What differs between the prompts is underlined. " : "";
  return [shaded, differs, `Click a token for the values there, which are those of ${caps.sees}.`];
}

/** One prompt, and what model and circuit say next. */
function sideElement(side, s, different) {
  const node = state.pinned?.node;
  const levels = node ? side.values[state.pinned.i] : [];
  const here = chosenToken(s);
  const extra = (t) => ({
    class: `${t === here ? "here" : ""} ${different.has(t) ? "differs" : ""}`,
    onclick: () => chooseToken(side.tokens.length - 1 - t),
  });
  const text = make(
    "div",
    { class: "prompt", "data-side": s, tabindex: 0, role: "group", "aria-label": promptName(s) },
    tokenElements(side.tokens, levels, node, extra),
  );
  text.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: 1, ArrowRight: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    chooseToken(state.back + by);
  });
  return make("div", { class: "side" }, text, answersTable(side));
}

function promptName(s) {
  if (sidesOfPair() === 1) return "The prompt; arrow keys choose a token";
  return `The ${s ? "right" : "left"} prompt; arrow keys choose a token`;
}

/** What model and circuit say after a prompt: the answers, and the most likely tokens. */
function answersTable(side) {
  const runs = side.runs.map((run) => runAtSize(side, run));
  const rows = [
    make(
      "tr",
      {},
      make("th", {}, "next token"),
      runs.map(({ title }) => make("th", {}, title)),
    ),
  ];
  if (side.answer != null) {
    const named = (words) => [tokenElement(side.answer), ` ${words}`];
    const shares = runs.map(({ share }) => percent(share));
    const probabilities = runs.map(({ probability }) => percent(probability));
    rows.push(answersRow(named("of the two answers"), shares, "share"));
    rows.push(answersRow(named("of all tokens"), probabilities, "probability"));
  }
  const longest = d3.max(runs, ({ top }) => top.length) ?? 0;
  for (const k of d3.range(longest)) {
    const cells = runs.map(({ top }) => (top[k] ? likelyToken(top[k], side.answer) : ""));
    const name = k ? "" : `the ${longest} most likely`;
    rows.push(answersRow([name], cells, k ? "top" : "top first"));
  }
  return make("table", { class: "answers" }, rows);
}

function answersRow(name, cells, kind) {
  return make(
    "tr",
    { class: kind },
    make("td", {}, name),
    cells.map((cell) => make("td", {}, cell)),
  );
}

function likelyToken([id, probability], answer) {
  const kind = id === answer ? "likely right" : "likely";
  return make("span", { class: kind }, tokenElement(id), make("span", {}, percent(probability)));
}

/** A run as it is shown: of a smaller circuit, what was measured at its size. */
function runAtSize(side, run) {
  const title = run.name;
  if (run.name !== "circuit" || nodesOfSize() >= nodes.length) return { title, ...run };
  const smaller = side.at_sizes?.find((size) => size.n_nodes === nodesOfSize());
  if (!smaller) return { title, ...run };
  return { ...run, ...smaller, title: `circuit of ${count(smaller.n_nodes, "node")}` };
}

/**
 * The positions of the tokens of two texts that are not part of their longest common subsequence:
 * what differs between them, also if their lengths differ.
 */
function differences(a, b) {
  const common = d3.range(a.length + 1).map(() => new Array(b.length + 1).fill(0));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      if (a[i] === b[j]) common[i][j] = common[i + 1][j + 1] + 1;
      else common[i][j] = Math.max(common[i + 1][j], common[i][j + 1]);
    }
  }
  const [inA, inB] = [new Set(d3.range(a.length)), new Set(d3.range(b.length))];
  let [i, j] = [0, 0];
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) {
      inA.delete(i++);
      inB.delete(j++);
    } else if (common[i + 1][j] >= common[i][j + 1]) i++;
    else j++;
  }
  return [inA, inB];
}

/** The level of a node at the chosen token of one prompt. */
function levelHere(pair, k, s) {
  return pair[s].values[k][chosenToken(s)];
}

/** Shades the halves of each node in the graph by its values on the two prompts. */
function shadeNodes(pair) {
  const isShaded = byId("values").checked;
  for (const half of [0, 1]) {
    const s = Math.min(half, pair.length - 1);
    picture.marks.selectAll(`.half[data-side="${half}"]`).each(function tint() {
      const vertex = d3.select(this.closest(".node")).datum();
      const colors = isShaded ? shade(levelHere(pair, vertex.i, s)) : { "--share": "0%" };
      for (const [key, value] of Object.entries(colors)) this.style.setProperty(key, value);
    });
  }
}

/** The values at the chosen token of the nodes that differ most between the prompts. */
function valuesTable(pair) {
  const isPair = pair.length === 2;
  const value = (k, s) => activationOf(nodes[k], levelHere(pair, k, s));
  const size = (k) => Math.abs(isPair ? value(k, 0) - value(k, 1) : value(k, 0));
  const ranked = d3.sort(d3.range(nodes.length).filter(size), (k) => -size(k));
  const listed = ranked.slice(0, LISTED_VALUES);
  if (!listed.length) return note("At the chosen token no node differs between the prompts.");
  const largest = d3.max(listed, (k) => d3.max(pair, (_, s) => Math.abs(value(k, s))));
  const rows = listed.map((k) => {
    const cells = pair.map((_, s) => [
      make("td", { class: "number" }, number(value(k, s))),
      make("td", { class: "meter" }, bar(value(k, s), largest)),
    ]);
    return make("tr", {}, make("td", {}, nodeLink(vertices[k])), cells);
  });
  const which = isPair ? "those that differ most between the prompts" : "the largest";
  return [
    heading(`Values at the chosen token: ${which}`),
    make("table", { class: "rows values" }, rows),
  ];
}
