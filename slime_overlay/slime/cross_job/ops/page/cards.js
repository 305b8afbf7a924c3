// The verdict, the figures, the two jobs with the balance between them, and the events.

function drawHead() {
  const { status } = state;
  put(by("job"), state.job || (state.live ? "no job yet" : ""));
  put(by("namespace"), state.namespace ? `namespace ${state.namespace}` : "");
  put(by("cluster"), state.cluster ? `Ray cluster ${state.cluster}` : "");
  show(by("state"), Boolean(status));
  if (!status) return;
  const glyph = { running: "\u25b6", paused: "\u2016", draining: "\u25bd", waiting: "\u25cb", complete: "\u2713" };
  put(by("state"), `${glyph[status.state] || (MARKS[status.state] || [""])[0]} ${status.state}`);
  mark(by("state"), "data-state", visible(status.state));
}

function drawVerdict() {
  const said = verdict(state.status);
  show(by("verdict"), true);
  mark(by("verdict"), "data-level", said.level);
  put(by("verdict-main"), `${said.glyph} ${said.text}`);
  listed(by("verdict-more"), said.more, (text) => text, (text) => el("li", {}, text));
}

function drawFigures() {
  const s = state.status, r = s.recent;
  const tiles = [
    ["published", count(s.published), s.republished ? `${count(s.republished)} again` : ""],
    ["acked", count(s.acked), s.freed ? `${count(s.freed)} freed` : ""],
    ["queue", count(s.queue_depth), s.queue_depth ? `oldest ${seconds(s.oldest_queued_s)}` : ""],
    ["reward", figure(r.reward), isNumber(r.reward) ? `mean of ${r.rollouts}` : ""],
    ["per minute", figure(r.per_minute), "rollouts"],
    ["samples/s", figure(r.samples_per_s), ""],
    ["weights", isNumber(s.weight_version) ? `v${s.weight_version}` : "\u2013",
      isNumber(s.staleness) ? `queue ${s.staleness} behind` : ""],
    ["held", bytes(s.held_bytes), `${bytes(s.bytes.published)} in all`],
    ["faults", count(faults(s)), faultWords(s)],
  ];
  listed(by("figures"), tiles, (tile) => tile[0],
    (tile) => el("div", {}, el("dt", {}, tile[0]), el("dd", {}, el("b"), el("small"))),
    (node, tile) => {
      put(node.lastChild.firstChild, tile[1]);
      put(node.lastChild.lastChild, tile[2]);
      mark(node, "data-bad", tile[0] === "faults" && faults(s) ? "yes" : "no");
    });
}

const FAULTS = ["failed", "dead", "lost", "dropped", "outdated", "rewound", "quarantined", "restarted", "vault died",
  "store emptied"];

const faults = (status) => FAULTS.reduce((sum, kind) => sum + (status.events[kind] || 0), 0);

function faultWords(status) {
  return FAULTS.filter((kind) => status.events[kind]).map((kind) => `${kind} ${status.events[kind]}`).join(", ");
}

// ---------------------------------------------------------------- the two jobs

function drawJobs() {
  const s = state.status;
  const groups = Object.entries(s.consumers);
  const cards = [["rollout job", "generates", s.producer, s.restarts.producer], ["balance"]];
  for (const [name, client] of groups.length ? groups : [["train", null]]) {
    const title = name === "train" ? "train job" : `group ${name}`;
    cards.push([title, name === "train" ? "trains" : "reads", client, s.restarts[`consumer ${name}`] || 0]);
  }
  listed(by("jobs"), cards, (card) => card[0],
    (card) => (card[0] === "balance" ? balanceCard() : jobCard(card[0], card[1])),
    (node, card) => (card[0] === "balance" ? node.redraw() : node.redraw(card[2], card[3])));
}

