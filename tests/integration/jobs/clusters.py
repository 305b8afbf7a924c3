"""A job for tests of two clusters: clusters.py JOB_ID STORE ROLE --until N [--acked K].

producer   publishes what is demanded, each rollout with the prompt behind that of the one before it, and stays
consumer   demands, claims, checks and acks from K to N, one after the other
"""

import argparse
import os
import time

import ray
from speak import columns, say

from slime.cross_job import Consumer, Producer
from slime.cross_job.jobs import run
from slime.cross_job.producer import returned


@ray.remote(num_cpus=0)
class Generator:
    def generate(self, rollout_id: int, first: int) -> tuple:
        return returned(columns(rollout_id), meta={"prompt": first}, source={"next": first + 1})


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("job_id", "store", "role"):
        parser.add_argument(name)
    parser.add_argument("--until", type=int)
    parser.add_argument("--acked", type=int, default=0)
    args = parser.parse_args()
    ray.init()
    settings = {"store": args.store, "timeout_s": 90, "peer_grace_s": 90, "dead_after_s": 12}
    if args.role == "producer":
        with Producer(args.job_id, **settings) as producer:
            generator = Generator.remote()
            say(epoch=producer.epoch, pid=os.getpid())
            for rollout_id in producer.demands(until=args.until):
                _, source = producer.source_before(rollout_id)
                first = source["next"] if source else 0
                producer.publish_from(rollout_id, generator, "generate", rollout_id=rollout_id, first=first)
                say(published=rollout_id, prompt=first)
            time.sleep(600)
        return
    with Consumer(args.job_id, **settings) as consumer:
        say(epoch=consumer.epoch, pid=os.getpid())
        for rollout_id in range(args.acked, args.until):
            consumer.demand(rollout_id)
            with consumer.claim(rollout_id) as rollout:
                assert rollout.batch.to_pydict() == columns(rollout_id)
                say(claimed=rollout_id, version=rollout.version, prompt=rollout.meta["prompt"])
            time.sleep(0.3)
        status = consumer.status()
        say(**{name: status[name] for name in ("published", "acked", "losses", "republished")})


if __name__ == "__main__":
    run(main)
