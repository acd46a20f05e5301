// The picture: the scratchpad as address by step, transfers, occupancy and an overview, on one canvas that
// zooms and pans. It knows nothing of the page around it: `on.hover`, `on.select` and `on.hint` tell it.

const SPILL = 0, RETRIEVE = 1, LOAD = 2, STORE = 3;
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

function formatBytes(count) {
  let value = count, unit = "B";
  for (unit of ["B", "KiB", "MiB", "GiB"]) { if (Math.abs(value) < 1024 || unit === "GiB") break; value /= 1024; }
  return `${unit === "B" ? value : Number(value.toPrecision(4))} ${unit}`;
}

// Names of one network share their beginnings: the end tells them apart.
const fit = (text, room) => (text.length <= room ? text : room < 7 ? "" : `…${text.slice(text.length - room + 1)}`);

function makeChart(canvas, model, on) {
  const ctx = canvas.getContext("2d");
  const steps = model.operators.length;
  const longest = model.operators.reduce((most, op) => Math.max(most, op.name.length), 0);
  const home = { x0: 0, x1: steps, y0: 0, y1: model.usedTop * 2 < model.scratchpad ? model.usedTop * 1.2 : model.scratchpad };
  const limit = Math.max(model.scratchpad, model.usedTop, 1);
  home.y1 = Math.max(home.y1, model.usedTop, 1);
  const view = { ...home };
  let W = 0, H = 0, at = {}, ink = {}, fills = [], overview = null, queued = false, moving = 0;
  let selected = null, hovered = null;

  const MONO = 'ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace';
  const SANS = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", "DejaVu Sans", sans-serif';
  const font = (size, family = SANS, weight = "") => `${weight} ${size}px ${family}`;
  ctx.font = font(11, MONO);
  const letter = ctx.measureText("0000000000").width / 10;

  const X = (step) => at.left + ((step - view.x0) / (view.x1 - view.x0)) * at.width;
  const Y = (byte) => at.map.y + at.map.h - ((byte - view.y0) / (view.y1 - view.y0)) * at.map.h;
  const stepAt = (x) => view.x0 + ((x - at.left) / at.width) * (view.x1 - view.x0);
  const byteAt = (y) => view.y0 + ((at.map.y + at.map.h - y) / at.map.h) * (view.y1 - view.y0);
  const stepWidth = () => at.width / (view.x1 - view.x0);

  // ---- layout -------------------------------------------------------------------------------------------

  function layout() {
    const small = W < 560;
    at.left = small ? 58 : 74;
    at.width = Math.max(W - at.left - 18, 40);
    at.small = small;
    const each = stepWidth(), shown = Math.min(longest, 26) * letter;
    at.upright = shown + 10 < each;
    // The lane grows smoothly before the names fade into it, so nothing jumps while zooming.
    at.grown = clamp((each - 12) / 0.8, 0, 1);
    at.fade = clamp((each - 12.8) / 0.6, 0, 1);
    const names = at.upright ? 18 : Math.min(shown * 0.62 + 14, 122);
    const lanes = { axis: 20 + names * at.grown, moves: 4 * 15 + 34, fill: small ? 92 : 120, mini: 40 };
    let y = H - 12 - lanes.mini;
    at.mini = { y, h: lanes.mini };
    y -= lanes.fill + 18; at.fill = { y, h: lanes.fill };
    y -= lanes.moves + 8; at.moves = { y: y + 18, h: 60 };
    y -= lanes.axis; at.axis = { y, h: lanes.axis };
    at.map = { y: 30, h: Math.max(y - 30, 60) };
  }

  function resize() {
    const box = canvas.getBoundingClientRect();
    if (!box.width) return;
    const ratio = Math.min(window.devicePixelRatio || 1, 3);
    W = box.width; H = box.height;
    canvas.width = Math.round(W * ratio); canvas.height = Math.round(H * ratio);
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    overview = null;
    draw();
  }

  function theme(colours, shades) { ink = colours; fills = shades; overview = null; request(); }
  function request() { if (!queued) { queued = true; requestAnimationFrame(() => { queued = false; draw(); }); } }

  // ---- drawing ------------------------------------------------------------------------------------------

  function clipped(lane, body, pad = 0) {
    ctx.save(); ctx.beginPath(); ctx.rect(at.left - pad, lane.y - pad, at.width + 2 * pad, lane.h + 2 * pad); ctx.clip();
    body(); ctx.restore();
  }
  function write(text, x, y, { size = 11, colour = ink.muted, align = "left", base = "middle", family = SANS, weight = "" } = {}) {
    ctx.font = font(size, family, weight); ctx.fillStyle = colour; ctx.textAlign = align; ctx.textBaseline = base;
    ctx.fillText(text, x, y);
  }
  function line(x0, y0, x1, y1, colour, width = 1, dash = []) {
    ctx.strokeStyle = colour; ctx.lineWidth = width; ctx.setLineDash(dash);
    ctx.beginPath(); ctx.moveTo(x0, y0); ctx.lineTo(x1, y1); ctx.stroke(); ctx.setLineDash([]);
  }
  function glyph(kind, x, y, r, wide = r) {
    const up = kind === RETRIEVE || kind === LOAD ? -1 : 1, colour = ink.kinds[kind];
    ctx.beginPath(); ctx.moveTo(x - wide, y - up * r * 0.8); ctx.lineTo(x + wide, y - up * r * 0.8); ctx.lineTo(x, y + up * r * 0.95); ctx.closePath();
    ctx.fillStyle = kind < LOAD ? colour : ink.card; ctx.fill();
    ctx.strokeStyle = colour; ctx.lineWidth = 1.2; ctx.stroke();
  }
  const byteTicks = (span, pixels, apart) => 2 ** Math.max(0, Math.ceil(Math.log2((span * apart) / pixels)));
  function stepTicks() {
    for (let unit = 1; ; unit *= 10) for (const part of [1, 2, 5]) if (part * unit * stepWidth() >= 46) return part * unit;
  }
  const related = (t) => selected === null ? null : t === selected;

  function draw() {
    if (!W || !ink.card) return;
    layout();
    ctx.fillStyle = ink.card; ctx.fillRect(0, 0, W, H);
    drawGrid(); drawMap(); drawAxis(); drawMoves(); drawFill(); drawMini(); drawCross();
  }

  function drawGrid() {
    const tick = byteTicks(view.y1 - view.y0, at.map.h, 40);
    for (let byte = Math.ceil(view.y0 / tick) * tick; byte <= view.y1; byte += tick) {
      const y = Math.round(Y(byte)) + 0.5;
      line(at.left, y, at.left + at.width, y, ink.line);
      write(formatBytes(byte), at.left - 8, y, { align: "right", size: at.small ? 10 : 11 });
    }
    write("address", at.left, 15, { weight: "600", colour: ink.ink, size: 12 });
    const from = Math.max(0, Math.floor(view.x0)), to = Math.min(steps, Math.ceil(view.x1)) - 1;
    const note = `steps ${from.toLocaleString("en")} to ${to.toLocaleString("en")} of ${steps.toLocaleString("en")}`;
    const over = model.scratchpad > view.y1 * 1.0001 ? `scratchpad ends above, at ${formatBytes(model.scratchpad)}` : "";
    write(over && !at.small ? `${over}  ·  ${note}` : note, at.left + at.width, 15, { align: "right" });
  }

  function drawMap() {
    line(at.left + 0.5, at.map.y, at.left + 0.5, at.map.y + at.map.h, ink.line);
    clipped(at.map, () => {
      const marks = [];
      for (const r of model.residencies) {
        if (r.end <= view.x0 || r.start >= view.x1 || r.top < view.y0 || r.address > view.y1) continue;
        let x = X(r.start), y = Y(r.top), w = X(r.end) - x, h = Y(r.address) - y;
        const tensor = model.tensors[r.tensor], own = related(r.tensor);
        ctx.globalAlpha = own === false && hovered?.residency !== r ? 0.2 : 1;
        ctx.fillStyle = fills[tensor.role][tensor.shade];
        // A hairline of the ground keeps neighbours apart where there is room for one.
        if (w > 3) { x += 0.5; w -= 1; }
        if (h > 3) { y += 0.5; h -= 1; }
        ctx.fillRect(x, y, Math.max(w, 0.8), Math.max(h, 0.8));
        const edge = w > 10 ? 3 : w > 4 ? 2 : 1;
        if (r.opens === RETRIEVE) { ctx.fillStyle = ink.kinds[RETRIEVE]; ctx.fillRect(x, y, edge, h); }
        if (r.closes === SPILL) { ctx.fillStyle = ink.kinds[SPILL]; ctx.fillRect(x + w - edge, y, edge, h); }
        if (w > 34 && h > 52) {
          if (r.opens === RETRIEVE) marks.push([RETRIEVE, x + 10, y + h - 9]);
          if (r.closes === SPILL) marks.push([SPILL, x + w - 10, y + h - 9]);
        }
        label(r, tensor, x, y, w, h);
        if (own || hovered?.residency === r || hovered?.tensors?.has(r.tensor)) {
          ctx.globalAlpha = 1; ctx.strokeStyle = ink.ink; ctx.lineWidth = own || hovered?.residency === r ? 2 : 1.4;
          ctx.strokeRect(x, y, Math.max(w, 1), Math.max(h, 1));
        }
      }
      ctx.globalAlpha = 1;
      for (const mark of marks) if (selected === null) glyph(...mark, 4.5);
      if (selected !== null) drawAway(model.tensors[selected].residencies);
      else if (hovered?.residency) drawAway(model.tensors[hovered.residency.tensor].residencies);
    }, 1);
    if (model.scratchpad <= view.y1 * 1.0001) {
      const y = Y(model.scratchpad);
      line(at.left, y, at.left + at.width, y, ink.ink, 1.5, [6, 4]);
    }
  }

  function label(r, tensor, x, y, w, h) {
    const left = Math.max(x, at.left), right = Math.min(x + w, at.left + at.width);
    const room = Math.floor((right - left - 12) / letter);
    const text = fit(tensor.name, room);
    if (!text || h < 13) return;
    const two = h >= 32 && room >= 7;
    const middle = clamp(y + h / 2, at.map.y + 14, at.map.y + at.map.h - 14);
    write(text, left + 6, two ? middle - 7 : y + h / 2 + 0.5, { family: MONO, colour: ink.label });
    if (two) write(formatBytes(tensor.nbytes), left + 6, middle + 8, { colour: ink.label, size: 10.5 });
  }

  // While a tensor is off the chip, a dotted line leads from where it left to where it came back.
  function drawAway(stays) {
    for (let i = 1; i < stays.length; i++) {
      const a = stays[i - 1], b = stays[i];
      const x0 = X(a.end), y0 = Y((a.address + a.top) / 2), x1 = X(b.start), y1 = Y((b.address + b.top) / 2);
      line(x0, y0, x1, y1, ink.card, 4); line(x0, y0, x1, y1, ink.kinds[RETRIEVE], 2, [2, 3]);
      glyph(RETRIEVE, x1, y1, 5); if (a.closes === SPILL) glyph(SPILL, x0, y0, 5);
    }
  }

  function drawAxis() {
    const { y } = at.axis, each = stepWidth();
    line(at.left, y + 0.5, at.left + at.width, y + 0.5, ink.line);
    const tick = each >= 26 ? 1 : stepTicks();
    for (let i = Math.max(0, Math.floor(view.x0)); i < Math.min(steps, view.x1); i++) {
      if (i % tick) continue;
      const x = X(i + 0.5);
      if (x < at.left || x > at.left + at.width) continue;
      line(x, y, x, y + 4, ink.muted); write(String(i), x, y + 11, { align: "center", size: 10.5 });
    }
    const mine = selected === null ? null : model.tensors[selected];
    if (at.fade > 0) {
      ctx.save(); ctx.beginPath(); ctx.rect(0, y, W, at.axis.h); ctx.clip();
      for (let i = Math.max(0, Math.floor(view.x0)); i < Math.min(steps, view.x1); i++) {
        const x = X(i + 0.5);
        if (x < at.left || x > at.left + at.width + 4) continue;
        const strong = hovered?.step === i || mine?.producer === i || mine?.readers.includes(i);
        ctx.globalAlpha = at.fade;
        ctx.save(); ctx.translate(x + (at.upright ? 0 : 4), y + (at.upright ? 27 : 20)); if (!at.upright) ctx.rotate(-0.66);
        write(fit(model.operators[i].name, 26), 0, 0, { family: MONO, align: at.upright ? "center" : "right", colour: strong ? ink.ink : ink.muted, weight: strong ? "600" : "" });
        ctx.restore();
      }
      ctx.restore();
    }
    if (mine) {
      const mark = (i, made) => {
        const x = X(i + 0.5);
        if (x < at.left || x > at.left + at.width) return;
        ctx.beginPath(); ctx.arc(x, y, 4, 0, 7); ctx.fillStyle = made ? ink.ink : ink.card; ctx.fill();
        ctx.strokeStyle = ink.ink; ctx.lineWidth = 1.5; ctx.stroke();
      };
      for (const i of mine.readers) mark(i, false);
      if (mine.producer !== null) mark(mine.producer, true);
    }
  }

  function drawMoves() {
    write("transfers before each step", at.left, at.moves.y - 10, { weight: "600", colour: ink.ink, size: 12 });
    model.byKind.forEach((list, kind) => {
      const y = at.moves.y + 15 * kind + 8;
      line(at.left, y + 0.5, at.left + at.width, y + 0.5, ink.line);
      write(model.kinds[kind], at.left - 9, y, { align: "right", size: at.small ? 10 : 11, colour: ink.muted });
      const seen = list.filter((move) => move.step > view.x0 - 0.01 && move.step < view.x1 + 0.01);
      // Few transfers are drawn large at any scale; many are drawn as narrow as their steps.
      const few = seen.length <= Math.max(8, at.width / 24), r = few ? 4.6 : clamp(stepWidth() * 0.7, 2.2, 4.6);
      let last = -9;
      for (const move of seen) {
        const own = related(move.tensor), x = X(move.step);
        // Marks closer than this are one blot anyway; those of the selected tensor are always drawn.
        if (x - last < 1.2 && !own) continue;
        if (selected !== null && !own) ctx.globalAlpha = 0.18;
        // Where compulsory transfers crowd, ticks say as much as triangles and leave the others in view.
        if (kind >= LOAD && !few && stepWidth() < 5 && !own) line(x, y - 4, x, y + 4, ink.kinds[kind]);
        else glyph(kind, x, y, own ? 5 : Math.max(r, 3.4), own ? 5 : r);
        ctx.globalAlpha = 1;
        last = own ? -9 : x;
      }
      if (selected !== null) for (const move of seen) if (related(move.tensor)) glyph(kind, X(move.step), y, 5);
    });
  }

  function drawFill() {
    const { y, h } = at.fill, top = Math.max(model.fillTop * 1.1, 1);
    const up = (value) => y + h - (value / top) * h;
    write("bytes resident", at.left, y - 10, { weight: "600", colour: ink.ink, size: 12 });
    const keys = [[ink.operands, at.small ? "operator" : "the running operator's"], [ink.held, at.small ? "held" : "held for later"]];
    let x = at.left + at.width;
    for (const [colour, text] of keys.reverse()) {
      write(text, x, y - 10, { align: "right" }); x -= ctx.measureText(text).width + 17;
      ctx.fillStyle = colour; ctx.fillRect(x, y - 15, 12, 10); x -= 12;
    }
    const tick = byteTicks(top, h, 26);
    for (let byte = 0; byte <= top; byte += tick) {
      const level = Math.round(up(byte)) + 0.5;
      line(at.left, level, at.left + at.width, level, ink.line);
      write(formatBytes(byte), at.left - 8, level, { align: "right", size: at.small ? 10 : 11 });
    }
    clipped(at.fill, () => {
      for (const [values, colour] of [[model.resident, ink.held], [model.needed, ink.operands]]) {
        ctx.beginPath(); ctx.moveTo(X(0), y + h);
        const from = Math.max(0, Math.floor(view.x0)), to = Math.min(steps, Math.ceil(view.x1));
        ctx.moveTo(X(from), y + h);
        for (let i = from; i < to; i++) { ctx.lineTo(X(i), up(values[i])); ctx.lineTo(X(i + 1), up(values[i])); }
        ctx.lineTo(X(to), y + h); ctx.closePath(); ctx.fillStyle = colour; ctx.fill();
      }
    });
    if (model.scratchpad <= top) line(at.left, up(model.scratchpad), at.left + at.width, up(model.scratchpad), ink.ink, 1.5, [6, 4]);
  }

  function drawMini() {
    const { y, h } = at.mini, all = Math.max(steps, 1);
    if (!overview) {
      overview = document.createElement("canvas");
      const ratio = Math.min(window.devicePixelRatio || 1, 2);
      overview.width = Math.max(1, Math.round(at.width * ratio)); overview.height = Math.round(h * ratio);
      const o = overview.getContext("2d"), sx = overview.width / all, sy = overview.height / home.y1;
      for (const r of model.residencies) {
        const t = model.tensors[r.tensor];
        o.fillStyle = fills[t.role][t.shade];
        o.fillRect(r.start * sx, overview.height - r.top * sy, Math.max((r.end - r.start) * sx, 0.7), Math.max((r.top - r.address) * sy, 0.5));
      }
      for (const kind of [RETRIEVE, SPILL]) for (const move of model.byKind[kind]) {
        o.fillStyle = ink.kinds[kind]; o.fillRect(move.step * sx - ratio / 2, 0, ratio, overview.height * 0.16);
      }
    }
    ctx.drawImage(overview, at.left, y, at.width, h);
    ctx.strokeStyle = ink.line; ctx.lineWidth = 1; ctx.strokeRect(at.left - 0.5, y - 0.5, at.width + 1, h + 1);
    write("all steps", at.left - 8, y + h / 2, { align: "right", size: at.small ? 10 : 11 });
    const x0 = at.left + (view.x0 / all) * at.width, x1 = at.left + (view.x1 / all) * at.width;
    if (x1 - x0 > at.width - 1) return;
    ctx.globalAlpha = 0.72; ctx.fillStyle = ink.card;
    ctx.fillRect(at.left, y, x0 - at.left, h); ctx.fillRect(x1, y, at.left + at.width - x1, h);
    ctx.globalAlpha = 1; ctx.strokeStyle = ink.accent; ctx.lineWidth = 2; ctx.strokeRect(x0, y, Math.max(x1 - x0, 3), h);
  }

  function drawCross() {
    if (!hovered || hovered.step === undefined || hovered.step === null) return;
    const x = Math.max(X(hovered.step), at.left), w = Math.min(X(hovered.step + 1), at.left + at.width) - x;
    if (w <= 0) return;
    ctx.globalAlpha = 0.09; ctx.fillStyle = ink.ink; ctx.fillRect(x, at.map.y, Math.max(w, 1), at.fill.y + at.fill.h - at.map.y); ctx.globalAlpha = 1;
  }

  // ---- what lies under a point --------------------------------------------------------------------------

  const inside = (lane, y, pad = 0) => y >= lane.y - pad && y <= lane.y + lane.h + pad;
  function hit(x, y) {
    if (x < at.left - 4 || x > at.left + at.width + 6) return null;
    const step = clamp(Math.floor(stepAt(x)), 0, steps - 1);
    if (inside(at.map, y)) {
      let best = null, least = 3;
      for (const r of model.residencies) {
        const dx = Math.max(X(r.start) - x, x - X(r.end), 0), dy = Math.max(Y(r.top) - y, y - Y(r.address), 0);
        const away = Math.max(dx, dy);
        // Thin rectangles are caught from up to three pixels away; the nearest wins.
        if (away < least) { least = away; best = r; if (!away) break; }
      }
      return best ? { residency: best, tensor: best.tensor, step } : { step, empty: true };
    }
    if (inside(at.moves, y)) {
      const kind = clamp(Math.floor((y - at.moves.y) / 15), 0, 3);
      let best = null, least = 7;
      for (const move of model.byKind[kind]) { const away = Math.abs(X(move.step) - x); if (away < least) { least = away; best = move; } }
      return best ? { move: best, tensors: new Set([best.tensor]), tensor: best.tensor } : null;
    }
    if (inside(at.axis, y) || inside(at.fill, y)) return { operator: step, step, tensors: new Set(model.operators[step].tensors) };
    return null;
  }

  // ---- moving the view ----------------------------------------------------------------------------------

  function set(next) {
    const wide = clamp(next.x1 - next.x0, Math.min(2, steps), Math.max(steps, 1)), tall = clamp(next.y1 - next.y0, Math.min(16, limit), Math.max(home.y1, limit));
    view.x0 = clamp(next.x0, 0, Math.max(steps - wide, 0)); view.x1 = view.x0 + wide;
    view.y0 = clamp(next.y0, 0, Math.max(Math.max(home.y1, limit) - tall, 0)); view.y1 = view.y0 + tall;
    request();
  }
  function glide(next) {
    cancelAnimationFrame(moving);
    if (window.matchMedia("(prefers-reduced-motion: reduce)").matches) { set(next); return; }
    const from = { ...view }, start = performance.now();
    const tick = (now) => {
      const part = clamp((now - start) / 160, 0, 1), ease = 1 - (1 - part) ** 3, mid = {};
      for (const key of Object.keys(from)) mid[key] = from[key] + (next[key] - from[key]) * ease;
      set(mid); if (part < 1) moving = requestAnimationFrame(tick);
    };
    moving = requestAnimationFrame(tick);
  }
  function zoomed(axis, factor, pivot) {
    const [a, b] = axis === "x" ? ["x0", "x1"] : ["y0", "y1"], next = { ...view };
    next[a] = pivot - (pivot - view[a]) * factor; next[b] = pivot + (view[b] - pivot) * factor;
    return next;
  }
  const zoom = (axis, factor) => glide(zoomed(axis, factor, axis === "x" ? (view.x0 + view.x1) / 2 : (view.y0 + view.y1) / 2));
  const reset = () => glide({ ...home });
  function show(first, last, low = null, high = null) {
    const next = { ...view }, room = Math.max((last - first) * 0.35, 3);
    next.x0 = Math.max(0, first - room); next.x1 = Math.min(steps, last + room);
    if (low !== null && (low < view.y0 || high > view.y1)) { next.y0 = home.y0; next.y1 = home.y1; }
    glide(next);
  }
  // Brings steps into sight without changing the scale where they already fit.
  function reveal(first, last) {
    if (first >= view.x0 && last <= view.x1) { request(); return; }
    const wide = view.x1 - view.x0;
    if (last - first > wide * 0.9) { show(first, last); return; }
    const middle = (first + last) / 2;
    glide({ ...view, x0: middle - wide / 2, x1: middle + wide / 2 });
  }

  // ---- pointer, wheel, keys -----------------------------------------------------------------------------

  const pointers = new Map();
  let grab = null;
  const local = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  function overviewTo(x) {
    const middle = ((x - at.left) / at.width) * steps, half = (view.x1 - view.x0) / 2;
    set({ ...view, x0: middle - half, x1: middle + half });
  }
  canvas.addEventListener("pointerdown", (event) => {
    const [x, y] = local(event);
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, [x, y]);
    cancelAnimationFrame(moving);
    const mini = inside(at.mini, y, 4);
    grab = { x, y, view: { ...view }, moved: false, mini, pinch: null };
    if (mini) overviewTo(x);
    if (pointers.size === 2) {
      const [a, b] = [...pointers.values()];
      grab = { view: { ...view }, moved: true, pinch: [stepAt(a[0]), stepAt(b[0])] };
    }
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = local(event);
    if (!pointers.has(event.pointerId)) { over(hit(x, y), event.clientX, event.clientY); return; }
    pointers.set(event.pointerId, [x, y]);
    if (grab?.pinch && pointers.size === 2) {
      const [a, b] = [...pointers.values()], [p, q] = grab.pinch;
      if (Math.abs(a[0] - b[0]) > 8) {
        const each = (q - p) / (b[0] - a[0]);
        if (each > 0) set({ ...view, x0: p - (a[0] - at.left) * each, x1: p + (at.left + at.width - a[0]) * each });
      }
      return;
    }
    if (!grab) return;
    if (grab.mini) { overviewTo(x); return; }
    if (!grab.moved && Math.hypot(x - grab.x, y - grab.y) < 4) return;
    grab.moved = true; canvas.classList.add("drag"); over(null);
    const dx = ((grab.x - x) / at.width) * (grab.view.x1 - grab.view.x0), dy = ((y - grab.y) / at.map.h) * (grab.view.y1 - grab.view.y0);
    set({ x0: grab.view.x0 + dx, x1: grab.view.x1 + dx, y0: grab.view.y0 + dy, y1: grab.view.y1 + dy });
  });
  const release = (event) => {
    const was = grab;
    pointers.delete(event.pointerId); canvas.classList.remove("drag");
    if (!pointers.size) grab = null;
    if (event.type !== "pointerup" || !was || was.moved || was.mini) return;
    const [x, y] = local(event), target = hit(x, y);
    over(target, event.clientX, event.clientY);
    on.select(target && target.tensor !== undefined ? target.tensor : null, target?.operator ?? null);
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  // A finger leaves as soon as it lifts; what it tapped stays explained until the page moves.
  canvas.addEventListener("pointerleave", (event) => { if (!pointers.size && event.pointerType === "mouse") over(null); });
  canvas.addEventListener("dblclick", (event) => {
    const target = hit(...local(event));
    if (target?.residency) show(target.residency.start, target.residency.end);
  });
  canvas.addEventListener("wheel", (event) => {
    const [x, y] = local(event);
    const across = Math.abs(event.deltaX) > Math.abs(event.deltaY) && !event.shiftKey;
    // A wheel over a picture that nobody has chosen scrolls the page, as it does everywhere else.
    if (!event.ctrlKey && !event.metaKey && !across && document.activeElement !== canvas) { on.hint(); return; }
    event.preventDefault();
    cancelAnimationFrame(moving);
    const unit = event.deltaMode === 1 ? 16 : 1;
    if (across) { const by = ((event.deltaX * unit) / at.width) * (view.x1 - view.x0); set({ ...view, x0: view.x0 + by, x1: view.x1 + by }); return; }
    const factor = Math.exp(clamp((event.deltaY || event.deltaX) * unit, -120, 120) * 0.0022);
    set(event.shiftKey ? zoomed("y", factor, byteAt(y)) : zoomed("x", factor, stepAt(x)));
    over(hit(x, y), event.clientX, event.clientY);
  }, { passive: false });

  function over(target, x, y) {
    const same = target?.residency === hovered?.residency && target?.step === hovered?.step && target?.move === hovered?.move && target?.operator === hovered?.operator;
    hovered = target; on.hover(target, x, y);
    if (!same) request();
  }

  // The arrows walk over residencies: left and right in time, up and down by address.
  function walk(key) {
    const list = model.residencies;
    const seen = (r) => r.start < view.x1 && r.end > view.x0;
    let now = hovered?.residency ?? (selected === null ? null : model.tensors[selected].residencies[0]);
    if (!now) now = list.find(seen) ?? list[0];
    else if (key === "ArrowRight" || key === "ArrowLeft") now = list[clamp(now.index + (key === "ArrowRight" ? 1 : -1), 0, list.length - 1)];
    else {
      const up = key === "ArrowUp", step = hovered?.step ?? now.start;
      const column = list.filter((r) => r.start <= step && r.end > step && (up ? r.address > now.address : r.address < now.address));
      now = column.sort((a, b) => (up ? a.address - b.address : b.address - a.address))[0] ?? now;
    }
    if (!now) return;
    const step = clamp(hovered?.step ?? now.start, now.start, now.end - 1);
    hovered = { residency: now, tensor: now.tensor, step };
    if (now.start < view.x0 || now.start >= view.x1) { const wide = view.x1 - view.x0; set({ ...view, x0: now.start - wide / 4, x1: now.start + (wide * 3) / 4 }); }
    layout();
    const box = canvas.getBoundingClientRect();
    on.hover(hovered, box.left + clamp(X((now.start + now.end) / 2), at.left, W - 20), box.top + clamp(Y(now.address), 30, H), true);
    request();
  }
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = {
      ArrowLeft: () => walk("ArrowLeft"), ArrowRight: () => walk("ArrowRight"), ArrowUp: () => walk("ArrowUp"), ArrowDown: () => walk("ArrowDown"),
      "+": () => zoom("x", 0.5), "=": () => zoom("x", 0.5), "-": () => zoom("x", 2), 0: reset,
      Enter: () => { if (hovered?.tensor !== undefined) on.select(hovered.tensor, null); },
      Escape: () => { over(null); on.select(null, null); },
    };
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
  canvas.addEventListener("blur", () => { if (!pointers.size) over(null); });
  new ResizeObserver(resize).observe(canvas);

  return {
    theme, resize, zoom, reset, show, reveal, draw, set: (x0, x1) => set({ ...view, x0, x1 }),
    select(tensor) { selected = tensor; request(); },
    point(target) { hovered = target; request(); },
    where(step, byte) { layout(); const box = canvas.getBoundingClientRect(); return [box.left + X(step), box.top + Y(byte)]; },
  };
}
