"""Qwen2 in numpy, one token at a time: each sequence is computed alone, so that a result never depends on its company.

That makes sampling repeatable to the bit whatever requests run beside it, which no batching server promises. Only as
fast as the model is tiny: 0.1 ms a token for 115k parameters.
"""

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


class ToyModel:
    """Weights by Hugging Face names, and the shape from config.json (weights.read_config)."""

    def __init__(self, config: dict, tensors: dict[str, np.ndarray]) -> None:
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.channels, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.inv_freq = config["rope_theta"] ** (-np.arange(0, self.channels, 2) / self.channels)
        self.embed, self.norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
        self.head = tensors["lm_head.weight"]
        self.layers = [self._layer(tensors, f"model.layers.{i}.") for i in range(config["num_hidden_layers"])]

    @staticmethod
    def _layer(t: dict[str, np.ndarray], prefix: str) -> tuple[np.ndarray, ...]:
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return (
            t[prefix + "input_layernorm.weight"],
            np.concatenate([t[f"{attention}{x}_proj.weight"] for x in "qkv"]),
            np.concatenate([t[f"{attention}{x}_proj.bias"] for x in "qkv"]),
            t[attention + "o_proj.weight"],
            t[prefix + "post_attention_layernorm.weight"],
            np.concatenate([t[mlp + "gate_proj.weight"], t[mlp + "up_proj.weight"]]),
            t[mlp + "down_proj.weight"],
        )

    def start(self, length: int) -> "Sequence":
        return Sequence(self, length)

    def rms(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x * np.float32(1.0 / np.sqrt(float(x @ x) / len(x) + self.eps)) * weight


class Sequence:
    """One sequence's keys and values; `feed` takes its next token and gives the logits of the one after."""

    def __init__(self, model: ToyModel, length: int) -> None:
        self.model, self.at = model, 0
        shape = (len(model.layers), 2, model.kv_heads, length, model.channels)
        self.cache = np.zeros(shape, np.float32)
        angle = np.arange(length)[:, None] * model.inv_freq
        self.cos = np.tile(np.cos(angle), 2).astype(np.float32)
        self.sin = np.tile(np.sin(angle), 2).astype(np.float32)

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        turned = np.concatenate([-x[:, half:], x[:, :half]], axis=-1)
        return x * self.cos[self.at] + turned * self.sin[self.at]

    def feed(self, token: int) -> np.ndarray:
        m, end = self.model, self.at + 1
        x = m.embed[token]
        scale = np.float32(m.channels**-0.5)
        for cache, (norm1, qkv_w, qkv_b, out_w, norm2, up_w, down_w) in zip(self.cache, m.layers, strict=True):
            qkv = (qkv_w @ m.rms(x, norm1) + qkv_b).reshape(-1, m.channels)
            rotated = self._rotate(qkv[: m.heads + m.kv_heads])
            cache[0, :, self.at], cache[1, :, self.at] = rotated[m.heads :], qkv[m.heads + m.kv_heads :]
            query = rotated[: m.heads].reshape(m.kv_heads, -1, m.channels)
            scores = query @ cache[0, :, :end].transpose(0, 2, 1) * scale
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (weights / weights.sum(-1, keepdims=True)) @ cache[1, :, :end]
            x = x + out_w @ mixed.reshape(-1)
            gate, up = np.split(up_w @ m.rms(x, norm2), 2)
            x = x + down_w @ (gate / (1 + np.exp(-gate)) * up)
        self.at = end
        return m.head @ m.rms(x, m.norm)
