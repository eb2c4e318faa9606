"use strict";
// Draws the page from the recorded data in it. Recorded text reaches the document as text nodes alone (`textContent`),
// and charts only get numbers, metrics' names and runs' names, the latter two escaped.

(async () => {
  const $ = (id) => document.getElementById(id);
  const meta = JSON.parse($("meta").textContent);
  const { runs, responses, prompts, images, vocabulary, segmenters, ranges } = meta;
  const special = new Set(meta.special);
  const total = responses.run.length;
  const ROW = 52; // a list row's height in CSS pixels, as in the style sheet
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // ------------------------------------------------------------------------------------------------------- the data

  const HALF = new Float32Array(65536); // every float16; `Float16Array` is too new to count on
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 31) HALF[bits] = fraction ? NaN : sign * Infinity;
    else HALF[bits] = sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  }

  const starts = new Uint32Array(total + 1);
  responses.length.forEach((length, index) => { starts[index + 1] = starts[index] + length; });

  function fromBase64(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text); // new in 2025, and ten times as fast
    const characters = atob(text);
    const bytes = new Uint8Array(characters.length);
    for (let i = 0; i < characters.length; i++) bytes[i] = characters.charCodeAt(i);
    return bytes;
  }

  async function unpack() {
    const bytes = fromBase64($("tokens").textContent);
    $("tokens").remove();
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const buffer = await new Response(stream).arrayBuffer();
    const types = { u4: Uint32Array, u2: Uint16Array, f2: Uint16Array, u1: Uint8Array };
    const columns = {};
    for (const { name, type, offset, scale } of meta.columns) {
      columns[name] = { data: new types[type](buffer, offset, starts[total]), scale };
    }
    return columns;
  }

  const columns = await unpack();
  const token = columns.token.data, marks = columns.marks.data, masked = columns.masked.data;
  const has = (name) => name in columns;
  const number = (name, at) => (has(name) ? HALF[columns[name].data[at]] * columns[name].scale : NaN);
  const isUsed = (at) => number("value_states", at) === 1;

  const texts = new Array(total); // made when first asked for
  function responseText(index) {
    if (texts[index] === undefined) {
      let text = "";
      for (let at = starts[index]; at < starts[index + 1]; at++) text += vocabulary[token[at]];
      texts[index] = text;
    }
    return texts[index];
  }

  /** Of each token of a response its segment (-1 outside of any), and the number of segments. */
  function segmentsOf(index, bit = 0) {
    const ids = new Int32Array(responses.length[index]);
    let segment = 0, open = false;
    for (let i = 0; i < ids.length; i++) {
      const at = starts[index] + i;
      if (masked[at]) { ids[i] = -1; continue; }
      ids[i] = segment;
      open = true;
      if ((marks[at] >> bit) & 1) { segment++; open = false; }
    }
    return { ids, count: segment + (open ? 1 : 0) };
  }

  const byPrompt = prompts.map(() => []);
  responses.prompt.forEach((prompt, index) => byPrompt[prompt].push(index));

  // ------------------------------------------------------------------------------------------------------ small help

  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.includes("-") || name === "role") made.setAttribute(name, value);
      else made[name] = value;
    }
    made.append(...children); // strings become text nodes
    return made;
  }

  const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

  /** A table of names and values. */
  const pairs = (rows) => element("table", { className: "numbers" }, ...rows.map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value))));

  const show = (value, digits = 3) =>
    value === null || Number.isNaN(value) ? "–" : Number(value.toPrecision(digits)).toString().replace("-", "−");
  const rewardOf = (index) => responses.reward[index] ?? NaN;
  const place = (index) =>
    `${runs.length > 1 ? `${runs[responses.run[index]]} · ` : ""}step ${responses.step[index]} · reward ${show(rewardOf(index))}`;
  // Charts read tags in their labels; these are names, not markup.
  const label = (name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /** Makes line breaks and blanks visible, and keeps them in the text. */
  function fill(node, text) {
    let rest = text;
    while (rest.includes("\n")) {
      const end = rest.indexOf("\n");
      node.append(rest.slice(0, end), element("span", { className: "blank", "aria-hidden": "true" }, "↵"), "\n");
      rest = rest.slice(end + 1);
    }
    node.append(rest);
  }

  // --------------------------------------------------------------------------------------------------------- colours

  const RAW_ADVANTAGE = "advantage, raw";
  const LOSS_ADVANTAGE = meta.settings.every((each) => each?.whitened) ? "advantage, whitened" : "advantage in the loss";
  const modes = [
    { name: "segment", title: "Segment" },
    { name: "entropies", title: "Entropy", kind: "sequential", from: (r) => [0, r[2]] },
    { name: "logps", title: "Surprise", kind: "sequential", from: (r) => [0, -r[1]], read: (at) => -number("logps", at), what: "−log probability" },
    { name: "values", title: "Value", kind: "sequential", from: (r) => [r[1], r[2]] },
    { name: "advantages", title: "Advantage", kind: "diverging", from: (r) => symmetric(r), what: LOSS_ADVANTAGE },
    { name: "log_ratios", title: "Ratio", kind: "diverging", from: (r) => symmetric(r), print: (x) => show(Math.exp(x)), what: "ratio to the old policy" },
    { name: "visual_dependency", title: "Sight", kind: "sequential", from: (r) => [0, r[2]], what: "dependence on the images" },
    { name: "policy_mask", title: "Learned", kind: "sequential", from: () => [0, 1], what: "1 where the policy learns" },
    { name: "td_errors", title: "TD error", kind: "diverging", from: (r) => symmetric(r), what: "TD error δ of the segment" },
    { name: "token_rewards", title: "Reward", kind: "diverging", from: (r) => symmetric(r), what: "reward placed on the token" },
  ];
  const KEYS = "1234567890";
  function symmetric([least, low, high, most]) {
    const end = Math.max(-low, high) || Math.max(-least, most) || 1;
    return [-end, end];
  }
  for (const mode of modes) {
    mode.available = mode.name === "segment" || has(mode.name);
    mode.read ??= (at) => number(mode.name, at);
    mode.print ??= (x) => show(x);
    if (mode.kind && mode.available) {
      mode.range = mode.from(ranges[mode.name]);
      if (!(mode.range[1] > mode.range[0])) mode.range = [mode.range[0], mode.range[0] + 1];
    }
  }
  let mode = modes[0];

  const scale = (kind) => meta.scales[dark.matches ? "dark" : "light"][kind];
  function colourOf(value) {
    if (Number.isNaN(value)) return null;
    const colours = scale(mode.kind), [low, high] = mode.range;
    const share = Math.min(1, Math.max(0, (value - low) / (high - low)));
    return colours[Math.round(share * (colours.length - 1))];
  }
  /** Black or white, whichever has more contrast by WCAG's relative luminance. */
  function inkOn(colour) {
    const [r, g, b] = [1, 3, 5].map((i) => {
      const c = parseInt(colour.slice(i, i + 2), 16) / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
  }

  function paint(panel) {
    panel.spans.forEach((span, i) => {
      const at = starts[panel.index] + i;
      const value = mode.kind && !masked[at] ? mode.read(at) : NaN;
      const colour = mode.kind ? colourOf(value) : null;
      span.style.backgroundColor = colour ?? "";
      span.style.color = colour ? inkOn(colour) : "";
      const segment = panel.segments.ids[i];
      span.classList.toggle("odd", !mode.kind && segment >= 0 && segment % 2 === 0);
      span.classList.toggle("even", !mode.kind && segment % 2 === 1);
      // The hue alone does not show the sign: negative values get dots below. Values next to zero get none.
      const signed = mode.kind === "diverging" && Math.abs(value) > 0.02 * mode.range[1];
      span.classList.toggle("minus", signed && value < 0);
      span.classList.toggle("plus", signed && value > 0);
      span.classList.toggle("used", mode.name === "values" && isUsed(at));
    });
  }

  function drawLegend() {
    const legend = $("legend");
    if (!mode.kind) {
      legend.replaceChildren(
        element("span", { className: "swatch token odd cut" }, "one"), element("span", { className: "swatch token even cut" }, "the next"),
        element("span", {}, "a bar follows the token that ends a segment"),
      );
      return;
    }
    const bar = element("span", { className: "bar", role: "img", "aria-label": "colour scale" });
    bar.style.background = `linear-gradient(to right, ${scale(mode.kind).join(",")})`;
    const [low, high] = mode.range;
    const span = (text) => element("span", {}, text);
    const signs = mode.kind === "diverging" ? [span(`dotted: below ${mode.print(0)}`)] : [];
    if (mode.name === "values" && has("value_states")) signs.push(element("span", { className: "swatch token used" }, "line above"), span("advantages use this value"));
    legend.replaceChildren(span(mode.what ?? mode.title.toLowerCase()), span(mode.print(low)), bar, span(mode.print(high)), ...signs);
  }

  function setMode(next) {
    if (!next.available) return;
    mode = next;
    for (const button of $("colours").children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode.name));
    drawLegend();
    panels.forEach(paint);
  }

  modes.forEach((each, i) => {
    const button = element("button", { type: "button", disabled: !each.available, "aria-pressed": "false" }, `${each.title} `, element("kbd", {}, KEYS[i]));
    button.dataset.mode = each.name;
    if (!each.available) button.title = "not recorded by this run";
    button.addEventListener("click", () => setMode(each));
    $("colours").append(button);
  });

  // ---------------------------------------------------------------------------------------------------------- charts

  function layout(extra) {
    const grid = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), size: 11 },
      margin: { l: 44, r: 8, t: 8, b: 30 }, hovermode: "x unified", showlegend: false,
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
      ...extra, xaxis: { ...grid, ...extra.xaxis }, yaxis: { ...grid, ...extra.yaxis },
    };
  }
  const settings = { displayModeBar: false, responsive: true };
  const runStyle = (run) => ({ color: css(`--run${run}`), dash: run ? "dash" : "solid", width: 2 });

  // One point is no curve: it is told in words.
  const metrics = [...new Set(meta.curves.flatMap((curves) => Object.keys(curves)))].sort();
  const charted = metrics.filter((name) => meta.curves.some((curves) => new Set(curves[name]?.[0]).size > 1));
  const wanted = [["reward"], ["entropy"], ["critic/explained_variance", "critic/loss", "segments/count", "kl", "loss"]];
  // A metric that was not logged has no chart: another one in its place would be taken for it.
  const charts = wanted.map((names) => names.find((name) => charted.includes(name))).filter((name) => name).map((chosen) => ({ chosen }));
  if (!charts.length) charts.push({ chosen: "" });

  function drawCurve(chart) {
    const traces = runs.flatMap((run, i) => {
      const curve = meta.curves[i][chart.chosen];
      return curve ? [{ x: curve[0], y: curve[1], name: label(run), mode: "lines+markers", line: runStyle(i), marker: { size: 5, symbol: i ? "diamond" : "circle" } }] : [];
    });
    Plotly.react(chart.node, traces, layout({ xaxis: { title: { text: "step", standoff: 4 } } }), settings);
  }
  function makeCurves() {
    if (!metrics.length) { $("curves").hidden = true; return; }
    const place = $("curves").querySelector(".charts");
    if (charted.every((name) => name === "epoch")) { place.replaceWith(...runs.map(lastNumbers)); return; }
    for (const chart of charts) {
      const nothing = chart.chosen ? [] : [element("option", { value: "", selected: true }, "choose a metric")];
      const select = element("select", { "aria-label": "metric" }, ...nothing, ...charted.map((name) => element("option", { value: name, selected: name === chart.chosen }, name)));
      chart.node = element("div", { className: "chart" });
      select.addEventListener("change", () => { chart.chosen = select.value; drawCurve(chart); });
      place.append(element("div", {}, select, chart.node));
    }
    charts.forEach(drawCurve); // each takes the width that all of them leave it
  }
  /** The log of a run that is too short for curves. */
  function lastNumbers(run, i) {
    const curves = meta.curves[i], names = Object.keys(curves).filter((name) => name !== "epoch");
    const first = ["reward", "entropy"].filter((name) => names.includes(name));
    const rows = [...first, ...names.filter((name) => !first.includes(name)).sort()].map((name) => [name, show(curves[name][1].at(-1), 4)]);
    const steps = [...new Set(names.map((name) => curves[name][0].at(-1)))].join(", ");
    return element("div", {},
      element("p", {}, `${runs.length > 1 ? `${run}: ` : ""}There are no curves, because the log has only one step${steps && ` (${steps})`}. `
        + "To log every step, set logging_steps=1; on the command line, --logging_steps 1."),
      element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "logged numbers" }, pairs(rows)));
  }

  function drawValues(panel) {
    const length = responses.length[panel.index], first = starts[panel.index];
    if (!has("values") || length < 2 || Number.isNaN(ranges.values[0])) { panel.chart.hidden = true; return; }
    const places = Array.from({ length }, (_, i) => i);
    const column = (name) => places.map((i) => { const x = number(name, first + i); return Number.isNaN(x) ? null : x; });
    const states = meta.monte_carlo[panel.index] ?? [];
    const values = column("values"), orange = css("--run1");
    const used = places.filter((i) => isUsed(first + i));
    panel.values = values;
    // Sampled values exist at the used states alone: the zeros elsewhere are no values.
    const isSampled = ["monte_carlo", "tree"].includes(meta.settings[responses.run[panel.index]]?.critic) && used.length > 0;
    const traces = [
      { x: places, y: column("returns"), name: "return", mode: "lines", line: { color: css("--quiet"), dash: "dot", shape: "hv", width: 1.5 } },
      { x: isSampled ? used : places, y: isSampled ? used.map((i) => values[i]) : values, name: "value", mode: "lines", line: { color: css("--run0"), width: 2 } },
      { x: [null], y: [null], mode: "markers", hoverinfo: "skip", marker: { size: 10, color: css("--ink"), symbol: "circle-open" } },
    ];
    if (used.length) {
      traces.push({
        x: used, y: used.map((i) => values[i]), name: "used for advantages", mode: "markers", hoverinfo: "skip",
        marker: { color: css("--run0"), symbol: "circle", size: 7, line: { color: css("--card"), width: 1 } },
      });
    }
    if (states.length) {
      traces.push({
        x: states.map((s) => s[0]), y: states.map((s) => s[1]), name: "Monte Carlo", mode: "markers",
        marker: { color: orange, symbol: "diamond", size: 7 },
        error_y: { type: "data", array: states.map((s) => s[2] ?? 0), color: orange, thickness: 1, width: 2 },
      });
    }
    const ends = [ranges.values, ranges.returns ?? ranges.values].flatMap((r) => [r[0], r[3]]).concat(states.map((s) => s[1]));
    const low = Math.min(...ends), high = Math.max(...ends), margin = 0.08 * (high - low || 1);
    const cuts = places.filter((i) => marks[first + i] & 1);
    // One path for all ends: a shape for each would take seconds in a response of thousands of segments.
    const path = cuts.map((i) => `M${i + 0.5},0V1`).join("");
    const shapes = path ? [{ type: "path", path, yref: "paper", line: { color: css("--line"), width: 1 }, layer: "below" }] : [];
    Plotly.react(panel.chart, traces, layout({
      shapes, showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, margin: { l: 44, r: 8, t: 26, b: 30 },
      xaxis: { title: { text: "token; thin lines: ends of segments", standoff: 4 }, showgrid: false, range: [-0.5, length - 0.5] },
      yaxis: { range: [low - margin, high + margin] },
    }), settings).then(() => {
      panel.chart.data[2].showlegend = false;
      Plotly.restyle(panel.chart, { showlegend: false }, [2]);
    });
    panel.chart.removeAllListeners?.("plotly_click");
    panel.chart.on("plotly_click", (event) => { const i = event.points[0].x; if (panel.spans[i]) panel.spans[i].focus(); });
  }
  const markValue = (panel, i) => {
    if (panel.values && !panel.chart.hidden) Plotly.restyle(panel.chart, { x: [[i]], y: [[i === null ? null : panel.values[i]]] }, [2]);
  };

  // ---------------------------------------------------------------------------------------------- a token's numbers

  function factsOf(panel, i) {
    const at = starts[panel.index] + i, segment = panel.segments.ids[i];
    const facts = [["token", `${i + 1} of ${panel.spans.length}`]];
    if (special.has(token[at])) facts.push(["kind", "special token"]);
    if (masked[at]) return [...facts, ["kind", "not the policy's, or not trained on"]];
    facts.push(["segment", `${segment + 1} of ${panel.segments.count}`]);
    const numbers = [["entropies", "entropy"], ["logps", "probability", Math.exp], ["values", isUsed(at) ? "value, used for advantages" : "value"], ["raw_advantages", RAW_ADVANTAGE], ["advantages", LOSS_ADVANTAGE], ["returns", "return"], ["td_errors", "segment’s TD error δ"], ["visual_dependency", "dependence on the images"], ["policy_mask", "learned from"], ["log_ratios", "ratio", Math.exp]];
    for (const [name, title, print = (x) => x] of numbers) {
      const value = number(name, at);
      if (!Number.isNaN(value)) facts.push([title, show(print(value))]);
    }
    const reward = number("token_rewards", at);
    if (reward) facts.push(["reward", show(reward)]); // neither 0, as of most tokens, nor NaN, where not recorded
    let sum = 0, count = 0;
    panel.segments.ids.forEach((id, j) => { if (id === segment) { sum += number("log_ratios", starts[panel.index] + j); count++; } });
    if (!Number.isNaN(sum)) facts.push(["segment’s ratio (geometric mean)", show(Math.exp(sum / count))]);
    return facts;
  }

  function openTip(panel, i) {
    const span = panel.spans[i], tip = $("tip"), facts = factsOf(panel, i);
    const text = vocabulary[token[starts[panel.index] + i]];
    tip.replaceChildren(
      element("div", { className: "what" }, JSON.stringify(text).slice(1, -1)),
      element("table", {}, ...facts.map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value)))),
    );
    // The text for screen readers; made for visited tokens, not for all thousands.
    span.setAttribute("aria-label", [text, ...facts.map((fact) => fact.join(" "))].join(", "));
    tip.hidden = false;
    const box = span.getClientRects()[0] ?? span.getBoundingClientRect(), size = tip.getBoundingClientRect();
    // Beside the token and upwards where there is room, so that the next tokens and the curve stay in sight.
    const beside = box.right + size.width + 40 < window.innerWidth;
    const top = beside ? box.bottom - size.height + 8 : box.bottom + 6;
    // At the right edge, so that pictures and rewards stay in sight as well.
    const edge = panel.node.getBoundingClientRect().right - size.width - 12;
    tip.style.left = `${beside ? Math.max(box.right + 28, edge) : Math.max(4, window.innerWidth - size.width - 8)}px`;
    tip.style.top = `${Math.max(4, Math.min(top, window.innerHeight - size.height - 8))}px`;
    markValue(panel, i);
  }
  function closeTip(panel) {
    $("tip").hidden = true;
    markValue(panel, null);
  }

  function moveFocus(panel, i) {
    const next = Math.min(panel.spans.length - 1, Math.max(0, i));
    panel.spans[panel.current]?.setAttribute("tabindex", "-1");
    panel.current = next;
    panel.spans[next]?.setAttribute("tabindex", "0");
    panel.spans[next]?.focus();
  }
  function segmentStep(panel, i, direction) {
    const ids = panel.segments.ids;
    const goal = ids[i] + direction;
    const found = ids.indexOf(Math.max(0, Math.min(panel.segments.count - 1, goal)));
    return found < 0 ? i : found;
  }

  // -------------------------------------------------------------------------------------------- segments, one by one

  /** Of each segment: its first token, its text, and its numbers; NaN where not recorded. */
  function segmentRows(panel) {
    if (panel.rows) return panel.rows;
    const rows = Array.from({ length: panel.segments.count }, () => ({ first: -1, tokens: 0, learned: 0, text: "", value: NaN, reward: 0, delta: NaN, raw: 0, loss: 0 }));
    panel.segments.ids.forEach((id, i) => {
      if (id < 0) return;
      const at = starts[panel.index] + i, row = rows[id];
      if (row.first < 0) row.first = i;
      row.tokens++;
      row.text += vocabulary[token[at]];
      if (isUsed(at)) row.value = number("values", at);
      row.reward += number("token_rewards", at);
      row.delta = number("td_errors", at);
      row.raw += number("raw_advantages", at);
      // The loss has no other tokens.
      if (number("policy_mask", at) !== 0) { row.learned++; row.loss += number("advantages", at); }
    });
    for (const row of rows) { row.raw /= row.tokens; row.loss /= row.learned; }
    panel.rows = rows;
    return rows;
  }

  let segmentsOpen = true;
  function drawSegments(panel) {
    if (!panel.list.open || panel.list.childElementCount > 1) return;
    const numbers = [["value", "value"], ["reward", "reward"], ["delta", "TD error δ"], ["raw", RAW_ADVANTAGE], ["loss", LOSS_ADVANTAGE]];
    const rows = segmentRows(panel), known = numbers.filter(([name]) => rows.some((row) => !Number.isNaN(row[name])));
    const head = ["segment", "text", ...known.map(([, title]) => title)].map((title) => element("th", { scope: "col" }, title));
    const body = rows.map((row, id) => {
      const go = element("button", { type: "button", "aria-label": `to segment ${id + 1}` }, String(id + 1));
      go.addEventListener("click", () => moveFocus(panel, row.first));
      const text = row.text.replaceAll("\n", "↵");
      return element("tr", {}, element("th", { scope: "row" }, go), element("td", { className: "what" }, text.length > 60 ? `${[...text].slice(0, 60).join("")}…` : text),
        ...known.map(([name]) => element("td", {}, show(row[name]))));
    });
    const missing = numbers.filter(([name]) => !known.some(([other]) => other === name)).map(([, title]) => title);
    panel.list.append(element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "segments" },
      element("table", { className: "numbers segments" }, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body))));
    if (missing.length) panel.list.append(element("p", { className: "quiet" }, `not recorded, or not there in this run: ${missing.join("; ")}`));
  }

  /** Goes to the segment with the highest (sign 1) or lowest (−1) advantage; the raw one, which no clamp makes equal. */
  function toExtreme(panel, sign) {
    const name = has("raw_advantages") ? "raw" : "loss", rows = segmentRows(panel).filter((row) => !Number.isNaN(row[name]));
    if (!rows.length) { panel.status.textContent = "No advantages were recorded for this response."; return; }
    const best = rows.reduce((found, row) => (sign * (row[name] - found[name]) > 0 ? row : found));
    moveFocus(panel, best.first);
    const equal = rows.every((row) => row[name] === best[name]) && rows.length > 1;
    const title = name === "raw" ? RAW_ADVANTAGE : LOSS_ADVANTAGE;
    panel.status.textContent = equal
      ? `All ${rows.length} segments have the same advantage, ${show(best[name])}.`
      : `${sign > 0 ? "Best" : "Worst"} segment: ${panel.segments.ids[best.first] + 1} of ${panel.segments.count}, ${title} ${show(best[name])}.`;
  }

  // ------------------------------------------------------------------------------------------------------ the panels

  let panels = [];
  let selected = -1, kept = null;

  function makePanel(index, side) {
    const panel = { index, side, spans: [], segments: segmentsOf(index), current: 0 };
    const group = byPrompt[responses.prompt[index]], prompt = prompts[responses.prompt[index]];
    const title = element("h3", {}, place(index));
    if (runs.length > 1) title.className = `run run${responses.run[index]}`;
    const facts = element("p", { className: "quiet" }, `prompt ${responses.prompt[index] + 1} · ${counted(responses.length[index], "token")} · ${counted(panel.segments.count, "segment")}`);
    const others = element("select", { "aria-label": "responses to this prompt" },
      ...group.map((each, i) => element("option", { value: String(each), selected: each === index }, `${i + 1} of ${group.length}: ${place(each)}`)));
    others.addEventListener("change", () => choose(Number(others.value), side));
    const moves = element("div", { className: "moves" }, others);
    if (kept === null) {
      const keep = element("button", { type: "button" }, "Compare ", element("kbd", {}, "c"));
      keep.addEventListener("click", compare);
      moves.append(keep);
    } else if (side === 1) {
      const stop = element("button", { type: "button" }, "Stop comparing ", element("kbd", {}, "c"));
      stop.addEventListener("click", compare);
      moves.append(stop);
    }
    for (const [title, key, sign] of [["Best segment", "b", 1], ["Worst segment", "w", -1]]) {
      const go = element("button", { type: "button" }, `${title} `, element("kbd", {}, key));
      go.addEventListener("click", () => toExtreme(panel, sign));
      moves.append(go);
    }
    panel.status = element("p", { className: "quiet status", role: "status", "aria-live": "polite" });
    const shownPrompt = element("div", { className: "prompt" }, ...picturesOf(index));
    shownPrompt.append(element("div", { className: "text", tabIndex: 0, role: "region", "aria-label": "prompt" }, prompt.text));

    const text = element("div", { className: "text tokens", role: "listbox", "aria-label": "tokens of the response", "aria-orientation": "horizontal" });
    for (let i = 0; i < responses.length[index]; i++) {
      const at = starts[index] + i;
      const span = element("span", { className: "token", role: "option", tabIndex: i ? -1 : 0 });
      span.dataset.place = i;
      if (masked[at]) span.classList.add("masked");
      if (special.has(token[at])) span.classList.add("special");
      if (!masked[at] && marks[at] & 1) span.classList.add("cut");
      fill(span, vocabulary[token[at]]);
      panel.spans.push(span);
      text.append(span);
    }
    const placeOf = (event) => { const span = event.target.closest(".token"); return span ? Number(span.dataset.place) : null; };
    text.addEventListener("mouseover", (event) => { const i = placeOf(event); if (i !== null) openTip(panel, i); });
    text.addEventListener("mouseleave", () => closeTip(panel));
    text.addEventListener("focusin", (event) => { const i = placeOf(event); if (i !== null) openTip(panel, i); });
    text.addEventListener("focusout", () => closeTip(panel));
    text.addEventListener("click", (event) => { const i = placeOf(event); if (i !== null) moveFocus(panel, i); });
    text.addEventListener("keydown", (event) => {
      const i = panel.current;
      const goals = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: panel.spans.length - 1 };
      if (event.key === "ArrowDown") goals.ArrowDown = segmentStep(panel, i, 1);
      if (event.key === "ArrowUp") goals.ArrowUp = segmentStep(panel, i, -1);
      if (event.key in goals && !event.ctrlKey && !event.metaKey && !event.altKey) { moveFocus(panel, goals[event.key]); event.preventDefault(); }
      if (event.key === "Escape") closeTip(panel);
    });

    panel.chart = element("div", { className: "curve", role: "img", "aria-label": "values along the response" });
    panel.cuts = element("details", { className: "others" }, element("summary", {}, "Where other segmenters cut"));
    panel.cuts.open = cutsOpen;
    panel.cuts.addEventListener("toggle", () => { cutsOpen = panel.cuts.open; drawCuts(panel); });
    panel.list = element("details", { className: "one-by-one" }, element("summary", {}, "Segments, one by one"));
    panel.list.open = segmentsOpen;
    panel.list.addEventListener("toggle", () => { segmentsOpen = panel.list.open; drawSegments(panel); });
    panel.node = element("article", { className: "panel", "aria-label": `response: ${place(index)}` },
      element("header", {}, title, facts, moves), shownPrompt, verdictOf(index), text, panel.status, panel.chart, panel.list, panel.cuts);
    if (!panel.spans.length) text.append(element("span", { className: "quiet" }, "no tokens"));
    return panel;
  }

  /** The images of the prompt, each beside its corrupted one if the run compares images. */
  function picturesOf(index) {
    const originals = prompts[responses.prompt[index]].images, corrupted = responses.corrupted[index];
    const how = meta.settings[responses.run[index]]?.corruption;
    const picture = (image, alt, caption) => element("figure", {}, element("img", { src: images[image], alt }), ...(caption ? [element("figcaption", {}, caption)] : []));
    const shown = [];
    for (let i = 0; i < Math.max(originals.length, corrupted.length); i++) {
      if (i < originals.length) shown.push(picture(originals[i], `image ${i + 1} of the prompt`, corrupted.length ? "as it is" : ""));
      if (i < corrupted.length) shown.push(picture(corrupted[i], `image ${i + 1}, corrupted`, how ? `corrupted: ${how}` : "corrupted"));
    }
    return shown;
  }

  /** The right answer, and the share of each reward function in the reward. */
  function verdictOf(index) {
    const answer = responses.answer[index], parts = responses.rewards[index];
    const box = element("div", { className: "verdict" });
    box.append(element("p", {}, element("span", { className: "quiet" }, "Right answer "), element(answer === null ? "span" : "b", {}, answer ?? "not recorded")));
    if (!parts.length) {
      box.append(element("p", {}, element("span", { className: "quiet" }, "Reward functions "), "not recorded"));
      return box;
    }
    const head = ["reward function", "value", "weight", "share"].map((title) => element("th", { scope: "col" }, title));
    const rows = parts.map(([name, value, weight]) => element("tr", {}, element("th", { scope: "row" }, name),
      element("td", {}, value === null ? "none" : show(value)), element("td", {}, show(weight)), element("td", {}, value === null ? "–" : show(value * weight))));
    const total = element("tr", { className: "total" }, element("th", { scope: "row" }, "reward"), element("td", {}), element("td", {}), element("td", {}, show(rewardOf(index))));
    box.append(element("table", { className: "numbers rewards" }, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows, total)));
    return box;
  }

  let cutsOpen = true;
  function drawCuts(panel) {
    if (!panel.cuts.open || panel.cuts.childElementCount > 1) return;
    const grid = element("div", { className: "cuts" });
    segmenters.forEach((name, bit) => {
      const { ids, count } = segmentsOf(panel.index, bit);
      const text = element("div", { className: "text", tabIndex: 0, role: "region", "aria-label": `cuts: ${name}` });
      // A span per segment, not per token: only segments are visible here.
      let span = null, before = null;
      ids.forEach((id, i) => {
        if (id !== before || span === null) {
          span = element("span", { className: id < 0 ? "token masked" : `token ${id % 2 ? "even" : "odd"}` });
          text.append(span);
          before = id;
        }
        fill(span, vocabulary[token[starts[panel.index] + i]]);
        if (id >= 0 && (marks[starts[panel.index] + i] >> bit) & 1) { span.classList.add("cut"); span = null; }
      });
      grid.append(element("section", {}, element("h3", {}, element("span", {}, name), element("span", { className: "quiet" }, counted(count, "segment"))), text));
    });
    panel.cuts.append(grid);
  }

  function drawPanels() {
    panels.forEach((panel) => Plotly.purge(panel.chart));
    $("tip").hidden = true;
    const indices = kept === null ? (selected < 0 ? [] : [selected]) : [kept, selected];
    panels = indices.map(makePanel);
    $("panels").classList.toggle("two", panels.length > 1);
    $("panels").replaceChildren(...panels.map((panel) => panel.node));
    panels.forEach((panel) => { paint(panel); drawSegments(panel); drawCuts(panel); drawValues(panel); });
  }

  function choose(index, side = kept === null ? 0 : 1) {
    if (kept !== null && side === 0) kept = index;
    else selected = index;
    drawPanels();
    drawRows(true);
  }

  function compare() {
    if (selected < 0) return;
    if (kept !== null) { kept = null; drawPanels(); return; }
    kept = selected;
    // The first response beside it: the same prompt in the other run, at the same step if possible, else at another step.
    const group = byPrompt[responses.prompt[kept]];
    const sameStep = (each) => responses.step[each] === responses.step[kept];
    const rank = (each) => (responses.run[each] !== responses.run[kept] ? 2 + sameStep(each) : 1 - sameStep(each));
    const others = group.filter((each) => each !== kept).sort((a, b) => rank(b) - rank(a));
    if (others.length) selected = others[0];
    drawPanels();
    drawRows(true);
  }

  // --------------------------------------------------------------------------------------------------------- the run

  function makeSetups() {
    const list = (title, settings) => (settings.length ? [element("h3", {}, title), pairs(settings)] : []);
    $("setups").append(...runs.map((run, i) => {
      const settings = meta.settings[i], box = element("section", {});
      if (runs.length > 1) box.append(element("h3", { className: `run run${i}` }, run));
      if (settings === null) { box.append(element("p", { className: "quiet" }, "Algorithm and settings: not recorded.")); return box; }
      const { preset, summary, differences, other_settings: others } = settings;
      box.append(element("p", {}, differences.length ? "Nearest to " : "", element("b", {}, preset), summary ? `: ${summary}` : ""));
      box.append(...list("Different from this algorithm", differences), ...list("Other settings that are not the defaults", others));
      if (!differences.length && !others.length) box.append(element("p", { className: "quiet" }, "All settings are the defaults."));
      return box;
    }));
    const names = meta.settings.map((settings) => (settings === null ? "not recorded" : `${settings.differences.length ? "nearest to " : ""}${settings.preset}`));
    $("setup-names").textContent = names.join(" · ");
  }

  // -------------------------------------------------------------------------------------------------------- the list

  let listed = [];

  function option(value, text) { return element("option", { value: String(value) }, text); }
  function makeFilters() {
    const steps = [...new Set(responses.step)].sort((a, b) => a - b);
    $("filter-run-label").hidden = runs.length < 2;
    $("filter-run").append(option("", "both"), ...runs.map((run, i) => option(i, run)));
    for (const id of ["filter-step-from", "filter-step-to"]) $(id).append(option("", "any"), ...steps.map((step) => option(step, String(step))));
    // Without the marks of chat templates and images, which tell no prompts apart.
    const marks = /<[|｜][^<>]*[|｜]>( ×\d+)?|<\/?(start_of_|end_of_)?image(_soft_token)?>/g;
    const shortened = prompts.map((prompt) => prompt.text.replaceAll(marks, " ").replaceAll(/\s+/g, " ").trim());
    // Skip the common start of all prompts (a system prompt): it distinguishes none of them.
    const shared = commonStart(shortened);
    $("filter-prompt").append(option("", `any of ${prompts.length}`), ...shortened.map((text, i) => option(i, `${i + 1}: ${brief(text.slice(shared))}`)));
    let waiting = null;
    // Not every way to choose an option is an `input` (drivers and assistive technology may only make a `change`).
    for (const kind of ["input", "change"]) {
      $("filters").addEventListener(kind, () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
    }
    $("filters").addEventListener("reset", () => setTimeout(filter));
    $("filters").addEventListener("submit", (event) => event.preventDefault());
  }
  /** Where the texts begin to differ, at the beginning of a word; 0 if they do not. */
  function commonStart(all) {
    let length = all[0]?.length ?? 0;
    for (const text of all) { let i = 0; while (i < length && text[i] === all[0][i]) i++; length = i; }
    return all.every((text) => text.length === length) ? 0 : all[0].lastIndexOf(" ", length - 1) + 1;
  }
  /** At most 70 characters, without a part of a word. Scripts without blanks are cut between characters. */
  function brief(text) {
    const characters = [...text];
    if (characters.length <= 70) return text;
    const end = characters.lastIndexOf(" ", 70);
    return `${characters.slice(0, end > 0 ? end : 70).join("")}…`;
  }

  function filter() {
    const value = (id) => $(id).value;
    const bound = (id, otherwise) => (value(id) === "" ? otherwise : Number(value(id)));
    const wanted = value("filter-text").toLowerCase(), run = bound("filter-run", null), prompt = bound("filter-prompt", null);
    const [stepFrom, stepTo] = [bound("filter-step-from", -Infinity), bound("filter-step-to", Infinity)];
    const [rewardFrom, rewardTo] = [bound("filter-reward-from", -Infinity), bound("filter-reward-to", Infinity)];
    const byReward = rewardFrom !== -Infinity || rewardTo !== Infinity;
    const inPrompt = prompts.map((each) => wanted !== "" && each.text.toLowerCase().includes(wanted));
    listed = [];
    for (let index = 0; index < total; index++) {
      if (run !== null && responses.run[index] !== run) continue;
      if (prompt !== null && responses.prompt[index] !== prompt) continue;
      if (responses.step[index] < stepFrom || responses.step[index] > stepTo) continue;
      const reward = rewardOf(index);
      if (byReward && !(reward >= rewardFrom && reward <= rewardTo)) continue;
      if (wanted !== "" && !inPrompt[responses.prompt[index]] && !responseText(index).toLowerCase().includes(wanted)) continue;
      listed.push(index);
    }
    const reward = (index) => (Number.isNaN(rewardOf(index)) ? -Infinity : rewardOf(index));
    const orders = { high: (a, b) => reward(b) - reward(a), low: (a, b) => reward(a) - reward(b), long: (a, b) => responses.length[b] - responses.length[a] };
    if (value("order") in orders) listed.sort((a, b) => orders[value("order")](a, b) || a - b);
    $("count").textContent = listed.length === total ? counted(total, "response") : `${listed.length.toLocaleString("en")} of ${total.toLocaleString("en")} responses`;
    $("list").scrollTop = 0;
    if (listed.length && !listed.includes(selected)) choose(listed[0]);
    else drawRows(true);
  }

  /** Only the rows in sight exist. */
  function drawRows(follow = false) {
    const list = $("list"), at = listed.indexOf(selected);
    $("rows").style.height = `${listed.length * ROW}px`;
    if (follow && at >= 0) {
      const out = at * ROW < list.scrollTop || (at + 1) * ROW > list.scrollTop + list.clientHeight;
      if (out) list.scrollTop = (at + 0.5) * ROW - list.clientHeight / 2;
    }
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 3);
    const last = Math.min(listed.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 3);
    $("rows").replaceChildren(...listed.slice(first, last).map((index, i) => {
      let start = "";
      for (let token_ = starts[index]; token_ < starts[index + 1] && start.length < 90; token_++) start += vocabulary[token[token_]];
      const facts = element("div", { className: "facts" });
      const step = element("span", {}, `step ${responses.step[index]}`);
      if (runs.length > 1) step.className = `run run${responses.run[index]}`;
      facts.append(step, element("b", {}, `reward ${show(rewardOf(index))}`),
        element("span", {}, `${responses.length[index]} tokens`), element("span", {}, `prompt ${responses.prompt[index] + 1}`));
      const row = element("div", {
        className: "row", id: `response-${index}`, role: "option", "aria-selected": String(index === selected),
        "aria-setsize": String(listed.length), "aria-posinset": String(first + i + 1),
      }, facts, element("div", { className: "start" }, start.trim().replaceAll("\n", " ↵ ")));
      row.style.top = `${(first + i) * ROW}px`;
      row.addEventListener("click", () => choose(index));
      return row;
    }));
    if (at >= first && at < last) list.setAttribute("aria-activedescendant", `response-${selected}`);
    else list.removeAttribute("aria-activedescendant");
  }
  function step(distance) {
    if (!listed.length) return;
    const at = listed.indexOf(selected);
    choose(listed[Math.min(listed.length - 1, Math.max(0, at < 0 ? 0 : at + distance))]);
  }
  function stepInPrompt(distance) {
    const group = byPrompt[responses.prompt[selected]] ?? [];
    const next = group[group.indexOf(selected) + distance];
    if (next !== undefined) choose(next);
  }

  $("list").addEventListener("scroll", () => requestAnimationFrame(() => drawRows()), { passive: true });
  $("list").addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor($("list").clientHeight / ROW) - 1);
    const distances = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key in distances) { step(distances[event.key]); event.preventDefault(); }
    if (event.key === "Enter" && panels.length) moveFocus(panels.at(-1), panels.at(-1).current);
  });
  window.addEventListener("resize", () => drawRows());

  // -------------------------------------------------------------------------------------------------------- the keys

  const keys = {
    j: () => step(1), k: () => step(-1), n: () => stepInPrompt(1), p: () => stepInPrompt(-1), c: compare,
    t: () => panels.length && moveFocus(panels.at(-1), panels.at(-1).current),
    b: () => panels.length && toExtreme(panels.at(-1), 1), w: () => panels.length && toExtreme(panels.at(-1), -1),
    "/": () => $("filter-text").focus(), "?": () => $("help").showModal(),
  };
  modes.forEach((each, i) => { keys[KEYS[i]] = () => setMode(each); });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, dialog");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
  $("help-open").addEventListener("click", () => $("help").showModal());

  dark.addEventListener("change", () => {
    charts.filter((chart) => chart.node).forEach(drawCurve);
    setMode(mode);
    panels.forEach(drawValues);
  });

  // ------------------------------------------------------------------------------------------------------- beginning

  $("summary").textContent = [counted(total, "response"), counted(starts[total], "token"), counted(prompts.length, "prompt")].join(" · ");
  makeSetups();
  makeFilters();
  makeCurves();
  setMode(mode);
  filter();
  // For measurements: milliseconds from the start of loading until everything is there.
  requestAnimationFrame(() => { document.documentElement.dataset.ready = String(Math.round(performance.now())); });
})();
