"""The auditor of the chaos run: a good history passes, and every way in which one can be bad is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chaos.auditor import DARK_S, WATCHER_LOG, audit, without_faults
from tests.chaos.points import arm, disarm, point
from tests.chaos.policy import PROMPTS, first_weights, generate

SEED, STEPS = 7, 6
Lines = list[dict[str, Any]]


@pytest.fixture
def history() -> Lines:
    """What a training of STEPS steps consumes where nothing fails."""
    weights, lines = first_weights(SEED), []
    for rollout_id in range(STEPS):
        rows = generate(SEED, weights, rollout_id * PROMPTS)
        loss, weights = without_faults(SEED, weights, rollout_id)
        prompts = sorted(set(rows["prompt"]))
        lines.append(
            {"rollout_id": rollout_id, "version": 1, "prompts": prompts, "sha": f"s{rollout_id}", "loss": loss}
        )
    return lines


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    def write(
        history: Lines, weights: np.ndarray | None = None, published: Lines | None = None, end: int = STEPS
    ) -> Path:
        if weights is None:
            weights = first_weights(SEED)
            for rollout_id in range(end):
                _, weights = without_faults(SEED, weights, rollout_id)
        made = [{"rollout_id": r, "sha": f"s{r}", "version": 1} for r in range(STEPS)]
        for name, lines in (("generated", made), ("published", made if published is None else published)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = "".join(json.dumps(line) + "\n" for line in history).encode()
        others(tmp_path, archive())
        (tmp_path / "history-1.jsonl").write_bytes(text + b'{"rollout_id": 99, "of": "no surviving history"}\n')
        saved = {"next": end, "weights": weights, "history": "history-1.jsonl", "length": len(text)}
        np.savez(tmp_path / f"checkpoint-{end:08d}.npz", **saved)
        return tmp_path

    return write


def test_a_history_without_faults_passes(history, write):
    found = audit(write(history), SEED)
    assert found.faults == []
    assert (found.rollouts, found.prompts, found.lost, found.duplicated) == (STEPS, STEPS * PROMPTS, [], [])


def others(folder: Path, archived: Lines, losses: int = 0, republished: int = 0) -> None:
    """What the other consumer group got, and what the broker counted."""
    (folder / "archived.jsonl").write_text("".join(json.dumps(line) + "\n" for line in archived))
    (folder / "status.jsonl").write_text(json.dumps({"losses": losses, "republished": republished}) + "\n")


def archive(but: int = -1, sha: str | None = None) -> Lines:
    return [
        {"rollout_id": r, "version": 1, "sha": sha if r == but and sha else f"s{r}"}
        for r in range(STEPS)
        if r != but or sha is not None
    ]


@pytest.mark.parametrize(
    ("archived", "losses", "republished", "fault"),
    [
        (archive(), 0, 0, ""),
        (archive(but=2), 1, 1, ""),
        (archive(but=2), 0, 0, "rollouts [2] never reached the other consumer group, and only 0 were lost"),
        (archive(but=2, sha="x"), 1, 0, "rollout 2 reached the other consumer group with other bytes"),
        (archive(), 1, 2, "2 rollouts were published again, but only 1 had been lost"),
    ],
)
def test_what_the_other_group_got_and_what_was_published_again(history, write, archived, losses, republished, fault):
    folder = write(history)
    others(folder, archived, losses, republished)
    faults = audit(folder, SEED).faults
    assert len(faults) == bool(fault)
    assert fault in "".join(faults)


def test_a_rollout_that_took_no_effect(history, write):
    found = audit(write(history[:2] + history[3:]), SEED)
    assert found.lost == [2]
    assert any("took no effect" in fault for fault in found.faults)


def test_a_rollout_that_took_effect_twice(history, write):
    found = audit(write([*history[:3], history[2], *history[3:]]), SEED)
    assert found.duplicated == [2]
    assert any("more than once" in fault for fault in found.faults)


def test_a_rollout_that_the_checkpoint_does_not_cover(history, write):
    assert any("beyond" in fault for fault in audit(write(history, end=STEPS - 1), SEED).faults)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda history: history.insert(0, history.pop(1)), "order"),
        (lambda history: history[3].update(prompts=[*range(PROMPTS)]), "used more than once"),
        (lambda history: history[3].update(prompts=[*range(400, 400 + PROMPTS)]), "were skipped"),
        (lambda history: history[4].update(sha="other"), "bytes that nobody generated"),
        (
            lambda history: history[5].update(loss=float(np.nextafter(history[5]["loss"], 1.0))),
            "the loss of rollout 5",
        ),
    ],
)
def test_a_history_that_is_bad(history, write, change, fault):
    change(history)
    assert any(fault in found for found in audit(write(history), SEED).faults)


def test_bytes_other_than_those_published_first(history, write):
    published = [{"rollout_id": 4, "sha": "first", "version": 1}, {"rollout_id": 4, "sha": "s4", "version": 2}]
    assert any("published first" in fault for fault in audit(write(history, published=published), SEED).faults)
    refused = [{"rollout_id": 4, "sha": "first", "version": 0}]  # the ledger did not take it
    assert audit(write(history, published=refused), SEED).faults == []


def test_weights_that_differ(history, write):
    assert any("weights at the end" in fault for fault in audit(write(history, first_weights(SEED)), SEED).faults)


def test_nothing_saved(tmp_path):
    assert audit(tmp_path, SEED).faults == ["there is no checkpoint: nothing survived"]


def test_a_point_does_nothing_unless_it_is_armed(tmp_path, monkeypatch):
    killed: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, number: killed.append(number))
    point(tmp_path, "saved")
    arm(tmp_path, "saved", "fault-1", "exit")
    point(tmp_path, "stepped")
    assert killed == []
    point(tmp_path, "saved")
    point(tmp_path, "saved")
    assert killed == [9]
    assert (tmp_path / "taken-fault-1").exists(), "the witness"
    assert not disarm(tmp_path, "saved")


def viewed(folder: Path, change: Callable[[dict[str, Any]], None] = lambda told: None) -> list[str]:
    """Faults that the auditor finds where somebody looked on, and was told the truth but for `change`."""
    figures = dict.fromkeys(("published", "acked", "last_published"), STEPS)
    figures |= {"republished": 0, "losses": 0, "requeued": 0}
    published = [{"rollout_id": r, "sha": f"s{r}", "version": 1, "weights": r} for r in range(STEPS)]
    (folder / "published.jsonl").write_text("".join(json.dumps(line) + "\n" for line in published))
    (folder / "status.jsonl").write_text(json.dumps(figures) + "\n")

    def rows() -> Lines:
        facts = {"state": "freed", "version": 1, "claimed": 9.0}
        return [{"rollout_id": r, "seq": r, "weight_version": r, **facts} for r in range(STEPS)]

    told = {"looks": 9, "longest_gap_s": 1.0, "status": {**figures}, "rows": rows()}
    told["page"] = {"status": {**figures}, "rows": rows()}
    change(told)
    (folder / WATCHER_LOG).touch()
    (folder / "viewed.json").write_text(json.dumps(told))
    return audit(folder, SEED).faults


def test_who_looked_on_and_was_told_the_truth(history, write):
    assert viewed(write(history)) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda told: told["rows"][2].update(state="claimed"), "shows other rollouts as acked"),
        (lambda told: told["rows"].pop(), "shows other rollouts as acked"),
        (lambda told: told["rows"][3].update(weight_version=2), "says weights 2 of rollout 3"),
        (lambda told: told["page"]["rows"][4].update(state="lost"), "the live view shows rollout 4"),
        (lambda told: told["page"]["rows"].pop(), "the live view shows rollout 5"),
        (lambda told: told["status"].update(acked=STEPS + 1), f"the viewer says {STEPS + 1} acked"),
        (lambda told: told["page"]["status"].update(losses=1), "the live view says 1 losses"),
        (lambda told: told["rows"][0].update(claimed=0.0), f"saw {STEPS - 1} rollouts claimed"),
        (lambda told: told.update(longest_gap_s=DARK_S + 1), "got no answer for"),
    ],
)
def test_who_looked_on_and_was_told_something_else(history, write, change, fault):
    assert any(fault in found for found in viewed(write(history), change))


def test_who_looked_on_came_to_no_end(history, write):
    folder = write(history)
    (folder / WATCHER_LOG).touch()
    assert any("came to no end" in fault for fault in audit(folder, SEED).faults)
