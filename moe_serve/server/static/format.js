// Numbers as people read them; "–" where there is none.

export const NONE = "–";

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export function count(value) {
  return isNumber(value) ? Math.round(value).toLocaleString("en") : NONE;
}

export function rate(value) {
  if (!isNumber(value)) return NONE;
  return value !== 0 && value < 10 ? value.toFixed(1) : count(value);
}

export function percent(fraction, digits = 0) {
  return isNumber(fraction) ? `${(100 * fraction).toFixed(digits)}\u00a0%` : NONE;
}

// A number and its unit in one piece that does not break over two lines.
export function joined([number, unit]) {
  return unit ? `${number}\u00a0${unit}` : number;
}

// [number, unit], so that the unit can be set smaller.
export function seconds(value) {
  if (!isNumber(value)) return [NONE, ""];
  if (value < 1) return [(1000 * value).toFixed(value < 0.01 ? 1 : 0), "ms"];
  return [value.toFixed(value < 10 ? 2 : 1), "s"];
}

export function bytes(value) {
  if (!isNumber(value)) return [NONE, ""];
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (value >= 1000 && power < units.length - 1) {
    value /= 1000;
    power += 1;
  }
  return [value.toFixed(value < 10 && power > 0 ? 1 : 0), units[power]];
}

export function duration(value) {
  const minutes = Math.floor(value / 60);
  if (minutes < 1) return `${Math.floor(value)} s`;
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
