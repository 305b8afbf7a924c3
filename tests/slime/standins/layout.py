"""How ranks share the training of one model on a CPU: stands for Megatron's groups, pipeline schedule and sums.

Tensor parallelism is that of megatron-core's own layers. A stage of the pipeline takes one micro-batch at a time,
forward and backward, where Megatron keeps several under way. Context parallelism deals out tokens by slime's own
slice_with_cp, in rows of one length, where slime packs them; attention gathers keys and values, where Transformer
Engine passes them around.

Not here, and refused: sequence and expert parallelism, virtual stages of the pipeline.
"""

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, param_is_not_tensor_parallel_duplicate
from megatron_arguments_in_parts import MODEL_PARALLEL


def sizes(args: object) -> tuple[int, int, int]:
    """Tensor, pipeline and context parallel size that slime's arguments ask for."""
    return tuple(getattr(args, name, 1) for name in MODEL_PARALLEL)


def join_parallel_groups(tensor: int = 1, pipeline: int = 1, context: int = 1) -> None:
    """Megatron's process groups over the default group; alone, when the process has none yet."""
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel(tensor, pipeline, context_parallel_size=context)


def data_parallel() -> tuple[int, int]:
    """(rank, size): ranks with the same rank train on the same part of a rollout."""
    return mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()


def parallel_config() -> dict[str, int]:
    """What slime's training ranks tell its rollout manager, for the split of a rollout."""
    sizes = {"dp_size": data_parallel()[1], "cp_size": mpu.get_context_parallel_world_size()}
    return {**sizes, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1}


def shard() -> int:
    """Which part of the weights and of the optimizer's state this rank has."""
    return mpu.get_model_parallel_group().rank()


def shards(value: object) -> list:
    """What the ranks with the parts of one model give here, by their `shard`."""
    parts: list = [None] * mpu.get_model_parallel_group().size()
    dist.all_gather_object(parts, value, group=mpu.get_model_parallel_group())
    return parts


def row_multiple() -> int:
    """Rows of tokens must have a length that this divides."""
    size = mpu.get_context_parallel_world_size()
    return 2 * size if size > 1 else 1


def own_positions(length: int) -> torch.Tensor:
    """Positions of a row's tokens that are this rank's."""
    every = torch.arange(length)
    if mpu.get_context_parallel_world_size() == 1:
        return every
    from slime.backends.megatron_utils.cp_utils import slice_with_cp

    return slice_with_cp(every, 0)


def of_whole_row(own: torch.Tensor) -> torch.Tensor:
    """What every context-parallel rank has for its tokens (the first dimension), in their order.

    Its gradient is the sum of all ranks' gradients.
    """
    size, group = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_group()
    if size == 1:
        return own
    positions = gather_from_sequence_parallel_region(own_positions(len(own) * size), group=group)
    return gather_from_sequence_parallel_region(own, group=group)[positions.argsort()]


class FromStageBefore(torch.autograd.Function):
    """Activations [sequence, batch, hidden] of the stage before; their gradient goes back to it."""

    @staticmethod
    def forward(ctx, empty):
        received = torch.empty_like(empty)
        dist.recv(received, mpu.get_pipeline_model_parallel_prev_rank())
        return received

    @staticmethod
    def backward(ctx, grad):
        dist.send(grad.contiguous(), mpu.get_pipeline_model_parallel_prev_rank())


class ToNextStage(torch.autograd.Function):
    """Sends activations to the next stage, and is 0; takes their gradient from it."""

    @staticmethod
    def forward(ctx, activations):
        ctx.save_for_backward(activations)
        dist.send(activations.contiguous(), mpu.get_pipeline_model_parallel_next_rank())
        return activations.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        grad = torch.empty_like(ctx.saved_tensors[0])
        dist.recv(grad, mpu.get_pipeline_model_parallel_next_rank())
        return grad


def is_last_stage() -> bool:
    """Whether this rank's part of the model ends in logits."""
    return mpu.is_pipeline_last_stage()


def of_last_stage(value: float) -> float:
    """The value that the pipeline's last stage gives here."""
    told = torch.tensor([value if is_last_stage() else 0.0], dtype=torch.float64)
    dist.all_reduce(told, group=mpu.get_pipeline_model_parallel_group())
    return told.item()


def sum_over_data(tensor: torch.Tensor) -> None:
    """In place, over the ranks that have the same part of the model and other tokens."""
    dist.all_reduce(tensor, group=mpu.get_data_parallel_group(with_context_parallel=True))


def norm(params: list[torch.nn.Parameter], grads: list[torch.Tensor]) -> float:
    """Of the whole model's gradients; a weight that all tensor-parallel ranks have counts once."""
    mine = [grad.flatten() for p, grad in zip(params, grads) if param_is_not_tensor_parallel_duplicate(p)]
    squares = torch.linalg.vector_norm(torch.cat(mine).double()).square()
    dist.all_reduce(squares, group=mpu.get_model_parallel_group())
    return squares.sqrt().item()
