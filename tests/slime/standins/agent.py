"""An agent of two turns with a tool between, `agent.generate`; rewards of several values, `agent.score`.

Stands for users' code. The model draws a few tokens, a tool answers with tokens that nobody trains on, the model goes
on. Of every second sample both turns are handed out, as two samples of one rollout (slime's --custom-generate-function
may return a list).
"""

import copy

import numpy as np
import reward_gym
import seeded_generate
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.types import Sample

_TURN = 2  # tokens


async def generate(args, sample, sampling_params, evaluation=False):
    sample.rollout_id = sample.index
    await seeded_generate.generate(args, sample, {**sampling_params, "max_new_tokens": _TURN})
    if sample.status == Sample.Status.COMPLETED:
        return [sample]
    first = copy.deepcopy(sample)
    said = f" tool {sample.index} "
    sample.append_response_tokens(args, tokens=GenerateState(args).tokenizer.encode(said), trainable=False, text=said)
    sample.status = Sample.Status.ABORTED  # so that slime's generate goes on
    await seeded_generate.generate(args, sample, {**sampling_params, "max_new_tokens": sample.response_length + _TURN})
    return [first, sample] if sample.index % 2 else [sample]


def _parts(sample):
    return reward_gym.score(sample.response, sample.response_length, str(sample.label)), sample.response_length


async def score(args, samples, **kwargs):
    """A dict for each sample, see --reward-key."""
    return [{"score": total, "parts": np.array([total, length])} for total, length in map(_parts, samples)]


def mean(args, samples):
    """--custom-reward-post-process-path: raw rewards, and those that are trained on, an array."""
    total = np.array([sample.reward["parts"] @ [1.0, -0.01] for sample in samples], dtype=np.float32)
    return [float(one) for one in total], total - total.mean()
