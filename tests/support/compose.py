"""Machines that are containers of docker/docker-compose.yml, with a network of their own."""

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from launch_cluster import compose_words
from local_cluster import free_ports
from tests.support.node_cluster import ROOT, WORKERS, Failed, NodeCluster, output, role_of, wait_until
from tests.support.patience import patient

_PULLED = "python:3.11-slim-bookworm"
_FILES = (ROOT / "docker" / "docker-compose.yml", ROOT / "tests" / "support" / "nodes.yml")
_DAEMON_S, _PULL_S, _BUILD_S = 60.0, 120.0, 900.0


def why_not() -> str:
    """Why there can be no containers here; empty where there can."""
    if not shutil.which("docker") or not compose_words():
        return "there is no docker, or no docker compose"
    if not _answers() and (not shutil.which("dockerd") or os.geteuid() != 0):
        return "no Docker daemon answers, and none can be started"
    return ""


@contextlib.contextmanager
def daemon(log: Path) -> Iterator[None]:
    """A Docker daemon: the one that answers, else one that is started, and ended afterwards."""
    if _answers():
        yield
        return
    command = [
        "dockerd",
        f"--pidfile={log.with_suffix('.pid')}",
    ]  # the usual one may be that of a daemon that was killed
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until(lambda: _answers() or process.poll() is not None, _DAEMON_S, "dockerd does not answer")
        if process.poll() is not None:
            raise RuntimeError(f"dockerd ended: {log.read_text(errors='replace')[-1500:]}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def images() -> dict[str, str]:
    """The variables that name base and Redis images: what can be pulled, else what docker/make_base.sh makes."""
    if subprocess.run(["docker", "image", "inspect", _PULLED], capture_output=True).returncode == 0:
        return {}
    made = output(["docker", "images", "-q", "slime-cross-job-base"])
    if not made:
        with contextlib.suppress(Failed, subprocess.TimeoutExpired):
            output(["docker", "pull", "-q", _PULLED], _PULL_S)
            return {}
    base = output([str(ROOT / "docker" / "make_base.sh")], _BUILD_S).split()[-1]
    return {"BASE_IMAGE": base, "REDIS_IMAGE": base, "PIP_NO_INDEX": "1"}


class ComposeCluster(NodeCluster):
    """See NodeCluster."""

    python = "/opt/venv/bin/python"

    def __init__(self, folder: Path, workers: tuple[str, ...] = WORKERS, **env: str):
        super().__init__(folder, workers)
        self._project = f"xjob{uuid.uuid4().hex[:8]}"
        (port,) = free_ports(1)
        self.api = f"http://127.0.0.1:{port}"
        self._env = {
            **{"TESTS": str(ROOT / "tests"), "FOLDER": str(folder), "DASHBOARD_PORT": str(port)},
            **{"OBJECT_STORE_BYTES": "150000000", "STOP_WAIT_S": "20", "CPUS": "2", "COMPOSE_HTTP_TIMEOUT": "200"},
            **env,
        }
        self._ids: dict[str, str] = {}

    def start(self) -> None:
        self.folder.chmod(0o777)  # its processes are user 1000
        self._env |= images()
        roles = [role_of(name) for name in self.workers]
        scale = [f"--scale={role}={roles.count(role)}" for role in sorted({*roles})]
        self._compose("up", "--build", "--detach", *scale, timeout_s=_BUILD_S)
        self.token = self.run("head", "cat", "/run/slime-cross-job/token")
        self.wait_for_jobs()

    def stop(self) -> None:
        with contextlib.suppress(Failed, subprocess.TimeoutExpired):
            (self.folder / "containers.log").write_text(self._compose("logs", "--no-color", "--tail=200"))
        for name in self._ids:  # a frozen one cannot be stopped
            subprocess.run(["docker", "unpause", self._ids[name]], capture_output=True)
        self._compose("down", "--volumes", "--remove-orphans", "--timeout=3", timeout_s=180)

    def kill(self, name: str) -> None:
        output(["docker", "kill", self._id(name)])
        wait_until(lambda: self.ended(name), 20, f"container {name} outlived SIGKILL")

    def begin(self, name: str) -> None:
        output(["docker", "start", self._id(name)], 60)

    def ended(self, name: str) -> bool:
        return output(["docker", "inspect", "-f", "{{.State.Running}}", self._id(name)]).strip() == "false"

    def pause(self, name: str) -> None:
        output(["docker", "pause", self._id(name)])

    def resume(self, name: str) -> None:
        output(["docker", "unpause", self._id(name)])

    def cut(self, name: str) -> None:
        output(["docker", "network", "disconnect", f"{self._project}_cluster", self._id(name)])

    def join(self, name: str) -> None:
        command = ["docker", "network", "connect", "--alias", name, f"{self._project}_cluster", self._id(name)]
        output(command)

    def command(self, name: str, words: list[str], *, root: bool = False) -> list[str]:
        return ["docker", "exec", *(["--user=0"] if root else []), self._id(name), *words]

    def network(self, name: str, words: list[str]) -> list[str]:
        pid = output(["docker", "inspect", "-f", "{{.State.Pid}}", self._id(name)]).strip()
        return ["nsenter", f"--net=/proc/{pid}/ns/net", *words]

    def port(self, name: str) -> tuple[list[str], str, str]:
        number = self.run(name, "cat", "/sys/class/net/eth0/iflink").strip()
        (device,) = [d.name for d in Path("/sys/class/net").iterdir() if (d / "ifindex").read_text().strip() == number]
        network = output(["docker", "network", "inspect", "-f", "{{.Id}}", f"{self._project}_cluster"])
        return [], device, f"br-{network[:12]}"

    def address(self, name: str) -> str:
        form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return output(["docker", "inspect", "-f", form, self._id(name)]).strip()

    def stranger(self, words: list[str], timeout_s: float, **env: str) -> subprocess.CompletedProcess[str]:
        name = f"{self._project}_stranger"
        variables = [f"--env={key}={value}" for key, value in env.items()]
        command = ["docker", "run", "--rm", "--init", "--name", name, f"--network={self._project}_cluster", *variables]
        try:
            return subprocess.run(
                [*command, "slime-cross-job:cpu", *words], capture_output=True, text=True, timeout=patient(timeout_s)
            )
        finally:
            subprocess.run(["docker", "rm", "-f", name], capture_output=True)

    def _id(self, name: str) -> str:
        if name not in self._ids:
            number = '{{index .Config.Labels "com.docker.compose.container-number"}} {{.Id}}'
            found = output(["docker", "inspect", "-f", number, *self._compose("ps", "-q", role_of(name)).split()])
            self._ids[name] = dict(line.split() for line in found.splitlines())[name[len(role_of(name)) :] or "1"]
        return self._ids[name]

    def _compose(self, *words: str, timeout_s: float = 60) -> str:
        files = [word for file in _FILES for word in ("-f", str(file))]
        return output([*compose_words(), "-p", self._project, "--profile=tests", *files, *words], timeout_s, self._env)


def _answers() -> bool:
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False
