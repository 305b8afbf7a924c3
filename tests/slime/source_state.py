"""Where slime's own source of prompts stands, taken from one and given to another: source_state.py, as a Ray job.

Uses slime's data source and samples of this pin, without engines. Says what each of two sources hands out next, after
the second was given the state of the first: a position in the middle of an epoch, metadata, two groups in the buffer.
From v0.3 on, the same of a custom source (`Lines`, of --data-source-path), which keeps slime's contract.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def manager(source: str = "") -> Any:
    from slime.cross_job.adapter.boxes import Box  # noqa: F401  slime of either era

    samples = 2
    args = SimpleNamespace(
        rollout_global_dataset=False, prompt_data=None, n_samples_per_prompt=samples, buffer_filter_path=None
    )
    args.rollout_shuffle, args.save, args.load = False, None, None
    try:
        from slime.rollout.data_source import RolloutDataSourceWithBuffer
        from slime.utils.misc import load_function

        made = load_function(source) if source else RolloutDataSourceWithBuffer
        found = SimpleNamespace(args=args, data_source=made(args))
    except ImportError:
        from slime.ray.rollout_data_source import RolloutDataSource

        found = SimpleNamespace(args=args, data_source=RolloutDataSource(args), buffer=[])
    found.load = found.data_source.load
    return found


def add(manager: Any, groups: list[Any]) -> None:
    holder = manager if hasattr(manager, "buffer") else manager.data_source
    holder.buffer.extend(groups)


def told(manager: Any) -> Any:
    holder = manager if hasattr(manager, "buffer") else manager.data_source
    waiting = [[sample.to_dict() for sample in group] for group in holder.buffer]
    fresh = [[sample.index for sample in group] for group in manager.data_source.get_samples(2)]
    return {"buffer": waiting, "fresh": fresh, "metadata": manager.data_source.metadata}


def elsewhere(state: Any) -> Any:
    """As another process opens it."""
    from slime.cross_job.batch import Batch

    return Batch.from_ipc(state.ipc.to_pybytes())


def of_slime() -> dict[str, Any]:
    from slime.cross_job.adapter import data_source

    first, second, third = manager(), manager(), manager()
    aborted = first.data_source.get_samples(3)
    for number, sample in enumerate(sample for group in aborted[:2] for sample in group):
        sample.tokens, sample.response, sample.response_length = [1, 2, number], f"half a {number} …", 2
        sample.metadata = {"start_rollout_id": 7, 3: [1.5, None], "experts": torch.full((2, 2), number)}
        sample.status = type(sample).Status.ABORTED
        if hasattr(sample, "spec_info"):
            sample.spec_info.completion_token_num = 9
            sample.rollout_routed_experts = torch.full((3, 2, 2), number, dtype=torch.int32)
    add(first, aborted[:2])
    first.data_source.metadata["best"] = {4: 0.25}
    data_source.restore(second, elsewhere(data_source.state(first)))
    return {"first": repr(told(first)), "second": repr(told(second)), "untouched": repr(told(third))}


def of_a_user(folder: Path) -> dict[str, Any]:
    """A custom source, and one whose checkpoint the train job's --load has."""
    from slime.cross_job.adapter import data_source

    first, second, third, trained = (manager("source_state.Lines") for _ in range(4))
    first.data_source.get_samples(5)
    data_source.restore(second, elsewhere(data_source.state(first)))
    trained.args.save = str(folder)
    trained.args.rollout_global_dataset = third.args.rollout_global_dataset = True
    trained.data_source.get_samples(9)
    trained.data_source.save(3)
    data_source.restore(third, elsewhere(data_source.load(third, 3, str(folder))))
    return {name: one.data_source.get_samples(1)[0][0].index for name, one in locals().items() if hasattr(one, "args")}


def measured() -> dict[str, float]:
    """64 x 8 samples of 4096 tokens whose top-p ids wait in the buffer; the baseline is a copy of the arrays."""
    from slime.cross_job.adapter import data_source

    one = manager()
    groups = [g for _ in range(8) for g in one.data_source.get_samples(32)]
    arrays = []
    for number, sample in enumerate(sample for group in groups for sample in group):
        arrays.append(torch.full((8 * 4096,), number, dtype=torch.int32))
        sample.metadata = {}
        sample.rollout_top_p_token_ids = arrays[-1]
    add(one, groups)
    copy_s, state_s = [], []
    for _ in range(5):
        began = time.perf_counter()
        torch.cat(arrays)
        copied = time.perf_counter()
        state = data_source.state(one)
        copy_s.append(copied - began)
        state_s.append(time.perf_counter() - copied)
    nbytes = sum(array.nbytes for array in arrays)
    return {"copy_s": min(copy_s), "state_s": min(state_s), "times": state.nbytes / nbytes, "arrays": nbytes}


class Lines:
    """A source of a user's own, with a cursor in it: only slime's contract, and no class of slime's."""

    def __init__(self, args: Any):
        self.args, self._line = args, 0

    def get_samples(self, num_samples: int) -> Any:
        from slime.utils.types import Sample

        self._line += num_samples
        return [[Sample(index=self._line - num_samples + i)] for i in range(num_samples)]

    def save(self, rollout_id: int) -> None:
        if self.args.rollout_global_dataset:
            torch.save({"line": self._line}, Path(self.args.save, f"lines_{rollout_id}.pt"))

    def load(self, rollout_id: int | None = None) -> None:
        path = Path(self.args.load or "", f"lines_{rollout_id}.pt")
        if self.args.rollout_global_dataset and path.exists():
            self._line = torch.load(path)["line"]


if __name__ == "__main__":
    said = {**of_slime(), "measured": measured()}
    if len(sys.argv) > 1:
        said["custom"] = of_a_user(Path(sys.argv[1]))
    print("SAID", json.dumps(said), flush=True)
    sys.stdout.flush()
