"""The patch set as it lies on disk: pins, series, patch files and the overlay, read and held to the policy.

A patch holds a header and inserted lines, with zero context. Applying one is therefore simple enough to be done
here: lines go in after the line with a given number of a file whose bytes are known by their hash, and the result is
known by its hash too. A patch for other bytes is refused, never applied somewhere near.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from patchset_git import PatchsetError, blob_id

FIELDS = ("Subject", "Why", "Upstream-Status", "Remove-When")
_CACHES = {"__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".DS_Store"}
_FILE = re.compile(
    rb"diff --git a/(?P<path>\S+) b/(?P=path)\n"
    rb"index (?P<before>[0-9a-f]{40})\.\.(?P<after>[0-9a-f]{40}) 100(?:644|755)\n"
    rb"--- a/(?P=path)\n\+\+\+ b/(?P=path)\n"
)
_HUNK = re.compile(rb"@@ -(?P<old>\d+),0 \+(?P<new>\d+)(?:,(?P<count>\d+))? @@\n")
_NAMED = re.compile(rb"^diff --git a/(\S+) b/\1$", re.MULTILINE)


@dataclass(frozen=True)
class FilePatch:
    """What one patch inserts into one file: (line number to insert after, lines) in order."""

    path: str
    before: str
    after: str
    hunks: tuple[tuple[int, tuple[bytes, ...]], ...]

    def apply(self, data: bytes) -> bytes:
        """The file with the lines inserted; PatchsetError unless its bytes and the result are the recorded ones."""
        if blob_id(data) != self.before:
            raise PatchsetError(f"{self.path} is not the file that the patch was made for ({self.before[:12]})")
        lines = io.BytesIO(data).readlines()  # splits at \n only, as git does
        for line, inserted in reversed(self.hunks):
            lines[line:line] = inserted
        result = b"".join(lines)
        if blob_id(result) != self.after:
            raise PatchsetError(f"the patch of {self.path} does not give the file that it records: export it again")
        return result


@dataclass(frozen=True)
class Patch:
    """One patch file: its name, its bytes, its header's fields and what it does to each file."""

    name: str
    data: bytes
    fields: Mapping[str, str]
    files: tuple[FilePatch, ...]

    @property
    def inserted(self) -> int:
        """How many lines it inserts."""
        return sum(len(lines) for file in self.files for _, lines in file.hunks)

    @property
    def digest(self) -> str:
        """SHA-256 of the patch file."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Pin:
    """An upstream commit that the patch set supports; trees are None until `record` worked them out."""

    name: str
    ref: str
    commit: str
    tree_before: str | None
    tree_after: str | None


@dataclass(frozen=True)
class OverlayFile:
    """A file to copy onto the checkout."""

    data: bytes
    executable: bool

    @property
    def digest(self) -> str:
        """SHA-256 of its bytes."""
        return hashlib.sha256(self.data).hexdigest()


def split_header(data: bytes, where: str) -> tuple[bytes, bytes]:
    """A patch file's header, with the empty line that ends it, and the diff after it."""
    header, empty, diff = data.partition(b"\n\n")
    if not empty:
        raise PatchsetError(f"{where} has no empty line between its header and its diff: add one")
    return header + empty, diff


def named_files(diff: bytes) -> list[str]:
    """The files that a diff names, also where it is no more than `diff --git` lines."""
    return [path.decode() for path in _NAMED.findall(diff)]


