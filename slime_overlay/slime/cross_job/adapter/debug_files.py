"""The files of slime's `--save-debug-rollout-data` and `--load-debug-rollout-data`: one a rollout, written by torch.

    FOLDER/{rollout_id}.pt    {"rollout_id": int, "samples": [Sample.to_dict(), ...]}

Such a file may hold pickled code, and slime executes it. Here it is read as data only (torch's `weights_only`): what
is more than numbers, texts, tensors, lists and dicts is refused. torch is imported when a file is read or written.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput, PayloadDamaged
from ..types import shortened

FIELD = "{rollout_id}"
"""What stands in slime's path template for the number of the rollout."""


def find(template: str) -> dict[int, Path]:
    """Rollout id -> file, of all files that a template like slime's names. Raises BadInput: there is none."""
    path = Path(template)
    if path.name.count(FIELD) != 1 or FIELD in str(path.parent):
        raise BadInput(f"{template!r} is no template: write the file's name with {FIELD} in it, as DIR/{FIELD}.pt")
    before, _, after = path.name.partition(FIELD)
    shape = re.compile(f"{re.escape(before)}([0-9]+){re.escape(after)}")
    if not path.parent.is_dir():
        raise BadInput(f"there is no folder {path.parent}")
    matches = [(shape.fullmatch(file.name), file) for file in path.parent.iterdir()]
    found = {int(match[1]): file for match, file in matches if match}
    if not found:
        raise BadInput(f"there is no file {template} for any {FIELD}")
    return dict(sorted(found.items()))


def read(path: Path, rollout_id: int) -> list[dict[str, Any]]:
    """The samples of a file.

    Raises:
        BadInput: it is no such file, it is of another rollout, or it holds what only executing it could read.
        PayloadDamaged: it is cut off, or no file of torch's.
    """
    torch = _torch()
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"there is no file {path}") from None
    except Exception as error:  # pickle's and zip's, of many kinds
        reason = shortened(" ".join(str(error).split()), 300)
        if "weights_only" in reason.lower() or "unsupported" in reason.lower():
            raise BadInput(
                f"{path} holds more than numbers, texts, tensors, lists and dicts: reading it would execute code in "
                f"the file, which is not done here: {reason}"
            ) from None
        raise PayloadDamaged(f"{path} cannot be read as a torch file: {reason}") from None
    samples = found.get("samples") if isinstance(found, dict) else None
    if not isinstance(samples, list) or not samples or not all(isinstance(sample, dict) for sample in samples):
        raise BadInput(f"{path} is not one of slime's debug rollout files: it has no list of samples")
    if found.get("rollout_id", rollout_id) != rollout_id:
        raise BadInput(
            f"{path} is named for rollout {rollout_id}, and holds rollout {shortened(found['rollout_id'], 20)}"
        )
    for number, sample in enumerate(samples):
        if missing := [name for name in ("tokens", "response_length", "reward", "status") if name not in sample]:
            raise BadInput(f"{path}: sample {number} has no {', '.join(missing)}")
    return samples


def make_folder(folder: Path) -> str:
    """Make a new folder for such files; slime's path template for it. Raises BadInput: it exists already."""
    if FIELD in str(folder) or "{" in str(folder) or "}" in str(folder):
        raise BadInput(
            f"{folder}: slime would take the braces for a field of its path template: choose a name without them"
        )
    try:
        folder.mkdir()
    except FileExistsError:
        raise BadInput(f"{folder} exists already: give a new folder, or remove it") from None
    except OSError as error:
        raise BadInput(f"{folder} cannot be made: {error.strerror}") from None
    return str(folder / f"{FIELD}.pt")


def write(template: str, rollout_id: int, samples: Sequence[Mapping[str, Any]]) -> Path:
    """Write the file of one rollout; it appears whole."""
    path = Path(template.format(rollout_id=rollout_id))
    draft = path.with_name(f".{path.name}.part")
    _torch().save({"rollout_id": rollout_id, "samples": [dict(sample) for sample in samples]}, draft)
    draft.replace(path)
    return path


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise BadInput("slime's debug rollout files are torch's: pip install torch, to read or write them") from None
    return torch
