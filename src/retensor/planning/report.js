// The page around the picture: decodes the plan, fills in facts, tables and tooltips, keeps theme and address.
// Everything a model brings reaches the page through textContent or on the canvas, never as markup.

const root = document.documentElement;
window.addEventListener("error", (event) => { root.dataset.status = `error: ${event.message}`; });
window.addEventListener("securitypolicyviolation", (event) => { root.dataset.status = `error: blocked ${event.violatedDirective}`; });

// Half a surrogate pair is a name Python allows and no page can show or address.
const wellFormed = (key, value) => (typeof value === "string" && value.toWellFormed ? value.toWellFormed() : value);
const data = JSON.parse(document.getElementById("plan").textContent, wellFormed);
const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const bytes = (value) => `${number(value)} B`;
const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
const percent = (value) => `${Number((value * 100).toFixed(1))} %`;
const seconds = (value) => (value === null ? "" : value < 0.001 ? "under 1 ms" : value < 1 ? `${Math.round(value * 1000)} ms` : value < 120 ? `${Number(value.toFixed(value < 10 ? 2 : 1))} s` : `${Number((value / 60).toFixed(1))} min`);

function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
function glyphIcon(kind) {
  const ns = "http://www.w3.org/2000/svg", up = kind === RETRIEVE || kind === LOAD;
  const svg = document.createElementNS(ns, "svg"), path = document.createElementNS(ns, "path");
  svg.setAttribute("viewBox", "0 0 12 12"); svg.setAttribute("class", "glyph"); svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", up ? "M6 1.5 10.8 10.5H1.2z" : "M6 10.5 1.2 1.5H10.8z");
  path.setAttribute("stroke-width", "1.3");
  const colour = `var(--${["spill", "retrieve", "plain", "plain"][kind]})`;
  path.style.stroke = colour; path.style.fill = kind < LOAD ? colour : "none";
  svg.append(path);
  return svg;
}

// ---- the plan, decoded ------------------------------------------------------------------------------------

const model = (() => {
  const tensors = data.tensors.map(([name, nbytes, role, shade, shape, dtype]) => ({ name, nbytes, role, shade, shape, dtype, residencies: [], moves: [], producer: null, readers: [] }));
  const operators = data.operators.map(([name, kind, inputs, outputs], step) => {
    for (const t of inputs) tensors[t].readers.push(step);
    for (const t of outputs) tensors[t].producer = step;
    return { name, kind: data.kinds[kind], inputs, outputs, step, tensors: [...new Set([...inputs, ...outputs])] };
  });
  const byKind = data.kindsOfTransfer.map(() => []), moves = [], opening = new Map(), closing = new Map();
  for (let i = 0; i < data.transfers.length; i += 4) {
    const [tensor, kind, step, nbytes] = data.transfers.slice(i, i + 4);
    const move = { tensor, kind, step, nbytes };
    moves.push(move); byKind[kind].push(move); tensors[tensor].moves.push(move);
    (kind === RETRIEVE || kind === LOAD ? opening : closing).set(`${tensor} ${step}`, kind);
  }
  for (const list of byKind) list.sort((a, b) => a.step - b.step);
  const residencies = [], resident = new Float64Array(operators.length + 1);
  let usedTop = 0;
  for (let i = 0; i < data.residencies.length; i += 4) {
    const [tensor, start, end, address] = data.residencies.slice(i, i + 4), top = address + tensors[tensor].nbytes;
    residencies.push({ tensor, start, end, address, top, opens: opening.get(`${tensor} ${start}`) ?? null, closes: closing.get(`${tensor} ${end}`) ?? null });
    resident[start] += tensors[tensor].nbytes; resident[Math.min(end, operators.length)] -= tensors[tensor].nbytes;
    usedTop = Math.max(usedTop, top);
  }
  residencies.sort((a, b) => a.start - b.start || a.address - b.address);
  residencies.forEach((r, index) => { r.index = index; tensors[r.tensor].residencies.push(r); });
  for (let i = 1; i < resident.length; i++) resident[i] += resident[i - 1];
  const needed = operators.map((op, i) => Math.min(resident[i], op.tensors.reduce((sum, t) => sum + tensors[t].nbytes, 0)));
  const peak = operators.reduce((most, _, i) => Math.max(most, resident[i]), 0);
  const fillTop = peak * 2 < data.scratchpad ? peak : Math.max(peak, data.scratchpad);
  return { tensors, operators, residencies, byKind, moves, resident, needed, usedTop, peak, fillTop, scratchpad: data.scratchpad, kinds: data.kindsOfTransfer };
})();
const stepName = (step) => (step < model.operators.length ? model.operators[step].name : "the end");
const tensorByName = new Map(model.tensors.map((t, i) => [t.name, i]));
const operatorByName = new Map(model.operators.map((op, i) => [op.name, i]));
const range = (r) => (r.end - r.start === 1 ? `step ${number(r.start)}` : `steps ${number(r.start)} to ${number(r.end - 1)}`);
const place = (r) => `${number(r.address)} to ${number(r.top)}`;
const shapeOf = (t) => [t.shape ? t.shape.join(" × ") || "scalar" : "", t.dtype ?? ""].filter(Boolean).join(" · ");
const roleName = (t) => (data.roles[t.role] === "output" ? "network output" : data.roles[t.role] === "input" ? "network input" : data.roles[t.role]);

