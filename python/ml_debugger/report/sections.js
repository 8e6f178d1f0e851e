// The sections of the page, in order.

const SAMPLE_COLUMNS = [
  { key: "input_id", title: "sample" },
  { key: "dataset_type", title: "dataset", name: true },
];
const classColumn = (key, title) => ({ key, title, show: className, name: true });
const LABEL_COLUMN = classColumn("label", "label");
const types = [...new Set(REPORT.metrics.map((row) => row.dataset_type))];
const MAX_LINES = 12;

function section(id, title, about, ...content) {
  return { id, title, node: make("section", { id }, make("h2", {}, title), make("p", { class: "soft" }, about), content) };
}

function newest(key) {
  // Of the last epoch: validation before anything else, training last.
  const rank = (name) => (/^(val|valid|validation|dev|test|eval)/i.test(name) ? 0 : /^train/i.test(name) ? 2 : 1);
  const rows = REPORT.metrics.filter((row) => isNumber(row[key]));
  const last = Math.max(...rows.map((row) => row.n_epoch));
  return rows.filter((row) => row.n_epoch === last).sort((a, b) => rank(a.dataset_type) - rank(b.dataset_type))[0];
}

function overview() {
  const card = (value, text, kind) => make("div", { class: "card" }, make("b", { class: kind || null }, value), make("span", {}, text));
  const { totals } = REPORT.capture;
  const cards = [card(whole(totals.rows), "rows recorded"), card(whole(REPORT.epochs.filter((epoch) => epoch >= 0).length), "epochs")];
  const accuracy = newest("accuracy");
  const loss = newest("loss");
  if (accuracy) cards.push(card(percent(accuracy.accuracy), `accuracy, ${accuracy.dataset_type}, ${epochName(accuracy.n_epoch)}`));
  if (loss) cards.push(card(decimal(loss.loss), `loss, ${loss.dataset_type}, ${epochName(loss.n_epoch)}`));
  if (isNumber(REPORT.label_issues.issues)) {
    const { issues } = REPORT.label_issues;
    cards.push(card(whole(issues), "labels likely wrong", issues ? "bad" : "good"));
  }
  cards.push(card(whole(totals.lost_rows), "rows lost in recording", totals.lost_rows ? "bad" : "good"));
  const notes = REPORT.notes.length ? make("ul", { class: "notes" }, REPORT.notes.map((note) => make("li", {}, note))) : null;
  return make("div", {}, make("div", { class: "cards" }, cards), notes);
}

function curves() {
  const series = (key) => types.slice(0, MAX_LINES).map((name) => ({
    name, points: REPORT.metrics.filter((row) => row.dataset_type === name && row.n_epoch >= 0).map((row) => [row.n_epoch, row[key]]),
  })).filter((one) => one.points.some((point) => isNumber(point[1])));
  const columns = [
    { key: "n_epoch", title: "epoch", number: true, show: (epoch) => (epoch < 0 ? "none" : String(epoch)) },
    { key: "dataset_type", title: "dataset" },
    { key: "rows", title: "rows", number: true, show: whole },
    { key: "labelled", title: "labelled", number: true, show: whole },
    { key: "judged", title: "judged", number: true, show: whole, help: "rows with a class as label and finite outputs" },
    { key: "accuracy", title: "accuracy", number: true, show: (value) => percent(value, 2) },
    { key: "loss", title: "loss", number: true, show: (value) => decimal(value, 4), help: "mean cross entropy in nats" },
  ];
  const charts = series("accuracy").length
    ? make("div", { class: "columns" },
      lineChart("Accuracy", series("accuracy"), { format: (v) => percent(v, 2), axis: (v) => percent(v, 0), low: 0, high: 1 }),
      lineChart("Loss", series("loss"), { format: (v) => decimal(v, 4), axis: shortNumber, low: 0 }))
    : null;
  const rows = table(columns, REPORT.metrics, { empty: "No rows." });
  return section("learning", "Learning", "By the stored logits and labels; of rows that repeat a sample of an epoch the newest counts.",
    charts, charts ? make("details", {}, make("summary", {}, "All figures"), rows) : rows);
}

