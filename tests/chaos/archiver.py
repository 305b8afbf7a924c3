"""A second consumer group of the chaos run: it reads every rollout that it can get, and writes down what it got.

Runs in the injector's process, which nothing kills: what it wrote is a witness of what was published first.
"""

import contextlib
import hashlib
import json
import threading
from pathlib import Path
from typing import TextIO

from slime.cross_job import Consumer
from slime.cross_job.errors import (
    CrossJobError,
    EndOfStream,
    PayloadLost,
    Refused,
    RolloutNotFound,
    Unreachable,
    WaitTimeout,
)

_LOOK_S = 2.0  # of one claim


class Archiver:
    """In a thread of its own, until the stream ends. `error` is what ended it otherwise."""

    def __init__(self, job_id: str, folder: Path, **settings: object):
        self.error: Exception | None = None
        self.through = threading.Event()
        self._leaving = threading.Event()
        self._path = folder / "archived.jsonl"
        self._named = (job_id, settings)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; after `leave`, go on."""
        self.error = None
        self.through.clear()
        self._leaving.clear()
        self._thread = threading.Thread(target=self._run, name="archiver", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Its cluster is about to be lost, and with it this consumer, which tells nobody. No thread may wait for Ray
        while another calls ray.shutdown: ray.get then never returns, whatever its timeout (Ray 2.60, now and then)."""
        if self._thread is not None:
            self._leaving.set()
            self._thread.join(90)
            assert not self._thread.is_alive(), "the archiver does not come out of its claim"

    def _run(self) -> None:
        job_id, settings = self._named
        try:
            with contextlib.ExitStack() as until, self._path.open("a") as log:
                consumer = until.enter_context(Consumer(job_id, group="archive", **settings))  # type: ignore[arg-type]
                while self._archive_next(consumer, log):
                    if self._leaving.is_set():
                        until.pop_all()
                        return
        except Exception as error:
            self.error = error
        finally:
            self.through.set()

    def _archive_next(self, consumer: Consumer, log: TextIO) -> bool:
        """False: there is nothing more to come."""
        try:
            rollout = consumer.claim(timeout_s=_LOOK_S)
        except (WaitTimeout, Unreachable):  # the run itself says when it takes too long
            return True
        except (EndOfStream, PayloadLost):  # what is lost, and has taken effect, is not generated for an archive
            return False
        try:
            sha = hashlib.sha256(rollout.batch.ipc).hexdigest()
        except Unreachable:  # its vault has just died
            with contextlib.suppress(CrossJobError):
                consumer.release(rollout.rollout_id)
            return True
        line = {"rollout_id": rollout.rollout_id, "version": rollout.version, "sha": sha}
        log.write(json.dumps(line) + "\n")
        log.flush()
        with contextlib.suppress(Refused, RolloutNotFound):  # lost between: it comes again
            rollout.ack()
        return True
