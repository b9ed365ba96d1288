// The row of headline numbers, each with what it is made of below it, some with the last minute as a curve.

import { byId, element, setText } from "./dom.js";
import * as format from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 100;
const HEIGHT = 28;
const RECENT_S = 5;
const FEW_HITS = 0.5; // as the server's own findings

const TILES = [
  {
    name: "Output",
    value: (data) => [format.rate(recent(data, "generated_tokens_per_s")), "tokens/s"],
    note: (data) => `${format.rate(data.generated_tokens_per_s)} over the last minute`,
    curve: "generated_tokens_per_s",
  },
  {
    name: "Prompts",
    value: (data) => [format.rate(recent(data, "prompt_tokens_per_s")), "tokens/s"],
    note: (data) => `${format.rate(data.prompt_tokens_per_s)} over the last minute`,
    curve: "prompt_tokens_per_s",
  },
  {
    name: "First token",
    value: (data) => format.seconds(data.ttft.p50_s),
    note: (data) => timesNote(data.ttft),
  },
  {
    name: "Each further token",
    value: (data) => format.seconds(data.inter_token.p50_s),
    note: (data) => furtherNote(data.inter_token),
  },
  {
    name: "Running",
    judge: (data) => (data.load.num_waiting && data.load.num_running >= data.num_seats ? "▲ full" : ""),
    value: (data) => [format.count(data.load.num_running), ""],
    note: (data) => `${format.count(data.load.num_waiting)} waiting, KV pages ${format.percent(data.load.kv_usage_frac)} full`,
  },
  {
    name: "Expert hits",
    judge: (data) => (data.experts?.cache && data.experts.hit_frac !== null && data.experts.hit_frac < FEW_HITS ? "▼ low" : ""),
    value: (data) => [format.percent(data.experts?.hit_frac), ""],
    note: (data) => (data.experts?.cache ? `waited ${format.percent(data.experts.stall_frac)} of the time` : "no cache: all are mapped"),
    curve: "hit_frac",
    most: 1,
  },
  {
    name: "Speed, of what reads allow",
    value: (data) => [format.percent(data.experts?.cache?.link_limit_frac), ""],
    note: (data) => limitNote(data.experts?.cache),
  },
  {
    name: "Memory",
    value: (data) => format.bytes(data.rss_bytes),
    note: (data) => memoryNote(data.experts?.cache),
  },
];

// The rate over the newest seconds: at 3 tokens a second a single one may have none.
function recent(data, name) {
  const points = data.history.filter((point) => point.age_s < RECENT_S);
  const seconds = points.reduce((sum, point) => sum + point.seconds, 0);
  return seconds > 0 ? points.reduce((sum, point) => sum + point[name] * point.seconds, 0) / seconds : data[name];
}

function timesNote(times) {
  if (!times.count) return "none in the last minute";
  return `p99 ${format.joined(format.seconds(times.p99_s))}, ${format.count(times.count)} in a minute`;
}

function furtherNote(times) {
  return times.count ? `p99 ${format.joined(format.seconds(times.p99_s))}, of the newest ${format.count(times.count)}` : "none in the last minute";
}

function limitNote(cache) {
  if (!cache) return "nothing is read";
  return cache.link_bytes_per_s === null ? "nothing read in a minute" : `${cache.slow_tier} gives ${format.joined(format.bytes(cache.link_bytes_per_s))}/s`;
}

function memoryNote(cache) {
  if (!cache) return "mapped files included";
  return `experts ${format.joined(format.bytes(cache.used_bytes))} of ${format.joined(format.bytes(cache.capacity_bytes))}`;
}

function svgPath(className) {
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("class", className);
  return path;
}

function makeTile(tile) {
  const value = element("span");
  const unit = element("span", { className: "unit" });
  const note = element("dd", { className: "note" });
  const judgement = element("span", { className: "judgement" });
  const box = element("div", { className: "tile" }, element("dt", { text: tile.name }, " ", judgement),
    element("dd", { className: "value" }, value, " ", unit), note);
  const line = svgPath("line");
  if (tile.curve) {
    const svg = document.createElementNS(SVG, "svg");
    for (const [name, text] of [["viewBox", `0 0 ${WIDTH} ${HEIGHT}`], ["preserveAspectRatio", "none"]]) {
      svg.setAttribute(name, text);
    }
    const base = svgPath("base");
    base.setAttribute("d", `M0 ${HEIGHT}H${WIDTH}`);
    svg.append(base, line);
    box.append(element("dd", { className: "curve", "aria-hidden": "true" }, svg));
  }
  return { box, update: (data) => show(tile, data, { value, unit, note, judgement, line }) };
}

function show(tile, data, nodes) {
  const [number, unit] = tile.value(data);
  setText(nodes.value, number);
  setText(nodes.unit, unit);
  setText(nodes.note, tile.note(data));
  setText(nodes.judgement, tile.judge?.(data) ?? "");
  if (tile.curve) nodes.line.setAttribute("d", curve(data, tile.curve, tile.most));
}

// The last minute from left to right; a gap where there is no value.
function curve(data, name, most) {
  const values = data.history.map((point) => point[name]);
  const top = most ?? Math.max(...values.filter((value) => value !== null), 1e-9);
  let path = "";
  let draws = false;
  data.history.forEach((point, i) => {
    if (values[i] === null) {
      draws = false;
      return;
    }
    const x = WIDTH * Math.max(0, 1 - point.age_s / 60);
    path += `${draws ? "L" : "M"}${x.toFixed(1)} ${(HEIGHT * (1 - values[i] / top)).toFixed(1)}`;
    draws = true;
  });
  return path;
}

const tiles = TILES.map(makeTile);
byId("tiles").append(...tiles.map((tile) => tile.box));

export function showTiles(data) {
  for (const tile of tiles) tile.update(data);
}
