// The task loss of circuits of rising size, and the slider that chooses one of them.

const CURVE = { left: 30, right: 258, top: 8, bottom: 165, labels: 264 };

/** Chooses a size of the ladder; the whole circuit is the choice of none. */
function chooseSize(position) {
  if (!ladder.length) return;
  const within = clamp(position, 0, ladder.length - 1);
  state.size = within === wholeSize ? null : within;
  writePermalink();
  showCurve();
  refreshGraph();
  showPrompts();
}

function showCurve() {
  const losses = ladder.map((step) => step[2]);
  const levels = curveLevels();
  const top = 1.1 * d3.max([...losses, ...levels.map(({ loss }) => loss), 0.7]);
  const most = Math.max(ladder.at(-1)[0], ladder[0][0] + 1);
  const x = d3.scaleLog([ladder[0][0], most], [CURVE.left, CURVE.right]);
  const y = d3.scaleLinear([0, top], [CURVE.bottom, CURVE.top]);
  const plot = d3.select("#curve");
  plot.selectChildren().remove();
  drawAxes(plot, x, y);
  drawLevels(plot, levels, y);
  const line = d3.line(
    (step) => x(step[0]),
    (step) => y(step[2]),
  );
  plot.append("path").attr("class", "path").attr("d", line(ladder));
  const dots = plot.selectAll("circle").data(ladder).join("circle").attr("r", 3);
  dots.attr("cx", (step) => x(step[0])).attr("cy", (step) => y(step[2]));
  dots.classed("here", (_, i) => i === shownSize());
  dots.on("click", (event, step) => chooseSize(ladder.indexOf(step)));
  byId("size").value = shownSize();
  byId("size").setAttribute("aria-valuetext", sizeText());
  byId("size-value").textContent = sizeText();
}

/** The losses that the curve is compared with. */
function curveLevels() {
  const { scores } = summary;
  const levels = [
    { name: "model", loss: scores.full?.loss },
    { name: "no nodes", loss: scores.empty?.loss },
    { name: "without the circuit", loss: scores.ablated?.loss },
    { name: "target", loss: scores.target_loss },
  ];
  return levels.filter(({ loss }) => typeof loss === "number");
}

function drawAxes(plot, x, y) {
  for (const tick of y.ticks(4)) {
    plot
      .append("line")
      .attr("x1", CURVE.left)
      .attr("x2", CURVE.right)
      .attr("y1", y(tick))
      .attr("y2", y(tick));
    const text = plot
      .append("text")
      .attr("x", CURVE.left - 6)
      .attr("y", y(tick) + 3);
    text.attr("text-anchor", "end").text(tick);
  }
  let free = -Infinity;
  for (const n of x.ticks(4).filter((tick) => /^[125]0*$/.test(tick))) {
    if (x(n) < free) continue;
    free = x(n) + 8 + 6 * String(n).length;
    plot.append("text").attr("x", x(n)).attr("y", 180).attr("text-anchor", "middle").text(n);
  }
  plot
    .append("text")
    .attr("x", CURVE.labels + 10)
    .attr("y", 180)
    .text("nodes");
}

/** Dashed lines with their names on the right, which keep clear of each other. */
function drawLevels(plot, levels, y) {
  const APART = 11;
  const sorted = d3.sort(levels, ({ loss }) => loss);
  let free = CURVE.bottom + APART;
  for (const { name, loss } of sorted) {
    const at = y(loss);
    free = Math.min(free - APART, at);
    const kind = name === "target" ? "level target" : "level";
    plot
      .append("line")
      .attr("class", kind)
      .attr("x1", CURVE.left)
      .attr("x2", CURVE.right)
      .attr("y1", at)
      .attr("y2", at);
    plot
      .append("text")
      .attr("x", CURVE.labels)
      .attr("y", free + 3)
      .text(name);
  }
}

/** The size that is shown, in words. */
function sizeText() {
  const [n, m, loss, accuracy, kl] = ladder[shownSize()];
  let text = `${count(n, "node")}, ${count(m, "edge")}: task loss ${fixed(loss)}`;
  text += `, accuracy ${percent(accuracy)}`;
  if (typeof kl === "number") text += `, KL from the model ${fixed(kl, 2)}`;
  return `${text}.`;
}

/** What the slider changes. */
function sizeNote() {
  let text =
    `The circuit cut down to its most important nodes, as ranked by ${caps.ranked}, on the same ` +
    "held-out pairs as the table above. The slider changes the graph, the figures below and what " +
    "the circuit says after the prompts; values, products, effects and attention stay those of " +
    "the whole circuit.";
  if (ladder.at(-1)[0] > nodes.length) {
    text += " Of larger circuits only the figures are shown.";
  }
  return text;
}
