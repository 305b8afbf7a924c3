"""What `doctor` knows of versions: of Python, Ray and what the package needs; of slime, and whether it is patched."""

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .doctor_checks import Finding

RAY = ((2, 47), (2, 60))
"""The first and the last version of Ray that was tested."""
PYTHON = ((3, 10), (3, 12))
SLIME = {
    "079dbcfc3bb5075a0e92c4e1be658f7782509ad8": "079dbcf",
    "261ecee700b30429ba2cf4d4c27e3fc7ae0a12c7": "v0.1.0",
    "a6272da0d4f3d0a08520c99a2f3b4f6c887960dc": "v0.3.1",
}
"""Commits of slime that are supported, by name. A test compares it with patches/upstream.json."""
_NEEDED = ("pyarrow", "numpy")
_MANIFEST = "slime-cross-job.json"  # scripts/patchset_disk.py writes it into git's own folder
_GIT_S = 10.0


def installed() -> dict[str, str]:
    """Version by name of what matters here; empty where it is not installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("ray", *_NEEDED):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def versions(found: Mapping[str, str]) -> list[Finding]:
    """See `installed`."""
    told = []
    for name, title, (low, high) in (("python", "Python", PYTHON), ("ray", "Ray", RAY)):
        tested = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
        if not low <= _numbers(found[name]) <= high:
            why = "it may work; nobody has seen it, and Ray changes what this package depends on"
            do = f"use {title} {tested}, or run the tests with yours (scripts/test.sh)"
            what = f"{title} {found[name] or 'is missing'}: tested were {tested}"
            told.append(Finding("versions", "warning", what, why, do))
    for name in _NEEDED:
        if not found[name]:
            do = f"pip install {name}"
            told.append(Finding("versions", "error", f"{name} is not installed", "batches are made of it", do))
    return told or [Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))]


def _numbers(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def same_versions(words: str) -> Finding | None:
    """The finding, if these are Ray's words of a cluster of another version."""
    ray, python = re.findall(r"Ray: (\S+)", words), re.findall(r"Python: (\S+)", words)
    if "ersion mismatch" not in words or len(ray) < 2 or len(python) < 2:
        return None
    return Finding(
        "same versions",
        "error",
        f"the cluster has Ray {ray[0]} and Python {python[0]}, this process Ray {ray[1]} and Python {python[1]}",
        "Ray connects nothing of another Ray or Python version to a cluster",
        "run this with the cluster's interpreter and packages, as in its image",
    )


def find_slime() -> str | None:
    """Folder of the checkout of slime that is importable here; None: there is none."""
    spec = importlib.util.find_spec("slime")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "utils" / "arguments.py").is_file():
            return str(Path(place).parent)
    return None


def look_at_slime(path: str) -> list[Finding]:
    """A checkout of slime: at which commit, and whether it is patched, as it was applied."""
    top = Path(path)
    parser = top / "slime" / "utils" / "arguments.py"
    if not parser.is_file():
        why = "the jobs run slime's train.py with this package in it"
        return [Finding("slime", "error", "this is no checkout of slime", why, "name its folder (--slime DIR)", path)]
    commit = _git(top, "rev-parse", "HEAD")
    pin = SLIME.get(commit, "")
    known = ", ".join(SLIME.values())
    if "cross_job_arguments" not in parser.read_text(errors="replace"):
        at = f" (at {pin or commit[:12]})" if commit else ""
        why = "unpatched slime does not know the cross-job flags"
        return [Finding("slime", "error", f"it is not patched{at}", why, f"scripts/apply.sh {path}", path)]
    folder = _git(top, "rev-parse", "--git-path", _MANIFEST)
    manifest = _manifest(top / folder) if folder else None
    told = []
    if commit and not pin:
        what = f"it is at commit {commit[:12]}, which is none of those tested: {known}"
        why = "patches that were ported to it may apply and still mean something else there"
        do = "check out a tested commit, or run scripts/test.sh slime"
        told.append(Finding("slime", "warning", what, why, do, path))
    if manifest is not None:
        told += _as_applied(top, manifest, path)
    if told:
        return told
    how = "git does not tell its commit: an image, or a copy" if not commit else f"at {pin}"
    return [Finding("slime", "ok" if commit else "note", f"it is patched; {how}", where=path)]


def _as_applied(top: Path, manifest: Mapping[str, Any], path: str) -> list[Finding]:
    if not manifest.get("complete", True):
        what = "applying the patches was broken off in the middle"
        return [Finding("slime", "error", what, "it is neither slime's nor ours", f"scripts/apply.sh {path}", path)]
    wrong = [name for name, (_, blob) in manifest["files"].items() if _digest(top / name, git=True) != blob]
    wrong += [name for name, digest in manifest["overlay"].items() if _digest(top / name, git=False) != digest]
    if not wrong:
        return []
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return [
        Finding(
            "slime",
            "warning",
            f"{', '.join(sorted(wrong)[:3])}{more} were changed, or removed, since the patches were applied",
            "both jobs must run the same code; what was changed is not what was tested",
            f"scripts/apply.sh {path} --verify",
            path,
        )
    ]


def _digest(file: Path, git: bool) -> str:
    """As the manifest has it: a blob's name, of what a patch changed, or a SHA-256, of the overlay."""
    try:
        data = file.read_bytes()
    except OSError:
        return ""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() if git else hashlib.sha256(data).hexdigest()


def _manifest(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
        return found if {"files", "overlay"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _git(top: Path, *words: str) -> str:
    """What git says; empty where this is no checkout of its own, or there is no git."""
    if not (top / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(top), *words], capture_output=True, text=True, timeout=_GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
