// Lines (SVG), points (canvas), bars and the heat map of a confusion.

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) {
    found.push(Number(value.toPrecision(12)));
  }
  return found;
}

const shortNumber = (value) => (Math.abs(value) >= 10000 ? value.toExponential(0) : String(Number(value.toPrecision(4))));

// series: [{name, points: [[x, y], ...]}]; format(y) -> text of the tip.
function lineChart(title, series, { format = shortNumber, axis = format, low = null, high = null, x = "epoch" } = {}) {
  const all = series.flatMap((one) => one.points).filter((point) => isNumber(point[1]));
  if (!all.length) return make("p", { class: "soft" }, `${title}: no values.`);
  const [width, height, left, right, top, bottom] = [520, 230, 46, 10, 10, 30];
  const xs = [...new Set(all.map((point) => point[0]))].sort((a, b) => a - b);
  let [yLow, yHigh] = [Math.min(...all.map((p) => p[1])), Math.max(...all.map((p) => p[1]))];
  const room = (yHigh - yLow || Math.abs(yHigh) || 1) * 0.08;
  yLow = low !== null ? Math.max(low, yLow - room) : yLow - room;
  yHigh = high !== null ? Math.min(high, yHigh + room) : yHigh + room;
  const xSpan = xs[xs.length - 1] - xs[0] || 1;
  const px = (value) => (xs.length === 1 ? (left + width - right) / 2
    : left + ((value - xs[0]) / xSpan) * (width - left - right));
  const py = (value) => height - bottom - ((value - yLow) / (yHigh - yLow)) * (height - top - bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const tick of ticks(yLow, yHigh, 5)) {
    svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: py(tick), y2: py(tick) }),
      draw("text", { x: left - 6, y: py(tick) + 4, "text-anchor": "end" }, axis(tick)));
  }
  const whole_ticks = xs.length === 1 ? xs : ticks(xs[0], xs[xs.length - 1], 8).filter(Number.isInteger);
  for (const tick of whole_ticks) {
    svg.append(draw("text", { x: px(tick), y: height - bottom + 16, "text-anchor": "middle" }, String(tick)));
  }
  svg.append(draw("text", { x: width - right, y: height - 1, "text-anchor": "end" }, x));
  svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  series.forEach((one, place) => {
    const points = one.points.filter((point) => isNumber(point[1]));
    svg.append(draw("polyline", {
      fill: "none", "stroke-width": 2, "stroke-linejoin": "round", style: `stroke:${color(place)}`,
      points: points.map(([a, b]) => `${px(a)},${py(b)}`).join(" "),
    }));
    if (points.length <= 40) {
      for (const [a, b] of points) svg.append(draw("circle", { cx: px(a), cy: py(b), r: 3, style: `fill:${color(place)}` }));
    }
  });
  const cursor = draw("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("mousemove", (event) => {
    const at = ((event.clientX - svg.getBoundingClientRect().left) / svg.getBoundingClientRect().width) * width;
    const nearest = xs.reduce((best, one) => (Math.abs(px(one) - at) < Math.abs(px(best) - at) ? one : best));
    cursor.setAttribute("x1", px(nearest));
    cursor.setAttribute("x2", px(nearest));
    cursor.setAttribute("visibility", "visible");
    const values = series.map((one) => [one.name, one.points.find((point) => point[0] === nearest)])
      .filter(([, point]) => point && isNumber(point[1])).map(([name, point]) => `${name}: ${format(point[1])}`);
    showTip(event, [`${x} ${nearest}`, ...values].join("\n"));
  });
  svg.addEventListener("mouseleave", () => { cursor.setAttribute("visibility", "hidden"); hideTip(); });
  return make("div", {}, make("h3", {}, title), legend(series.map((one) => one.name)), svg);
}

// Names with their colours; with onpick a click picks one alone, and again all.
function legend(names, onpick = null, colors = color) {
  let picked = null;
  const buttons = names.map((name, place) => make("button", {
    type: "button", disabled: onpick ? null : "", "aria-pressed": "true",
    onclick: () => {
      picked = picked === place ? null : place;
      buttons.forEach((one, other) => one.setAttribute("aria-pressed", String(picked === null || picked === other)));
      onpick(picked);
    },
  }, make("i", { style: `background:${colors(place)}` }), name));
  return make("div", { class: "legend" }, buttons);
}

