"""What needs upstream's repository: fetch slime at a pin, and record the tree hashes of the pins."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from patchset_git import Git, PatchsetError
from patchset_series import Patchset, Pin


def _fetch_commit(git: Git, url: str, pin: Pin, full: bool) -> None:
    """Bring the pin's commit into the repository: alone if the server lets us, or else the whole history."""
    if git.attempt("remote", "get-url", "origin").returncode:
        git.text("remote", "add", "origin", url)
    if not full and not git.attempt("fetch", "-q", "--depth", "1", "origin", pin.commit).returncode:
        return
    git.text("fetch", "-q", "--tags", "origin")
    if not git.has(f"{pin.commit}^{{commit}}"):
        raise PatchsetError(
            f"{url} has no commit {pin.commit[:12]} of pin {pin.name}: is the url in upstream.json right?"
        )


def fetch(patchset: Patchset, folder: str, pin_name: str | None, full: bool) -> str:
    """Make a slime checkout at a pin in a new or empty folder; on failure nothing is left behind."""
    if not folder.strip():
        raise PatchsetError("DIR is empty: give the folder to fetch slime into")
    pin = patchset.pin(pin_name) if pin_name else patchset.pins()[0]
    top = Path(folder).resolve()
    existed = top.exists()
    if existed and (not top.is_dir() or any(top.iterdir())):
        raise PatchsetError(f"{folder} exists and is not an empty folder: give another one, or remove it")
    try:
        top.mkdir(parents=True, exist_ok=True)
        git = Git(top)
        git.text("init", "-q", ".")
        git.text("config", "core.autocrlf", "false")  # the patches are exact: line endings must be upstream's
        _fetch_commit(git, patchset.url, pin, full)
        git.text("checkout", "-q", "--detach", pin.commit)
        tree = git.text("rev-parse", "HEAD^{tree}")
        if pin.tree_before not in (None, tree):
            raise PatchsetError(
                f"commit {pin.commit[:12]} has tree {tree[:12]} and {str(pin.tree_before)[:12]} is recorded"
            )
    except BaseException as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(top)
            if existed:
                top.mkdir()
        if isinstance(error, OSError):
            raise PatchsetError(f"cannot write {folder}: {error.strerror}; give a folder that is writable") from error
        raise
    return f"slime {pin.name} ({pin.commit[:12]}) is in {folder}; next: scripts/apply.sh {folder}"


def record(patchset: Patchset, pin_name: str | None, clone: str | None) -> list[str]:
    """Work out each pin's trees from clean upstream and the series, and write them to upstream.json.

    `clone` is a repository that has the pins' commits; without it they are fetched from the recorded URL.
    """
    said = []
    with tempfile.TemporaryDirectory(prefix="slime-cross-job-") as folder:
        git = Git(Path(clone) if clone else Path(folder))
        if not clone:
            git.text("init", "-q", "--bare", ".")
        for pin in [patchset.pin(pin_name)] if pin_name else patchset.pins():
            patches = patchset.series(pin)
            if not clone:
                _fetch_commit(git, patchset.url, pin, full=False)
            files = {}
            for file in (file for patch in patches for file in patch.files):
                entry = git.entry(pin.commit, file.path)
                if entry is None or entry[1] != file.before:
                    raise PatchsetError(
                        f"a patch of {pin.name} is not made for {file.path} of its commit: export it again"
                    )
                files[file.path] = file.apply(git.output("cat-file", "blob", file.before))
            before = git.text("rev-parse", f"{pin.commit}^{{tree}}")
            with git.scratch() as scratch:
                after = scratch.tree_with(before, files)
            patchset.write_trees(pin.name, before, after)
            said.append(f"{pin.name}: tree before {before}, after {after}")
    return said
