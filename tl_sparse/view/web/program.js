// The circuit as Python source, where it can be compiled.

function showProgram() {
  byId("program-section").hidden = !program;
  if (!program) return;
  fill("program-about", program.about);
  byId("program-details").hidden = !program.source;
  byId("copy-program").hidden = !program.source;
  const nLines = program.source.trimEnd().split("\n").length;
  fill("program-summary", `Python source · ${count(nLines, "line")}`);
  byId("program-source").textContent = program.source;
  const button = byId("copy-program");
  button.addEventListener("click", () => copyText(program.source, button, "Program"));
}
