// What happens when: loading, tabs, pointing, keys, search.

let pinned = -1;

function summarise() {
  const { facts } = report;
  document.title = `${facts.document} \u2013 what the memory does`;
  element("title").textContent = visible(facts.document);
  const step = facts.step === null ? "" : ` at step ${count(facts.step)}`;
  const layers = `${facts.layers} layers, memory in ${facts.memoryLayers.length > 1 ? "layers" : "layer"} ${facts.memoryLayers.join(", ")}`;
  element("origin").textContent = `${visible(facts.checkpoint)}${step} \u00b7 ${layers} \u00b7 ${facts.heads} heads \u00b7 top ${facts.topK} \u00b7 segments of ${count(facts.segment)} \u00b7 XL cache ${facts.xlCache ? count(facts.xlCache) : "off"}`;
  element("origin").title = element("origin").textContent;
  const [before, after] = [compared.base, compared.reading].map((name) => facts.readings.find((one) => one.name === name));
  const list = element("summary");
  list.replaceChildren();
  const add = (name, ...content) => {
    const tile = make("div");
    const value = make("dd");
    value.append(...content);
    tile.append(make("dt", "", name), value);
    list.append(tile);
  };
  const change = (was, is, digits) => {
    const less = is <= was;
    const ratio = `${less ? "\u2212" : "+"}${Math.abs(100 * (1 - is / was)).toFixed(1)}\u2009%`;
    return [make("span", "was", `${was.toFixed(digits)} \u2192 `), is.toFixed(digits), " ", make("span", less ? "better" : "worse", ratio)];
  };
  add("perplexity", ...change(before.perplexity, after.perplexity, 2));
  add("bits per byte", ...change(before.bits_per_byte, after.bits_per_byte, 3));
  add("memory", make("span", "was", `${before.size ? count(before.size) : "off"} \u2192 `), count(after.size));
  add("tokens", count(facts.length));
}

function tellHeads() {
  const { facts } = report;
  element("chance").textContent = percent(facts.chance);
  element("help-k").textContent = facts.topK;
  element("help-top").textContent = facts.top;
  const learned = facts.combine === "gate";
  const caption = element("gates-caption");
  caption.replaceChildren(make("b", "", learned ? "Gate per head." : "Share per head."), learned
    ? " The learned share of the memory in each head's output; the rest comes from local attention. The dashed line is one half."
    : ` The share of the memory in each head's output (combine: ${facts.combine}), where something was found: mean, and the range from the 10th to the 90th percentile.`);
  element("heads").append(...facts.headUse.map((use) => {
    const row = make("tr");
    for (const text of [use.layer, use.head]) row.append(make("td", "", String(text)));
    for (const share of [use.share, use.onTarget, use.beforeTarget]) row.append(make("td", "number", percent(share)));
    return row;
  }));
}

function tellColours() {
  const swatch = (name, title) => {
    const made = make("i", name);
    made.title = title;
    return made;
  };
  const steps = LEVELS.map((bits, index) => [index + 1, `${bits} bits and more`]);
  element("legend").append(
    make("span", "", `hurt \u2212${LEVELS.at(-1)}`),
    ...steps.map(([level, title]) => swatch(`h${level}`, `lost ${title}`)).reverse(),
    swatch("", "no difference"),
    ...steps.map(([level, title]) => swatch(`g${level}`, `gained ${title}`)),
    make("span", "", `+${LEVELS.at(-1)} bits helped`),
  );
}

function offerComparisons() {
  const names = report.facts.readings.map((one) => one.name);
  const pairs = names.flatMap((base, i) => names.slice(i + 1).map((reading) => [base, reading]));
  const box = element("compare").querySelector("select");
  box.append(...pairs.map(([base, reading]) => {
    const option = make("option", "", `${base} \u2192 ${reading}`);
    option.value = `${base} ${reading}`;
    return option;
  }));
  const first = pairs.find(([base, reading]) => base === "off" && reading === names.at(-1));
  box.value = first.join(" ");
  element("compare").hidden = pairs.length < 2;
  compare(...first);
  box.addEventListener("change", () => {
    compare(...box.value.split(" "));
    recolour();
    summarise();
    measureOverview();
    ranking.order = [];
    if (!element("view-table").hidden) rank();
    showToken(pinned);
  });
}

