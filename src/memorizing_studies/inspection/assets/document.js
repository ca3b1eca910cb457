// The coloured text. Only chunks near the window hold elements, so that a document of any length
// costs what the window shows.

const CHUNK = 256;
const LONG_LINE = 1024;
const LONGEST_CHUNK = 1536;
const chunks = [];
const marks = { selected: -1, hits: new Set(), found: new Set() };
let watcher = null;

/** Cut the document behind line ends, or behind blanks where lines are long.
 *
 * A token that goes on behind its line end, as indentation does, is shown in two parts: the second
 * one leads the next chunk.
 */
function cut() {
  const { length } = report.facts;
  let first = 0;
  for (let token = 0; token < length; token++) {
    const size = token + 1 - first;
    const last = token === length - 1;
    if (size < CHUNK && !last) continue;
    const piece = pieceOf(token);
    const blank = size >= LONG_LINE && /\s$/.test(piece);
    if (last || piece.includes("\n") || blank || size >= LONGEST_CHUNK) {
      chunks.push({ first, end: token + 1, node: null, full: false });
      first = token + 1;
    }
  }
}

/** Where a token's second part begins, if a chunk ends within it; else its length. */
function splitOf(token, chunk) {
  const piece = pieceOf(token);
  const lineEnd = piece.lastIndexOf("\n") + 1;
  return token === chunk.end - 1 && lineEnd && token < report.facts.length - 1 ? lineEnd : piece.length;
}

/** Whether a chunk is led by the second part of the token before it. */
function isLed(chunk) {
  if (chunk.first === 0) return false;
  const before = chunk.first - 1;
  return splitOf(before, { end: chunk.first }) < pieceOf(before).length;
}

/** Pixels that a chunk will take, before it was ever drawn. */
function guess(chunk, columns, lineHeight) {
  const lines = report.text.slice(report.starts[chunk.first], report.starts[chunk.end]).split("\n");
  if (lines.length > 1 && lines.at(-1) === "") lines.pop();
  const rows = lines.reduce((sum, line) => sum + Math.max(1, Math.ceil((line.length + 1) / columns)), 0);
  return rows * lineHeight;
}

function layOut() {
  const pane = element("text");
  cut();
  const ruler = make("div", "chunk", "0".repeat(100));
  ruler.style.display = "inline-block";
  ruler.style.whiteSpace = "pre";
  pane.append(ruler);
  const style = getComputedStyle(ruler);
  const width = (ruler.clientWidth - parseFloat(style.paddingLeft)) / 100;
  const lineHeight = parseFloat(style.lineHeight);
  const columns = Math.max(20, Math.floor((pane.clientWidth - 24 - parseFloat(style.paddingLeft)) / width));
  ruler.remove();
  watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const chunk = chunks[Number(entry.target.dataset.chunk)];
        if (entry.isIntersecting) fill(chunk);
        else empty(chunk);
      }
    },
    { root: pane, rootMargin: "900px 0px" },
  );
  const all = document.createDocumentFragment();
  chunks.forEach((chunk, index) => {
    chunk.node = make("div", "chunk");
    chunk.node.dataset.chunk = index;
    chunk.node.dataset.from = count(chunk.first);
    chunk.node.style.height = `${guess(chunk, columns, lineHeight)}px`;
    all.append(chunk.node);
  });
  pane.append(all);
  for (const chunk of chunks) watcher.observe(chunk.node);
}

function classesOf(token) {
  const names = ["t"];
  const colour = colourOf(compared.gains[token]);
  if (colour) names.push(colour);
  if (token === marks.selected) names.push("sel");
  if (marks.hits.has(token)) names.push("hit");
  if (marks.found.has(token)) names.push("found");
  if (!pieceOf(token)) names.push("sign");
  return names.join(" ");
}

function fill(chunk) {
  if (chunk.full) return;
  chunk.full = true;
  const all = document.createDocumentFragment();
  const add = (token, from, to) => {
    const node = make("span", classesOf(token), inText(pieceOf(token).slice(from, to)));
    node.dataset.token = token;
    all.append(node);
  };
  const before = chunk.first - 1;
  if (isLed(chunk)) add(before, splitOf(before, { end: chunk.first }));
  for (let token = chunk.first; token < chunk.end; token++) add(token, 0, splitOf(token, chunk));
  chunk.node.replaceChildren(all);
  chunk.node.style.height = "";
}

function empty(chunk) {
  if (!chunk.full) return;
  chunk.full = false;
  chunk.node.style.height = `${chunk.node.getBoundingClientRect().height}px`;
  chunk.node.replaceChildren();
}

function chunkOf(token) {
  let low = 0;
  let high = chunks.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (chunks[middle].first <= token) low = middle;
    else high = middle;
  }
  return chunks[low];
}

/** The element of a token, or null where it is not drawn. */
const nodeOf = (token) => nodesOf(token)[0] ?? null;

/** The elements of a token that are drawn: two where a chunk ends within it. */
function nodesOf(token) {
  const chunk = chunkOf(token);
  const nodes = chunk.full ? [chunk.node.children[token - chunk.first + isLed(chunk)]] : [];
  const next = token === chunk.end - 1 && token + 1 < report.facts.length ? chunkOf(token + 1) : null;
  if (next?.full && isLed(next)) nodes.push(next.node.firstElementChild);
  return nodes;
}

/** Mark tokens anew: the selected one, those that were retrieved for it, those that were found. */
function remark(change) {
  const marked = (marks) => [marks.selected ?? -1, ...(marks.hits ?? []), ...(marks.found ?? [])];
  const before = Object.fromEntries(Object.keys(change).map((name) => [name, marks[name]]));
  Object.assign(marks, change);
  for (const token of new Set([...marked(before), ...marked(change)])) {
    if (token >= 0) for (const node of nodesOf(token)) node.className = classesOf(token);
  }
}

/** Colour everything anew. */
function recolour() {
  for (const chunk of chunks) {
    for (const node of chunk.node.children) node.className = classesOf(Number(node.dataset.token));
  }
}

/** Bring a token into the window, in its middle unless it is there already. */
function reveal(token, { always = true, flash = false } = {}) {
  const pane = element("text");
  fill(chunkOf(token));
  const settle = (again) => {
    const [box, frame] = [nodeOf(token).getBoundingClientRect(), pane.getBoundingClientRect()];
    const inside = box.top >= frame.top + 8 && box.bottom <= frame.bottom - 8;
    if (always || !inside) pane.scrollTop += box.top - frame.top - 0.42 * frame.height;
    // Chunks around it are drawn only now, and may be taller than was guessed.
    if (again) requestAnimationFrame(() => nodeOf(token) && settle(again - 1));
  };
  settle(3);
  if (flash) {
    const node = nodeOf(token);
    node.classList.remove("flash");
    node.getBoundingClientRect();
    node.classList.add("flash");
  }
}
