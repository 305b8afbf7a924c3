"""SIGTERM ends a job that waits at once, and one that works when it would wait next; in a process of its own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

OVERLAY = Path(__file__).parents[2] / "slime_overlay"

SCRIPT = """
import os, signal, sys, time
from slime.cross_job.client import shutdown
from slime.cross_job.errors import Stopped
from slime.cross_job.client.jobs import run

def main():
    shutdown.install()
    how = sys.argv[1]
    if how == "working":
        print("ready", flush=True)
        deadline = time.monotonic() + 20
        while not shutdown.requested.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        print("finished its work", flush=True)
    with shutdown.while_waiting():
        if how == "waiting":
            print("ready", flush=True)
            try:
                time.sleep(20)
            except Stopped as stopped:  # as Ray does with what is raised inside of it
                raise SystemError("a signal handler raised") from stopped
        print("waited in vain", flush=True)

run(main)
"""


@pytest.mark.parametrize(("how", "said"), [("waiting", ""), ("working", "finished its work\n")])
def test_sigterm(how, said):
    job = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, how],
        env={"PYTHONPATH": str(OVERLAY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=15)
    assert (job.returncode, out) == (0, said), err
    assert "asked to stop (SIGTERM)" in err
