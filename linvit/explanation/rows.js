// Arrays of a page (packing.py), and rows of attention from them (rows.py).

async function unpack(id) {
  const text = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

const ARRAYS = {u1: Uint8Array, i1: Int8Array, f4: Float32Array};

// The numbers of an array from `first` on, without copying them.
function view(buffer, place, first, count) {
  const kind = ARRAYS[place.type];
  return new kind(buffer, place.at + first * kind.BYTES_PER_ELEMENT, count);
}

// Row number `row` of a quantised array (…, C), as numbers.
function readRow(buffer, {values, steps}, row) {
  const length = values.shape[values.shape.length - 1];
  const step = view(buffer, steps, row, 1)[0];
  return Float64Array.from(view(buffer, values, row * length, length), value => value * step);
}

// Weights of k keys times a projection, its map number `map`: the weights of N patches.
function spread(buffer, projection, map, weights) {
  const {k} = projection;
  if (projection.rows) {
    const [, high, height] = projection.rows.shape, [, wide, width] = projection.columns.shape;
    const rows = view(buffer, projection.rows, map * high * height, high * height);
    const columns = view(buffer, projection.columns, map * wide * width, wide * width);
    const patches = new Float64Array(height * width);
    for (let a = 0; a < high; a++) {
      const line = new Float64Array(width);
      for (let b = 0; b < wide; b++)
        for (let x = 0; x < width; x++) line[x] += weights[a * wide + b] * columns[b * width + x];
      for (let y = 0; y < height; y++)
        for (let x = 0; x < width; x++) patches[y * width + x] += rows[a * height + y] * line[x];
    }
    return patches;
  }
  const {values, steps} = projection.dense, length = values.shape[2];
  const patches = new Float64Array(length);
  const scale = view(buffer, steps, map * k, k);
  for (let key = 0; key < k; key++) {
    const weight = weights[key] * scale[key];
    if (weight === 0) continue;
    const row = view(buffer, values, (map * k + key) * length, length);
    for (let n = 0; n < length; n++) patches[n] += weight * row[n];
  }
  return patches;
}

function mean(rows) {
  const total = new Float64Array(rows[0].length);
  for (const row of rows) for (let i = 0; i < total.length; i++) total[i] += row[i] / rows.length;
  return total;
}

// Weights of keys, one row per head (or their mean), as weights of the prefix tokens and of the patches. `maps` has the
// number of the projection's map for each row.
function toTokens(buffer, projection, prefix, rows, maps) {
  if (!projection) {
    const all = mean(rows);
    return {prefix: all.slice(0, prefix), patches: all.slice(prefix)};
  }
  const shared = projection.maps === 1;
  const parts = (shared ? [mean(rows)] : rows).map((row, index) =>
    spread(buffer, projection, shared ? 0 : maps[index], row.subarray(prefix)));
  return {prefix: mean(rows).slice(0, prefix), patches: mean(parts)};
}

// The key that weights a patch most.
function strongestKey(buffer, projection, map, patch) {
  const one = new Float64Array(projection.k);
  let best = 0, most = -1;
  for (let key = 0; key < projection.k; key++) {
    one.fill(0);
    one[key] = 1;
    const weight = Math.abs(spread(buffer, projection, map, one)[patch]);
    if (weight > most) [best, most] = [key, weight];
  }
  return best;
}
