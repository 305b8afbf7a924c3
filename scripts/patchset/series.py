"""The patch set as it lies on disk: pins, series, patch files and the overlay, read and held to the policy."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .git import Git, PatchsetError, blob_id

_FIELDS = ("Subject", "Why", "Upstream-Status", "Remove-When")
_VALUE = r"\S.*\n(?:(?![\s-]|[A-Z][\w-]+: ).+\n)*"  # a long one goes on in the next line
_HEADER = re.compile("".join(f"{name}: {_VALUE}" for name in _FIELDS).encode() + b"\n")
_FILE = re.compile(
    rb"diff --git a/(?P<path>\S+) b/(?P=path)\n"
    rb"index (?P<before>[0-9a-f]{40})\.\.(?P<after>[0-9a-f]{40}) (?P<mode>100644|100755)\n"
    rb"--- a/(?P=path)\n\+\+\+ b/(?P=path)\n"
    rb"(?:@@ -\d+,0 \+\d+(?:,\d+)? @@\n(?:\+.*\n)+)+"
)
_NAMED = re.compile(r"^diff --git a/(\S+) b/\1$", re.MULTILINE)


class FilePatch(NamedTuple):
    """What one patch does to one file: blobs before and after, and the mode that git records."""

    path: str
    before: str
    after: str
    mode: str


class Patch(NamedTuple):
    """One patch file: its name, its bytes, and its files."""

    name: str
    data: bytes
    files: list[FilePatch]


class Pin(NamedTuple):
    """An upstream commit that the patch set supports; trees are None until `export` worked them out."""

    name: str
    ref: str
    commit: str
    tree_before: str | None
    tree_after: str | None


class File(NamedTuple):
    """A file's bytes and its permissions (None: those of the file that it replaces)."""

    data: bytes
    mode: int | None = None


def parse_patch(name: str, data: bytes, where: str) -> Patch:
    """Read a patch file; PatchsetError if it holds anything but a header and inserted lines."""
    header = _HEADER.match(data)
    at, files = header.end() if header else 0, []
    while header and (found := _FILE.match(data, at)):
        at = found.end()
        files.append(FilePatch(**{name: text.decode() for name, text in found.groupdict().items()}))
    if header is None or not files or at < len(data):
        number = data.count(b"\n", 0, at)
        line = data.decode(errors="replace").split("\n")[number]
        rule = f"a patch is {', '.join(_FIELDS)}, an empty line, inserted lines only (-U0 --full-index)"
        raise PatchsetError(f"{where}, from line {number + 1} ({line!r}): {rule}")
    return Patch(name, data, files)


def named_files(data: bytes) -> list[str]:
    """The files that a patch file owns: those that its diff names."""
    return _NAMED.findall(data.decode(errors="replace"))


def patched_files(git: Git, patches: Sequence[Patch]) -> dict[str, bytes]:
    """The bytes of each patched file by its path, as its patch makes it of the pre-image that the patch records."""
    files = [file for patch in patches for file in patch.files]
    with git.scratch() as scratch:
        entries = "".join(f"{file.mode} {file.before}\t{file.path}\0" for file in files)
        scratch.output("update-index", "--add", "--replace", "-z", "--index-info", data=entries.encode())
        diffs = b"".join(patch.data for patch in patches)
        scratch.output("apply", "--cached", "--unidiff-zero", "--whitespace=nowarn", "-", data=diffs)
        patched = {file.path: scratch.output("cat-file", "blob", f":{file.path}") for file in files}
    for file in files:
        if blob_id(patched[file.path]) != file.after:
            raise PatchsetError(f"the patch of {file.path} does not give the file that it records: export again")
    return patched


@dataclass(frozen=True)
class Patchset:
    """The folder of pins and series, and the overlay folder."""

    folder: Path
    overlay_folder: Path

    def upstream(self) -> dict[str, Any]:
        """What upstream.json holds: slime's url, and the pins."""
        return dict(json.loads((self.folder / "upstream.json").read_text()))

    def pins(self) -> list[Pin]:
        """All pins, the reference first."""
        return [Pin(**pin) for pin in self.upstream()["pins"]]

    def pin(self, name: str) -> Pin:
        """The pin of that name."""
        pins = {pin.name: pin for pin in self.pins()}
        if name not in pins:
            raise PatchsetError(f"there is no pin {name!r}: the pins are {', '.join(pins)}")
        return pins[name]

    def patch_files(self, pin: Pin) -> dict[str, bytes]:
        """The bytes of the pin's patch files by name, in the order of its series; none names a file of another."""
        folder = self.folder / pin.name
        lines = [line.split("#")[0].strip() for line in (folder / "series").read_text().splitlines()]
        if not any(lines):
            raise PatchsetError(f"the series of pin {pin.name} names no patch: list its patch files, one a line")
        found = {name: (folder / name).read_bytes() for name in lines if name}
        owner: dict[str, str] = {}
        for path, name in ((path, name) for name, data in found.items() for path in named_files(data)):
            if owner.setdefault(path, name) != name:
                both = f"{owner[path]} and {name} both name {path}"
                raise PatchsetError(f"{pin.name}: {both}: merge them, as no two patches may both touch a file")
        return found

    def series(self, pin: Pin) -> list[Patch]:
        """The pin's patches in order."""
        return [parse_patch(name, data, f"{pin.name}/{name}") for name, data in self.patch_files(pin).items()]

    def overlay(self) -> dict[str, File]:
        """Every file of the overlay by its path from slime's top, without caches."""
        files = {}
        for path in sorted(self.overlay_folder.rglob("*")):
            inside = path.relative_to(self.overlay_folder)
            if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in inside.parts):
                files[inside.as_posix()] = File(path.read_bytes(), 0o755 if path.stat().st_mode & 0o100 else 0o644)
        if not files:
            raise PatchsetError(f"no overlay in {self.overlay_folder}: is the checkout of slime cross-job whole?")
        return files
