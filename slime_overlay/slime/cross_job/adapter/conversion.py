"""slime's training data as slime's samples, and slime's samples as training data.

A sample is what slime generates (tokens, reward, texts ...); training data is what its ranks get, made of samples by
slime's own code, which knows slime's arguments. So the way there (`by_slime`) runs that code, and is exact. The way
back (`to_samples`) is this module's, and gives samples of which slime makes the same training data again, with the
same arguments: what training data says of a sample is in it, or it is refused, naming what could not be.

Training data does not have the rest: texts, labels, most metadata. Those stay empty, see MISSING.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..batch import Batch
from ..errors import BadInput
from . import dp_split
from .training_data import pack, unpack

MISSING = (
    "prompt, response and label (texts); metadata except round_number, raw_reward and source_name; group_index; the "
    "status of what was aborted or failed (it becomes completed or truncated); weight_versions, spec_info, other "
    "figures of the engines"
)
"""What no training data has, and what samples made of it therefore lack. slime trains on none of it."""

_AS_IT_IS = {  # column of training data -> field of slime's Sample
    "response_lengths": "response_length",
    "sample_indices": "index",
    "rollout_ids": "rollout_id",
    "multimodal_train_inputs": "multimodal_train_inputs",
    "rollout_routed_experts": "rollout_routed_experts",
    "rollout_top_p_token_ids": "rollout_top_p_token_ids",
    "rollout_top_p_token_offsets": "rollout_top_p_token_offsets",
    "metadata": "train_metadata",
    "prompt": "prompt",
}
_AS_LISTS = {
    "tokens": "tokens",
    "loss_masks": "loss_mask",
    "rollout_log_probs": "rollout_log_probs",
    "teacher_log_probs": "teacher_log_probs",
}
_TOLD_APART = ("rewards", "raw_reward", "truncated", "round_number", "source_names", "rollout_mask_sums")
_NEEDED = ("tokens", "response_lengths", "loss_masks", "rewards", "truncated", "sample_indices")
_MADE = ("total_lengths",)  # by slime's split, of the tokens
_TOLERANCE = 0.02  # of a normalised reward, which is divided by as little as 1e-6 where all rewards are equal


def to_samples(batches: Sequence[Batch], meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """slime's samples, as its `Sample.to_dict` writes them, of a rollout that slime published.

    Raises:
        BadInput: these batches are no training data of slime, or slime would not make the same of any samples.
    """
    data = _data(batches, meta)
    if missing := [key for key in _NEEDED if key not in data]:
        raise BadInput(f"this training data has no {', '.join(missing)}: slime made it with a custom function")
    known = {*_AS_IT_IS, *_AS_LISTS, *_TOLD_APART, *_MADE}
    if unknown := sorted(set(data) - known):
        raise BadInput(f"training data has {', '.join(unknown)}, for which slime's samples have no field")
    length = len(data["tokens"])
    if wrong := [key for key, values in data.items() if len(values) != length]:
        raise BadInput(
            f"training data has {length} samples, but columns of another length: {', '.join(sorted(wrong))}"
        )
    rewards = _rewards(data)
    samples = []
    for row in range(length):
        sample = {field: data[key][row] for key, field in _AS_IT_IS.items() if key in data}
        sample |= {field: _list(data[key][row]) for key, field in _AS_LISTS.items() if key in data}
        sample["reward"] = rewards[row]
        sample["status"] = "truncated" if data["truncated"][row] else "completed"
        sample["metadata"] = _metadata(data, row)
        samples.append(sample)
    _check_sums(data, samples)
    return samples


def by_slime(args: Any, samples: Sequence[Mapping[str, Any]], ranks: int = 1) -> tuple[list[Batch], dict[str, Any]]:
    """The parts and the `meta` that slime publishes of these samples (see `published`), by slime's own code.

    Args:
        args: slime's parsed arguments, those of the training.
        ranks: data-parallel ranks to split for, from v0.3 on; a train job with other ranks splits it anew.
    """
    from slime.utils.misc import load_function
    from slime.utils.types import Sample

    # without the engines and the data source that its constructor makes
    manager: Any = object.__new__(type(_generating_actor()))
    manager.args = args
    manager.train_parallel_config = {
        **{"dp_size": ranks, "cp_size": 1, "vpp_size": 1},
        "microbatch_group_size_per_vp_stage": 1,
    }
    for name in ("custom_reward_post_process", "custom_convert_samples_to_train_data"):
        path = getattr(args, f"{name}_path", None)
        setattr(manager, f"{name}_func", None if path is None else load_function(path))
    data = manager._convert_samples_to_train_data([Sample.from_dict(dict(sample)) for sample in samples])
    return published(manager, data)


def published(manager: Any, data: dict[str, Any]) -> tuple[list[Batch], dict[str, Any]]:
    """What is published of slime's training data: its parts, one a rank where slime splits it, and what is said of it.

    Args:
        manager: slime's Buffer, RolloutController or RolloutManager.
    """
    dicts, how = dp_split.split(manager, data)
    rewards = data.get("raw_reward", data.get("rewards"))
    meta = {"samples": len(data["tokens"]), **({"split": how} if how else {})}
    values = [] if rewards is None else [_list(reward) for reward in _list(rewards)]
    if values and all(isinstance(reward, (int, float)) for reward in values):
        meta["reward"] = sum(values) / len(values)
    return [pack(part) for part in dicts], meta


def _generating_actor() -> Any:
    """slime's actor class that makes training data, at this pin."""
    try:
        from slime.ray import buffer
    except ImportError:
        from slime.ray.rollout import RolloutManager

        return RolloutManager
    return getattr(buffer, "RolloutController", None) or buffer.Buffer  # v0.1.0, 079dbcf


