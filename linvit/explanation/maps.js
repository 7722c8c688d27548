// The page of `linvit explain`: choose an image, a map, a layer, a head; click a patch.

const page = data("page");
const element = id => document.getElementById(id);
const radios = [...document.querySelectorAll("input[name=map]")];
const CLASS_MAPS = ["relevance", "gradcam", "cam"];
const BY_LAYER = ["attention", "patch", "keys"];
const state = {image: 0, map: page.method, layer: page.model ? page.model.layers.length - 1 : 0, head: -1, key: 0,
  patch: null, opacity: 75};
const TEXTS = {
  relevance: "Attention through all layers, weighted by its gradient for the class.",
  gradcam: "The last tokens that the classifier mixes, weighted by their gradient for the class.",
  cam: "What each patch adds to the logit of the class, where that is positive.",
  rollout: "Attention through all layers and skip connections.",
  attention: `Where ${page.reader} looks, in one layer.`,
  patch: "Where one patch looks, in one layer. Click a patch, or move with the arrow keys on the image.",
  keys: "The patches that one projected key takes, in one layer. Click a patch for its key.",
};
const colours = Array.from({length: 256}, (_, index) =>
  [0, 2, 4].map(at => parseInt(page.colours.substr(6 * index + at, 2), 16)));
element("colours").style.background =
  `linear-gradient(to right, ${colours.filter((_, index) => index % 15 === 0).map(rgb => `rgb(${rgb})`)})`;

// What is unpacked: of all images together, and of the image that is shown.
let model = null, pack = null, picture = null, saving = 0;

function entry() { return page.images[state.image]; }
function layer() { return page.model && page.model.layers[state.layer]; }
function tokens() { return entry().layers && entry().layers[state.layer].tokens; }
function projection(which) {
  const index = layer() && layer()[which];
  return index === null || index === undefined ? null : page.model.projections[index];
}
function isAvailable(map) {
  if (map === "patch") return Boolean(entry().layers && entry().layers.some(each => each.tokens));
  if (map === "keys") return Boolean(entry().layers && page.model.layers.some(each => each.keys !== null));
  return true;
}

// The numbers to show: {patches, prefix} or null, if this layer has none.
function values() {
  const {maps, layers} = entry();
  if (maps[state.map]) return {patches: readRow(pack, maps[state.map], 0), prefix: []};
  const source = layer(), heads = source.heads;
  const chosen = state.head < 0 ? [...Array(heads).keys()] : [state.head];
  if (state.map === "attention") {
    const rows = chosen.map(head => readRow(pack, layers[state.layer].start, head));
    return toTokens(model, projection("values"), source.prefix, rows, chosen);
  }
  if (state.map === "patch") {
    if (!tokens() || state.patch === null) return null;
    const [count, length] = tokens().values.shape;
    const token = source.prefix + state.patch;
    const rows = (count === 1 ? [0] : chosen).map(head => readRow(pack, tokens(), head * length + token));
    return toTokens(model, projection("values"), source.prefix, rows, chosen);
  }
  const keys = projection("keys");
  if (!keys) return null;
  const one = new Float64Array(keys.k);
  one[state.key] = 1;
  const maps_ = keys.maps === 1 ? [0] : chosen;
  return {patches: mean(maps_.map(map => spread(model, keys, map, one))), prefix: []};
}

function place(patch) {
  const columns = entry().grid[1];
  return `row ${Math.floor(patch / columns) + 1}, column ${patch % columns + 1}`;
}
function short(number) { return Number(number.toPrecision(3)).toString(); }
function percent(share) { return `${(100 * share).toFixed(1)} %`; }
function layerText() {
  const head = state.head < 0 ? "mean over heads" : `head ${state.head}`;
  return `Layer ${state.layer}, ${head}`;
}

