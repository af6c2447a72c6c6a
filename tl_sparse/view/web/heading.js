// The head of the page, with the scores of the circuit, and its foot.

const SCORED = [
  ["full", "model"],
  ["circuit", "circuit alone"],
  ["empty", "no nodes"],
  ["ablated", "without the circuit"],
];

/** The columns of the table of scores; one that no row has is left out. */
const COLUMNS = [
  { title: "task loss", text: lossText, value: (score) => score.loss },
  { title: "accuracy", text: (score) => percent(score.accuracy), value: (score) => score.accuracy },
  {
    title: "logit difference",
    text: (score) => fixed(score.logit_difference, 2),
    value: (score) => score.logit_difference,
  },
  {
    title: "P(answer)",
    text: (score) => percent(score.next_token?.probability),
    value: (score) => score.next_token?.probability,
  },
  {
    title: "KL from model",
    text: (score) => fixed(score.next_token?.kl, 2),
    value: (score) => score.next_token?.kl,
  },
  { title: "faithfulness", text: (score) => fixed(faithfulness(score), 2), value: faithfulness },
];

function lossText(score) {
  const error = score.standard_error;
  return fixed(score.loss) + (typeof error === "number" ? ` ± ${fixed(error)}` : "");
}

/** (m(C) − m(∅)) / (m(M) − m(∅)) of the logit difference m; null if it is not known. */
function faithfulness(score) {
  const { full, circuit, empty } = summary.scores;
  if (score === circuit && summary.faithfulness != null) return summary.faithfulness;
  const differences = [score, full, empty].map((of) => of?.logit_difference);
  if (!differences.every((x) => typeof x === "number")) return null;
  const [own, ofModel, ofNone] = differences;
  return ofModel === ofNone ? null : (own - ofNone) / (ofModel - ofNone);
}

/** The circuit in one sentence. */
function sentence() {
  const counts =
    `${summary.n_nodes.toLocaleString("en")} of ${count(summary.all_nodes, "node")} ` +
    `and ${count(summary.n_edges, "edge")}`;
  const text = counts + (summary.description ? `: ${summary.description}` : "");
  return text.replace(/[^?!.]$/, "$&.");
}

function showHeading() {
  byId("model").textContent = summary.model || "a model";
  byId("task").textContent = summary.task || "Circuit";
  let lede = sentence();
  if (summary.min_weight) {
    lede +=
      ` The page has the ${count(edges.length, "edge")} of absolute weight ` +
      `${number(summary.min_weight)} or more, and the ${count(nodes.length, "node")} they join.`;
  }
  byId("lede").textContent = lede;
  showScores();
  showMiss();
  showFoot();
}

const isNarrow = matchMedia("(max-width: 700px)");
isNarrow.addEventListener("change", showScores);

/** The rows of the table of scores that the data has. */
function scoredRows() {
  return SCORED.filter(([name]) => summary.scores[name]);
}

/** The table of scores; in a narrow window its rows become columns. */
function showScores() {
  const rows = scoredRows();
  byId("scores-section").hidden = !rows.length;
  if (!rows.length) return;
  const scoreOf = (name) => summary.scores[name];
  const columns = COLUMNS.filter(({ value }, i) => {
    return i === 0 || rows.some(([name]) => typeof value(scoreOf(name)) === "number");
  });
  let cells = [
    ["", ...columns.map(({ title }) => title)],
    ...rows.map(([name, label]) => [label, ...columns.map(({ text }) => text(scoreOf(name)))]),
  ];
  if (isNarrow.matches) cells = d3.transpose(cells);
  const ofCircuit = "circuit alone";
  fill(
    "scores",
    cells.map(([first, ...others], i) => {
      const inHead = i === 0;
      const tag = inHead ? "th" : "td";
      const isOwn = (k) => first === ofCircuit || cells[0][k + 1] === ofCircuit;
      return make("tr", {}, [
        make("th", { scope: inHead ? "col" : "row", class: first === ofCircuit && "own" }, first),
        others.map((text, k) => {
          const scope = inHead ? "col" : null;
          return make(tag, { scope, class: isOwn(k) && "own" }, text);
        }),
      ]);
    }),
  );
  byId("loss-note").textContent = lossNote();
  fill("definitions", definitions(columns.map(({ title }) => title)));
}

/** What the task loss is, and on what all is measured. */
function lossNote() {
  const n = summary.scores.n_pairs;
  const on = typeof n === "number" ? ` over ${n.toLocaleString("en")} held-out pairs` : "";
  return (
    "Task loss: cross-entropy between the two answers, in nats; guessing gives 0.693 (ln 2). " +
    `Mean ± standard error${on}.`
  );
}

/** The meaning of the rows, and of the columns that are shown. */
function definitions(titles) {
  const meanings = [
    ["circuit alone", "every node outside the circuit is held at its mean"],
    ["no nodes", "every node is held at its mean"],
    ["without the circuit", "the nodes of the circuit are held at their means, the others run"],
    ["accuracy", "how often the right one of the two answers has the larger logit"],
    ["logit difference", "logit of the right answer minus that of the wrong one, mean"],
    ["P(answer)", "probability of the right answer among all tokens, mean"],
    ["KL from model", "KL(model ‖ this) of the next-token distributions, in nats, mean"],
    ["faithfulness", "(m(this) − m(no nodes)) / (m(model) − m(no nodes)); m: logit difference"],
  ];
  const rows = scoredRows().map(([, label]) => label);
  const shown = meanings.filter(([name]) => titles.includes(name) || rows.includes(name));
  return shown.flatMap(([name, meaning]) => [make("dt", {}, name), make("dd", {}, meaning)]);
}

/** A visible mark if the circuit misses its target loss on the held-out pairs. */
function showMiss() {
  byId("miss").hidden = summary.misses_target !== true;
  if (!summary.misses_target) return;
  const { circuit, target_loss: target } = summary.scores;
  byId("miss").textContent =
    `⚠ Misses its target: on held-out pairs its task loss is ${fixed(circuit?.loss)}, ` +
    `above the ${target} that it was found with.`;
}

function showFoot() {
  const sentences = [
    `Each node has at most ${caps.passages} passages of either sign, ${caps.window} tokens long, ` +
      `from ${caps.corpus_tokens.toLocaleString("en")} tokens of the corpus run through the full ` +
      `model, and ${caps.tokens} tokens of either sign.`,
    `Of a prompt the last ${caps.prompt_tokens} tokens are shown, of a token ` +
      `${caps.token_chars} characters.`,
  ];
  if (summary.n_effect_pairs) {
    sentences.push(`Effects are over ${count(summary.n_effect_pairs, "pair")}.`);
  }
  byId("caps").textContent = sentences.join(" ");
  byId("command").textContent = summary.command;
}

/** The summary as text. */
function summaryText() {
  const lines = [`Circuit of ${summary.task || "no task"} in ${summary.model}: ${sentence()}`];
  for (const [name, label] of scoredRows()) {
    const score = summary.scores[name];
    const parts = COLUMNS.filter(({ value }) => typeof value(score) === "number");
    lines.push(`${label}: ${parts.map(({ title, text }) => `${title} ${text(score)}`).join(", ")}`);
  }
  if (scoredRows().length) lines.push(lossNote());
  return [...lines, summary.command].filter(Boolean).join("\n");
}