function confusion() {
  const about = "Labels down, predictions across; the shade is the share of the label's rows. Hover for names and shares.";
  const { why, tables } = REPORT.confusion;
  if (why) return section("confusion", "Confusion", why);
  const holder = make("div");
  const names = [...new Set(tables.map((one) => one.dataset_type))];
  let name = names.find((one) => !/^train/i.test(one)) || names[0];
  let at = -1;
  const epochPicker = make("span");

  function show(one) {
    const wrong = one.pairs.filter(([label, prediction]) => label !== prediction)
      .map(([label, prediction, rows]) => ({ label, prediction, rows }));
    const cut = one.all > one.pairs.length ? `The ${whole(one.pairs.length)} most frequent of ${whole(one.all)} pairs are shown.` : "";
    holder.replaceChildren(make("div", { class: "columns" }, heatMap(one.pairs), make("div", {},
      make("h3", {}, "Most frequent mistakes"),
      table([LABEL_COLUMN, classColumn("prediction", "predicted"), { key: "rows", title: "rows", number: true, show: whole }],
        wrong, { shown: 10, empty: "No mistakes." }))), make("p", { class: "soft" }, cut));
  }
  function choose() {
    const own = tables.filter((one) => one.dataset_type === name);
    at = own.length - 1;
    epochPicker.replaceChildren(own.length > 1
      ? slider("epoch", own.map((one) => epochName(one.n_epoch)), (place) => show(own[place]), at) : make("span", {}, epochName(own[at].n_epoch)));
    show(own[at]);
  }
  choose();
  return section("confusion", "Confusion", about,
    make("div", { class: "controls" }, names.length > 1
      ? chooser("dataset", names, (place) => { name = names[place]; choose(); }, names.indexOf(name)) : null, epochPicker), holder);
}

function maps() {
  const layers = REPORT.layers;
  if (!layers.length) return section("map", "Feature map", "No layer was recorded.");
  const known = layers.filter((layer) => !layer.why && layer.map.epochs.length);
  const why = layers.filter((layer) => layer.why).map((layer) => `${layer.name}: ${layer.why}`).join(" ");
  if (!known.length) return section("map", "Feature map", why);
  const hasLabels = known.some((layer) => layer.map.epochs.some((epoch) => epoch.label.some((label) => label >= 0)));
  const hasPredictions = known.some((layer) => layer.map.epochs.some((epoch) => epoch.prediction.some((one) => one >= 0)));
  const ways = [];
  if (hasLabels) ways.push("label");
  if (hasPredictions) ways.push("prediction");
  if (hasLabels && hasPredictions) ways.push("error");
  ways.push("dataset");
  let layer = known[known.length - 1];
  let epoch = layer.map.epochs[layer.map.epochs.length - 1];
  let way = ways[0];
  const chart = pointChart({ height: 460 });
  const names = make("div");
  const epochs = make("span");
  const about = make("p", { class: "soft" });
  const errorColor = (group) => (group ? theme("bad") : theme("soft"));

  function groupOf(place) {
    const [label, prediction] = [epoch.label[place], epoch.prediction[place]];
    if (way === "error") return label < 0 || prediction < 0 ? 0 : Number(label !== prediction);
    if (way === "dataset") return types.indexOf(layer.map.samples[epoch.sample[place]][0]);
    return way === "label" ? label : prediction;
  }
  const groupName = (group) => (way === "error" ? ["right", "wrong"][group] : way === "dataset" ? types[group] : group < 0 ? "none" : className(group));
  const groupColor = (group) => (way === "error" ? errorColor(group) : group < 0 ? theme("soft") : color(group));

  function show() {
    const points = epoch.sample.map((sample, place) => {
      const [dataset, id] = layer.map.samples[sample];
      const group = groupOf(place);
      const judged = epoch.label[place] >= 0 && epoch.prediction[place] >= 0;
      return {
        x: epoch.x[place] / 1000, y: epoch.y[place] / 1000, group, large: way === "error" && group === 1,
        text: () => [`${id} (${dataset})`, epoch.label[place] >= 0 ? `label ${className(epoch.label[place])}` : "no label",
          judged ? `predicted ${className(epoch.prediction[place])}` : ""].filter(Boolean).join("\n"),
      };
    });
    if (way === "error") points.sort((one, other) => one.group - other.group);
    chart.show(points, groupColor);
    const groups = [...new Set(points.map((point) => point.group))].sort((a, b) => a - b).slice(0, 40);
    names.replaceChildren(legend(groups.map(groupName), (picked) => chart.pick(picked === null ? null : groups[picked]), (place) => groupColor(groups[place])));
    const kept = layer.explained.length > 1 ? ` (${percent(layer.explained[0] + layer.explained[1], 0)} of the variance of ${whole(layer.width)} numbers)` : "";
    about.textContent = layer.map.method === "umap" ? "UMAP of the newest epoch."
      : `First two principal components of the newest epoch${kept}; all epochs lie in the same axes. Tokens and maps are averaged to one vector a sample.`;
  }
  function choose() {
    const own = layer.map.epochs;
    epoch = own[own.length - 1];
    epochs.replaceChildren(own.length > 1
      ? slider("epoch", own.map((one) => epochName(one.n_epoch)), (place) => { epoch = own[place]; show(); }, own.length - 1)
      : make("span", {}, epochName(epoch.n_epoch)));
    show();
  }
  const found = section("map", "Feature map", "Where the samples lie in the features of a layer. Hover for ids; click a name of the legend to see it alone.",
    make("div", { class: "controls" },
      known.length > 1 ? chooser("layer", known.map((one) => one.name), (place) => { layer = known[place]; choose(); }, known.length - 1) : make("span", {}, `layer ${layer.name}`),
      chooser("colour", ways, (place) => { way = ways[place]; show(); }), epochs),
    names, chart.canvas, about, why ? make("p", { class: "soft" }, why) : null);
  choose();
  return found;
}

