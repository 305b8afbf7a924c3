"""The rollout job of the chaos run: an actor samples, the driver asks what is wanted. Killed at any moment, it is
started again with the same command line.

The source of prompts is a counter that travels with the rollouts (`source`), as slime's data source does.
"""

import argparse
import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from points import point
from policy import PROMPTS, generate

from slime.cross_job import Producer
from slime.cross_job.batch import Batch
from slime.cross_job.client.jobs import run
from slime.cross_job.client.producer import returned
from slime.cross_job.client.weights import Weights
from slime.cross_job.settings import Settings, add_arguments


@ray.remote(num_cpus=0, resources={"rollout": 0.01})
class Sampler:
    """One method call is one rollout."""

    def __init__(self, folder: str, seed: int):
        self._folder, self._seed = Path(folder), seed

    def generate(self, rollout_id: int, version: int, weights: list[Any], first_prompt: int) -> tuple[Any, ...]:
        values = np.asarray(Weights(version, ray.get(weights[0]))["w"])
        point(self._folder, "mid-generate")
        time.sleep(0.05)
        batch = Batch.pack(generate(self._seed, values, first_prompt))
        line = {"rollout_id": rollout_id, "weights": version, "prompt": first_prompt, "sha": digest(batch)}
        with (self._folder / "generated.jsonl").open("a") as log:
            log.write(json.dumps({**line, "at": time.monotonic()}) + "\n")
        point(self._folder, "generated")
        return returned(batch, meta=line, weight_version=version, source={"next": first_prompt + PROMPTS})


def digest(batch: Batch) -> str:
    return hashlib.sha256(batch.ipc).hexdigest()


def main() -> None:
    parser = add_arguments(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--work-s", type=float, required=True)
    args = parser.parse_args()
    with Producer(args.job_id, settings=Settings.from_args(args)) as producer:
        sampler = Sampler.remote(str(args.folder), args.seed)  # type: ignore[attr-defined]
        ray.get(sampler.__ray_ready__.remote(), timeout=60)
        for rollout_id in producer.demands():
            weights = producer.weights(timeout_s=30)
            if weights is None:
                raise RuntimeError(f"rollout {rollout_id} is demanded, but there are no weights")
            _, source = producer.source_before(rollout_id)
            first_prompt = source["next"] if source else 0
            threading.Timer(0.06, point, (args.folder, "mid-publish")).start()
            published = producer.publish_from(
                *(rollout_id, sampler, "generate", rollout_id, weights.version, [weights.ref], first_prompt),
                timeout_s=args.work_s,
                repeatable=True,
            )
            line = {**published.meta, "version": published.version, "at": time.monotonic()}
            with (args.folder / "published.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    run(main)
