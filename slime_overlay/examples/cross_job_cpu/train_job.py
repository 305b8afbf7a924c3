"""The train job: demands rollouts, trains on each with GRPO, publishes the new weights, acks.

Writes one line a rollout to `--out`/train.jsonl, after its ack: the audit trail of what has taken effect.
"""

import argparse
import json
import time
from pathlib import Path

import ray
import torch
from grpo import build_model, build_optimizer, export_weights, train_step
from recipe import Recipe

from slime.cross_job import Consumer
from slime.cross_job.client.jobs import run
from slime.cross_job.settings import Settings, add_arguments


def main() -> None:
    parser = add_arguments(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--rollouts", type=int, default=Recipe.rollouts)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl")
    parser.add_argument("--device", default="cpu", help="where the model is: cpu or cuda (default: %(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    recipe = Recipe()
    model = build_model(recipe, args.seed, args.device)
    optimizer = build_optimizer(model, recipe)
    with Consumer(args.job_id, settings=Settings.from_args(args)) as consumer:
        consumer.publish_weights(0, export_weights(model))
        with (args.out / "train.jsonl").open("a") as log:
            for rollout_id in range(args.rollouts):
                consumer.demand(rollout_id)
                asked = time.time()
                rollout = consumer.claim(rollout_id)
                batch = rollout.batch
                claim_ms = 1e3 * (time.time() - max(asked, rollout.published_at))
                consumer.doing(f"training on rollout {rollout_id}")
                with consumer.span("train", rollout_id):
                    metrics = train_step(model, optimizer, batch, recipe, rollout_id)
                with consumer.span("weights", rollout_id):
                    consumer.publish_weights(rollout_id + 1, export_weights(model))
                rollout.ack()
                line = {
                    "rollout_id": rollout_id,
                    "version": rollout.version,
                    "weight_version": rollout.weight_version,
                    "staleness": rollout_id - (rollout.weight_version or 0),
                    "reward": sum(batch["rewards"]) / rollout.num_samples,
                    "claim_ms": claim_ms,
                    "node": ray.util.get_node_ip_address(),
                    "device": str(model.head.weight.device),
                    "time": time.time(),
                    **metrics,
                }
                log.write(json.dumps(line) + "\n")
                log.flush()


if __name__ == "__main__":
    run(main)
