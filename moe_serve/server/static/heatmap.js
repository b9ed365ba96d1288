// The heat map: a square per expert, a row per layer. Lightness says how much of its layer's tokens an expert
// got; a full square says that it is in memory, a small one that it is not.

import { byId, element, setText } from "./dom.js";
import * as format from "./format.js";

const MOST_EVEN = 4; // the scale ends at four times the even share
const MIN_CELL = 4;
const MIN_HEIGHT = 10;
const MAX_WIDTH = 64;
const MAX_HEIGHT = 44;
const MOST_ROWS = 590; // pixels for all layers, where rows need not become unreadable for it
const LEFT = 40;
const TOP = 34;
const TICK_ROOM = 26;
const GAP_FROM = 8; // smaller squares touch
const AWAY_FRAC = 0.36; // side of the square of an absent expert
const FETCHED_AHEAD = 2;

const canvas = byId("map");
const context = canvas.getContext("2d");
let experts = null;
let view = "both";
let cursor = null; // { layer, expert } by index
let isFocused = false;
let grid = null; // { cellWidth, cellHeight, width, height }

// ---- numbers ---------------------------------------------------------------------------------------

function layerTotal(layer) {
  return experts.tokens[layer].reduce((sum, tokens) => sum + tokens, 0);
}

// 0 to 1 on the scale. The root spreads the small shares, which are most of them.
function heat(tokens, total) {
  if (!total) return 0;
  return Math.sqrt(Math.min(1, (tokens / total) * (experts.num_experts / MOST_EVEN)));
}

function describe({ layer, expert }) {
  const tokens = experts.tokens[layer][expert];
  const total = layerTotal(layer);
  const share = total ? `${format.percent(tokens / total, 1)} of the layer's tokens` : "no tokens yet";
  const even = format.percent(1 / experts.num_experts, 1);
  return `Layer ${experts.layers[layer]}, expert ${expert}: ${format.count(tokens)} tokens, ${share} (even would be ${even}), ` +
    `${memory(experts.residency[layer][expert])}.`;
}

function memory(state) {
  if (!experts.cache) return "mapped from the checkpoint";
  return ["not in memory", "in memory", "in memory ahead of time, not used yet"][state];
}

// ---- drawing ---------------------------------------------------------------------------------------

// The legend's swatches carry the theme's colours, so the canvas cannot disagree with them.
function colours() {
  const of = (selector, property) => getComputedStyle(document.querySelector(selector))[property];
  return {
    ramp: [0, 1, 2, 3, 4].map((i) => of(`.heat-${i}`, "backgroundColor").match(/[\d.]+/g).map(Number)),
    ink: of("body", "color"),
    muted: of("#experts-caption", "color"),
    card: of("#experts", "backgroundColor"),
    line: of("#experts", "borderTopColor"),
  };
}

function shade(ramp, position) {
  const scaled = position * (ramp.length - 1);
  const low = Math.min(ramp.length - 2, Math.floor(scaled));
  const part = scaled - low;
  const mixed = ramp[low].map((value, i) => Math.round(value + part * (ramp[low + 1][i] - value)));
  return `rgb(${mixed.slice(0, 3).join(" ")})`;
}

function layOut() {
  const room = byId("map-scroll").clientWidth - LEFT - 1;
  const cellWidth = Math.max(MIN_CELL, Math.min(MAX_WIDTH, Math.floor(room / experts.num_experts)));
  const fitting = Math.floor(MOST_ROWS / experts.layers.length);
  const cellHeight = Math.max(MIN_HEIGHT, Math.min(fitting, MAX_HEIGHT, Math.max(cellWidth, MIN_HEIGHT)));
  return {
    cellWidth,
    cellHeight,
    width: LEFT + cellWidth * experts.num_experts + 1,
    height: TOP + cellHeight * experts.layers.length + 1,
  };
}

function draw() {
  if (!experts) return;
  grid = layOut();
  const scale = devicePixelRatio || 1;
  canvas.width = Math.round(grid.width * scale);
  canvas.height = Math.round(grid.height * scale);
  canvas.style.width = `${grid.width}px`;
  canvas.style.height = `${grid.height}px`;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  const palette = colours();
  drawAxes(palette);
  experts.tokens.forEach((row, layer) => drawRow(row, layer, palette));
  if (cursor) drawCursor(palette);
}

function drawAxes(palette) {
  context.fillStyle = palette.muted;
  context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  context.textBaseline = "middle";
  context.textAlign = "left";
  context.fillText("expert", LEFT, 8);
  context.textAlign = "center";
  for (let i = 0; i < experts.num_experts; i += tickStep(grid.cellWidth)) {
    context.fillText(i, LEFT + (i + 0.5) * grid.cellWidth, TOP - 9);
  }
  context.textAlign = "right";
  context.fillText("layer", LEFT - 8, TOP - 9);
  for (let i = 0; i < experts.layers.length; i += tickStep(grid.cellHeight * 1.6)) {
    context.fillText(experts.layers[i], LEFT - 8, TOP + (i + 0.5) * grid.cellHeight);
  }
}

function tickStep(size) {
  return [1, 2, 4, 8, 16, 32, 64].find((step) => step * size >= TICK_ROOM) ?? 64;
}

