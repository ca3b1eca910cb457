// The tokens that gained or lost most, with what was retrieved for them: token, index, retrieved
// context, as in the tables of the paper.

const PAGE_OF_ROWS = 50;
const ranking = { sign: 1, order: [], shown: 0 };

function rank() {
  const { gains } = compared;
  const tokens = Array.from(gains.keys()).slice(1);
  ranking.order = tokens.filter((token) => ranking.sign * gains[token] > 0.1);
  ranking.order.sort((a, b) => ranking.sign * (gains[b] - gains[a]));
  ranking.shown = 0;
  element("rows").replaceChildren();
  moreRows();
}

function rowOf(token) {
  const gain = compared.gains[token];
  const row = make("tr");
  row.dataset.token = token;
  const cell = (name, ...content) => {
    const made = make("td", name);
    made.append(...content);
    row.append(made);
  };
  cell("", make("span", "chip", alone(token)));
  const link = make("button", "link", count(token));
  link.type = "button";
  link.title = "Show it in the text";
  cell("number", link);
  cell("number", make("span", `gain ${colourOf(gain)}`, signed(gain)));
  cell("", contextOf(token, 44, 14, (other) => (other === token ? "target" : "")));
  cell("", ...placesFor(token).slice(0, 2).map(({ position }) => {
    const place = make("div", "retrieved");
    place.append(make("span", "number", count(position)), placeContext(position, token, 36, 22));
    return place;
  }));
  return row;
}

function moreRows() {
  const next = ranking.order.slice(ranking.shown, ranking.shown + PAGE_OF_ROWS);
  element("rows").append(...next.map(rowOf));
  ranking.shown += next.length;
  element("more").hidden = ranking.shown >= ranking.order.length;
}
