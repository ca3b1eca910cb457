// The side panel: one token, and what every head retrieved to predict it.

/** Figures of a token: the gain, and loss and probability before and after. */
function figuresOf(token) {
  const [before, after] = [report.bits[compared.base][token], report.bits[compared.reading][token]];
  const gain = compared.gains[token];
  const list = make("dl", "figures");
  const add = (name, ...content) => {
    const value = make("dd");
    value.append(...content);
    list.append(make("dt", "", name), value);
  };
  add("gain", make("span", `gain ${colourOf(gain)}`, `${signed(gain)} bits`));
  add("loss, bits", make("span", "was", `${before.toFixed(2)} \u2192 `), after.toFixed(2));
  add("probability", make("span", "was", `${percent(2 ** -before)} \u2192 `), percent(2 ** -after));
  return list;
}

function placeButton(place, token, share) {
  const button = make("button", "place");
  button.type = "button";
  button.dataset.position = place.position;
  button.title = "Go there";
  const weight = make("div", "weight", percent(place.weight));
  weight.append(bar(place.weight));
  const right = make("div");
  right.append(placeContext(place.position, token));
  const where = `at ${count(place.position)} \u00b7 ${count(place.distance)} tokens back`;
  right.append(make("span", "where", where));
  button.append(weight, right);
  if (share < 0.02) button.classList.add("faded");
  return button;
}

function headSection({ layer, head, share, places }, token) {
  const section = make("section");
  section.dataset.layer = layer;
  section.dataset.head = head;
  const title = make("div", "head", `layer ${layer} \u00b7 head ${head}`);
  title.append(bar(share), make("em", "", `memory ${percent(share)}`));
  section.append(title, ...places.map((place) => placeButton(place, token, share)));
  return section;
}

/** What was copied: the token that followed the latest of the longest repetitions. */
function copySection({ weight, place }, token) {
  const section = make("section", "copies");
  const title = make("div", "head", "copied");
  title.append(bar(weight), make("em", "", `${percent(weight)} of the prediction`));
  section.append(title);
  if (place) section.append(placeButton(place, token, 1));
  return section;
}

function emptyReason(token) {
  const { segment, kept, length } = report.facts;
  if (token === 0) return "Nothing predicts the first token.";
  if (token <= segment) return "Nothing was retrieved: in the first segment the memory is still empty.";
  if (kept < length) {
    return "What was retrieved for this token is not in the page, which would be too large; tokens.jsonl has it.";
  }
  return "Nothing was retrieved.";
}

/** Show a token, or how to begin. */
function showToken(token) {
  const panel = element("panel");
  overview.token = token;
  overview.places = [];
  if (token < 0) {
    panel.replaceChildren(make("p", "empty", "Point at a token to see what each head retrieved to predict it. Click to keep it; the arrow keys go from token to token."));
    drawOverview();
    return;
  }
  const head = make("div", "token-head");
  const place = make("div", "where", `token ${count(token)} \u00b7 id ${count(report.ids[token])}`);
  const steps = make("div", "steps");
  for (const [step, sign, title] of [[-1, "\u2190", "The token before"], [1, "\u2192", "The next token"]]) {
    const button = make("button", "", sign);
    button.type = "button";
    button.title = title;
    button.dataset.step = step;
    steps.append(button);
  }
  head.append(make("span", "chip", alone(token)), place, steps);
  const context = contextOf(token, 100, 40, (other) => (other === token ? "target" : ""));
  context.classList.add("token-context");
  const shown = [head];
  if (token > 0) shown.push(figuresOf(token));
  shown.push(context);
  const heads = retrievedFor(token).filter(({ places }) => places.length);
  heads.sort((a, b) => a.layer - b.layer || b.share - a.share);
  const copies = token > 0 ? copiesFor(token) : null;
  if (copies) shown.push(copySection(copies, token));
  for (const one of heads) shown.push(headSection(one, token));
  if (!heads.length) shown.push(make("p", "empty", emptyReason(token)));
  panel.replaceChildren(...shown);
  panel.dataset.token = token;
  overview.places = heads.length ? placesFor(token) : [];
  drawOverview();
}
