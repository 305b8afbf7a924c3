"""A rollout or train job for tests of silence: it works, step by step, and says so.

Arguments: producer | consumer, job id, namespace, lease in seconds, a file: the train job is through once it exists.
"""

import os
import sys
import time
from pathlib import Path

import ray
from speak import say

from slime.cross_job import Consumer, Producer
from slime.cross_job.client.jobs import run


def main() -> None:
    ray.init()
    role, job_id, namespace, lease_s, enough = sys.argv[1:]
    settings = {"namespace": namespace, "dead_after_s": float(lease_s), "heartbeat_s": 0.5, "timeout_s": 120}
    if role == "producer":
        with Producer(job_id, **settings) as producer:
            say(pid=os.getpid(), epoch=producer.epoch)
            for rollout_id in producer.demands():
                producer.publish(rollout_id, {"a": [rollout_id]})
                time.sleep(0.2)
            say(epoch=producer.epoch)
    else:
        with Consumer(job_id, **settings) as consumer:
            say(pid=os.getpid(), epoch=consumer.epoch)
            rollout_id = 0
            while not Path(enough).exists():
                consumer.demand(rollout_id)
                with consumer.claim(rollout_id) as rollout:
                    assert rollout.batch["a"].tolist() == [rollout_id]
                rollout_id += 1
            say(epoch=consumer.epoch)


if __name__ == "__main__":
    run(main)
