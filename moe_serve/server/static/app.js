// Asks for the numbers once a second, more rarely while the server does not answer, and not at all while hidden.

import { showCache } from "./cache.js";
import { chatWith } from "./chat.js";
import { byId, setText } from "./dom.js";
import { showFindings } from "./findings.js";
import * as format from "./format.js";
import { redrawMap, showMap } from "./heatmap.js";
import { keyHeaders } from "./key.js";
import { showLayers } from "./layers.js";
import { showRequests } from "./requests.js";
import { followTheme } from "./theme.js";
import { showTiles } from "./tiles.js";

const PERIOD_MS = 1000;
const MOST_MS = 30000;
const TIMEOUT_MS = 5000;
const NO_ANSWER = { "no answer": "Is the server running, and can this computer reach it? Its log says why it ended." };
let waitMs = PERIOD_MS;
let timer = 0;
let newest = 0; // of the chains of polls: an older one ends where it is

function setStatus(kind, text) {
  byId("status").dataset.kind = kind;
  setText(byId("status"), text);
}

function show(data) {
  setText(byId("about"), `${data.model} · version ${data.version} · up ${format.duration(data.uptime_s)}`);
  chatWith(data.model);
  showFindings(data.findings);
  showTiles(data);
  showRequests(data);
  byId("expert-cards").hidden = data.experts === null;
  if (data.experts === null) return;
  showMap(data.experts);
  showLayers(data.experts);
  showCache(data.experts);
}

async function ask() {
  const response = await fetch("dashboard/data", { headers: keyHeaders(), signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (response.status === 401) throw new Error("the server asks for an API key (Settings)");
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  return response.json();
}

async function poll(chain) {
  try {
    const data = await ask();
    if (chain !== newest) return;
    waitMs = PERIOD_MS;
    show(data);
    setStatus(data.state === "ready" ? "live" : "trouble", data.state === "ready" ? "live" : data.state);
  } catch (failure) {
    if (chain !== newest) return;
    waitMs = Math.min(MOST_MS, 2 * waitMs);
    const reason = failure instanceof TypeError || failure.name === "TimeoutError" ? "no answer" : failure.message;
    setStatus("trouble", `${reason}; next try in ${Math.round(waitMs / 1000)} s`);
    showFindings([{ severity: "problem", title: `The numbers are old: ${reason}`, advice: NO_ANSWER[reason] ?? "See the server's log." }]);
  }
  timer = setTimeout(poll, waitMs, chain);
}

function start() {
  stop();
  waitMs = PERIOD_MS;
  poll(newest);
}

function stop() {
  clearTimeout(timer);
  newest += 1;
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) {
    start();
    return;
  }
  stop();
  setStatus("paused", "paused");
});
byId("api-key").addEventListener("change", start);
followTheme(redrawMap);
start();
