"use strict";
// What moves in the page: three sliders, what they say, the map, and the charts. The arithmetic is in skyline.js.

const KIB = 1024;
const UNITS = [["GiB", KIB ** 3], ["MiB", KIB ** 2], ["KiB", KIB]];

/** A number with so many decimals; halves go to the even digit, as in Python. */
function fixed(value, digits) {
  return (roundHalfEven(value * 10 ** digits) / 10 ** digits).toFixed(digits);
}

/** Bytes as the command line writes them: four significant digits in binary units. */
function formatBytes(bytes) {
  const size = Math.abs(bytes);
  const sign = bytes < 0 ? "-" : "";
  for (const [unit, scale] of UNITS) {
    if (size >= scale) {
      const digits = size / scale < 100 ? 2 : 1;
      return `${sign}${fixed(size / scale, digits)} ${unit}`;
    }
  }
  return `${sign}${size} B`;
}

const exactly = (bytes) => `${bytes.toLocaleString("en-US")} B`;
const words = (name) => name.replaceAll("_", " ");
const byId = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A new element with a class, a text and children. */
function element(tag, className, text, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

const model = JSON.parse(byId("model").textContent);
const state = {
  split: model.splits.findIndex((split) => split.batch === model.plan.batch),
  length: model.plan.length,
  memory: model.memory_bytes,
};

/** The keys that ask the command line for the chosen point. */
function overrides() {
  const split = model.splits[state.split];
  const keys = [...model.pins, `planner.pin.micro_batch_size=${split.batch}`,
    `planner.pin.gradient_accumulation_steps=${split.steps}`, `planner.pin.max_length=${state.length}`];
  if (split.global !== model.global_batch_size) keys.push(`training.global_batch_size=${split.global}`);
  if (state.memory !== model.memory_bytes) keys.push(`hardware.memory_bytes=${state.memory}`);
  return keys.join(" ");
}

/** Where a point stands: a mark, a word and a class for it, none of which is a colour alone. */
function standing(found, memory) {
  if (found.gap !== undefined) return { kind: "unknown", mark: "?", text: "not in this page" };
  const short = shortBy(model, found, memory);
  if (short.bytes > 0) return { kind: "over", mark: "✗", text: `${formatBytes(short.bytes)} too much for ${short.where}` };
  return { kind: "fits", mark: "✓", text: `fits, ${formatBytes(budget(model, memory) - found.device)} to spare` };
}

function showControls() {
  const split = model.splits[state.split];
  byId("batch").value = state.split;
  byId("batch-value").textContent = split.batch;
  byId("batch-note").textContent = `x accumulation ${split.steps} = global batch ${split.global}`
    + (split.global === model.global_batch_size ? "" : `, not the job's ${model.global_batch_size}`);
  byId("length").value = state.length;
  byId("length-number").value = state.length;
  const card = model.cards.findIndex((one) => one.bytes === state.memory);
  if (card >= 0) byId("card").value = card;
  byId("card-number").value = Number((state.memory / KIB ** 3).toFixed(2));
  byId("card-note").textContent = `${card >= 0 ? `as much as ${model.cards[card].name}; ` : ""}`
    + `${formatBytes(budget(model, state.memory))} after ${(100 * model.headroom).toFixed(1)} % headroom`;
  byId("overrides").textContent = overrides();
}

/** The chosen point: does it fit, what is alive at its peak, and the peak of every phase. */
function showAnswer(found) {
  const where = standing(found, state.memory);
  byId("answer").className = `answer ${where.kind}`;
  byId("answer-mark").textContent = where.mark;
  byId("answer-text").textContent = where.text;
  const known = found.gap === undefined;
  byId("answer-known").hidden = !known;
  byId("answer-gap").hidden = known;
  if (!known) {
    byId("answer-gap").textContent = `No number for this shape: ${found.gap}. The command below asks for it.`;
    return;
  }
  byId("device").textContent = formatBytes(found.device);
  byId("device-bytes").textContent = exactly(found.device);
  byId("device-bytes").dataset.bytes = found.device;
  byId("host").textContent = found.host ? formatBytes(found.host) : "";
  byId("host-row").hidden = !found.host;
  const split = model.splits[state.split];
  const speed = model.speeds[`${split.batch}x${split.steps}x${state.length}`];
  byId("speed-row").hidden = speed === undefined;
  if (speed !== undefined) byId("speed").textContent = `${Math.round(speed).toLocaleString("en-US")} tokens/s`;
  const isPlan = split.batch === model.plan.batch && state.length === model.plan.length;
  byId("plan-note").hidden = !isPlan;
  showPhases(found);
  showParts(found);
}

function showPhases(found) {
  byId("phases").replaceChildren(...found.phases.map((peak) => {
    const row = element("tr", peak === found.peak ? "highest" : "", "",
      element("th", "", words(peak.phase)), element("td", "", formatBytes(peak.bytes)),
      element("td", "exact", exactly(peak.bytes)));
    row.dataset.phase = peak.phase;
    row.dataset.bytes = peak.bytes;
    return row;
  }));
}

function showParts(found) {
  const whole = Math.max(state.memory, found.device);
  const parts = found.peak.parts.map((bytes, i) => ({ name: model.categories[i], bytes }))
    .concat({ name: "context", bytes: model.context_bytes }).filter((part) => part.bytes > 0);
  byId("bar").replaceChildren(...parts.map((part) => {
    const piece = element("span", `part ${part.name}`, "");
    piece.style.width = `${(100 * part.bytes) / whole}%`;
    piece.title = `${words(part.name)}: ${formatBytes(part.bytes)}`;
    return piece;
  }));
  byId("bar-card").style.left = `${(100 * state.memory) / whole}%`;
  byId("bar-budget").style.left = `${(100 * budget(model, state.memory)) / whole}%`;
  parts.sort((a, b) => b.bytes - a.bytes);
  byId("parts").replaceChildren(...parts.map((part) => {
    const row = element("tr", "", "", element("th", "", "", element("i", `swatch ${part.name}`), ` ${words(part.name)}`),
      element("td", "", formatBytes(part.bytes)),
      element("td", "", `${((100 * part.bytes) / found.device).toFixed(1)} %`));
    row.dataset.category = part.name;
    row.dataset.bytes = part.bytes;
    return row;
  }));
}

/** Bytes in the unit of the map and the charts. */
function inUnit(bytes) {
  return bytes / model.unit.bytes;
}

/** The map for the chosen memory; a click on a place takes the sliders there. */
function showMap() {
  for (const cell of document.querySelectorAll("#map-body button")) {
    const split = model.splits[Number(cell.dataset.split)];
    const length = Number(cell.dataset.length);
    const found = price(model, split, length);
    const where = standing(found, state.memory);
    const chosen = Number(cell.dataset.split) === state.split && length === state.length;
    cell.className = where.kind;
    cell.setAttribute("aria-pressed", chosen);
    cell.title = found.gap === undefined ? `${exactly(found.device)}: ${where.text}` : found.gap;
    const share = found.gap === undefined ? found.device / budget(model, state.memory) : 0;
    cell.style.setProperty("--share", Math.min(1, share).toFixed(3));
    const size = found.gap === undefined ? fixed(inUnit(found.device), inUnit(found.device) < 100 ? 2 : 0) : "-";
    cell.replaceChildren(element("b", "", size), element("small", "", `${where.mark}${share ? ` ${fixed(100 * share, 0)} %` : ""}`));
  }
  byId("map-memory").textContent = formatBytes(state.memory);
}

/** What all charts share: colours of the page, no frame, one unit. */
function layout(changes) {
  const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true, fixedrange: true };
  const { xaxis, yaxis, ...others } = changes;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 8, t: 12, b: 8 },
    font: { color: colour("--text"), family: "system-ui, sans-serif", size: 12 }, showlegend: false,
    hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...others,
  };
}