def _data(batches: Sequence[Batch], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The training data of the whole rollout, before slime split it."""
    try:
        dicts = [unpack(batch) for batch in batches]
    except KeyError:
        raise BadInput("these batches are no training data of slime: they were published as plain columns") from None
    if "split" not in meta:
        if len(dicts) != 1:
            raise BadInput(f"a rollout in {len(dicts)} parts does not say how slime split it")
        return dicts[0]
    data, left_out = dp_split.together(dicts, meta["split"])
    if left_out:
        raise BadInput(
            f"slime left {len(left_out)} samples out when it split this rollout (they did not fill a "
            "--global-batch-size): what they were is not recorded, and slime would normalise the rewards of the rest "
            "without them"
        )
    return data


def _rewards(data: Mapping[str, Any]) -> Sequence[Any]:
    """The reward of each sample before slime normalised it."""
    rewards, raw = ([_list(v) for v in _list(data.get(name, ()))] for name in ("rewards", "raw_reward"))
    if "raw_reward" not in data or raw == rewards:
        return rewards
    if any(np.allclose(made, rewards, rtol=1e-3, atol=_TOLERANCE) for made in _normalised(raw)):
        return raw
    raise BadInput(
        "the rewards are not those that slime makes of raw_reward by normalising groups: they come from a custom "
        "function, or raw_reward from the samples' metadata, and what the samples had is not recorded"
    )


def _normalised(raw: Sequence[float]) -> Iterator[Any]:
    """What group normalisation makes of these rewards, for groups of every size that divides them."""
    try:
        values = np.asarray(raw, np.float32)
    except (TypeError, ValueError):
        return
    for size in range(2, len(values) + 1):
        if len(values) % size == 0:
            groups = values.reshape(-1, size)
            centred = groups - groups.mean(axis=1, keepdims=True)
            yield centred.ravel()
            yield (centred / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-6)).ravel()


def _metadata(data: Mapping[str, Any], row: int) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    if "round_number" in data:
        found["round_number"] = data["round_number"][row]
    if "rollout_ids" in data:  # from v0.3 on: slime names a source unless there is no metadata at all
        if "source_names" not in data:
            return found or None
        if (source := data["source_names"][row]) != "unknown":
            found["source_name"] = source
    elif "raw_reward" in data:
        found["raw_reward"] = data["raw_reward"][row]
    return found


def _check_sums(data: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Samples of one rollout share a sum that slime will make again."""
    if "rollout_mask_sums" not in data:
        return
    sums: dict[Any, int] = {}
    for sample in samples:
        sums[sample["rollout_id"]] = sums.get(sample["rollout_id"], 0) + sum(sample["loss_mask"])
    if [float(value) for value in data["rollout_mask_sums"]] != [sums[sample["rollout_id"]] for sample in samples]:
        raise BadInput("rollout_mask_sums are not the sums of the loss masks: slime would not make them again")


def _list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
