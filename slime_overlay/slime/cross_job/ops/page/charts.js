// Lines over rollouts or over time, drawn as SVG. Long series are thinned to what the width can show: a line of means
// inside a band from the least to the greatest.

const HEIGHT = 150;
const EDGE = { left: 46, right: 10, top: 8, bottom: 20 };

/**
 * A chart in a figure of its own. `spec`: {title, unit, series: [{name, style}], zero, clip, whole, time, bars, open}.
 * draw(xs, columns): columns[i][k] belongs to series i at xs[k]; null where there is none.
 */
function chart(parent, spec) {
  const words = el("span", { class: "muted told" });
  const names = spec.series.length > 1 ? spec.series.map((s) => el("span", { class: `key-${s.style}` }, s.name)) : [];
  const picture = svg("svg", { role: "img", height: HEIGHT, tabindex: spec.open ? 0 : null });
  const nothing = el("p", { class: "empty muted" }, spec.empty || "nothing yet");
  parent.append(el("figure", { class: "panel chart" },
    el("figcaption", {}, el("h2", {}, spec.title), el("span", { class: "key" }, names), words), picture, nothing));
  let last = null, drawn = null, picked = -1;

  function draw(xs, columns) {
    last = [xs, columns];
    const width = Math.max(200, picture.clientWidth || picture.parentNode.clientWidth - 24);
    const values = columns.flat().filter(isNumber);
    show(nothing, !values.length);
    picture.classList.toggle("blank", !values.length);
    if (!values.length) return void put(words, "");
    const lines = columns.map((column) => thinned(xs, column, (width - EDGE.left - EDGE.right) / 2));
    const [low, high, beyond] = range(values, spec);
    const half = xs.half || 0; // of a bar
    const first = xs[0] - half, end = xs[xs.length - 1] + half;
    const x = (v) => EDGE.left + ((v - first) / (end - first || 1)) * (width - EDGE.left - EDGE.right);
    const y = (v) => HEIGHT - EDGE.bottom -
      ((Math.min(v, high) - low) / (high - low || 1)) * (HEIGHT - EDGE.top - EDGE.bottom);
    const parts = [...grid(low, high, first, end, x, y, width, spec)];
    lines.forEach((line, at) => parts.push(...traces(line, spec, spec.series[at].style, x, y, low, half)));
    const cross = svg("line", { class: "cross", y1: EDGE.top, y2: HEIGHT - EDGE.bottom });
    cross.style.display = "none";
    picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    picture.replaceChildren(...parts, cross);
    drawn = { xs, columns, x, cross, first, end, width };
    const maxima = columns.map((column) => spec.unit(column.filter(isNumber).reduce((a, b) => Math.max(a, b), -Infinity)));
    names.forEach((node, at) => put(node, `${spec.series[at].name}, max ${maxima[at]}`));
    const newest = names.length ? "" : `last ${spec.unit(columns[0].filter(isNumber).pop())}, max ${maxima[0]}`;
    drawn.told = newest + (beyond ? `scale cut at ${spec.unit(high)}` : "");
    if (picked < 0) put(words, drawn.told);
    mark(picture, "aria-label", visible(`${spec.title}: ${names.map((n) => n.textContent).join("; ")} ${drawn.told}`));
  }

  function pick(index) {
    if (!drawn || !drawn.xs.length) return;
    picked = Math.max(0, Math.min(drawn.xs.length - 1, index));
    const at = drawn.xs[picked];
    for (const end of ["x1", "x2"]) drawn.cross.setAttribute(end, drawn.x(at));
    drawn.cross.style.display = "";
    const where = spec.time ? clock(at, state.wall) : `#${at}`;
    put(words, `${where}: ` + spec.series.map(
      (s, i) => `${spec.series.length > 1 ? `${s.name} ` : ""}${spec.unit(drawn.columns[i][picked])}`).join(" \u00b7 "));
  }

  function leave() {
    picked = -1;
    if (drawn) {
      drawn.cross.style.display = "none";
      put(words, drawn.told);
    }
  }

  picture.addEventListener("pointermove", (event) => {
    if (!drawn) return;
    const box = picture.getBoundingClientRect();
    const pixel = ((event.clientX - box.left) / box.width) * drawn.width;
    const part = (pixel - EDGE.left) / (drawn.width - EDGE.left - EDGE.right);
    pick(nearest(drawn.xs, drawn.first + part * (drawn.end - drawn.first)));
  });
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("blur", leave);
  const chosen = () => spec.open && drawn && picked >= 0 && spec.open(drawn.xs[picked], picture);
  picture.addEventListener("click", chosen);
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && drawn) pick(picked < 0 ? (step < 0 ? drawn.xs.length - 1 : 0) : picked + step);
    else if (event.key === "Enter") chosen();
    else return;
    event.preventDefault();
  });
  new ResizeObserver(() => last && draw(...last)).observe(picture);
  return { draw };
}

