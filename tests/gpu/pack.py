#!/usr/bin/env python3
"""Makes the folder of wheels with which check.sh needs no network: all but torch, numpy and pyarrow, at most 64 MiB.

Versions are those of requirements.lock. Ray's wheel loses what two jobs on one machine do not use (the Java jar, the
dashboard's pages, rllib, ..., and symbols, where there is a `strip`), reasoning_gym all tasks but the demo's. Files
above --piece-mib are cut into pieces NAME.00, NAME.01, ..., which check.sh joins. SHA256SUMS lists all files.
"""

import argparse
import base64
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
NAMES = """
    pip ray reasoning_gym psutil tqdm
    click filelock jsonschema jsonschema-specifications referencing rpds-py attrs msgpack packaging protobuf PyYAML
    requests certifi charset-normalizer idna urllib3 typing_extensions
    aiohttp aiohttp-cors aiohappyeyeballs aiosignal frozenlist multidict propcache yarl colorful grpcio smart_open
    wrapt opencensus opencensus-context google-api-core googleapis-common-protos google-auth proto-plus six pyasn1
    pyasn1_modules opentelemetry-api opentelemetry-sdk opentelemetry-proto opentelemetry-semantic-conventions
    opentelemetry-exporter-prometheus prometheus_client pydantic pydantic_core annotated-types typing-inspection
"""
"""What `ray[default]` and the demo import; without py-spy, virtualenv and cryptography, which they do not."""

RAY_WITHOUT = re.compile(
    r"ray/(jars|rllib|llm|tune|train|data|serve)/.*|ray/core/libjemalloc\.so"
    r"|ray/dashboard/client/.*(?<!/index\.html)(?<!\.css)"  # Ray's dashboard does not start without its folders
)
GYM = r"[^/]+\.dist-info/.*|reasoning_gym/(coaching/.*|(composite|dataset|factory|utils|version_manager)\.py)"
GYM_WITH = re.compile(GYM + r"|reasoning_gym/arithmetic/basic_arithmetic\.py")
GYM_EMPTY = ("reasoning_gym/__init__.py", "reasoning_gym/arithmetic/__init__.py")  # they import all tasks


def slim(wheel: Path, wanted: Callable[[str], bool], empty: tuple[str, ...] = ()) -> None:
    """Write the wheel anew with the files that are `wanted`, and with nothing in those of `empty`."""
    before = wheel.stat().st_size
    small = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        record, rows = "", []
        for item in old.infolist():
            if item.filename.endswith(".dist-info/RECORD"):
                record = item.filename
            elif item.filename in empty or wanted(item.filename):
                data = b"" if item.filename in empty else _stripped(old.read(item))
                item.compress_type = zipfile.ZIP_DEFLATED
                new.writestr(item, data, compresslevel=9)  # with its mode: Ray's programs stay executable
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
                rows.append(f'"{item.filename}",sha256={digest},{len(data)}\n')
        new.writestr(record, "".join([*rows, f"{record},,\n"]))
    small.replace(wheel)
    print(f"{wheel.name}: {before / MIB:.1f} MiB, slimmed to {wheel.stat().st_size / MIB:.1f}")


def _stripped(data: bytes) -> bytes:
    """A large program or library of Linux without its symbols."""
    if len(data) < 5 * MIB or not data.startswith(b"\x7fELF") or not shutil.which("strip"):
        return data
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        subprocess.run(["strip", "--strip-unneeded", file.name], check=True)
        return Path(file.name).read_bytes()


def split(file: Path, piece_bytes: int) -> None:
    """Cut a file that is larger into NAME.00, NAME.01, ..."""
    if file.stat().st_size <= piece_bytes:
        return
    data = file.read_bytes()
    for number, start in enumerate(range(0, len(data), piece_bytes)):
        file.with_name(f"{file.name}.{number:02d}").write_bytes(data[start : start + piece_bytes])
    file.unlink()


def download(folder: Path, python: str) -> None:
    pins = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line]
    pinned = {_normal(line.partition("==")[0]): line for line in pins}
    wanted = [pinned.get(_normal(name), name) for name in NAMES.split()]
    platforms = [f"manylinux{tag}_x86_64" for tag in ("_2_28", "_2_17", "2014", "_2_12", "2010", "_2_5", "1")]
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", f"--dest={folder}"]
    subprocess.run([*command, *(f"--platform={tag}" for tag in platforms), *wanted], check=True)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "gpu-wheels", help="made anew (default: %(default)s)"
    )
    parser.add_argument("--python", default="3.12", help="of the machine (default: %(default)s)")
    parser.add_argument("--limit-mib", type=float, default=64, help="of all files (default: %(default)s)")
    parser.add_argument("--piece-mib", type=float, default=24, help="of one file (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        download(folder, args.python)
        slim(next(folder.glob("ray-*.whl")), lambda name: not RAY_WITHOUT.fullmatch(name))
        slim(next(folder.glob("reasoning_gym-*.whl")), lambda name: bool(GYM_WITH.fullmatch(name)), GYM_EMPTY)
        for wheel in sorted(folder.glob("*.whl")):
            split(wheel, int(args.piece_mib * MIB))
        files = sorted(folder.iterdir())
        total = sum(file.stat().st_size for file in files) / MIB
        if total > args.limit_mib:
            sys.exit(f"error: {len(files)} files of {total:.1f} MiB, more than {args.limit_mib:g}")
        sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
        (folder / "SHA256SUMS").write_text("".join(sums))
        shutil.rmtree(args.out, ignore_errors=True)
        shutil.copytree(folder, args.out)
    print(f"{args.out}: {len(files)} files, {total:.1f} MiB, for Python {args.python}")


if __name__ == "__main__":
    main()