function jobCard(title, role) {
  const glyph = el("span", { class: "glyph", "aria-hidden": "true" }), how = el("b"), rest = el("span");
  const doing = el("p", { class: "doing" }), reason = el("p", { class: "reason" }), facts = el("dl", { class: "facts" });
  const card = el("article", { class: "panel job" },
    el("div", { class: "head" }, el("h2", {}, title), el("span", { class: "muted" }, role)),
    el("p", { class: "standing" }, glyph, how, rest), doing, reason, facts);
  card.redraw = (client, restarts) => {
    const state_ = standing(client), [sign, word] = MARKS[state_] || ["?", state_];
    mark(card, "data-state", visible(state_));
    put(glyph, sign);
    put(how, word);
    put(rest, client && state_ !== "finished" ? `last heard ${seconds(client.silent_s)} ago` : "");
    put(doing, client && ["live", "silent"].includes(client.state) ? `${client.activity}, for ${seconds(client.activity_s)}` : "");
    put(reason, client ? client.reason : "");
    show(doing, Boolean(doing.textContent));
    show(reason, Boolean(reason.textContent));
    const rows = client ? [
      ["host", `${client.host || "?"} \u00b7 pid ${client.pid}`],
      ["Ray job", client.submission_id || client.ray_job_id || "\u2013"],
      ["attached", clock(client.attached_at, state.wall)],
      ["incarnation", `${client.epoch}${restarts ? ` \u00b7 ${plural(restarts, "restart")}` : ""}`],
    ] : [];
    listed(facts, rows, (row) => row[0], (row) => el("div", {}, el("dt", {}, row[0]), el("dd")),
      (node, row) => put(node.lastChild, row[1]));
  };
  return card;
}

function balanceCard() {
  const needle = el("span", { class: "needle" }), said = el("p", { class: "said" });
  const shares = el("dl", { class: "facts" });
  const scale = el("div", { class: "scale", role: "img" }, el("span", { class: "middle" }), needle);
  const card = el("article", { class: "panel balance" },
    el("div", { class: "head" }, el("h2", {}, "Who waits for whom"), el("span", { class: "muted" }, "bottleneck")),
    scale, el("div", { class: "ends" }, el("span", {}, "\u25c0 training"), el("span", {}, "neither"),
      el("span", {}, "generation \u25b6")), said, shares);
  card.redraw = () => {
    const { status } = state, b = status.bottleneck, r = status.recent;
    needle.style.left = `${50 + 50 * (isNumber(b) ? b : 0)}%`;
    show(needle, isNumber(b));
    mark(scale, "aria-label", isNumber(b) ? `bottleneck ${b.toFixed(2)}, from -1 training to 1 generation` : "unknown");
    put(said, isNumber(b)
      ? `${signed(b)} \u00b7 train job waited ${share(r.consumer_waited_share)}, rollout job ` +
        `${share(r.producer_waited_share)} of the last ${plural(r.rollouts, "rollout")}`
      : `${plural(r.rollouts, "rollout")} claimed so far: too few to tell`);
    const waited = Object.entries(status.waited).filter(([, total]) => total > 0.05).sort((a, c) => c[1] - a[1]);
    listed(shares, waited, (row) => row[0], (row) => el("div", {}, el("dt", {}, waitName(row[0])), el("dd")),
      (node, row) => put(node.lastChild, seconds(row[1])));
  };
  return card;
}

const signed = (value) => value.toFixed(2).replace("-", "\u2212");

const SIDES = { producer: "rollout job for", consumer: "train job for" };
const WANTS = { data: "rollouts", demand: "demand", space: "space", weights: "weights", pause: "the pause's end",
  peer: "the rollout job" };

function waitName(what) {
  const [side, want] = what.split(" ");
  return `${SIDES[side] || side} ${WANTS[want] || want}`;
}

// ---------------------------------------------------------------- events

const LEVELS = { failed: "bad", dead: "bad", lost: "bad", quarantined: "bad", "vault died": "bad", "store emptied": "bad",
  dropped: "warn", outdated: "warn", rewound: "warn", restarted: "warn", requeued: "warn", discarded: "warn", regenerated: "warn",
  paused: "warn", draining: "warn" };
const SIGNS = { bad: "\u2715", warn: "!", calm: "\u00b7" };
let eventsShown = 40;

function drawEvents() {
  const all = state.events, some = state.live ? all.slice(-eventsShown).reverse() : all.slice().reverse();
  listed(by("events"), some, (event) => event.number, (event) => {
    const level = LEVELS[event.kind] || "calm";
    const id = event.rollout_id >= 0
      ? el("button", { type: "button", class: "link", onclick: (e) => openRollout(event.rollout_id, e.currentTarget) },
        `#${event.rollout_id}`) : null;
    return el("li", { "data-level": level },
      el("time", { title: new Date(1000 * event.at).toISOString() }, clock(event.at, state.wall)),
      el("span", { class: "kind" }, `${SIGNS[level]} ${event.kind}`), el("span", { class: "what" }, id, " ", event.text));
  });
  put(by("events-count"), all.length ? `${count(all.length)} remembered, newest first` : "nothing happened yet");
  const more = by("events-more");
  show(more, some.length < all.length);
  put(more, `Show ${count(all.length - some.length)} older`);
}
