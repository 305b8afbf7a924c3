"""Apply, check, verify and reverse the patch set on a slime checkout.

Everything is worked out before the first file is changed. A file that is neither slime's nor ours as recorded is an
error that names it; the user's other changes are left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import replace

from .checkout import Changes, Checkout, Manifest, digests
from .git import PatchsetError, Refused, blob_id
from .merge import merge, names_lost, near_pins
from .series import File, Patchset, Pin, patched_files

Target = tuple[Manifest, dict[str, File]]
"""What a checkout shall hold: all files that differ from slime's, and the manifest of having applied them."""


def _exact_pin(checkout: Checkout, patchset: Patchset, name: str | None) -> Pin | None:
    """The pin that is checked out, if it is one, and the one asked for."""
    for pin in [patchset.pin(name)] if name else patchset.pins():
        # By tree as well if it is named: a copy in another history is the pin too.
        if checkout.head == pin.commit or (name and checkout.tree == pin.tree_before):
            return pin
    return None


def _pin_below(checkout: Checkout, patchset: Patchset, name: str | None) -> Pin:
    """The pin whose patches fit as they are: HEAD adds commits to it that change none of the patched files, and none
    of the names of slime that the overlay uses.

    Raises:
        PatchsetError: it is none, or not the one asked for; lists the pins.
    """
    pins, why = [patchset.pin(name)] if name else patchset.pins(), ""
    is_below = ("merge-base", "--is-ancestor")
    if below := [pin for pin in pins if not checkout.git.attempt(*is_below, pin.commit, "HEAD").returncode]:
        pin = next(iter(near_pins(checkout.git, below)))
        files = [file for patch in patchset.series(pin) for file in patch.files]
        other = [file.path for file in files if checkout.files.get(file.path) != file.before]
        lost = [] if other else names_lost(checkout, patchset, pin).broken
        if not other and not lost:
            return pin
        why = f" (it adds to pin {pin.name}, and {f'changes {other[0]}' if other else ' '.join(lost[0].split())})"
    shown = f"pin {name}" if name else f"of the pins {', '.join(pin.name for pin in pins)}"
    raise PatchsetError(f"commit {checkout.head[:12]} is not {shown}{why}: see scripts/fetch_slime.sh, or use --port")


def target_of(checkout: Checkout, patchset: Patchset, pin: Pin, patched: Mapping[str, bytes]) -> Target:
    """The target of these patched files and the overlay."""
    overlay = patchset.overlay()
    there = sorted(overlay.keys() & checkout.files.keys())
    if any(blob_id(overlay[path].data) == checkout.files[path] for path in there):
        raise PatchsetError(
            f"{there[0]} of the overlay is in commit {checkout.head[:12]}, with {len(there) - 1} more: where "
            "cross-job is committed with slime, apply to the commit before"
        )
    if there:
        raise PatchsetError(f"{there[0]} of the overlay is a file of slime itself: rename it in the overlay")
    blobs = {path: [checkout.files[path], blob_id(data)] for path, data in patched.items()}
    sums = {path: hashlib.sha256(file.data).hexdigest() for path, file in overlay.items()}
    files = {path: File(data) for path, data in patched.items()}
    return Manifest(pin.name, checkout.head, blobs, sums), {**files, **overlay}


def _make_target(checkout: Checkout, patchset: Patchset, pin_name: str | None) -> Target:
    """The target at a pin, at commits on top of one, or at the commit to which a pin was ported."""
    pin, old = _exact_pin(checkout, patchset, pin_name), checkout.manifest()
    if pin is None and old and lies_on(checkout, old) and pin_name in (None, old.pin):
        pin = patchset.pin(old.pin)
        merged = merge(checkout, patchset, pin)
        if merged.conflicts:
            raise PatchsetError(f"the patches of {pin.name} do not fit any more: run with --reverse, then --port")
        return target_of(checkout, patchset, pin, merged.files)
    pin = pin or _pin_below(checkout, patchset, pin_name)
    patches = patchset.series(pin)
    for file in (file for patch in patches for file in patch.files):
        if checkout.files.get(file.path) != file.before:
            raise PatchsetError(f"the patches of {pin.name} are not made for {file.path} of this commit: export again")
    return target_of(checkout, patchset, pin, patched_files(checkout.git, patches))


def _in_the_way(path: str, now: File | None, slime: str | None, ours: set[str]) -> str:
    if now is None:
        return f"{path} is missing from the checkout: restore it with git checkout -- {path}"
    if slime and blob_id(now.data.replace(b"\r\n", b"\n")) in {slime, *ours}:
        return f"{path} has CRLF line endings: clone slime again with git clone -c core.autocrlf=false"
    if slime:
        return f"{path} has changes of yours: commit them elsewhere or undo them (git checkout -- {path}) first"
    if ours:
        return f"{path} was edited after apply: save your edit elsewhere and remove the file first"
    return f"{path} exists already and is not ours: move it away, then apply again"


