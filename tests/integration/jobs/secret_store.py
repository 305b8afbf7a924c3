"""A job with flags, for tests of secrets: secret_store.py producer|consumer --job-id ID --cross-job-store-... WHERE.

It prints its arguments and settings, as slime does with its own; then it hands over two rollouts, and lingers.
"""

import argparse
import time

import ray
from speak import columns, say

from slime.cross_job import Consumer, Producer
from slime.cross_job.client.jobs import run
from slime.cross_job.settings import Settings, add_arguments


def main() -> None:
    parser = add_arguments(argparse.ArgumentParser())
    parser.add_argument("role")
    args = parser.parse_args()
    ray.init()
    settings = Settings.from_args(args)
    print(args, settings, flush=True)
    if args.role == "producer":
        with Producer(args.job_id, settings=settings) as producer:
            for rollout_id in range(2):
                producer.publish(rollout_id, columns(rollout_id))
            say(published=2)
            time.sleep(600)
    with Consumer(args.job_id, settings=settings) as consumer:
        for rollout_id in range(2):
            consumer.claim(rollout_id).ack()
        say(acked=2)
        time.sleep(600)


if __name__ == "__main__":
    run(main)
