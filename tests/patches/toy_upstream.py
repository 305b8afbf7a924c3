"""A toy upstream with two pins, patches and an overlay of its own, and what the tests look at checkouts with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from patchset.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
HEADER = "Subject: {subject}\nWhy: because\nUpstream-Status: not offered\nRemove-When: never\n\n"


def git(folder: Path, *args: str) -> str:
    """Run git in a folder and return what it printed."""
    fixed = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run([*fixed, "-C", str(folder), *args], capture_output=True, text=True, check=True)
    return done.stdout.rstrip("\n")


def whole_tree(folder: Path) -> str:
    """The tree hash of all tracked and all untracked files that are not ignored, by way of a temporary index."""
    index = folder / ".git" / "test-index"
    env = {**os.environ, "GIT_INDEX_FILE": str(index)}
    subprocess.run(["git", "-C", str(folder), "add", "-A"], env=env, check=True, capture_output=True)
    tree = subprocess.run(
        ["git", "-C", str(folder), "write-tree"], env=env, check=True, capture_output=True, text=True
    )
    index.unlink()
    return tree.stdout.strip()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes: the working tree, git's index and our manifest, not git's objects."""
    kept = {".git/index", ".git/slime-cross-job.json", ".git/HEAD"}
    paths = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    inside = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for name, path in inside.items()
        if not name.startswith(".git/") or name in kept
    }


def run_script(name: str, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of the bash scripts with this interpreter."""
    environment = {**os.environ, "PYTHON": sys.executable, **(env or {})}
    return subprocess.run(
        [ROOT / "scripts" / name, *args], capture_output=True, text=True, check=False, env=environment
    )


class Toy:
    """The toy: `one` and `two` are pins, `slime` is a checkout of `one`."""

    def __init__(self, base: Path) -> None:
        self.upstream, self.patches, self.overlay = base / "upstream", base / "patches", base / "overlay"
        self.slime = base / "slime checkout"
        self.upstream.mkdir()
        git(self.upstream, "init", "-q", "-b", "main", ".")
        git(self.upstream, "config", "uploadpack.allowAnySHA1InWant", "true")
        self.commits: dict[str, str] = {}
        self._commit("one", {"pkg/a.py": _lines("a", 30), "pkg/b.py": _lines("b", 30), "other.txt": "other\n"})
        self._commit(
            "two", {"pkg/a.py": "new first\n" + _lines("a", 30), "pkg/b.py": _lines("b", 30, {11: "changed"})}
        )
        git(self.upstream, "checkout", "-q", "--detach", self.commits["one"])
        (self.overlay / "pkg" / "extra").mkdir(parents=True)
        (self.overlay / "pkg" / "extra" / "__init__.py").write_text("")
        (self.overlay / "pkg" / "extra" / "run.py").write_text("print('extra')\n")
        (self.overlay / "pkg" / "extra" / "run.py").chmod(0o755)
        (self.overlay / "pkg" / "extra" / "__pycache__").mkdir()
        (self.overlay / "pkg" / "extra" / "__pycache__" / "run.pyc").write_bytes(b"cache")
        self.set_series(
            "one", {"add-a.patch": {"pkg/a.py": {5: "+a", 30: "+end"}}, "add-b.patch": {"pkg/b.py": {11: "+b"}}}
        )
        self.set_series("two", {"add-a.patch": {"pkg/a.py": {6: "+a", 31: "+end"}}})
        self.clone(self.slime)

    def _commit(self, name: str, files: dict[str, str]) -> None:
        for path, text in files.items():
            (self.upstream / path).parent.mkdir(exist_ok=True)
            (self.upstream / path).write_text(text)
        git(self.upstream, "add", "-A")
        git(self.upstream, "commit", "-q", "-m", name)
        self.commits[name] = git(self.upstream, "rev-parse", "HEAD")
        pins = [
            {"name": pin, "ref": commit, "commit": commit, "tree_before": None, "tree_after": None}
            for pin, commit in self.commits.items()
        ]
        self.patches.mkdir(exist_ok=True)
        upstream = {"url": self.upstream.as_uri(), "pins": pins}
        (self.patches / "upstream.json").write_text(json.dumps(upstream))

    def set_series(self, pin: str, patches: dict[str, dict[str, dict[int, str]]]) -> None:
        """Write a pin's patches: per patch and file, the text to insert after a line."""
        folder = self.patches / pin
        folder.mkdir(exist_ok=True)
        (folder / "series").write_text("# the toy's\n" + "".join(f"{name}\n" for name in patches))
        work = self.upstream.parent / "work"
        git(self.upstream, "worktree", "add", "-q", "--detach", str(work), self.commits[pin])
        for name, files in patches.items():
            named = "".join(f"diff --git a/{path} b/{path}\n" for path in files)
            subject = name.removesuffix(".patch").replace("-", " ")
            (folder / name).write_text(HEADER.format(subject=subject) + named)
            for path, insertions in files.items():
                lines = (work / path).read_text().splitlines(keepends=True)
                for after, text in sorted(insertions.items(), reverse=True):
                    lines.insert(after, f"{text}\n")
                (work / path).write_text("".join(lines))
        assert self.run("export", str(work), pin) == 0
        git(self.upstream, "worktree", "remove", "--force", str(work))

    def clone(self, folder: Path, pin: str = "one", *options: str) -> Path:
        """A full clone of the toy upstream at a pin."""
        git(self.upstream.parent, "clone", "-q", *options, str(self.upstream), str(folder))
        git(folder, "checkout", "-q", "--detach", self.commits[pin])
        return folder

    def tree(self, pin: str, which: str = "before") -> str:
        """A pin's recorded tree, before or after the patches."""
        pins = json.loads((self.patches / "upstream.json").read_text())["pins"]
        return next(one[f"tree_{which}"] for one in pins if one["name"] == pin)

    def run(self, command: str, *args: str) -> int:
        """Run a command of the patch set on the toy; its exit status."""
        return main([command, "--patches", str(self.patches), "--overlay", str(self.overlay), *args])

    def apply(self, *args: str) -> int:
        """Run apply on the toy's checkout."""
        return self.run("apply", str(self.slime), *args)


def _lines(letter: str, count: int, changed: dict[int, str] | None = None) -> str:
    return "".join(f"{(changed or {}).get(number, letter)} {number}\n" for number in range(1, count + 1))