function openView(name) {
  for (const view of document.querySelectorAll(".view")) view.hidden = view.id !== `view-${name}`;
  for (const tab of document.querySelectorAll(".tabs button")) tab.ariaSelected = String(tab.dataset.view === name);
  if (name === "table" && !ranking.order.length) rank();
  drawOverview();
}

/** Keep a token: mark it and what was retrieved for it, and show both. */
function pin(token, { follow = true } = {}) {
  pinned = token;
  element("back").hidden = true;
  const hits = token > 0 ? placesFor(token).map(({ position }) => position) : [];
  remark({ selected: token, hits: new Set(hits) });
  showToken(token);
  try {
    history.replaceState(null, "", token < 0 ? "#" : `#token=${token}`);
  } catch {
    // Some browsers refuse this for files; the page works without.
  }
  if (token >= 0 && follow) reveal(token, { always: false });
}

/** Go to a place without letting go of the token that is kept. */
function visit(position) {
  openView("text");
  reveal(position, { flash: true });
  const back = element("back");
  back.hidden = pinned < 0;
  back.textContent = `\u21a9 back to token ${count(pinned)}`;
}

function step(by) {
  if (pinned < 0) pin(Math.max(1, Math.ceil(shownTokens()[0])));
  else pin(Math.min(report.facts.length - 1, Math.max(0, pinned + by)));
}

/** The token nearest to the one kept on the line above or below. */
function stepLine(by) {
  if (pinned < 0) return step(0);
  reveal(pinned, { always: false });
  const from = nodeOf(pinned).getClientRects()[0];
  let best = -1;
  let nearest = Infinity;
  let line = null;
  for (let token = pinned + by; token >= 0 && token < report.facts.length && Math.abs(token - pinned) < 600; token += by) {
    fill(chunkOf(token));
    const box = nodeOf(token).getClientRects()[0];
    if (!box || Math.abs(box.top - from.top) < 4) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > 4) break;
    const away = Math.abs(box.left - from.left);
    if (away < nearest) [best, nearest] = [token, away];
  }
  if (best >= 0) pin(best);
}

function stepGain(by) {
  const from = pinned < 0 ? Math.ceil(shownTokens()[0]) : pinned;
  for (let token = from + by; token > 0 && token < report.facts.length; token += by) {
    if (compared.gains[token] >= 3) {
      pin(token, { follow: false });
      return reveal(token, { always: false });
    }
  }
}

const search = { places: [], at: -1 };
const MOST_FOUND = 10000;

function find(wanted) {
  search.places = [];
  search.at = -1;
  const found = new Set();
  if (wanted) {
    const pattern = new RegExp(wanted.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "giu");
    for (const match of report.text.matchAll(pattern)) {
      const [first, last] = [tokenAt(match.index), tokenAt(match.index + match[0].length - 1)];
      for (let token = first; token <= last; token++) found.add(token);
      search.places.push(first);
      if (search.places.length === MOST_FOUND) break;
    }
  }
  remark({ found });
  element("found").textContent = wanted ? `${count(search.places.length)} found` : "";
}

function goFound(by) {
  const { places } = search;
  if (!places.length) return;
  search.at = (search.at + by + places.length) % places.length;
  if (search.at < 0) search.at = places.length - 1;
  element("found").textContent = `${count(search.at + 1)} / ${count(places.length)}`;
  openView("text");
  pin(places[search.at], { follow: false });
  reveal(places[search.at]);
}

