function sampler() {
  const { settings, example, at: steps } = data.sampler;
  const words = Object.entries(settings)
    .map(([name, value]) => `${spaced(name)} ${value}`)
    .join(", ");
  byId("sampler-note").textContent = example
    ? "This text has the likeliest token each time (temperature 0), and needs no other step. " +
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
