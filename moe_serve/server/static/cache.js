// The cache beside what other policies and perfect foresight would have done, and decoding beside the link's limit.

import { byId, element, meter, setText } from "./dom.js";
import * as format from "./format.js";

let shape = "";
let bars = [];

// What to draw: [name, fraction, text, is it ours].
function rowsOf(cache, hitFrac) {
  const part = (hits) => (cache.queries ? hits / cache.queries : null);
  const rows = [[`${cache.policy}, this cache`, part(cache.hits), undefined, true]];
  for (const [name, hits] of Object.entries(cache.shadow_hits)) rows.push([`${name}, in its place`, part(hits)]);
  if (cache.belady_gap_frac !== null && hitFrac !== null) {
    rows.push(["perfect foresight", hitFrac + cache.belady_gap_frac * (1 - hitFrac)]);
  }
  const limit = `${format.rate(cache.decode_tokens_per_s)} of ${format.rate(cache.link_limit_tokens_per_s)} tokens/s`;
  rows.push(["decoding, of the link's limit", cache.link_limit_frac, cache.link_limit_frac === null ? format.NONE : limit, true]);
  return rows;
}

function build(rows) {
  const list = byId("cache");
  list.replaceChildren();
  bars = rows.map(([name, , , isOurs]) => {
    const { bar, set } = meter(isOurs ? "meter" : "meter other");
    const amount = element("dd", { className: "amount" });
    list.append(element("dt", { text: name }), element("dd", {}, bar), amount);
    return { set, amount };
  });
}

function caption(cache) {
  if (!cache) return "No cache: experts run where the checkpoint is mapped, and the system's page cache does the rest.";
  const held = `${format.count(cache.num_slots)} experts fit (${format.bytes(cache.capacity_bytes).join(" ")})`;
  const shadows = Object.keys(cache.shadow_hits).length ? "" : " Add --moe-cache-shadow lru,lfu to compare policies.";
  return `${held}; missing ones come from ${cache.slow_tier === "disk" ? "the disk" : "host memory"}. Hits since the start; ` +
    `foresight and limit: recent.${shadows}`;
}

export function showCache(experts) {
  setText(byId("cache-caption"), caption(experts.cache));
  const rows = experts.cache ? rowsOf(experts.cache, experts.hit_frac) : [];
  const wanted = rows.map(([name]) => name).join();
  if (wanted !== shape) {
    build(rows);
    shape = wanted;
  }
  rows.forEach(([, fraction, text], i) => {
    bars[i].set(fraction);
    setText(bars[i].amount, text ?? format.percent(fraction, 1));
  });
}