// ---- facts ------------------------------------------------------------------------------------------------

function fillFacts() {
  $("network").textContent = data.name;
  const what = data.parameters ? "activations and parameters in the scratchpad" : "activations in the scratchpad, parameters streamed";
  $("subtitle").textContent = `${[plural(data.operatorsTotal, "operator"), ...["input", "activation", "parameter"].map((role) => plural(data.counts[role], role))].join(", ")}; ${what}; ${data.fixedOrder ? "order given" : "order chosen by the planner"}`;
  const fact = (key, value, more, extra = "") => $("facts").append(el("div", { class: `fact ${extra}` }, el("div", { class: "key" }, key), el("div", { class: "value" }, value), more === "" ? null : el("div", { class: "more" }, more)));
  const pill = el("span", { class: `pill ${data.status === "optimal" ? "good" : ""}` }, data.sentence);
  fact("Non-compulsory traffic", formatBytes(data.nonCompulsory), pill, "hero");
  fact("Lower bound", formatBytes(data.bound), data.status === "optimal" ? "met by this plan" : `${formatBytes(data.nonCompulsory - data.bound)} below this plan`);
  fact("Compulsory traffic", formatBytes(data.compulsory), "first loads, stores");
  const b = data.bounds, aligned = data.alignment > 1 ? `aligned to ${data.alignment} B` : "";
  fact("Scratchpad", formatBytes(data.scratchpad), b && b.r ? `${Number((data.scratchpad / b.r).toFixed(2))} × M_R${b.parameters ? "p" : ""}` : aligned || bytes(data.scratchpad));
  fact("Peak occupancy", formatBytes(model.peak), `${percent(model.peak / data.scratchpad)} of the scratchpad`);
  fact("Solved in", seconds(data.seconds) || "not recorded", data.solver);
  const notes = [], p = b?.parameters ? "p" : "";
  const note = (name, ...rest) => notes.push(el("li", {}, el("b", {}, name), ...rest));
  if (b) {
    note(`M_R${p} `, `${formatBytes(b.r)} (least for any plan; ${b.rOperator})`);
    note(`M_H${p} `, formatBytes(b.h));
    note(`M_P${p} `, `${formatBytes(b.p)} (no traffic from here${b.pBound < b.p ? `; proved at least ${formatBytes(b.pBound)}` : ""})`);
  }
  const at = model.resident.indexOf(model.peak);
  if (at >= 0 && model.operators[at]) note("Fullest ", `at step ${number(at)}, ${model.operators[at].name}`);
  const full = model.operators.filter((_, i) => model.resident[i] >= 0.95 * data.scratchpad).length;
  note(plural(full, "step"), ` with at least 95 % of the scratchpad taken`);
  const waste = model.usedTop - model.peak;
  note("Highest address ", `${formatBytes(model.usedTop)}${waste > 0 ? `, ${formatBytes(waste)} above the peak of bytes resident` : ""}`);
  const away = new Set([...model.byKind[SPILL], ...model.byKind[RETRIEVE]].map((m) => m.tensor)).size;
  note(plural(away, "tensor"), " moved out or in again");
  if (aligned && b) note("Addresses ", aligned);
  $("notes").append(...notes);
}

// ---- legend, tooltip, details -----------------------------------------------------------------------------