def _parse_fields(header: bytes, where: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in header.decode().rstrip("\n").split("\n"):
        name, colon, value = line.partition(": ")
        if line.startswith((" ", "\t", "-")):
            raise PatchsetError(f"{where}: a header line must not start with a blank or a dash: {line!r}")
        if colon and name in FIELDS and name not in fields:
            fields[name] = value.strip()
        elif fields:  # a long field goes on in the next line
            last = list(fields)[-1]
            fields[last] = f"{fields[last]} {line.strip()}"
        else:
            raise PatchsetError(f"{where} starts with {line!r}: the first line must be 'Subject: ...'")
    if tuple(fields) != FIELDS or not all(fields.values()):
        raise PatchsetError(f"{where} must have the header fields {', '.join(FIELDS)}, in that order, none empty")
    return fields


def parse_patch(name: str, data: bytes, where: str) -> Patch:
    """Read a patch file; PatchsetError where it holds anything but a header and inserted lines."""
    header, diff = split_header(data, where)
    fields = _parse_fields(header, where)
    files: list[FilePatch] = []
    at = 0
    while at < len(diff):
        head = _FILE.match(diff, at)
        if head is None:
            line = diff[at:].split(b"\n")[0].decode(errors="replace")
            raise PatchsetError(
                f"{where}: {line!r} is not an inserted line: only insertions with -U0 --full-index may be there"
            )
        at, shift, hunks = head.end(), 0, []
        while hunk := _HUNK.match(diff, at):
            count = int(hunk["count"] or 1)
            at = hunk.end()
            lines: list[bytes] = []
            while len(lines) < count and diff.startswith(b"+", at):
                end = diff.find(b"\n", at) + 1
                if not end:
                    break
                lines.append(diff[at + 1 : end])
                at = end
            if not count or len(lines) != count or int(hunk["new"]) != int(hunk["old"]) + shift + 1:
                raise PatchsetError(
                    f"{where}: the hunk {hunk[0].decode().strip()!r} does not add up: export the patch again"
                )
            hunks.append((int(hunk["old"]), tuple(lines)))
            shift += count
        if not hunks:
            raise PatchsetError(
                f"{where} inserts nothing into {head['path'].decode()}: remove the file from the patch"
            )
        files.append(FilePatch(head["path"].decode(), head["before"].decode(), head["after"].decode(), tuple(hunks)))
    if not files:
        raise PatchsetError(f"{where} changes no file: remove it, and its line of the series")
    return Patch(name, data, fields, tuple(files))


@dataclass(frozen=True)
class Patchset:
    """The folder of pins and series, and the overlay folder."""

    folder: Path
    overlay_folder: Path

    @property
    def _upstream(self) -> Path:
        return self.folder / "upstream.json"

    def _read(self) -> tuple[str, list[Pin]]:
        try:
            recorded = json.loads(self._upstream.read_text())
            return recorded["url"], [Pin(**pin) for pin in recorded["pins"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PatchsetError(f"cannot read the pins from {self._upstream}: {error}") from error

    @property
    def url(self) -> str:
        """Where upstream slime is cloned from."""
        return self._read()[0]

    def pins(self) -> list[Pin]:
        """All pins, the reference first."""
        return self._read()[1]

    def pin(self, name: str) -> Pin:
        """The pin of that name."""
        for pin in self.pins():
            if pin.name == name:
                return pin
        raise PatchsetError(f"there is no pin {name!r}: the pins are {', '.join(pin.name for pin in self.pins())}")

    def write_trees(self, name: str, before: str, after: str) -> None:
        """Record a pin's tree hashes."""
        url, pins = self._read()
        pins = [replace(pin, tree_before=before, tree_after=after) if pin.name == name else pin for pin in pins]
        text = json.dumps({"url": url, "pins": [asdict(pin) for pin in pins]}, indent=2)
        self._upstream.write_text(text + "\n")

    def series_names(self, pin: Pin) -> list[str]:
        """The patch file names of a pin in order."""
        path = self.folder / pin.name / "series"
        if not path.is_file():
            raise PatchsetError(f"pin {pin.name} has no {path}: list its patch files there, one a line")
        names = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
        return [name for name in names if name]

    def series(self, pin: Pin) -> list[Patch]:
        """The pin's patches in order; no two of them touch the same file."""
        patches: list[Patch] = []
        owner: dict[str, str] = {}
        for name in self.series_names(pin):
            path = self.folder / pin.name / name
            if not path.is_file():
                raise PatchsetError(f"{path} is in the series and does not exist: add it, or remove the line")
            patch = parse_patch(name, path.read_bytes(), f"{pin.name}/{name}")
            for file in patch.files:
                if file.path in owner:
                    raise PatchsetError(
                        f"{pin.name}: {owner[file.path]} and {name} both touch {file.path}: merge them"
                    )
                owner[file.path] = name
            patches.append(patch)
        if not patches:
            raise PatchsetError(f"the series of pin {pin.name} names no patch: list its patch files, one a line")
        return patches

    def overlay(self) -> dict[str, OverlayFile]:
        """Every file of the overlay by its path from slime's top, without caches."""
        files: dict[str, OverlayFile] = {}
        for path in sorted(self.overlay_folder.rglob("*")):
            inside = path.relative_to(self.overlay_folder)
            if _CACHES.intersection(inside.parts) or path.suffix == ".pyc":
                continue
            if path.is_symlink():
                raise PatchsetError(f"{path} is a link: the overlay may hold plain files only")
            if path.is_dir():
                continue
            files[inside.as_posix()] = OverlayFile(path.read_bytes(), bool(path.stat().st_mode & 0o100))
        if not files:
            raise PatchsetError(
                f"the overlay {self.overlay_folder} holds no file: is the checkout of slime cross-job whole?"
            )
        return files
