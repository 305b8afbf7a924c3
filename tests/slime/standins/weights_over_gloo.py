"""slime's own UpdateWeightFromDistributed in the training ranks, on the model of gpt.py, with gloo in NCCL's place.

Lock, groups, gathering, conversion, chunks and versions are slime's. Amended: the backend, where slime names NCCL (up
to v0.3.1), and the names of two weights, since megatron-core has no Transformer Engine on a CPU. Not shown: what is
NCCL's own, such as a collective that hangs when a member dies.
"""

import time
import types
from collections.abc import Iterator

import torch
from hold import held

NORMS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
"""Transformer Engine keeps a norm in the layer behind it."""


def amend(module: types.ModuleType) -> None:
    """The training rank's end, in slime's update_weight_from_distributed; an engine's: sglang_engine_in_parts.py."""
    make = module.init_process_group

    def over_gloo(backend, **settings):
        return make(backend="gloo" if backend == "nccl" else backend, **settings)

    module.init_process_group = over_gloo


class Model:
    """A model of gpt.py, as slime's updater reads a model that Megatron's own training has built and wrapped."""

    def __init__(self, model: torch.nn.Module) -> None:
        from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes

        self.model, self.config, self.named_buffers = model, model.config, model.named_buffers
        for param in model.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(param)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, param in self.model.named_parameters():
            for ours, theirs in NORMS.items():
                name = name.replace(ours, theirs)
            yield f"module.module.{name}", param


def updater(args, model: torch.nn.Module):
    """slime's own, but it waits before its second chunk where a test holds the update (hold.py)."""
    from slime.backends.megatron_utils.update_weight.update_weight_from_distributed import UpdateWeightFromDistributed

    class Held(UpdateWeightFromDistributed):
        def update_weights(self):
            self.chunks = 0
            super().update_weights()

        def _on_chunk(self, hf_chunk):
            self.chunks += 1
            while self.chunks == 2 and held("SLIME_CPU_HOLD_UPDATE", self.weight_version):
                time.sleep(0.1)

    made = Held(args, [Model(model)], dict, model_name=args.model_name or "qwen2", quantization_config=None)
    made.rollout_engines = []
    return made
