"""A chaos run on several machines (tests/cluster): the injector is outside of them, an observer on one."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job_api import job_client
from tests.chaos.nodes import wait_until
from tests.chaos.supervisor import Supervisor
from tests.support.compose import ComposeCluster, daemon
from tests.support.node_cluster import NodeCluster, read_json

_FRESH_S = 3.0
_OBSERVED_S = 60.0
HERE = Path(__file__).resolve().parent


class Observer:
    """The observer's process, and what it has seen."""

    def __init__(self, cluster: NodeCluster, folder: Path, store: str):
        self.folder = folder
        command = [cluster.python, "-u", str(HERE / "observer.py"), "--folder", str(folder)]
        command += ["--store", store] if store else []
        with (folder / "observer.log").open("ab") as out:
            self._process = subprocess.Popen(
                cluster.command("control", command), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        if not wait_until(lambda: bool(self.seen()) or self._process.poll() is not None, _OBSERVED_S):
            raise RuntimeError(f"the observer sees nothing: {self.log()}")

    def seen(self, fresh_s: float = _FRESH_S) -> dict[str, Any]:
        """The newest; {} where that is older than `fresh_s`. Raises RuntimeError when it has ended."""
        if self._process.poll() is not None:
            raise RuntimeError(f"the observer has ended: {self.log()}")
        found = read_json(self.folder / "observed.json")
        return found if found and time.monotonic() - found["at"] < fresh_s else {}

    def alive(self, ip: str) -> list[str]:
        """The ids of the nodes there that Ray counts as alive."""
        return [n["NodeID"] for n in self.seen().get("nodes", ()) if n["Alive"] and n["NodeManagerAddress"] == ip]

    def death_of(self, node_id: str) -> str:
        """Ray's reason; empty while it counts the node as alive."""
        found = [n for n in self.seen().get("nodes", ()) if n["NodeID"] == node_id and not n["Alive"]]
        return found[0]["DeathReasonMessage"] or "without a reason" if found else ""

    def log(self) -> str:
        return (self.folder / "observer.log").read_text(errors="replace")[-2000:]

    def end(self) -> None:
        (self.folder / "observed-enough").touch()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ArchiveThere:
    """The observer's archive, as chaos.py sees its own."""

    def __init__(self, observer: Observer):
        self._observer = observer
        self.through = self

    def wait(self, timeout_s: float) -> bool:
        return wait_until(lambda: self._said().get("through", False), timeout_s, 0.2)

    @property
    def error(self) -> str | None:
        return self._said().get("error")

    def start(self) -> None:
        """It has begun with the observer."""

    def _said(self) -> dict[str, Any]:
        return self._observer.seen().get("archive", {})


class SupervisorOutside(Supervisor):
    """Submits over HTTP, each job to its own node, and hears of the broker from the observer."""

    def __init__(self, cluster: NodeCluster, observer: Observer, folder: Path, seed: int, store: str):
        self._observer = observer
        self._headers = {"Authorization": f"Bearer {cluster.token}"} if cluster.token else None
        super().__init__(cluster.api, folder, seed, "", store)
        self.python, self.own_node_always = cluster.python, True

    def connect(self, api: str) -> None:
        self._client = job_client(api, headers=self._headers)

    def status(self) -> dict[str, Any]:
        return self._observer.seen().get("status", {})


@contextlib.contextmanager
def cluster_of(kind: str, folder: Path) -> Iterator[NodeCluster]:
    """The machines, and what they need."""
    with contextlib.ExitStack() as stack:
        if kind == "compose":
            stack.enter_context(daemon(folder / "dockerd.log"))
            cluster: NodeCluster = ComposeCluster(folder, SHM_SIZE="300m")
        else:
            from tests.support.namespaces import NamespaceCluster

            cluster = NamespaceCluster(folder)
        stack.enter_context(cluster)
        yield cluster