const KEYS = {
  ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowDown: () => stepLine(1), ArrowUp: () => stepLine(-1),
  n: () => stepGain(1), p: () => stepGain(-1), Escape: () => pin(-1), "/": () => element("search").focus(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest?.("input, select")) {
    if (event.key === "Escape") element("text").focus();
    return;
  }
  const scrolls = element("view-text").hidden && event.key.startsWith("Arrow");
  if (!report.facts || scrolls || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
}

function listen() {
  const pane = element("text");
  const tokenOf = (event) => {
    const node = event.target.closest?.("[data-token]");
    return node ? Number(node.dataset.token) : -1;
  };
  pane.addEventListener("pointerover", (event) => tokenOf(event) >= 0 && showToken(tokenOf(event)));
  pane.addEventListener("pointerleave", () => showToken(pinned));
  pane.addEventListener("click", (event) => tokenOf(event) >= 0 && pin(tokenOf(event), { follow: false }));
  let drawing = false;
  pane.addEventListener("scroll", () => {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => {
      drawing = false;
      drawOverview();
    });
  }, { passive: true });
  element("panel").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.step) step(Number(button.dataset.step));
    else if (button?.dataset.position) {
      if (pinned < 0) pin(Number(element("panel").dataset.token), { follow: false });
      visit(Number(button.dataset.position));
    }
  });
  element("back").addEventListener("click", () => {
    element("back").hidden = true;
    reveal(pinned, { flash: true });
  });
  element("rows").addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    for (const other of element("rows").children) other.classList.toggle("current", other === row);
    pin(Number(row.dataset.token), { follow: false });
    if (event.target.closest("button")) {
      openView("text");
      reveal(pinned);
    }
  });
  element("more").addEventListener("click", moreRows);
  element("direction").addEventListener("click", (event) => {
    if (!event.target.dataset.sign) return;
    for (const button of element("direction").children) button.ariaPressed = String(button === event.target);
    ranking.sign = Number(event.target.dataset.sign);
    rank();
  });
  document.querySelector(".tabs").addEventListener("click", (event) => {
    const view = event.target.dataset.view;
    if (!view) return;
    openView(view);
    if (view === "text" && pinned >= 0) reveal(pinned, { always: false });
  });
  element("overview").addEventListener("click", (event) => {
    const frame = element("overview").getBoundingClientRect();
    openView("text");
    reveal(Math.floor(((event.clientX - frame.left) / frame.width) * (report.facts.length - 1)));
  });
  element("search").addEventListener("input", (event) => find(event.target.value));
  element("search").addEventListener("keydown", (event) => event.key === "Enter" && goFound(event.shiftKey ? -1 : 1));
  window.addEventListener("keydown", onKey);
  window.addEventListener("resize", measureOverview);
  window.addEventListener("hashchange", fromAddress);
}

function fromAddress() {
  const match = /^#token=(\d+)$/.exec(location.hash);
  const token = match ? Number(match[1]) : -1;
  if (token >= 0 && token < report.facts.length && token !== pinned) {
    pin(token, { follow: false });
    reveal(token);
  }
}

function chooseTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const show = (dark) => {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    if (compared.gains) drawOverview();
  };
  show(system.matches);
  system.addEventListener("change", () => show(system.matches));
  element("theme").addEventListener("click", () => show(document.documentElement.dataset.theme !== "dark"));
  element("face").addEventListener("click", () => {
    const token = pinned < 0 ? Math.ceil(shownTokens()[0]) : pinned;
    element("text").classList.toggle("prose-face");
    reveal(token);
  });
}

async function start() {
  chooseTheme();
  if (!("DecompressionStream" in window)) {
    element("title").textContent = "This page needs a browser of 2023 or newer.";
    return;
  }
  await load();
  offerComparisons();
  summarise();
  tellHeads();
  tellColours();
  layOut();
  listen();
  measureOverview();
  showToken(-1);
  fromAddress();
  document.documentElement.dataset.ready = "true";
}

start();
