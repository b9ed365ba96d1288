// The cache beside what other policies and perfect foresight would have done, and decoding beside the link's limit.

import { byId, element, meter, setText } from "./dom.js";
import * as format from "./format.js";

let shape = "";
let bars = [];

// What to draw: [name, fraction, is it ours].
function rowsOf(cache, hitFrac) {
  const part = (hits) => (cache.queries ? hits / cache.queries : null);
  const rows = [[`${cache.policy}, this cache`, part(cache.hits), true]];
  for (const [name, hits] of Object.entries(cache.shadow_hits)) rows.push([`with policy ${name}`, part(hits)]);
  if (cache.belady_gap_frac !== null && hitFrac !== null) {
    rows.push(["the best possible", hitFrac + cache.belady_gap_frac * (1 - hitFrac)]);
  }
  rows.push(["decoding speed, of what reads allow", cache.link_limit_frac, true]);
  return rows;
}

function build(rows) {
  const list = byId("cache");
  list.replaceChildren();
  bars = rows.map(([name, , isOurs]) => {
    const { bar, set } = meter(isOurs ? "meter" : "meter other");
    const amount = element("dd", { className: "amount" });
    list.append(element("dt", { text: name }), element("dd", {}, bar), amount);
    return { set, amount };
  });
}

function caption(cache) {
  if (!cache) return "No cache: experts run where the checkpoint is mapped, and the system's page cache does the rest.";
  const held = `${format.count(cache.num_slots)} experts fit (${format.joined(format.bytes(cache.capacity_bytes))})`;
  const shadows = Object.keys(cache.shadow_hits).length ? "" : " Add --moe-cache-shadow lru,lfu to compare policies.";
  return `${held}; missing ones come from ${cache.slow_tier === "disk" ? "the disk" : "host memory"}. Hits since the start; ` +
    `the best possible and the speed: recent.${shadows}`;
}

function limit(cache) {
  if (cache.link_limit_frac === null) return "Nothing was read for decoding in the last minute: the link is no limit.";
  const [reached, most] = [format.rate(cache.decode_tokens_per_s), format.rate(cache.link_limit_tokens_per_s)];
  const rate = format.joined(format.bytes(cache.link_bytes_per_s));
  return `Decoding makes ${reached} tokens/s; moving nothing but the missing experts at ${rate}/s would allow ${most}.`;
}

export function showCache(experts) {
  setText(byId("cache-caption"), caption(experts.cache));
  const rows = experts.cache ? rowsOf(experts.cache, experts.hit_frac) : [];
  const wanted = rows.map(([name]) => name).join();
  if (wanted !== shape) {
    build(rows);
    shape = wanted;
  }
  rows.forEach(([, fraction], i) => {
    bars[i].set(fraction);
    setText(bars[i].amount, format.percent(fraction, 1));
  });
  setText(byId("limit"), experts.cache ? limit(experts.cache) : "");
}
