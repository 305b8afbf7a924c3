"""The environment of the jobs that launch.py submits: what slime's own launch scripts set, and what must agree.

No Ray in here.
"""

import argparse
import os
import re
import subprocess
from collections.abc import Mapping

MEGATRON = "/root/Megatron-LM"  # where slime's images have it, and its scripts look for it
AGREE = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")
"""Must be the same in both jobs: training ranks and engines are in one NCCL group for weight updates."""


def environment(options: argparse.Namespace, other: Mapping[str, str]) -> dict[str, str]:
    """The job's variables: defaults, then what the other job of the experiment has where both must agree, then --env.

    PYTHONPATH is put together: what was given, Megatron-LM, the checkout (Ray puts one that it uploads in front).
    """
    env = {} if options.no_default_env else defaults() | {name: other[name] for name in AGREE if name in other}
    env |= dict(text.split("=", 1) for text in options.env)
    slime = options.image_checkout or (os.path.realpath(options.slime) if options.slime else "")
    path = [env.get("PYTHONPATH"), "" if options.no_default_env else MEGATRON, slime]
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def defaults() -> dict[str, str]:
    """What every launch script of slime's sets (v0.3.1 and before), and what it relies on between the jobs."""
    return {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron's communication overlaps in the right order
        # training ranks have 0 from slime; engines choose for themselves, mostly 0, unless it is set
        "NCCL_CUMEM_ENABLE": "0",
        # unset, engines would switch NVLink SHARP off, and training ranks leave it on
        "NCCL_NVLS_ENABLE": str(int(has_nvlink())),
    }


def has_nvlink() -> bool:
    """Whether the GPUs of this machine are connected by NVLink, by the test of slime's scripts; no GPUs: no."""
    try:
        seen = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.search(r"\bNV\d+\b", seen) is not None
