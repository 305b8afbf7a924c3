"""The wheels of the GPU check: what is left of a slimmed one, and pieces that join to what was cut."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.gpu.pack import slim, split


def test_a_slimmed_wheel_installs_what_is_wanted_with_its_modes_and_a_true_record(tmp_path: Path) -> None:
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        program = zipfile.ZipInfo("thing/program")
        program.external_attr = 0o100755 << 16
        made.writestr(program, "#!/bin/sh\n")
        for name, text in {
            "__init__.py": "import thing.big\n",
            "big.jar": "x" * 10_000,
            "small.py": "y = 1\n",
        }.items():
            made.writestr(f"thing/{name}", text)
        made.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        made.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr("thing-1.0.dist-info/RECORD", "thing/big.jar,,\n")
    slim(wheel, lambda name: not name.endswith((".jar", "__init__.py")), ("thing/__init__.py",))
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "--isolated", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", target, wheel], check=True)
    found = {path.name: path for path in (target / "thing").iterdir() if path.name != "__pycache__"}
    assert set(found) == {"__init__.py", "program", "small.py"}
    assert os.access(found["program"], os.X_OK)
    assert found["__init__.py"].read_text() == ""
    record = (target / "thing-1.0.dist-info" / "RECORD").read_text()
    assert "big.jar" not in record
    assert "thing/small.py,sha256=" in record


def test_pieces_join_to_what_was_cut(tmp_path: Path) -> None:
    small, large = tmp_path / "small.whl", tmp_path / "large.whl"
    small.write_bytes(b"12345")
    large.write_bytes(bytes(range(11)))
    for file in (small, large):
        split(file, 5)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["large.whl.00", "large.whl.01", "large.whl.02", "small.whl"]
    assert b"".join((tmp_path / name).read_bytes() for name in names[:3]) == bytes(range(11))
