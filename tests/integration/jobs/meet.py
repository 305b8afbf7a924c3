"""Find or create the broker of 20 namespaces, each at the same moment as another Ray job does.

Arguments: a prefix for the namespaces, a folder, this job's number. The job leaves `ready-N` in the folder and waits
for `go`, which holds the wall-clock time of the first meeting; the others follow every second.
"""

import sys
import time
from pathlib import Path

import ray
from speak import say

from slime.cross_job.client.connection import Connection

ray.init()
prefix, folder, number = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
(folder / f"ready-{number}").touch()
while not (folder / "go").exists():
    time.sleep(0.05)
first = float((folder / "go").read_text())
for n in range(20):
    while time.time() < first + n:
        time.sleep(0.001)
    started = time.time()
    connection = Connection(f"{prefix}-{n}")
    hello = connection.hello()
    say(namespace=hello["namespace"], broker=hello["actor_id"], started=started)
