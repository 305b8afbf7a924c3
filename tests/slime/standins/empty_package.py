"""Stands for the package slime.backends.megatron_utils from v0.3.1 on, whose own __init__ patches CUDA code."""
