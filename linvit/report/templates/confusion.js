// Confusion matrices: `<div class="confusion" data-matrix="NAME">` shows data(NAME) = {names, columns, counts, totals, orders}.
// Controls: the order of the classes, counts or shares, and whether correct predictions are shown.

class Confusion {
  constructor(element) {
    this.element = element;
    this.matrix = data(element.dataset.matrix);
    this.at = null;
    const find = name => element.querySelector(`[name=${name}]`);
    [this.order, this.unit, this.diagonal] = ["order", "unit", "diagonal"].map(find);
    this.place = element.querySelector(".matrix");
    this.root = svg("svg", {role: "img", tabindex: 0, "data-owns-tip": "",
      "aria-label": "Confusion matrix: a row per label, a column per prediction. Arrow keys read the cells."});
    this.place.append(this.root);
    for (const control of [this.order, this.unit, this.diagonal]) control.addEventListener("change", () => this.draw());
    this.root.addEventListener("pointermove", event => this.point(event));
    this.root.addEventListener("pointerdown", event => this.point(event));
    this.root.addEventListener("pointerleave", () => this.read(null));
    this.root.addEventListener("blur", () => this.read(null));
    this.root.addEventListener("keydown", event => {
      const step = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0]}[event.key];
      if (!step) return;
      event.preventDefault();
      const [row, column] = this.at || [0, -1];
      const next = [row + step[0], column + step[1]];
      if (!this.at) next.splice(0, 2, 0, 0);
      if (next[0] < 0 || next[1] < 0 || next[0] >= this.rows.length || next[1] >= this.columns.length) return;
      const box = this.root.getBoundingClientRect();
      this.read(next, box.left + this.left + (next[1] + 1) * this.cell, box.top + this.top + (next[0] + 1) * this.cell);
    });
    this.draw();
  }
  draw() {
    const {matrix, root} = this;
    this.rows = matrix.orders[this.order.value];
    // A last column for the classes without a row stays last.
    const rest = matrix.columns.length > matrix.names.length ? [matrix.names.length] : [];
    this.columns = [...this.rows, ...rest];
    const width = Math.max(this.place.clientWidth, 260);
    const longest = Math.max(...matrix.columns.map(name => name.length));
    this.left = Math.min(longest * 6.6 + 14, width * 0.32, 190);
    const cell = left => Math.max(7, Math.min(72, (width - left - 4) / this.columns.length));
    // Names need room for a line of text; without them the cells get the room.
    const named = cell(this.left) >= 11;
    if (!named) this.left = 2;
    this.cell = Math.min(cell(this.left), named ? 72 : 11);
    this.top = named ? Math.min(longest * 6.6 + 14, 130) : 8;
    const short = (name, space) => name.length * 6.6 > space ? name.slice(0, Math.max(1, Math.floor(space / 6.6) - 1)) + "…" : name;
    const total = this.left + this.cell * this.columns.length + 2;
    const height = this.top + this.cell * this.rows.length + 2;
    fill(root, {width: total, height, viewBox: `0 0 ${total} ${height}`}, []);
    root.replaceChildren();
    const shares = this.unit.value === "shares", hidden = this.diagonal.checked;
    const value = (row, column) => matrix.counts[row][column] / matrix.totals[row];
    const errors = this.rows.flatMap(row => this.columns.filter(column => column !== row).map(column => value(row, column)));
    // With correct predictions hidden, the most frequent error is the darkest.
    const darkest = hidden ? Math.max(...errors, 1e-9) : 1;
    this.rows.forEach((row, i) => {
      if (named) root.append(svg("text", {x: this.left - 7, y: this.top + (i + 0.5) * this.cell + 4, "text-anchor": "end"},
        short(matrix.names[row], this.left - 12)));
      this.columns.forEach((column, j) => {
        const correct = row === column;
        const strength = hidden && correct ? 0 : value(row, column) / darkest;
        const [x, y] = [this.left + j * this.cell, this.top + i * this.cell];
        const colour = correct ? "--series-1" : "--series-5";
        root.append(svg("rect", {x, y, width: this.cell, height: this.cell, class: "cell",
          style: `fill: var(${strength ? colour : "--back"}); fill-opacity: ${strength ? (0.06 + 0.64 * strength).toFixed(3) : 1}`}));
        if (this.cell >= 24 && matrix.counts[row][column] && !(hidden && correct)) {
          const text = shares ? Math.round(100 * value(row, column)) : matrix.counts[row][column];
          root.append(svg("text", {x: x + this.cell / 2, y: y + this.cell / 2 + 4, "text-anchor": "middle", class: "count"}, String(text)));
        }
      });
    });
    if (named) this.columns.forEach((column, j) => {
      const [x, y] = [this.left + (j + 0.5) * this.cell + 4, this.top - 7];
      root.append(svg("text", {transform: `translate(${x},${y}) rotate(-90)`}, short(matrix.columns[column], this.top - 10)));
    });
    this.frame = svg("rect", {class: "frame", width: this.cell, height: this.cell, visibility: "hidden"});
    root.append(this.frame);
  }
  point(event) {
    const box = this.root.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top - this.top) / this.cell);
    const column = Math.floor((event.clientX - box.left - this.left) / this.cell);
    const inside = row >= 0 && column >= 0 && row < this.rows.length && column < this.columns.length;
    this.read(inside ? [row, column] : null, event.clientX, event.clientY);
  }
  read(at, x, y) {
    this.at = at;
    this.frame.setAttribute("visibility", at ? "visible" : "hidden");
    if (!at) return tip(null);
    fill(this.frame, {x: this.left + at[1] * this.cell, y: this.top + at[0] * this.cell}, []);
    const [row, column] = [this.rows[at[0]], this.columns[at[1]]];
    const {names, columns, counts, totals} = this.matrix;
    const count = counts[row][column];
    tip(`${names[row]}\n${row === column ? "predicted correctly" : "predicted as " + columns[column]}\n`
      + `${count} of ${totals[row]} images, ${(100 * count / totals[row]).toFixed(1)} %`, x, y);
  }
}

{
  const matrices = [...document.querySelectorAll(".confusion")].map(element => new Confusion(element));
  addEventListener("resize", () => matrices.forEach(matrix => { if (matrix.place.clientWidth) matrix.draw(); }));
}
