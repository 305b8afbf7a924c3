"""Git as the patch tools need it: a checkout, and a scratch index to work out tree hashes in.

Guarantees: nothing here writes to the working tree, to the user's index or to the repository's object store: trees are
worked out in a temporary index with a temporary object folder. Only the standard library and `git` are used.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Set by git for hooks and aliases: they would lead our git to another repository or index than the one named.
_REDIRECTS = (
    "DIR",
    "WORK_TREE",
    "INDEX_FILE",
    "OBJECT_DIRECTORY",
    "ALTERNATE_OBJECT_DIRECTORIES",
    "COMMON_DIR",
    "PREFIX",
)
# What a user's configuration could change about a patch, said explicitly: a re-export must give identical bytes.
_DIFF = [
    "-p",
    "-U0",
    "--full-index",
    "--no-renames",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "--diff-algorithm=myers",
    "--indent-heuristic",
    "--inter-hunk-context=0",
    "-O/dev/null",
]

_HEADING = re.compile(rb"^(@@ -\S+ \+\S+ @@) [^\n]*", re.MULTILINE)


class PatchsetError(Exception):
    """Something the user can put right; the message is one line: what is wrong and what to do."""


def blob_id(data: bytes) -> str:
    """The name that git gives to a file of these bytes, without any line ending conversion."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Git:
    """Runs git in one folder, with the environment's redirections (GIT_DIR and the like) taken out."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("git") is None:
            raise PatchsetError("git is not on PATH: install git 2.30 or newer")
        self._folder = folder
        redirects = {f"GIT_{name}" for name in _REDIRECTS}
        self._env = {name: value for name, value in os.environ.items() if name not in redirects}
        self._env |= {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_REPLACE_OBJECTS": "1"}
        self._env |= {"GIT_ATTR_NOSYSTEM": "1"}

    def attempt(
        self, *args: str, data: bytes | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run git and return what it did, whatever its exit status."""
        fixed = ("--no-optional-locks", "-c", "core.safecrlf=false", "-c", "core.fsmonitor=false")
        command = ["git", *fixed, "-c", "core.attributesFile=/dev/null", "-C", str(self._folder), *args]
        environment = {**self._env, **(env or {})}
        return subprocess.run(command, input=data or b"", capture_output=True, env=environment, check=False)

    def output(self, *args: str, data: bytes | None = None, env: Mapping[str, str] | None = None) -> bytes:
        """The standard output of git; PatchsetError with git's own complaint when it fails."""
        done = self.attempt(*args, data=data, env=env)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["without a message"]
            first = next((line for line in said if "fatal: " in line or "error: " in line), said[-1])
            raise PatchsetError(f"git {args[0]} failed in {self._folder}: {first.strip()}")
        return done.stdout

    def text(self, *args: str, data: bytes | None = None, env: Mapping[str, str] | None = None) -> str:
        """As `output`, decoded and without the newline at the end."""
        return self.output(*args, data=data, env=env).decode().rstrip("\n")

    def has(self, name: str) -> bool:
        """Whether this repository holds the object, without fetching it from anywhere."""
        return self.attempt("cat-file", "-e", name, env={"GIT_NO_LAZY_FETCH": "1"}).returncode == 0

    def path(self, name: str) -> Path:
        """Where git keeps `name` inside its own folder."""
        return self._folder / self.text("rev-parse", "--git-path", name)

    def entry(self, tree: str, path: str) -> tuple[str, str] | None:
        """(mode, blob) of a file of a tree, None when the tree has no such file."""
        line = self.text("ls-tree", tree, "--", path)
        if not line:
            return None
        mode, kind, name = line.split("\t")[0].split()
        return (mode, name) if kind == "blob" else None

    @contextmanager
    def scratch(self) -> Iterator[Scratch]:
        """A temporary index beside a temporary object folder, gone at the end."""
        with tempfile.TemporaryDirectory(prefix="slime-cross-job-") as folder:
            objects = Path(folder, "objects")
            objects.mkdir()
            # Quoted the way git reads this list, as a colon would otherwise end the path.
            ours = str(self.path("objects").resolve()).replace("\\", "\\\\").replace('"', '\\"')
            env = {"GIT_INDEX_FILE": str(Path(folder, "index")), "GIT_OBJECT_DIRECTORY": str(objects)}
            yield Scratch(self, {**env, "GIT_ALTERNATE_OBJECT_DIRECTORIES": f'"{ours}"'})


