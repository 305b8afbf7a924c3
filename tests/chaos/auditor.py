"""Reads what the surviving history of a chaos run consumed, and says whether every promise was kept.

Written apart from slime.cross_job, of which it imports nothing: it reads files that the jobs left, and computes the
run without faults anew, in one process, from the seed. Promises: every rollout id once, in order; the bytes that were
published first; every prompt once; the losses of the run without faults, to the last bit; all of it to every consumer
group; nothing generated again that was not lost; and who looked on all the time (watcher.py) was told what is true.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.chaos.policy import PROMPTS, RANKS, first_weights, generate, gradient, step

WATCHER_LOG = "watcher.log"
DARK_S = 45.0  # that a view may be without an answer, on a quiet machine: brokers and heads restart in a third of it


@dataclass
class Audit:
    """What was found; `faults` is empty where every promise was kept."""

    rollouts: int = 0
    prompts: int = 0
    lost: list[int] = field(default_factory=list)  # rollout ids that the history lacks
    duplicated: list[int] = field(default_factory=list)  # that it has more than once
    faults: list[str] = field(default_factory=list)
    last_loss: float = 0.0
    generated: int = 0  # generations, also those that nobody consumed
    generated_again: int = 0
    losses: int = 0  # rollouts that went with a vault, as the broker counts them
    republished: int = 0  # rollouts that were published more than once
    archived: int = 0  # rollouts that the second consumer group got
    looks: int = 0  # answers to who looked on all the time
    longest_without_answer_s: float = 0.0


def audit(folder: Path, seed: int, dark_s: float = DARK_S) -> Audit:
    """Check the run in `folder`, where a view may have been without an answer for `dark_s`."""
    saved = sorted(folder.glob("checkpoint-*.npz"))
    if not saved:
        return Audit(faults=["there is no checkpoint: nothing survived"])
    with np.load(saved[-1]) as state:
        end, weights = int(state["next"]), state["weights"]
        text = (folder / str(state["history"])).read_bytes()[: int(state["length"])]
    history = [json.loads(line) for line in text.splitlines()]
    found = Audit(rollouts=len(history), last_loss=history[-1]["loss"] if history else 0.0)
    _check_ids(found, [line["rollout_id"] for line in history], end)
    _check_prompts(found, history)
    _check_bytes(found, history, lines(folder / "published.jsonl"), lines(folder / "generated.jsonl"))
    _check_archive(found, history, lines(folder / "archived.jsonl"), lines(folder / "status.jsonl"))
    _check_losses(found, history, seed, weights)
    if (folder / WATCHER_LOG).exists():
        _check_view(found, history, folder, dark_s)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; the last may be torn, because its writer was killed."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _check_ids(found: Audit, ids: list[int], end: int) -> None:
    found.lost = sorted(set(range(end)) - set(ids))
    found.duplicated = sorted({r for r in ids if ids.count(r) > 1}) if len(set(ids)) < len(ids) else []
    if found.lost:
        found.faults.append(f"rollouts {found.lost[:10]} took no effect")
    if found.duplicated:
        found.faults.append(f"rollouts {found.duplicated[:10]} took effect more than once")
    if ids != sorted(ids):
        found.faults.append("rollouts took effect out of order")
    if set(ids) - set(range(end)):
        found.faults.append(f"rollouts beyond the checkpoint's {end} took effect")


def _check_prompts(found: Audit, history: list[dict[str, Any]]) -> None:
    used = [prompt for line in history for prompt in line["prompts"]]
    found.prompts = len(used)
    if len(set(used)) < len(used):
        found.faults.append("prompts were used more than once")
    skipped = sorted(set(range(PROMPTS * len(history))) - set(used))
    if skipped:
        found.faults.append(f"prompts {skipped[:10]} were skipped")


def _check_bytes(
    found: Audit, history: list[dict[str, Any]], published: list[dict[str, Any]], generated: list[dict[str, Any]]
) -> None:
    first: dict[int, str] = {}
    for line in published:
        if line["version"] > 0:
            first.setdefault(line["rollout_id"], line["sha"])
    made: dict[int, list[str]] = {}
    for line in generated:
        made.setdefault(line["rollout_id"], []).append(line["sha"])
    found.generated = len(generated)
    found.generated_again = sum(len(shas) - 1 for shas in made.values())
    for line in history:
        rollout_id, sha = line["rollout_id"], line["sha"]
        if sha not in made.get(rollout_id, []):
            found.faults.append(f"rollout {rollout_id} was consumed with bytes that nobody generated")
        elif (
            first.get(rollout_id, sha) != sha
        ):  # a producer that was killed may not have come to say what it published
            found.faults.append(f"rollout {rollout_id} was consumed with other bytes than were published first")


def _check_archive(
    found: Audit, history: list[dict[str, Any]], archived: list[dict[str, Any]], statuses: list[dict[str, Any]]
) -> None:
    """What was published is handed out again, not generated again, but for what went with a vault; and every consumer
    group gets it."""
    status = statuses[-1] if statuses else {"losses": 0, "republished": 0}
    found.losses, found.republished = status["losses"], status["republished"]
    if found.republished > found.losses:
        found.faults.append(
            f"{found.republished} rollouts were published again, but only {found.losses} had been lost with a vault"
        )
    first: dict[int, str] = {}
    for line in sorted(archived, key=lambda line: line["version"]):
        first.setdefault(line["rollout_id"], line["sha"])
    found.archived = len(first)
    for line in history:
        if first.get(line["rollout_id"], line["sha"]) != line["sha"]:
            found.faults.append(f"rollout {line['rollout_id']} reached the other consumer group with other bytes")
    missing = [line["rollout_id"] for line in history if line["rollout_id"] not in first]
    if len(missing) > found.losses:
        found.faults.append(
            f"rollouts {missing[:10]} never reached the other consumer group, and only {found.losses} were lost"
        )


def _check_view(found: Audit, history: list[dict[str, Any]], folder: Path, dark_s: float) -> None:
    """What `look` and the live view told, step by step, is in the end what happened."""
    path = folder / "viewed.json"
    if not path.exists():
        found.faults.append(f"who looked on came to no end: see {folder / WATCHER_LOG}")
        return
    viewed, status = json.loads(path.read_text()), lines(folder / "status.jsonl")[-1]
    found.looks, found.longest_without_answer_s = viewed["looks"], round(viewed["longest_gap_s"], 1)
    if found.longest_without_answer_s > dark_s:
        found.faults.append(f"who looked on got no answer for {found.longest_without_answer_s} s")
    page = {row["rollout_id"]: row for row in viewed["page"]["rows"]}
    newest = {line["rollout_id"]: line for line in lines(folder / "published.jsonl") if line["version"] > 0}
    consumed = [line["rollout_id"] for line in history]
    told = {row["rollout_id"]: row for row in viewed["rows"]}
    over = sorted(r for r, row in told.items() if row["state"] in ("acked", "freed"))
    if over != consumed:
        found.faults.append(f"the view shows other rollouts as acked than took effect: {set(over) ^ set(consumed)}")
    for rollout_id, row in told.items():
        line = newest.get(rollout_id)
        known = line is not None and rollout_id in consumed and row["version"] == line["version"]
        if line is not None and known and row["weight_version"] != line["weights"]:
            found.faults.append(f"the view says weights {row['weight_version']} of rollout {rollout_id}: {line}")
        shown = page.get(rollout_id, {})
        if any(shown.get(name) != row[name] for name in ("state", "seq", "version", "weight_version")):
            found.faults.append(f"the live view shows rollout {rollout_id} as {shown}, the viewer as {row}")
    for name in ("published", "acked", "republished", "losses", "requeued", "last_published"):
        for shown, by in ((viewed["status"], "viewer"), (viewed["page"]["status"], "live view")):
            if shown[name] != status[name]:
                found.faults.append(f"the {by} says {shown[name]} {name}, the broker {status[name]}")
    counted = sum(row["claimed"] > 0 for row in viewed["rows"])
    if counted < len(consumed):
        found.faults.append(f"the view saw {counted} rollouts claimed, {len(consumed)} took effect")


def _check_losses(found: Audit, history: list[dict[str, Any]], seed: int, last: np.ndarray) -> None:
    weights = first_weights(seed)
    for number, line in enumerate(history):
        loss, weights = without_faults(seed, weights, number)
        if loss != line["loss"]:
            found.faults.append(
                f"the loss of rollout {line['rollout_id']} is {line['loss']!r}, without faults it is {loss!r}"
            )
            return
    if not np.array_equal(weights, last):
        found.faults.append("the weights at the end are not those of a run without faults")


def without_faults(seed: int, weights: np.ndarray, rollout_id: int) -> tuple[float, np.ndarray]:
    """(loss, new weights) of one training step, as it is where nothing ever fails."""
    rows = generate(seed, weights, rollout_id * PROMPTS)
    rewards = rows["reward"]
    baseline = sum(rewards) / len(rewards)
    columns = ("prompt", "action", "reward")
    shares = [{name: rows[name][rank::RANKS] for name in columns} for rank in range(RANKS)]
    return step(weights, [gradient(seed, weights, share, baseline) for share in shares], len(rewards))
