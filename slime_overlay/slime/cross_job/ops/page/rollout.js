// A rollout in a drawer: how far it came and when, its versions, who holds it, and its samples.

const PER_PAGE = 2;
const AT_FIRST = 1500; // characters of a text that are shown before somebody asks for the rest
const FIRST_COLUMNS = ["prompt", "prompts", "question", "response", "responses", "text", "answer", "label"];

let shownRollout = null; // {id, seq, from, first, version, turn}

function openRollout(id, from) {
  shownRollout = { id, seq: -1, from: from || (shownRollout && shownRollout.from), first: 0, version: "", turn: 0 };
  const close = el("button", { type: "button", class: "close", "aria-label": "Close", onclick: closeRollout }, "\u2715");
  by("rollout").replaceChildren(
    el("div", { class: "head" }, el("h2", { id: "rollout-title", tabindex: -1 }, `Rollout ${id}`),
      el("span", { id: "rollout-age", class: "fresh", "data-state": "stale" }), close),
    el("div", { id: "rollout-actions", class: "actions" }), el("div", { id: "rollout-way" }),
    el("div", { id: "rollout-detail" }), el("div", { id: "rollout-samples" }));
  show(by("rollout"), true);
  document.body.classList.add("open");
  by("rollout-title").focus();
  drawRollout();
  drawAge();
  if (state.live) loadSamples();
}

function closeRollout() {
  if (!shownRollout) return;
  const { from } = shownRollout;
  shownRollout = null;
  show(by("rollout"), false);
  by("rollout").replaceChildren();
  document.body.classList.remove("open");
  if (from && from.isConnected) from.focus();
}

/** Draw it again where something happened to it. */
function drawRollout() {
  if (!shownRollout) return;
  const row = state.rows.get(shownRollout.id);
  const seq = row ? row.seq : -2;
  if (shownRollout.seq === seq) return;
  const wasPublished = shownRollout.versionSeen;
  shownRollout.seq = seq;
  shownRollout.versionSeen = row ? row.version : 0;
  by("rollout-way").replaceChildren(row ? way(row) : el("p", { class: "muted" },
    "Nothing is known of this rollout: it was not asked for yet, or it is older than what the broker remembers."));
  if (!state.live) return;
  loadDetail();
  if (wasPublished !== undefined && wasPublished !== shownRollout.versionSeen) loadSamples();
}

function way(row) {
  const steps = [["demanded", row.demanded], ["begun", row.begun], ["made", row.made], ["published", row.published],
    ["claimed", row.claimed], ["acked", row.acked]].filter(([, at]) => at > 0);
  const late = row.begun && row.demanded > row.begun; // it was generated ahead, before somebody asked for it
  if (late) steps.shift();
  const first = Math.min(...steps.map(([, at]) => at)), end = Math.max(...steps.map(([, at]) => at));
  const names = { demanded: "waits to be begun", begun: "is generated", made: "is published", published: "queues",
    claimed: "is trained on" };
  const bars = steps.slice(0, -1).map(([name, at], k) => {
    const bar = el("span", { class: `bar bar-${name}` });
    bar.style.left = `${(100 * (at - first)) / (end - first || 1)}%`;
    bar.style.width = `${Math.max(0.4, (100 * (steps[k + 1][1] - at)) / (end - first || 1))}%`;
    return el("div", { class: "span" }, el("span", { class: "name" }, names[name]), el("span", { class: "track" }, bar),
      el("span", { class: "time" }, seconds(steps[k + 1][1] - at)));
  });
  const facts = [
    ["state", row.state], ["reward", figure(row.reward)], ["samples", row.num_samples >= 0 ? count(row.num_samples) : "\u2013"],
    ["bytes", bytes(row.nbytes)], ["weights", known(row.weight_version)], ["behind", known(row.staleness)],
    ["version", known(row.version)], ["claims", known(row.claims)], ["losses", known(row.losses)],
    ["rollout job waited", seconds(row.producer_waited_s)], ["train job waited", seconds(row.consumer_waited_s)],
    ...(late ? [["demanded", clock(row.demanded, state.wall)]] : []),
    ...steps.map(([name, at]) => [name, clock(at, state.wall)]),
  ];
  return el("div", {}, el("div", { class: "way" }, bars), factList(facts));
}