/** At most `most` points [x, mean, least, greatest]. */
function thinned(xs, values, most) {
  const size = Math.max(1, Math.ceil(xs.length / Math.max(10, most)));
  const points = [];
  for (let from = 0; from < xs.length; from += size) {
    let sum = 0, n = 0, least = Infinity, greatest = -Infinity;
    for (let at = from; at < Math.min(xs.length, from + size); at++) {
      const value = values[at];
      if (!isNumber(value)) continue;
      sum += value;
      n += 1;
      least = Math.min(least, value);
      greatest = Math.max(greatest, value);
    }
    const middle = xs[Math.min(xs.length - 1, from + (size >> 1))];
    points.push(n ? [middle, sum / n, least, greatest] : [middle, null, null, null]);
  }
  points.thinned = size > 1;
  return points;
}

/** [low, high, whether values lie beyond]. */
function range(values, spec) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (spec.zero) low = Math.min(0, low);
  let beyond = false;
  if (spec.clip && values.length > 20) { // one long wait at the start would flatten all others
    const sorted = values.slice().sort((a, b) => a - b);
    const usual = sorted[Math.floor(0.98 * (sorted.length - 1))];
    if (usual > 0 && high > 4 * usual) [high, beyond] = [1.5 * usual, true];
  }
  if (high === low) high = low + (spec.whole ? 1 : Math.abs(low) || 1);
  const step = nice((high - low) / 3, spec.whole);
  return [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step, beyond];
}

function nice(step, whole) {
  const unit = 10 ** Math.floor(Math.log10(step));
  const found = [1, 2, 5, 10].find((n) => n * unit >= step * 0.999) * unit;
  return whole ? Math.max(1, Math.round(found)) : found;
}

function* grid(low, high, first, end, x, y, width, spec) {
  const step = nice((high - low) / 3, spec.whole);
  for (let value = low; value <= high + step / 2; value += step) {
    yield svg("line", { class: "rule", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) });
    const label = spec.unit(Math.abs(value) < step / 1000 ? 0 : Number(value.toPrecision(6)));
    yield svg("text", { x: EDGE.left - 6, y: y(value) + 3.5, "text-anchor": "end" }, label);
  }
  const apart = (end - first) / Math.max(2, Math.floor(width / 110));
  const gap = spec.time ? roundTime(apart) : Math.max(1, nice(apart || 1, true));
  for (let value = Math.ceil(first / gap) * gap; value <= end + 1e-9; value += gap) {
    const text = !spec.time ? String(value) : gap < 60 ? clock(value, state.wall) : clock(value, state.wall).slice(0, -3);
    const at = x(value), half = 3.2 * text.length;
    const anchor = at - half < EDGE.left - 8 ? "start" : at + half > width ? "end" : "middle";
    yield svg("text", { x: anchor === "end" ? width - 2 : at, y: HEIGHT - 5, "text-anchor": anchor }, text);
  }
}

const ROUND_S = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400, 604800];

/** The next longer time that people count in. */
function roundTime(size) {
  return ROUND_S.find((s) => s >= size) || 86400 * Math.ceil(size / 86400);
}

