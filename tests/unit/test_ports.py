"""No two engines of a node get one port, however long their servers take to bind it."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from slime.cross_job.adapter import hooks, ports
from slime.cross_job.errors import BadInput

START = 21000


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Ports are reserved in a folder of the test's own; all are given back."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(ports.tempfile, "tempdir", None)
    monkeypatch.setattr(ports, "_held", [])
    yield
    for lock in ports._held:
        lock.close()


def another_job(*words: str) -> int:
    """The port that another process takes, which then ends, and all that it holds."""
    code = f"from slime.cross_job.adapter import ports; print(ports.take({', '.join(words)}))"
    env = {**os.environ, "PYTHONPATH": str(Path(ports.__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_a_port_that_nobody_has_bound_yet_is_taken_all_the_same():
    first = ports.take(START)
    assert first >= START
    second = another_job(str(START))
    assert second > first
    assert ports.take(START) >= second, "a process that ended gives back what it held"


def test_ports_in_a_row_are_free_all_of_them():
    first = ports.take(START)
    with socket.socket() as bound:
        bound.bind(("", first + 2))
        bound.listen(1)
        row = another_job(str(first), "3")
        assert row > first + 2


def test_ports_end_somewhere():
    with pytest.raises(BadInput, match="no 3 free ports in a row from 65534 on"):
        ports.take(65534, 3)


def test_slimes_engines_take_their_ports_so(monkeypatch):
    """Both ways in which slime looks for ports, of its pins."""
    for names in (("get_free_port",), ("is_port_available",)):
        module = ModuleType("slime.ray.ray_actor")
        for name in names:
            setattr(module, name, None)
        hooks.engine_ports(module)
        if names == ("get_free_port",):
            found = [module.get_free_port(start_port=START, consecutive=2) for _ in range(2)]
            assert found[1] >= found[0] + 2
        else:
            free = next(port for port in range(START + 100, START + 1000) if module.is_port_available(port))
            assert not module.is_port_available(free), "it is taken by now"
