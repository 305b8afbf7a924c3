// What is known of the job, and what it means in words. Live mode fills it from /api/look, a report from the page.

const STATES = ["demanded", "generating", "published", "claimed", "acked", "freed"];
const GONE = ["lost", "dropped"];
const SLOW_S = 5; // silence of a job that is alive
const IDLE_S = 60; // without anything happening to a rollout

const state = {
  live: true,
  job: null, // its id, once known
  status: null,
  wall: 0,
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
    job: answer.job_id, status: answer.status, wall: answer.wall, seq: answer.seq, namespace: answer.namespace,
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
    namespace: data.namespace, jobs: {}, allow_control: false, poll_s: 1, age_s: 0, kind: null,
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
  stopped: ["\u25a0", "stopped"], failed: ["\u2715", "failed"], dead: ["\u2715", "dead"],
  absent: ["\u25cb", "not here yet"],
};

function standing(client) {
  if (!client) return "absent";
  return client.state === "live" && client.silent_s > SLOW_S ? "slow" : client.state;
}

/** {level, glyph, text, more}: what an operator should know first. */
function verdict(status) {
  const said = [...clientVerdicts(status)];
  if (status.complete) {
    said.unshift(["good", "\u2713", `Complete: ${plural(status.acked, "rollout was", "rollouts were")} acked.`]);
  }
  if (status.control === "paused" && !status.complete) {
    said.unshift(["warn", "\u2016", "Paused by its operator: nothing new is generated."]);
  } else if (status.control === "draining" && !status.complete) {
    said.unshift(["warn", "\u2016", "Draining: what is out is finished, then both jobs end."]);
  }
  if (status.lost.length) {
    const some = status.lost.slice(0, 8).join(", ") + (status.lost.length > 8 ? ", \u2026" : "");
    said.push(["warn", "!", `${plural(status.lost.length, "rollout is", "rollouts are")} lost with ` +
      `a vault (${some}): generated again once demanded.`]);
  }
  if (!status.complete) {
    if (isNumber(status.idle_s) && status.idle_s > IDLE_S) {
      said.push(["warn", "!", `Nothing has happened to a rollout for ${seconds(status.idle_s)}.`]);
    }
    said.push(bottleneckVerdict(status));
  }
  const rank = { bad: 0, warn: 1, good: 2, calm: 3 };
  said.sort((a, b) => rank[a[0]] - rank[b[0]]);
  const [level, glyph, text] = said[0];
  return { level, glyph, text, more: said.slice(1).map((item) => item[2]) };
}

function* clientVerdicts(status) {
  const all = [["rollout job", status.producer], ...Object.entries(status.consumers).map(
    ([name, client]) => [name === "train" ? "train job" : `consumer group ${name}`, client])];
  for (const [name, client] of all) {
    const how = standing(client);
    const heard = client ? `last heard ${seconds(client.silent_s)} before these figures` : "";
    if (how === "absent" && !status.complete) {
      yield ["warn", "\u25cb", `No ${name} has attached yet: start it with --job-id ${status.job_id}.`];
    } else if (how === "dead") {
      yield ["bad", "\u2715", `The ${name} is dead, ${heard}: ${cut(client.reason) || "no reason known"}.`];
    } else if (how === "failed") {
      yield ["bad", "\u2715", `The ${name} failed, ${heard}: ${cut(client.reason) || "no reason given"}.`];
    } else if (how === "slow") {
      yield ["warn", "\u25d0", `The ${name} has been silent for ${seconds(client.silent_s)}, doing: ` +
        `${client.activity}. It may be stuck: look at its log.`];
    } else if (how === "stopped") {
      yield ["warn", "\u25a0", `The ${name} stopped as asked${client.reason ? `: ${client.reason}` : ""}. ` +
        "Start it again to go on."];
    } else if (how === "finished" && !status.complete) {
      yield ["calm", "\u2713", `The ${name} finished${client.reason ? `: ${client.reason}` : ""}.`];
    }
  }
  if (!Object.keys(status.consumers).length && !status.complete) {
    yield ["warn", "\u25cb", `No train job has attached yet: start it with --job-id ${status.job_id}.`];
  }
}

/** The card of the job has all of it. */
const cut = (reason) => (reason && reason.length > 300 ? `${reason.slice(0, 300)}\u2026` : reason);

function bottleneckVerdict(status) {
  const b = status.bottleneck;
  if (!isNumber(b)) return ["calm", "\u00b7", "No rollout has been claimed yet: nobody knows who waits for whom."];
  const by = `(${signed(b)} over the last ${plural(status.recent.rollouts, "rollout")})`;
  if (b >= 0.2) return ["calm", "\u25b6", `Training waits for rollouts: generation is the bottleneck ${by}.`];
  if (b <= -0.2) return ["calm", "\u25c0", `Generation waits for training: training is the bottleneck ${by}.`];
  return ["good", "\u25c6", `Balanced: neither job waits much for the other ${by}.`];
}
