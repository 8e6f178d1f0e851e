// Elements, numbers and tables. Text from the trace only ever becomes a text node or a value of a control.

const REPORT = JSON.parse(document.getElementById("figures").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}
const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// ---- words and numbers ----

const isNumber = (value) => typeof value === "number";
const whole = (value) => (isNumber(value) ? value.toLocaleString("en-US") : "–");
const decimal = (value, digits = 3) => (isNumber(value) ? value.toFixed(digits) : "–");
const percent = (value, digits = 1) => (isNumber(value) ? `${(100 * value).toFixed(digits)} %` : "–");
const epochName = (epoch) => (epoch < 0 ? "no epoch" : `epoch ${epoch}`);

function className(label) {
  if (!isNumber(label) || label < 0) return "–";
  const name = REPORT.class_names[label];
  return name === undefined ? String(label) : `${label} ${name}`;
}

function bytes(value) {
  if (!isNumber(value)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${unit ? value.toFixed(1) : value} ${units[unit]}`;
}

// ---- colours, read anew when the scheme changes ----

const PALETTE = {
  light: ["#2f6fd0", "#e0782f", "#2a9d62", "#c8402f", "#8457c2", "#8a6244", "#d1579f", "#6f7885", "#a3a022", "#1fa3b5"],
  dark: ["#79aaff", "#ffa45c", "#5fd19a", "#ff8170", "#b794f6", "#c79b7a", "#f58cc7", "#a5afbc", "#d3cf58", "#58d0e0"],
};
const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");

function color(place) {
  const palette = darkScheme.matches ? PALETTE.dark : PALETTE.light;
  if (place < palette.length) return palette[place];
  return `hsl(${(place * 137.508) % 360} ${darkScheme.matches ? "70% 68%" : "60% 45%"})`;
}
const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// ---- one tip for the whole page ----

const tip = make("div", { id: "tip", role: "tooltip", hidden: "" });

function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > window.innerWidth ? event.clientX - box.width - 10 : event.clientX + 14;
  const top = event.clientY + 14 + box.height > window.innerHeight ? event.clientY - box.height - 10 : event.clientY + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}
function hideTip() { tip.hidden = true; }

// ---- controls ----

function chooser(title, choices, onchange, chosen = 0) {
  const select = make("select", { onchange: () => onchange(select.selectedIndex) },
    choices.map((text) => make("option", {}, text)));
  select.selectedIndex = chosen;
  return make("label", {}, title, select);
}

function slider(title, names, onchange, chosen) {
  const value = make("span", {}, names[chosen]);
  const input = make("input", {
    type: "range", min: 0, max: names.length - 1, step: 1, value: chosen, "aria-label": title,
    oninput: () => { value.textContent = names[Number(input.value)]; onchange(Number(input.value)); },
  });
  return make("label", {}, title, input, value);
}

// ---- tables that sort ----

// A column: key, title, show(value, row) -> text, number (right-aligned), name (in one line), bar (value of 0 to 1), help.
const SHOWN_ROWS = 15;
const MAX_CELL_CHARACTERS = 60;

function table(columns, rows, options = {}) {
  let sorted = [...rows];
  let shown = options.shown || SHOWN_ROWS;
  const heads = columns.map((column, place) =>
    make("th", { class: column.number ? "number" : null, scope: "col" },
      make("button", { type: "button", title: column.help || "sort", onclick: () => sort(place) }, column.title)));
  const body = make("tbody");
  const more = make("button", { type: "button", class: "plain", onclick: () => { shown = Infinity; refresh(); } });

  function cell(column, row) {
    const value = row[column.key];
    const text = column.show ? column.show(value, row) : value === null || value === undefined ? "–" : String(value);
    const bar = column.bar && isNumber(value)
      ? make("span", { class: "bar" }, make("i", { style: `width:${Math.max(0, Math.min(1, value)) * 100}%` })) : null;
    const kind = column.number ? "number" : column.name ? "name" : null;
    const isLong = text.length > MAX_CELL_CHARACTERS;
    return make("td", { class: kind, title: isLong || column.name ? text : null }, isLong ? `${text.slice(0, MAX_CELL_CHARACTERS - 1)}…` : text, bar);
  }
  function refresh() {
    body.replaceChildren(...sorted.slice(0, shown).map((row) => make("tr", {}, columns.map((column) => cell(column, row)))));
    more.hidden = sorted.length <= shown;
    more.textContent = `show all ${whole(sorted.length)}`;
  }
  function sort(place) {
    const { key, number } = columns[place];
    const was = heads[place].getAttribute("aria-sort");
    const direction = was ? (was === "ascending" ? -1 : 1) : number ? -1 : 1;
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[place].setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    const missing = (value) => value === null || value === undefined;
    sorted.sort((one, other) => {
      const [a, b] = [one[key], other[key]];
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      if (isNumber(a) && isNumber(b)) return direction * (a - b);
      return direction * String(a).localeCompare(String(b), "en", { numeric: true });
    });
    refresh();
  }
  refresh();
  if (!rows.length) return make("p", { class: "soft" }, options.empty || "None.");
  return make("div", {},
    make("div", { class: "scroll" },
      make("table", { class: "list" }, make("thead", {}, make("tr", {}, heads)), body)), more);
}
