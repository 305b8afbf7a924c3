"""A train job for tests: claims what is published until the stream ends, checks every value, acks."""

import argparse
import os
import time

import ray
from speak import columns, say

from slime.cross_job import Consumer

parser = argparse.ArgumentParser()
parser.add_argument("job_id")
parser.add_argument("--samples", type=int, default=8)
parser.add_argument("--timeout", type=float, default=240)
parser.add_argument("--demand", type=int, default=0)
parser.add_argument("--end", choices=["finish", "raise", "sigkill"], default="finish")
args = parser.parse_args()

ray.init()
seen = []
with Consumer(args.job_id, timeout_s=args.timeout) as consumer:
    for rollout_id in range(args.demand):
        consumer.demand(rollout_id)
    say(pid=os.getpid(), attached=time.time())
    try:
        for rollout in consumer:
            assert rollout.batch.to_pydict() == columns(rollout.rollout_id, args.samples), rollout.rollout_id
            rollout.ack()
            seen.append(rollout.rollout_id)
            if args.end == "raise":
                raise ValueError("the loss is not a number")
            if args.end == "sigkill":
                os.kill(os.getpid(), 9)
    finally:
        say(seen=seen, ended=time.time())
