function embedding() {
  const found = data.embedding;
  if (!found) {
    byId("embedding").hidden = true;
    return () => {};
  }
  const names = {
    word: "Word embedding: the same for a token at every place",
    position: "Position encoding: the same for a place, whatever token is there",
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
