"""Samples that become training data, samples again, and training data again: a Ray job at each pin, without engines.

    conversions.py SLIME-ARGUMENTS

Random samples, as slime dumps them, through slime's own code and back through conversion.py. Says for each case what
slime made of them, and whether it makes the same bytes of what came back.
"""

import itertools
import json
import random
from argparse import Namespace
from typing import Any

RANKS = 2
CASES = [*itertools.product(("normalise", ""), ("by deviation", ""), ("log-probs", ""), ("metadata", ""))]


def samples(case: tuple[str, ...], number: int, count: int) -> list[dict[str, Any]]:
    """As slime's --save-debug-rollout-data writes them."""
    from slime.utils.types import Sample

    draw = random.Random(number)
    made = []
    for index in range(count):
        prompt, length = draw.randrange(1, 40), draw.randrange(1, 60)
        sample = Sample(
            index=1000 * number + index,
            prompt=f"prompt {index}",
            response="é" * length,
            label=str(index),
            tokens=[draw.randrange(150_000) for _ in range(prompt + length)],
            response_length=length,
            reward=draw.choice([draw.random(), 0.1, 1 / 3, 1.0]),
            loss_mask=draw.choice([None, [draw.randrange(2) for _ in range(length)]]),
            status=draw.choice([Sample.Status.COMPLETED, Sample.Status.TRUNCATED]),
        )
        if case[2] and hasattr(sample, "rollout_log_probs"):
            sample.rollout_log_probs = [-draw.expovariate(0.3) for _ in range(length)]
        if case[3]:
            sample.metadata = {"round_number": draw.randrange(5), "source_name": draw.choice(["math", "code"])}
            if hasattr(sample, "rollout_id"):
                sample.rollout_id, sample.remove_sample = 7 * number + index // 2, draw.random() < 0.2
        made.append(sample.to_dict())
    return made


if __name__ == "__main__":
    from slime.utils.arguments import parse_args

    from slime.cross_job.adapter.conversion import by_slime, to_samples

    arguments = parse_args()
    for number, case in enumerate(CASES):
        changed = {"rewards_normalization": bool(case[0]), "grpo_std_normalization": bool(case[1])}
        args = Namespace(**{**vars(arguments), **changed})
        count = args.rollout_batch_size * args.n_samples_per_prompt
        if case[3]:
            args.global_batch_size //= 2  # rollouts, of two samples each, from v0.3 on
        parts, meta = by_slime(args, samples(case, number, count), RANKS)
        back = to_samples(parts, meta)
        again, meta_again = by_slime(args, back, RANKS)
        same = [part.ipc for part in again] == [part.ipc for part in parts] and meta_again == meta
        told = {"case": case, "same": same, "parts": len(parts), "columns": [*parts[0]], "samples": len(back)}
        print("SAID", json.dumps(told), flush=True)