let dark = false, selected = null;
function fillLegend(night) {
  const fills = data.fills[night ? "dark" : "light"], present = [...new Set(model.residencies.map((r) => model.tensors[r.tensor].role))].sort();
  const items = present.map((role) => { const i = el("i"); i.style.background = `linear-gradient(90deg, ${fills[role][0]} 50%, ${fills[role][1]} 50%)`; return el("span", {}, i, roleName({ role })); });
  model.kinds.forEach((name, kind) => items.push(el("span", {}, glyphIcon(kind), `${name} (${number(model.byKind[kind].length)})`)));
  const dash = el("i"); dash.style.cssText = "height:0;border-radius:0;border-top:2px dashed var(--ink);width:16px";
  items.push(el("span", {}, dash, "scratchpad"));
  $("legend").replaceChildren(...items);
}
const names = (list, most = 3) => list.slice(0, most).map(stepName).join(", ") + (list.length > most ? ` and ${list.length - most} more` : "");

function tipContent(target) {
  const row = (key, value) => (value === "" || value === null ? null : el("div", {}, el("span", {}, key), el("span", {}, value)));
  if (target.move) {
    const m = target.move, t = model.tensors[m.tensor];
    const others = model.byKind[m.kind].filter((o) => o.step === m.step && o !== m);
    return [el("h3", {}, t.name), row(model.kinds[m.kind], bytes(m.nbytes)), row("before", m.step < model.operators.length ? `step ${number(m.step)}, ${stepName(m.step)}` : "the end"), row("", others.length ? `and ${others.length} more of this kind here` : "")];
  }
  if (target.operator !== undefined) {
    const op = model.operators[target.operator], sum = (list) => list.reduce((s, t) => s + model.tensors[t].nbytes, 0);
    return [el("h3", {}, op.name), row("step", `${number(op.step)} · ${op.kind}`), row("reads", `${plural(op.inputs.length, "tensor")}, ${formatBytes(sum(op.inputs))}`), row("writes", `${plural(op.outputs.length, "tensor")}, ${formatBytes(sum(op.outputs))}`), row("resident", `${formatBytes(model.resident[op.step])}, ${percent(model.resident[op.step] / data.scratchpad)}`)];
  }
  if (target.residency) {
    const r = target.residency, t = model.tensors[r.tensor];
    const ends = [r.opens !== null ? `${model.kinds[r.opens]} at its start` : "", r.closes !== null ? `${model.kinds[r.closes]} at its end` : ""].filter(Boolean).join(", ");
    return [el("h3", {}, t.name), row("what", [roleName(t), shapeOf(t)].filter(Boolean).join(" · ")), row("bytes", number(t.nbytes)), row("address", place(r)), row("here", range(r) + (t.residencies.length > 1 ? `, stay ${t.residencies.indexOf(r) + 1} of ${t.residencies.length}` : "")), row("moved", ends), row("made by", t.producer === null ? "" : stepName(t.producer)), row("read by", names(t.readers))];
  }
  return null;
}
function hover(target, x, y, spoken = false) {
  const tip = $("tip"), content = target ? tipContent(target) : null;
  if (!content) { tip.hidden = true; return; }
  tip.replaceChildren(...content.filter(Boolean));
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), gap = 14;
  const left = x + gap + box.width > innerWidth - 8 ? x - gap - box.width : x + gap;
  const top = y + gap + box.height > innerHeight - 8 ? y - gap - box.height : y + gap;
  tip.style.transform = `translate(${Math.max(8, Math.min(left, innerWidth - box.width - 8))}px, ${Math.max(8, top)}px)`;
  if (spoken) $("live").textContent = [...tip.children].map((row) => [...row.childNodes].map((part) => part.textContent).join(" ")).join("; ");
}

