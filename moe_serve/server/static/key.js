// The API key, where it was typed and nowhere else.

import { byId } from "./dom.js";

export function keyHeaders() {
  const key = byId("api-key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}
