"use strict";
(() => {
  const data = JSON.parse(document.getElementById("specs").textContent);
  const byId = (id) => document.getElementById(id);
  const DASH = "–", PEAK = 2, KERNELS = data.figures.length - 1; // places among the figures
  const purposes = data.figures.slice(PEAK, KERNELS);

  // ---- numbers as the command line formats them (core/units.py)
  const fixed = (x, places) => {
    const [whole, rest] = x.toFixed(Math.min(places + 40, 100)).split(".");
    const tail = (rest ?? "").slice(places);
    let text = x.toFixed(places);
    if (/^50*$/.test(tail)) { // a tie: Python takes the even digit
      const kept = whole + (places ? "." + rest.slice(0, places) : "");
      if (Number(kept.at(-1)) % 2 === 0) text = kept;
    }
    const [integer, decimals] = text.split(".");
    const grouped = integer.replace(/\B(?=(\d{3})+$)/g, ",");
    return decimals === undefined ? grouped : `${grouped}.${decimals}`;
  };
  const number = (x, digits = 3) => {
    if (x === null) return DASH;
    if (x === 0) return "0";
    const text = fixed(x, Math.max(digits - 1 - Math.floor(Math.log10(Math.abs(x))), 0));
    return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
  };
  const size = (n) => {
    if (n < 1000) return `${fixed(n, 0)} B`;
    let unit;
    for (unit of ["KiB", "MiB", "GiB", "TiB"]) {
      n /= 1024;
      if (n < 999.5) break;
    }
    return `${number(n)} ${unit}`;
  };
  const bytes = (text) => { // as --memory reads them; null for anything else
    const found = /^\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*$/.exec(text);
    const factor = found && data.units[found[2].toLowerCase()];
    const amount = factor ? Math.floor(Number(found[1]) * factor) : 0;
    return amount >= 1 && amount < 2 ** 53 ? amount : null;
  };

  // ---- the figures at a batch size, or for methods at a number of examples in a micro-batch
  const figures = (pieces, batch) => {
    const piece = pieces.find(([first, last]) => first <= batch && batch <= last);
    if (!piece) return null;
    const [, , words, seconds, growth, ...lines] = piece, texts = data.words[words];
    if (!lines.length) return { refusal: texts[0] };
    const values = lines.map((line) => data.lines[line][0] + data.lines[line][1] * batch);
    const parts = values.slice(PEAK, KERNELS);
    return {
      words: texts, parts, peak: parts.reduce((a, b) => a + b, 0), flops: values[0], forwards: values[1] ? values[0] / values[1] : 0,
      kernels: values[KERNELS], seconds: seconds === null ? null : seconds + growth * batch,
    };
  };
  // The schedule of Within(budget): the last of the list that fits, or what the search of the library finds instead.
  const nested = (objective, batch, budget) => {
    const found = objective.schedules.find((each) => each.first <= batch && batch <= each.last);
    if (!found) return null;
    const at = found.schedules.map((each) => ({ ...figures(each.pieces, batch), write: data.writes[each.write] }));
    const least = found.least && { ...figures(found.least.pieces, batch), write: data.writes[found.least.write] };
    const fits = (each) => each.peak <= budget;
    let index = at.reduce((last, each, place) => (fits(each) ? place : last), -1);
    if (!found.least) { // some schedules only: the one with the fewest FLOPs
      index = at.reduce((best, each, place) => (fits(each) && (best < 0 || each.flops < at[best].flops) ? place : best), -1);
    }
    for (const [low, high, other] of found.exceptions[batch] ?? []) if (low <= budget && (high === null || budget < high)) index = other;
    return { all: at, least, chosen: at[index] ?? (least && fits(least) ? least : null), complete: Boolean(found.least) };
  };

  // ---- the rows of a plan
  const NESTED = { write: "", family: "Reverse", exact: true, offloads: false, parts: 1, steps: 1, cell: "1" };
  const lowest = (pool) => pool.reduce((best, next) => (next.peak < best.peak || (next.peak === best.peak && next.flops < best.flops) ? next : best));
  const rowsAt = (objective, batch, budget) => {
    const rows = objective.methods.filter(([place]) => data.methods[place].parts <= batch).map(([place, steps, cell, pieces]) => {
      const method = data.methods[place], divides = batch % method.parts === 0;
      return { ...method, key: method.method, steps, cell, found: divides ? figures(pieces, batch / method.parts) : { refusal: `batch ${batch} is no multiple of ${method.parts}: left out` }, left: !divides };
    });
    const schedules = nested(objective, batch, budget);
    if (schedules) {
      const name = schedules.complete ? `Within(${size(budget).replace(" ", "")})` : "nested checkpointing";
      const least = lowest([...schedules.all, ...(schedules.least ? [schedules.least] : [])]);
      const found = schedules.chosen ?? { refusal: `no schedule fits: the smallest peak is ${size(least.peak)}` };
      const row = { ...NESTED, key: "nested", method: name, mark: data.nested, found, write: found.write ?? "", length: 99, schedules: schedules.all };
      const after = rows.findLastIndex((each) => each.family === "backprop" || each.family === "Reverse");
      rows.splice(after + 1, 0, row);
    }
    for (const row of rows) row.fits = !row.found.refusal && row.found.peak <= budget;
    return { rows, schedules };
  };
  // Seconds of equal counts may differ in the last bits, because they are on different lines.
  const cost = (row) => (row.found.seconds === null ? row.found.flops : Number(row.found.seconds.toPrecision(12)));
  const least = (pool, key) => pool.reduce((best, next) => {
    const a = key(best), b = key(next), i = a.findIndex((x, place) => x !== b[place]);
    return i >= 0 && b[i] < a[i] ? next : best;
  });
  const costs = (row) => `${size(row.found.peak)} at the peak, ${fixed(row.found.forwards, 1)} forwards${row.found.seconds === null ? "" : `, about ${number(row.found.seconds, 2)} s`} a step`;

  // The method to use and why: the rule of planning/recommend.py. Parts of a sentence; {method} is set in its type.
  const recommended = (objective, { rows, schedules }, batch, budget) => {
    const fitting = rows.filter((row) => row.fits), exact = fitting.filter((row) => row.exact);
    if (exact.length) {
      const best = least(exact, (row) => [Number(row.offloads), cost(row), row.length, row.found.peak]);
      const rank = best.found.seconds === null ? "cheapest" : "fastest";
      const which = exact.length === 1 ? "the only exact gradient here that fits" : `the ${rank} exact gradient that fits`;
      const left = exact.some((row) => row.offloads) && !best.offloads ? " without offloading" : "";
      return { best, sentences: [["Use ", best, `, ${which}${left}: ${costs(best)}.`]] };
    }
    const candidates = rows.filter((row) => row.exact && !row.found.refusal).map((row) => ({ ...row.found, row }));
    if (schedules) candidates.push({ ...(schedules.least ?? lowest(schedules.all)), row: { method: "nested checkpointing" } });
    const single = batch > 1 ? figures(objective.least, batch) : null;
    const inParts = { ...NESTED, key: "least", family: "Accumulated", method: `nested checkpointing, ${batch} micro-batches`, mark: data.nested, length: 99 };
    if (single && !single.refusal) {
      inParts.found = single;
      inParts.write = `Accumulated(${data.writes[single.words[3]]}, ${batch})`;
      candidates.push({ ...single, row: inParts });
    }
    const smallest = candidates.length ? lowest(candidates) : null;
    if (smallest && smallest.peak <= budget && smallest.row === inParts) {
      inParts.fits = true;
      return { best: inParts, added: inParts, sentences: [["Use ", inParts, `: ${costs(inParts)}.`], ["No exact gradient of the whole batch fits. A plan for these settings may find one with fewer micro-batches."]] };
    }
    const why = schedules?.complete ? `${size(budget)} is less than any exact gradient needs with these settings: ` : `No exact gradient of this table fits ${size(budget)}. The smallest peak: `;
    const sentences = !smallest ? [[schedules?.complete ? "No exact gradient can be computed here, whatever the budget." : "No method of this table computes the exact gradient here."]]
      : [[`${why}${size(smallest.peak)} (`, smallest.row, `, ${fixed(smallest.forwards, 1)} forwards).`]];
    if (rows.some((row) => row.left)) sentences.push(["Micro-batches of unequal sizes are left out."]);
    const inexact = fitting.filter((row) => row.steps !== null);
    if (fitting.length) {
      const best = least(inexact.length ? inexact : fitting, (row) => [cost(row) * (row.steps ?? 1), row.length, row.found.peak]);
      const steps = best.steps === null ? "" : `, and in theory ${best.cell} times the steps`;
      return { best, sentences: [["Use ", best, `, which fits: ${costs(best)}${steps}.`], ...sentences] };
    }
    const others = rows.filter((row) => !row.exact && !row.found.refusal);
    const best = others.length ? least(others, (row) => [row.found.peak, row.found.flops]) : null;
    return { best: null, sentences: [["Nothing here fits."], ...sentences, ...(best ? [[best, ` needs ${size(best.found.peak)}.`]] : [])] };
  };

  // ---- the settings: controls, and the part of the address after #
  const start = { memory: data.memory, batch: data.start, choice: data.axes.map(() => 0), method: "" };
  const state = { ...start, choice: [...start.choice] };
  const objectiveNow = () => data.objectives.find((each) => each.choice.every((value, axis) => value === state.choice[axis]));
  const read = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    Object.assign(state, start, { choice: [...start.choice] });
    if (bytes(given.get("memory") ?? "")) state.memory = given.get("memory");
    if (data.sizes.includes(Number(given.get("batch")))) state.batch = Number(given.get("batch"));
    data.axes.forEach((axis, place) => {
      const index = axis.values.findIndex((value) => value.label === given.get(axis.name));
      if (index >= 0) state.choice[place] = index;
    });
    state.method = given.get("method") ?? "";
  };
  const store = () => {
    const kept = new URLSearchParams({ memory: state.memory });
    if (data.sizes.length > 1) kept.set("batch", state.batch);
    data.axes.forEach((axis, place) => { if (axis.values.length > 1) kept.set(axis.name, axis.values[state.choice[place]].label); });
    if (state.method) kept.set("method", state.method);
    try { history.replaceState(null, "", "#" + kept); } catch { /* a page without an address */ }
  };
  const command = (write) => {
    const words = data.axes.map((axis, place) => axis.values[state.choice[place]].words).filter(Boolean);
    const memory = state.memory.replaceAll(/\s/g, "");
    return [data.command, ...words, `--batch ${state.batch}`, `--memory ${memory}`, ...(write ? [`--method "${write}"`] : [])].join(" ");
  };

  const svg = (tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const mark = (look) => {
    const drawn = svg("svg", { class: "mark", viewBox: "-1.1 -1.1 2.2 2.2", "aria-hidden": "true" });
    drawn.append(svg("path", { d: look.shape, fill: look.colour }));
    return drawn;
  };
  const copier = (text, title) => {
    const button = element("button", "copy", "copy");
    button.type = "button";
    button.title = `copy ${title}`;
    button.setAttribute("aria-label", `copy ${title}`);
    button.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText(text); } catch {
        const area = element("textarea", text);
        document.body.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
      }
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy"; }, 1200);
    });
    return button;
  };

  // ---- the answer
  const sentence = (parts, box) => {
    const line = element("p");
    for (const part of parts) line.append(typeof part === "string" ? part : element("b", part.method, "method"));
    box.append(line);
  };
  const largestBatch = (objective, row, budget) => {
    const fits = (batch) => {
      if (batch % row.parts) return false;
      if (row.key === "nested") { const at = nested(objective, batch, budget); return Boolean(at && at.chosen); }
      const found = figures(objective.methods.find(([place]) => data.methods[place].method === row.key)[3], batch / row.parts);
      return Boolean(found) && !found.refusal && found.peak <= budget;
    };
    const most = data.sizes.findLast(fits);
    return most === undefined ? "none" : most === data.sizes.at(-1) ? `${most.toLocaleString("en")} or more` : most.toLocaleString("en");
  };
  const showAnswer = (objective, shown, budget) => {
    const box = byId("answer");
    box.replaceChildren();
    if (objective.refusal) { sentence([objective.refusal], box); return; }
    const { picked, advice } = shown;
    if (picked && picked !== advice.best) {
      const { found } = picked;
      if (found.refusal) sentence([picked, ` cannot be used here: ${found.refusal}.`], box);
      else sentence([picked, picked.fits ? " fits: " : ` does not fit, ${size(found.peak - budget)} over: `, `${costs(picked)}.`], box);
      advice.sentences[0][0] === "Use " ? sentence(["The plan: use ", ...advice.sentences[0].slice(1)], box) : sentence(advice.sentences[0], box);
    } else for (const parts of advice.sentences) sentence(parts, box);
    const row = picked ?? advice.best;
    box.style.setProperty("--accent", row ? row.mark.colour : "var(--soft)");
    if (row && row.write) {
      const line = element("p", undefined, "command"), text = command(row.write);
      const code = element("code");
      for (const word of text.split(" ")) code.append(element("span", word), " ");
      line.append(code, copier(text, "the command"));
      box.append(line);
    }
  };

  // ---- the table, with a bar for the memory of each method
  const opened = new Set();
  const headings = [["method"], ["memory at the peak, by purpose", "peak"], ["fits"], ["forwards"], ["est. s/step"], ["steps × (theory)", "steps"], ["largest batch"], [""]];
  const order = (row) => (row.found.refusal ? [2, 0, 0] : row.fits ? [0, row.found.flops, row.found.peak] : [1, row.found.peak, row.found.flops]);
  const grouped = (rows, picked) => {
    const families = new Map();
    for (const row of rows) families.set(row.family, [...(families.get(row.family) ?? []), row]);
    return [...families].map(([name, members]) => {
      const head = members.includes(picked) ? picked : least(members, order);
      return { name, head, others: members.filter((row) => row !== head) };
    });
  };
  const stack = (row, scale, budget) => {
    const bar = element("span", undefined, "stack");
    bar.setAttribute("aria-hidden", "true");
    row.found.parts.forEach((part, place) => {
      if (!part) return;
      const piece = element("i");
      piece.style.cssText = `width:${(100 * part) / scale}%;background:${data.colours[place]}`;
      piece.title = `${purposes[place]}: ${size(part)}, ${fixed((100 * part) / row.found.peak, 1)}% of the peak`;
      bar.append(piece);
    });
    const line = element("u");
    line.style.left = `${(100 * budget) / scale}%`;
    line.title = `budget ${size(budget)}`;
    if (budget <= scale) bar.append(line);
    return bar;
  };
  const cellsOf = (row, objective, scale, budget) => {
    const { found } = row, refused = Boolean(found.refusal);
    return [
      null,
      refused ? DASH : size(found.peak),
      row.left ? DASH : refused ? "no" : row.fits ? "yes" : `no, ${size(found.peak - budget)} over`,
      refused ? DASH : fixed(found.forwards, 2),
      refused ? DASH : number(found.seconds, 2),
      row.cell,
      row.key === "least" ? DASH : largestBatch(objective, row, budget),
    ];
  };
  const line = (row, cells, hidden, group, shown) => {
    const made = element("tr", undefined, [row === shown.picked || (!shown.picked && row === shown.advice.best) ? "pick" : "", row.fits ? "" : "over", group.others.includes(row) ? "member" : ""].join(" ").trim());
    made.dataset.method = row.method;
    made.style.setProperty("--accent", row.mark.colour);
    made.hidden = group.others.includes(row) && !opened.has(group.name);
    cells.forEach((text, place) => {
      if (hidden.has(place)) return;
      const cell = element("td", place ? text : undefined);
      const label = headings[place].at(-1);
      cell.dataset.label = label;
      if (place === 0) {
        const name = element("button", undefined, "name");
        name.type = "button";
        name.title = "show this method above";
        name.setAttribute("aria-pressed", String(state.method === row.key));
        name.append(mark(row.mark), element("span", row.method, "method"));
        name.addEventListener("click", () => { state.method = state.method === row.key ? "" : row.key; update(); });
        cell.append(name);
        if (row.found.refusal) cell.append(element("small", row.found.refusal));
        if (row === group.head && group.others.length) {
          const more = element("button", `${group.others.length} more like it`, "more");
          more.type = "button";
          more.setAttribute("aria-expanded", String(opened.has(group.name)));
          more.addEventListener("click", () => { opened.has(group.name) ? opened.delete(group.name) : opened.add(group.name); update(); });
          cell.append(more);
        }
      }
      if (label === "peak") { cell.className = "wide"; if (!row.found.refusal) cell.append(stack(row, shown.scale, shown.budget)); }
      if (label === "fits" && !row.fits && !row.left) cell.className = "warn";
      made.append(cell);
    });
    const last = element("td", undefined, "do");
    if (row.write) last.append(copier(row.write, `the expression ${row.method}`));
    made.append(last);
    return made;
  };
  const showTable = (objective, shown) => {
    const { rows, advice, picked, budget } = shown;
    const lines = advice.added ? [...rows, advice.added] : rows;
    const groups = grouped(lines, picked ?? advice.best);
    const visible = groups.flatMap((group) => [group.head, ...(opened.has(group.name) ? group.others : [])]);
    shown.scale = 1.02 * Math.max(budget, ...visible.filter((row) => !row.found.refusal).map((row) => row.found.peak));
    const texts = new Map(lines.map((row) => [row, cellsOf(row, objective, shown.scale, budget)]));
    const hidden = new Set([4, 5, 6].filter((place) => [...texts.values()].every((cells) => cells[place] === DASH) || (place === 6 && data.sizes.length < 2)));
    const table = byId("rows"), focused = document.activeElement?.closest?.("#rows tr")?.dataset.method;
    const wasMore = document.activeElement?.className === "more";
    const head = element("tr");
    headings.forEach(([heading], place) => { if (!hidden.has(place)) head.append(Object.assign(element("th", heading), { scope: "col" })); });
    table.tHead.replaceChildren(head);
    table.tBodies[0].replaceChildren(...groups.flatMap((group) => [group.head, ...group.others].map((row) => line(row, texts.get(row), hidden, group, shown))));
    if (focused) all("tr", table).find((row) => row.dataset.method === focused)?.querySelector(wasMore ? ".more" : ".name")?.focus();
    const used = purposes.map((_, place) => visible.some((row) => row.found.parts?.[place]));
    byId("purposes").replaceChildren(...purposes.flatMap((purpose, place) => {
      if (!used[place]) return [];
      const entry = element("span", purpose), swatch = element("i");
      swatch.style.background = data.colours[place];
      entry.prepend(swatch);
      return [entry];
    }));
  };
  const showBreakdown = (row) => {
    const box = byId("breakdown");
    if (!row || row.found.refusal) { box.replaceChildren(); return; }
    const { words: [operator, module, kernel], parts, kernels } = row.found;
    const list = parts.map((part, place) => (part ? `${purposes[place]} ${size(part)}` : "")).filter(Boolean).join("  ");
    const where = module ? `in ${module}` : "outside any module";
    const more = kernels ? `, and up to ${size(kernels)} more inside ${kernel}` : "";
    box.textContent = `peak of ${row.method}:  ${list}   at ${operator} ${where}${more}`;
  };

  // ---- the curve: cost of a step against its peak
  const ticks = (low, high, base, levels) => {
    let found = [];
    for (const [stride, factors] of levels) {
      found = [];
      for (let k = Math.floor(Math.log(low) / Math.log(base) / stride) * stride; base ** k <= high; k += stride) for (const f of factors) if (f * base ** k >= low && f * base ** k <= high) found.push(f * base ** k);
      if (found.length >= 3) break;
    }
    return found;
  };
  const showCurve = (shown) => {
    const { rows, advice, picked, budget, schedules } = shown, box = byId("curve");
    const methods = [...rows, ...(advice.added ? [advice.added] : [])].filter((row) => !row.found.refusal);
    const timed = methods.length > 0 && methods.every((row) => row.found.seconds !== null);
    const y = (found) => (timed ? found.seconds : found.forwards);
    const points = schedules ? [...schedules.all, ...(schedules.least ? [schedules.least] : [])] : [];
    const found = [...methods.map((row) => row.found), ...points];
    box.replaceChildren();
    if (!found.length) return;
    const width = Math.max(box.clientWidth, 280), height = 300, left = 44, right = width - 12, top = 22, bottom = height - 40;
    const peaks = [...found.map((each) => each.peak), budget], values = found.map(y);
    const [lowX, highX, lowY, highY] = [Math.min(...peaks) / 1.12, Math.max(...peaks) * 1.12, Math.min(...values) / 1.25, Math.max(...values) * 1.25];
    const toX = (value) => left + ((right - left) * Math.log(value / lowX)) / Math.log(highX / lowX);
    const toY = (value) => bottom - ((bottom - top) * Math.log(value / lowY)) / Math.log(highY / lowY);
    const drawing = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "cost of a step against its peak memory" });
    const put = (...words) => drawing.appendChild(svg(...words));
    for (const value of ticks(lowY, highY, 10, [[1, [1]], [1, [1, 3]], [1, [1, 2, 5]], [1, [1, 1.5, 2, 3, 4, 5, 6, 7, 8]]])) {
      put("line", { x1: left, x2: right, y1: toY(value), y2: toY(value), class: "grid" });
      put("text", { x: left - 6, y: toY(value) + 4, "text-anchor": "end" }, number(value));
    }
    for (const value of ticks(lowX, highX, 2, [[4, [1]], [2, [1]], [1, [1]], [1, [1, 1.5]], [1, [1, 1.25, 1.5, 1.75]]]).filter((_, i, list) => list.length * 62 < right - left || i % 2 === 0)) {
      put("line", { x1: toX(value), x2: toX(value), y1: bottom, y2: bottom + 4, class: "tick" });
      put("text", { x: toX(value), y: bottom + 17, "text-anchor": "middle" }, size(value));
    }
    put("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "tick" });
    put("text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, "peak memory of a step");
    put("text", { x: 2, y: 12 }, timed ? "estimated seconds a step" : "forwards a step");
    put("line", { x1: toX(budget), x2: toX(budget), y1: top, y2: bottom, class: "limit" });
    const side = toX(budget) > (left + right) / 2;
    put("text", { x: toX(budget) + (side ? -6 : 6), y: top + 10, "text-anchor": side ? "end" : "start" }, `budget ${size(budget)}`);
    const sorted = [...points].sort((a, b) => a.peak - b.peak);
    if (sorted.length) put("polyline", { points: sorted.map((each) => `${toX(each.peak)},${toY(y(each))}`).join(" "), class: "frontier" });
    for (const row of [...methods].sort((a, b) => Number(a === (picked ?? advice.best)) - Number(b === (picked ?? advice.best)))) {
      const isShown = row === (picked ?? advice.best), place = `translate(${toX(row.found.peak)} ${toY(y(row.found))}) scale(${isShown ? 8 : 5.5})`;
      if (isShown) put("circle", { cx: toX(row.found.peak), cy: toY(y(row.found)), r: 13, class: "ring" });
      const drawn = put("path", { d: row.mark.shape, fill: row.mark.colour, transform: place, opacity: row.fits ? 1 : 0.35, class: "point" });
      drawn.append(svg("title", {}, `${row.method}: ${size(row.found.peak)}, ${fixed(row.found.forwards, 2)} forwards`));
      drawn.addEventListener("click", () => { state.method = state.method === row.key ? "" : row.key; update(); });
    }
    const row = picked ?? advice.best;
    if (row && !row.found.refusal) {
      const x = toX(row.found.peak), end = x > (left + right) / 2;
      put("text", { x: x + (end ? -17 : 17), y: toY(y(row.found)) + 4, "text-anchor": end ? "end" : "start", class: "named" }, row.method);
    }
    box.append(drawing);
  };

  // ---- controls
  const slider = byId("memory-slider"), memory = byId("memory"), batch = byId("batch");
  const span = () => { // budgets from half of the smallest to the largest peak of any setting
    let low = Infinity, high = 0;
    for (const objective of data.objectives) for (const [, , , pieces] of objective.methods ?? []) for (const at of [pieces[0][0], pieces.at(-1)[1]]) {
      const found = figures(pieces, at);
      if (found && !found.refusal) { low = Math.min(low, found.peak); high = Math.max(high, found.peak); }
    }
    return [Math.min(low, bytes(data.memory)) / 2, Math.max(high, bytes(data.memory)) * 1.1];
  };
  const [low, high] = span();
  const makeControls = () => {
    memory.addEventListener("input", () => {
      const isRight = bytes(memory.value) !== null;
      memory.setAttribute("aria-invalid", String(!isRight));
      if (isRight) { state.memory = memory.value.trim(); update(); }
    });
    slider.addEventListener("input", () => {
      state.memory = size(low * (high / low) ** (slider.value / 1000)).replace(" ", "").replaceAll(",", "");
      if (!bytes(state.memory)) state.memory = `${Math.round(low * (high / low) ** (slider.value / 1000))}B`;
      update();
    });
    batch.max = data.sizes.length - 1;
    byId("batch-row").hidden = data.sizes.length < 2;
    batch.addEventListener("input", () => { state.batch = data.sizes[batch.value]; update(); });
    data.axes.forEach((axis, place) => {
      if (axis.values.length < 2) return;
      const row = element("div", undefined, "control"), group = element("div", undefined, "switch");
      group.setAttribute("role", "radiogroup");
      group.setAttribute("aria-label", axis.title);
      axis.values.forEach((value, index) => {
        const label = element("label"), input = element("input");
        Object.assign(input, { type: "radio", name: `axis-${axis.name}`, value: String(index) });
        input.addEventListener("change", () => { state.choice[place] = index; update(); });
        label.append(input, element("span", value.shown));
        group.append(label);
      });
      row.append(element("span", axis.title), group);
      byId("levers").append(row);
    });
    byId("method").addEventListener("change", (event) => { state.method = event.target.value; update(); });
  };
  const showControls = (objective, rows, budget) => {
    if (bytes(memory.value) !== budget) memory.value = state.memory;
    memory.setAttribute("aria-invalid", "false");
    slider.value = String(Math.round((1000 * Math.log(budget / low)) / Math.log(high / low)));
    slider.setAttribute("aria-valuetext", size(budget));
    batch.value = String(data.sizes.indexOf(state.batch));
    batch.setAttribute("aria-valuetext", String(state.batch));
    byId("batch-value").textContent = state.batch.toLocaleString("en");
    data.axes.forEach((axis, place) => { for (const input of all(`input[name="axis-${axis.name}"]`)) input.checked = Number(input.value) === state.choice[place]; });
    const options = [["", "the one to use"], ...rows.map((row) => [row.key, row.method])];
    byId("method").replaceChildren(...options.map(([value, text]) => Object.assign(element("option", text), { value })));
    byId("method").value = options.some(([value]) => value === state.method) ? state.method : "";
    const facts = objective.refusal ? [] : [`${objective.weights.toLocaleString("en")} trained weights`, objective.dtype, objective.optimizer ?? "no optimizer"];
    byId("facts").replaceChildren(...[...facts, ...data.facts].map((fact) => element("span", fact)));
  };
  const showComputed = (objective, rows) => {
    const body = byId("computed").tBodies[0];
    body.replaceChildren(...(objective.methods ?? []).map(([place, , , pieces, computed]) => {
      const row = element("tr"), texts = [data.methods[place].method, computed.join(", "), pieces.length.toLocaleString("en")];
      texts.forEach((text, index) => { const cell = element("td", text, index === 2 ? "n" : ""); cell.dataset.label = ["method", "simulated batches", "lines"][index]; row.append(cell); });
      return row;
    }));
    const left = rows.filter((row) => row.found.refusal && !row.left);
    byId("unfair").hidden = !left.length;
    byId("refused").replaceChildren(...left.map((row) => element("li", `${row.method}: ${row.found.refusal}`)));
    byId("frontier").hidden = !objective.schedules?.length;
    byId("complete").hidden = !objective.schedules?.some((each) => !each.least);
  };

  let storing = 0;
  function update() {
    const objective = objectiveNow(), budget = bytes(state.memory);
    if (objective.refusal) {
      showControls(objective, [], budget);
      showAnswer(objective, null, budget);
      for (const id of ["curve", "breakdown", "purposes"]) byId(id).replaceChildren();
      byId("rows").tBodies[0].replaceChildren();
      showComputed(objective, []);
    } else {
      const found = rowsAt(objective, state.batch, budget);
      const advice = recommended(objective, found, state.batch, budget);
      const picked = state.method ? found.rows.find((row) => row.key === state.method) ?? null : null;
      const shown = { ...found, advice, picked, budget };
      showControls(objective, found.rows, budget);
      showAnswer(objective, shown, budget);
      showTable(objective, shown);
      showBreakdown(picked ?? advice.best);
      showCurve(shown);
      showComputed(objective, found.rows);
    }
    clearTimeout(storing);
    storing = setTimeout(store, 200); // browsers limit how often an address changes
    document.documentElement.dataset.drawn = "1";
  }
  makeControls();
  read();
  update();
  window.addEventListener("hashchange", () => { read(); update(); });
  window.addEventListener("resize", update);
})();
