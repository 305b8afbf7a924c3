// Start here: fetch (or read) what is known, draw it, and say how old it is.

const TIMEOUT_MS = 15000;
const drawLane = makeLane(by("lane"), openRollout);
const drawCharts = makeCharts(by("charts"), openRollout);
let refreshing = false;

/** Draw everything; what did not change is left alone. The time that took, layout included, is told to who measures. */
function draw(changed) {
  const began = performance.now();
  drawHead();
  if (state.status) {
    drawVerdict();
    drawFigures();
    drawJobs();
    drawPicker();
    drawControls();
    if (changed) {
      drawLane();
      drawCharts();
      drawEvents();
      drawRollout();
    }
  }
  drawAge();
  void document.body.offsetHeight; // layout belongs to what is measured
  const { dataset } = document.documentElement;
  dataset.renderMs = (performance.now() - began).toFixed(2);
  dataset.changed = String(changed);
  dataset.refreshes = String(Number(dataset.refreshes || 0) + 1);
}

/** JSON of the server; what went wrong is {kind, error}. */
async function asked(path, body) {
  const options = { cache: "no-store", credentials: "same-origin", signal: AbortSignal.timeout(TIMEOUT_MS) };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
  try {
    const answer = await fetch(path, options);
    const found = await answer.json();
    return !answer.ok && !found.kind ? { kind: "Error", error: `the server says ${answer.status}` } : found;
  } catch (error) {
    return { kind: "NoServer", error: error.name === "TimeoutError"
      ? "this view's server does not answer" : "this view's server cannot be reached (it ended, or the network did)" };
  }
}

async function refresh() {
  if (refreshing) return;
  refreshing = true;
  const sent = moment();
  const job = new URLSearchParams(location.search).get("job") || state.job || "";
  const found = await asked(`/api/look?job=${encodeURIComponent(job)}&run=${state.run}&since=${state.seq}` +
    `&events_since=${state.eventsSince}`);
  refreshing = false;
  if (found.status) {
    draw(take(found, sent));
  } else {
    state.trouble = found;
    draw(false);
  }
}

async function live() {
  await refresh();
  setTimeout(live, 1000 * Math.max(0.25, state.pollS));
}

/** How old the figures are; where they are not of now, that is said above them, and they fade. */
function drawAge() {
  if (!state.live) return;
  const old = age(), off = stale(), fresh = by("fresh");
  document.documentElement.classList.toggle("stale", off);
  mark(fresh, "data-state", off ? "stale" : state.status ? "live" : "waiting");
  put(fresh, !state.status ? "\u25cb no figures yet" : off ? `\u25b2 stale, ${seconds(Math.round(old))} old` : "\u25cf live");
  show(by("trouble"), off);
  if (shownRollout) put(by("rollout-age"), off ? `\u25b2 stale, ${seconds(Math.round(old))} old` : "");
  if (off) {
    const figures = state.status ? `These figures are ${seconds(Math.round(old))} old, not of now. ` : "";
    const why = state.trouble ? `${state.trouble.kind}: ${visible(state.trouble.error, 600)}. ` : "No answer for a while. ";
    put(by("trouble"), `${figures}${why}Trying again every ${seconds(state.pollS)}.`.replace(/\.\. /, ". "));
  }
  const name = state.job || "slime cross-job";
  const title = off ? `\u25b2 stale \u00b7 ${name}` : state.status ? `${name} \u00b7 ${state.status.acked} acked` : name;
  if (document.title !== title) document.title = title;
}

function drawPicker() {
  const names = Object.keys(state.jobs);
  show(by("picker"), names.length > 1);
  const select = by("picker").querySelector("select");
  listed(select, names, (name) => name, (name) => el("option", { value: name }, name), (node, name) =>
    put(node, state.jobs[name] ? `${name} \u2713` : name));
  if (document.activeElement !== select && select.value !== state.job) select.value = state.job;
}

// ---------------------------------------------------------------- steering, where it is allowed

/** A button that wants to be pressed twice. */
function steerButton(label, wish) {
  const button = el("button", { type: "button", class: "steer" }, label);
  let armed = 0;
  button.addEventListener("click", async () => {
    if (!armed) {
      put(button, `${label}: press again`);
      armed = setTimeout(() => ((armed = 0), put(button, label)), 4000);
      return;
    }
    clearTimeout(armed);
    armed = 0;
    button.disabled = true;
    const found = await asked("/api/control", { job: state.job, ...wish });
    button.disabled = false;
    put(button, label);
    put(by("steered"), found.kind ? `${label}: ${found.error}` : `${label}: done`);
    refresh();
  });
  return button;
}

function drawControls() {
  const place = by("actions");
  if (!state.live || !state.control || place.childNodes.length) return;
  place.append(steerButton("Pause", { action: "pause" }), steerButton("Resume", { action: "resume" }),
    steerButton("Drain", { action: "drain" }), el("span", { id: "steered", class: "muted", role: "status" }));
}

function drawActions(detail) {
  const place = by("rollout-actions");
  if (!state.control || place.childNodes.length) return;
  const wish = { rollout_id: detail.rollout_id };
  const held = Object.entries(detail.groups).filter(([, group]) => group.state === "leased").map(([name]) => name);
  for (const group of held) place.append(steerButton(`Take back from ${group}`, { action: "requeue", group, ...wish }));
  if (detail.versions.length && !held.length) {
    place.append(steerButton("Generate anew", { action: "discard", ...wish }),
      steerButton("Generate anew, same prompts", { action: "discard", same_prompts: true, ...wish }));
  }
}

// ---------------------------------------------------------------- start

by("goto").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = Number.parseInt(by("goto-id").value, 10);
  if (id >= 0) openRollout(id, by("goto-id"));
});
by("picker").querySelector("select").addEventListener("change", (event) => {
  location.search = `?job=${encodeURIComponent(event.target.value)}`;
});
by("events-more").addEventListener("click", () => {
  eventsShown += 200;
  drawEvents();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closeRollout();
});

const block = by("data");
if (block) {
  const data = JSON.parse(block.textContent);
  takeReport(data);
  drawReport(data);
  draw(true);
} else {
  document.addEventListener("visibilitychange", () => {
    drawAge();
    if (!document.hidden) refresh();
  });
  setInterval(drawAge, 500);
  live();
}
