"""A rollout job that forks, and then leaves its cluster and connects anew; it says what its producer makes of both.

Arguments: job id, namespace.
"""

import os
import sys
import time

import ray
from speak import say

from slime.cross_job import Producer
from slime.cross_job.client.jobs import run
from slime.cross_job.errors import BadInput, ClusterUnreachable


def main() -> None:
    ray.init()
    producer = Producer(sys.argv[1], namespace=sys.argv[2])
    began = time.monotonic()
    if not (child := os.fork()):
        code = 1
        try:
            producer.publish(0, {"a": [0]})
        except BadInput:
            try:
                Producer(sys.argv[1], namespace=sys.argv[2])
            except BadInput:
                code = 7
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    say(forked=code, took_s=time.monotonic() - began)
    ray.shutdown()
    ray.init()
    began = time.monotonic()
    try:
        producer.publish(0, {"a": [0]})
    except ClusterUnreachable as error:
        say(anew=str(error), took_s=time.monotonic() - began)
    time.sleep(3)  # of heartbeats


if __name__ == "__main__":
    run(main)
