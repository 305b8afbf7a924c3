"""Ports that no two engines of a node get, also those of other experiments and of other Ray clusters.

slime looks for ports that are free, and its servers bind them long after: two jobs that start together would find the
same ones. Whoever takes a port here holds a lock on a file that is named after it, as long as its process lives. Other
users of the machine, and containers with another temporary folder, do not see the locks: an engine proves whose it is
all the same (engine_weights.py).
"""

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import IO

from ..errors import BadInput

LAST = 65535
_held: list[IO[str]] = []


def take(start_port: int = 10000, consecutive: int = 1) -> int:
    """The first of `consecutive` free ports from `start_port` on, which nobody else takes while this process lives.

    Raises:
        BadInput: there are none up to LAST.
    """
    first = start_port
    while first + consecutive - 1 <= LAST:
        locks: list[IO[str]] = []
        for port in range(first, first + consecutive):
            lock = _lock(port)
            if lock is None:
                break
            locks.append(lock)
            if not _free(port):
                break
        else:
            _held.extend(locks)
            return first
        for lock in locks:
            lock.close()
        first = port + 1
    raise BadInput(f"no {consecutive} free ports in a row from {start_port} on: stop what holds them")


def take_this(port: int) -> bool:
    """Whether this port is free, and taken from now on."""
    lock = _lock(port)
    if lock is None:
        return False
    if not _free(port):
        lock.close()
        return False
    _held.append(lock)
    return True


def _lock(port: int) -> IO[str] | None:
    """None: somebody has it."""
    folder = Path(tempfile.gettempdir(), f"slime-cross-job-ports-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    file = (folder / str(port)).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
    return True
