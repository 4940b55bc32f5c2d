"use strict";
// Draws the panels from the numbers in #data. `at` is the position that is looked at: the model has read tokens 0 to
// `at` of the W shown ones, and predicts the one after it.

/** @typedef {{ type: "u1" | "i4" | "f4", shape: number[], data: string }} Packed an array of page.py */
/** @typedef {Float32Array & { shape: number[] }} Numbers an array here; of bytes or int32 as well */
/** @typedef {{ ids: Packed, p: Packed }} Likeliest the likeliest tokens (W, n) and their probabilities */
/**
 * The numbers of panels.py. Tokens are places in `vocabulary`.
 * @typedef {object} Data
 * @property {string[]} vocabulary
 * @property {{ source: string, precision: string, calls: number, heads: number } & Limits} model
 * @property {{ ids: Packed, surprise: Packed, first: number, prompt: number, ended: boolean, at: number }} text
 * @property {{ parts: Record<string, Packed>, channels: number } | null} embedding
 * @property {{ calls: number[], heads: number[], weights: Weights, error: number, sums: number }} attention
 * @property {{ at: (Likeliest & { next: Packed } | null)[] }} layers
 * @property {Likeliest} next
 * @property {{ bytes: number }} cache
 * @property {{ settings: Record<string, number>, example: boolean, at: Stages[] }} sampler
 * @property {{ name: string, kl: Packed, p: Packed }} [reference]
 */
/** @typedef {{ tokens: number, context: number }} Limits */
/** @typedef {{ low: number, high: number, columns: number, codes: Packed }} Weights of attention, without zeros */
/** @typedef {{ names: string[], kept: number[], ids: Packed, p: Packed }} Stages of the sampler */

const byId = (id) => document.getElementById(id);
const canvasOf = (id) => /** @type {HTMLCanvasElement} */ (byId(id));
const selectOf = (id) => /** @type {HTMLSelectElement} */ (byId(id));
const slider = /** @type {HTMLInputElement} */ (byId("slider"));
/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} name
 * @returns {HTMLElementTagNameMap[K]}
 */
const make = (name, text = "", kind = "") =>
  Object.assign(document.createElement(name), { textContent: text, className: kind });
