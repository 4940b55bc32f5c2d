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
    const whose = number(at) < promptTokens ? "In the prompt" : "The model chose";
    byId("came").textContent = `${whose}: “${token(at + 1)}”, ${chance}.`;
  };
}
