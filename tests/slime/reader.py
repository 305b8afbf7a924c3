"""A job that reads what an experiment publishes: reader.py JOB_ID COUNT. Says that it is there, then each rollout."""

import json
import sys

import ray

from slime.cross_job import Consumer
from slime.cross_job.errors import EndOfStream

if __name__ == "__main__":
    job_id, count = sys.argv[1], int(sys.argv[2])
    ray.init(address="auto", log_to_driver=False)
    with Consumer(job_id, group="archive") as consumer:
        print("SAID", json.dumps({"attached": job_id}), flush=True)
        for _ in range(count):
            with consumer.claim(timeout_s=600) as rollout:
                rewards = [r for part in rollout.parts for r in part.get("rewards", [])]
                tokens = sum(len(part["tokens"]) for part in rollout.parts)
                told = {"rollout_id": rollout.rollout_id, "samples": tokens, "reward": rollout.meta["reward"]}
                assert len(rewards) == tokens
                print("SAID", json.dumps(told), flush=True)
        try:
            consumer.claim(timeout_s=60)
        except EndOfStream:
            print("SAID", json.dumps({"end": "planned"}), flush=True)
