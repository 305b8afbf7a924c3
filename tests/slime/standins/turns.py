"""A generate in two halves and a filter whose outcome depends on no clock: `turns.generate` and `turns.keep`.

slime takes the groups that are first ready, and aborts the rest. Here group after group gets ready: each sample draws
half of its tokens at once, then waits for its turn. So what is aborted has half a response, as a request that SGLang
aborts, and a single job and two jobs take the same groups.
"""

import asyncio
from contextlib import contextmanager

import seeded_generate
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.types import Sample

_TURNS = 50  # of the event loop: slime has seen by then that a group is ready, and aborts the others if it is the last
_active: dict[int, int] = {}  # group -> its samples that are not ready


async def generate(args, sample, sampling_params, evaluation=False):
    if evaluation:
        return await seeded_generate.generate(args, sample, sampling_params)
    half = {**sampling_params, "max_new_tokens": args.rollout_max_response_len // 2}
    with _one_of(sample.group_index):
        if not sample.response_length:
            await seeded_generate.generate(args, sample, half)
        if sample.status == Sample.Status.COMPLETED:
            return sample
        while min(_active) < sample.group_index and not GenerateState(args).aborted:
            await asyncio.sleep(0)
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        sample.status = Sample.Status.ABORTED
        if not GenerateState(args).aborted:
            await seeded_generate.generate(args, sample, half)
    return sample


@contextmanager
def _one_of(group):
    _active[group] = _active.get(group, 0) + 1
    try:
        yield
    finally:
        _active[group] -= 1
        if not _active[group]:
            del _active[group]


def keep(args, samples, **kwargs):
    """Every third group is dropped."""
    return DynamicFilterOutput(keep=samples[0].group_index % 3 != 2, reason="every_third")