function labelIssues() {
  const issues = REPORT.label_issues;
  if (issues.why) return section("labels", "Labels that are likely wrong", issues.why);
  const near = issues.layer === null ? "No layer was recorded, so neighbours were not asked."
    : `The score is the mean of that quality and of the share of the nearest neighbours in ${issues.layer} that agree.`;
  const columns = [
    { key: "place", title: "#", number: true },
    ...SAMPLE_COLUMNS, LABEL_COLUMN,
    classColumn("suggested_label", "suggested"),
    { key: "score", title: "score", number: true, show: (value) => decimal(value), bar: true, help: "0: surely wrong, 1: surely right" },
    { key: "confidence", title: "confidence", number: true, show: (value) => decimal(value), help: "mean probability of the label over the epochs" },
    { key: "neighbour_disagreement", title: "neighbours disagree", number: true, show: (value) => percent(value, 0) },
    { key: "is_issue", title: "finding", show: (value) => (value ? "likely wrong" : ""), help: "what confident learning finds wrong" },
  ];
  const rows = issues.rows.map((row, place) => ({ place: place + 1, ...row }));
  return section("labels", "Labels that are likely wrong",
    `Worst first, ${whole(rows.length)} of ${whole(issues.samples)} samples. Quality by ${issues.method}. ${near}`, table(columns, rows, { shown: 25 }));
}

