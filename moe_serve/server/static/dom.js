// Making elements. Text goes in as text, never as HTML.

export const byId = (id) => document.getElementById(id);

export function element(tag, { className, text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Assigning equal text again would make screen readers repeat it and break selections.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// A bar beside its number: the number is what counts, so the bar is hidden from screen readers.
export function meter(className = "meter") {
  const fill = element("i");
  const bar = element("span", { className, "aria-hidden": "true" }, fill);
  const set = (fraction) => {
    bar.classList.toggle("none", fraction === null);
    fill.style.width = `${100 * Math.min(1, Math.max(0, fraction ?? 0))}%`;
  };
  return { bar, set };
}
