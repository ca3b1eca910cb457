// The strip under the header: mean gain along the document, the window, and what was retrieved.

const overview = { means: null, token: -1, places: [] };

function measureOverview() {
  const canvas = element("overview").firstElementChild;
  const bins = Math.max(1, Math.min(Math.floor(canvas.clientWidth / 2), report.facts.length - 1));
  overview.means = new Float32Array(bins);
  for (let bin = 0; bin < bins; bin++) {
    const first = 1 + Math.floor((bin * (report.facts.length - 1)) / bins);
    const end = 1 + Math.floor(((bin + 1) * (report.facts.length - 1)) / bins);
    let sum = 0;
    for (let token = first; token < end; token++) sum += compared.gains[token];
    overview.means[bin] = sum / (end - first);
  }
  drawOverview();
}

/** First and last token in the window. */
function shownTokens() {
  const frame = element("text").getBoundingClientRect();
  let [first, last] = [-1, -1];
  for (const chunk of chunks) {
    if (!chunk.full) continue;
    const box = chunk.node.getBoundingClientRect();
    if (box.bottom < frame.top || box.top > frame.bottom) continue;
    const size = chunk.end - chunk.first;
    const part = (y) => Math.min(1, Math.max(0, (y - box.top) / Math.max(1, box.height)));
    if (first < 0) first = chunk.first + size * part(frame.top);
    last = chunk.first + size * part(frame.bottom);
  }
  return [first, last];
}

function drawOverview() {
  const canvas = element("overview").firstElementChild;
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const x = (token) => (token / report.facts.length) * width;

  if (element("view-text").hidden === false) {
    const [first, last] = shownTokens();
    pen.fillStyle = colour("--line");
    pen.fillRect(x(first), 0, Math.max(3, x(last) - x(first)), height);
  }
  const sorted = Float32Array.from(overview.means, Math.abs).sort();
  const top = Math.max(0.05, sorted[Math.floor(0.99 * (sorted.length - 1))]);
  const middle = Math.round(height * 0.7);
  const step = width / overview.means.length;
  overview.means.forEach((mean, bin) => {
    const size = Math.max(-1, Math.min(1, mean / top)) * (mean > 0 ? middle - 3 : height - middle - 3);
    pen.fillStyle = colour(mean > 0 ? "--helped" : "--hurt");
    pen.fillRect(bin * step, middle, Math.max(1, step - 0.6), -size);
  });
  pen.fillStyle = colour("--faint");
  pen.fillRect(0, middle, width, 0.7);
  if (overview.token < 0) return;
  pen.fillStyle = colour("--second");
  for (const { position, weight } of overview.places) {
    pen.globalAlpha = Math.min(1, 0.25 + 2 * weight);
    pen.beginPath();
    pen.arc(x(position), height - 5, 3, 0, 7);
    pen.fill();
  }
  pen.globalAlpha = 1;
  pen.fillStyle = colour("--ink");
  pen.fillRect(x(overview.token) - 0.75, 0, 1.5, height);
}
