"""Processes of named actors on a real cluster: which they are, stopped for a while, killed."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util import state

from tests.support.patience import wait_for


def pids_of(namespace: str, name: str) -> list[int]:
    """Of the living actors whose name begins so."""
    address = ray.get_runtime_context().gcs_address
    filters: Any = [("ray_namespace", "=", namespace), ("state", "=", "ALIVE")]
    there = state.list_actors(address=address, filters=filters)
    return [actor.pid for actor in there if str(actor.name).startswith(name)]


def pid_of(namespace: str, name: str) -> int:
    """Of the only one."""
    found = pids_of(namespace, name)
    assert len(found) == 1, f"{name} in {namespace}: {found}"
    return found[0]


def kill(namespace: str, name: str) -> None:
    """SIGKILL, and see that another process took its place."""
    pid = pid_of(namespace, name)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(found := pids_of(namespace, name)) == 1 and found != [pid], 30)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """They are there, and do nothing."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
