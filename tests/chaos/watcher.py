"""Who looks at a chaos run all the time, as its operators would: a viewer and the live view, in a process apart.

Asks twice a second, for what is new only, and writes down what it believes in the end (`viewed.json`), to be compared
by the auditor with what really happened: a view that missed something, or was told it twice, is wrong from then on.
"""

import argparse
import json
import logging
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import ray

from slime.cross_job.errors import Unreachable, WaitTimeout
from slime.cross_job.ops.viewer import Viewer
from slime.cross_job.ops.web import WebView

EVERY_S = 0.5
_FIRST_S = 300.0  # for the job to be there
ENOUGH = "viewed-enough"


class Watch:
    """What is believed, from the answers to `what is new since`."""

    def __init__(self, job_id: str):
        self.job_id = job_id
        self.rows: dict[int, dict[str, Any]] = {}
        self.events: dict[int, dict[str, Any]] = {}
        self.status: dict[str, Any] = {}
        self.seq, self.number, self.looks, self.failures = -1, 0, 0, 0
        self.heard = time.monotonic()
        self.longest_gap_s = 0.0

    def look(self, viewer: Viewer) -> None:
        """Ask once. Raises Unreachable, WaitTimeout."""
        found = viewer.look(self.job_id, since=self.seq, events_since=self.number)
        self.longest_gap_s = max(self.longest_gap_s, time.monotonic() - self.heard)
        self.heard = time.monotonic()
        self.looks += 1
        if found["seq"] < self.seq:
            raise AssertionError(f"the view went back from {self.seq} to {found['seq']}, though it is the same job")
        self.seq, self.status = found["seq"], found["status"]
        self.rows.update({row["rollout_id"]: row for row in found["progress"]})
        self.events.update({event["number"]: event for event in found["events"]})
        self.number = max(self.events, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--job-id", required=True)
    args = parser.parse_args()
    ray.init(address=args.address, log_to_driver=False, logging_level=logging.ERROR)
    watch = Watch(args.job_id)
    viewer = begin(watch, args.namespace)
    watch.heard, watch.longest_gap_s = time.monotonic(), 0.0
    with WebView(lambda: Viewer(args.namespace), job_id=args.job_id) as web:
        page: dict[str, Any] = {"rows": {}, "status": None, "asked": 0}
        while True:
            last = (args.folder / ENOUGH).exists()
            try:
                watch.look(viewer)
            except (Unreachable, WaitTimeout):
                watch.failures += 1
            ask_the_page(web.url, args.job_id, page)
            if last and watch.heard > time.monotonic() - 5:
                break
            time.sleep(EVERY_S)
        time.sleep(2.5)  # the page asks once a second
        ask_the_page(web.url, args.job_id, page)
    told = {
        "looks": watch.looks,
        "failures": watch.failures,
        "longest_gap_s": watch.longest_gap_s,
        "status": watch.status,
        "rows": [*watch.rows.values()],
        "events": [*watch.events.values()],
        "page": {"rows": [*page["rows"].values()], "status": page["status"], "asked": page["asked"]},
    }
    draft = args.folder / "viewed.new"
    draft.write_text(json.dumps(told))
    draft.rename(args.folder / "viewed.json")


def begin(watch: Watch, namespace: str) -> Viewer:
    """The first look that finds the job."""
    end = time.monotonic() + _FIRST_S
    while True:
        try:
            viewer = Viewer(namespace)
            watch.look(viewer)
            return viewer
        except Exception as error:
            if time.monotonic() > end:
                raise
            print(f"not yet: {error!r}", flush=True)
            time.sleep(1)


def ask_the_page(url: str, job_id: str, page: dict[str, Any]) -> None:
    """What a browser that stays open is told; its server must always answer."""
    asked = f"{url}api/look?job={job_id}&run={page.get('run', '')}&since={page.get('seq', -1)}"
    page["asked"] += 1
    try:
        with urllib.request.urlopen(f"{asked}&events_since={page.get('number', 0)}", timeout=120) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code != 503:  # it has not heard from the broker yet
            raise
        return
    if found.get("status") is None:
        return
    if found["anew"]:
        page["rows"] = {}
    page["run"], page["seq"], page["status"] = found["run"], found["seq"], found["status"]
    page["number"] = max([event["number"] for event in found["events"]], default=page.get("number", 0))
    for values in found["rows"]:
        row = dict(zip(found["fields"], values, strict=True))
        page["rows"][row["rollout_id"]] = row


if __name__ == "__main__":
    main()
