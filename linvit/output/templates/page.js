"use strict";
// Tables with the class `sortable`, tabs, tooltips: parts of every page.
// Strings from the page's data go into the document as text only, never as HTML.

function data(name) { return JSON.parse(document.getElementById("data-" + name).textContent); }

// create("p", {class: "note"}, "text", child, ...); `svg` does the same for elements of drawings.
function create(tag, attributes, ...children) { return fill(document.createElement(tag), attributes, children); }
const drawing = document.createElement("div");
drawing.innerHTML = "<svg></svg>";
function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(drawing.firstChild.namespaceURI, tag), attributes, children);
}
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const tooltip = document.getElementById("tooltip");
// Show a text, or an element, beside the pointer at (x, y) in the window; nothing hides it.
function tip(content, x, y) {
  tooltip.hidden = !content;
  if (!content) return;
  tooltip.replaceChildren(content);
  const {width, height} = tooltip.getBoundingClientRect();
  tooltip.style.left = Math.max(4, x + 14 + width > innerWidth ? x - 14 - width : x + 14) + "px";
  tooltip.style.top = Math.max(4, y + 14 + height > innerHeight ? y - 14 - height : y + 14) + "px";
}
// Elements with data-tip show it, also when they have the focus.
for (const type of ["pointermove", "pointerdown"]) document.addEventListener(type, event => {
  const owner = event.target.closest && event.target.closest("[data-tip]");
  if (owner) tip(owner.dataset.tip, event.clientX, event.clientY);
  else if (!event.target.closest || !event.target.closest("[data-owns-tip]")) tip(null);
});
document.addEventListener("focusin", event => {
  const owner = event.target.closest("[data-tip]");
  if (!owner) return tip(null);
  const box = owner.getBoundingClientRect();
  tip(owner.dataset.tip, box.right, box.bottom);
});
document.addEventListener("keydown", event => { if (event.key === "Escape") tip(null); });

// A cell is sorted by its data-sort, else by its text; numbers as numbers, empty cells last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  headings.forEach((heading, column) => {
    if (!heading.textContent.trim()) return;
    const button = create("button", {type: "button"}, ...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const rows = [...table.tBodies[0].rows];
      const keys = new Map(rows.map(row => [row, key(row, column)]));
      const numeric = rows.every(row => keys.get(row) === "" || !isNaN(keys.get(row)));
      // Numbers begin with the largest.
      const first = numeric ? "descending" : "ascending";
      const other = numeric ? "ascending" : "descending";
      const direction = heading.getAttribute("aria-sort") === first ? other : first;
      headings.forEach(each => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const compare = numeric ? (a, b) => a - b : (a, b) => a.localeCompare(b, undefined, {numeric: true});
      rows.sort((a, b) => {
        const [left, right] = [keys.get(a), keys.get(b)];
        if (left === "" || right === "") return (left === "") - (right === "");
        return sign * compare(left, right);
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// Children of `.tabs` with data-tab become panels, of which one is shown.
document.querySelectorAll(".tabs").forEach((tabs, group) => {
  const panels = [...tabs.children].filter(child => child.dataset.tab !== undefined);
  if (panels.length < 2) return;
  const list = create("div", {role: "tablist", "aria-label": tabs.dataset.label || "Views"});
  const buttons = panels.map((panel, index) => {
    panel.id = panel.id || `panel-${group}-${index}`;
    const button = create("button", {type: "button", role: "tab", "aria-controls": panel.id,
      id: `tab-${group}-${index}`}, panel.dataset.tab);
    fill(panel, {role: "tabpanel", "aria-labelledby": button.id, tabindex: 0}, []);
    list.append(button);
    return button;
  });
  const show = chosen => {
    panels.forEach((panel, index) => { panel.hidden = index !== chosen; });
    buttons.forEach((button, index) => {
      fill(button, {"aria-selected": index === chosen, tabindex: index === chosen ? 0 : -1}, []);
    });
    dispatchEvent(new Event("resize"));
  };
  buttons.forEach((button, index) => {
    button.addEventListener("click", () => show(index));
    button.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!step) return;
      const next = (index + step + buttons.length) % buttons.length;
      show(next);
      buttons[next].focus();
    });
  });
  tabs.prepend(list);
  show(0);
});

// A button with data-toggles="CLASS" data-of="ID" adds and removes a class of an element.
for (const button of document.querySelectorAll("[data-toggles]")) {
  button.addEventListener("click", () => {
    const on = document.getElementById(button.dataset.of).classList.toggle(button.dataset.toggles);
    button.setAttribute("aria-pressed", String(on));
  });
}
