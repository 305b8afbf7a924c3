"""A train job for tests: claims a rollout and holds it; acks it when it is woken, or ends as it is asked to.

Arguments: job id, namespace, lease in seconds, for how many seconds it holds the rollout.
"""

import os
import sys
import time

import ray
from speak import say

from slime.cross_job import Consumer
from slime.cross_job.client.jobs import run


def main() -> None:
    ray.init()
    job_id, namespace = sys.argv[1:3]
    lease_s, holds_s = map(float, sys.argv[3:])
    with Consumer(job_id, namespace=namespace, heartbeat_s=0.5, dead_after_s=lease_s, timeout_s=240) as consumer:
        rollout = consumer.claim(0)
        say(pid=os.getpid(), claimed=rollout.rollout_id, epoch=consumer.epoch)
        time.sleep(holds_s)  # stopped in here, it wakes up late
        try:
            rollout.ack()
            say(acked=True)
            consumer.claim(1)
        finally:
            say(ended=True)


if __name__ == "__main__":
    run(main)
