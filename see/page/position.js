// The slider, and what its moves change in every panel.
const updates = [tokens(), embedding(), attention(), layers(), next(), sampler(), cache(), reference()];
function go(place) {
  at = Math.max(0, Math.min(last, place));
  slider.value = `${at}`;
  const phase =
    number(at) < promptTokens
      ? "inside the prompt"
      : number(at) === promptTokens
        ? "the prompt is read; the first new token follows"
        : at === last && ended
          ? "the end token follows"
          : `${number(at) - promptTokens} of its own tokens read`;
  byId("where").textContent = `Read up to token ${number(at)}, “${token(at)}” (${phase}). Next: “${token(at + 1)}”`;
  for (const update of updates) update();
  redraw();
}
slider.max = `${last}`;
slider.addEventListener("input", () => go(slider.valueAsNumber));
byId("back").addEventListener("click", () => go(at - 1));
byId("forward").addEventListener("click", () => go(at + 1));
const { source, precision, calls, heads, tokens: known, context } = data.model;
const made = `${first + W + 1 - promptTokens}${ended ? ", with the end token" : ""}`;
byId("facts").textContent =
  `${source}, ${precision}: ${calls} ${calls === 1 ? "layer" : "layers"} of attention, ` +
  `${heads} ${heads === 1 ? "head" : "heads"} each, ${known} known tokens, a context of ${context}. ` +
  `Prompt: ${promptTokens} tokens; output: ${made}.` +
  (first ? ` The last ${W} tokens are shown; ${first} earlier ones are left out (--last N shows more).` : "");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => go(at));
addEventListener("resize", redraw);
go(at);
