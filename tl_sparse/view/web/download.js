// The graph as an SVG or PNG file, and texts for the clipboard.

const PNG_SCALE = 2;
const KEPT_STYLES = [
  "fill",
  "fill-opacity",
  "stroke",
  "stroke-width",
  "stroke-opacity",
  "stroke-dasharray",
  "stroke-linecap",
  "stroke-linejoin",
  "paint-order",
  "opacity",
  "font-family",
  "font-size",
  "font-weight",
  "text-anchor",
];

/**
 * The graph as it is seen, as the text of an SVG file: in light colours, with all styles written
 * into its elements, so that it looks the same in other programs.
 */
function graphAsSvg() {
  const before = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
  try {
    const { width, height } = picture.panel;
    const copy = byId("graph").cloneNode(true);
    const scale = d3.zoomTransform(svg.node()).k;
    writeStyles(byId("graph"), copy, scale, paintMixer());
    for (const name of [
      "id",
      "tabindex",
      "role",
      "aria-label",
      "aria-activedescendant",
      "style",
      "class",
    ]) {
      copy.removeAttribute(name);
    }
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    for (const [name, value] of Object.entries({
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
    })) {
      copy.setAttribute(name, value);
    }
    const back = d3
      .create("svg:rect")
      .attr("width", width)
      .attr("height", height)
      .attr("fill", "#fff");
    const title = d3.create("svg:title").text(fileTitle());
    copy.prepend(title.node(), back.node());
    return new XMLSerializer().serializeToString(copy);
  } finally {
    if (before == null) delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = before;
  }
}

function fileTitle() {
  return `Circuit of ${summary.task || "no task"} in ${summary.model || "a model"}`;
}

/** Writes the computed styles of an element and all in it into a copy, without what is hidden. */
function writeStyles(element, copy, scale, mixed) {
  const style = getComputedStyle(element);
  if (style.display === "none") return copy.remove();
  for (const name of KEPT_STYLES) {
    let value = style.getPropertyValue(name);
    if (name === "fill" || name === "stroke") value = mixed(value);
    // Lines that keep their width while the picture is zoomed.
    const isFixed = style.vectorEffect === "non-scaling-stroke";
    if (isFixed && name === "stroke-width") value = String(parseFloat(value) / scale);
    if (isFixed && name === "stroke-dasharray" && value !== "none") {
      value = value
        .split(/[\s,]+/)
        .map((part) => parseFloat(part) / scale)
        .join(" ");
    }
    copy.setAttribute(name, value);
  }
  for (const name of ["class", "style", "role", "aria-label", "id"]) copy.removeAttribute(name);
  for (const name of Object.keys(copy.dataset)) delete copy.dataset[name];
  const children = [...copy.children];
  [...element.children].forEach((child, i) => writeStyles(child, children[i], scale, mixed));
}

/** A function that turns a colour as CSS computes it, mixed ones too, into red, green and blue. */
function paintMixer() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const ink = canvas.getContext("2d", { willReadFrequently: true });
  const known = new Map([["none", "none"]]);
  return (color) => {
    if (!known.has(color)) {
      ink.clearRect(0, 0, 1, 1);
      ink.fillStyle = color;
      ink.fillRect(0, 0, 1, 1);
      const [red, green, blue] = ink.getImageData(0, 0, 1, 1).data;
      known.set(color, `rgb(${red},${green},${blue})`);
    }
    return known.get(color);
  };
}

/** Calls `done` with the graph as PNG, or with null if the browser cannot draw it. */
function graphAsPng(done) {
  const { width, height } = picture.panel;
  const image = new Image();
  image.onload = () => {
    const canvas = make("canvas", { width: PNG_SCALE * width, height: PNG_SCALE * height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob(done, "image/png");
  };
  image.onerror = () => done(null);
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(graphAsSvg())}`;
}

/** The name of a file, from the task and the model. */
function fileName(ending) {
  const words = `${summary.model}-${summary.task || "circuit"}`.replace(/[^\w.-]+/g, "-");
  return `${words.replace(/^-+|-+$/g, "").slice(0, 80) || "circuit"}.${ending}`;
}

/** Whether the page is in the frame of a notebook, which allows no downloads. */
function isInNotebook() {
  return location.protocol === "about:";
}

function saveBlob(blob, ending) {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: fileName(ending) }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function downloadSvg() {
  const text = graphAsSvg();
  if (isInNotebook()) showText("This frame allows no downloads. The SVG, to be copied", text);
  else saveBlob(new Blob([text], { type: "image/svg+xml" }), "svg");
}

function downloadPng() {
  if (isInNotebook()) {
    showText("This frame allows no downloads. In Python, save the page and open it", SAVING);
    return;
  }
  graphAsPng((blob) => {
    if (blob) saveBlob(blob, "png");
    else showText("This browser cannot draw the PNG. The SVG, to be copied", graphAsSvg());
  });
}

const SAVING = 'circuit.view(model).save("page.html")';

/** Copies a text and says so on a button; where the browser forbids it, shows the text instead. */
async function copyText(text, button, what) {
  const before = button.textContent;
  try {
    if (isInNotebook()) throw new Error("the frame of a notebook has no clipboard");
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = before), 1500);
  } catch {
    showText(`${what}, to be copied`, text);
  }
}

/** A dialog with a text that is selected, so that it can be copied by hand. */
function showText(title, text) {
  byId("text-title").textContent = title;
  byId("text").value = text;
  byId("text-dialog").showModal();
  byId("text").select();
}