const CHART = { responsive: true, displayModeBar: false };

/** Highest bytes on the device over the length, a line per micro batch. */
function drawLengths() {
  const first = model.lengths[0];
  const last = model.lengths.at(-1);
  const stride = Math.max(1, Math.round((last - first) / 96));
  const xs = [...model.lengths];
  for (let x = first; x <= last; x += stride) xs.push(x);
  xs.sort((a, b) => a - b);
  const known = model.splits.map((split) => price(model, split, last)).filter((found) => found.gap === undefined);
  const top = Math.min(1.5 * inUnit(state.memory), 1.1 * Math.max(...known.map((found) => inUnit(found.device)), inUnit(model.bound)));
  const annotations = [];
  const traces = model.splits.map((split, number) => {
    const chosen = number === state.split;
    const ys = xs.map((x) => { const found = price(model, split, x); return found.gap === undefined ? inUnit(found.device) : null; });
    const end = ys.reduce((best, y, i) => (y !== null && y <= top ? i : best), -1);
    if (end >= 0) {
      annotations.push({ x: xs[end], y: ys[end], text: `${split.batch}`, showarrow: false, xanchor: "left", xshift: 3,
        font: { color: colour(chosen ? "--accent" : "--muted"), size: chosen ? 14 : 11 } });
    }
    return { x: xs, y: ys, mode: "lines", name: `micro batch ${split.batch}`, connectgaps: false,
      line: { width: chosen ? 3 : 1.25, color: colour(chosen ? "--accent" : "--muted"), dash: split.global === model.global_batch_size ? "solid" : "dot" },
      hovertemplate: `%{x} tokens: %{y:.2f} ${model.unit.name}` };
  });
  const line = (y, text, dash) => {
    annotations.push({ x: 0, xref: "paper", y, text, showarrow: false, xanchor: "left", yanchor: "bottom", font: { color: colour("--over") } });
    return { type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: colour("--over"), width: 1.5, dash } };
  };
  const shapes = [line(inUnit(state.memory), "memory", "solid"), line(inUnit(budget(model, state.memory)), "", "dash")];
  const found = price(model, model.splits[state.split], state.length);
  if (found.gap === undefined) {
    traces.push({ x: [state.length], y: [inUnit(found.device)], mode: "markers", name: "chosen", hovertemplate: `%{x} tokens: %{y:.2f} ${model.unit.name}`,
      marker: { size: 11, color: colour("--panel"), line: { width: 3, color: colour("--accent") } } });
  }
  Plotly.react("lengths-chart", traces, layout({ shapes, annotations, hovermode: "closest",
    xaxis: { title: { text: "tokens per sequence" }, range: [first, last + (last - first) * 0.04] },
    yaxis: { title: { text: `device, ${model.unit.name}` }, range: [0, top] } }), CHART);
}

