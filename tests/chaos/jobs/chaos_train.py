"""The train job of the chaos run: two ranks compute gradients, the driver steps, saves, and then acks.

A checkpoint holds the weights, the next rollout, and its history: what this training consumed, as the file that has a
line a rollout and the length up to which it counts. Every process writes a file of its own, which begins with the
history of the checkpoint that it resumed from: what a zombie writes harms nobody.
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from points import point
from policy import RANKS, first_weights, gradient, step

from slime.cross_job import Consumer
from slime.cross_job.client.jobs import run
from slime.cross_job.errors import EndOfStream, Stopped, ValueLost
from slime.cross_job.settings import Settings, add_arguments

_KEPT = 3  # checkpoints


@ray.remote(num_cpus=0, resources={"train": 0.01})
class Rank:
    """One data-parallel rank: reads its own rows."""

    def __init__(self, rank: int, seed: int):
        self._rank, self._seed = rank, seed

    def gradient(self, refs: list[Any], weights: np.ndarray, baseline: float) -> tuple[float, np.ndarray]:
        batch = ray.get(refs[0])
        mine = slice(self._rank, None, RANKS)
        rows = {name: batch[name].tolist()[mine] for name in ("prompt", "action", "reward")}
        return gradient(self._seed, weights, rows, baseline)


class Training:
    """Weights, and the history that led to them."""

    def __init__(self, folder: Path, seed: int, save_every: int):
        self.folder, self.seed, self.save_every = folder, seed, save_every
        self.next, self.weights, before = 0, first_weights(seed), b""
        saved = checkpoints(folder)
        if saved:
            with np.load(saved[-1]) as state:
                self.next, self.weights = int(state["next"]), state["weights"]
                before = (folder / str(state["history"])).read_bytes()[: int(state["length"])]
        self.history = (folder / f"history-{time.monotonic_ns()}.jsonl").open("xb")
        self.history.write(before)
        self.unacked: list[int] = []

    def save(self) -> None:
        self.history.flush()
        os.fsync(self.history.fileno())
        draft = self.folder / f"draft-{os.getpid()}.npz"
        length, history = self.history.tell(), Path(self.history.name).name
        np.savez(draft, next=self.next, weights=self.weights, history=history, length=length)
        draft.rename(self.folder / f"checkpoint-{self.next:08d}.npz")
        for old in checkpoints(self.folder)[:-_KEPT]:
            old.unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.npz"))


def main() -> None:
    parser = add_arguments(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--work-s", type=float, required=True)
    args = parser.parse_args()
    training = Training(args.folder, args.seed, args.save_every)
    with Consumer(args.job_id, settings=Settings.from_args(args)) as consumer:
        consumer.resume(training.next)
        ranks = [Rank.remote(rank, args.seed) for rank in range(RANKS)]  # type: ignore[attr-defined]
        ray.get([rank.__ray_ready__.remote() for rank in ranks], timeout=60)
        consumer.publish_weights(training.next, {"w": training.weights})
        try:
            while not (args.folder / "finish").exists():
                train_on(consumer, training, ranks, args.work_s)
        except (Stopped, EndOfStream):
            save_and_ack(consumer, training)
            raise
        save_and_ack(consumer, training)


def train_on(consumer: Consumer, training: Training, ranks: list[Any], work_s: float) -> None:
    began, rollout_id = time.monotonic(), training.next
    consumer.demand(rollout_id)
    try:
        rollout = consumer.claim(rollout_id)
    except ValueLost:  # the vault of the weights died
        consumer.publish_weights(rollout_id, {"w": training.weights})
        rollout = consumer.claim(rollout_id)
    batch = rollout.batch
    rewards = batch["reward"].tolist()
    baseline = sum(rewards) / len(rewards)
    parts = ray.get(
        [rank.gradient.remote([rollout.refs[0]], training.weights, baseline) for rank in ranks], timeout=work_s
    )
    loss, training.weights = step(training.weights, parts, len(rewards))
    training.next += 1
    line = {
        "rollout_id": rollout.rollout_id,
        "version": rollout.version,
        "weights": rollout.weight_version,
        "prompts": sorted(set(batch["prompt"].tolist())),
        "sha": hashlib.sha256(batch.ipc).hexdigest(),
        "loss": loss,
        "reward": baseline,
    }
    training.history.write(json.dumps(line).encode() + b"\n")
    training.unacked.append(rollout_id)
    point(training.folder, "stepped")
    consumer.publish_weights(training.next, {"w": training.weights})
    if training.next % training.save_every == 0:
        save_and_ack(consumer, training)
    with (training.folder / "steps.jsonl").open("a") as log:  # when, for recovery times; of all histories
        log.write(json.dumps({"rollout_id": rollout_id, "began": began, "ended": time.monotonic()}) + "\n")


def save_and_ack(consumer: Consumer, training: Training) -> None:
    if not training.unacked:
        return
    training.save()
    point(training.folder, "saved")
    while training.unacked:
        consumer.ack(training.unacked[0])
        training.unacked.pop(0)


if __name__ == "__main__":
    run(main)