const percent = (p) => (!p ? "0 %" : p > 0 && p < 0.001 ? "<0.1 %" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`);
const range = (length) => [...Array(length).keys()];
const spaced = (name) => name.replaceAll("_", " ");

/** @type {(packed: Packed) => Numbers} */
function array({ type, shape, data: text }) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const numbers = type === "u1" ? bytes : new (type === "i4" ? Int32Array : Float32Array)(bytes.buffer);
  return /** @type {Numbers} */ (Object.assign(numbers, { shape }));
}

/** @type {Data} */
const data = JSON.parse(byId("data").textContent);
const { first, prompt, ended } = data.text;
const ids = array(data.text.ids);
const surprise = array(data.text.surprise);
const W = surprise.length;
const last = W - 1;
const shown = (place) => data.vocabulary[place];
const token = (place) => shown(ids[place]);
const number = (place) => first + place + 1;
let at = data.text.at;

// --- a matrix of numbers, by mouse, touch and keys -----------------------------------------------------------------
const redraws = [];
/** @type {Record<"soft" | "mark" | "heat" | "cold", string>} */
let theme; // the colours of the style sheet
const shade = (color, share) => `rgba(${color},${Math.min(1, share)})`;

function redraw() {
  const style = getComputedStyle(document.documentElement);
  const [soft, mark, heat, cold] = ["--soft", "--mark", "--heat", "--cold"].map((name) => style.getPropertyValue(name));
  theme = { soft, mark, heat, cold };
  for (const draw of redraws) draw();
}

/**
 * @typedef {object} Matrix
 * @property {number} rows
 * @property {number} columns
 * @property {(row: number, column: number) => number | null} value -1 to 1; null for an empty cell
 * @property {(row: number, column: number) => string} tell a cell in words
 * @property {string} label
 * @property {{ row?: () => number, column?: () => number, choose?: (row: number, column: number) => number }} marked
 * @property {(row: number) => string} [rowNames]
 * @property {(column: number) => string} [columnNames]
 * @property {number} [height] of a row, in pixels
 */

/** @type {(canvas: HTMLCanvasElement, output: HTMLElement, options: Matrix) => void} */
function matrix(canvas, output, { rows, columns, value, tell, rowNames, columnNames, marked, height, label }) {
  let cell = [marked.row ? marked.row() : 0, marked.column ? marked.column() : 0];
  let [left, top, wide, high] = [0, 0, 0, 0];
  const draw = () => {
    const room = Math.min(canvas.parentElement.clientWidth, 620);
    const pen = canvas.getContext("2d");
    const ratio = devicePixelRatio || 1;
    const named = (room - 90) / columns >= 9;
    left = rowNames ? Math.min(96, room / 4) : 0;
    wide = Math.max(1, Math.min(30, (room - left) / columns));
    high = height ?? wide;
    top = columnNames && named ? 64 : 0;
    const size = [left + wide * columns, top + high * rows];
    canvas.style.width = `${size[0]}px`;
    canvas.width = size[0] * ratio;
    canvas.height = size[1] * ratio;
    pen.scale(ratio, ratio);
    pen.font = "11px ui-monospace, monospace";
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (let row = 0; rowNames && row < rows; row += Math.max(1, Math.ceil(12 / high))) {
      pen.fillStyle = row === marked.row?.() ? theme.mark : theme.soft;
      pen.fillText(rowNames(row).slice(0, Math.floor(left / 7)), left - 4, top + high * (row + 0.5));
    }
    pen.textAlign = "left";
    for (let column = 0; top && column < columns; column++) {
      pen.save();
      pen.translate(left + wide * (column + 0.5), top - 4);
      pen.rotate(-Math.PI / 2);
      pen.fillStyle = column === marked.column?.() ? theme.mark : theme.soft;
      pen.fillText(columnNames(column).slice(0, 9), 0, 0);
      pen.restore();
    }
    const gap = wide > 6 && high > 6 ? 1 : 0;
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const found = value(row, column);
        if (found === null) continue;
        pen.fillStyle = shade(found < 0 ? theme.cold : theme.heat, 0.04 + 0.96 * Math.abs(found));
        pen.fillRect(left + wide * column, top + high * row, wide - gap, high - gap);
      }
    }
    pen.strokeStyle = theme.mark;
    pen.lineWidth = 2;
    if (marked.row) pen.strokeRect(left + 1, top + high * marked.row(), wide * columns - 2, high);
    if (marked.column) pen.strokeRect(left + wide * marked.column(), top + 1, wide, high * rows - 2);
    if (document.activeElement === canvas) pen.strokeRect(left + wide * cell[1], top + high * cell[0], wide, high);
  };
  const say = (row, column) => {
    cell = [Math.max(0, Math.min(rows - 1, row)), Math.max(0, Math.min(columns - 1, column))];
    output.textContent = tell(cell[0], cell[1]);
  };
  const sayUnder = (event) => {
    const box = canvas.getBoundingClientRect();
    const drawn = (left + wide * columns) / box.width; // a narrow page shrinks it
    const [x, y] = [(event.clientX - box.left) * drawn, (event.clientY - box.top) * drawn];
    say(Math.floor((y - top) / high), Math.floor((x - left) / wide));
  };
  canvas.addEventListener("mousemove", sayUnder);
  canvas.addEventListener("click", (event) => {
    sayUnder(event);
    if (marked.choose) go(marked.choose(cell[0], cell[1]));
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    say(cell[0] + step[0], cell[1] + step[1]);
    draw();
  });
  for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, draw);
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${label}. The arrow keys read its cells.`);
  output.setAttribute("aria-live", "polite");
  redraws.push(draw);
}

/** @typedef {{ text: string, share: number, other?: number, came?: boolean }} Bar `other`: a second bar */

/** @type {(list: HTMLElement, items: Bar[]) => void} */
function bars(list, items) {
  const bar = (share, kind) => {
    const [track, fill] = [make("span", "", "track"), make("span", "", kind)];
    fill.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
    track.append(fill);
    return [track, make("span", percent(share), "value")];
  };
  list.replaceChildren(
    ...items.map(({ text, share, other, came }) => {
      const item = make("li", "", came ? "came" : "");
      item.append(make("code", text), ...bar(share, "fill"));
      if (other !== undefined) item.append(...bar(other, "fill two"));
      return item;
    }),
  );
}

