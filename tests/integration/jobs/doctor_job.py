"""One of the two jobs of an experiment that `doctor` looks at: attaches, publishes or claims, and stays."""

import argparse
import os
import time

import numpy as np
import ray
from speak import say

from slime.cross_job import Consumer, Producer

parser = argparse.ArgumentParser()
parser.add_argument("role", choices=["producer", "consumer"])
parser.add_argument("job_id")
parser.add_argument("namespace")
parser.add_argument("--store")
parser.add_argument("--rollouts", type=int, default=2)
parser.add_argument("--numbers", type=int, default=1000)
parser.add_argument("--dead-after-s", type=float, default=30.0)
args = parser.parse_args()

ray.init(log_to_driver=False)
settings = {
    "namespace": args.namespace,
    "store": args.store,
    "dead_after_s": args.dead_after_s,
    "heartbeat_s": 0.5,
}
if args.role == "producer":
    with Producer(args.job_id, **settings) as producer:
        for rollout_id in range(args.rollouts):
            producer.publish(rollout_id, {"tokens": [np.arange(args.numbers, dtype=np.int64)]})
        say(pid=os.getpid(), node_id=ray.get_runtime_context().get_node_id())
        time.sleep(600)
else:
    with Consumer(args.job_id, **settings) as consumer:
        consumer.claim(0)
        say(pid=os.getpid())
        time.sleep(600)
