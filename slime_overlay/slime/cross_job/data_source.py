"""Where slime's source of prompts stands: read after each generation, kept with the rollout, set before the next.

It is the data set's position (epoch, offset, sample indices), its metadata, and the samples that wait in the buffer
(partial rollouts, or what a custom generation gave back). Runs inside the actor that generates.
"""

import json
import logging
from typing import Any

logger = logging.getLogger(__name__)

_POSITION = ("epoch_id", "sample_offset", "sample_index", "sample_group_index")


def state(manager: Any) -> dict[str, Any]:
    """The state of slime's Buffer or RolloutManager, JSON-able."""
    source = manager.data_source
    found: dict[str, Any] = {n: v for n in _POSITION if isinstance(v := getattr(source, n, None), int)}
    for name, value in (
        ("metadata", dict(getattr(source, "metadata", None) or {})),
        ("buffer", [[sample.to_dict() for sample in group] for group in _holder(manager).buffer]),
    ):
        try:
            found[name] = json.loads(json.dumps(value, default=_plain))
        except TypeError as error:
            logger.warning("%s of the data source cannot be kept, a new rollout job will lack it: %s", name, error)
    return found


def stands_at(manager: Any, state: dict[str, Any]) -> bool:
    """Whether the source's position is that of `state`."""
    return all(getattr(manager.data_source, name) == state[name] for name in _POSITION if name in state)


def restore(manager: Any, state: dict[str, Any]) -> None:
    """Put the source to where `state` says; what it does not name stays."""
    source, holder = manager.data_source, _holder(manager)
    for name in _POSITION:
        if name in state:
            setattr(source, name, state[name])
    if "metadata" in state:
        source.metadata = dict(state["metadata"])
    if "buffer" in state:
        holder.buffer = [[_sample(sample) for sample in group] for group in state["buffer"]]
    if getattr(source, "dataset", None) is not None and manager.args.rollout_shuffle:
        source.dataset.shuffle(source.epoch_id)


def _holder(manager: Any) -> Any:
    """Who has the buffer: the manager itself up to v0.1, its data source from v0.3 on; a custom one may have none."""
    for holder in (manager, manager.data_source):
        if isinstance(getattr(holder, "buffer", None), list):
            return holder
    return _NoBuffer


class _NoBuffer:
    buffer: list[Any] = []  # noqa: RUF012


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists, which slime's samples hold as well."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is neither JSON nor an array")


def _sample(state: dict[str, Any]) -> Any:
    from slime.utils.types import Sample

    return Sample.from_dict(dict(state))
