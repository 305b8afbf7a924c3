"""A cluster with several things wrong at a time, on this machine, for `doctor`.

Real: it asks for a token; its object store of 80 MB is smaller than what is published; and where this process may make
namespaces (as root), its /dev/shm is a tmpfs of 40 MB of its own, so that Ray keeps the object store elsewhere.

A stand-in: its clock. Nothing here can give a process another wall clock, so its workers import a `sitecustomize` that
moves Python's `time.time` by SHIFT_S, which stands for a node whose clock is wrong.
"""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from unittest import mock

from local_cluster import LocalCluster
from tests.support.ray_jobs import PYTHONPATH

TOKEN = "t" * 32
SHIFT_S = 90.0
STORE_BYTES = 80_000_000
SHM_BYTES = 40_000_000

_SHIFT = f"""import sys, time
if any(word.endswith("default_worker.py") for word in sys.orig_argv):
    time.time = (lambda now: lambda: now() + {SHIFT_S})(time.time)
"""
_RAY = f"""#!/bin/sh
exec unshare --mount sh -c 'mount -t tmpfs -o size={SHM_BYTES} tmpfs /dev/shm && exec "$@"' sh "{{ray}}" "$@"
"""


def may_mount() -> bool:
    """Whether this process may give another one a /dev/shm of its own."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    tried = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True)
    return tried.returncode == 0


class SickCluster(LocalCluster):
    """See the module. `small_shm`: whether its /dev/shm is small."""

    def __init__(self, folder: Path):
        self.small_shm = may_mount()
        (folder / "sitecustomize.py").write_text(_SHIFT)
        self._bin = folder / "bin"
        super().__init__(
            object_store_bytes=STORE_BYTES,
            env={
                "PYTHONPATH": os.pathsep.join([str(folder), PYTHONPATH]),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": TOKEN,
            },
        )

    def start(self) -> None:
        if not self.small_shm:
            super().start()
            return
        self._bin.mkdir()
        ray = self._bin / "ray"
        ray.write_text(_RAY.format(ray=Path(sys.executable).with_name("ray")))
        ray.chmod(ray.stat().st_mode | stat.S_IXUSR)
        with mock.patch.object(sys, "executable", str(self._bin / "python")):  # beside which it looks for `ray`
            super().start()
