// The way of the rollouts from the one job to the other: a box for each state, a chip for each rollout in it.

const BOXES = [
  ["demanded", "\u25cb", "by training"], ["generating", "\u25d4", "in the rollout job"],
  ["published", "\u25d1", "kept, to be claimed"], ["claimed", "\u25d5", "in training"],
  ["acked", "\u25cf", "took effect"], ["freed", "\u00b7", "given back"],
];
const LOSSES = [["lost", "\u2715", "with a vault"], ["dropped", "\u2298", "given up"]];
const CHIPS = { demanded: 24, generating: 24, published: 48, claimed: 24, acked: 18, freed: 12, lost: 48, dropped: 24 };

function makeLane(parent, open) {
  const boxes = {};
  for (const [name, glyph, words] of [...BOXES, ...LOSSES]) {
    const total = el("b"), more = el("span", { class: "muted more" }), chips = el("div", { class: "chips" });
    const box = el("section", { class: "box", "data-state": name },
      el("h3", {}, el("span", { class: "glyph", "aria-hidden": "true" }, glyph), ` ${name} `, total),
      el("p", { class: "muted words" }, words), chips, more);
    boxes[name] = { box, total, more, chips, key: "" };
    parent.append(box);
  }
  parent.addEventListener("click", (event) => {
    const chip = event.target.closest(".chip");
    if (chip) open(chip.rolloutId, chip);
  });
  parent.addEventListener("keydown", (event) => walk(parent, event));
  return () => {
    const within = {};
    for (const id of state.ids) {
      const row = state.rows.get(id);
      (within[row.state] || (within[row.state] = [])).push(id);
    }
    for (const [name, parts] of Object.entries(boxes)) drawBox(name, parts, within[name] || []);
    const chips = [...parent.querySelectorAll(".chip")];
    if (chips.length && !chips.some((chip) => chip.tabIndex === 0)) chips[0].tabIndex = 0;
  };
}

function drawBox(name, parts, ids) {
  const most = CHIPS[name], newestLast = name === "acked" || name === "freed" || name === "dropped";
  const some = newestLast ? ids.slice(-most).reverse() : ids.slice(0, most);
  put(parts.total, count(ids.length));
  show(parts.box, ids.length > 0 || STATES.includes(name));
  mark(parts.box, "data-empty", ids.length ? "no" : "yes");
  put(parts.more, ids.length > some.length
    ? `${newestLast ? "newest shown, " : ""}${count(ids.length - some.length)} more` : "");
  listed(parts.chips, some, (id) => id, makeChip, drawChip);
}

function makeChip(id) {
  const chip = el("button", { type: "button", class: "chip" }, `${id}`);
  chip.rolloutId = id;
  chip.tabIndex = -1;
  return chip;
}

function drawChip(chip, id) {
  const row = state.rows.get(id);
  if (chip.seq === row.seq) return;
  chip.seq = row.seq;
  const again = row.version > 1 || row.claims > 1 || row.losses > 0;
  put(chip, again ? `${id}\u21bb` : `${id}`);
  const words = [`rollout ${id}: ${row.state}`];
  if (isNumber(row.reward)) words.push(`reward ${figure(row.reward)}`);
  if (isNumber(row.staleness)) words.push(`${row.staleness} behind`);
  if (row.version > 1) words.push(`version ${row.version}`);
  if (row.claims > 1) words.push(`claimed ${row.claims} times`);
  if (row.losses) words.push(`lost ${row.losses} times`);
  mark(chip, "title", visible(words.join(", ")));
  mark(chip, "aria-label", visible(words.join(", ")));
}

/** One stop for the Tab key; arrows go from chip to chip. */
function walk(parent, event) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const chips = [...parent.querySelectorAll(".chip")].filter((chip) => chip.offsetParent);
  const at = chips.indexOf(document.activeElement);
  if (at < 0 || (!step && event.key !== "Home" && event.key !== "End")) return;
  event.preventDefault();
  const to = step ? Math.max(0, Math.min(chips.length - 1, at + step)) : event.key === "Home" ? 0 : chips.length - 1;
  chips[at].tabIndex = -1;
  chips[to].tabIndex = 0;
  chips[to].focus();
}
