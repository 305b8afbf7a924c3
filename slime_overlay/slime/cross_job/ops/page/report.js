// What only a report has: the figures of the run in tables, the staleness histogram, settings, and the data to save.

function drawReport(data) {
  const f = state.figures, place = by("report");
  show(place, true);
  const spans = Object.entries(f.spans).map(([name, s]) => [name, count(s.count), ...["p50", "p95", "max", "mean"].map(
    (key) => seconds(s[key]))]);
  const waits = Object.keys(f.waited_s).map((what) => [waitName(what), seconds(f.waited_s[what]), share(f.waited_share[what])]);
  place.append(
    card("Summary", table(null, [
      ["rollouts", `${count(f.rollouts.published)} published, ${count(f.rollouts.acked)} acked, ${count(f.rollouts.freed)} freed`],
      ["figures are over", plural(f.rollouts.known, "rollout")],
      ["samples trained on", count(f.samples)],
      ["from first demand to last ack", seconds(f.wall_s)],
      ["throughput", `${figure(f.rollouts_per_minute)} rollouts/min, ${figure(f.samples_per_s)} samples/s`],
      ["reward", f.reward.count ? `first ${figure(f.reward.first, 4)}, last ${figure(f.reward.last, 4)}, max ` +
        `${figure(f.reward.max, 4)} (#${f.reward.max_at})` : "\u2013"],
      ["bytes published", `${bytes(f.bytes.published)}, ${bytes(f.bytes_per_rollout.p50)} a rollout (p50)`],
      ["bytes claimed, acked, dropped", [f.bytes.claimed, f.bytes.acked, f.bytes.dropped].map(bytes).join(", ")],
      ["restarts", Object.entries(f.restarts).map(([who, n]) => `${who} ${n}`).join(", ")],
    ])),
    card("Where the time of a rollout goes", table(["", "count", "p50", "p95", "max", "mean"], spans)),
    card("Waits", table(["who for what", "total", "of the run"], waits)),
    card("Staleness", histogram(f.staleness)),
    card("Events and losses", table(null, [
      ...Object.entries(f.events).map(([kind, n]) => [kind, count(n)]),
      ...Object.entries(f.losses).map(([kind, n]) => [kind === "losses" ? "lost with a vault" : kind, count(n)])])),
    card("Settings", table(null, Object.entries(f.settings).map(([name, value]) => [name, known(value)]))));
  const save = el("button", { type: "button", id: "save" }, "Save data (JSON)");
  save.addEventListener("click", () => saveData(data));
  by("actions").append(save);
  put(by("fresh"), `written ${date(new Date(1000 * state.writtenAt))} ${clock(state.writtenAt, state.writtenAt)}`);
}

function card(title, content) {
  return el("section", { class: "panel" }, el("h2", {}, title), el("div", { class: "scroll", tabindex: 0 }, content));
}

function table(head, rows) {
  return el("table", {}, head ? el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))) : null,
    el("tbody", {}, rows.map(([name, ...values]) =>
      el("tr", {}, el("th", { scope: "row" }, name), values.map((value) => el("td", {}, value))))));
}

/** Rollouts by the number of weight versions that they were behind when they were claimed. */
function histogram(counts) {
  const all = Object.entries(counts), total = all.reduce((sum, [, n]) => sum + n, 0);
  const most = Math.max(1, ...all.map(([, n]) => n));
  if (!all.length) return el("p", { class: "muted" }, "nothing was claimed, or no weight versions are told");
  return el("div", { class: "way" }, all.map(([behind, n]) => {
    const bar = el("span", { class: "bar" });
    bar.style.width = `${(100 * n) / most}%`;
    return el("div", { class: "span" }, el("span", { class: "name" }, `${behind} behind`),
      el("span", { class: "track" }, bar), el("span", { class: "time" }, `${count(n)} \u00b7 ${share(n / total)}`));
  }));
}

function saveData(data) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
  const link = el("a", { href: url, download: `${state.job}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
