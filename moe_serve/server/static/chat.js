// A conversation with the served model, through the same endpoint as everybody else's. What the model writes goes
// into the page as text. Nothing is stored; the API key is read from its field and goes nowhere but into the header.

import { byId, element, setText } from "./dom.js";
import * as format from "./format.js";
import { keyHeaders } from "./key.js";

const log = byId("chat-log");
const text = byId("chat-text");
const error = byId("chat-error");
const note = byId("chat-note");
const empty = log.firstElementChild;
let messages = [];
let running = null; // AbortController of the answer under way
let model = "";

// ---- the conversation on the page ------------------------------------------------------------------

function addTurn(role, content) {
  empty.remove();
  const body = element("div", { className: "text", text: content });
  const who = role === "user" ? "You" : model || "Model";
  log.append(element("div", { className: `turn ${role}` }, element("div", { className: "who", text: who }), body));
  log.scrollTop = log.scrollHeight;
  return body;
}

function append(body, piece) {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  body.append(piece);
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function showError(message) {
  error.hidden = !message;
  setText(error, message);
}

function setRunning(controller) {
  running = controller;
  byId("chat-send").disabled = controller !== null;
  byId("chat-stop").disabled = controller === null;
  log.setAttribute("aria-busy", String(controller !== null));
}

// ---- talking to the server -------------------------------------------------------------------------

function request() {
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  const [most, temperature] = [byId("max-tokens").value, byId("temperature").value];
  if (most) body.max_tokens = Number(most);
  if (temperature) body.temperature = Number(temperature);
  return body;
}

async function refusal(response) {
  const said = await response.json().catch(() => null);
  const reason = said?.error?.message ?? `the server answered ${response.status}`;
  return response.status === 401 ? `${reason} (the API key is under Settings)` : reason;
}

// Yields the JSON of each event until [DONE].
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.replace(/^data: /, "");
      if (line === "[DONE]") return;
      yield JSON.parse(line);
    }
  }
}

async function answer(body, signal) {
  const started = performance.now();
  let firstAt = null;
  let usage = null;
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...keyHeaders() },
    body: JSON.stringify(request()),
    signal,
  });
  if (!response.ok) throw new Error(await refusal(response));
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    const piece = event.choices?.[0]?.delta?.content;
    if (piece) {
      firstAt ??= performance.now();
      append(body, body.textContent ? piece : piece.trimStart());
    }
  }
  return { usage, firstS: ((firstAt ?? performance.now()) - started) / 1000, restS: (performance.now() - (firstAt ?? started)) / 1000 };
}

function summary({ usage, firstS, restS }) {
  const count = usage?.completion_tokens ?? 0;
  const speed = count > 1 && restS > 0 ? `, then ${format.rate((count - 1) / restS)} tokens/s` : "";
  return `${format.count(count)} tokens; first after ${format.joined(format.seconds(firstS))}${speed}`;
}

async function send() {
  const content = text.value.trim();
  if (!content || running) return;
  showError("");
  setText(note, "");
  text.value = "";
  addTurn("user", content);
  messages.push({ role: "user", content });
  const conversation = messages;
  const body = addTurn("assistant", "");
  const controller = new AbortController();
  setRunning(controller);
  try {
    setText(note, summary(await answer(body, controller.signal)));
  } catch (failure) {
    if (controller.signal.aborted) setText(note, "stopped");
    else showError(failure instanceof TypeError ? "The server cannot be reached." : failure.message);
  }
  if (running === controller) setRunning(null);
  finish(conversation, body, content);
}

// A question without an answer leaves the conversation and goes back into its field.
function finish(conversation, body, content) {
  if (conversation !== messages) return;
  if (body.textContent) {
    messages.push({ role: "assistant", content: body.textContent });
    return;
  }
  body.parentElement.remove();
  messages.pop();
  log.lastElementChild?.remove();
  text.value ||= content;
}

function startAgain() {
  running?.abort();
  messages = [];
  log.replaceChildren(empty);
  showError("");
  setText(note, "");
  text.focus();
}

byId("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
byId("chat-stop").addEventListener("click", () => running?.abort());
byId("chat-new").addEventListener("click", startAgain);

export function chatWith(name) {
  model = name;
}