// --- panels: each draws what does not change, and returns what to do when the position moves ------------------------
function tokens() {
  const chips = [...ids].map((id, place) => {
    const chip = make("button", token(place), "chip");
    const bits = place ? surprise[place - 1] : null;
    chip.type = "button";
    chip.append(make("small", bits === null ? "given" : `${bits.toFixed(1)} bits`));
    chip.classList.toggle("own", number(place) > prompt);
    if (place) redraws.push(() => (chip.style.background = shade(theme.heat, Math.min(1, bits / 8) / 2)));
    chip.addEventListener("click", () => go(Math.min(place, last)));
    return chip;
  });
  byId("chips").append(...chips);
  return () => chips.forEach((chip, place) => chip.classList.toggle("now", place === at));
}

function embedding() {
  const found = data.embedding;
  if (!found) {
    byId("embedding").hidden = true;
    return () => {};
  }
  const names = {
    word: "Word embedding: the same for a token wherever it stands",
    position: "Position encoding: the same for a place, whatever stands there",
    sum: found.parts.word
      ? "Their sum, which the first layer reads"
      : "The word embedding, which the first layer reads",
  };
  byId("embedding-look").textContent = found.parts.word
    ? "Look for equal rows at the top: they are the same token. Position encoding makes them different in the sum, " +
      "so that the model knows their order."
    : "Look for equal rows: they are the same token. This decoder adds no position to its vectors: the order of the " +
      "tokens reaches it inside attention, which turns queries and keys by their place, say.";
  const parts = Object.entries(found.parts).map(([kind, packed]) => ({ kind, numbers: array(packed) }));
  const most = Math.max(...parts.map(({ numbers }) => numbers.reduce((a, b) => Math.max(a, Math.abs(b)), 0)));
  const columns = parts[0].numbers.shape[1];
  for (const { kind, numbers } of parts) {
    const drawn = make("canvas");
    byId("embedding-parts").append(make("h3", names[kind]), drawn);
    matrix(drawn, byId("embedding-out"), {
      rows: W,
      columns,
      value: (row, column) => numbers[row * columns + column] / most,
      rowNames: token,
      height: Math.max(5, Math.min(14, 400 / W)),
      label: names[kind],
      marked: { row: () => at, choose: (row) => row },
      tell: (row, column) =>
        `“${token(row)}”, channel ${column + 1} of ${found.channels}: ${numbers[row * columns + column].toFixed(3)}`,
    });
  }
  const shortened = `The first ${columns} of ${found.channels} channels are shown.`;
  if (found.channels > columns) byId("embedding-parts").append(make("p", shortened, "note"));
  return () => {};
}

function attention() {
  const { calls, heads, weights, error, sums } = data.attention;
  const { low, high, columns } = weights;
  const codes = array(weights.codes);
  const size = codes.shape[2]; // of a head's triangle, row after row
  const more = columns - W; // 1 with a column of earlier tokens
  const [call, head] = ["call", "head"].map(selectOf);
  const root = (row, column) => {
    if (column > row + more) return null;
    const triangle = (call.selectedIndex * heads.length + head.selectedIndex) * size;
    const before = (row * (row + 1)) / 2 + row * more;
    return low + ((high - low) * codes[triangle + before + column]) / 255;
  };
  const weight = (row, column) => root(row, column) * Math.abs(root(row, column));
  const seen = (column) => (more && !column ? "earlier" : token(column - more));
  call.append(...calls.map((place) => make("option", `${place + 1}`)));
  head.append(...heads.map((place) => make("option", `${place + 1}`)));
  matrix(canvasOf("weights"), byId("weights-out"), {
    rows: W,
    columns,
    value: root,
    rowNames: token,
    columnNames: seen,
    label: "Attention weights, a row for each token that reads and a column for each that is read",
    marked: { row: () => at, choose: (row) => row },
    tell: (row, column) =>
      root(row, column) === null
        ? `“${token(row)}” cannot see “${seen(column)}”, which comes later`
        : `“${token(row)}” takes ${percent(weight(row, column))} of what it fetches from “${seen(column)}”`,
  });
  const left = [];
  if (calls.length < data.model.calls) left.push(`layers ${calls.map((n) => n + 1).join(", ")} of ${data.model.calls}`);
  if (heads.length < data.model.heads) left.push(`heads ${heads.map((n) => n + 1).join(", ")} of ${data.model.heads}`);
  const exact = error ? `to within ${error.toExponential(0)} of its largest number` : "to the last bit";
  byId("attention-note").textContent =
    (left.length ? `Shown are ${left.join(" and ")}; --layers and --heads choose others. ` : "") +
    (first ? `The column “earlier” is the sum over the ${first} tokens that are not shown. ` : "") +
    (sums < 0.99 ? "Where a row adds up to less than 100 %, the model left the rest unused. " : "") +
    `Checked: these weights times the values give each layer's own result ${exact}.`;
  const update = () => {
    const row = range(at + more + 1).map((column) => ({
      text: seen(column) + (column - more === at ? " (itself)" : ""),
      share: weight(at, column),
    }));
    bars(byId("reads"), row.sort((a, b) => b.share - a.share).slice(0, 6));
  };
  for (const choice of [call, head])
    choice.addEventListener("change", () => {
      redraw();
      update();
    });
  return update;
}

