"""slime's training data through a batch: equal values and types, own memory where slime writes, nothing lost."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from slime.cross_job.adapter.training_data import Samples, open_rows, pack, unpack
from slime.cross_job.batch import Batch
from slime.cross_job.errors import BatchError

WHOLE = {  # as slime up to v0.1 makes it
    "tokens": [[5, 6, 7], [8], [151_000, 2]],
    "response_lengths": [2, 1, 1],
    "rewards": [0.1, 1 / 3, -1.0],
    "truncated": [0, 1, 0],
    "loss_masks": [[1, 0], [1], [0]],
    "rollout_log_probs": [[-0.1, -2.5], [-1e-9], [-3.3]],
}
PART = {  # as slime from v0.3 on makes one for each rank
    "partition": [2, 0],
    "tokens": [[1, 2], [3]],
    "multimodal_train_inputs": [None, {"pixels": np.ones((2, 2), np.float32)}],
    "raw_reward": [0.5, 0.25, 1.0],
    "total_lengths": [1, 7, 2],
    "global_batch_sizes": [4],
    "micro_batch_indices": [[0], [1]],
    "num_microbatches": [2],
}


def through(data):
    """What another job opens."""
    return Batch.from_ipc(pack(data).ipc.to_pybytes())


def same(ours, theirs):
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert repr(ours[key]) == repr(value), key


@pytest.mark.parametrize("data", [WHOLE, PART], ids=["whole", "part"])
def test_what_comes_out_is_what_went_in(data):
    same(unpack(through(data)), data)


def test_rows_that_are_asked_for_equal_slimes_lists():
    opened = open_rows(through(WHOLE))
    assert list(opened) == list(WHOLE)
    for key in ("response_lengths", "rewards", "truncated"):
        assert repr(opened[key]) == repr(WHOLE[key])
    for key in ("tokens", "loss_masks", "rollout_log_probs"):
        rows = opened[key]
        assert isinstance(rows, Samples)
        assert [len(row) for row in rows] == [len(row) for row in WHOLE[key]]
        assert [list(row) for row in rows[0::2]] == WHOLE[key][0::2]
        assert list(rows[1]) == WHOLE[key][1]
    assert repr(opened["rollout_log_probs"][0]) == repr(WHOLE["rollout_log_probs"][0]), (
        "slime must round floats itself"
    )


def test_arrays_may_be_written_to():
    batch = through(PART)
    for _ in range(2):
        pixels = unpack(batch)["multimodal_train_inputs"][1]["pixels"]
        assert pixels.sum() == 4
        pixels[:] = 7


@pytest.mark.parametrize("data", [{}, {"tokens": []}, {"rewards": [1.0]}])
def test_a_rollout_without_samples_is_refused(data):
    with pytest.raises(BatchError, match="no samples"):
        pack(data)


class Loss(Enum):
    PPO = "ppo"


def test_paths_enums_and_sets_go_in_as_what_they_stand_for(caplog):
    meta = [{"from": Path("a/b"), "loss": [Loss.PPO], Loss.PPO: {3, 1}, 7: (Path("c"),)}, None]
    found = unpack(through({"tokens": [[1], [2]], "metadata": meta, "rule": Loss.PPO}))
    assert found["metadata"] == [{"from": "a/b", "loss": ["ppo"], "ppo": [1, 3], 7: ("c",)}, None]
    assert found["rule"] == "ppo"
    assert "metadata of the training data holds a PosixPath: training gets its text" in caplog.text


@dataclass
class Plan:
    steps: int = 1


@pytest.mark.parametrize("value", [Plan(), {Loss.PPO: 1, "ppo": 2}, {"at": {Plan}}], ids=repr)
def test_what_stands_for_nothing_plain_is_refused_by_name(value):
    with pytest.raises(BatchError, match="column 'metadata', sample 1"):
        pack({"tokens": [[1], [2]], "metadata": [{}, value]})
