// A panel draws what does not change, and returns what to do when the position moves.
function tokens() {
  const chips = [...ids].map((id, place) => {
    const chip = make("button", token(place), "chip");
    const bits = place ? surprise[place - 1] : null;
    chip.type = "button";
    chip.append(make("small", bits === null ? "given" : `${bits.toFixed(1)} bits`));
    chip.classList.toggle("own", number(place) > promptTokens);
    if (place) redraws.push(() => (chip.style.background = shade(theme.heat, Math.min(1, bits / 8) / 2)));
    chip.addEventListener("click", () => go(Math.min(place, last)));
    return chip;
  });
  byId("chips").append(...chips);
  return () => chips.forEach((chip, place) => chip.classList.toggle("now", place === at));
}