function layers() {
  const stage = (place) => (place ? `after layer ${place}` : "before layer 1");
  const kept = data.layers.at.flatMap((layer, place) =>
    layer ? { place, ids: array(layer.ids), p: array(layer.p), next: array(layer.next) } : [],
  );
  const left = data.layers.at.length - kept.length;
  byId("layers-note").textContent = !kept.length
    ? "This decoder has no single vector per token between its layers, so there is no guess to show."
    : (left ? `${left} places have no single vector per token and are left out. ` : "") +
      "A guess is the model's own final norm and output head, run on the vector at that place (the logit lens). " +
      "After the last layer it equals the model's answer.";
  if (!kept.length) return () => {};
  matrix(canvasOf("lens"), byId("lens-out"), {
    rows: kept.length,
    columns: W,
    height: Math.max(6, Math.min(20, 300 / kept.length)),
    rowNames: (row) => (kept[row].place ? `layer ${kept[row].place}` : "before"),
    columnNames: (column) => token(column + 1),
    value: (row, column) => kept[row].next[column],
    label: "Probability of the token that came next, a row for each layer and a column for each position",
    marked: { column: () => at, choose: (_, column) => column },
    tell: (row, column) => `${stage(kept[row].place)}, “${token(column + 1)}” has ${percent(kept[row].next[column])}`,
  });
  const [body] = /** @type {HTMLTableElement} */ (byId("guesses")).tBodies;
  const guesses = ({ place, ids: likeliest, p }) => {
    const [row, many] = [make("tr"), likeliest.shape[1]];
    row.append(Object.assign(make("th", stage(place)), { scope: "row" }));
    for (let i = at * many; i < (at + 1) * many; i++)
      row.append(make("td", `${shown(likeliest[i])}  ${percent(p[i])}`));
    return row;
  };
  return () => body.replaceChildren(...kept.map(guesses));
}

function next() {
  const top = array(data.next.ids);
  const p = array(data.next.p);
  const many = top.shape[1];
  const bar = (i) => ({ text: shown(top[i]), share: p[i], came: top[i] === ids[at + 1] });
  return () => {
    bars(
      byId("bars"),
      range(many).map((i) => bar(at * many + i)),
    );
    const chance = `which had ${percent(2 ** -surprise[at])} (${surprise[at].toFixed(2)} bits of surprise)`;
    const whose = number(at) < prompt ? "In the prompt" : "The model chose";
    byId("came").textContent = `${whose}: “${token(at + 1)}”, ${chance}.`;
  };
}

function sampler() {
  const { settings, example, at: steps } = data.sampler;
  const words = Object.entries(settings)
    .map(([name, value]) => `${spaced(name)} ${value}`)
    .join(", ");
  byId("sampler-note").textContent = example
    ? "This text takes the likeliest token each time (temperature 0), and needs no other step. " +
      `As an example, the table shows what sampling with ${words} would keep.`
    : `The settings: ${words}.`;
  return () => {
    const { names, kept, ids: candidates, p } = steps[at];
    const [chosen, chances] = [array(candidates), array(p)];
    const header = (text, scope) => Object.assign(make("th", text), { scope });
    const head = make("tr");
    head.append(header("token", "col"), ...names.map((name, i) => header(`${spaced(name)}\n${kept[i]} left`, "col")));
    const rows = Array.from(chosen, (id, row) => {
      const line = make("tr");
      const shares = names.map((_, stage) => chances[stage * chosen.length + row]);
      line.append(header(shown(id), "row"), ...shares.map((share) => make("td", share ? percent(share) : "–", "n")));
      return line;
    });
    byId("stages").replaceChildren(head, ...rows);
  };
}

