"""megatron-core's GPTModel in the shape of Qwen2, on a CPU, with weights mapped one to one to the Hugging Face names.

Stands for slime's model provider and its HF converters. Two things keep megatron-core 0.16 from a CPU: its attention
allocates on the current CUDA device, so the layer spec gets a core attention of its own, and layers ask for
torch.cuda.current_device, which `use_cpu` answers. A rank builds its part of the model, see layout.py.
"""

import warnings
from collections.abc import Mapping

import torch

warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")

import layout  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.models.common.embeddings import rotary_pos_embedding  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402


def use_cpu() -> None:
    """Let megatron and slime ask for the CUDA device and pinned memory; one thread, so that sums have one order."""
    torch.cuda.current_device = lambda: "cpu"
    # megatron-core's own takes the same positions, by way of pinned memory
    rotary_pos_embedding.get_pos_emb_on_this_cp_rank = lambda emb, dim, group: emb[layout.own_positions(len(emb))]
    torch.set_num_threads(1)


class CoreAttention(torch.nn.Module):
    """Causal attention over [sequence, batch, head, channel], the layout that megatron's SelfAttention passes."""

    def __init__(self, config, *args, **kwargs):
        super().__init__()
        self.groups = config.num_attention_heads // config.num_query_groups

    def forward(self, query, key, value, attention_mask=None, **kwargs):
        key, value = layout.of_whole_row(key), layout.of_whole_row(value)
        seen = torch.arange(len(key)) <= layout.own_positions(len(key))[:, None]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        key, value = (x.repeat_interleave(self.groups, dim=1) for x in (key, value))
        out = scaled_dot_product_attention(query, key, value, attn_mask=seen)
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
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=mpu.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        context_parallel_size=mpu.get_context_parallel_world_size(),
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
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=layout.is_last_stage(),
        parallel_output=False,
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


def _own(model: GPTModel) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their names in the whole model: a stage of the pipeline counts its layers from 0."""
    found = {}
    for name, param in model.named_parameters():
        if name.startswith("decoder.layers."):
            at, rest = name.removeprefix("decoder.layers.").split(".", 1)
            name = f"decoder.layers.{model.decoder.layers[int(at)].layer_number - 1}.{rest}"
        found[name] = param
    return found


def _split_dim(param: torch.nn.Parameter) -> int | None:
    """The dimension along which tensor-parallel ranks have parts of a weight; None where each has all of it."""
    return param.partition_dim if getattr(param, "tensor_model_parallel", False) else None


@torch.no_grad()
def to_named(model: GPTModel) -> dict[str, torch.Tensor]:
    """Copies of the whole model's weights under their Hugging Face names; every rank must call it."""
    pieces: dict[str, list] = {}
    for part in layout.shards({name: (param.detach(), _split_dim(param)) for name, param in _own(model).items()}):
        for name, piece in part.items():
            pieces.setdefault(name, []).append(piece)
    out = {}
    for ours, theirs, how in _names(model.config.num_layers):
        (first, dim), *others = pieces.pop(ours)
        halves = [piece.chunk(2 if how == "cat" else 1) for piece in (first, *(piece for piece, _ in others))]
        parts = list(zip(*halves, strict=True))
        parts = [piece[0] if dim is None else torch.cat(piece, dim) for piece in parts]
        if how == "qkv":
            parts = _split_qkv(parts[0], model.config)
        out.update((name, part.clone()) for name, part in zip(theirs, parts, strict=True))
    if pieces:
        raise ValueError(f"no Hugging Face name for {sorted(pieces)}")
    return out


@torch.no_grad()
def load_named(model: GPTModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set the model's weights from tensors under their Hugging Face names; all must be there, and no other."""
    params, left = _own(model), set(tensors)
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    for ours, theirs, how in _names(model.config.num_layers):
        parts = [tensors[name].to(torch.float32) for name in theirs]
        if how == "qkv":
            parts = [_join_qkv(parts, model.config)]
        if ours in params:
            dim = _split_dim(params[ours])
            params[ours].copy_(torch.cat([part if dim is None else part.chunk(size, dim)[rank] for part in parts]))
        left -= set(theirs)
    if left:
        raise ValueError(f"no place for {sorted(left)}")


def response_log_probs(
    model: GPTModel, tokens: list[torch.Tensor], response_lengths: list[int]
) -> list[torch.Tensor] | torch.Tensor:
    """Log-probability of each response token (the last response_lengths[i] of tokens[i]), one padded forward pass.

    Before the last stage of a pipeline it is a 0 instead, whose backward pass is that of the stage.
    """
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % layout.row_multiple()))
    at = layout.own_positions(ids.shape[1])
    if not mpu.is_pipeline_first_stage():
        empty = torch.zeros(len(at), len(ids), model.config.hidden_size, requires_grad=True)
        model.set_input_tensor(layout.FromStageBefore.apply(empty))
    own = ids[:, at]  # causal: right padding is never seen
    out = model(input_ids=own, position_ids=at.expand_as(own), attention_mask=None)
    if not layout.is_last_stage():
        return layout.ToNextStage.apply(out)
    picked = out.log_softmax(-1).gather(-1, ids.roll(-1, 1)[:, at, None]).squeeze(-1)
    return [
        row[len(token) - 1 - length : len(token) - 1]
        for row, token, length in zip(layout.of_whole_row(picked.T).T, tokens, response_lengths, strict=True)
    ]
