"use strict";
(() => {
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

  // The legend: hovering shows, pressing pins a method (or several with the same runs) in every figure.
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const views = new Map();
  let pinned = "";
  const focus = (entry) => {
    for (const view of views.values()) view.signal("focus", entry === "" ? [] : specs.entries[entry]).runAsync();
  };
  for (const button of all(".legend button")) {
    const { entry } = button.dataset;
    button.addEventListener("click", () => {
      pinned = pinned === entry ? "" : entry;
      for (const other of all(".legend button")) other.setAttribute("aria-pressed", String(other.dataset.entry === pinned));
      focus(pinned);
    });
    button.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") focus(entry); });
    button.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") focus(pinned); });
  }

  // Figures: all are drawn at once, also those in closed folds, so that they can be printed.
  const main = document.querySelector("main");
  const style = getComputedStyle(main);
  const whole = main.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const widthOf = (drawing) => drawing.clientWidth || (whole > 800 ? (whole - 40) / 2 : whole);
  const fit = (drawing) => {
    const view = views.get(drawing.id);
    if (view && drawing.clientWidth && Math.abs(drawing.clientWidth - view.drawnWidth) > 1) {
      view.drawnWidth = drawing.clientWidth;
      view.signal("figureWidth", drawing.clientWidth).runAsync();
    }
  };
  const drawings = all(".drawing");
  const draw = async (drawing) => {
    const width = widthOf(drawing);
    const spec = { ...specs[drawing.id], width, autosize: { type: "fit-x", contains: "padding" } };
    const resizable = (vega) => {
      vega.signals = [...(vega.signals || []).filter((signal) => signal.name !== "width"),
        { name: "figureWidth", value: width }, { name: "width", update: "figureWidth" }];
      delete vega.width;
      return vega;
    };
    const { view } = await vegaEmbed(drawing, spec, { ...options, patch: resizable });
    view.drawnWidth = width;
    views.set(drawing.id, view);
  };
  Promise.all(drawings.map(draw))
    .then(() => { document.documentElement.dataset.drawn = String(views.size); }).catch(report);
  const refit = () => drawings.forEach(fit);
  window.addEventListener("resize", refit);
  for (const fold of all("details")) fold.addEventListener("toggle", refit);

  // The picture shows one axis at a time.
  const choices = all(".choice");
  const choose = (name) => {
    for (const choice of choices) choice.hidden = choice.id !== "choice-" + name;
    refit();
  };
  for (const input of all('input[name="axis"]')) input.addEventListener("change", () => choose(input.value));
  const checked = document.querySelector('input[name="axis"]:checked');
  if (checked) choose(checked.value);

  // Folds: a link opens the one that it leads to; printing opens all.
  const open = () => {
    const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    const fold = target && target.closest("details");
    if (fold && !fold.open) { fold.open = true; target.scrollIntoView(); }
  };
  window.addEventListener("hashchange", open);
  open();
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = all("details:not([open])");
    for (const fold of closed) fold.open = true;
  });
  window.addEventListener("afterprint", () => { for (const fold of closed) fold.open = false; });

  // The data of a figure as CSV.
  const csv = (rows) => {
    const columns = [...new Set(rows.flatMap(Object.keys))];
    const cell = (x) => (x === undefined || x === null ? "" : /[",\n]/.test(String(x)) ? `"${String(x).replaceAll('"', '""')}"` : String(x));
    return [columns, ...rows.map((row) => columns.map((column) => row[column]))].map((line) => line.map(cell).join(",")).join("\n") + "\n";
  };
  for (const button of all(".save")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const sets = Object.values(specs[button.dataset.figure].datasets);
      const rows = sets.reduce((most, next) => (next.length > most.length ? next : most), []);
      const link = element("a");
      link.href = URL.createObjectURL(new Blob([csv(rows)], { type: "text/csv" }));
      link.download = button.dataset.figure + ".csv";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  }

  // The table: one row for each family, sorted by a click on a heading, searched by words.
  const table = document.querySelector("table.decision");
  if (table) {
    const body = table.tBodies[0], rows = all("tr", body);
    const opened = new Set();
    const search = document.querySelector(".search"), words = search.querySelector("input");
    search.hidden = false;
    const show = () => {
      const text = words.value.trim().toLowerCase();
      for (const row of rows) {
        const found = !text || row.textContent.toLowerCase().includes(text);
        row.hidden = !found || (!text && row.classList.contains("member") && !opened.has(row.dataset.family));
      }
    };
    words.addEventListener("input", show);
    for (const button of all(".more", body)) {
      const family = button.closest("tr").dataset.family;
      button.hidden = false;
      button.setAttribute("aria-expanded", "false");
      button.addEventListener("click", () => {
        if (opened.has(family)) opened.delete(family); else opened.add(family);
        button.setAttribute("aria-expanded", String(opened.has(family)));
        show();
      });
    }
    const value = (row, column) => {
      const text = row.cells[column].dataset.value;
      return text === "" ? null : column === 0 || Number.isNaN(Number(text)) ? text : Number(text);
    };
    for (const head of all("th", table)) {
      const column = Number(head.dataset.column), button = element("button", head.textContent);
      button.type = "button";
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const ascending = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && column !== 1);
        for (const other of all("th", table)) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        const compare = (one, other) => {
          const a = value(one, column), b = value(other, column);
          if (a === null || b === null) return (a === null) - (b === null);
          return (a < b ? -1 : a > b ? 1 : 0) * (ascending ? 1 : -1);
        };
        const heads = rows.filter((row) => !row.classList.contains("member")).sort(compare);
        for (const first of heads) {
          const members = rows.filter((row) => row.classList.contains("member") && row.dataset.family === first.dataset.family);
          body.append(first, ...members.sort(compare));
        }
      });
    }
    show();
  }

  const digits = (x) => (x >= 99.5 ? Math.round(x).toLocaleString("en") : Number(x.toPrecision(3)).toString());
  const scaled = (x, units) => { const [factor, unit] = units.find(([each]) => x >= 0.9995 * each) || units.at(-1); return `${digits(x / factor)} ${unit}`; };
  const bytes = (x) => scaled(x, [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"], [1, "B"]]);
  const highlight = (picked, fits) => {
    for (const row of all("table.decision tbody tr")) {
      row.classList.toggle("pick", row.dataset.method === picked);
      row.classList.toggle("over", !fits(row.dataset.method));
    }
  };
  const line = (reply, parts, className) => {
    const paragraph = element("p", undefined, className);
    for (const part of parts) paragraph.append(typeof part === "string" ? part : element("b", part.text, "method"));
    reply.append(paragraph);
  };

  // The answer of a plan for another budget: the rule of `plan`.
  function planned(data) {
    const box = document.getElementById("budget"), [axis] = data.axes;
    const slider = box.querySelector("input[type=range]"), output = box.querySelector("output");
    const reply = box.querySelector(".reply");
    box.hidden = false;
    box.querySelector(".switch").hidden = true;
    box.querySelector(".foot").textContent = data.note;
    slider.value = String(Math.round((1000 * Math.log(data.start / axis.low)) / Math.log(axis.high / axis.low)));
    const first = slider.value;
    const timed = data.methods.every((x) => x.seconds !== null);
    const cost = (x) => (timed ? x.seconds : x.flops);
    const least = (pool, key) => pool.reduce((best, next) => {
      const a = key(best), b = key(next), i = a.findIndex((x, place) => x !== b[place]);
      return i >= 0 && b[i] < a[i] ? next : best;
    });
    const update = () => {
      const given = slider.value === first ? data.start : axis.low * (axis.high / axis.low) ** (slider.value / 1000);
      output.textContent = bytes(given);
      slider.setAttribute("aria-valuetext", output.textContent);
      views.get(axis.figure)?.signal("budget", slider.value === first ? 0 : given).runAsync();
      const fitting = data.methods.filter((x) => x.peak <= given * (1 + 1e-9));
      const exact = fitting.filter((x) => x.exact), known = fitting.filter((x) => x.steps !== null);
      reply.replaceChildren();
      if (!fitting.length) {
        highlight(null, () => false);
        line(reply, [`Nothing here fits. The least is ${bytes(Math.min(...data.methods.map((x) => x.peak)))}.`], "first");
        return;
      }
      const picked = exact.length ? least(exact, (x) => [x.offloads ? 1 : 0, cost(x), x.peak])
        : least(known.length ? known : fitting, (x) => [cost(x) * (x.steps ?? 1), x.peak * (x.steps ?? 1)]);
      highlight(picked.method, (method) => fitting.some((x) => x.method === method));
      const kind = exact.length ? "exact gradient" : "estimated gradient";
      line(reply, ["Use ", { text: picked.method }, `: ${kind}, ${bytes(picked.peak)}, ${digits(picked.forwards)} forwards a step.`], "first");
      if (!exact.length) line(reply, [`No exact gradient here fits.${picked.steps === null ? "" : ` In theory this one needs ${digits(picked.steps)} times the steps.`}`]);
      line(reply, [`${fitting.length} of ${data.methods.length} methods fit.`]);
    };
    slider.addEventListener("input", update);
    update();
  }

  // The answer for a budget: the rule of `recommendation.choose`, on validation scores.
  function answer(data) {
    const box = document.getElementById("budget");
    const slider = box.querySelector("input[type=range]"), output = box.querySelector("output");
    const reply = box.querySelector(".reply");
    box.hidden = false;
    box.querySelector(".foot").textContent = data.note;
    let axis = data.axes[0];
    data.axes.forEach((each, place) => {
      const label = element("label"), input = element("input");
      Object.assign(input, { type: "radio", name: "budget", value: each.name, checked: place === 0 });
      input.addEventListener("change", () => {
        axis = each;
        slider.value = "1000";
        const picture = all('input[name="axis"]').find((other) => other.value === each.figure);
        if (picture && !picture.checked) { picture.checked = true; choose(each.figure); }
        update();
      });
      label.append(input, element("span", each.title));
      box.querySelector(".switch").append(label);
    });
    const amount = {
      memory: bytes,
      flops: (x) => scaled(x, [[1e15, "PFLOP"], [1e12, "TFLOP"], [1e9, "GFLOP"], [1e6, "MFLOP"], [1e3, "kFLOP"], [1, "FLOP"]]),
      seconds: (x) => scaled(x, [[3600, "h"], [60, "min"], [1, "s"], [1e-3, "ms"]]),
      steps: (x) => `${digits(Math.floor(x))} steps`,
    };
    const text = (score) => (!Number.isFinite(score) ? "diverged" : data.metric.percent ? `${(100 * score).toFixed(1)}%` : String(Number((data.metric.sign * score).toPrecision(4))));
    const gap = (difference) => (data.metric.percent ? `${(100 * difference).toFixed(1)} points` : String(Number(difference.toPrecision(3))));
    const median = (sorted) => { const n = sorted.length, m = n >> 1; return n % 2 ? sorted[m] : (sorted[m - 1] + sorted[m]) / 2; };
    const between = (sorted, place) => {
      const low = sorted[Math.floor(place)], high = sorted[Math.ceil(place)], part = place - Math.floor(place);
      return low === high || part === 0 ? low : !Number.isFinite(low) || !Number.isFinite(high) ? low : low + part * (high - low);
    };
    const at = ([steps, scores], step) => {
      const score = (i) => (scores[i] === null ? -Infinity : scores[i]);
      const right = steps.findIndex((each) => each >= step);
      if (right < 0) return score(steps.length - 1);
      if (right === 0 || steps[right] === step) return score(right);
      const [left, next] = [score(right - 1), score(right)];
      if (!Number.isFinite(left) || !Number.isFinite(next)) return left;
      return left + ((step - steps[right - 1]) / (steps[right] - steps[right - 1])) * (next - left);
    };
    const standing = (method, budget) => {
      const steps = axis.name === "memory" ? method.steps : Math.min(budget / method.per[axis.name], method.steps);
      const values = Object.values(method.runs).map((run) => at(run, steps)).sort((a, b) => a - b);
      const finished = values.filter(Number.isFinite), n = values.length;
      const lost = values.length - finished.length;
      const place = data.ends[n] ?? 0;
      const typical = finished.length ? median(finished) : 0;
      return {
        ...method, steps, values, middle: median(values), low: between(values, place),
        high: -between(values.map((x) => -x).reverse(), place),
        penal: lost ? (finished.length * typical + lost * (data.chance ?? Math.min(...finished, 0))) / n : typical,
        reach: finished.length ? typical - between(finished, Math.min(data.ends[finished.length] ?? 0, (finished.length - 1) / 2)) : 0,
      };
    };
    const least = (pool) => {
      const cost = (x) => [x.memory ?? Infinity, x.ms ?? Infinity, -x.penal];
      return pool.reduce((best, next) => {
        const a = cost(best), b = cost(next), i = a.findIndex((x, place) => x !== b[place]);
        return i >= 0 && b[i] < a[i] ? next : best;
      });
    };
    const alike = (pool) => {
      const best = pool.reduce((a, b) => (b.penal > a.penal ? b : a));
      return pool.filter((x) => x.penal >= best.penal - best.reach);
    };
    const span = (x) => (x.values.length > 1 ? ` [${text(data.metric.sign < 0 ? x.high : x.low)}, ${text(data.metric.sign < 0 ? x.low : x.high)}]` : " (one seed)");
    const named = (x) => `${x.method} (${text(x.middle)})`;
    const list = (names) => (names.length > 4 ? [...names.slice(0, 3), `${names.length - 3} others`] : names).join(", ");
    const cost = (x) => (x.memory === null ? "" : `, ${amount.memory(x.memory)} beyond the weights`);
    // The picture and the slider have the same axis.
    for (const input of all('input[name="axis"]')) {
      input.addEventListener("change", () => {
        const same = data.axes.find((each) => each.figure === input.value);
        const other = same && all('input[name="budget"]', box).find((each) => each.value === same.name);
        if (other && !other.checked) other.click();
      });
    }
    const mark = (given) => {
      for (const [name, view] of views) {
        const isShown = name === axis.figure && slider.value !== "1000";
        if (data.axes.some((each) => each.figure === name)) view.signal("budget", isShown ? given : 0).runAsync();
      }
    };
    function update() {
      const budget = axis.low * (axis.high / axis.low) ** (slider.value / 1000);
      const given = slider.value === "1000" ? axis.high : budget;
      output.textContent = amount[axis.name](given);
      slider.setAttribute("aria-valuetext", output.textContent);
      mark(given);
      const known = data.methods.filter((x) => (axis.name === "memory" ? x.memory !== null : x.per[axis.name] !== null && x.fits));
      const fitting = known.filter((x) => axis.name !== "memory" || x.memory <= given * (1 + 1e-9));
      const pool = fitting.map((x) => standing(x, given)).filter((x) => Number.isFinite(x.middle));
      reply.replaceChildren();
      const picked = pool.length ? least(alike(pool)) : null;
      highlight(picked && picked.method, (method) => fitting.some((x) => x.method === method));
      if (!picked) { line(reply, ["Nothing fits this budget, or every method diverged."], "first"); return; }
      if (data.limit !== null && picked.penal <= data.limit) {
        highlight(null, (method) => fitting.some((x) => x.method === method));
        line(reply, [`No method has learned within this budget: the best, `, { text: picked.method }, `, has ${text(picked.middle)}; ${data.guess}.`], "first");
        return;
      }
      const steps = axis.name === "memory" ? "" : ` after ${digits(Math.floor(picked.steps))} steps`;
      line(reply, [data.sure ? "Use " : "So far: ", { text: picked.method }, `: ${text(picked.middle)}${span(picked)} validation ${data.metric.name}${steps}${cost(picked)}.`], "first");
      const same = alike(pool).filter((x) => x !== picked);
      if (same.length) line(reply, [`No clear difference: ${list(same.map(named))}.`]);
      const others = pool.filter((x) => x.exact !== picked.exact && !same.includes(x));
      const kind = picked.exact ? "without backprop" : "with backprop";
      if (others.length) {
        const best = least(alike(others)), behind = picked.middle - best.middle;
        line(reply, [`The best ${kind}: `, { text: best.method }, `, ${text(best.middle)}${span(best)}, ${gap(Math.abs(behind))} ${behind >= 0 ? "behind" : "ahead"}${cost(best)}.`]);
      } else if (known.some((x) => x.exact !== picked.exact) && !same.some((x) => x.exact !== picked.exact)) line(reply, [`No method ${kind} fits this budget.`]);
      const rest = known.length - fitting.length;
      if (rest) line(reply, [`${rest} of ${known.length} methods do not fit.`]);
      if (axis.name === "seconds" && pool.some((x) => x.doubt)) line(reply, ["Some timings are not reliable: see ~ in the table."]);
    }
    slider.addEventListener("input", update);
    update();
  }

  if (specs.answer) (specs.answer.kind === "plan" ? planned : answer)(specs.answer);
})();
