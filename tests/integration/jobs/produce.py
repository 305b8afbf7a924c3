"""A rollout job for tests: publishes rollouts in one of several ways, then ends in one of several ways."""

import argparse
import os
import time

import ray
from speak import columns, say

from slime.cross_job import Producer
from slime.cross_job.client.producer import returned


@ray.remote(num_cpus=0)
class Generator:
    def generate(self, rollout_id, samples):
        return returned(columns(rollout_id, samples), meta={"by": "actor"}, weight_version=rollout_id)

    def pid(self):
        return os.getpid()


parser = argparse.ArgumentParser()
parser.add_argument("job_id")
parser.add_argument("--rollouts", type=int, default=3)
parser.add_argument("--samples", type=int, default=8)
parser.add_argument("--how", choices=["value", "actor", "ref"], default="value")
parser.add_argument("--end", choices=["finish", "linger", "raise", "sigkill", "silent"], default="finish")
args = parser.parse_args()

ray.init()
generator = Generator.remote()
with Producer(args.job_id) as producer:
    for rollout_id in range(args.rollouts):
        if args.how == "actor":
            producer.publish_from(rollout_id, generator, "generate", rollout_id, args.samples)
        elif args.how == "ref":
            producer.publish(rollout_id, ray.put(columns(rollout_id, args.samples)))
        else:
            producer.publish(
                rollout_id, columns(rollout_id, args.samples), meta={"by": "value"}, weight_version=rollout_id
            )
    say(pid=os.getpid(), actor_pid=ray.get(generator.pid.remote()), ray_job_id=ray.get_runtime_context().get_job_id())
    if args.end == "linger":
        time.sleep(600)
    if args.end == "raise":
        raise ValueError("the reward model is on fire")
    if args.end == "sigkill":
        print("out of memory, these are my last words", flush=True)
        time.sleep(1)
        os.kill(os.getpid(), 9)
    if args.end == "silent":
        os._exit(0)
