"""On a node of a cluster of several machines: the archive, and what the broker and Ray say, for an injector outside.

Writes `observed.json` into the run's folder several times a second, until `observed-enough` is there.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import ray
from archiver import Archiver
from supervisor import JOB_ID, NAMESPACE, SETTINGS

from slime.cross_job.client.connection import Connection
from slime.cross_job.errors import CrossJobError

_NODE = ("NodeID", "Alive", "NodeManagerAddress", "DeathReasonMessage")


def observe(connection: Connection, archiver: Archiver) -> dict[str, Any]:
    status = connection.call("status", timeout_s=20).get(JOB_ID, {})
    nodes = [{key: node[key] for key in _NODE} for node in ray.nodes()]
    error = None if archiver.error is None else repr(archiver.error)
    return {"status": status, "nodes": nodes, "archive": {"through": archiver.through.is_set(), "error": error}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--store", default="")
    args = parser.parse_args()
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    connection = Connection(NAMESPACE)
    archiver = Archiver(JOB_ID, args.folder, **SETTINGS, **({"store": args.store} if args.store else {}))
    archiver.start()
    while not (args.folder / "observed-enough").exists():
        try:
            seen = {"at": time.monotonic(), **observe(connection, archiver)}
        except (CrossJobError, ray.exceptions.RayError) as error:  # nobody answers: what was written grows old
            print(f"{time.monotonic():.1f} {error!r}", flush=True)
            continue
        draft = args.folder / "observed.new"
        draft.write_text(json.dumps(seen))
        draft.rename(args.folder / "observed.json")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
