/** @typedef {{ text: string, share: number, other?: number, came?: boolean }} Bar `other`: a second bar */

/** @type {(list: HTMLElement, items: Bar[]) => void} */
function bars(list, items) {
  const bar = (share, kind) => {
    const [track, fill] = [make("span", "", "track"), make("span", "", kind)];
    fill.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
    track.append(fill);
    return [track, make("span", percent(share), "value")];
  };
  list.replaceChildren(
    ...items.map(({ text, share, other, came }) => {
      const item = make("li", "", came ? "came" : "");
      item.append(make("code", text), ...bar(share, "fill"));
      if (other !== undefined) item.append(...bar(other, "fill two"));
      return item;
    }),
  );
}
