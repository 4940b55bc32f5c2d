// Markdown -> elements of the page. Text becomes text nodes only, so that no HTML of a model is ever read.

/**
 * Patterns of what is inside a line, and how it is shown. What begins first is read first.
 * @type {[RegExp, (match: RegExpExecArray) => Node][]}
 */
const RULES = [
  [/(`+)(.+?)\1(?!`)/, ([, , text]) => element("code", text.replace(/^ (.*) $/, "$1"))],
  [/\*\*(?=\S)(.+?)(?<=\S)\*\*|(?<!\w)__(?=\S)(.+?)(?<=\S)__(?!\w)/, ([, a, b]) => inside("strong", a ?? b)],
  [/\*(?=\S)([^*]+?)(?<=\S)\*|(?<!\w)_(?=\S)([^_]+?)(?<=\S)_(?!\w)/, ([, a, b]) => inside("em", a ?? b)],
  [/~~(?=\S)(.+?)(?<=\S)~~/, ([, text]) => inside("del", text)],
  [/\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/, ([, text, address]) => link(text, address)],
];

function element(name, text = "") {
  const made = document.createElement(name);
  made.append(text);
  return made;
}

function inside(name, text) {
  const made = element(name);
  made.append(...inline(text));
  return made;
}

function link(text, address) {
  const made = inside("a", text);
  Object.assign(made, { href: address, target: "_blank", rel: "noopener noreferrer", title: address });
  return made;
}

/** The text of a line or paragraph: nodes. */
function inline(text) {
  const nodes = [];
  while (text) {
    const found = RULES.map(([pattern, show]) => ({ match: pattern.exec(text), show }))
      .filter(({ match }) => match)
      .sort((a, b) => a.match.index - b.match.index)[0];
    if (!found) break;
    const { match, show } = found;
    nodes.push(text.slice(0, match.index), show(match));
    text = text.slice(match.index + match[0].length);
  }
  return [...nodes, text];
}

const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULER = /^\s{0,3}([-*_])\s*(\1\s*){2,}$/;
const TABLE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const cells = (line) =>
  line
    .trim()
    .replace(/^\||\|$/g, "")
    .split("|")
    .map((cell) => cell.trim());
const begins = (line) => [FENCE, ITEM, HEADING, RULER, /^\s*>/].some((pattern) => pattern.test(line));

function code(lines) {
  const [, fence] = FENCE.exec(lines.shift());
  const text = [];
  while (lines.length && !lines[0].trim().startsWith(fence)) text.push(lines.shift());
  lines.shift(); // the end, which is still missing while a text is written
  const made = element("pre");
  made.tabIndex = 0; // it scrolls sideways
  made.append(element("code", text.join("\n")));
  return made;
}

/** A list with the lists in it: items that are indented further. */
function list(lines) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const made = element(/\d/.test(mark) ? "ol" : "ul");
  if (/\d/.test(mark)) made.setAttribute("start", `${parseInt(mark, 10)}`);
  while (lines.length) {
    const item = ITEM.exec(lines[0]);
    if (!item || item[1].length < indent.length || RULER.test(lines[0])) break;
    lines.shift();
    const body = [item[3]];
    const deeper = (line) => /^\s+\S/.test(line) && line.search(/\S/) > indent.length;
    while (lines.length && (deeper(lines[0]) || (!lines[0].trim() && lines[1] && deeper(lines[1])))) {
      body.push(lines.shift().slice(indent.length + 2));
    }
    while (lines.length > 1 && !lines[0].trim() && ITEM.test(lines[1])) lines.shift();
    const entry = element("li");
    const [first, ...more] = blocks(body);
    entry.append(...(first?.tagName === "P" ? first.childNodes : first ? [first] : []), ...more);
    made.append(entry);
  }
  return made;
}

function table(lines) {
  const [head, rows] = [cells(lines.shift()), []];
  lines.shift();
  while (lines.length && lines[0].includes("|")) rows.push(cells(lines.shift()));
  const made = element("table");
  for (const [kind, row] of [["th", head], ...rows.map((each) => ["td", each])]) {
    const line = made.appendChild(element("tr"));
    line.append(...head.map((_, place) => inside(/** @type {string} */ (kind), row[place] ?? "")));
  }
  return made;
}

function blocks(lines) {
  const made = [];
  while (lines.length) {
    const line = lines[0];
    if (!line.trim()) lines.shift();
    else if (FENCE.test(line)) made.push(code(lines));
    else if (RULER.test(line)) (made.push(element("hr")), lines.shift());
    else if (HEADING.test(line)) {
      const [, marks, text] = HEADING.exec(lines.shift());
      made.push(inside(`h${Math.min(marks.length + 2, 6)}`, text)); // h1 and h2 are the page's
    } else if (/^\s*>/.test(line)) {
      const quoted = [];
      while (lines.length && /^\s*>/.test(lines[0])) quoted.push(lines.shift().replace(/^\s*> ?/, ""));
      const quote = element("blockquote");
      quote.append(...blocks(quoted));
      made.push(quote);
    } else if (ITEM.test(line)) made.push(list(lines));
    else if (line.includes("|") && lines[1]?.includes("-") && TABLE.test(lines[1])) made.push(table(lines));
    else {
      const text = [lines.shift()];
      while (lines.length && lines[0].trim() && !begins(lines[0])) text.push(lines.shift());
      made.push(inside("p", text.join("\n")));
    }
  }
  return made;
}

/** The elements of a Markdown text, also of one that is still being written. */
export const markdown = (text) => blocks(text.split("\n"));
