"""A job for tests of durable stores: durable.py JOB_ID STORE ROLE [--mode M] [--compression C] [--until N].

producer    publishes what is demanded up to N, from an actor, with where its source stood; then lingers
consumer    demands and claims up to N, checks every value, acks those below N - 2, then lingers
resumed     a consumer on another cluster, which goes on from a checkpoint that covers those below N - 2, up to N
"""

import argparse
import os
import time
from typing import Any

import numpy as np
import ray
from speak import columns, say

from slime.cross_job import Consumer, Producer
from slime.cross_job.client.jobs import run
from slime.cross_job.client.producer import returned


@ray.remote(num_cpus=0)
class Generator:
    def generate(self, rollout_id: int, first: int) -> Any:
        source = {"next": first + 1, "ballast": "x" * 10_000 * (rollout_id % 2)}  # large, every other time
        return returned(columns(rollout_id), meta={"first": first}, weight_version=rollout_id, source=source)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("job_id", "store", "role"):
        parser.add_argument(name)
    parser.add_argument("--mode", default=None)
    parser.add_argument("--compression", default=None)
    parser.add_argument("--until", type=int, default=4)
    args = parser.parse_args()
    ray.init()
    settings: dict[str, Any] = {"store": args.store, "store_mode": args.mode, "compression": args.compression}
    settings |= {"retain": 2, "peer_grace_s": 120.0}  # the other one's job takes a while to start on a busy machine
    if args.role == "producer":
        produce(args, settings)
    else:
        consume(args, settings)


def produce(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    with Producer(args.job_id, **settings) as producer:
        generator = Generator.remote()
        for rollout_id in producer.demands(timeout_s=240, until=args.until):
            position, source = producer.source_before(rollout_id)
            first = source["next"] if source else 0
            published = producer.publish_from(rollout_id, generator, "generate", rollout_id=rollout_id, first=first)
            say(published=rollout_id, version=published.version, first=first, position=position, pid=os.getpid())
        time.sleep(600)


def consume(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    checkpoint = args.until - 2
    with Consumer(args.job_id, timeout_s=240, **settings) as consumer:
        if args.role == "resumed":
            checkpoint -= 2
            consumer.resume(checkpoint)
        for rollout_id in range(checkpoint if args.role == "resumed" else 0, args.until):
            consumer.demand(rollout_id)
            rollout = consumer.claim(rollout_id)
            assert rollout.batch.to_pydict() == columns(rollout_id)
            assert rollout.meta["first"] == rollout_id
            say(claimed=rollout_id, version=rollout.version, stored=rollout._located.payload.stored)
            if args.role == "resumed" or rollout_id < checkpoint:
                rollout.ack()
        consumer.publish_weights(args.until, {"w": np.array([1.0, 2.0])})
        status = consumer.status()
        say(**{name: status[name] for name in ("published", "acked", "losses", "unstored", "store")})
        if args.role != "resumed":
            time.sleep(600)


if __name__ == "__main__":
    run(main)
