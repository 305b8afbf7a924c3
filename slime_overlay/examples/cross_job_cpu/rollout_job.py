"""The rollout job: samples what the train job demands, with the newest weights, and publishes it.

Sampling happens in an actor, as it does in slime: the vault calls `Sampler.generate` itself, so the batch goes
straight into shared memory that outlives this job. Writes one line a rollout to `--out`/rollout.jsonl.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import ray
import torch
from recipe import Recipe

from slime.cross_job import Producer
from slime.cross_job.jobs import run
from slime.cross_job.producer import returned
from slime.cross_job.settings import Settings, add_arguments
from slime.cross_job.weights import Weights


@ray.remote(num_cpus=1)
class Sampler:
    """Holds the policy; one method call is one rollout."""

    def __init__(self, recipe: Recipe, seed: int):
        from grpo import build_model
        from task import SumTask

        torch.set_num_threads(1)
        self._recipe, self._seed = recipe, seed
        self._task = SumTask()
        self._model = build_model(recipe, seed)
        self._version = -1

    def generate(self, rollout_id: int, version: int, weights: list[Any]) -> tuple[Any, ...]:
        """Sample rollout `rollout_id` with the weights behind the ref in `weights`, loaded only when new."""
        from grpo import generate, load_weights

        started = time.perf_counter()
        if version != self._version:
            load_weights(self._model, Weights(version, ray.get(weights[0])))
            self._version = version
        columns = generate(self._model, self._task, self._recipe, rollout_id, self._seed)
        reward = sum(columns["rewards"]) / len(columns["rewards"])
        node = ray.util.get_node_ip_address()
        meta = {"reward": reward, "generate_s": time.perf_counter() - started, "node": node}
        return returned(columns, meta=meta, weight_version=version)


def main() -> None:
    parser = add_arguments(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--rollouts", type=int, default=Recipe.rollouts)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for rollout.jsonl")
    args = parser.parse_args()

    with Producer(args.job_id, settings=Settings.from_args(args)) as producer:
        own_node = {"rollout": 0.01} if "rollout" in ray.cluster_resources() else {}
        sampler = Sampler.options(resources=own_node).remote(Recipe(), args.seed)  # type: ignore[attr-defined]
        with (args.out / "rollout.jsonl").open("a") as log:
            for rollout_id in producer.demands(until=args.rollouts):
                weights = producer.weights(timeout_s=60)
                if weights is None:
                    raise RuntimeError("the train job demands rollouts but has published no weights for 60 s")
                started = time.perf_counter()
                published = producer.publish_from(
                    rollout_id, sampler, "generate", rollout_id, weights.version, [weights.ref]
                )
                line = {
                    "rollout_id": rollout_id,
                    "version": published.version,
                    "weight_version": weights.version,
                    "num_samples": published.num_samples,
                    "nbytes": published.nbytes,
                    "reward": published.meta["reward"],
                    "node": published.meta["node"],
                    "publish_ms": 1e3 * (time.perf_counter() - started - published.meta["generate_s"]),
                    "time": time.time(),
                }
                log.write(json.dumps(line) + "\n")
                log.flush()


if __name__ == "__main__":
    run(main)
