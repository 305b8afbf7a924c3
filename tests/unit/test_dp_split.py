"""Parts that slime made of a rollout, put together again; with slime's own split: tests/slime/test_layout.py."""

from types import SimpleNamespace

from slime.cross_job.adapter.dp_split import differences, layout, split, together

HOW = {
    "whole": ["raw_reward", "total_lengths"],
    "made": ["partition", "num_microbatches"],
    "layout": {},
    "left_out": [],
}


def part(*partition: int, lengths: list[int]) -> dict[str, object]:
    return {
        "partition": [*partition],
        "tokens": [[index] * lengths[index] for index in partition],
        "rollout_ids": [10 + index for index in partition],
        "raw_reward": [index / 10 for index in range(len(lengths))],
        "total_lengths": lengths,
        "num_microbatches": [1],
    }


def test_parts_together_are_the_rollout_in_its_own_order():
    lengths = [3, 1, 2, 5]
    data, left_out = together([part(3, 0, lengths=lengths), part(1, 2, lengths=lengths)], HOW)
    assert left_out == set()
    assert data == {
        "tokens": [[0, 0, 0], [1], [2, 2], [3, 3, 3, 3, 3]],
        "rollout_ids": [10, 11, 12, 13],
        "raw_reward": [0.0, 0.1, 0.2, 0.3],
        "total_lengths": lengths,
    }


def test_samples_that_slime_left_out_stand_in_by_their_length_and_id():
    lengths = [3, 1, 2, 5]
    data, left_out = together(
        [part(1, lengths=lengths), part(0, lengths=lengths)], {**HOW, "left_out": [[2, 17], [3, 17]]}
    )
    assert left_out == {2, 3}
    assert [len(tokens) for tokens in data["tokens"]] == lengths
    assert data["rollout_ids"] == [10, 11, 17, 17]


def test_what_splits_nothing_says_nothing_of_it():
    data = {"tokens": [[1]]}
    assert split(SimpleNamespace(), data) == ([data], {})


def test_what_the_split_depends_on_is_of_the_layout():
    args = SimpleNamespace(micro_batch_size=2, balance_data=True, lr=0.1)
    assert layout(args, {"dp_size": 4}) == {
        "global_batch_size": None,
        "micro_batch_size": 2,
        "use_dynamic_batch_size": None,
        "max_tokens_per_gpu": None,
        "balance_data": True,
        "balance_by_flops": None,
        "dp_size": 4,
    }


def test_layouts_that_differ_are_told_in_words():
    args = SimpleNamespace(global_batch_size=8)
    before = {"global_batch_size": 16, "dp_size": 2, "balance_data": True}
    assert differences(before, args, {"dp_size": 2}) == (
        "global_batch_size was 16, now 8; balance_data was True, now not set"
    )
