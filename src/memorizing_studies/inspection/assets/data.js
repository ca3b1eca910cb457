// The report's data: base64 of compressed byte planes, as inspection/packing.py wrote them.

const element = (id) => document.getElementById(id);

/** The bytes of one data block, which is then let go. */
async function unpack(name) {
  const block = element(`data-${name}`);
  const coded = atob(block.textContent);
  block.remove();
  const bytes = new Uint8Array(coded.length);
  for (let i = 0; i < coded.length; i++) bytes[i] = coded.charCodeAt(i);
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(plain).arrayBuffer());
}

/** Unsigned integers from their byte planes, low bytes first. */
function joined(bytes, width) {
  if (width === 1) return bytes;
  const length = bytes.length / width;
  const numbers = width === 2 ? new Uint16Array(length) : new Uint32Array(length);
  for (let plane = 0; plane < width; plane++) {
    const part = bytes.subarray(plane * length, (plane + 1) * length);
    const shift = 8 * plane;
    for (let i = 0; i < length; i++) numbers[i] |= part[i] << shift;
  }
  return numbers;
}

const decode = (bytes) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);

const report = { facts: null, text: "", starts: null, ids: null, bits: {}, found: {} };

/** What is compared: gains are the bits of `base` less those of `reading`. */
const compared = { base: "off", reading: "", gains: null };

async function load() {
  report.facts = JSON.parse(decode(await unpack("facts")));
  const { length, readings, bitsStep } = report.facts;
  report.text = decode(await unpack("text"));
  const lengths = joined(await unpack("lengths"), 4);
  report.starts = new Uint32Array(length + 1);
  for (let i = 0; i < length; i++) report.starts[i + 1] = report.starts[i] + lengths[i];
  report.ids = joined(await unpack("ids"), 4);
  for (const { name, size } of readings) {
    report.bits[name] = Float32Array.from(joined(await unpack(`bits-${name}`), 2), (n) => n * bitsStep);
    if (!size) continue;
    report.found[name] = {
      distances: joined(await unpack(`distances-${name}`), 4),
      weights: joined(await unpack(`weights-${name}`), 1),
      shares: joined(await unpack(`shares-${name}`), 1),
      copied: report.facts.copies ? joined(await unpack(`copied-${name}`), 1) : null,
      repeated: report.facts.repeats ? joined(await unpack(`repeated-${name}`), 4) : null,
    };
  }
}

function compare(base, reading) {
  const [before, after] = [report.bits[base], report.bits[reading]];
  compared.base = base;
  compared.reading = reading;
  compared.gains = before.map((bits, index) => bits - after[index]);
}

/** The text of a token, as it stands in the document. */
const pieceOf = (token) => report.text.slice(report.starts[token], report.starts[token + 1]);

/** The token that holds a place in the text, counted in UTF-16 units. */
function tokenAt(place) {
  let low = 0;
  let high = report.facts.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (report.starts[middle] <= place) low = middle;
    else high = middle;
  }
  return low;
}

/** By memory layer and head, what was retrieved to predict a token. */
function retrievedFor(token) {
  const { memoryLayers, heads, top, length, shareStep } = report.facts;
  const { distances, weights, shares } = report.found[compared.reading];
  const found = [];
  memoryLayers.forEach((layer, number) => {
    for (let head = 0; head < heads; head++) {
      const row = number * heads + head;
      const places = [];
      for (let rank = 0; rank < top; rank++) {
        const at = (row * top + rank) * length + token;
        if (distances[at] === 0) break;
        const position = token - 1 - distances[at];
        places.push({ position, distance: distances[at], weight: weights[at] * shareStep });
      }
      found.push({ layer, head, share: shares[row * length + token] * shareStep, places });
    }
  });
  return found;
}

/** The weight of copies in the prediction of a token, and the place that a repetition gave; or null. */
function copiesFor(token) {
  const { copied, repeated } = report.found[compared.reading];
  if (!copied) return null;
  const distance = repeated ? repeated[token] : 0;
  const weight = copied[token] * report.facts.shareStep;
  return { weight, place: distance ? { position: token - distance, distance: distance - 1, weight } : null };
}

/** The places that all heads together retrieved, those that brought most into the output first. */
function placesFor(token) {
  const places = new Map();
  for (const { layer, head, share, places: ofHead } of retrievedFor(token)) {
    for (const { position, distance, weight } of ofHead) {
      const place = places.get(position) ?? { position, distance, weight: 0, heads: [] };
      place.weight += share * weight;
      place.heads.push({ layer, head });
      places.set(position, place);
    }
  }
  return [...places.values()].sort((a, b) => b.weight - a.weight);
}
