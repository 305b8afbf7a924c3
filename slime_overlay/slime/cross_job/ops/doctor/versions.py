"""Versions of this process's Python and packages, and the state of a checkout of slime."""

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

from . import Finding

TESTED = {"Python": ((3, 10), (3, 12)), "ray": ((2, 47), (2, 60))}
"""The first and the last version that was tested."""
SLIME = {
    "079dbcfc3bb5075a0e92c4e1be658f7782509ad8": "079dbcf",
    "261ecee700b30429ba2cf4d4c27e3fc7ae0a12c7": "v0.1.0",
    "a6272da0d4f3d0a08520c99a2f3b4f6c887960dc": "v0.3.1",
    "624b824a898ab0ec1fcb4d373004c7f3852bf515": "main",
}
"""Commits of slime that are supported, by name. A test compares it with patches/upstream.json."""
_MANIFEST = "slime-cross-job.json"  # scripts/apply.sh writes it into git's own folder
_GIT_S = 10.0


def look_at_versions(version_of: Callable[[str], str] = importlib.metadata.version) -> list[Finding]:
    """Whether Python and Ray are tested versions."""
    found = {"Python": platform.python_version(), **{name: version_of(name) for name in ("ray", "pyarrow", "numpy")}}
    told = []
    for name, (low, newest) in TESTED.items():
        if not low <= tuple(map(int, found[name].split(".")[:2])) <= newest:
            tested = " to ".join(f"{major}.{minor}" for major, minor in (low, newest))
            do = "use a tested version, or run the tests with yours (scripts/test.sh)"
            what = f"{name} {found[name]}: tested were {tested}"
            told.append(Finding("versions", "warning", what, "it may work; nobody has seen it", do))
    return told or [Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))]


def find_slime() -> str | None:
    """Folder of the checkout of slime that is importable here; None: there is none."""
    spec = importlib.util.find_spec("slime")
    places = (Path(place) for place in (spec and spec.submodule_search_locations) or ())
    return next((str(place.parent) for place in places if (place / "utils" / "arguments.py").is_file()), None)


def look_at_slime(path: str) -> list[Finding]:
    """Whether a checkout of slime is patched, as it was applied, and at a tested commit."""
    top, apply, told = Path(path), f"scripts/apply.sh {path}", list[Finding]()

    def tell(severity: str, what: str, why: str = "", do: str = "") -> None:
        told.append(Finding("slime", severity, what, why, do, path))

    parser = top / "slime" / "utils" / "arguments.py"
    commit, manifest = _git(top)
    at = f"at {SLIME.get(commit) or commit[:12]}" if commit else "git does not tell its commit: an image, or a copy"
    if not parser.is_file():
        tell("error", "this is no checkout of slime", "the jobs run slime's train.py", "name its folder (--slime DIR)")
    elif "cross_job_arguments" not in parser.read_text(errors="replace"):
        tell("error", f"it is not patched ({at})", "unpatched slime does not know the cross-job flags", apply)
    else:
        if commit and commit not in SLIME:
            what = f"it is {at}, which is none of those tested: {', '.join(SLIME.values())}"
            why = "ported patches may apply and still mean something else there"
            tell("warning", what, why, "check out a tested commit, or run scripts/test.sh slime")
        applied = json.loads(manifest.read_text()) if manifest.is_file() else {"files": {}, "overlay": {}}
        blobs = {name: blob for name, (_, blob) in applied["files"].items()} | applied["overlay"]
        wrong = sorted(name for name, digest in blobs.items() if digest not in _digests(top / name))
        if not applied.get("complete", True):
            tell("error", "applying the patches was broken off in the middle", "it is neither slime's nor ours", apply)
        elif wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            what = f"{', '.join(wrong[:3])}{more} were changed, or removed, since the patches were applied"
            tell("warning", what, "both jobs must run the same code, the one that was tested", f"{apply} --verify")
    if not told:
        tell("ok" if commit else "note", f"it is patched; {at}")
    return told


def _digests(file: Path) -> tuple[str, ...]:
    """As the manifest has them: a blob's name, of what a patch changed; a SHA-256, of the overlay."""
    data = file.read_bytes() if file.is_file() else b""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), hashlib.sha256(data).hexdigest()


def _git(top: Path) -> tuple[str, Path]:
    """The commit, empty where this is no checkout of its own, or there is no git; and the manifest's place."""
    try:
        (top / ".git").stat()  # else git would tell of a folder above
        command = ["git", "-C", str(top), "rev-parse", "HEAD", "--git-path", _MANIFEST]
        said = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return "", top / _MANIFEST
    return said[0], top / said[1]
