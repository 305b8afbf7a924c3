"""A head whose GCS is fault tolerant because its tables lie in Redis, and the death of that GCS."""

import contextlib
import functools
import os
import signal
import subprocess
import time

import psutil

from local_cluster import LocalCluster, command_of, end_with_parent
from tests.support.redis_server import RedisServer, program

_killed_with_parent = functools.partial(end_with_parent, signal.SIGKILL)


class Head(LocalCluster):
    """A LocalCluster with a Redis of its own where there is a redis-server; else its GCS is not fault tolerant."""

    ends_by = signal.SIGKILL  # restart_gcs stops `ray start --block`, which then takes no other signal

    def __init__(self, object_store_bytes: int, env: dict[str, str]):
        self._redis = RedisServer() if program() else None
        external = {"RAY_REDIS_ADDRESS": f"127.0.0.1:{self._redis.port}"} if self._redis else {}
        super().__init__(num_cpus=4, object_store_bytes=object_store_bytes, env={**external, **env})

    def stop(self) -> None:
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
        super().stop()
        if self._redis is not None:
            self._redis.stop()

    def restart_gcs(self, away_s: float) -> tuple[int, int]:
        """SIGKILL the GCS, and start it again `away_s` seconds later on the same port, as a supervisor would.

        `ray start --block` would end the whole head then; since it only watches, it is stopped. Returns both process
        ids. Raises LookupError when there is no GCS.
        """
        old = self._gcs()
        process = psutil.Process(old)
        port = self.address.rpartition(":")[2]  # it was told to choose one; the next is to have the same
        command = [
            f"--gcs_server_port={port}" if part.startswith("--gcs_server_port=") else part
            for part in process.cmdline()
        ]
        environ = process.environ()
        os.kill(self.pid, signal.SIGSTOP)
        os.kill(old, signal.SIGKILL)
        time.sleep(away_s)
        with (self.folder / "gcs.log").open("ab") as out:
            new = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=_killed_with_parent,
            )
        return old, new.pid

    def _gcs(self) -> int:
        for pid in self.pids():
            if command_of(pid)[0].endswith("/gcs_server"):
                return pid
        raise LookupError("the head has no GCS")