function dynamics() {
  const found = REPORT.dynamics;
  if (found.why) return section("dynamics", "Training dynamics", found.why);
  const points = found.points;
  const chart = pointChart({ height: 300, xTitle: "variability", yTitle: "confidence" });
  const most = Math.max(1e-9, ...points.variability);
  const bands = ["never right", "right at times", "always right"];
  const bandColor = (band) => [theme("bad"), color(1), theme("accent")][band];
  const plot = points.input_id.map((id, place) => ({
    x: points.variability[place] / most, y: points.confidence[place],
    group: points.correctness[place] === 0 ? 0 : points.correctness[place] === 1 ? 2 : 1,
    text: () => `${id} (${points.dataset_type[place]})\nlabel ${className(points.label[place])}\nconfidence ${decimal(points.confidence[place])}, variability ${decimal(points.variability[place])}\nright in ${percent(points.correctness[place], 0)} of the epochs`,
  }));
  const columns = [
    ...SAMPLE_COLUMNS, LABEL_COLUMN,
    classColumn("prediction", "last prediction"),
    { key: "forgetting_events", title: "forgotten", number: true, show: whole, help: "right in one epoch and wrong in the next" },
    { key: "flips", title: "flips", number: true, show: whole, help: "changes of the prediction" },
    { key: "correctness", title: "right in", number: true, show: (value) => percent(value, 0) },
    { key: "confidence", title: "confidence", number: true, show: (value) => decimal(value) },
    { key: "first_learned", title: "first right", number: true, show: (value) => (value < 0 ? "never" : epochName(value)) },
  ];
  const last = found.forgetting_histogram.length - 1;
  const node = section("dynamics", "Training dynamics",
    `${whole(found.samples)} samples over the epochs: ${whole(found.never_learned)} never learned, ${whole(found.never_forgotten)} learned and never forgotten, ${whole(found.most_forgotten_all)} forgotten at least once.`,
    make("div", { class: "columns" },
      make("div", {}, make("h3", {}, "Confidence in the label and its variability"), legend(bands, (band) => chart.pick(band), bandColor), chart.canvas),
      barChart("Forgetting events a sample", found.forgetting_histogram, found.forgetting_histogram.map((_, place) => (place === 20 && place === last ? "20+" : String(place))))),
    make("h3", { style: "margin-top:1.1rem" }, "Most often forgotten"), table(columns, found.most_forgotten, { shown: 10, empty: "No sample was forgotten." }));
  chart.show(plot, bandColor);
  return node;
}

function perLayer(id, title, about, content) {
  const known = REPORT.layers.filter((layer) => !layer.why);
  if (!known.length) return section(id, title, REPORT.layers.map((layer) => `${layer.name}: ${layer.why}`).join(" ") || "No layer was recorded.");
  const holder = make("div");
  const show = (place) => holder.replaceChildren(...content(known[place]));
  show(known.length - 1);
  const control = known.length > 1 ? chooser("layer", known.map((layer) => layer.name), show, known.length - 1) : make("span", {}, `layer ${known[0].name}`);
  return section(id, title, about, make("div", { class: "controls" }, control), holder);
}

function neighbours() {
  const about = "In the features of the newest epoch. Distances are in medians: 0 means equal features, 1 is usual.";
  return perLayer("neighbours", "Near-duplicates and outliers", about, (layer) => [make("div", { class: "columns" },
    make("div", {}, make("h3", {}, "Closest pairs"), table([
      { key: "input_id", title: "sample", show: (id, row) => `${id} (${row.dataset_type})` }, LABEL_COLUMN,
      { key: "other_input_id", title: "other sample", show: (id, row) => `${id} (${row.other_dataset_type})` },
      classColumn("other_label", "label"),
      { key: "distance", title: "distance", number: true, show: (value) => decimal(value) },
    ], layer.near_duplicates, { shown: 10 })),
    make("div", {}, make("h3", {}, "Farthest from all others"), table([
      ...SAMPLE_COLUMNS, LABEL_COLUMN,
      classColumn("prediction", "predicted"),
      { key: "distance", title: "distance", number: true, show: (value) => decimal(value, 2) },
    ], layer.outliers, { shown: 10 })))]);
}

function drift() {
  const about = "How far the features move, in standard deviations: of the means, and the Fréchet distance of normal distributions with their moments.";
  const columns = [
    { key: "from", title: "from" }, { key: "to", title: "to" },
    { key: "mean_shift", title: "mean shift", number: true, show: (value) => decimal(value) },
    { key: "frechet_distance", title: "Fréchet distance", number: true, show: (value) => decimal(value) },
    { key: "rows", title: "rows", number: true, show: whole, help: "of the smaller group" },
  ];
  const named = (row) => ({ ...row, from: `${row.from_dataset_type}, ${epochName(row.from_epoch)}`, to: `${row.to_dataset_type}, ${epochName(row.to_epoch)}` });
  return perLayer("drift", "Drift", about, (layer) => {
    const lines = (between, key) => {
      const groups = new Map();
      for (const row of layer.drift.filter((one) => one.between === between && one.to_epoch >= 0)) {
        const name = between === "epochs" ? row.to_dataset_type : `${row.from_dataset_type} – ${row.to_dataset_type}`;
        if (!groups.has(name)) groups.set(name, []);
        groups.get(name).push([row.to_epoch, row[key]]);
      }
      return [...groups].map(([name, points]) => ({ name, points }));
    };
    const format = { format: (value) => decimal(value), axis: shortNumber, low: 0 };
    return [make("div", { class: "columns" },
      lineChart("Fréchet distance to the epoch before", lines("epochs", "frechet_distance"), format),
      lineChart("Fréchet distance between dataset types", lines("dataset types", "frechet_distance"), format)),
    make("details", {}, make("summary", {}, "All figures"), table(columns, layer.drift.map(named), { empty: "There is one group only." }))];
  });
}

