"""An operator's job: steer.py JOB_ID WHAT [WORD] waits until a client has attached, or steers the experiment; says its
status. WHAT is `attached` (WORD: producer or consumers) or `control` (WORD: paused, running, draining)."""

import json
import sys
import time

import ray

from slime.cross_job.client.connection import Connection
from slime.cross_job.errors import RolloutNotFound

if __name__ == "__main__":
    job_id, what, word = sys.argv[1:]
    ray.init(address="auto", log_to_driver=False)
    connection = Connection()
    if what == "control":
        connection.call("control", job_id, word)
    while True:
        try:
            status = connection.call("status", job_id)[job_id]
            if what == "control" or status[word]:
                break
        except RolloutNotFound:
            pass
        time.sleep(0.2)
    print("SAID", json.dumps({name: status[name] for name in ("control", "published", "acked")}), flush=True)
