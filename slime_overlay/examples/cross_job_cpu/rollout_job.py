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
from slime.cross_job.client.jobs import run
from slime.cross_job.client.producer import returned
from slime.cross_job.client.weights import Weights
from slime.cross_job.settings import Settings, add_arguments


@ray.remote(num_cpus=1)
class Sampler:
    """Holds the policy; one method call is one rollout."""

    def __init__(self, recipe: Recipe, seed: int, device: str = "cpu", tensors: bool = False):
        from grpo import build_model
        from task import SumTask

        torch.set_num_threads(1)
        self._recipe, self._seed = recipe, seed
        self._task = SumTask()
        self._model = build_model(recipe, seed, device)
        self._device, self._tensors = device, tensors
        self._version = -1

    def generate(self, rollout_id: int, version: int, weights: list[Any]) -> tuple[Any, ...]:
        """Sample rollout `rollout_id` with the weights behind the ref in `weights`, loaded only when new."""
        from grpo import as_tensors, generate, load_weights

        started = time.perf_counter()
        if version != self._version:
            load_weights(self._model, Weights(version, ray.get(weights[0])))
            self._version = version
        columns = generate(self._model, self._task, self._recipe, rollout_id, self._seed)
        columns = as_tensors(columns, self._device) if self._tensors else columns
        reward = sum(columns["rewards"]) / len(columns["rewards"])
        node = ray.util.get_node_ip_address()
        device = self._model.head.weight.device
        meta = {"reward": reward, "generate_s": time.perf_counter() - started, "node": node, "device": str(device)}
        meta["published_from"] = f"tensors on {columns['tokens'][0].device}" if self._tensors else "lists"
        return returned(columns, meta=meta, weight_version=version)


def main() -> None:
    parser = add_arguments(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--rollouts", type=int, default=Recipe.rollouts)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for rollout.jsonl")
    parser.add_argument("--device", default="cpu", help="where the model is: cpu or cuda (default: %(default)s)")
    parser.add_argument("--num-gpus", type=float, default=0, help="share of a GPU of the sampler")
    parser.add_argument("--tensors", action="store_true", help="publish tensors of the device, not lists")
    args = parser.parse_args()

    with Producer(args.job_id, settings=Settings.from_args(args)) as producer:
        own_node = {"rollout": 0.01} if "rollout" in ray.cluster_resources() else {}
        sampler = Sampler.options(resources=own_node, num_gpus=args.num_gpus).remote(  # type: ignore[attr-defined]
            Recipe(), args.seed, args.device, args.tensors
        )
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
                    **{name: published.meta[name] for name in ("node", "device", "published_from")},
                    "publish_ms": 1e3 * (time.perf_counter() - started - published.meta["generate_s"]),
                    "time": time.time(),
                }
                log.write(json.dumps(line) + "\n")
                log.flush()


if __name__ == "__main__":
    run(main)
