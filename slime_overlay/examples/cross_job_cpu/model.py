"""A small decoder-only transformer in plain torch, its sampler, and the log-probabilities of what it sampled.

Guarantees: with one torch thread, the same weights, prompts and generator state give the same samples bit for bit;
`response_log_probs` gives what `sample` recorded to 1e-4 (the two batch differently, so not to the last bit).

Does NOT know the task or any reward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sample:
    """One response. `tokens` is prompt plus response; `log_probs` has one number for each response token."""

    tokens: list[int]
    response_length: int
    log_probs: list[float]
    truncated: bool


class _Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        # Wide apart from the start: with torch's defaults the answers to all prompts rise and fall together for long.
        with torch.no_grad():
            self.qkv.weight[2 * width :] *= 2  # the values
            self.attention_out.weight.mul_(2)
            self.mlp_in.weight.mul_(3)
            self.mlp_in.bias.mul_(3)

    def forward(self, x: Tensor, mask: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output and the keys and values of all positions so far, `[2, batch, heads, time, head]`."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, present = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1:].permute(2, 0, 3, 1, 4)
        if past is not None:
            present = torch.cat([past, present], dim=3)
        mixed = F.scaled_dot_product_attention(query, present[0], present[1], attn_mask=mask)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + self.mlp_out(hidden), present


class TinyDecoder(nn.Module):
    """Decoder-only transformer over at most `max_length` tokens."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=1.0)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, past: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        present = []
        for index, block in enumerate(self.blocks):
            x, keys_values = block(x, mask, None if past is None else past[index])
            present.append(keys_values)
        return self.head(self.final_norm(x)), present


@torch.no_grad()
def sample(
    model: TinyDecoder,
    prompts: Sequence[Sequence[int]],
    n_samples: int,
    max_new_tokens: int,
    eos: int,
    generator: torch.Generator,
) -> list[Sample]:
    """Sample `n_samples` responses a prompt at temperature 1; those of one prompt are consecutive.

    A response ends with `eos`, or is truncated after `max_new_tokens`. `generator` is one of the model's device.
    """
    device = model.head.weight.device
    longest = max(len(prompt) for prompt in prompts)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    # Prompts are padded on the left, so that all responses start in the same column. A column left of a prompt is
    # attended to by nobody but itself (a row of nothing but -inf would be NaN).
    tokens = torch.tensor([[eos] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    columns = torch.arange(longest + max_new_tokens, device=device)
    real = columns[None, :] >= padding[:, None]
    causal = columns[:longest, None] >= columns[None, :longest]
    mask = (causal & real[:, None, :longest]) | torch.eye(longest, dtype=torch.bool, device=device)
    positions = (columns[None, :longest] - padding[:, None]).clamp(min=0)
    logits, past = model(tokens, positions, mask[:, None])

    # From here on, one row a sample: the prompt was read once for all of its samples.
    log_probs = logits[:, -1].log_softmax(-1).repeat_interleave(n_samples, dim=0)
    past = [keys_values.repeat_interleave(n_samples, dim=1) for keys_values in past]
    padding, real = padding.repeat_interleave(n_samples), real.repeat_interleave(n_samples, dim=0)
    drawn: list[Tensor] = []
    drawn_log_probs: list[Tensor] = []
    for step in range(max_new_tokens):
        token = torch.multinomial(log_probs.exp(), 1, generator=generator)
        drawn.append(token)
        drawn_log_probs.append(log_probs.gather(1, token))
        if step + 1 < max_new_tokens:
            width = longest + step + 1
            logits, past = model(token, (width - 1 - padding)[:, None], real[:, None, None, :width], past)
            log_probs = logits[:, -1].log_softmax(-1)

    samples = []
    rows = zip(torch.cat(drawn, 1).tolist(), torch.cat(drawn_log_probs, 1).tolist())
    for row, (response, response_log_probs) in enumerate(rows):
        truncated = eos not in response
        length = max_new_tokens if truncated else response.index(eos) + 1
        all_tokens = list(prompts[row // n_samples]) + response[:length]
        samples.append(Sample(all_tokens, length, response_log_probs[:length], truncated))
    return samples


def response_log_probs(
    model: TinyDecoder, tokens: Tensor, lengths: Tensor, response_lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the model gives to the responses in `tokens`, with gradients.

    Args:
        tokens: `[batch, time]` of ids, each row a prompt and its response, padded on the right with any id.
        lengths: `[batch]`, prompt plus response.
        response_lengths: `[batch]`.

    Returns:
        log-probabilities, entropies and mask, each `[batch, longest response]`; row `i` has its
        `response_lengths[i]` numbers first. What lies where the mask is False means nothing.
    """
    time = tokens.shape[1]
    columns = torch.arange(time, device=tokens.device)
    # Padding is on the right: the causal mask alone hides it from every real token.
    logits, _ = model(tokens, columns[None].expand_as(tokens), (columns[:, None] >= columns[None])[None, None])
    steps = torch.arange(int(response_lengths.max()), device=tokens.device)
    mask = steps[None] < response_lengths[:, None]
    target = ((lengths - response_lengths)[:, None] + steps[None]).clamp(max=time - 1)
    predicted = logits.gather(1, (target - 1)[:, :, None].expand(-1, -1, logits.shape[-1])).log_softmax(-1)
    log_probs = predicted.gather(2, tokens.gather(1, target)[:, :, None])[:, :, 0]
    return log_probs, -(predicted.exp() * predicted).sum(-1), mask
