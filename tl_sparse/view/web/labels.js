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

/** The name of a node, with its label in quotation marks if it has one. */
function nameWithLabel(node) {
  const label = labelOf(node);
  return label ? `${node.name} “${label}”` : node.name;
}
