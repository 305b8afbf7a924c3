"""Carry a pin's patches and the overlay to a commit that is no pin, and prove that they fit."""

from __future__ import annotations

import contextlib

from .apply import current_manifest, lies_on, target_of, write
from .checkout import Checkout
from .git import PatchsetError, Refused
from .merge import merge, names_lost, near_pins
from .series import File, Patchset


def port(checkout: Checkout, patchset: Patchset, pin_name: str | None, dry: bool, anyway: bool) -> str:
    """Print what becomes of each patch and which names are lost, and write the result onto a clean tree.

    Args:
        dry: write nothing; all else is refused as without it.
        anyway: write it although names are lost.
        pin_name: empty: of the nearest pin and the nearest one below HEAD, the first that fits, or the nearest.

    Raises:
        PatchsetError: patches conflict, names are lost, or something is in the way.
    """
    pins = {patchset.pin(pin_name): None} if pin_name else near_pins(checkout.git, patchset.pins())
    tried = {pin: (merge(checkout, patchset, pin), names_lost(checkout, patchset, pin)) for pin in pins}
    fit = [one for one, (merged, lost) in tried.items() if not merged.conflicts and not lost.broken]
    pin = next(iter(fit or tried))
    merged, lost = tried[pin]
    far = "" if pin_name else f", {pins[pin]} commits apart"
    print(f"patches of pin {pin.name} at commit {checkout.head[:12]}{far}:")
    found = f"{merged.conflicts} of {len(merged.lines)} patches conflict"
    fine = [] if lost.broken else ["names of slime that cross-job uses: as at the pin"]
    print("\n".join([*merged.lines, *lost.notes, *lost.broken, *fine]), flush=True)
    with contextlib.nullcontext() if dry else checkout.locked():
        old = current_manifest(checkout)
        if old and not lies_on(checkout, old):
            raise PatchsetError(f"patches were applied at commit {old.head[:12]}: run with --reverse first")
        for path in checkout.changed():
            if old is None or path not in old.files:
                nothing = f"{found}, and nothing was written" if merged.conflicts else "nothing was written"
                raise PatchsetError(f"{nothing}: {path} has changes of yours; commit them or undo them first")
        if merged.conflicts and (dry or old):
            raise Refused(found)
        if merged.conflicts:
            checkout.change({path: File(data) for path, data in merged.files.items()}, None, None)
            undo = f"git checkout -- {' '.join(merged.files)}"
            raise Refused(f"{found}: resolve the markers and export (patches/README.md), or undo: {undo}")
        if lost.broken and not anyway:
            many = f"{len(lost.broken)} names of slime are not as cross-job wants them"
            raise Refused(f"{many}; --anyway writes all the same, for one who knows that they are not used")
        manifest, _ = target = target_of(checkout, patchset, pin, merged.files)
        changes = write(checkout, old, target, dry)
    if dry:
        return "all patches fit"
    files = f"{len(merged.files)} patched and {len(manifest.overlay)} overlay files"
    return f"{'ported' if changes else 'ported already'}: {files}; --reverse takes them out again"
