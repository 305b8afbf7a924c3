"""A Ray cluster of several machines, as the tests see it: what may happen to a machine, and what is read from it.

Machines are called by name: "head", "rollout", "train", "control" (where the one who watches has his process), "redis"
(the tables of the head's GCS); there may be more of a role: "rollout2". `compose.py` and `namespaces.py` make them.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from local_cluster import end_with_parent
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ("rollout", "train", "control")
UP_S = 120.0


class NodeCluster(ABC):
    """`with ...Cluster(folder) as cluster:`; `folder` is at the same path on every machine, and so are the tests.

    Attributes:
        api: Ray's job API, from here. token: what RAY_AUTH_TOKEN must be there; empty without authentication.
        python: the interpreter of the machines.
    """

    api: str = ""
    token: str = ""
    python: str = ""

    def __init__(self, folder: Path, workers: tuple[str, ...]) -> None:
        self.folder, self.workers = folder, workers
        self._wires: dict[str, Wire] = {}

    def __enter__(self) -> "NodeCluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abstractmethod
    def start(self) -> None:
        """Bring all machines up, and wait until jobs can be submitted."""

    @abstractmethod
    def stop(self) -> None:
        """End everything that was started."""

    @abstractmethod
    def kill(self, name: str) -> None:
        """SIGKILL all processes of the machine."""

    @abstractmethod
    def begin(self, name: str) -> None:
        """Start a machine that was killed, or whose processes have ended, as it was started the first time."""

    @abstractmethod
    def ended(self, name: str) -> bool:
        """Whether nothing runs on the machine."""

    @abstractmethod
    def pause(self, name: str) -> None:
        """Stop all processes of the machine, until `resume`."""

    @abstractmethod
    def resume(self, name: str) -> None: ...

    @abstractmethod
    def cut(self, name: str) -> None:
        """Take the machine off the network, until `join`."""

    @abstractmethod
    def join(self, name: str) -> None: ...

    @abstractmethod
    def command(self, name: str, words: list[str], *, root: bool = False) -> list[str]:
        """The command line that runs `words` on the machine, from here."""

    @abstractmethod
    def network(self, name: str, words: list[str]) -> list[str]:
        """The command line that runs `words`, a program of this machine, with the network of that one."""

    @abstractmethod
    def stranger(self, words: list[str], timeout_s: float, **env: str) -> "subprocess.CompletedProcess[str]":
        """Run `words` on the cluster's network, on a machine that is not one of its, without its token."""

    @abstractmethod
    def port(self, name: str) -> tuple[list[str], str, str]:
        """Where its network ends: (words before a command there, the device, the bridge that it belongs to)."""

    @abstractmethod
    def address(self, name: str) -> str:
        """Its IP address, as Ray calls it."""

    def run(self, name: str, *words: str, root: bool = False, timeout_s: float = 60) -> str:
        """What `words` prints there. Raises CalledProcessError, TimeoutExpired."""
        return output(self.command(name, [*words], root=root), timeout_s)

    def counters(self, name: str) -> tuple[int, int]:
        """Bytes that the machine has received and sent so far, by its network interface."""
        base = "/sys/class/net/eth0/statistics"
        received, sent = self.run(name, "cat", f"{base}/rx_bytes", f"{base}/tx_bytes").split()
        return int(received), int(sent)

    def slow(self, name: str, delay_ms: float, loss_percent: float) -> str:
        """Hold up, and lose, what comes from the machine, until `fast`; by what, in words."""
        netem = ["netem", "delay", f"{delay_ms:g}ms", "loss", f"{loss_percent:g}%"]
        try:
            output(self.network(name, ["tc", "qdisc", "add", "dev", "eth0", "root", *netem]))
            return "netem"
        except Failed:
            self._wires[name] = Wire(*self.port(name), delay_ms, loss_percent)
            return "wire.py, this kernel having no netem"

    def fast(self, name: str) -> None:
        if name in self._wires:
            self._wires.pop(name).end()
        else:
            output(self.network(name, ["tc", "qdisc", "del", "dev", "eth0", "root"]))

    def fill_memory(self, name: str) -> None:
        """Fill its /dev/shm to the last byte, with /dev/shm/ballast."""
        self.run(name, "sh", "-c", "cat /dev/zero > /dev/shm/ballast; true", root=True)

    def wait_for_jobs(self) -> None:
        """Until the job API answers and knows all workers."""
        wanted = {
            role: float(sum(role_of(name) == role for name in self.workers)) for role in map(role_of, self.workers)
        }
        wait_until(lambda: self._resources().items() >= wanted.items(), UP_S, "the cluster has not come up")

    def _resources(self) -> dict[str, float]:
        what = "import json, ray; ray.init('auto', logging_level='ERROR'); print(json.dumps(ray.cluster_resources()))"
        with contextlib.suppress(subprocess.SubprocessError):
            if answers(f"{self.api}/api/gcs_healthz"):
                return json.loads(self.run("control", self.python, "-c", what, timeout_s=30))
        return {}


def role_of(name: str) -> str:
    """Of a machine: "rollout" of "rollout2"."""
    return name.rstrip("0123456789")


class Wire:
    """wire.py between a machine's device and its bridge."""

    def __init__(self, there: list[str], device: str, bridge: str, delay_ms: float, loss_percent: float):
        self._link = [*there, "ip", "link"]
        self._device, self._bridge = device, bridge
        self._near, self._far = (f"w{uuid.uuid4().hex[:8]}{side}" for side in "ab")
        self._do("add", self._near, "type", "veth", "peer", "name", self._far)
        self._do("set", self._far, "master", bridge, "up")
        self._do("set", device, "nomaster")
        for side in (self._near, device):
            self._do("set", side, "promisc", "on", "up")
        program = [sys.executable, str(ROOT / "tests" / "cluster" / "wire.py"), device, self._near]
        self._process = subprocess.Popen(
            [*there, *program, str(delay_ms), str(loss_percent)],
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )

    def end(self) -> None:
        assert self._process.poll() is None, "the wire broke"
        self._process.kill()
        self._process.wait()
        self._do("set", self._device, "promisc", "off", "master", self._bridge)
        self._do("del", self._near)

    def _do(self, *words: str) -> None:
        output([*self._link, *words])


def output(command: list[str], timeout_s: float = 60, env: dict[str, str] | None = None) -> str:
    """What the command prints; its errors are in the CalledProcessError that it ends with."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patient(timeout_s),
        env={**os.environ, **(env or {})},
    )
    if done.returncode:
        raise Failed(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


class Failed(subprocess.CalledProcessError):
    def __str__(self) -> str:
        return f"{' '.join(self.cmd)} ended with {self.returncode}: {(self.stderr or self.stdout).strip()[-1500:]}"


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=3) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float, otherwise: str, every_s: float = 0.2) -> float:
    """Seconds until `condition()` was true. Raises TimeoutError with the words `otherwise`."""
    began, allowed_s = time.monotonic(), patient(timeout_s)
    while not condition():
        if time.monotonic() - began > allowed_s:
            raise TimeoutError(f"{otherwise} within {allowed_s:.0f} s")
        time.sleep(every_s)
    return time.monotonic() - began


def read_json(path: Path) -> dict:
    """{} where there is none, or none yet."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