function showDetails(tensor, operator) {
  const box = $("details");
  const row = (key, value) => (value === "" ? null : el("div", { class: "row" }, el("span", { class: "muted" }, key), el("span", {}, value)));
  const list = (title, items) => (items.length ? [el("h4", {}, title), el("ul", {}, ...items.map((item) => el("li", {}, item)))] : []);
  const toStep = (step, text) => el("button", { type: "button", class: "link", onclick: () => select(null, step, true) }, text);
  const toTensor = (t) => el("button", { type: "button", class: "link mono", onclick: () => select(t, null, true) }, model.tensors[t].name);
  box.classList.toggle("none", tensor === null && operator === null);
  box.scrollTop = 0;
  if (tensor !== null) {
    const t = model.tensors[tensor];
    box.replaceChildren(...[el("h3", {}, t.name), row("role", roleName(t)), row("shape", t.shape ? t.shape.join(" × ") || "scalar" : ""), row("type", t.dtype ?? ""), row("bytes", number(t.nbytes)),
      row("moved", (() => { const sum = t.moves.filter((m) => m.kind < LOAD).reduce((s, m) => s + m.nbytes, 0); return sum ? `${formatBytes(sum)} not compulsory` : ""; })()),
      ...list(t.residencies.length === 1 ? "Stay" : "Stays", t.residencies.map((r) => toStep(r.start, `${range(r)} at ${place(r)}`))),
      ...list("Transfers", t.moves.map((m) => toStep(Math.min(m.step, model.operators.length - 1), `${model.kinds[m.kind]} ${m.step < model.operators.length ? `before step ${number(m.step)}` : "at the end"}`))),
      ...list("Made by", t.producer === null ? [] : [toStep(t.producer, stepName(t.producer))]),
      ...list("Read by", t.readers.map((i) => toStep(i, stepName(i)))),
      el("div", { class: "act" }, t.residencies.length ? el("button", { type: "button", onclick: () => chart.show(t.residencies[0].start, t.residencies.at(-1).end, t.residencies[0].address, t.residencies[0].top) }, "Zoom to it") : null, el("button", { type: "button", onclick: () => select(null, null) }, "Clear"))].filter(Boolean));
  } else if (operator !== null) {
    const op = model.operators[operator];
    const line = (t) => el("span", {}, toTensor(t), ` ${formatBytes(model.tensors[t].nbytes)}`);
    box.replaceChildren(...[el("h3", {}, op.name), row("kind", op.kind), row("step", `${number(op.step)} of 0 to ${number(model.operators.length - 1)}`), row("resident", `${formatBytes(model.resident[op.step])}, ${percent(model.resident[op.step] / data.scratchpad)}`),
      ...list("Reads", op.inputs.map(line)), ...list("Writes", op.outputs.map(line)),
      el("div", { class: "act" }, el("button", { type: "button", onclick: () => select(null, null) }, "Clear"))].filter(Boolean));
  } else box.replaceChildren(el("p", { class: "muted" }, "Choose a rectangle, a transfer or an operator to see where it lives, what moved it and who uses it."));
}

function select(tensor, operator, reveal = false) {
  selected = tensor;
  chart.select(tensor);
  showDetails(tensor, operator);
  if (operator !== null) {
    chart.point({ operator, step: operator, tensors: new Set(model.operators[operator].tensors) });
    if (reveal) chart.reveal(operator, operator + 1);
  } else if (tensor !== null && reveal && model.tensors[tensor].residencies.length) {
    const stays = model.tensors[tensor].residencies;
    chart.reveal(stays[0].start, stays.at(-1).end);
  }
  keepAddress(tensor === null ? (operator === null ? "" : `operator=${encodeName(model.operators[operator].name)}`) : `tensor=${encodeName(model.tensors[tensor].name)}`);
}
// Where a browser kept half a surrogate pair it cannot be percent-encoded; such a name gets no address.
function encodeName(name) { try { return encodeURIComponent(name); } catch { return ""; } }

// ---- tables -----------------------------------------------------------------------------------------------