function describe(found) {
  if (!found) {
    if (state.map === "patch" && tokens()) return "Click a patch, or choose one with the arrow keys.";
    return state.map === "patch" ? `The page has no rows of layer ${state.layer} for this image.`
      : `Layer ${state.layer} has ordinary attention, without projected keys.`;
  }
  // Large maps have more numbers than a function takes arguments.
  const best = found.patches.reduce((best, value, index) => value > found.patches[best] ? index : best, 0);
  const most = found.patches[best] > 0 ? `most at ${place(best)}` : "nowhere";
  const weight = `weight ${short(found.patches[best])}`;
  const prefix = found.prefix.reduce((sum, each) => sum + each, 0);
  const others = found.prefix.length === 1 ? "the class token gets" : `${found.prefix.length} class and register tokens get`;
  const rest = found.prefix.length ? `; ${others} ${short(prefix)}` : "";
  const negative = found.patches.some(each => each < 0) ? " Weights below 0 are drawn as 0." : "";
  const of = CLASS_MAPS.includes(state.map) ? ` for ${entry().explained}` : "";
  if (entry().tiled) return `${state.map}${of}, merged over tiles.`;
  switch (state.map) {
    case "attention": return `${layerText()}: ${page.reader} looks ${most} (${weight}${rest}).${negative}`;
    case "patch":
      return `${layerText()}: the patch at ${place(state.patch)} looks ${most} (${weight}${rest}).${negative}`;
    case "keys":
      return `Layer ${state.layer}: key ${state.key} takes ${most} (${weight}).${negative}`;
  }
  return `${state.map}${of}: ${most}.`;
}

