"""Weights by their Hugging Face names: checksum, and the folder that a server's /update_weights_from_disk takes.

Needs neither megatron nor slime, so that the trainer, the toy engine and a test can share it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and float32 bytes in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_folder(folder: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder's safetensors files."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors file in {folder}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def save_folder(folder: str | Path, tensors: Mapping[str, torch.Tensor], like: str | Path) -> None:
    """Write tensors to a folder, with the configuration and tokenizer of the folder `like`.

    The folder appears at once under its name, so no reader sees half of it. An existing one is replaced.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file in Path(like).iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copy(file, partial)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial / "model.safetensors", {"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read_config(folder: str | Path) -> dict:
    """config.json, with the places where transformers 4 and 5 keep the rotary base made one."""
    config = json.loads((Path(folder) / "config.json").read_text())
    config.setdefault("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config