// A table whose columns sort; `rows` holds [cells, sort keys, searchable text].
function table(columns, rows, { sorted = 0, down = false } = {}) {
  const body = el("tbody"), heads = columns.map((column, i) => el("th", { class: column.class ?? "", scope: "col" }, el("button", { type: "button", onclick: () => sort(i) }, column.title)));
  const made = rows.map((row) => ({ ...row, node: null }));
  const node = (row) => (row.node ??= el("tr", {}, ...row.cells().map((cell, i) => el("td", { class: columns[i].class ?? "" }, cell))));
  let order = made, current = [sorted, down], wanted = "", all = false;
  const paint = () => {
    const kept = order.filter((row) => row.text.includes(wanted));
    const shown = all ? kept : kept.slice(0, 250);
    body.replaceChildren(...shown.map(node));
    if (shown.length < kept.length) body.append(el("tr", {}, el("td", { colspan: columns.length }, el("button", { type: "button", onclick: () => { all = true; paint(); } }, `Show all ${number(kept.length)} rows`))));
    if (!kept.length) body.append(el("tr", {}, el("td", { colspan: columns.length, class: "muted" }, "Nothing matches the filter.")));
    return kept.length;
  };
  const sort = (i, given) => {
    current = [i, given ?? (current[0] === i ? !current[1] : Boolean(columns[i].down))];
    order = [...made].sort((a, b) => { const [p, q] = [a.keys[i], b.keys[i]]; return (p < q ? -1 : p > q ? 1 : 0) * (current[1] ? -1 : 1); });
    heads.forEach((head, j) => head.setAttribute("aria-sort", j === i ? (current[1] ? "descending" : "ascending") : "none"));
    paint();
  };
  sort(sorted, down);
  const whole = el("div", { class: "scroll", tabindex: "0" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body));
  return { node: whole, filter(text) { wanted = text; return paint(); }, all() { all = true; paint(); } };
}
const columns = [{ title: "Kind", class: "kind" }, { title: "Tensor", class: "name" }, { title: "Bytes", class: "number", down: true }, { title: "Step", class: "number" }, { title: "Before operator", class: "name" }];
const transferRow = (m) => {
  const t = model.tensors[m.tensor], op = model.operators[m.step], before = op ? `${op.name} (${op.kind})` : "the end";
  return {
    keys: [m.kind, t.name, m.nbytes, m.step, before], text: `${t.name} ${before} ${model.kinds[m.kind]}`.toLowerCase(),
    cells: () => [el("span", {}, glyphIcon(m.kind), model.kinds[m.kind]), el("button", { type: "button", class: "link", onclick: () => { select(m.tensor, null, true); $("picture").scrollIntoView({ block: "start" }); } }, t.name), number(m.nbytes), op ? number(m.step) : "end", before],
  };
};
const tables = {};
function fillTransfers() {
  const free = model.moves.filter((m) => m.kind < LOAD), must = model.moves.filter((m) => m.kind >= LOAD);
  $("transfers-title").textContent = `${plural(free.length, "non-compulsory transfer")}, ${formatBytes(data.nonCompulsory)}`;
  if (free.length) { tables.free = table(columns, free.map(transferRow), { sorted: 3 }); $("moving").append(tables.free.node); }
  else $("moving").append(el("p", { class: "empty" }, "Nothing is spilled or retrieved: every tensor stays from its first use to its last."));
  const summary = $("compulsory").querySelector("summary"), title = `${plural(must.length, "compulsory transfer")}, ${formatBytes(data.compulsory)}: first loads of inputs and parameters, stores of outputs`;
  summary.textContent = title;
  $("compulsory").addEventListener("toggle", () => {
    if (!$("compulsory").open || tables.must) return;
    tables.must = table(columns, must.map(transferRow), { sorted: 3 });
    tables.must.filter($("filter").value.trim().toLowerCase());
    $("compulsory").lastElementChild.append(tables.must.node);
  });
  if (!must.length) $("compulsory").hidden = true;
  $("filter").addEventListener("input", () => { const text = $("filter").value.trim().toLowerCase(); tables.free?.filter(text); tables.must?.filter(text); });
}
function fillOperators() {
  const counts = new Map();
  for (const op of model.operators) counts.set(op.kind, (counts.get(op.kind) ?? 0) + 1);
  const common = [...counts].sort((a, b) => b[1] - a[1]);
  $("kinds").textContent = common.slice(0, 6).map(([kind, count]) => `${number(count)} ${kind}`).join(", ") + (common.length > 6 ? ` and ${plural(common.length - 6, "other kind")}` : "");
  $("operators").addEventListener("toggle", () => {
    const box = $("operators").lastElementChild;
    if (!$("operators").open || box.childNodes.length) return;
    const sum = (list) => list.reduce((s, t) => s + model.tensors[t].nbytes, 0);
    const before = new Float64Array(model.operators.length + 1);
    for (const m of model.moves) if (m.kind < LOAD) before[m.step] += m.nbytes;
    const rows = model.operators.map((op) => {
      const values = [op.step, op.name, op.kind, sum(op.inputs), sum(op.outputs), model.resident[op.step], before[op.step]];
      return { keys: values, text: "", cells: () => values.map((v, i) => (i === 1 ? el("button", { type: "button", class: "link", onclick: () => { select(null, op.step, true); $("picture").scrollIntoView({ block: "start" }); } }, v) : typeof v === "number" ? number(v) : v)) };
    });
    box.append(table([{ title: "Step", class: "number" }, { title: "Operator", class: "name" }, { title: "Kind" }, { title: "Bytes read", class: "number", down: true }, { title: "Bytes written", class: "number", down: true }, { title: "Resident", class: "number", down: true }, { title: "Moved before", class: "number", down: true }], rows).node);
  });
}
function fillCompare() {
  if (!data.baselines.length) return;
  $("compare").hidden = false;
  const ours = { label: "COSMA (this plan)", nonCompulsory: data.nonCompulsory, compulsory: data.compulsory, transfers: model.byKind[SPILL].length + model.byKind[RETRIEVE].length, seconds: data.seconds, scratchpad: data.scratchpad };
  const most = Math.max(1, ours.nonCompulsory, ...data.baselines.map((b) => b.nonCompulsory));
  const rows = [ours, ...data.baselines].map((b) => {
    const bar = el("i"); bar.style.width = `${(b.nonCompulsory / most) * 100}%`; if (!b.nonCompulsory) bar.style.minWidth = "0";
    const saved = b.nonCompulsory ? 1 - ours.nonCompulsory / b.nonCompulsory : null;
    const reduction = b === ours ? "" : saved === null ? (ours.nonCompulsory ? el("span", { class: "worse" }, "baseline has none") : "both none") : saved === 0 ? "equal" : el("span", { class: saved > 0 ? "better" : "worse" }, saved > 0 ? percent(saved) : `${percent(-saved)} more`);
    const label = b.scratchpad === data.scratchpad ? b.label : `${b.label} (${formatBytes(b.scratchpad)} scratchpad)`;
    return el("tr", { class: b === ours ? "ours" : "" }, el("td", {}, label), el("td", {}, el("div", { class: "track" }, bar)), el("td", { class: "number" }, formatBytes(b.nonCompulsory)), el("td", { class: "number" }, reduction), el("td", { class: "number" }, number(b.transfers)), el("td", { class: "number" }, seconds(b.seconds)));
  });
  const heads = [["Plan", ""], ["", ""], ["Bytes", "number"], ["Removed by COSMA", "number"], ["Transfers", "number"], ["Time", "number"]];
  $("bars").append(el("table", {}, el("thead", {}, el("tr", {}, ...heads.map(([text, kind]) => el("th", { class: kind, scope: "col" }, text)))), el("tbody", {}, ...rows)));
}

