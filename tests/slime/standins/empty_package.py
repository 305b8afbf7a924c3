"""Stands for the package slime.backends.megatron_utils at v0.3.1, whose own __init__ patches CUDA code."""