function cache() {
  const slots = [...ids].slice(0, W).map((_, place) => make("span", token(place), "chip"));
  byId("slots").append(...slots);
  return () => {
    const filling = number(at) <= prompt;
    const old = filling ? 0 : number(at) - 1;
    const kb = (tokens) => `${((tokens * data.cache.bytes) / 1024).toFixed(1)} KiB`;
    const now = filling ? prompt : number(at);
    slots.forEach((slot, place) => {
      const state = number(place) > now ? "later" : number(place) <= old ? "old" : "new";
      slot.className = `chip ${state}`;
      slot.replaceChildren(token(place), make("small", { later: "not yet", old: "cached", new: "new" }[state]));
    });
    byId("cache-text").textContent = filling
      ? `Step 1, the prefill: keys and values of all ${prompt} tokens of the prompt are computed at once ` +
        `(${kb(prompt)}), and the first new token is predicted.`
      : `Step ${number(at) - prompt + 1}: keys and values of ${old} tokens come from the cache (${kb(old)}); ` +
        `those of “${token(at)}” are new (${kb(1)}).`;
  };
}

function reference() {
  const found = data.reference;
  if (!found) return () => {};
  byId("reference").hidden = false;
  const [kl, p] = [array(found.kl), array(found.p)];
  const [top, own] = [array(data.next.ids), array(data.next.p)];
  const many = top.shape[1];
  const most = Math.max(...kl, 1e-9);
  const svg = byId("kl");
  svg.setAttribute("viewBox", `0 0 ${W} 10`);
  svg.setAttribute("preserveAspectRatio", "none");
  const rects = [...kl].map((value, place) => {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const tall = (10 * value) / most;
    for (const [name, size] of Object.entries({ x: place + 0.1, y: 10 - tall, width: 0.8, height: tall }))
      rect.setAttribute(name, `${size}`);
    rect.addEventListener("click", () => go(place));
    return rect;
  });
  svg.append(...rects);
  const mean = kl.reduce((a, b) => a + b, 0) / W;
  const bar = (i) => ({ text: shown(top[i]), share: own[i], other: p[i], came: top[i] === ids[at + 1] });
  return () => {
    rects.forEach((rect, place) => rect.classList.toggle("now", place === at));
    bars(
      byId("both"),
      range(Math.min(6, many)).map((i) => bar(at * many + i)),
    );
    byId("kl-text").textContent =
      `Left: this model (${data.model.precision}); right: ${found.name}. KL divergence here ` +
      `${kl[at].toExponential(1)} nats, mean ${mean.toExponential(1)}, largest ${most.toExponential(1)}.`;
  };
}

// --- the position --------------------------------------------------------------------------------------------------
const updates = [tokens(), embedding(), attention(), layers(), next(), sampler(), cache(), reference()];
function go(place) {
  at = Math.max(0, Math.min(last, place));
  slider.value = `${at}`;
  const phase =
    number(at) < prompt
      ? "inside the prompt"
      : number(at) === prompt
        ? "the prompt is read; the first new token follows"
        : at === last && ended
          ? "the end token follows"
          : `${number(at) - prompt} of its own tokens read`;
  byId("where").textContent = `Read up to token ${number(at)}, “${token(at)}” (${phase}). Next: “${token(at + 1)}”`;
  for (const update of updates) update();
  redraw();
}
slider.max = `${last}`;
slider.addEventListener("input", () => go(slider.valueAsNumber));
byId("back").addEventListener("click", () => go(at - 1));
byId("forward").addEventListener("click", () => go(at + 1));
const { source, precision, calls, heads, tokens: known, context } = data.model;
const made = `${first + W + 1 - prompt}${ended ? ", with the end token" : ""}`;
byId("facts").textContent =
  `${source}, ${precision}: ${calls} ${calls === 1 ? "layer" : "layers"} of attention, ` +
  `${heads} ${heads === 1 ? "head" : "heads"} each, ${known} known tokens, a context of ${context}. ` +
  `Prompt: ${prompt} tokens; output: ${made}.` +
  (first ? ` The last ${W} tokens are shown; ${first} earlier ones are left out (--last N shows more).` : "");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => go(at));
addEventListener("resize", redraw);
go(at);