function draw(found) {
  const canvas = element("stage"), context = canvas.getContext("2d");
  const [height, width] = entry().shape, scale = 1000 / Math.max(height, width);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const [rows, columns] = entry().grid;
  const [[top, bottom], [left, right]] = entry().edges;
  const box = [left * canvas.width, top * canvas.height, (right - left) * canvas.width, (bottom - top) * canvas.height];
  context.imageSmoothingEnabled = scale < 4;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  // The model does not see what is outside of the patches.
  context.fillStyle = "rgba(0, 0, 0, .6)";
  context.beginPath();
  context.rect(0, 0, canvas.width, canvas.height);
  context.rect(...box);
  context.fill("evenodd");
  let most = 0;
  if (found) {
    for (const value of found.patches) most = Math.max(most, value);
    const heat = new ImageData(columns, rows);
    found.patches.forEach((value, index) => {
      const share = most > 0 ? Math.max(value, 0) / most : 0;
      heat.data.set([...colours[Math.round(255 * share)], 255 * state.opacity / 100 * (1 + 2 * share) / 3], 4 * index);
    });
    const cells = create("canvas", {width: columns, height: rows});
    cells.getContext("2d").putImageData(heat, 0, 0);
    context.imageSmoothingEnabled = !entry().layers;
    context.drawImage(cells, ...box);
  }
  if (state.map === "patch" && state.patch !== null) {
    const cell = [box[2] / columns, box[3] / rows];
    const corner = [box[0] + state.patch % columns * cell[0], box[1] + Math.floor(state.patch / columns) * cell[1]];
    for (const [colour, line] of [["#000", 6], ["#fff", 3]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.strokeRect(...corner, ...cell);
    }
  }
  element("most").textContent = most > 0 && BY_LAYER.includes(state.map) ? short(most) : "largest";
}

function show() {
  if (!picture || !pack) return;
  if (!isAvailable(state.map)) state.map = page.method;
  const byLayer = BY_LAYER.includes(state.map) && Boolean(entry().layers);
  if (byLayer && state.patch === null && state.map === "patch") {
    const [rows, columns] = entry().grid;
    state.patch = Math.floor(rows / 2) * columns + Math.floor(columns / 2);
  }
  for (const radio of radios) {
    radio.checked = radio.value === state.map;
    radio.disabled = !isAvailable(radio.value);
  }
  element("map-text").textContent = TEXTS[state.map];
  const keys = projection("keys");
  // An address may be that of an older page.
  state.key = Math.min(Math.max(state.key, 0), keys ? keys.k - 1 : 0);
  if (page.model && state.head >= layer().heads) state.head = -1;
  const found = values();
  element("layer-field").hidden = !byLayer;
  element("head-field").hidden = !byLayer || (state.map === "keys" && (!keys || keys.maps === 1));
  element("key-field").hidden = state.map !== "keys" || !keys;
  if (page.model) {
    element("layer").max = page.model.layers.length - 1;
    element("layer").value = state.layer;
    element("layer-text").textContent = `${state.layer} of ${page.model.layers.length - 1}`;
    // Where the rows of a patch are a mean, there is no other choice.
    const only = state.map === "patch" && tokens() && tokens().values.shape[0] === 1;
    const choices = only ? 0 : layer().heads;
    if (only) state.head = -1;
    if (element("head").options.length !== choices + 1)
      element("head").replaceChildren(create("option", {value: -1}, "mean over heads"),
        ...Array.from({length: choices}, (_, head) => create("option", {value: head}, `head ${head}`)));
    element("head").value = state.head;
  }
  if (keys) element("key").max = keys.k - 1;
  element("key").value = state.key;
  element("key-text").textContent = `${state.key} of ${element("key").max}`;
  element("opacity-text").textContent = `${state.opacity} %`;
  draw(found);
  element("readout").textContent = describe(found);
  clearTimeout(saving);
  const shown = Object.entries(state).filter(([, value]) => value !== null);
  // Browsers refuse too many changes of the address in a short time.
  saving = setTimeout(() => history.replaceState(null, "", "#" + new URLSearchParams(shown)), 400);
}

async function open(image) {
  state.image = image;
  pack = picture = null;
  const loaded = new Image();
  loaded.src = element(`image-${image}`).textContent;
  const [unpacked] = await Promise.all([unpack(`pack-${image}`), loaded.decode()]);
  if (page.model && !model) model = await unpack("pack-model");
  // Another image may have been chosen in the meantime.
  if (state.image !== image) return;
  [pack, picture] = [unpacked, loaded];
  const [rows, columns] = entry().grid;
  if (state.patch !== null && !(state.patch >= 0 && state.patch < rows * columns)) state.patch = null;
  element("name").textContent = entry().name;
  element("classes").replaceChildren(...entry().classes.map(([label, probability]) => create("li", {},
    create("span", {}, label), percent(probability), create("div", {style: `width:${100 * probability}%`}))));
  [...element("images").querySelectorAll("button")].forEach((button, index) =>
    button.setAttribute("aria-pressed", index === image));
  show();
}

function choosePatch(patch) {
  if (!entry().layers) return;
  state.patch = patch;
  const keys = projection("keys");
  if (state.map === "keys" && keys) state.key = strongestKey(model, keys, keys.maps === 1 ? 0 : Math.max(state.head, 0), patch);
  else if (isAvailable("patch")) state.map = "patch";
  show();
}

function patchAt(event) {
  const bounds = element("stage").getBoundingClientRect();
  const [rows, columns] = entry().grid;
  const [[top, bottom], [left, right]] = entry().edges;
  const row = Math.floor(((event.clientY - bounds.top) / bounds.height - top) / (bottom - top) * rows);
  const column = Math.floor(((event.clientX - bounds.left) / bounds.width - left) / (right - left) * columns);
  return row >= 0 && row < rows && column >= 0 && column < columns ? row * columns + column : null;
}

element("stage").addEventListener("click", event => {
  const patch = pack && patchAt(event);
  if (patch !== null) choosePatch(patch);
});
element("stage").addEventListener("keydown", event => {
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (!step || !pack || !entry().layers) return;
  event.preventDefault();
  const [rows, columns] = entry().grid;
  const now = state.patch ?? Math.floor(rows / 2) * columns + Math.floor(columns / 2);
  const row = Math.min(Math.max(Math.floor(now / columns) + step[0], 0), rows - 1);
  const column = Math.min(Math.max(now % columns + step[1], 0), columns - 1);
  choosePatch(row * columns + column);
});
for (const radio of radios) radio.addEventListener("change", () => { state.map = radio.value; show(); });
for (const name of ["layer", "head", "key", "opacity"])
  element(name).addEventListener("input", event => { state[name] = Number(event.target.value); show(); });

page.images.forEach((each, index) => {
  const prediction = each.classes.slice(0, 1).map(([label, probability]) => `${percent(probability)} ${label}`);
  const button = create("button", {type: "button", "aria-pressed": false},
    create("img", {src: element(`image-${index}`).textContent, alt: ""}), create("span", {}, each.name.split("/").pop()),
    create("span", {class: "muted"}, prediction.join("")));
  button.addEventListener("click", () => open(index));
  element("images").append(create("li", {}, button));
});
element("images").hidden = page.images.length < 2;

// The address keeps the view: #image=2&map=patch&layer=3&patch=17
for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  if (name === "map" && radios.some(radio => radio.value === value)) state.map = value;
  else if (name in state && name !== "map" && Number.isInteger(Number(value))) state[name] = Number(value);
}
if (page.model) state.layer = Math.min(Math.max(state.layer, 0), page.model.layers.length - 1);
state.opacity = Math.min(Math.max(state.opacity, 0), 100);
open(Math.min(Math.max(state.image, 0), page.images.length - 1));
