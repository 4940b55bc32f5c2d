function attention() {
  const { calls, heads, weights, error, sums } = data.attention;
  const { low, high, columns } = weights;
  const codes = array(weights.codes);
  const size = codes.shape[2]; // of a head's triangle, row after row
  const more = columns - W; // 1 with a column of earlier tokens
  const [call, head] = ["call", "head"].map(selectOf);
  const root = (row, column, of = head.selectedIndex) => {
    if (column > row + more) return null;
    const triangle = (call.selectedIndex * heads.length + of) * size;
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
        : `“${token(row)}” reads ${percent(weight(row, column))} from “${seen(column)}”`,
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
  // An overview: every head of the layer, as small as its weights are pixels.
  const small = heads.length > 1 ? heads.map((place) => ({ place, button: make("button", "", "head") })) : [];
  for (const [index, { place, button }] of small.entries()) {
    const picture = Object.assign(make("canvas"), { width: columns, height: W });
    button.type = "button";
    button.setAttribute("aria-label", `Head ${place + 1}`);
    button.append(picture, make("small", `${place + 1}`));
    button.addEventListener("click", () => {
      head.selectedIndex = index;
      redraw();
      update();
    });
    let drawn = "";
    redraws.push(() => {
      button.classList.toggle("now", index === head.selectedIndex);
      const wanted = `${call.selectedIndex} ${theme.heat}`;
      if (wanted === drawn) return;
      drawn = wanted;
      const pen = picture.getContext("2d");
      pen.clearRect(0, 0, columns, W);
      for (let row = 0; row < W; row++)
        for (let column = 0; column <= row + more; column++) {
          pen.fillStyle = shade(theme.heat, 0.06 + 0.94 * Math.abs(root(row, column, index)));
          pen.fillRect(column, row, 1, 1);
        }
    });
  }
  byId("heads").append(...small.map(({ button }) => button));
  for (const choice of [call, head])
    choice.addEventListener("change", () => {
      redraw();
      update();
    });
  return update;
}
