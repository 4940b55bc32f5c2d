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
