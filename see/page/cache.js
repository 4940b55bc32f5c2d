function cache() {
  const slots = [...ids].slice(0, W).map((_, place) => make("span", token(place), "chip"));
  byId("slots").append(...slots);
  return () => {
    const filling = number(at) <= promptTokens;
    const old = filling ? 0 : number(at) - 1;
    const kb = (tokens) => `${((tokens * data.cache.bytes) / 1024).toFixed(1)} KiB`;
    const now = filling ? promptTokens : number(at);
    slots.forEach((slot, place) => {
      const state = number(place) > now ? "later" : number(place) <= old ? "old" : "new";
      slot.className = `chip ${state}`;
      slot.replaceChildren(token(place), make("small", { later: "not yet", old: "cached", new: "new" }[state]));
    });
    byId("cache-text").textContent = filling
      ? `Step 1, the prefill: keys and values of all ${promptTokens} tokens of the prompt are computed at once ` +
        `(${kb(promptTokens)}), and the first new token is predicted.`
      : `Step ${number(at) - promptTokens + 1}: keys and values of ${old} tokens come from the cache (${kb(old)}); ` +
        `those of “${token(at)}” are new (${kb(1)}).`;
  };
}
