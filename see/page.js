"use strict";
// Draws the panels from the numbers in #data. `at` is the position that is looked at: the model has read tokens 0 to
// `at` of the W shown ones, and predicts the one after it.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const make = (name, text, kind) =>
  Object.assign(document.createElement(name), { textContent: text ?? "", className: kind ?? "" });
const percent = (p) => (!p ? "0 %" : p > 0 && p < 0.001 ? "<0.1 %" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`);
const unpack = ({ type, data: text }) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return type === "u1" ? bytes : new (type === "i4" ? Int32Array : Float32Array)(bytes.buffer);
};
const array = (packed) => Object.assign(unpack(packed), { shape: packed.shape });
const shown = (place) => data.vocabulary[place];

const { first, prompt, ended } = data.text,
  ids = array(data.text.ids),
  surprise = array(data.text.surprise);
const W = surprise.length,
  last = W - 1,
  token = (place) => shown(ids[place]),
  number = (place) => first + place + 1;
const redraws = [];
let at = data.text.at;

// --- a matrix of numbers, by mouse, touch and keys -----------------------------------------------------------------
const color = (name, share) =>
  `rgba(${getComputedStyle(document.documentElement).getPropertyValue(name)},${Math.min(1, share)})`;
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

// One canvas: `value(row, column)` is null for an empty cell, else -1 to 1; `tell` puts a cell into words.
function matrix(canvas, output, { rows, columns, value, tell, rowNames, columnNames, marked, height, label }) {
  let cell = [marked.row ? marked.row() : 0, marked.column ? marked.column() : 0];
  let left = 0,
    top = 0,
    wide = 0,
    high = 0;
  const draw = () => {
    const room = Math.min(canvas.parentElement.clientWidth, 620),
      pen = canvas.getContext("2d"),
      ratio = devicePixelRatio || 1;
    const font = 11,
      named = (room - 90) / columns >= 9;
    left = rowNames ? Math.min(96, room / 4) : 0;
    wide = Math.max(1, Math.min(30, (room - left) / columns));
    high = height ?? wide;
    top = columnNames && named ? 64 : 0;
    const size = [left + wide * columns, top + high * rows];
    canvas.style.width = `${size[0]}px`;
    ((canvas.width = size[0] * ratio), (canvas.height = size[1] * ratio));
    pen.scale(ratio, ratio);
    ((pen.font = `${font}px ui-monospace, monospace`), (pen.textBaseline = "middle"));
    pen.fillStyle = style("--soft");
    for (let row = 0; rowNames && row < rows; row += Math.max(1, Math.ceil(12 / high))) {
      pen.fillStyle = style(marked.row && row === marked.row() ? "--mark" : "--soft");
      ((pen.textAlign = "right"),
        pen.fillText(rowNames(row).slice(0, Math.floor(left / 7)), left - 4, top + high * (row + 0.5)));
    }
    for (let column = 0; top && column < columns; column++) {
      (pen.save(), pen.translate(left + wide * (column + 0.5), top - 4), pen.rotate(-Math.PI / 2));
      pen.fillStyle = style(marked.column && column === marked.column() ? "--mark" : "--soft");
      ((pen.textAlign = "left"), pen.fillText(columnNames(column).slice(0, 9), 0, 0), pen.restore());
    }
    const gap = wide > 6 && high > 6 ? 1 : 0;
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const found = value(row, column);
        if (found === null) continue;
        pen.fillStyle = color(found < 0 ? "--cold" : "--heat", 0.04 + 0.96 * Math.abs(found));
        pen.fillRect(left + wide * column, top + high * row, wide - gap, high - gap);
      }
    }
    ((pen.strokeStyle = style("--mark")), (pen.lineWidth = 2));
    if (marked.row) pen.strokeRect(left + 1, top + high * marked.row(), wide * columns - 2, high);
    if (marked.column) pen.strokeRect(left + wide * marked.column(), top + 1, wide, high * rows - 2);
    if (document.activeElement === canvas) pen.strokeRect(left + wide * cell[1], top + high * cell[0], wide, high);
  };
  const say = (row, column) => {
    cell = [Math.max(0, Math.min(rows - 1, row)), Math.max(0, Math.min(columns - 1, column))];
    output.textContent = tell(...cell);
  };
  const under = (event) => {
    const box = canvas.getBoundingClientRect(),
      drawn = (left + wide * columns) / box.width; // a narrow page shrinks it
    return [
      Math.floor(((event.clientY - box.top) * drawn - top) / high),
      Math.floor(((event.clientX - box.left) * drawn - left) / wide),
    ];
  };
  canvas.addEventListener("mousemove", (event) => say(...under(event)));
  canvas.addEventListener("click", (event) => {
    say(...under(event));
    if (marked.choose) go(marked.choose(...cell));
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    (event.preventDefault(), say(cell[0] + step[0], cell[1] + step[1]), draw());
  });
  for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, draw);
  ((canvas.tabIndex = 0), canvas.setAttribute("role", "img"));
  canvas.setAttribute("aria-label", `${label}. The arrow keys read its cells.`);
  output.setAttribute("aria-live", "polite");
  redraws.push(draw);
}

function bars(list, items) {
  list.replaceChildren(
    ...items.map(([text, share, second, came]) => {
      const item = make("li", "", came ? "came" : ""),
        track = make("span", "", "track"),
        value = make("span", percent(share), "value");
      const fill = make("span", "", "fill");
      fill.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
      track.append(fill);
      item.append(make("code", text), track, value);
      if (second === null) return item;
      const other = make("span", "", "track"),
        two = make("span", "", "fill two");
      two.style.width = `${100 * second}%`;
      (other.append(two), item.append(other, make("span", percent(second), "value")));
      return item;
    }),
  );
}

// --- panels: each draws what does not change, and returns what to do when the position moves ------------------------
function tokens() {
  const chips = [...ids].map((id, place) => {
    const chip = make("button", token(place), "chip"),
      bits = place ? surprise[place - 1] : null;
    chip.type = "button";
    chip.append(make("small", bits === null ? "given" : `${bits.toFixed(1)} bits`));
    chip.classList.toggle("own", number(place) > prompt);
    redraws.push(() => bits !== null && (chip.style.background = color("--heat", Math.min(1, bits / 8) / 2)));
    chip.addEventListener("click", () => go(Math.min(place, last)));
    return chip;
  });
  byId("chips").append(...chips);
  return () => chips.forEach((chip, place) => chip.classList.toggle("now", place === at));
}

function embedding() {
  const found = data.embedding,
    note = byId("embedding-look");
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
  note.textContent = found.parts.word
    ? "Look for equal rows at the top: they are the same token. Position encoding makes them different in the sum, so that the model knows their order."
    : "Look for equal rows: they are the same token. This decoder adds no position to its vectors: the order of the tokens reaches it inside attention, which turns queries and keys by their place, say.";
  const parts = Object.entries(found.parts).map(([kind, packed]) => [kind, array(packed)]);
  const most = Math.max(...parts.map(([, rows]) => rows.reduce((a, b) => Math.max(a, Math.abs(b)), 0)));
  for (const [kind, rows] of parts) {
    const canvas = make("canvas"),
      columns = rows.shape[1];
    byId("embedding-parts").append(make("h3", names[kind]), canvas);
    const value = (row, column) => rows[row * columns + column] / most;
    matrix(canvas, byId("embedding-out"), {
      rows: W,
      columns,
      value,
      rowNames: token,
      height: Math.max(5, Math.min(14, 400 / W)),
      label: names[kind],
      marked: { row: () => at, choose: (row) => row },
      tell: (row, column) =>
        `“${token(row)}”, channel ${column + 1} of ${found.channels}: ${rows[row * columns + column].toFixed(3)}`,
    });
  }
  if (found.channels > parts[0][1].shape[1])
    byId("embedding-parts").append(
      make("p", `The first ${parts[0][1].shape[1]} of ${found.channels} channels are shown.`, "note"),
    );
  return () => {};
}

function attention() {
  const { calls, heads, weights, error, sums } = data.attention,
    codes = array(weights.codes),
    { low, high, columns } = weights;
  const size = codes.shape[2],
    more = columns - W,
    call = byId("call"),
    head = byId("head");
  const start = (row) => (row * (row + 1)) / 2 + row * more;
  const root = (row, column) =>
    column > row + more
      ? null
      : low +
        ((high - low) * codes[(call.selectedIndex * heads.length + head.selectedIndex) * size + start(row) + column]) /
          255;
  const weight = (row, column) => root(row, column) * Math.abs(root(row, column));
  const seen = (column) => (more && !column ? "earlier" : token(column - more));
  call.append(...calls.map((place) => make("option", place + 1)));
  head.append(...heads.map((place) => make("option", place + 1)));
  matrix(byId("weights"), byId("weights-out"), {
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
  byId("attention-note").textContent =
    (left.length ? `Shown are ${left.join(" and ")}; --layers and --heads choose others. ` : "") +
    (first ? `The column “earlier” is the sum over the ${first} tokens that are not shown. ` : "") +
    (sums < 0.99 ? "Where a row adds up to less than 100 %, the model left the rest unused. " : "") +
    `Checked: these weights times the values give each layer's own result ${error ? `to within ${error.toExponential(0)} of its largest number` : "to the last bit"}.`;
  const update = () => {
    const row = [...Array(at + more + 1).keys()].map((column) => [
      seen(column) + (column - more === at ? " (itself)" : ""),
      weight(at, column),
      null,
    ]);
    bars(byId("reads"), row.sort((a, b) => b[1] - a[1]).slice(0, 6));
  };
  for (const choice of [call, head])
    choice.addEventListener("change", () => (redraws.forEach((draw) => draw()), update()));
  return update;
}