// ---- theme, address, start --------------------------------------------------------------------------------

function paint(printing = false) {
  root.dataset.theme = dark && !printing ? "dark" : "light";
  const style = getComputedStyle(root), get = (name) => style.getPropertyValue(`--${name}`).trim(), night = dark && !printing;
  chart.theme({ card: get("card"), ink: get("ink"), muted: get("muted"), line: get("line"), accent: get("accent"), label: night ? "#f4f7fb" : "#10151d", held: night ? "#2f4a70" : "#b9cbe4", operands: get("ours"), kinds: [get("spill"), get("retrieve"), get("plain"), get("plain")] }, data.fills[night ? "dark" : "light"]);
  $("theme").textContent = dark ? "Light" : "Dark";
  $("theme").setAttribute("aria-pressed", String(dark));
  fillLegend(night);
}
let chosenTheme = "";
function keepAddress(part) {
  const hash = [chosenTheme, part].filter(Boolean).join("&");
  // Some browsers refuse this on pages from disk; the report works without it.
  try { history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search); } catch { /* no address then */ }
}
function readAddress() {
  let tensor = null, operator = null, span = null;
  for (const part of location.hash.slice(1).split("&")) {
    const cut = part.indexOf("="), key = cut < 0 ? part : part.slice(0, cut);
    let value = cut < 0 ? "" : part.slice(cut + 1);
    try { value = decodeURIComponent(value); } catch { continue; }
    if (key === "dark" || key === "light") { chosenTheme = key; dark = key === "dark"; }
    if (key === "tensor") tensor = tensorByName.get(value) ?? null;
    if (key === "operator") operator = operatorByName.get(value) ?? null;
    const found = key === "steps" && /^(\d{1,9})-(\d{1,9})$/.exec(value);
    if (found) span = [Number(found[1]), Number(found[2]) + 1];
  }
  return { tensor, operator, span };
}
function follow({ tensor, operator, span }) {
  if (span) chart.set(span[0], span[1]);
  if (tensor === null && operator === null) return;
  select(tensor, tensor === null ? operator : null, !span);
  requestAnimationFrame(() => {
    const stay = tensor === null ? null : model.tensors[tensor].residencies[0], step = stay ? stay.start : operator;
    if (tensor !== null && !stay) return;
    const target = stay ? { residency: stay, tensor, step } : { operator, step, tensors: new Set(model.operators[operator].tensors) };
    chart.point(target);
    hover(target, ...chart.where(stay ? Math.min(stay.end, stay.start + 1) : step + 1, stay ? stay.top : 0), true);
  });
}

