"""Rollouts that slime splits for one layout of training ranks, and anew for another: a Ray job at v0.3.1.

    layouts.py SLIME-ARGUMENTS

Splits random rollouts with slime's own code for layout A, hands the parts through batches, splits them anew for layout
B, and compares with what slime makes of the same rollout for B. Says for each case where they differ.
"""

import copy
import itertools
import json
import random
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

_SIZES = ("dp_size", "cp_size", "vpp_size", "microbatch_group_size_per_vp_stage")
LAYOUTS = [
    *((1, 1, 1, 1), (2, 1, 1, 1), (4, 1, 1, 1)),
    (2, 2, 1, 1),  # context parallel
    (2, 1, 2, 2),  # pipeline parallel, two stages of the model a rank
]
"""What training ranks say of themselves, as _SIZES. Tensor parallel ranks are in none: they read the same part."""
WAYS = [  # (arguments that both layouts share, samples with one rollout id)
    ({"balance_data": False}, 1),
    ({"balance_data": True}, 1),
    ({"use_dynamic_batch_size": True, "max_tokens_per_gpu": 200, "balance_data": True}, 2),
    ({"global_batch_size": 24, "micro_batch_size": 2}, 1),  # of 64: the last 16 fill no batch
]


def rollout(number: int, samples: int, together: int) -> dict[str, Any]:
    """slime's training data: `together` samples share a rollout id."""
    draw = random.Random(number)
    lengths = [draw.randrange(1, 60) for _ in range(samples)]
    masks = [[draw.randrange(2) for _ in range(length)] for length in lengths]
    return {
        "tokens": [[draw.randrange(150_000) for _ in range(length + 5)] for length in lengths],
        "response_lengths": lengths,
        "rewards": [draw.choice([draw.random(), 0.1, 1 / 3]) for _ in lengths],
        "raw_reward": [draw.choice([0.0, 1.0]) for _ in lengths],
        "truncated": [draw.randrange(2) for _ in lengths],
        "sample_indices": [1000 * number + index for index in range(samples)],
        "rollout_ids": [7 * number + index // together for index in range(samples)],
        "loss_masks": masks,
        "rollout_mask_sums": [sum(mask) for mask in masks],
        "rollout_log_probs": [[-draw.expovariate(0.3) for _ in range(length)] for length in lengths],
        "source_names": [draw.choice(["math", "code"]) for _ in lengths],
    }


def compare(
    before: Namespace, after: Namespace, data: dict[str, Any], layouts: Sequence[tuple[int, ...]]
) -> list[str]:
    from slime.ray.rollout import RolloutManager

    from slime.cross_job.adapter.dp_split import anew, split
    from slime.cross_job.adapter.training_data import pack, unpack
    from slime.cross_job.errors import BadInput

    first, second = (dict(zip(_SIZES, layout, strict=True)) for layout in layouts)

    def manager(args: Namespace, config: dict[str, int]) -> Any:
        made = object.__new__(type(RolloutManager))
        made.args, made.train_parallel_config = args, config
        return made

    parts, how = split(manager(before, first), copy.deepcopy(data))
    theirs, how_after = split(manager(after, second), copy.deepcopy(data))
    try:
        ours = anew([unpack(pack(part)) for part in parts], json.loads(json.dumps(how)), after, second)
    except BadInput as error:
        needs_more = {i for i, _ in how["left_out"]} - {i for i, _ in how_after["left_out"]}
        return [] if needs_more else [str(error)]
    from equal import differences  # beside this program

    return differences("parts", theirs, ours)


if __name__ == "__main__":
    from slime.utils.arguments import parse_args

    arguments = parse_args()
    for number, ((changed, together), before, after) in enumerate(itertools.product(WAYS, LAYOUTS, LAYOUTS)):
        args = Namespace(**{**vars(arguments), **changed})
        args.global_batch_size //= together
        found = compare(args, args, rollout(number, 64, together), (before, after))
        print("SAID", json.dumps({"case": [changed, before, after], "differences": found[:5]}), flush=True)
    for number, (before, after) in enumerate(itertools.permutations((6, 8, 12, 24, 32, 64), 2)):
        small = {**vars(arguments), "micro_batch_size": 1}  # what is left out for one may be needed for the other
        first, second = (Namespace(**{**small, "global_batch_size": size}) for size in (before, after))
        found = compare(first, second, rollout(number, 64, 1), LAYOUTS[:2])
        print("SAID", json.dumps({"case": ["batch", before, after], "differences": found[:5]}), flush=True)
