"""PPO's critic on the CPU: stands for slime's value head and value loss, and hands values over as slime's critic does.

The critic is a Trainer (trainer.py) whose model gives a value for each token, in the place of logits. Advantages and
returns are those of slime's own ppo_utils, from the reward of a sample at its last token, without a KL term. The loss
is slime's: squared error, clipped around the values of before the first step, a mean over each response's tokens, then
over the global batch.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trainer import Batch

HEAD = "lm_head.weight"  # where gpt.py keeps the weight of whatever layer comes last


class ValueHead(torch.nn.Linear):
    """In the place of megatron's output layer, and called as that."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1, bias=False)
        torch.nn.init.normal_(self.weight, std=0.02)

    def forward(self, hidden, weight=None, runtime_gather_output=None):
        return super().forward(hidden), None


def with_head(tensors: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A language model's weights, with the model's own value head."""
    return {**tensors, HEAD: model.output_layer.weight.detach()}


def response_values(model: torch.nn.Module, tokens: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
    """Value before each response token (the last lengths[i] of tokens[i]), one padded forward pass."""
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    values = model(input_ids=ids, position_ids=positions, attention_mask=None).squeeze(-1)
    rows = zip(values, tokens, lengths, strict=True)
    return [row[len(token) - 1 - length : len(token) - 1] for row, token, length in rows]


def advantages_and_returns(args, batch: "Batch", values: list[torch.Tensor]) -> tuple[list, list]:
    """For each sample one advantage and one return for each response token."""
    from slime.utils.ppo_utils import get_advantages_and_returns_batch

    rewards = [torch.zeros(length) for length in batch.lengths]
    for row, reward in zip(rewards, batch.rewards, strict=True):
        row[-1] = reward
    total = [len(tokens) for tokens in batch.tokens]
    return get_advantages_and_returns_batch(total, batch.lengths, values, rewards, args.gamma, args.lambd)


@torch.no_grad()
def values(model: torch.nn.Module, batch: "Batch") -> list[torch.Tensor]:
    """Of each response token of each of this rank's samples."""
    found: dict[int, torch.Tensor] = {}
    for micro in batch.micros():
        found.update(zip(micro, response_values(model, *batch.inputs(micro)), strict=True))
    return [found[i] for i in range(len(batch.tokens))]


def loss(args, model: torch.nn.Module, batch: "Batch", old: list[torch.Tensor]) -> Callable[[list[int]], torch.Tensor]:
    """A micro-batch's part of the loss, as a function of it; `old` are the values of before the first step."""
    _, returns = advantages_and_returns(args, batch, old)

    def of(micro: list[int]) -> torch.Tensor:
        total = torch.zeros(())
        for i, new in zip(micro, response_values(model, *batch.inputs(micro)), strict=True):
            near = old[i] + (new - old[i]).clamp(-args.value_clip, args.value_clip)
            total = total + batch.mean(i, torch.maximum((near - returns[i]) ** 2, (new - returns[i]) ** 2))
        return total / batch.global_batch

    return of
