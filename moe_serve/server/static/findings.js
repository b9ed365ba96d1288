// What is wrong, above everything else: each with a mark, a word, and what to do about it.

import { byId, element } from "./dom.js";

const WORDS = { problem: "Problem", watch: "Watch" };
const MARKS = { problem: "✕", watch: "!" };
let shown = null;

function row({ severity, title, advice }) {
  const mark = element("span", { className: "sign", text: MARKS[severity], "aria-hidden": "true" });
  const word = element("span", { className: "word", text: WORDS[severity] });
  return element("li", { className: severity }, mark, word, element("strong", { text: title }), element("span", { text: advice }));
}

// Only a change is drawn: a screen reader says the list again whenever it is made anew.
export function showFindings(findings) {
  const wanted = JSON.stringify(findings);
  if (wanted === shown) return;
  shown = wanted;
  const well = element("li", { className: "well" }, element("span", { className: "sign", text: "✓", "aria-hidden": "true" }),
    element("span", { text: "Nothing is wrong: no refusals, no full queue, no slow disk." }));
  byId("findings").replaceChildren(...(findings.length ? findings.map(row) : [well]));
}
