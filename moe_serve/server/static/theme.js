// Light or dark: the system's choice until the button is pressed, then what was chosen.

import { byId, setText } from "./dom.js";

const STORED = "moe-serve-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : system.matches;
}

// `changed` is called whenever colours are other than before.
export function followTheme(changed) {
  const button = byId("theme");
  const update = () => {
    setText(button, isDark() ? "Light" : "Dark");
    button.setAttribute("aria-label", `Use ${isDark() ? "light" : "dark"} colours`);
    changed();
  };
  const chosen = localStorage.getItem(STORED);
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    localStorage.setItem(STORED, theme);
    update();
  });
  system.addEventListener("change", update);
  update();
}
