"""What slime's two jobs must agree on, so that a disagreement is refused before anything is generated.

Each job states it when it attaches, and the broker compares (Roster.attach). The number of data-parallel ranks is not
among it: the train job announces its own, the rollout job splits by it, and what was split for another train job is
split anew (parts.py).
"""

import hashlib
from pathlib import Path
from typing import Any

from . import parts

_ARGUMENTS = (
    # how much, in which portions
    *("num_rollout", "num_epoch", "rollout_batch_size", "n_samples_per_prompt", "global_batch_size"),
    *("num_steps_per_rollout", "rollout_max_prompt_len", "rollout_max_response_len", "rollout_max_context_len"),
    # what the numbers mean
    *("rollout_temperature", "advantage_estimator", "rewards_normalization", "grpo_std_normalization", "reward_key"),
    *("loss_mask_type", "apply_chat_template", "balance_data", "use_rollout_logprobs", "get_mismatch_metrics"),
    *("calculate_per_token_loss", "rollout_shuffle", "rollout_seed", "partial_rollout"),
)
"""Arguments of slime that both jobs read, at any pin; those that are None are not stated."""

PIN = "slime's code for rollout data (its pin)"
TOKENIZER = "the tokenizer in --hf-checkpoint"
OF_THE_DATA = (PIN, TOKENIZER)
"""Terms that hold for what is published and not acked, too, whoever ended meanwhile."""

_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_DATA_CODE = ("utils/types.py", "utils/data.py", "backends/utils/data.py", "ray/buffer.py", "ray/rollout.py")


def terms(args: Any, in_parts: bool) -> dict[str, Any]:
    """What a job with these arguments takes for granted: JSON-able values by a name that the other job understands.

    Args:
        in_parts: slime at this pin splits a rollout among training ranks where it generates it.
    """
    names = (*_ARGUMENTS, *parts.ARGUMENTS) if in_parts else _ARGUMENTS
    stated = {f"--{name.replace('_', '-')}": getattr(args, name, None) for name in names}
    stated = {name: value for name, value in stated.items() if isinstance(value, (bool, int, float, str))}
    stated[PIN] = _digest(_existing(Path(__file__).parents[1], _DATA_CODE))
    checkpoint = getattr(args, "hf_checkpoint", None)
    if checkpoint:
        files = _existing(Path(checkpoint), _TOKENIZER)
        stated[TOKENIZER] = _digest(files) if files else str(checkpoint)
    return stated


def _existing(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _digest(files: list[Path]) -> str:
    """Short name of the contents of these files, the same wherever they lie."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]