function* traces(line, spec, style, x, y, low, half) {
  const close = (n) => n.toFixed(1);
  if (spec.bars) {
    const wide = Math.max(1, x(line[0][0] + half) - x(line[0][0] - half) - 1);
    const path = line.filter((p) => p[1]).map(
      (p) => `M${close(x(p[0]) - wide / 2)} ${close(y(low))}V${close(y(p[1]))}h${close(wide)}V${close(y(low))}z`);
    return void (yield svg("path", { class: `fill-${style}`, d: path.join("") }));
  }
  const runs = [[]];
  for (const point of line) {
    if (point[1] === null) runs.push([]);
    else runs[runs.length - 1].push(point);
  }
  for (const run of runs.filter((r) => r.length)) {
    const along = (points, at) => points.map((p) => `${close(x(p[0]))} ${close(y(p[at]))}`).join("L");
    if (line.thinned) {
      yield svg("path", { class: `band-${style}`, d: `M${along(run, 3)}L${along(run.slice().reverse(), 2)}z` });
    }
    if (spec.dots && !line.thinned) {
      yield svg("path", { class: `dots-${style}`, d: run.map((p) => `M${close(x(p[0]))} ${close(y(p[1]))}h0`).join("") });
    } else yield run.length > 1
      ? svg("path", { class: `line-${style}`, d: `M${along(run, 1)}` })
      : svg("circle", { class: `dot-${style}`, cx: close(x(run[0][0])), cy: close(y(run[0][1])), r: 2.5 });
  }
}

function nearest(xs, wanted) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low > 0 && wanted - xs[low - 1] < xs[low] - wanted ? low - 1 : low;
}

// ---------------------------------------------------------------- those of this page

function makeCharts(parent, open) {
  const reward = chart(parent, {
    title: "Reward", series: [{ name: "reward", style: "a" }], unit: figure, open, zero: true,
    empty: "no rollout tells a reward (meta[\"reward\"])",
  });
  const behind = chart(parent, {
    title: "Staleness", series: [{ name: "versions behind", style: "b" }], unit: figure, open, zero: true, whole: true,
    dots: true,
    empty: "nothing was claimed yet, or no weight versions are told",
  });
  const waits = chart(parent, {
    title: "Waited before each rollout", unit: seconds, open, zero: true, clip: true,
    series: [{ name: "train job", style: "a" }, { name: "rollout job", style: "c" }],
  });
  const pace = chart(parent, {
    title: "Acked per minute", series: [{ name: "rollouts", style: "b" }], unit: figure, time: true, bars: true,
    zero: true,
  });
  return () => {
    const rows = state.ids.map((id) => state.rows.get(id));
    const pluck = (name) => rows.map((row) => row[name]);
    const reached = (name, when) => rows.map((row) => (row[when] ? row[name] : null));
    reward.draw(state.ids, [pluck("reward")]);
    behind.draw(state.ids, [pluck("staleness")]);
    waits.draw(state.ids, [reached("consumer_waited_s", "claimed"), reached("producer_waited_s", "begun")]);
    pace.draw(...perMinute(rows, 30));
  };
}

/** Rollouts acked a minute, in slices of the run. */
function perMinute(rows, most) {
  let first = Infinity, end = -Infinity;
  for (const row of rows) {
    if (!row.acked) continue;
    first = Math.min(first, row.acked);
    end = Math.max(end, row.acked);
  }
  if (end <= first) return [[], [[]]];
  const size = roundTime((end - first) / most);
  const from = Math.floor(first / size);
  if (state.wall && Math.floor(end / size) > from + 1) end = Math.min(end, size * Math.floor(state.wall / size) - 1e-6);
  const slices = new Array(Math.floor(end / size) - from + 1).fill(0);
  for (const row of rows) {
    const at = Math.floor(row.acked / size) - from;
    if (row.acked && at < slices.length) slices[at] += 1; // the last slice, which did not end yet, is left out
  }
  const xs = slices.map((_, at) => (from + at + 0.5) * size);
  xs.half = size / 2;
  return [xs, [slices.map((n) => (60 * n) / size)]];
}
