"""Stands for megatron.training's argument parser: just the options that slime reads."""

import argparse

OPTIONS = {
    int: {
        "--seed": 1234,
        "--num-layers": 2,
        "--hidden-size": 64,
        "--num-attention-heads": 4,
        "--num-query-groups": 2,
        "--kv-channels": 16,
        "--num-experts": None,
        "--ffn-hidden-size": 128,
        "--global-batch-size": None,
        "--micro-batch-size": 1,
        "--save-interval": None,
        "--eval-interval": None,
        "--vocab-size": 320,
        "--distributed-timeout-minutes": 10,
        "--context-parallel-size": 1,
        "--tensor-model-parallel-size": 1,
        "--pipeline-model-parallel-size": 1,
        "--expert-model-parallel-size": 1,
        "--ckpt-step": None,
        "--moe-router-topk": 2,
        "--q-lora-rank": None,
    },
    float: {
        "--lr": 1e-3,
        "--norm-epsilon": 1e-6,
        "--rotary-base": 10000.0,
        "--clip-grad": 1.0,
        "--adam-beta1": 0.9,
        "--adam-beta2": 0.95,
        "--adam-eps": 1e-8,
        "--weight-decay": 0.0,
    },
    str: {
        "--load": None,
        "--save": None,
        "--tensorboard-dir": None,
        "--wandb-project": None,
        "--distributed-backend": "gloo",
        "--tokenizer-model": None,
        "--tokenizer-type": None,
    },
}
SWITCHES = ("--no-load-optim", "--no-load-rng", "--no-save-optim", "--finetune", "--bf16", "--fp16")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(conflict_handler="resolve", allow_abbrev=False)
    for kind, options in OPTIONS.items():
        for flag, default in options.items():
            parser.add_argument(flag, type=kind, default=default)
    for flag in SWITCHES:
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--untie-embeddings-and-output-weights", action="store_true", default=True)
    return parser
