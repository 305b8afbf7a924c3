"""A rollout job for tests: generates what is demanded until the stream ends."""

import time

import ray
from speak import columns, say

from slime.cross_job import Producer

if __name__ == "__main__":
    import sys

    ray.init()
    published = []
    with Producer(sys.argv[1]) as producer:
        try:
            for rollout_id in producer.demands(240):
                producer.publish(rollout_id, columns(rollout_id))
                published.append(rollout_id)
        finally:
            say(published=published, ended=time.time())
