"""Stands for slime.backends.megatron_utils.arguments from v0.3.1 on."""

import math

from megatron_cli import build_parser

NOT_HERE = ("--sequence-parallel", "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank")
MODEL_PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def megatron_parse_args(extra_args_provider, skip_hf_validate=False):
    args, others = extra_args_provider(build_parser()).parse_known_args()  # --sglang-* is parsed by slime beforehand
    if args.expert_model_parallel_size > 1 or {*NOT_HERE}.intersection(others):
        raise ValueError(f"the stand-in does neither expert parallelism nor {NOT_HERE}")
    args.rank = 0
    args.world_size = args.actor_num_nodes * args.actor_num_gpus_per_node
    of_one_model = math.prod(getattr(args, name) for name in MODEL_PARALLEL)
    if args.world_size % of_one_model:
        raise ValueError(f"{args.world_size} training ranks cannot be {of_one_model} for each copy of the model")
    args.data_parallel_size = args.world_size // of_one_model
    return args


def validate_args(args):
    return args


def set_default_megatron_args(args):
    return args
