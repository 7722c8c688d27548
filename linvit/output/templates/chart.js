// Line charts: an element `<div class="chart" data-chart="NAME" data-index="I">` shows the chart I of data(NAME), a list of
// {title, unit, x: [...], series: [{name, colour: place in the palette, dash, values: [... or null]}]}.
// Moving over a chart shows the values at the nearest x in all charts of the same list; arrow keys move, too.

function niceTicks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(each => each * power).find(each => each >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

function showNumber(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return Number(value.toPrecision(3)).toExponential();
  return String(Number(value.toPrecision(4)));
}

class Chart {
  constructor(element, spec, group) {
    Object.assign(this, {element, spec, group, hidden: new Set(), at: null});
    element.classList.add("ready");
    this.legend = create("div", {class: "legend"});
    spec.series.forEach((series, index) => {
      const button = create("button", {type: "button", class: "key", "aria-pressed": "true"},
        svg("svg", {width: 22, height: 8, "aria-hidden": "true"},
          svg("line", {x1: 0, x2: 22, y1: 4, y2: 4, style: this.stroke(series)})),
        series.name);
      button.addEventListener("click", () => {
        this.hidden.has(index) ? this.hidden.delete(index) : this.hidden.add(index);
        button.setAttribute("aria-pressed", String(!this.hidden.has(index)));
        this.draw();
      });
      this.legend.append(button);
    });
    this.root = svg("svg", {role: "img", tabindex: 0, "data-owns-tip": "", class: "plot",
      "aria-label": `${spec.title}: ${spec.series.map(each => each.name).join(", ")}. Arrow keys read the values.`});
    element.append(create("h3", {}, spec.unit ? `${spec.title}, ${spec.unit}` : spec.title), this.root);
    if (spec.series.length > 1) element.append(this.legend);
    this.root.addEventListener("pointermove", event => this.point(event));
    this.root.addEventListener("pointerdown", event => this.point(event));
    this.root.addEventListener("pointerleave", () => this.leave());
    this.root.addEventListener("blur", () => this.leave());
    this.root.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!step) return;
      event.preventDefault();
      const from = this.at === null ? (step > 0 ? -1 : spec.x.length) : this.at;
      const next = Math.min(Math.max(from + step, 0), spec.x.length - 1);
      const box = this.root.getBoundingClientRect();
      this.read(next, box.left + this.left(next), box.top + 30);
    });
    this.draw();
  }
  stroke(series) {
    return `stroke: var(--series-${series.colour}); stroke-dasharray: ${series.dash || "none"}; stroke-width: 2; fill: none`;
  }
  draw() {
    const {spec, root} = this;
    const width = Math.max(this.element.clientWidth, 200), height = 210;
    const pad = {left: 52, right: 14, top: 10, bottom: 34};
    const shown = spec.series.filter((_, index) => !this.hidden.has(index));
    const values = shown.flatMap(series => series.values).filter(value => value !== null);
    let low = Math.min(...values), high = Math.max(...values);
    if (!values.length) [low, high] = [0, 1];
    if (low >= 0 && low < 0.35 * high) low = 0;
    if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
    const room = 0.05 * (high - low);
    if (low !== 0) low -= room;
    high += room;
    if (spec.unit === "%") high = Math.min(high, 100);
    const [first, last] = [spec.x[0], spec.x[spec.x.length - 1]];
    this.left = index => first === last ? (pad.left + width - pad.right) / 2
      : pad.left + (spec.x[index] - first) / (last - first) * (width - pad.left - pad.right);
    this.top = value => pad.top + (high - value) / (high - low) * (height - pad.top - pad.bottom);
    fill(root, {width, height, viewBox: `0 0 ${width} ${height}`}, []);
    root.replaceChildren();
    for (const tick of niceTicks(low, high, 4)) {
      const y = this.top(tick);
      root.append(svg("line", {class: "rule", x1: pad.left, x2: width - pad.right, y1: y, y2: y}),
        svg("text", {x: pad.left - 7, y: y + 4, "text-anchor": "end"}, showNumber(tick)));
    }
    const ticks = first === last ? [first] : niceTicks(first, last, Math.min(8, width / 55)).filter(Number.isInteger);
    for (const tick of ticks) {
      const x = first === last ? this.left(0) : pad.left + (tick - first) / (last - first) * (width - pad.left - pad.right);
      root.append(svg("text", {x, y: height - pad.bottom + 16, "text-anchor": "middle"}, String(tick)));
    }
    root.append(svg("text", {x: width - pad.right, y: height - 3, "text-anchor": "end"}, spec.xlabel || "epoch"));
    for (const series of shown) {
      let path = "", pen = "M";
      series.values.forEach((value, index) => {
        if (value === null) { pen = "M"; return; }
        path += `${pen}${this.left(index).toFixed(1)},${this.top(value).toFixed(1)}`;
        pen = "L";
      });
      root.append(svg("path", {d: path, style: this.stroke(series), "stroke-linejoin": "round"}));
      // A point without neighbours has no line.
      series.values.forEach((value, index) => {
        const alone = value !== null && (series.values[index - 1] ?? null) === null && (series.values[index + 1] ?? null) === null;
        if (alone) root.append(svg("circle", {cx: this.left(index), cy: this.top(value), r: 3,
          style: `fill: var(--series-${series.colour})`}));
      });
    }
    this.marks = svg("g", {});
    root.append(this.marks);
    this.bounds = {top: pad.top, bottom: height - pad.bottom};
  }
  point(event) {
    const x = event.clientX - this.root.getBoundingClientRect().left;
    let nearest = 0;
    this.spec.x.forEach((_, index) => {
      if (Math.abs(this.left(index) - x) < Math.abs(this.left(nearest) - x)) nearest = index;
    });
    this.read(nearest, event.clientX, event.clientY);
  }
  read(index, x, y) {
    const {spec} = this;
    this.group.forEach(chart => chart.mark(spec.x[index]));
    const list = create("table", {class: "values"}, create("caption", {}, `${spec.xlabel || "epoch"} ${spec.x[index]}`));
    spec.series.forEach((series, number) => {
      if (this.hidden.has(number)) return;
      list.append(create("tr", {}, create("td", {style: `color: var(--series-${series.colour})`}, "●"),
        create("td", {}, series.name),
        create("td", {class: "number"}, `${showNumber(series.values[index])} ${spec.unit}`.trim())));
    });
    tip(list, x, y);
  }
  mark(x) {
    const index = this.spec.x.indexOf(x);
    this.at = index < 0 ? null : index;
    this.marks.replaceChildren();
    if (index < 0) return;
    const left = this.left(index);
    this.marks.append(svg("line", {class: "cursor", x1: left, x2: left, y1: this.bounds.top, y2: this.bounds.bottom}));
    this.spec.series.forEach((series, number) => {
      const value = series.values[index];
      if (value === null || this.hidden.has(number)) return;
      this.marks.append(svg("circle", {cx: left, cy: this.top(value), r: 4,
        style: `fill: var(--series-${series.colour}); stroke: var(--back); stroke-width: 1.5`}));
    });
  }
  leave() {
    tip(null);
    this.group.forEach(chart => { chart.at = null; chart.marks.replaceChildren(); });
  }
}

const charts = [];
{
  const groups = {};
  for (const element of document.querySelectorAll(".chart")) {
    const name = element.dataset.chart;
    const group = groups[name] ??= [];
    const chart = new Chart(element, data(name)[element.dataset.index], group);
    group.push(chart);
    charts.push(chart);
  }
}
addEventListener("resize", () => charts.forEach(chart => {
  if (chart.element.clientWidth && chart.root.getAttribute("width") != chart.element.clientWidth) chart.draw();
}));
