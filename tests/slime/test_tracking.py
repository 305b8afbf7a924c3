"""wandb and TensorBoard hold the job's figures, through real slime's own logging."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slime.slime_jobs import at_pins
from tests.slime.track_figures import ROLLOUTS
from tests.support.patience import patient

PUBLISHED = "cross_job/rollouts_total/published"
_BLOCK = 32 * 1024
SCRIPT = Path(__file__).with_name("track_figures.py")


def tracked(slime: Path, folder: Path, *run: str) -> Path:
    """Run the script on this checkout, in this run of wandb; the folder where it tracked."""
    variables = {"PYTHONPATH": str(slime), "TENSORBOARD_DIR": str(folder / "tensorboard"), "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *run],
        env={**os.environ, **variables, "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=patient(240),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "logged once" not in done.stderr, done.stderr
    return folder


def in_wandb(folder: Path) -> list[dict[str, Any]]:
    """What an offline run of wandb has logged, one dict a step."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    steps = []
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            steps.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return steps


def records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log, which wandb's file is behind its magic: blocks of 32 KiB, in which each piece has a
    checksum, its length, and its place in its record (1: all of it, 2: its first, 3: a middle, 4: its last)."""
    at, whole = 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < 7:
            at += left  # filled with zeros
            continue
        _, length, place = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if place in (1, 4):
            yield whole
            whole = b""


@at_pins("v0.3.1", also=("main", "v0.1.0"))
def test_wandb_holds_the_figures_of_each_rollout(pin, checkout, tmp_path):
    pytest.importorskip("wandb")
    steps = in_wandb(tracked(checkout(pin), tmp_path))
    assert [(step["rollout/step"], step[PUBLISHED]) for step in steps] == [(n, n + 1) for n in range(ROLLOUTS)]
    assert steps[-1]["cross_job/queue_rollouts"] == ROLLOUTS
    assert steps[-1]["cross_job/bytes_total/published"] == 100 * ROLLOUTS


@at_pins(also=("v0.3.1", "main"))
def test_tensorboard_holds_the_figures_of_each_rollout(pin, checkout, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tracked(checkout(pin), tmp_path)
    events = accumulators.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars(PUBLISHED)] == [(n, n + 1) for n in range(ROLLOUTS)]
    assert events.Scalars("cross_job/clients/producer/live")[-1].value == 1


@at_pins("v0.3.1", also=("main", "v0.1.0"))
def test_two_jobs_are_one_run_in_wandb(pin, checkout, tmp_path):
    pytest.importorskip("wandb")
    for job in ("rollout", "train"):
        folder = tracked(checkout(pin), tmp_path / job, "run-of-exp")
        (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        assert path.name == "run-run-of-exp.wandb"