const preferred = window.matchMedia("(prefers-color-scheme: dark)");
dark = preferred.matches;
const asked = readAddress();
const chart = makeChart($("canvas"), model, {
  hover,
  select: (tensor, operator) => select(tensor !== null && tensor === selected ? null : tensor, tensor === null ? operator : null),
  hint() { $("hint").classList.add("on"); clearTimeout(hintTimer); hintTimer = setTimeout(() => $("hint").classList.remove("on"), 1600); },
});
let hintTimer = 0;
$("canvas").setAttribute("aria-label", `Scratchpad of ${formatBytes(data.scratchpad)} over ${plural(model.operators.length, "step")}: ${plural(model.residencies.length, "residency").replace("residencys", "residencies")}. Use the arrow keys to walk over them.`);
$("keys").textContent = "Drag to pan; wheel zooms steps, Shift and wheel zooms bytes. Arrow keys walk over tensors, Enter selects, + and − zoom, 0 resets, Esc clears.";
fillFacts(); fillTransfers(); fillOperators(); fillCompare();
showDetails(null, null);
paint();
chart.resize();
$("foot").textContent = `Written by retensor for the graph with SHA-256 ${data.digest.slice(0, 16)}…. A spill writes a tensor off the chip, a retrieve reads it back; both are non-compulsory. First loads and stores of outputs happen in every plan and are counted apart. Addresses are in bytes; a tensor keeps its address while it stays. Steps count from 0, as in the plan file.`;
$("theme").addEventListener("click", () => { dark = !dark; chosenTheme = dark ? "dark" : "light"; paint(); keepAddress(selected === null ? "" : `tensor=${encodeName(model.tensors[selected].name)}`); });
preferred.addEventListener("change", () => { if (!chosenTheme) { dark = preferred.matches; paint(); } });
$("in-x").addEventListener("click", () => chart.zoom("x", 0.5)); $("out-x").addEventListener("click", () => chart.zoom("x", 2));
$("in-y").addEventListener("click", () => chart.zoom("y", 0.5)); $("out-y").addEventListener("click", () => chart.zoom("y", 2));
$("reset").addEventListener("click", () => { chart.reset(); });
$("names").append(...model.operators.map((op) => el("option", { value: op.name })), ...model.tensors.map((t) => el("option", { value: t.name })));
$("find").addEventListener("change", () => {
  const wanted = $("find").value.trim(), low = wanted.toLowerCase();
  if (!wanted) return;
  const partOf = (list) => { const i = list.findIndex((item) => item.name.toLowerCase().includes(low)); return i < 0 ? null : i; };
  const operator = operatorByName.get(wanted) ?? null, tensor = tensorByName.get(wanted) ?? (operator === null ? partOf(model.tensors) : null);
  const other = operator ?? (tensor === null ? partOf(model.operators) : null);
  $("find").setCustomValidity(tensor === null && other === null ? "No tensor or operator has this in its name." : "");
  if (!$("find").reportValidity()) return;
  select(tensor, tensor === null ? other : null, true);
});
$("find").addEventListener("input", () => $("find").setCustomValidity(""));
window.addEventListener("hashchange", () => { const next = readAddress(); paint(); follow(next); });
window.addEventListener("scroll", () => { $("tip").hidden = true; }, { passive: true });
window.addEventListener("beforeprint", () => { paint(true); tables.free?.all(); tables.must?.all(); chart.draw(); });
window.addEventListener("afterprint", () => { paint(); chart.resize(); });
follow(asked);
root.dataset.status ??= "ready";