def _plan(checkout: Checkout, old: Manifest | None, target: Target) -> tuple[Changes, list[str]]:
    """(the changes that lead from `old` to the target, what is in the way); all else of either becomes slime's.

    Without `old`, a checkout that all patches are in is taken for ours, and with it what is byte for byte the overlay.
    """
    new, files = target
    slime = {path: blob for path, (blob, _) in [*(old.files.items() if old else ()), *new.files.items()]}
    slime |= {
        path: checkout.files[path] for path in {*new.paths(), *(old.paths() if old else ())} if path in checkout.files
    }
    patched: dict[str, bool] = {}
    changes: Changes = {}
    wrong = []
    for path in sorted({*new.paths(), *(old.paths() if old else ())}, key=lambda path: (path not in slime, path)):
        now, end = checkout.read(path), files.get(path)
        ours = old.digests(path) if old else set()
        if path in slime or all(patched.values()):
            ours |= new.digests(path)
        is_ours = bool(digests(now) & ours)
        if not is_ours and not (slime[path] in digests(now) if path in slime else now is None):
            wrong.append(_in_the_way(path, now, slime.get(path), ours))
            continue
        if path in slime:
            patched[path] = is_ours
            end = end or File(checkout.git.output("cat-file", "blob", slime[path]))
        if (now and now.data) != (end and end.data):
            changes[path] = end
    states = {path: patched[path] for path in (old or new).files if path in patched}
    if {*states.values()} == {True, False} and (old is None or (old.complete and files)):
        inside, outside = (" ".join(path for path in states if states[path] is state) for state in (True, False))
        wrong.append(f"half-applied: in {inside} and not in {outside}: git checkout -- {inside}, then apply again")
    return changes, wrong


def lies_on(checkout: Checkout, manifest: Manifest) -> bool:
    """Whether HEAD has the files that were patched as they were before; commits of the user's may lie between."""
    return all(checkout.files.get(path) == blob for path, (blob, _) in manifest.files.items())


def current_manifest(checkout: Checkout) -> Manifest | None:
    """The manifest, None if nothing of what it says is left (after git checkout and git clean)."""
    manifest = checkout.manifest()
    if manifest and any(digests(checkout.read(path)) & manifest.digests(path) for path in manifest.paths()):
        return manifest
    return None


def write(checkout: Checkout, old: Manifest | None, target: Target, dry: bool = False) -> Changes:
    """Lead the checkout from `old` to the target and return the changes; PatchsetError names what is in the way."""
    changes, wrong = _plan(checkout, old, target)
    if wrong:
        raise PatchsetError(wrong[0])
    end, files = target
    first = old or end
    replaced = {path: " ".join(sorted(first.digests(path))) for path in first.paths()}
    during = replace(end, complete=False, files={**first.files, **end.files}, replaced=replaced)
    if not dry:
        checkout.change(changes, during, end if files else None)
    return changes


def apply(checkout: Checkout, patchset: Patchset, pin_name: str | None, dry: bool) -> str:
    """Apply the pin's patches and the overlay; returns what was done, or would be done if `dry`."""
    manifest, _ = target = _make_target(checkout, patchset, pin_name)
    with contextlib.nullcontext() if dry else checkout.locked():
        old = current_manifest(checkout)
        if old and not lies_on(checkout, old):
            where = f"at commit {old.head[:12]}, HEAD is {checkout.head[:12]} now"
            raise PatchsetError(f"the patches of {old.pin} were applied {where}: run with --reverse first, then apply")
        changes = write(checkout, old, target, dry)
    overlay, gone = len(changes.keys() & manifest.overlay.keys()), [*changes.values()].count(None)
    patched = len(changes) - overlay - gone
    what = f"pin {manifest.pin}: {patched} patched files, {overlay} overlay files, {gone} removed"
    return f"{'would write' if dry else 'applied'} {what}" if changes else f"already applied: pin {manifest.pin}"


def verify(checkout: Checkout, patchset: Patchset, pin_name: str | None) -> str:
    """Say that the checkout is exactly patched; PatchsetError names what is not."""
    manifest, files = target = _make_target(checkout, patchset, pin_name)
    before = checkout.manifest()
    if before is None and not checkout.changed():
        raise Refused(f"not patched: the checkout is upstream's; scripts/apply.sh {checkout.top} patches it")
    changes, wrong = _plan(checkout, before, target)
    for path, after in changes.items():
        how = "is from an older overlay" if after is None else "is not as applied"
        wrong.append(f"{path} {how if checkout.read(path) else 'is missing'}")
    wrong += [f"{path} was changed" for path in checkout.changed() if path not in files]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise Refused(f"not exactly patched: {'; '.join(wrong[:3])}{more}")
    return f"exactly patched: pin {manifest.pin}, {len(manifest.files)} patched, {len(manifest.overlay)} overlay files"


def reverse(checkout: Checkout, patchset: Patchset, pin_name: str | None) -> str:
    """Take the patches and the overlay out again, as the manifest says; an edit of the user is an error."""
    with checkout.locked():
        old = checkout.manifest()
        manifest = old or _make_target(checkout, patchset, pin_name)[0]
        changes = write(checkout, old, (manifest, {}))
    return f"reversed pin {manifest.pin}: {len(changes)} files" if changes else "not applied: nothing to reverse"
