"use strict";
(() => {
  const problems = document.getElementById("problems");
  const report = (what) => { problems.textContent += String(what) + "\n"; };
  window.addEventListener("error", (event) => report(event.message));
  window.addEventListener("unhandledrejection", (event) => report(event.reason));
  for (const level of ["error", "warn"]) {
    const log = console[level].bind(console);
    console[level] = (...words) => { report(words.join(" ")); log(...words); };
  }

  // CSS variables as colours: light, dark and print need no second drawing.
  const ink = "var(--ink)", soft = "var(--soft)", grid = "var(--grid)", rule = "var(--rule)";
  const font = getComputedStyle(document.body).fontFamily;
  const config = {
    background: "transparent", font, padding: { left: 2, right: 8, top: 6, bottom: 2 },
    axis: {
      labelColor: soft, titleColor: soft, gridColor: grid, domainColor: rule, tickColor: rule, tickSize: 4,
      labelFontSize: 11, titleFontSize: 11.5, titleFontWeight: 400, labelPadding: 4, titlePadding: 6,
    },
    axisY: { domain: false, ticks: false },
    axisX: { grid: false, labelFlush: true },
    legend: { disable: true, labelColor: soft, labelFontSize: 11 },
    text: { color: ink, fontSize: 11.5 },
    style: { cell: { stroke: "transparent" } },
  };
  const options = {
    mode: "vega-lite", renderer: "svg", actions: false, ast: true, config, tooltip: { theme: "report" },
  };

  const views = [];
  let pinned = "";
  const focus = (method) => {
    for (const view of views) view.signal("focus", method).runAsync();
  };
  for (const button of document.querySelectorAll(".legend button")) {
    const method = button.dataset.method;
    button.addEventListener("click", () => {
      pinned = pinned === method ? "" : method;
      for (const other of document.querySelectorAll(".legend button")) {
        other.setAttribute("aria-pressed", String(other.dataset.method === pinned));
      }
      focus(pinned);
    });
    button.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") focus(method); });
    button.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") focus(pinned); });
  }

  const drawings = [...document.querySelectorAll(".drawing")];
  const specs = JSON.parse(document.getElementById("specs").textContent);
  Promise.all(drawings.map(async (element) => {
    const { view } = await vegaEmbed(element, specs[element.id], options);
    views.push(view);
  })).then(() => { document.documentElement.dataset.drawn = String(views.length); }).catch(report);
})();
