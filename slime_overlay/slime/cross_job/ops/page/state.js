// What is known of the job, and what it means in words. Live mode fills it from /api/look, a report from the page.

const STATES = ["demanded", "generating", "published", "claimed", "acked", "freed"];
const GONE = ["lost", "dropped"];
const SLOW_S = 5; // silence of a job that is alive

const state = {
  live: true,
  job: null, // its id, once known
  status: null,
  wall: 0,
  cluster: "",
  namespace: "",
  rows: new Map(), // rollout id -> progress
  ids: [], // ascending
  events: [], // oldest first
  seq: -1,
  eventsSince: 0,
  run: "",
  jobs: {},
  control: false, // whether this page may steer
  pollS: 1,
  trouble: null, // {kind, error} of the broker or of the server
  ageS: 0, // of the figures when they came
  cameAt: null, // {date, steady}
  figures: null, // report.report_data, of a report
  writtenAt: 0,
};

/** Take in an answer of /api/look; returns whether anything but the clock moved. */
function take(answer, now) {
  const before = state.seq;
  if (answer.anew || answer.run !== state.run) {
    state.rows.clear();
    state.ids = [];
    state.events = [];
    state.eventsSince = 0;
    state.run = answer.run;
  }
  let sorted = true;
  for (const values of answer.rows) {
    const row = {};
    answer.fields.forEach((name, at) => (row[name] = values[at]));
    if (!state.rows.has(row.rollout_id)) {
      if (state.ids.length && row.rollout_id < state.ids[state.ids.length - 1]) sorted = false;
      state.ids.push(row.rollout_id);
    }
    state.rows.delete(row.rollout_id); // what changed last comes last
    state.rows.set(row.rollout_id, row);
  }
  if (!sorted) state.ids.sort((a, b) => a - b);
  forgetOld(10000);
  for (const event of answer.events) {
    if (event.number > state.eventsSince) state.events.push(event);
    state.eventsSince = Math.max(state.eventsSince, event.number);
  }
  state.events = state.events.slice(-500);
  Object.assign(state, {
    job: answer.job_id, status: answer.status, wall: answer.wall, seq: answer.seq,
    cluster: answer.cluster, namespace: answer.namespace,
    jobs: answer.jobs, control: answer.allow_control, pollS: answer.poll_s, ageS: answer.age_s,
    trouble: answer.kind ? { kind: answer.kind, error: answer.error } : null, cameAt: now,
  });
  return answer.anew || before !== state.seq || answer.rows.length > 0;
}

/** As the broker does: the newest changes are kept. */
function forgetOld(most) {
  if (state.rows.size <= most) return;
  for (const id of state.rows.keys()) {
    if (state.rows.size <= most) break;
    state.rows.delete(id);
  }
  state.ids = state.ids.filter((id) => state.rows.has(id));
}

/** Take in what lies in a report. */
function takeReport(data) {
  const { look, figures } = data;
  const fields = Object.keys(look.progress[0] || { rollout_id: 0 });
  take({
    anew: true, run: "report", fields, rows: look.progress.map((row) => fields.map((name) => row[name])),
    events: look.events, job_id: figures.job_id, status: look.status, wall: look.wall, seq: look.seq,
    cluster: data.cluster, namespace: data.namespace, jobs: {}, allow_control: false, poll_s: 1, age_s: 0, kind: null,
  }, moment());
  Object.assign(state, { live: false, figures, writtenAt: data.written_at });
}

const moment = () => ({ date: Date.now(), steady: performance.now() });

/** Seconds since the broker said what is shown. The greater of two clocks: one may stand still while a machine sleeps. */
function age() {
  if (!state.live || !state.cameAt) return 0;
  const now = moment();
  const passed = Math.max(now.date - state.cameAt.date, now.steady - state.cameAt.steady, 0);
  return state.ageS + passed / 1000;
}

/** Whether what is shown must not be taken for what holds now. */
function stale() {
  return state.live && (Boolean(state.trouble) || age() > Math.max(4, 4 * state.pollS));
}

// ---------------------------------------------------------------- in words

const MARKS = {
  live: ["\u25cf", "alive"], slow: ["\u25d0", "silent"], finished: ["\u2713", "finished"],
  silent: ["\u25d0", "silent"], stopped: ["\u25a0", "stopped"], failed: ["\u2715", "failed"], dead: ["\u2715", "dead"],
  absent: ["\u25cb", "not here yet"],
};

function standing(client) {
  if (!client) return "absent";
  if (client.presumed_dead) return "dead";
  return client.state === "live" && client.silent_s > SLOW_S ? "slow" : client.state;
}

const GLYPHS = { error: "\u2715", warning: "!", ok: "\u25c6" };

/** {level, glyph, text, more}: what an operator should know first; the broker says it. */
function verdict(status) {
  const [first, ...others] = status.standing;
  return { level: first.level, glyph: GLYPHS[first.level] || "", text: first.text, more: others.map((one) => one.text) };
}