function layers() {
  const stage = (place) => (place ? `after layer ${place}` : "before layer 1");
  const after = data.layers.at.map(
    (layer) => layer && { ids: array(layer.ids), p: array(layer.p), next: array(layer.next) },
  );
  const kept = after.map((layer, place) => [place, layer]).filter(([, layer]) => layer);
  byId("layers-note").textContent = !kept.length
    ? "This decoder has no single vector per token between its layers, so there is no guess to show."
    : (kept.length < after.length
        ? `${after.length - kept.length} places have no single vector per token and are left out. `
        : "") +
      "A guess is the model's own final norm and output head, run on the vector at that place (the logit lens). After the last layer it equals the model's answer.";
  if (!kept.length) return () => {};
  matrix(byId("lens"), byId("lens-out"), {
    rows: kept.length,
    columns: W,
    height: Math.max(6, Math.min(20, 300 / kept.length)),
    rowNames: (row) => (kept[row][0] ? `layer ${kept[row][0]}` : "before"),
    columnNames: (column) => shown(ids[column + 1]),
    value: (row, column) => kept[row][1].next[column],
    label: "Probability of the token that came next, a row for each layer and a column for each position",
    marked: { column: () => at, choose: (_, column) => column },
    tell: (row, column) =>
      `${stage(kept[row][0])}, “${shown(ids[column + 1])}” has ${percent(kept[row][1].next[column])}`,
  });
  return () =>
    byId("guesses").tBodies[0].replaceChildren(
      ...kept.map(([place, layer]) => {
        const row = document.createElement("tr"),
          [, many] = layer.ids.shape;
        row.append(Object.assign(make("th", stage(place)), { scope: "row" }));
        for (let i = 0; i < many; i++)
          row.append(make("td", `${shown(layer.ids[at * many + i])}  ${percent(layer.p[at * many + i])}`));
        return row;
      }),
    );
}

