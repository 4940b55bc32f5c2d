// A matrix of numbers, by mouse, touch and keys.
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
