// The certificate of the circuit, if it has one: the verdict, and the text of each section.

const RESULTS = { met: "✓", "not met": "✗", "not tested": "–" };

function showCertificate() {
  byId("certificate-section").hidden = !certificate;
  if (!certificate) return;
  fill("certificate-about", certificate.about);
  fill("verdict", ...certificate.verdict.map(criterionRow));
  fill("certificate-texts", ...certificate.sections.map(sectionText));
}

/** A row of the verdict; what had to hold is shown below the numbers that decided. */
function criterionRow({ code, name, result, numbers, threshold }) {
  const kind = result.replace(" ", "-");
  return make(
    "tr",
    {},
    make("th", { scope: "row" }, `${code} ${name}`),
    make("td", { class: kind }, `${RESULTS[result] ?? ""} ${result}`),
    make("td", {}, numbers, make("div", { class: "note" }, `met if: ${threshold}`)),
  );
}

function sectionText({ title, text }) {
  return make("details", {}, make("summary", {}, title), make("pre", { tabindex: "0" }, text));
}
