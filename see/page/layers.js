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
  // The first place whose best guess is the final one.
  const best = ({ ids: likeliest }) => likeliest[at * likeliest.shape[1]];
  const lead = () => kept.findIndex((one) => best(one) === best(kept[kept.length - 1]));
  matrix(canvasOf("lens"), byId("lens-out"), {
    rows: kept.length,
    columns: W,
    height: Math.max(6, Math.min(20, 300 / kept.length)),
    rowNames: (row) => (kept[row].place ? `layer ${kept[row].place}` : "before"),
    columnNames: (column) => token(column + 1),
    value: (row, column) => kept[row].next[column],
    label: "Probability of the token that came next, a row for each layer and a column for each position",
    marked: { row: lead, column: () => at, choose: (_, column) => column },
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
  let folded = kept.length > 12; // the middle of a deep model
  const fold = (many) => {
    const [row, cell, button] = [make("tr"), make("td"), make("button", `${many} more layers`)];
    button.type = "button";
    button.addEventListener("click", () => {
      folded = false;
      update();
    });
    cell.colSpan = 4;
    cell.append(button);
    row.append(cell);
    return row;
  };
  const update = () => {
    const rows = [];
    let hidden = 0;
    kept.forEach((one, place) => {
      const near = Math.min(place, kept.length - 1 - place) < 3 || Math.abs(place - lead()) < 2;
      if (folded && !near) {
        hidden++;
        return;
      }
      if (hidden) rows.push(fold(hidden));
      hidden = 0;
      rows.push(guesses(one));
      if (place === lead()) rows[rows.length - 1].className = "first";
    });
    body.replaceChildren(...rows);
  };
  return update;
}