@dataclass(frozen=True)
class Scratch:
    """Works out trees; nothing of it stays in the repository."""

    git: Git
    env: Mapping[str, str]

    def tree_with(self, tree: str, files: Mapping[str, bytes]) -> str:
        """The hash of `tree` with the contents of some of its files replaced; modes stay."""
        self.git.output("read-tree", tree, env=self.env)
        for path, data in files.items():
            entry = self.git.entry(tree, path)
            if entry is None:
                raise PatchsetError(f"{path} is not a file of slime at {tree[:12]}: the patch is for another commit")
            name = self.git.text("hash-object", "-w", "--stdin", data=data, env=self.env)
            self.git.output("update-index", "--cacheinfo", f"{entry[0]},{name},{path}", env=self.env)
        return self.git.text("write-tree", env=self.env)

    def tracked(self, tree: str) -> str:
        """The hash of the working tree's state of all files that `tree` has, as git would add them."""
        self.git.output("read-tree", tree, env=self.env)
        self.git.output("add", "-u", env=self.env)
        return self.git.text("write-tree", env=self.env)

    def changed(self, old: str, new: str) -> list[str]:
        """Names of the files that differ between two trees."""
        return [
            name.decode(errors="surrogateescape")
            for name in self.git.output(
                "diff-tree", "-r", "-z", "--name-only", "--no-renames", old, new, env=self.env
            ).split(b"\0")
            if name
        ]

    def diff(self, old: str, new: str, paths: Sequence[str]) -> bytes:
        """The patch between two trees: zero context, full hashes, independent of the user's configuration.

        Git's hunk headings, which quote a line of the file, are left out: a patch holds none of slime's own code.
        """
        diff = self.git.output("diff-tree", *_DIFF, old, new, "--", *paths, env=self.env)
        return _HEADING.sub(rb"\1", diff)


@dataclass(frozen=True)
class Checkout:
    """A slime checkout: its top folder, its git, and what HEAD was when it was opened."""

    top: Path
    git: Git
    head: str
    tree: str

    @classmethod
    def open(cls, folder: str) -> Checkout:
        """Open the checkout whose top level is `folder`; PatchsetError says what it is instead, if it is none."""
        if not folder.strip():
            raise PatchsetError(
                "SLIME_DIR is empty: give the folder of a slime checkout (scripts/fetch_slime.sh makes one)"
            )
        top = Path(folder).resolve()
        if not top.is_dir():
            raise PatchsetError(f"{folder} is not a folder: scripts/fetch_slime.sh {folder} fetches slime into it")
        git = Git(top)
        found = git.attempt("rev-parse", "--show-toplevel")
        if found.returncode:
            said = (found.stderr.decode(errors="replace").strip() or "no answer").splitlines()[0]
            if "not a git repository" not in said:
                raise PatchsetError(f"git does not work in {folder}: {said}")
            raise PatchsetError(
                f"{folder} is not a git checkout: scripts/fetch_slime.sh fetches one into a new folder"
            )
        actual = Path(found.stdout.decode().rstrip("\n")).resolve()
        if actual != top:
            raise PatchsetError(
                f"{folder} lies inside the repository {actual} and is no checkout itself: give slime's own"
            )
        head = git.attempt("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        if head.returncode:
            raise PatchsetError(f"{folder} has no commit checked out: scripts/fetch_slime.sh fetches one that has")
        return cls(top, git, head.stdout.decode().strip(), git.text("rev-parse", "HEAD^{tree}"))
