// Elements of the page, and numbers and tokens as text.
//
// The texts of the data are untrusted. They only ever become text nodes or attribute values.

const data = JSON.parse(document.getElementById("data").textContent);
const { nodes, edges, summary, ends, prompts, ladder, caps, certificate } = data;
const { program, explanation } = data;

function byId(id) {
  return document.getElementById(id);
}

/** The children as one flat list, without those that are null. */
function flat(children) {
  return children.flat(9).filter((child) => child != null);
}

/**
 * A new element. An attribute that starts with "on" is an event listener, one that starts with "--"
 * a CSS property; those that are false or null are left out.
 */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) element.style.setProperty(key, value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...flat(children));
  return element;
}

/** Replaces what is in the element with this id. */
function fill(id, ...children) {
  byId(id).replaceChildren(...flat(children));
}

/** A number with three significant digits or as many as given, or a dash if there is none. */
function number(x, digits = 3) {
  if (typeof x !== "number") return "–";
  if (x === 0) return "0"; // also for −0
  let text = x.toExponential(1);
  if (Number.isInteger(x) || Math.abs(x) >= 100) text = Math.round(x).toLocaleString("en");
  else if (Math.abs(x) >= 1e-3) text = x.toPrecision(digits);
  return text.replace(/-/g, "−");
}

function signed(x, digits = 3) {
  return (x > 0 ? "+" : "") + number(x, digits);
}

/** A number with this many decimals, or a dash if there is none. */
function fixed(x, decimals = 3) {
  if (typeof x !== "number") return "–";
  const rounded = Number(x.toFixed(decimals)) || 0; // never −0
  return rounded.toFixed(decimals).replace("-", "−");
}

/** A fraction in percent; small ones never look like none. */
function percent(x) {
  if (typeof x !== "number") return "–";
  const rounded = (100 * x).toFixed(1);
  if (x > 0 && rounded === "0.0") return "<\u202f0.1\u202f%";
  return `${rounded}\u202f%`;
}

/** The beginning of a text, if it is long. */
function cut(text, length = 300) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

function count(n, word) {
  return `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
}

/** The colour of a sign, as a CSS value. */
function colorOf(x) {
  return `var(--${x < 0 ? "neg" : "pos"})`;
}

function clamp(x, low, high) {
  return Math.max(low, Math.min(high, x));
}

// ------------------------------------------------------------------------------------- tokens

/** The text with the pictures of its control characters. */
function withPictures(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\u007f/g, "␡");
}

/** A token within a longer text, where line breaks and tabs keep their effect. */
function tokenInText(id) {
  return withPictures(data.vocab[id]).replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t") || "∅";
}

/** A token by itself, on one line and with visible spaces. */
function tokenInLine(id) {
  const text = withPictures(data.vocab[id]);
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·") || "∅";
}

/**
 * A token by itself, as an element. It is isolated, so that no direction mark in it reaches its
 * neighbours.
 */
function tokenElement(id) {
  return make("span", { class: "token", title: tokenInLine(id) }, tokenInLine(id));
}

/** The CSS properties that shade something by an activation, given as a level. */
function shade(level) {
  const share = Math.round((50 * Math.abs(level)) / caps.levels);
  return { "--p": colorOf(level), "--share": `${share}%` };
}

/** The activation of a node that is written as this level. */
function activationOf(node, level) {
  return (level * node.scale) / caps.levels;
}

/**
 * The tokens of a text as elements, shaded by the levels of a node if one is given; `extra` adds
 * attributes to the token at a position.
 */
function tokenElements(ids, levels, node, extra = () => ({})) {
  return ids.map((id, i) => {
    const { class: more = "", ...others } = extra(i);
    const attributes = { class: `token ${more}`, ...others };
    if (node) {
      attributes.title = `${node.name}: ${number(activationOf(node, levels[i]))}`;
      Object.assign(attributes, shade(levels[i]));
    }
    return make("span", attributes, tokenInText(id));
  });
}
