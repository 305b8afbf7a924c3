"""Places in the jobs where a fault can be asked for from outside: a file `armed-PLACE` in the run's folder.

Who reaches the place takes the file (one process does, once), writes `taken-NAME` as a witness, and then exits without
a word, or hangs. Where nothing is armed, a point does nothing.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

PLACES = ("mid-generate", "generated", "mid-publish", "stepped", "saved")


def point(folder: Path, place: str) -> None:
    """Do what is asked for at `place`, if anything is."""
    armed, mine = folder / f"armed-{place}", folder / f"taking-{os.getpid()}"
    try:
        armed.rename(mine)
    except FileNotFoundError:
        return
    order = json.loads(mine.read_text())
    mine.rename(folder / f"taken-{order['name']}")
    if order["action"] == "hang":
        time.sleep(3600)
    os.kill(os.getpid(), signal.SIGKILL)


def jump(broker: Any, forward: float) -> float:
    """The wall clock that the broker sees is off by `forward` seconds from now on; returns what it is off."""
    ledger = broker._ledger
    ledger.registry.wall = lambda: time.time() + forward
    return ledger.registry.wall() - time.time()


def arm(folder: Path, place: str, name: str, action: str) -> None:
    """Ask for `action` (exit, hang) of whoever reaches `place` next."""
    assert place in PLACES
    draft = folder / f"draft-{name}"
    draft.write_text(json.dumps({"name": name, "action": action}))
    draft.rename(folder / f"armed-{place}")


def disarm(folder: Path, place: str) -> bool:
    """Take the request back. False: somebody has taken it."""
    try:
        (folder / f"armed-{place}").unlink()
        return True
    except FileNotFoundError:
        return False
