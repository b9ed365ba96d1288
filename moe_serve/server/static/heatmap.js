// The heat map: a square per expert, a row per layer, or a column per layer where that alone keeps squares readable.
// Lightness says how much of its layer's tokens an expert got; a full square says that it is in memory, a small one
// that it is not.

import { byId, element, setText } from "./dom.js";
import * as format from "./format.js";

const MOST_EVEN = 4; // the scale ends at four times the even share
const MIN_CELL = 4;
const LEAST_HEIGHT = 10;
const UPRIGHT_HEIGHT = 6;
const MAX_WIDTH = 64;
const MAX_HEIGHT = 44;
const MOST_ROWS = 590; // pixels for all layers, where rows need not become unreadable for it
const LEFT = 48;
const TOP = 34;
const TICK_ROOM = 26;
const TICK_HEIGHT = 13;
const GAP_FROM = 8; // smaller squares touch
const AWAY_FRAC = 0.36; // side of the square of an absent expert
const FETCHED_AHEAD = 2;

const canvas = byId("map");
const context = canvas.getContext("2d");
let experts = null;
let view = "both";
let cursor = null; // { layer, expert } by index
let isFocused = false;
let grid = null; // { upright, across, down, cellWidth, cellHeight, width, height }

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
  return `Layer ${experts.layers[layer]}, expert ${expert}: ${format.count(tokens)} tokens, ${share} (an equal share is ${even}), ` +
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

// Layers go down, unless experts across would need scrolling sideways and layers across would not.
function layOut() {
  const room = byId("map-scroll").clientWidth - LEFT - 1;
  const [numLayers, numExperts] = [experts.layers.length, experts.num_experts];
  const upright = numExperts * MIN_CELL > room && numLayers < numExperts;
  const [across, down] = upright ? [numLayers, numExperts] : [numExperts, numLayers];
  const cellWidth = Math.max(MIN_CELL, Math.min(MAX_WIDTH, Math.floor(room / across)));
  const least = upright ? UPRIGHT_HEIGHT : LEAST_HEIGHT;
  const cellHeight = Math.max(least, Math.min(Math.floor(MOST_ROWS / down), MAX_HEIGHT, cellWidth));
  return {
    upright,
    across,
    down,
    cellWidth,
    cellHeight,
    width: LEFT + cellWidth * across + 1,
    height: TOP + cellHeight * down + 1,
  };
}

// Left upper corner of a square.
function place(layer, expert) {
  const [column, row] = grid.upright ? [layer, expert] : [expert, layer];
  return [LEFT + column * grid.cellWidth, TOP + row * grid.cellHeight];
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
  const names = { layer: (i) => experts.layers[i], expert: (i) => i };
  const [across, down] = grid.upright ? ["layer", "expert"] : ["expert", "layer"];
  context.textAlign = "left";
  context.fillText(across, LEFT, 8);
  context.textAlign = "center";
  for (let i = 0; i < grid.across; i += tickStep(grid.cellWidth, TICK_ROOM)) {
    context.fillText(names[across](i), LEFT + (i + 0.5) * grid.cellWidth, TOP - 9);
  }
  context.textAlign = "right";
  context.fillText(down, LEFT - 8, TOP - 9);
  for (let i = 0; i < grid.down; i += tickStep(grid.cellHeight, TICK_HEIGHT)) {
    context.fillText(names[down](i), LEFT - 8, TOP + (i + 0.5) * grid.cellHeight);
  }
}

function tickStep(size, room) {
  return [1, 2, 4, 8, 16, 32, 64].find((step) => step * size >= room) ?? 64;
}

function drawRow(row, layer, palette) {
  const total = layerTotal(layer);
  const gap = grid.cellWidth >= GAP_FROM && grid.cellHeight >= GAP_FROM ? 2 : 0;
  row.forEach((tokens, expert) => {
    const [x, y] = place(layer, expert);
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
  const [x, y] = place(cursor.layer, cursor.expert);
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
  const column = Math.floor((event.clientX - box.left - LEFT) / grid.cellWidth);
  const row = Math.floor((event.clientY - box.top - TOP) / grid.cellHeight);
  const [layer, expert] = grid.upright ? [column, row] : [row, column];
  const isInside = layer >= 0 && expert >= 0 && layer < experts.layers.length && expert < experts.num_experts;
  return isInside ? { layer, expert } : null;
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function move(event) {
  if (!experts || !(event.key in MOVES)) return;
  event.preventDefault();
  const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));
  const [down, right] = cursor ? MOVES[event.key] : [0, 0];
  const [byLayer, byExpert] = grid.upright ? [right, down] : [down, right];
  const from = cursor ?? { layer: 0, expert: 0 };
  point({
    layer: clamp(from.layer + byLayer, experts.layers.length),
    expert: clamp(from.expert + byExpert, experts.num_experts),
  });
  keepInView(place(cursor.layer, cursor.expert));
}

// The map may be larger than its box.
function keepInView([x, y]) {
  const box = byId("map-scroll");
  box.scrollLeft = inView(box.scrollLeft, box.clientWidth, x - LEFT, x + grid.cellWidth);
  box.scrollTop = inView(box.scrollTop, box.clientHeight, y - TOP, y + grid.cellHeight);
}

function inView(start, room, from, to) {
  return Math.min(from, Math.max(start, to - room));
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