// points: [{x, y, group, text}] with x and y of 0 to 1, y upwards. colors(group) -> a colour.
function pointChart({ height = 420, xTitle = "", yTitle = "" } = {}) {
  const canvas = make("canvas", { height, role: "img", "aria-label": `${yTitle} over ${xTitle}` });
  let points = [];
  let colors = color;
  let only = null;
  const edge = 22;
  const place = (point) => {
    const [width, tall] = [canvas.clientWidth, height];
    return [edge + point.x * (width - 2 * edge), tall - edge - point.y * (tall - 2 * edge)];
  };
  const visible = (point) => only === null || point.group === only;

  function paint() {
    const scale = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * scale;
    canvas.height = height * scale;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const radius = points.length > 1200 ? 2.4 : 3.2;
    for (const shown of [false, true]) {
      for (const point of points) {
        if (visible(point) !== shown) continue;
        const [x, y] = place(point);
        context.globalAlpha = shown ? 0.8 : 0.12;
        context.fillStyle = colors(point.group);
        context.beginPath();
        context.arc(x, y, point.large ? radius + 1.4 : radius, 0, 2 * Math.PI);
        context.fill();
      }
    }
    context.globalAlpha = 1;
    context.fillStyle = theme("soft");
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "right";
    context.fillText(xTitle, canvas.clientWidth - 8, height - 7);
    context.textAlign = "left";
    context.fillText(yTitle, 8, 15);
  }
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let [best, least] = [null, 144];
    for (const point of points) {
      if (!visible(point)) continue;
      const [a, b] = place(point);
      const distance = (a - x) ** 2 + (b - y) ** 2;
      if (distance < least) [best, least] = [point, distance];
    }
    if (best) showTip(event, best.text());
    else hideTip();
  });
  canvas.addEventListener("mouseleave", hideTip);
  new ResizeObserver(paint).observe(canvas);
  darkScheme.addEventListener("change", paint);
  return {
    canvas,
    show(newPoints, newColors) { points = newPoints; colors = newColors; only = null; paint(); },
    pick(group) { only = group; paint(); },
  };
}

// values: counts; names: their labels.
function barChart(title, values, names) {
  const [width, height, left, right, top, bottom] = [520, 230, 46, 10, 10, 30];
  const high = Math.max(1, ...values);
  const each = (width - left - right) / values.length;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  const py = (value) => height - bottom - (value / high) * (height - top - bottom);
  for (const tick of ticks(0, high, 4)) {
    svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: py(tick), y2: py(tick) }),
      draw("text", { x: left - 6, y: py(tick) + 4, "text-anchor": "end" }, shortNumber(tick)));
  }
  values.forEach((value, place) => {
    const x = left + place * each;
    const wide = Math.min(each * 0.76, 56);
    const bar = draw("rect", { x: x + (each - wide) / 2, width: wide, y: py(value), height: height - bottom - py(value), rx: 2, style: "fill:var(--accent)" });
    bar.addEventListener("mousemove", (event) => showTip(event, `${names[place]}: ${whole(value)} samples`));
    bar.addEventListener("mouseleave", hideTip);
    svg.append(bar, draw("text", { x: x + each / 2, y: height - bottom + 16, "text-anchor": "middle" }, names[place]));
  });
  return make("div", {}, make("h3", {}, title), svg);
}

// pairs: [label, prediction, rows]. The shade of a cell is its share of the row; wrong ones are red.
const MAX_HEAT_CLASSES = 60;

function heatMap(pairs) {
  const classes = [...new Set(pairs.flatMap(([label, prediction]) => [label, prediction]))].sort((a, b) => a - b);
  if (classes.length > MAX_HEAT_CLASSES) {
    return make("p", { class: "soft" }, `${whole(classes.length)} classes are too many for a map; see the list.`);
  }
  const counts = new Map(pairs.map(([label, prediction, rows]) => [`${label},${prediction}`, rows]));
  const totals = new Map();
  for (const [label, , rows] of pairs) totals.set(label, (totals.get(label) || 0) + rows);
  const dense = classes.length > 16;
  const short = (label) => (dense ? "" : String(label));
  const head = make("tr", {}, make("th", {}, dense ? "" : "label ╲ predicted"),
    classes.map((label) => make("th", { scope: "col", title: className(label) }, short(label))));
  const lines = classes.map((label) => make("tr", {},
    make("th", { scope: "row", title: className(label) }, dense ? String(label) : className(label)),
    classes.map((prediction) => {
      const rows = counts.get(`${label},${prediction}`) || 0;
      const share = rows / (totals.get(label) || 1);
      const strength = rows ? 0.12 + 0.78 * Math.sqrt(share) : 0;
      const shade = label === prediction ? "heat" : "wrong";
      return make("td", {
        style: rows ? `background:rgba(var(--${shade}), ${strength.toFixed(3)});${strength > 0.55 ? "color:var(--card)" : ""}` : null,
        onmousemove: (event) => showTip(event,
          `label ${className(label)}\npredicted ${className(prediction)}\n${whole(rows)} rows, ${percent(share)} of the label`),
        onmouseleave: hideTip,
      }, dense || !rows ? "" : whole(rows));
    })));
  return make("div", { class: "scroll" },
    make("table", { class: dense ? "heat dense" : "heat" }, make("thead", {}, head), make("tbody", {}, lines)));
}
