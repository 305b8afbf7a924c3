"""What leads to new patches: fetch slime at a pin, export an edited checkout.

A patch file owns the files that its diff names. Export keeps its header byte for byte and makes its diff anew from
the working tree; exporting what apply made gives identical files. To begin a patch, or to give it one more file,
write the header and a line `diff --git a/FILE b/FILE` for each file that it shall own.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from .checkout import Checkout
from .git import Git, PatchsetError
from .series import Patchset, named_files, parse_patch

# What a user's configuration could change about a patch, said explicitly: a re-export must give identical bytes.
_DIFF = (
    "diff-index --cached -p -U0 --full-index --no-renames --no-color --no-ext-diff --no-textconv --src-prefix=a/ "
    "--dst-prefix=b/ --diff-algorithm=myers --indent-heuristic --inter-hunk-context=0 -O/dev/null"
)
_HEADING = re.compile(rb"^(@@ -\S+ \+\S+ @@) [^\n]*", re.MULTILINE)  # quotes a line of slime's own code


def fetch(patchset: Patchset, folder: str, pin_name: str | None, full: bool) -> str:
    """Make a slime checkout at a pin in a new or empty folder; on failure nothing is left behind."""
    pin = patchset.pin(pin_name) if pin_name else patchset.pins()[0]
    top = Path(folder).resolve()
    if top.exists() and (not top.is_dir() or any(top.iterdir())):
        raise PatchsetError(f"{folder} exists and is not an empty folder: give another one, or remove it")
    existed = top.exists()
    try:
        top.mkdir(parents=True, exist_ok=True)
        git = Git(top)
        git.text("init", "-q", ".")
        git.text("config", "core.autocrlf", "false")  # the patches are exact: line endings must be upstream's
        git.text("remote", "add", "origin", patchset.upstream()["url"])
        # The commit alone, if the server lets us.
        if full or git.attempt("fetch", "-q", "--depth", "1", "origin", pin.commit).returncode:
            git.text("fetch", "-q", "--tags", "origin")
        git.text("checkout", "-q", "--detach", pin.commit)
    except BaseException:
        for path in top.iterdir() if existed else [top]:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return f"slime {pin.name} ({pin.commit[:12]}) is in {folder}; next: scripts/apply.sh {folder}"


def export(checkout: Checkout, patchset: Patchset, pin_name: str) -> str:
    """Export every patch of the pin's series and record the tree; writes nothing if any breaks the policy."""
    pin = patchset.pin(pin_name)
    if checkout.head != pin.commit:
        raise PatchsetError(f"HEAD is {checkout.head[:12]} and not {pin.commit[:12]} of pin {pin_name}: check it out")
    new, old = {}, patchset.patch_files(pin)
    owned = {name: named_files(data) for name, data in old.items()}
    with checkout.git.scratch() as scratch:
        for path in scratch.changed():
            if not any(path in paths for paths in owned.values()):
                raise PatchsetError(f"{path} is changed and no patch names it: add its `diff --git` line to one")
        after = scratch.text("write-tree")
        for name, data in old.items():
            diff = scratch.output(*_DIFF.split(), "HEAD", "--", *owned[name]) if owned[name] else b""
            diff = data.partition(b"\n\n")[0] + b"\n\n" + _HEADING.sub(rb"\1", diff)
            new[name] = parse_patch(name, diff, f"{pin.name}/{name}")
    said = ""
    for name, patch in new.items():
        state = "unchanged" if old[name] == patch.data else "exported"
        said += f"{state}  {name}: {', '.join(file.path for file in patch.files)}\n"
        (patchset.folder / pin.name / name).write_bytes(patch.data)
    recorded = patchset.upstream()
    for one in recorded["pins"]:
        if one["name"] == pin.name:
            one |= {"tree_before": checkout.tree, "tree_after": after}
    (patchset.folder / "upstream.json").write_text(json.dumps(recorded, indent=2) + "\n")
    return said.rstrip()
