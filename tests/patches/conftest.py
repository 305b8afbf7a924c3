"""Fixtures of the patch tests: the toy upstream, and a mirror of the real one."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.patches.toy_upstream import ROOT, Toy
from tests.support.patience import patient


@pytest.fixture
def toy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Toy:
    """A fresh toy."""
    made = Toy(tmp_path)
    capfd.readouterr()
    return made


@pytest.fixture(scope="session")
def slime_mirror() -> Path:
    """A bare mirror of upstream slime in the user's cache; the test is skipped where it cannot be cloned."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slime-cross-job"
    mirror = cache / "slime.git"
    cache.mkdir(parents=True, exist_ok=True)
    upstream = json.loads((ROOT / "patches" / "upstream.json").read_text())
    with (cache / "slime.git.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = [f"{pin['commit']}^{{commit}}" for pin in upstream["pins"]]
        if mirror.exists() and all(_has(mirror, name) for name in wanted):
            return mirror
        command = ["git", "-C", str(mirror), "fetch", "-q", "--prune", "origin"]
        if not mirror.exists():
            command = ["git", "clone", "-q", "--mirror", upstream["url"], str(mirror)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patient(600))
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no message"]
            pytest.skip(f"upstream slime cannot be cloned: {said[-1]}")
        assert all(_has(mirror, name) for name in wanted), "upstream lacks the commit of a pin"
    return mirror


def _has(repository: Path, name: str) -> bool:
    return not subprocess.run(["git", "-C", str(repository), "cat-file", "-e", name], capture_output=True).returncode
