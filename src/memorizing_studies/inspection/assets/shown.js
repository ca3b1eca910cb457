// How tokens and numbers look. All text goes into the page as text, never as markup.

const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffc\u{1d173}-\u{1d17a}\u{e0000}-\u{e0fff}]/gu;

/** What stands for a character that is invisible, or that would rule over its neighbours. */
function symbolOf(char) {
  if (char === "\r") return "\u2190";
  return `\u2039U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u203a`;
}

const visible = (text) => text.replace(HIDDEN, symbolOf);

/** A token's text within the document: line breaks stay, with a sign in front. */
const inText = (piece) => visible(piece).replace(/\n/g, "\u21b5\n") || "\u00b7";

/** A token in one line. */
function inLine(token) {
  const piece = pieceOf(token);
  if (!piece) return `\u2039${report.facts.names[report.ids[token]] ?? ""}\u203a`;
  return visible(piece).replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");
}

const blanks = (run) => (run.length > 3 ? `\u2423\u00d7${run.length}` : "\u2423".repeat(run.length));

/** A token in a frame: where blanks are all that it has, they are counted. */
const framed = (token) => inLine(token).replace(/ {4,}|^ +$/g, blanks);

/** A token alone, its blanks made visible. */
const alone = (token) => inLine(token).replace(/ +/g, blanks);

function make(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
}

/** The text around a token, as an element; `mark` returns the class of a token or "". */
function contextOf(token, before, after, mark) {
  const context = make("div", "context");
  let first = token;
  let last = token;
  const room = (from, to) => report.starts[to] - report.starts[from];
  while (first > 0 && room(first - 1, token) <= before) first--;
  while (last < report.facts.length - 1 && room(token + 1, last + 2) <= after) last++;
  // The token after a retrieved one belongs to what was retrieved, however long it is.
  if (last === token && last < report.facts.length - 1) last++;
  let plain = first > 0 ? "\u2026" : "";
  const flush = () => {
    if (plain) context.append(make("span", "", plain.replace(/ {3,}/g, "  ")));
    plain = "";
  };
  for (let i = first; i <= last; i++) {
    const name = mark(i);
    if (name) {
      flush();
      context.append(make("span", name, framed(i)));
    } else plain += inLine(i);
  }
  if (last < report.facts.length - 1) plain += "\u2026";
  flush();
  return context;
}

/** The context of a retrieved pair: its token framed, the one after it underlined. */
function placeContext(position, predicted, before = 44, after = 32) {
  const same = (token) => (report.ids[token] === report.ids[predicted] ? " same" : "");
  return contextOf(position, before, after, (token) => {
    if (token === position) return `pair${same(token)}`;
    return token === position + 1 ? `after${same(token)}` : "";
  });
}

const LEVELS = [0.2, 0.5, 1, 2, 3.5, 5];

/** The class that colours a gain in bits: g1 to g6 where the memory helped, h1 to h6 where not. */
function colourOf(gain) {
  const size = Math.abs(gain);
  let level = 0;
  while (level < LEVELS.length && size >= LEVELS[level]) level++;
  return level ? `${gain > 0 ? "g" : "h"}${level}` : "";
}

const count = (number) => number.toLocaleString("en-US");
const signed = (number, digits = 2) => `${number < 0 ? "\u2212" : "+"}${Math.abs(number).toFixed(digits)}`;

function percent(share) {
  const digits = share >= 0.1 || share === 0 ? 0 : share >= 0.001 ? 1 : 3;
  return `${(100 * share).toFixed(digits)}\u2009%`;
}

function bar(share) {
  const outer = make("div", "bar");
  const inner = make("i");
  inner.style.width = `${100 * Math.min(1, share)}%`;
  outer.append(inner);
  return outer;
}
