// Requests in flight: how old, how far. What they say is not here.

import { byId, element, meter, setText } from "./dom.js";
import * as format from "./format.js";

const SIGNS = { waiting: "○", "reading the prompt": "◐", answering: "●" };
const SHOWN = 8; // last characters of an id
const rows = new Map();

function makeRow(id) {
  const [stage, age, prompt, output] = ["td", "td", "td", "td"].map((tag) => element(tag));
  const { bar, set } = meter();
  const amount = element("span", { className: "amount" });
  output.append(bar, amount);
  const row = element("tr", {}, element("th", { text: id.slice(-SHOWN), scope: "row", title: id }), stage, age, prompt, output);
  return { row, stage, age, prompt, amount, set };
}

function update(nodes, request) {
  setText(nodes.stage, `${SIGNS[request.stage]} ${request.stage}`);
  setText(nodes.age, format.joined(format.seconds(request.age_s)));
  setText(nodes.prompt, format.count(request.prompt_tokens));
  const most = request.max_tokens;
  nodes.set(most ? request.output_tokens / most : null);
  setText(nodes.amount, format.count(request.output_tokens) + (most ? ` of ${format.count(most)}` : ""));
}

export function showRequests(data) {
  const body = byId("requests").querySelector("tbody");
  const now = new Set(data.requests.map((request) => request.id));
  for (const [id, nodes] of rows) {
    if (now.has(id)) continue;
    nodes.row.remove();
    rows.delete(id);
  }
  for (const request of data.requests) {
    if (!rows.has(request.id)) {
      rows.set(request.id, makeRow(request.id));
      body.append(rows.get(request.id).row);
    }
    update(rows.get(request.id), request);
  }
  byId("requests").hidden = data.requests.length === 0;
  const more = data.num_requests - data.requests.length;
  const number = data.num_requests ? `${format.count(data.num_requests)} in flight, the oldest first` : "No request is in flight.";
  setText(byId("requests-caption"), more > 0 ? `${number}; ${format.count(more)} more are not shown` : number);
}