function factList(facts) {
  return el("dl", { class: "facts wide" }, facts.map(([name, value]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

async function loadDetail() {
  const { id } = shownRollout, place = by("rollout-detail");
  const found = await asked(`/api/rollout?job=${encodeURIComponent(state.job)}&id=${id}`);
  if (!shownRollout || shownRollout.id !== id) return;
  if (found.kind) return void place.replaceChildren(el("p", { class: "muted" }, found.error));
  const groups = Object.entries(found.groups).map(([name, group]) => [`group ${name}`,
    `${group.state}${group.held_by ? `, by the ${group.held_by}` : ""}`]);
  place.replaceChildren(groups.length ? factList(groups) : "",
    ...found.versions.map((version) => el("details", {}, el("summary", {}, `version ${version.version}: ` +
      `${plural(version.num_samples, "sample")}, ${bytes(version.nbytes)}, weights ${known(version.weight_version)}`),
    factList([["published", clock(version.published_at, state.wall)], ["parts", version.parts],
      ["vault", version.vault || "\u2013"], ["durable store", version.stored || "\u2013"],
      ["columns", version.columns.join(", ")], ["meta", JSON.stringify(version.meta)]]))),
    ...found.events.map((event) => el("p", { class: "muted" }, `${clock(event.at, state.wall)} ${event.kind}: ${event.text}`)));
  drawActions(found);
}

// ---------------------------------------------------------------- samples

async function loadSamples() {
  const mine = shownRollout, place = by("rollout-samples"), turn = ++mine.turn;
  const query = `job=${encodeURIComponent(state.job)}&id=${mine.id}&first=${mine.first}&count=${PER_PAGE}`;
  place.setAttribute("aria-busy", "true");
  if (!place.childNodes.length) place.append(el("p", { class: "muted" }, "reading samples \u2026"));
  const found = await asked(`/api/samples?${query}&version=${mine.version}`);
  if (shownRollout !== mine || mine.turn !== turn) return;
  place.removeAttribute("aria-busy");
  const title = el("h3", {}, "Samples");
  if (found.kind) {
    return void place.replaceChildren(title, el("p", { class: "muted" }, `not readable: ${found.error}`));
  }
  if (!found.samples) return void place.replaceChildren(title, textBlock(JSON.stringify(found.value, null, 1)));
  place.replaceChildren(title, pager(found), ...found.samples.map(sampleCard));
}

function pager(found) {
  const { first } = shownRollout, last = Math.min(found.num_samples, first + PER_PAGE);
  const go = (to) => () => {
    shownRollout.first = to;
    loadSamples();
  };
  const field = el("input", { size: 6, inputmode: "numeric", "aria-label": "first sample shown", value: first });
  field.addEventListener("change", () => {
    const to = Number.parseInt(field.value, 10);
    if (to >= 0) go(Math.min(to, Math.max(0, found.num_samples - 1)))();
  });
  return el("div", { class: "pager" },
    el("button", { type: "button", disabled: first <= 0, onclick: go(Math.max(0, first - PER_PAGE)) }, "\u2190 before"),
    field, el("span", {}, `to ${last - 1} of ${count(found.num_samples)}`),
    el("button", { type: "button", disabled: last >= found.num_samples, onclick: go(first + PER_PAGE) }, "after \u2192"));
}

function sampleCard(sample) {
  const place = (name, value) => {
    const at = FIRST_COLUMNS.indexOf(name);
    return (typeof value === "string" ? 0 : typeof value !== "object" ? 200 : 400) + (at < 0 ? 100 : at);
  };
  const columns = Object.entries(sample.values).sort((a, b) => place(...a) - place(...b));
  const short = columns.filter(([, value]) => typeof value !== "object" && typeof value !== "string");
  const rest = columns.filter(([, value]) => typeof value === "string" || (typeof value === "object" && value !== null));
  return el("article", { class: "sample" },
    el("h4", {}, `sample ${sample.index}`, sample.part ? el("span", { class: "muted" }, ` part ${sample.part}`) : null),
    ...rest.filter(([, value]) => typeof value === "string").map(columnBlock),
    short.length ? factList(short.map(([name, value]) => [name, typeof value === "number" ? String(value) : known(value)])) : "",
    ...rest.filter(([, value]) => typeof value !== "string").map(columnBlock));
}

function columnBlock([name, value]) {
  const text = typeof value === "string" ? value : JSON.stringify(value).replaceAll(",", ", ");
  return el("div", { class: "column" }, el("h5", {}, name), textBlock(text, typeof value !== "string"));
}

function textBlock(text, dense = false) {
  const block = el("pre", { class: dense ? "dense" : null, dir: "auto", tabindex: 0 });
  const head = dense ? 300 : AT_FIRST;
  if (!text) return el("pre", { class: "muted" }, "(empty)");
  if (text.length <= head) {
    block.textContent = visible(text);
    return block;
  }
  block.textContent = `${visible(text.slice(0, head))}\u2026`;
  const more = el("button", { type: "button", class: "link" }, `show ${count(Math.min(text.length, MOST) - head)} more characters`);
  more.addEventListener("click", () => {
    block.textContent = visible(text);
    more.remove();
  });
  return el("div", {}, block, more);
}