function drawRow(row, layer, palette) {
  const total = layerTotal(layer);
  const gap = grid.cellWidth >= GAP_FROM && grid.cellHeight >= GAP_FROM ? 2 : 0;
  row.forEach((tokens, expert) => {
    const x = LEFT + expert * grid.cellWidth;
    const y = TOP + layer * grid.cellHeight;
    const width = grid.cellWidth - gap;
    const height = grid.cellHeight - gap;
    context.fillStyle = shade(palette.ramp, view === "residency" ? 0.75 : heat(tokens, total));
    drawCell(x, y, width, height, view === "load" ? 1 : experts.residency[layer][expert], palette);
  });
}

function drawCell(x, y, width, height, state, palette) {
  if (state) {
    context.fillRect(x, y, width, height);
    if (state === FETCHED_AHEAD) drawCorner(x + width, y, Math.min(width, height) / 2, palette);
    return;
  }
  const [w, h] = [Math.max(1, width * AWAY_FRAC), Math.max(1, height * AWAY_FRAC)];
  context.fillRect(x + (width - w) / 2, y + (height - h) / 2, w, h);
  if (Math.min(width, height) >= GAP_FROM) {
    context.strokeStyle = palette.line;
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
  }
}

function drawCorner(right, top, size, palette) {
  context.fillStyle = palette.card;
  context.beginPath();
  context.moveTo(right - size, top);
  context.lineTo(right, top);
  context.lineTo(right, top + size);
  context.fill();
}

function drawCursor(palette) {
  context.strokeStyle = palette.ink;
  context.lineWidth = 2;
  const x = LEFT + cursor.expert * grid.cellWidth;
  const y = TOP + cursor.layer * grid.cellHeight;
  context.strokeRect(x, y, Math.max(3, grid.cellWidth - 2), Math.max(3, grid.cellHeight - 2));
}

// ---- pointing --------------------------------------------------------------------------------------

function point(next) {
  cursor = next;
  setText(byId("cell"), cursor ? describe(cursor) : "Point at a square, or use the arrow keys, to read it.");
  draw();
}

function cellAt(event) {
  const box = canvas.getBoundingClientRect();
  const expert = Math.floor((event.clientX - box.left - LEFT) / grid.cellWidth);
  const layer = Math.floor((event.clientY - box.top - TOP) / grid.cellHeight);
  const isInside = layer >= 0 && expert >= 0 && layer < experts.layers.length && expert < experts.num_experts;
  return isInside ? { layer, expert } : null;
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function move(event) {
  if (!experts || !(event.key in MOVES)) return;
  event.preventDefault();
  const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));
  const [down, right] = cursor ? MOVES[event.key] : [0, 0];
  const from = cursor ?? { layer: 0, expert: 0 };
  point({
    layer: clamp(from.layer + down, experts.layers.length),
    expert: clamp(from.expert + right, experts.num_experts),
  });
}

canvas.addEventListener("pointermove", (event) => grid && point(cellAt(event)));
canvas.addEventListener("pointerdown", (event) => grid && point(cellAt(event)));
canvas.addEventListener("pointerleave", () => isFocused || point(null));
canvas.addEventListener("keydown", move);
canvas.addEventListener("focus", () => (isFocused = true));
canvas.addEventListener("blur", () => {
  isFocused = false;
  point(null);
});
byId("view").addEventListener("change", (event) => {
  view = event.target.value;
  showLegend();
  draw();
});
new ResizeObserver(draw).observe(byId("map-scroll"));

// ---- what is around it -----------------------------------------------------------------------------

function showLegend() {
  byId("legend-load").hidden = view === "residency";
  byId("legend-memory").hidden = view === "load" || !experts?.cache;
}

function caption() {
  const size = `${experts.layers.length} layers of ${experts.num_experts} experts`;
  const span = experts.tokens_since_start ? "tokens since the start, as nothing ran in the last minute" : "tokens of the last minute";
  return `${size}; ${span}`;
}

// Text for who cannot see the canvas; made only while it is open, for it can have thousands of cells.
function showTable() {
  const details = byId("map-table");
  if (!details.open || !experts) return;
  const head = element("tr", {}, element("th", { text: "Layer", scope: "col" }));
  for (let i = 0; i < experts.num_experts; i += 1) head.append(element("th", { text: i, scope: "col" }));
  const body = element("tbody");
  experts.tokens.forEach((row, layer) => {
    const cells = row.map((tokens, expert) =>
      element("td", { text: format.count(tokens) + (experts.residency[layer][expert] ? "" : " (away)") }));
    body.append(element("tr", {}, element("th", { text: experts.layers[layer], scope: "row" }), ...cells));
  });
  details.querySelector("div").replaceChildren(element("table", {}, element("thead", {}, head), body));
}

byId("map-table").addEventListener("toggle", showTable);

export function redrawMap() {
  draw();
}

export function showMap(data) {
  experts = data;
  if (cursor && (cursor.layer >= experts.layers.length || cursor.expert >= experts.num_experts)) cursor = null;
  byId("expert-cards").classList.toggle("wide", experts.num_experts > 32);
  setText(byId("experts-caption"), caption());
  byId("view").hidden = !experts.cache;
  showLegend();
  draw();
  if (cursor && !isFocused) setText(byId("cell"), describe(cursor)); // a screen reader would say it every second
  showTable();
}
