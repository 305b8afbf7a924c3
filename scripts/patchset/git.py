"""Git as the patch set needs it. Nothing here writes to the user's index, commits or object store."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# Git sets these for hooks and aliases: they would lead to another repository or index than the one that is named.
_REDIRECT = re.compile(r"GIT_((ALTERNATE_)?OBJECT_DIRECTOR(Y|IES)|DIR|COMMON_DIR|WORK_TREE|INDEX_FILE|PREFIX)")
_ENV = {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_REPLACE_OBJECTS": "1", "GIT_NO_LAZY_FETCH": "1"}
_ENV |= {"GIT_ATTR_NOSYSTEM": "1"}
# The machine's and the user's configuration must not change what bytes a patch gives.
_CONFIG = "core.autocrlf=false core.safecrlf=false core.fsmonitor=false core.attributesFile=/dev/null"


class PatchsetError(Exception):
    """Something that the user can put right; the message is one line: what is wrong and what to do."""


class Refused(PatchsetError):
    """A plain no to what was asked: conflicts, lost names, a checkout that is not exactly patched."""


def blob_id(data: bytes) -> str:
    """The name that git gives to a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Git:
    """Runs git in one folder; `env` adds to the environment."""

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        if shutil.which("git") is None:
            raise PatchsetError("git is not on PATH: install git 2.30 or newer")
        self._folder = folder
        inherited = {name: value for name, value in os.environ.items() if not _REDIRECT.fullmatch(name)}
        self._env = {**inherited, **_ENV, **(env or {})}

    def attempt(self, *args: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run git with `data` as its input and return what it did, whatever its exit status."""
        config = [part for setting in _CONFIG.split() for part in ("-c", setting)]
        command = ["git", "--no-optional-locks", *config, "-C", str(self._folder), *args]
        return subprocess.run(command, input=data, capture_output=True, env=self._env, check=False)

    def output(self, *args: str, data: bytes = b"") -> bytes:
        """The standard output of git; PatchsetError with git's own message if it fails."""
        done = self.attempt(*args, data=data)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["without a message"]
            first = next((line for line in said if "fatal: " in line or "error: " in line), said[-1])
            raise PatchsetError(f"git {args[0]} failed in {self._folder}: {first.strip()}")
        return done.stdout

    def text(self, *args: str) -> str:
        """As `output`, decoded and without the newline at the end."""
        return self.output(*args).decode(errors="surrogateescape").rstrip("\n")

    def python_files(self, tree: str) -> dict[str, bytes]:
        """The Python files of a commit or tree by path, links aside."""
        lines = [line.partition("\t") for line in self.text("ls-tree", "-r", "-z", tree).split("\0")[:-1]]
        blobs = {
            path: about.split()[2] for about, _, path in lines if about.startswith("100") and path.endswith(".py")
        }
        said = io.BytesIO(self.output("cat-file", "--batch", data="\n".join([*blobs.values(), ""]).encode()))
        files = {}
        for path in blobs:
            about = said.readline().split()
            if about[-1] == b"missing":
                raise PatchsetError(f"this clone lacks {path} of {tree[:12]}: fetch all of it (git fetch --refetch)")
            files[path] = said.read(int(about[2]))
            said.readline()
        return files

    def path(self, name: str) -> Path:
        """Where git keeps `name` inside its own folder."""
        return self._folder / self.text("rev-parse", "--git-path", name)

    @contextmanager
    def scratch(self) -> Iterator[Git]:
        """This git with an index of its own, with HEAD in it, and an object folder of its own, for a while."""
        with tempfile.TemporaryDirectory(prefix="slime-cross-job-") as folder:
            # Quoted the way git reads this list, as a colon would otherwise end the path.
            ours = json.dumps(str(self.path("objects").resolve()), ensure_ascii=False)
            env = {"GIT_INDEX_FILE": f"{folder}/index", "GIT_OBJECT_DIRECTORY": folder}
            scratch = Git(self._folder, {**env, "GIT_ALTERNATE_OBJECT_DIRECTORIES": ours})
            scratch.output("read-tree", "HEAD")
            yield scratch

    def changed(self) -> list[str]:
        """In a scratch index, which takes them in: the tracked files that differ on disk from those of HEAD."""
        self.output("add", "-u")
        return self.text("diff-index", "--cached", "-z", "--name-only", "--no-renames", "HEAD", "--").split("\0")[:-1]
