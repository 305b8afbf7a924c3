"""Where slime's own source of prompts stands, taken from one and given to another: source_state.py, as a Ray job.

Uses slime's data source and samples of this pin, without engines. Says what each of two sources hands out next, after
the second was given the state of the first: a position in the middle of an epoch, metadata, two groups in the buffer.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any


def manager() -> Any:
    from slime.cross_job.boxes import Box  # noqa: F401  slime of either era

    samples = 2
    args = SimpleNamespace(
        rollout_global_dataset=False, prompt_data=None, n_samples_per_prompt=samples, buffer_filter_path=None
    )
    args.rollout_shuffle = False
    try:
        from slime.rollout.data_source import RolloutDataSourceWithBuffer

        return SimpleNamespace(args=args, data_source=RolloutDataSourceWithBuffer(args))
    except ImportError:
        from slime.ray.rollout_data_source import RolloutDataSource

        return SimpleNamespace(args=args, data_source=RolloutDataSource(args), buffer=[])


def add(manager: Any, groups: list[Any]) -> None:
    holder = manager if hasattr(manager, "buffer") else manager.data_source
    holder.buffer.extend(groups)


def told(manager: Any) -> Any:
    holder = manager if hasattr(manager, "buffer") else manager.data_source
    waiting = [[sample.to_dict() for sample in group] for group in holder.buffer]
    fresh = [[sample.index for sample in group] for group in manager.data_source.get_samples(2)]
    return {"buffer": waiting, "fresh": fresh, "metadata": manager.data_source.metadata}


if __name__ == "__main__":
    from slime.cross_job import data_source

    first, second, third = manager(), manager(), manager()
    aborted = first.data_source.get_samples(3)
    for number, sample in enumerate(sample for group in aborted[:2] for sample in group):
        sample.tokens, sample.response, sample.response_length = [1, 2, number], f"half a {number} …", 2
        sample.metadata = {"start_rollout_id": 7, "nested": [1.5, None]}
        sample.status = type(sample).Status.ABORTED
    add(first, aborted[:2])
    first.data_source.metadata["best"] = 0.25
    state = json.loads(json.dumps(data_source.state(first)))
    data_source.restore(second, state)
    print("SAID", json.dumps({"first": told(first), "second": told(second), "untouched": told(third)}), flush=True)
    sys.stdout.flush()