function capture() {
  const { totals, epochs, ranks, lost, writers } = REPORT.capture;
  const number = (key, title, show = whole, help = null) => ({ key, title, number: true, show, help });
  const lostRows = Object.entries(lost).map(([cause, rows]) => ({ cause, rows }));
  const sum = totals.lost_rows ? `${whole(totals.lost_rows)} rows were lost.` : "No row was lost.";
  const size = isNumber(totals.disk_bytes) ? ` ${bytes(totals.disk_bytes)} on disk.` : "";
  const open = totals.unusable_segments ? ` ${whole(totals.unusable_segments)} segments were open when the machine lost power and are not read.` : "";
  const part = (title, node) => make("div", {}, make("h3", {}, title), node);
  return section("capture", "Health of the recording", `${whole(totals.rows)} rows. ${sum}${size}${open}`,
    make("div", { class: "columns" },
      epochs.length ? part("Epochs", table([
        { key: "n_epoch", title: "epoch", number: true, show: (epoch) => (epoch < 0 ? "none" : String(epoch)) },
        number("rows", "rows"), number("labelled_rows", "labelled"), number("calls", "calls"), number("lost_rows", "lost"), number("disk_bytes", "on disk", bytes),
      ], epochs, { shown: 12 })) : null,
      make("div", {},
        part("Ranks", table([number("rank", "rank"), number("rows", "rows"), number("attempts", "attempts", whole, "tracers that were made"), number("lost_rows", "lost")], ranks)),
        lostRows.length ? part("Lost rows by cause", table([{ key: "cause", title: "cause" }, number("rows", "rows")], lostRows)) : null)),
    writers.length ? make("div", { style: "margin-top:1.1rem" }, part("Tracers that wrote last", table([
      number("rank", "rank"), number("attempt", "attempt"), number("rows_submitted", "submitted"), number("rows_committed", "committed"),
      number("rows_discarded", "discarded"), number("rows_failed", "failed"), number("rows_in_flight", "in flight"), number("commits", "commits"),
      number("stalls", "waits", whole, "how often a hook waited for room in the ring"), number("stall_seconds", "waited", (value) => (isNumber(value) ? `${decimal(value, 2)} s` : "–")),
      number("write_throughput_bytes_per_s", "throughput", (value) => (isNumber(value) ? `${bytes(value)}/s` : "–")),
    ], writers))) : null);
}

const report = document.getElementById("report");
report.append(make("header", {},
  make("h1", {}, REPORT.model_name, " ", make("small", {}, REPORT.version_name)),
  make("div", { class: "meta" }, `Report of ${REPORT.created.replace("T", " ").replace("+00:00", " UTC")} · ml-debugger ${REPORT.ml_debugger} · architecture ${REPORT.fingerprint.slice(0, 12)}`)));
const navigation = make("nav", { "aria-label": "Sections" });
document.body.append(tip);
report.append(navigation, overview());
for (const build of [curves, confusion, maps, labelIssues, dynamics, neighbours, drift, capture]) {
  const one = build();
  navigation.append(make("a", { href: `#${one.id}` }, one.title));
  report.append(one.node);
}
report.append(make("footer", {}, "Everything in this file was computed from the trace; nothing was loaded from elsewhere."));
// The sections are younger than the address.
document.getElementById(location.hash.slice(1))?.scrollIntoView({ behavior: "instant" });
