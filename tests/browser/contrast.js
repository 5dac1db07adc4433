// The contrast of every text in an element with what is behind it, after WCAG 2.1: [{text, ratio}, ...].
(root) => {
  const rgba = (css) => { const [r, g, b, a = 1] = css.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
  const mix = (below, above, share) => [0, 1, 2].map((i) => below[i] + (above[i] - below[i]) * share);
  const over = (below, css) => mix(below, rgba(css), rgba(css)[3]);
  const luminance = (color) => {
    const [r, g, b] = color.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  // [text, background] as painted over `below` by the last element of the chain, from the outermost in.
  const painted = ([element, ...inner], below) => {
    const style = getComputedStyle(element);
    const back = over(below, style.backgroundColor);
    const text = over(back, element instanceof SVGElement ? style.fill : style.color);
    const both = inner.length ? painted(inner, back) : [text, back];
    return both.map((color) => mix(below, color, Number(style.opacity)));
  };
  const chain = (element) => (element ? [...chain(element.parentElement), element] : []);
  const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const found = [];
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim();
    const element = texts.currentNode.parentElement;
    if (!text || !element.getClientRects().length) continue;
    const [light, dark] = painted(chain(element), [255, 255, 255]).map(luminance).sort((a, b) => b - a);
    found.push({ text, ratio: (light + 0.05) / (dark + 0.05) });
  }
  return found;
}
