"""slime's own generate, with a seed for each sample: `--custom-generate-function-path seeded_generate.generate`.

slime sends the same request for every sample of a prompt. The toy engine draws from the request alone, so a sample's
identity, its index in the data source, must be in it. sampling_params.sampling_seed is the field for that, and
sglang-router 0.3.2 passes it on; 0.1.9 drops what it does not know, so the same number also goes as a stop token far
outside any vocabulary, which stops nothing. SGLang uses the seed only with deterministic inference.
"""

import asyncio
import hashlib
import os

from hold import held
from slime.rollout import sglang_rollout

BEYOND_VOCABULARY = 2**30


def sampling_seed(rollout_seed: int, index: int) -> int:
    """A number of 30 bits (SGLang and the routers hold int32), the same in every process."""
    digest = hashlib.sha256(f"{rollout_seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 2


async def generate(args, sample, sampling_params):
    while held("SLIME_CPU_HOLD_ROLLOUT", sample.index // (args.rollout_batch_size * args.n_samples_per_prompt)):
        await asyncio.sleep(0.1)
    await asyncio.sleep(float(os.environ.get("SLIME_CPU_GENERATE_S") or 0))  # all samples of a rollout at once
    seed = sampling_seed(args.rollout_seed, sample.index)
    stops = [*(sampling_params.get("stop_token_ids") or ()), BEYOND_VOCABULARY + seed]
    params = {**sampling_params, "sampling_seed": seed, "stop_token_ids": stops}
    return await sglang_rollout.generate(args, sample, params)
