"use strict";
// What every page needs: it collects its errors in #problems, for tests, and makes elements.
const report = (what) => { document.getElementById("problems").textContent += String(what) + "\n"; };
window.addEventListener("error", (event) => report(event.message));
window.addEventListener("unhandledrejection", (event) => report(event.reason));
for (const level of ["error", "warn"]) {
  const log = console[level].bind(console);
  console[level] = (...words) => { report(words.join(" ")); log(...words); };
}
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const element = (tag, text, className) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
};
