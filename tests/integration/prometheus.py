"""A real Prometheus for tests, with the rules and the scrape configuration of docker/."""

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from local_cluster import end_with_parent, free_ports
from tests.support.patience import patient

DOCKER = Path(__file__).resolve().parents[2] / "docker"
CONFIG, RULES = DOCKER / "prometheus.yml", DOCKER / "alerts.yml"
BOARD = DOCKER / "grafana" / "dashboards" / "slime-cross-job.json"


def program(name: str) -> str:
    """Path of `prometheus` or `promtool`, from Debian's package where it is not here yet; else the test is skipped."""
    if found := shutil.which(name):
        return found
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip(f"{name} is not on PATH, and only root could install it: install Debian's package prometheus")
    command = ["apt-get", "install", "--yes", "--no-install-recommends", "prometheus"]
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here, and cannot be installed: {done.stderr.strip()[-300:]}")
    return found


class Prometheus:
    """Scrapes every second the cluster whose dashboard is at `api`; `with` starts and ends it."""

    def __init__(self, folder: Path, api: str):
        self._folder = folder
        text = CONFIG.read_text()
        token = folder / "token"
        token.write_text("of a cluster that asks for none")
        for here, there in (
            ("http://head:8265", api),
            ("/run/slime-cross-job/token", str(token)),
            ("scrape_interval: 10s", "scrape_interval: 1s"),
            ("evaluation_interval: 10s", "evaluation_interval: 1s"),
        ):
            assert here in text, here
            text = text.replace(here, there)
        self.config = folder / "prometheus.yml"
        self.config.write_text(text)
        shutil.copy(RULES, folder)
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            *(program("prometheus"), f"--config.file={self.config}", f"--storage.tsdb.path={folder}/data"),
            f"--web.listen-address=127.0.0.1:{port}",
        ]

    def __enter__(self) -> "Prometheus":
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=end_with_parent
            )
        deadline = time.monotonic() + patient(30)
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).close()
                return self
            said = (self._folder / "log").read_text()
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise AssertionError(said[-2000:])
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, path: str, **params: str) -> Any:
        """`data` of an answer of the HTTP API."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(params)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{params}: {error.read().decode()}") from None

    def query(self, expr: str) -> list[dict[str, Any]]:
        """[{"metric": labels, "value": [time, text]}] of an expression, now."""
        found: list[dict[str, Any]] = self.ask("query", query=expr)["result"]
        return found

    def value(self, expr: str) -> float | None:
        """The one value of an expression; None: it has none."""
        found = self.query(expr)
        assert len(found) < 2, found
        return float(found[0]["value"][1]) if found else None
