"""How slime splits a rollout among data-parallel ranks (from v0.3 on), and how a train job of another layout gets it.

The rollout job runs slime's own split, for the layout that the train job announced, and publishes a part a rank.
A train job that is started again with other resources finds rollouts behind its checkpoint that were split for the
layout of before: their parts are put together again, and slime's own split is run anew.
"""

import inspect
from collections.abc import Mapping, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

from ..errors import BadInput
from ..types import in_words

ARGUMENTS = (
    *("global_batch_size", "micro_batch_size", "use_dynamic_batch_size", "max_tokens_per_gpu"),
    *("balance_data", "balance_by_flops"),
)
"""Arguments of slime that the split depends on; besides, what training ranks say of themselves."""


def split(manager: Any, data: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """slime's training data as slime splits it: one dict per DP rank from v0.3 on, before that one in all.

    Runs slime's own `_split_train_data_by_dp`, but keeps the dicts that it would put into the object store: a ref of
    this process would die with it.

    Returns (parts, how they were split: what `anew` needs to know, JSON-able; {} where slime splits nothing).
    """
    split_by_dp = getattr(type(manager), "_split_train_data_by_dp", None)
    if split_by_dp is None:
        return [data], {}
    parts = _split(split_by_dp, manager, data)
    return parts, {
        "layout": layout(manager.args, manager.train_parallel_config),
        "whole": [key for key in parts[0] if key in data and parts[0][key] is data[key]],
        "made": [key for key in parts[0] if key not in data],
        "left_out": [[index, data["rollout_ids"][index]] for index in sorted(_left_out(parts))],
    }


def layout(args: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """All that slime's split depends on, besides the data; `config` is slime's `train_parallel_config`."""
    return {**{name: getattr(args, name, None) for name in ARGUMENTS}, **config}


def differences(found: Mapping[str, Any], args: Any, config: Mapping[str, Any]) -> str:
    """In words, how the layout that a rollout was split for differs from this one."""
    now = layout(args, config)
    differs = [name for name in now if found.get(name) != now[name]]
    return "; ".join(f"{name} was {in_words(found.get(name))}, now {in_words(now[name])}" for name in differs)


def anew(
    parts: Sequence[Mapping[str, Any]], how: Mapping[str, Any], args: Any, config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Parts of a rollout, split as `how` says, as slime splits the same rollout for this layout.

    Raises:
        BadInput: slime left samples out when it split the rollout first, and would not now.
    """
    from slime.ray.rollout import RolloutManager

    data, left_out = together(parts, how)
    stand_in = SimpleNamespace(args=args, train_parallel_config=config)
    made = _split(type(RolloutManager)._split_train_data_by_dp, stand_in, data)
    if left_out.intersection(index for part in made for index in part["partition"]):
        raise BadInput(
            f"a rollout was split for another layout ({differences(how['layout'], args, config)}), and "
            f"{len(left_out)} samples of it were left out, which this layout needs: start both jobs with the "
            "--global-batch-size that they had before"
        )
    return made


def together(parts: Sequence[Mapping[str, Any]], how: Mapping[str, Any]) -> tuple[dict[str, Any], set[int]]:
    """(the data from which slime made these parts, indices of the samples that are in none of them).

    slime leaves out the last samples, those that do not fill a global batch. Where they were are their lengths, their
    rollout ids and another sample's values: enough for slime to count them, and to leave them out again.
    """
    lengths = parts[0]["total_lengths"]
    left_out = dict(how["left_out"])
    data: dict[str, Any] = {}
    for key in parts[0]:
        if key in how["whole"]:
            data[key] = parts[0][key]
        elif key not in how["made"]:
            data[key] = [parts[0][key][0]] * len(lengths)
            for part in parts:
                for index, value in zip(part["partition"], part[key], strict=True):
                    data[key][index] = value
    for index, rollout_id in left_out.items():
        data["tokens"][index] = range(lengths[index])
        data["rollout_ids"][index] = rollout_id
    return data, {*left_out}


def _left_out(parts: Sequence[Mapping[str, Any]]) -> set[int]:
    """Indices of the samples that are in no part."""
    every = set(range(len(parts[0]["total_lengths"])))
    return every.difference(index for part in parts for index in part["partition"])


def with_globals(function: Any, **replaced: Any) -> Any:
    """The same code with other globals: slime's logic stays slime's, whatever a pin makes of it."""
    scope = {**function.__globals__, **replaced}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _split(split_by_dp: Any, manager: Any, data: dict[str, Any]) -> list[dict[str, Any]]:
    keeping = SimpleNamespace(put=lambda value, **_: value)
    split_by_dp = inspect.unwrap(split_by_dp)  # Ray wraps the methods of an actor
    return with_globals(split_by_dp, ray=keeping, Box=lambda inner: inner)(manager, data)
