"""One rollout and one training step of GRPO, over columns as slime names them.

`generate` needs nothing but the model, the seed and the rollout id, so the same id with the same weights is the same
rollout, in any process. `train_step` reads a mapping of columns: lists, or the read-only views of a batch. Both work
where the model is: on a CPU, or on a GPU.

Does NOT know Ray or cross-job.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from model import TinyDecoder, response_log_probs, sample
from recipe import Recipe
from task import EOS, PAD, VOCABULARY, SumTask, decode
from torch import Tensor

Columns = Mapping[str, Sequence[Any]]
TENSORS = {"tokens": torch.long, "loss_masks": torch.int, "rollout_log_probs": torch.float32}
"""The ragged columns, with their types as tensors."""


def build_model(recipe: Recipe, seed: int, device: str = "cpu") -> TinyDecoder:
    """A model with the weights of `seed`, the same on every device."""
    torch.manual_seed(seed)
    model = TinyDecoder(
        len(VOCABULARY), recipe.width, recipe.layers, recipe.heads, max_length=8 + recipe.max_new_tokens
    )
    return model.to(device)


def build_optimizer(model: TinyDecoder, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, betas=recipe.adam_betas)


def export_weights(model: TinyDecoder) -> dict[str, Tensor]:
    """Parameters by name, sharing the model's memory until they are published."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def load_weights(model: TinyDecoder, weights: Mapping[str, Any]) -> None:
    """Copy `weights` (read-only tensors, of any device) into the model. Raises KeyError if one is missing."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(weights[name])


def generate(model: TinyDecoder, task: SumTask, recipe: Recipe, rollout_id: int, seed: int) -> dict[str, list[Any]]:
    """Sample `n_samples` answers to each of `n_prompts` prompts; those of one prompt are consecutive."""
    device = model.head.weight.device
    prompts = task.prompts(seed, rollout_id, recipe.n_prompts)
    digest = hashlib.sha256(f"{seed}/{rollout_id}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    drawn = sample(model, [p.tokens for p in prompts], recipe.n_samples, recipe.max_new_tokens, EOS, generator)
    rewards, metadata = [], []
    for i, one in enumerate(drawn):
        prompt = prompts[i // recipe.n_samples]
        end = len(one.tokens) - (not one.truncated)
        text = decode(one.tokens[len(prompt.tokens) : end])
        rewards.append(0.0 if one.truncated else task.reward(text, prompt))
        metadata.append({"prompt": prompt.text, "response": text, "answer": prompt.answer})
    return {
        "tokens": [one.tokens for one in drawn],
        "response_lengths": [one.response_length for one in drawn],
        "rewards": rewards,
        "raw_reward": rewards,
        "truncated": [int(one.truncated) for one in drawn],
        "loss_masks": [[1] * one.response_length for one in drawn],
        "sample_indices": [rollout_id * len(drawn) + i for i in range(len(drawn))],
        "rollout_log_probs": [one.log_probs for one in drawn],
        "metadata": metadata,
    }


def as_tensors(columns: dict[str, list[Any]], device: str) -> dict[str, list[Any]]:
    """The same with a tensor a sample on `device`, as slime's newer versions have them, where they are ragged."""
    made = {
        name: [torch.tensor(row, dtype=dtype, device=device) for row in columns[name]]
        for name, dtype in TENSORS.items()
    }
    return columns | made


def train_step(
    model: TinyDecoder, optimizer: torch.optim.Optimizer, batch: Columns, recipe: Recipe, rollout_id: int
) -> dict[str, float]:
    """Update the model with rollout `rollout_id`: group-normalised advantages, clipped ratios, an entropy bonus, and a
    learning rate that falls with the id.

    Returns entropy (nats a token), clip_fraction and grad_norm, as means over the updates.
    """
    fraction = max(recipe.decay_to, 1 - rollout_id / recipe.decay_over)
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * fraction
    data = _Distinct(batch, recipe.n_samples, model.head.weight.device)
    n_groups = len(batch["rewards"]) // recipe.n_samples
    group_size = -(-n_groups // recipe.minibatches)
    figures = []
    for _ in range(recipe.epochs):
        for first in range(0, n_groups, group_size):
            rows = ((data.groups >= first) & (data.groups < first + group_size)).nonzero()[:, 0]
            figures.append(_update(model, optimizer, data, rows, recipe))
    return {k: float(np.mean([f[k] for f in figures])) for k in ("entropy", "clip_fraction", "grad_norm")}


class _Distinct:
    """The distinct samples of each group as padded tensors, with how often each was drawn: equal samples of a group
    have equal gradients, and after a while most are equal. Found on the CPU, then moved to `device`.
    """

    def __init__(self, batch: Columns, n_samples: int, device: torch.device):
        rewards = torch.tensor(np.asarray(batch["rewards"], dtype=np.float32)).view(-1, n_samples)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, unbiased=False) + 1e-4)
        lengths = torch.tensor([len(row) for row in batch["tokens"]])
        tokens = _padded(batch["tokens"], np.int64, PAD)
        groups = torch.arange(len(lengths)) // n_samples
        keys = torch.cat([groups[:, None], tokens], 1)
        _, inverse, count = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        places = torch.arange(len(lengths))
        first = torch.full((len(count),), len(lengths)).scatter_reduce(0, inverse, places, "amin")
        self.tokens, self.lengths, self.groups = (x[first].to(device) for x in (tokens, lengths, groups))
        response_lengths = torch.tensor(np.asarray(batch["response_lengths"], dtype=np.int64))
        self.response_lengths = response_lengths[first].to(device)
        self.old_log_probs = _padded(batch["rollout_log_probs"], np.float32, 0)[first].to(device)
        self.loss_masks = _padded(batch["loss_masks"], np.float32, 0)[first].to(device)
        self.advantages, self.weights = advantages.flatten()[first].to(device), count.float().to(device)


def _padded(rows: Sequence[Any], dtype: npt.DTypeLike, fill: float) -> Tensor:
    padded = np.full((len(rows), max(len(row) for row in rows)), fill, dtype=dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


def _update(
    model: TinyDecoder, optimizer: torch.optim.Optimizer, data: _Distinct, rows: Tensor, recipe: Recipe
) -> dict[str, float]:
    log_probs, entropies, _ = response_log_probs(
        model, data.tokens[rows], data.lengths[rows], data.response_lengths[rows]
    )
    width = log_probs.shape[1]
    weights = data.loss_masks[rows][:, :width] * data.weights[rows][:, None]
    total = weights.sum()
    ratio = ((log_probs - data.old_log_probs[rows][:, :width]) * (weights > 0)).exp()
    advantages = data.advantages[rows][:, None]
    clipped = ratio.clamp(1 - recipe.clip_low, 1 + recipe.clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages) + recipe.entropy * entropies
    optimizer.zero_grad()
    (-(objective * weights).sum() / total).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    optimizer.step()
    with torch.no_grad():
        return {
            "entropy": float((entropies * weights).sum() / total),
            "clip_fraction": float(((clipped != ratio) * weights).sum() / total),
            "grad_norm": float(norm),
        }
