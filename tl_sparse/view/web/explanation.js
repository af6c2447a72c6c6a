// The expressions of the nodes, if the circuit is explained, and what they are worth.

function showExplanation() {
  byId("explanation-section").hidden = !explanation;
  if (!explanation) return;
  fill("explanation-about", explanation.about);
  fill("replaced", figureHead(["", "task loss", "accuracy"]), replacedRows());
  const columns = ["node", "expression", "text", "prompts", "loss with it", "at its mean"];
  fill("expressions", figureHead(columns), make("tbody", {}, explanation.nodes.map(expressionRow)));
  byId("looks-at").hidden = !explanation.heads.length;
  fill(
    "looks-at",
    explanation.heads.map((text) => make("li", {}, text)),
  );
}

/** The head of a table, in which all but the names and expressions are numbers. */
function figureHead(titles) {
  const cells = titles.map((title) => {
    const isText = ["", "node", "expression"].includes(title);
    return make("th", { scope: "col", class: !isText && "number" }, title);
  });
  return make("thead", {}, make("tr", {}, cells));
}

/** A cell with a number; its title stands beside it in a narrow window. */
function numberCell(text, title, isMissed = false) {
  return make("td", { class: isMissed ? "number missed" : "number", "data-title": title }, text);
}

/** A mean with its standard error. */
function estimate({ value, standard_error: error }) {
  return fixed(value) + (typeof error === "number" ? ` ± ${fixed(error)}` : "");
}

function replacedRows() {
  const rows = explanation.replaced.map(({ what, loss, accuracy }) => {
    const cells = [
      numberCell(estimate(loss), "task loss"),
      numberCell(percent(accuracy.value), "accuracy"),
    ];
    return make("tr", {}, make("th", { scope: "row" }, what), cells);
  });
  return make("tbody", {}, rows);
}

function expressionRow(of) {
  const vertex = vertices.find((v) => v.node?.name === of.node);
  const name = vertex ? nodeLink(vertex, of.node) : make("code", {}, `${of.node} ${of.name}`);
  const isMissed = !of.is_explained;
  return make(
    "tr",
    {},
    make("td", {}, name),
    make("td", {}, make("code", { class: "expression" }, cut(of.expression))),
    numberCell(fitText(of.text), "text", isMissed),
    numberCell(fitText(of.prompts), "prompts", isMissed),
    numberCell(estimate(of.in_circuit), "loss with it"),
    numberCell(estimate(of.held_in_circuit), "at its mean"),
  );
}

/** How well an expression fits: explained variance or, marked, balanced accuracy. */
function fitText(fit) {
  if (!fit) return "–";
  if (fit.balanced_accuracy != null) return `${fixed(fit.balanced_accuracy)} acc.`;
  return fit.explained == null ? "constant" : fixed(fit.explained);
}

/** The expression of a node, for the panel. */
function expressionOf(node) {
  const of = explained.get(node.name);
  if (!of) return null;
  const origin = of.origin === "own" ? "Your own expression" : "Expression";
  const onText = of.text ? `text ${fitText(of.text)}, ` : "";
  return [
    make(
      "code",
      { class: "expression", id: "expression", tabindex: 0 },
      `${of.name} = ${of.expression}`,
    ),
    note(
      `${origin}; held out: ${onText}prompts ${fitText(of.prompts)}. With it in place of the node `,
      `the loss is ${fixed(of.in_circuit.value)} in the circuit and `,
      `${fixed(of.in_model.value)} in the model; at its mean ${fixed(of.held_in_circuit.value)} `,
      `and ${fixed(of.held_in_model.value)}.`,
    ),
  ];
}
