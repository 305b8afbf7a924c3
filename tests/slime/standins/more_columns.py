"""A generate whose samples have what images and experts leave in a rollout: `more_columns.generate`.

Stands for slime's processor, which makes `multimodal_train_inputs` of an image, and for an SGLang that returns the
experts of each token. The values depend on the sample alone.
"""

import seeded_generate
import torch


async def generate(args, sample, sampling_params, evaluation=False):
    await seeded_generate.generate(args, sample, sampling_params)
    rows, index = len(sample.tokens) - 1, sample.index
    sample.rollout_routed_experts = (torch.arange(rows * 4, dtype=torch.int32).reshape(rows, 2, 2) + index) % 8
    if index % 5:  # a prompt without an image
        patches = torch.linspace(0, index / 7, 4 * (index % 3 + 1)).reshape(-1, 4)
        sample.multimodal_train_inputs = {
            "pixel_values": patches.to(torch.bfloat16),
            "image_grid_thw": torch.tensor([[1, index % 3 + 1, 4]]),
        }
    return sample
