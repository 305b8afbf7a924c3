"""slime's training data as samples: everything that slime trains on is in them, or is refused by name.

That slime's own code makes the same training data of them again: tests/slime/test_replay.py.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slime.cross_job.adapter.conversion import published, to_samples
from slime.cross_job.adapter.training_data import pack, unpack
from slime.cross_job.batch import Batch
from slime.cross_job.errors import BadInput

RAW = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]


def normalised(raw, size, by_deviation=True):
    groups = np.asarray(raw, np.float32).reshape(-1, size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    made = centred / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-6) if by_deviation else centred
    return made.ravel().tolist()


def whole(**changed):
    """Training data as slime v0.1.0 makes it."""
    made = {
        "tokens": [[10 + row] * (row + 2) for row in range(8)],
        "response_lengths": [row + 1 for row in range(8)],
        "rewards": normalised(RAW, 4),
        "raw_reward": RAW,
        "truncated": [0, 1, 0, 0, 0, 0, 0, 0],
        "sample_indices": [40 + row for row in range(8)],
        "loss_masks": [[1] * (row + 1) for row in range(8)],
        "rollout_log_probs": [[-0.5] * (row + 1) for row in range(8)],
        **changed,
    }
    return {key: value for key, value in made.items() if value is not None}


def split(data, partitions=((6, 1, 3, 0), (2, 4, 5, 7)), left_out=()):
    """The same as v0.3 splits it, and what is said of that."""
    kept = {index for partition in partitions for index in partition}
    data = {**data, "rollout_ids": [9 + row // 2 for row in range(8)], "source_names": ["unknown"] * 8}
    sums = [sum(map(sum, data["loss_masks"][row // 2 * 2 : row // 2 * 2 + 2])) for row in range(8)]
    data = {"rollout_mask_sums": sums, **data}
    lengths = [len(tokens) for tokens in data["tokens"]]
    apart = {"raw_reward": data.pop("raw_reward"), "total_lengths": lengths}
    parts = [
        {"partition": [*mine], **{key: [values[i] for i in mine] for key, values in data.items()}, **apart}
        for mine in partitions
    ]
    missing = [[index, data["rollout_ids"][index]] for index in range(8) if index not in kept]
    how = {"layout": {}, "whole": [*apart], "made": ["partition"], "left_out": missing}
    return [pack(part) for part in parts], {"split": how}


def test_samples_hold_what_slime_trains_on():
    samples = to_samples([pack(whole())], {})
    assert len(samples) == 8
    assert samples[1] == {
        "tokens": [11, 11, 11],
        "response_length": 2,
        "index": 41,
        "loss_mask": [1, 1],
        "rollout_log_probs": [-0.5, -0.5],
        "reward": 0.0,
        "status": "truncated",
        "metadata": {"raw_reward": 0.0},
    }
    assert [sample["reward"] for sample in samples] == RAW
    assert {sample["status"] for sample in samples} == {"completed", "truncated"}


def test_what_slime_split_is_put_in_its_order_again():
    samples = to_samples(*split(whole()))
    assert [sample["index"] for sample in samples] == [40 + row for row in range(8)]
    assert [sample["rollout_id"] for sample in samples] == [9, 9, 10, 10, 11, 11, 12, 12]
    assert [sample["reward"] for sample in samples] == RAW
    assert samples[3]["metadata"] == {}


@pytest.mark.parametrize(
    "rewards", [normalised(RAW, 2), normalised(RAW, 8), normalised(RAW, 4, by_deviation=False), RAW]
)
def test_rewards_that_slime_makes_again_are_exported_raw(rewards):
    assert [sample["reward"] for sample in to_samples([pack(whole(rewards=rewards))], {})] == RAW


def test_equal_rewards_are_normalised_to_noise_and_known_again():
    equal = [0.1] * 8
    noise = [1e-3, -1e-3] * 4
    assert [s["reward"] for s in to_samples([pack(whole(raw_reward=equal, rewards=noise))], {})] == equal


def test_rewards_that_were_never_normalised():
    samples = to_samples([pack(whole(rewards=RAW, raw_reward=None, round_number=[3] * 8))], {})
    assert samples[0]["reward"] == 1.0
    assert samples[0]["metadata"] == {"round_number": 3}


def test_a_source_is_kept_and_no_metadata_at_all_stays_none():
    batches, meta = split(whole())
    data = [dict(batch.to_pydict(), **batch.attrs["values"]) for batch in batches]
    named = [pack({**part, "source_names": ["math"] * 4}) for part in data]
    assert {sample["metadata"]["source_name"] for sample in to_samples(named, meta)} == {"math"}
    unnamed = [pack({key: value for key, value in part.items() if key != "source_names"}) for part in data]
    assert {sample["metadata"] for sample in to_samples(unnamed, meta)} == {None}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (whole(rewards=[0.25 * row for row in range(8)]), "rewards are not those that slime makes of raw_reward"),
        (whole(rewards=RAW, raw_reward=["a"] * 8), "rewards are not those"),
        (whole(hints=[1] * 8), "training data has hints, for which slime's samples have no field"),
        (whole(truncated=None, sample_indices=None), "this training data has no truncated, sample_indices"),
        (whole(temperature=1.0), "training data has temperature"),
        (whole(rollout_mask_sums=[1.0] * 8, rollout_ids=[*range(8)]), "rollout_mask_sums are not the sums"),
        (whole(loss_masks=[[1]] * 7), "training data has 8 samples, but columns of another length: loss_masks"),
    ],
)
def test_what_samples_cannot_say_is_refused(data, said):
    with pytest.raises(BadInput, match=said):
        to_samples([pack(data)], {})


def test_batches_that_are_not_slimes_are_refused():
    with pytest.raises(BadInput, match="no training data of slime: they were published as plain columns"):
        to_samples([Batch.pack({"tokens": [[1]]})], {})
    with pytest.raises(BadInput, match="in 2 parts does not say how slime split it"):
        to_samples([pack(whole())] * 2, {})


def test_samples_that_slime_left_out_are_missed():
    with pytest.raises(BadInput, match=r"slime left 2 samples out when it split this rollout"):
        to_samples(*split(whole(), partitions=((0, 1, 2), (3, 4, 5))))


@pytest.mark.parametrize("name", ["rewards", "raw_reward"])
@pytest.mark.parametrize(
    ("make", "mean"),
    [
        (lambda r: r, 0.625),
        (tuple, 0.625),
        (np.float32, 0.625),
        (lambda r: [*np.float32(r)], 0.625),
        (lambda r: torch.tensor(r, dtype=torch.bfloat16), 0.625),
        (lambda r: [*torch.tensor(r)], 0.625),
        (lambda r: [{"score": value} for value in r], None),
        (lambda r: np.float32([r, r]).T, None),
    ],
    ids=["list", "tuple", "array", "list of scalars", "tensor", "list of tensors", "dicts", "several each"],
)
def test_rewards_are_published_in_whatever_type_a_hook_returns_them(make, mean, name):
    """slime asks of --custom-reward-post-process-path only that what it returns has the length of the samples."""
    data = (
        whole(rewards=RAW, raw_reward=make(RAW)) if name == "raw_reward" else whole(rewards=make(RAW), raw_reward=None)
    )
    batches, meta = published(SimpleNamespace(args=None), dict(data))
    assert meta.get("reward") == mean
    found = unpack(Batch.from_ipc(batches[0].ipc.to_pybytes()))[name]
    assert type(found) is type(data[name])
    assert len(found) == len(RAW)
    if mean is not None:
        assert [float(reward) for reward in found] == RAW
        assert [float(sample["reward"]) for sample in to_samples(batches, {})] == RAW


def test_no_rewards_are_no_error():
    assert "reward" not in published(SimpleNamespace(), whole(rewards=None, raw_reward=None))[1]
