// The reader's own words for nodes.
//
// Those that the circuit brings are in the data. Those that are changed here are kept by the
// browser, where it allows that, under the identity of the circuit.

const storageKey = `tl_sparse labels ${document.documentElement.dataset.circuit}`;
const changedLabels = readChangedLabels();

/** Name of a node → its new label. */
function readChangedLabels() {
  try {
    const stored = JSON.parse(localStorage.getItem(storageKey) ?? "{}");
    const isText = ([, label]) => typeof label === "string";
    return new Map(Object.entries(stored).filter(isText));
  } catch {
    return new Map(); // The browser forbids it, or something else has written there.
  }
}

function labelOf(node) {
  return changedLabels.get(node.name) ?? node.label ?? "";
}

/** Changes the label of a node, and whether the browser keeps it. */
function setLabel(node, text) {
  if (text === (node.label ?? "")) changedLabels.delete(node.name);
  else changedLabels.set(node.name, text);
  try {
    localStorage.setItem(storageKey, JSON.stringify(Object.fromEntries(changedLabels)));
    return true;
  } catch {
    return false;
  }
}

/** All labels as the JSON that `circuit.with_labels` takes. A removed label is the empty text. */
function labelsAsJson() {
  const labels = {};
  for (const node of nodes) {
    const label = labelOf(node);
    if (label || changedLabels.has(node.name)) labels[node.name] = label;
  }
  return JSON.stringify(labels, null, 2);
}

/** Name of a node → its expression, where the circuit is explained. */
const explained = new Map((explanation?.nodes ?? []).map((of) => [of.node, of]));

/** The words for a node: its label or, without one, its name in the explanation. */
function wordsFor(node) {
  return labelOf(node) || explained.get(node.name)?.name || "";
}

/** The name of a node, with the words for it in quotation marks if there are any. */
function nameWithLabel(node) {
  const words = wordsFor(node);
  return words ? `${node.name} “${words}”` : node.name;
}

/** The same, with its expression, as what is shown while the pointer is on it. */
function titleOf(node) {
  const of = explained.get(node.name);
  return of ? `${nameWithLabel(node)}\n${of.name} = ${cut(of.expression)}` : nameWithLabel(node);
}
