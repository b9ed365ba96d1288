// One row per layer: what a predictor said against what the router used, hits, balance, waiting.

import { byId, element, meter, setText } from "./dom.js";
import * as format from "./format.js";

const COLUMNS = [
  { title: "Hits", of: "hit_frac", low: 0.5, meaning: "Uses whose expert was in memory when the router asked" },
  { title: "Recall", of: "recall", meaning: "Of the experts used, those that had been foreseen" },
  { title: "Precision", of: "precision", meaning: "Of the experts foreseen, those that were then used" },
  { title: "Evenness", of: "balancedness", meaning: "Mean over maximum of the experts' tokens: 100 % is even" },
];
let rows = [];
let shape = "";

function percentCell({ low = 0 }) {
  const { bar, set } = meter();
  const amount = element("span", { className: "amount" });
  const cell = element("td", {}, bar, amount);
  return {
    cell,
    show: (fraction) => {
      const isLow = fraction !== null && fraction < low;
      cell.classList.toggle("low", isLow);
      set(fraction);
      setText(amount, `${isLow ? "▼ " : ""}${format.percent(fraction)}`);
    },
  };
}

function build(experts) {
  const head = element("tr", {}, element("th", { text: "Layer", scope: "col" }));
  for (const column of COLUMNS) head.append(element("th", { text: column.title, scope: "col", title: column.meaning }));
  head.append(element("th", { text: "In memory", scope: "col" }), element("th", { text: "Waited", scope: "col" }));
  rows = experts.layers.map((layer) => {
    const cells = COLUMNS.map(percentCell);
    const [resident, waited] = [element("td"), element("td")];
    const row = element("tr", {}, element("th", { text: layer, scope: "row" }), ...cells.map((c) => c.cell), resident, waited);
    return { row, cells, resident, waited };
  });
  const body = element("tbody", {}, ...rows.map((r) => r.row));
  byId("layers").replaceChildren(element("table", {}, element("thead", {}, head), body));
}

function caption(experts) {
  if (!experts.cache) return "Without an expert cache (--moe-cache-mib) nothing has to be predicted: every expert is there.";
  if (experts.cache.prefetch === "off") return "No predictions: they need --moe-prefetch next-gate or affinity. Last minute.";
  return `Last minute of ${experts.cache.prefetch}. Recall: of the experts used, those it foresaw. Precision: of those it foresaw, the used ones.`;
}

export function showLayers(experts) {
  const wanted = experts.layers.join();
  if (wanted !== shape) {
    build(experts);
    shape = wanted;
  }
  setText(byId("layers-caption"), caption(experts));
  const by = experts.by_layer;
  rows.forEach(({ cells, resident, waited }, i) => {
    COLUMNS.forEach((column, c) => cells[c].show(by[column.of][i]));
    setText(resident, `${by.resident[i]}/${experts.num_experts}`);
    setText(waited, by.stall_s[i] ? format.joined(format.seconds(by.stall_s[i])) : format.NONE);
  });
}
