"""megatron-core's GPTModel in the shape of Qwen2, on a CPU, with weights mapped one to one to the Hugging Face names.

Stands for slime's model provider and its HF converters. Two things keep megatron-core 0.16 from a CPU: its attention
allocates on the current CUDA device, so the layer spec gets a core attention of its own, and layers ask for
torch.cuda.current_device, which `use_cpu` answers. Tensor, pipeline and context parallel size are one.
"""

import os
import warnings
from collections.abc import Mapping

import torch

warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402


def use_cpu() -> None:
    """Let megatron and slime ask for the CUDA device; one thread, so that sums have one order."""
    torch.cuda.current_device = lambda: "cpu"
    torch.set_num_threads(1)


def join_parallel_groups() -> None:
    """Megatron's process groups over the default group; alone, when the process has none yet."""
    if not torch.distributed.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


class CoreAttention(torch.nn.Module):
    """Causal attention over [sequence, batch, head, channel], the layout that megatron's SelfAttention passes."""

    def __init__(self, config, *args, **kwargs):
        super().__init__()
        self.groups = config.num_attention_heads // config.num_query_groups

    def forward(self, query, key, value, attention_mask=None, **kwargs):
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        key, value = (x.repeat_interleave(self.groups, dim=1) for x in (key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def build(config: Mapping) -> GPTModel:
    """An untrained model for a Qwen2 configuration (weights.read_config); its weights come from `load_named`."""
    if config.get("tie_word_embeddings"):
        raise ValueError("tied embeddings are not mapped: set tie_word_embeddings to false")
    shape = TransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"],
        normalization="RMSNorm",
        layernorm_epsilon=config["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    return GPTModel(
        config=shape,
        transformer_layer_spec=spec,
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=config["rope_theta"],
        share_embeddings_and_output_weights=False,
    )


def _split_qkv(tensor: torch.Tensor, shape: TransformerConfig) -> list[torch.Tensor]:
    """Megatron stores, for each group of query heads, its queries, its key and its value."""
    per_group = shape.num_attention_heads // shape.num_query_groups
    grouped = tensor.view(shape.num_query_groups, per_group + 2, shape.kv_channels, *tensor.shape[1:])
    parts = grouped.split([per_group, 1, 1], dim=1)
    return [part.reshape(-1, *tensor.shape[1:]) for part in parts]


def _join_qkv(parts: list[torch.Tensor], shape: TransformerConfig) -> torch.Tensor:
    rest = parts[0].shape[1:]
    grouped = [part.view(shape.num_query_groups, -1, shape.kv_channels, *rest) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def _names(layers: int) -> list[tuple[str, tuple[str, ...], str]]:
    """(megatron's name, Hugging Face names, how the first is made of the others)."""
    table = [
        ("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "same"),
        ("decoder.final_layernorm.weight", ("model.norm.weight",), "same"),
        ("output_layer.weight", ("lm_head.weight",), "same"),
    ]
    for i in range(layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        qkv = [f"{theirs}self_attn.{x}_proj." for x in "qkv"]
        table += [
            (ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",), "same"),
            (ours + "self_attention.linear_qkv.weight", tuple(x + "weight" for x in qkv), "qkv"),
            (ours + "self_attention.linear_qkv.bias", tuple(x + "bias" for x in qkv), "qkv"),
            (ours + "self_attention.linear_proj.weight", (theirs + "self_attn.o_proj.weight",), "same"),
            (ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",), "same"),
            (ours + "mlp.linear_fc1.weight", (theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"), "cat"),
            (ours + "mlp.linear_fc2.weight", (theirs + "mlp.down_proj.weight",), "same"),
        ]
    return table


@torch.no_grad()
def to_named(model: GPTModel) -> dict[str, torch.Tensor]:
    """Copies of the model's weights under their Hugging Face names."""
    params, out = dict(model.named_parameters()), {}
    for ours, theirs, how in _names(model.config.num_layers):
        param = params.pop(ours).detach()
        parts = {"same": lambda p: [p], "cat": lambda p: p.chunk(2), "qkv": lambda p: _split_qkv(p, model.config)}[how]
        out.update((name, part.clone()) for name, part in zip(theirs, parts(param), strict=True))
    if params:
        raise ValueError(f"no Hugging Face name for {sorted(params)}")
    return out


@torch.no_grad()
def load_named(model: GPTModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set the model's weights from tensors under their Hugging Face names; all must be there, and no other."""
    params, left = dict(model.named_parameters()), set(tensors)
    for ours, theirs, how in _names(model.config.num_layers):
        parts = [tensors[name].to(torch.float32) for name in theirs]
        joined = _join_qkv(parts, model.config) if how == "qkv" else torch.cat(parts)
        params[ours].copy_(joined.reshape(params[ours].shape))
        left -= set(theirs)
    if left:
        raise ValueError(f"no place for {sorted(left)}")


def response_log_probs(model: GPTModel, tokens: list[torch.Tensor], response_lengths: list[int]) -> list[torch.Tensor]:
    """Log-probability of each response token (the last response_lengths[i] of tokens[i]), one padded forward pass."""
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    logits = model(input_ids=ids, position_ids=positions, attention_mask=None)  # causal: right padding is never seen
    picked = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return [
        row[len(token) - 1 - length : len(token) - 1]
        for row, token, length in zip(picked, tokens, response_lengths, strict=True)
    ]