function next() {
  const top = array(data.next.ids),
    p = array(data.next.p),
    [, many] = top.shape;
  return () => {
    bars(
      byId("bars"),
      [...Array(many).keys()].map((i) => [
        shown(top[at * many + i]),
        p[at * many + i],
        null,
        top[at * many + i] === ids[at + 1],
      ]),
    );
    const chance = percent(2 ** -surprise[at]),
      whose = number(at) < prompt ? "In the prompt" : "The model chose";
    byId("came").textContent =
      `${whose}: “${token(at + 1)}”, which had ${chance} (${surprise[at].toFixed(2)} bits of surprise).`;
  };
}

function sampler() {
  const { settings, example, at: steps } = data.sampler;
  const words = Object.entries(settings)
    .map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`)
    .join(", ");
  byId("sampler-note").textContent = example
    ? `This text takes the likeliest token each time (temperature 0), and needs no other step. As an example, the table shows what sampling with ${words} would keep.`
    : `The settings: ${words}.`;
  return () => {
    const { names, kept, ids: candidates, p } = steps[at],
      chosen = array(candidates),
      chances = array(p),
      head = make("tr"),
      many = chosen.length;
    head.append(
      ...["token", ...names.map((name, i) => `${name.replaceAll("_", " ")}\n${kept[i]} left`)].map((text) =>
        Object.assign(make("th", text), { scope: "col" }),
      ),
    );
    byId("stages").replaceChildren(
      head,
      ...[...chosen].map((id, row) => {
        const line = make("tr");
        line.append(
          Object.assign(make("th", shown(id)), { scope: "row" }),
          ...names.map((_, i) => make("td", chances[i * many + row] ? percent(chances[i * many + row]) : "–", "n")),
        );
        return line;
      }),
    );
  };
}

function cache() {
  const slots = [...ids].slice(0, W).map((_, place) => make("span", token(place), "chip"));
  byId("slots").append(...slots);
  return () => {
    const filling = number(at) <= prompt,
      old = filling ? 0 : number(at) - 1,
      kb = (tokens) => `${((tokens * data.cache.bytes) / 1024).toFixed(1)} KiB`;
    const now = filling ? prompt : number(at);
    slots.forEach((slot, place) => {
      const state = number(place) > now ? "later" : number(place) <= old ? "old" : "new";
      ((slot.className = `chip ${state}`),
        slot.replaceChildren(token(place), make("small", { later: "not yet", old: "cached", new: "new" }[state])));
    });
    byId("cache-text").textContent = filling
      ? `Step 1, the prefill: keys and values of all ${prompt} tokens of the prompt are computed at once (${kb(prompt)}), and the first new token is predicted.`
      : `Step ${number(at) - prompt + 1}: keys and values of ${old} tokens come from the cache (${kb(old)}); those of “${token(at)}” are new (${kb(1)}).`;
  };
}

function reference() {
  const found = data.reference,
    svg = byId("kl");
  if (!found) return () => {};
  byId("reference").hidden = false;
  const kl = array(found.kl),
    p = array(found.p),
    own = array(data.next.p),
    top = array(data.next.ids),
    [, many] = top.shape,
    most = Math.max(...kl, 1e-9);
  (svg.setAttribute("viewBox", `0 0 ${W} 10`), svg.setAttribute("preserveAspectRatio", "none"));
  const rects = [...kl].map((value, place) => {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect"),
      tall = (10 * value) / most;
    for (const [name, size] of Object.entries({ x: place + 0.1, y: 10 - tall, width: 0.8, height: tall }))
      rect.setAttribute(name, size);
    rect.addEventListener("click", () => go(place));
    return rect;
  });
  svg.append(...rects);
  const mean = kl.reduce((a, b) => a + b, 0) / W;
  return () => {
    rects.forEach((rect, place) => rect.classList.toggle("now", place === at));
    bars(
      byId("both"),
      [...Array(Math.min(6, many)).keys()].map((i) => [
        shown(top[at * many + i]),
        own[at * many + i],
        p[at * many + i],
        top[at * many + i] === ids[at + 1],
      ]),
    );
    byId("kl-text").textContent =
      `Left: this model (${data.model.precision}); right: ${found.name}. KL divergence here ${kl[at].toExponential(1)} nats, mean ${mean.toExponential(1)}, largest ${most.toExponential(1)}.`;
  };
}

// --- the position --------------------------------------------------------------------------------------------------
const updates = [tokens(), embedding(), attention(), layers(), next(), sampler(), cache(), reference()];
function go(place) {
  at = Math.max(0, Math.min(last, place));
  byId("slider").value = at;
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
  for (const draw of redraws) draw();
}
byId("slider").max = last;
byId("slider").addEventListener("input", (event) => go(Number(event.target.value)));
byId("back").addEventListener("click", () => go(at - 1));
byId("forward").addEventListener("click", () => go(at + 1));
const { source, precision, calls, tokens: known, context } = data.model;
byId("facts").textContent =
  `${source}, ${precision}: ${calls} ${calls === 1 ? "layer" : "layers"} of attention, ${data.model.heads} ${data.model.heads === 1 ? "head" : "heads"} each, ` +
  `${known} known tokens, a context of ${context}. Prompt: ${prompt} tokens; output: ${first + W + 1 - prompt}${ended ? ", with the end token" : ""}.` +
  (first ? ` The last ${W} tokens are shown; ${first} earlier ones are left out (--last N shows more).` : "");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => go(at));
addEventListener("resize", () => redraws.forEach((draw) => draw()));
go(at);