/** The peaks of all phases at the chosen point, stacked by category. */
function drawPhases(found) {
  if (found.gap !== undefined) return;
  const names = found.phases.map((peak) => words(peak.phase)).reverse();
  const traces = model.categories.map((category, i) => ({
    type: "bar", orientation: "h", name: words(category), y: names,
    x: found.phases.map((peak) => inUnit(peak.parts[i])).reverse(),
    marker: { color: colour(`--${category}`), line: { color: colour("--panel"), width: 1 } }, hovertemplate: `%{x:.3f} ${model.unit.name}`,
  })).filter((trace) => trace.x.some((x) => x > 0));
  Plotly.react("phases-chart", traces, layout({ barmode: "stack", bargap: 0.35, xaxis: { title: { text: `live tensors, ${model.unit.name}` } } }), CHART);
}

/** One optimizer step of the plan over time, predicted and, where a run was measured, measured. */
function drawStep() {
  const { predicted, measured, phases } = model.step;
  const places = (values) => values.map((_, i) => (100 * (i + 0.5)) / values.length);
  const line = (values, name, style) => ({ x: places(values), y: values.map((bytes) => inUnit(bytes)), name, mode: "lines",
    line: { width: 1.5, ...style }, hovertemplate: `%{y:.3f} ${model.unit.name}` });
  const traces = [{ ...line(predicted, "predicted", { color: colour("--accent") }), fill: "tozeroy", fillcolor: colour("--wash") }];
  if (measured) traces.push(line(measured, "measured", { color: colour("--over"), dash: "dash" }));
  const shapes = [];
  const annotations = [];
  let begin = 0;
  phases.forEach((phase, i) => {
    if (i + 1 < phases.length && phases[i + 1] === phase) return;
    const [from, to] = [(100 * begin) / phases.length, (100 * (i + 1)) / phases.length];
    if (begin > 0) shapes.push({ type: "line", x0: from, x1: from, yref: "paper", y0: 0, y1: 1, line: { color: colour("--muted"), width: 1, dash: "dot" } });
    if (to - from > 12) annotations.push({ x: from, xanchor: "left", y: 1, yref: "paper", yanchor: "bottom", text: words(phase), showarrow: false, font: { color: colour("--muted") } });
    begin = i + 1;
  });
  Plotly.react("step-chart", traces, layout({ shapes, annotations, hovermode: "x unified", showlegend: Boolean(measured), margin: { l: 8, r: 8, t: 28, b: 8 },
    legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom" },
    xaxis: { title: { text: "allocations of one optimizer step, %" }, range: [0, 100] },
    yaxis: { title: { text: `live tensors, ${model.unit.name}` }, rangemode: "tozero" } }), CHART);
}

function show() {
  const found = price(model, model.splits[state.split], state.length);
  showControls();
  showAnswer(found);
  showMap();
  drawLengths();
  drawPhases(found);
}

/** A whole number that a field holds, within its bounds; null when it holds none. */
function typed(field) {
  const value = Number(field.value);
  const ok = field.value !== "" && Number.isFinite(value) && value >= Number(field.min) && value <= Number(field.max);
  field.setAttribute("aria-invalid", !ok);
  return ok ? value : null;
}

function choose(changes) {
  Object.assign(state, changes);
  show();
}

byId("batch").addEventListener("input", (event) => choose({ split: Number(event.target.value) }));
byId("length").addEventListener("input", (event) => choose({ length: Number(event.target.value) }));
byId("length-number").addEventListener("change", (event) => {
  const value = typed(event.target);
  if (value !== null) choose({ length: Math.round(value) });
});
byId("card").addEventListener("input", (event) => choose({ memory: model.cards[Number(event.target.value)].bytes }));
byId("card-number").addEventListener("change", (event) => {
  const value = typed(event.target);
  if (value !== null) choose({ memory: Math.round(value * KIB ** 3) });
});
byId("map-body").addEventListener("click", (event) => {
  const cell = event.target.closest("button");
  if (cell) choose({ split: Number(cell.dataset.split), length: Number(cell.dataset.length) });
});
byId("reset").addEventListener("click", () => choose({
  split: model.splits.findIndex((split) => split.batch === model.plan.batch),
  length: model.plan.length, memory: model.memory_bytes,
}));
byId("copy").addEventListener("click", () => {
  const range = document.createRange();
  range.selectNodeContents(byId("overrides"));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  if (navigator.clipboard) navigator.clipboard.writeText(overrides()).catch(() => {}); // without leave the text stays selected
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { show(); drawStep(); });
document.documentElement.classList.add("scripted");
show();
drawStep();
