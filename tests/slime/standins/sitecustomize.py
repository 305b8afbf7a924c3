"""Lets real slime run on a CPU: redirects the few CUDA-only modules to stand-ins beside this file, in every process.

Put this folder first on PYTHONPATH of the driver and of its Ray workers (the job's runtime_env, or the environment of
`ray start`). Which modules are redirected depends on the slime version that is on the path. slime's files stay as
they are.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import sys
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
SLIME = next((Path(p, "slime") for p in sys.path if Path(p, "slime", "ray").is_dir()), Path())

if (SLIME / "ray" / "buffer.py").exists():  # 079dbcf and v0.1.0
    REDIRECT = {
        "slime.backends.megatron_utils": "megatron_utils_buffer_era.py",
        "slime.backends.sglang_utils.sglang_engine": "sglang_engine_buffer_era.py",
    }
    AMEND = {}
else:  # from v0.3.1 on
    REDIRECT = {
        "slime.backends.megatron_utils": "empty_package.py",
        "slime.backends.megatron_utils.arguments": "megatron_arguments_in_parts.py",
        "slime.backends.megatron_utils.actor": "megatron_actor_in_parts.py",
    }
    AMEND = {
        "slime.backends.sglang_utils.sglang_engine": "sglang_engine_in_parts",
        "slime.backends.megatron_utils.update_weight.update_weight_from_distributed": "weights_over_gloo",
        "slime.utils.accelerator": "accelerator_cpu",
    }


for name in filter(None, os.environ.get("SLIME_CPU_REAL_MODULES", "").split(",")):
    del REDIRECT[name]  # for tests of what slime itself does there


class StandInFinder:
    """Finds the redirected modules here, and lets `amend` of the named stand-in work on a module of slime's own."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in AMEND:
            return cls._amended(name, path, target)
        if name not in REDIRECT:
            return None
        # the package stays slime's for every submodule that is not redirected (cp_utils, for one)
        package = [str(SLIME / "backends" / "megatron_utils")] if name.endswith("megatron_utils") else None
        return importlib.util.spec_from_file_location(name, HERE / REDIRECT[name], submodule_search_locations=package)

    @classmethod
    def _amended(cls, name, path, target):
        others = [finder for finder in sys.meta_path if finder is not cls]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)))
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            importlib.import_module(AMEND[name]).amend(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, StandInFinder)

# slime up to v0.3.1 reads dataclasses.fields(ServerArgs); SGLang 0.5.23 made ServerArgs a msgspec Struct.
_dataclass_fields = dataclasses.fields


def _fields(cls):
    if dataclasses.is_dataclass(cls) or not hasattr(cls, "__struct_fields__"):
        return _dataclass_fields(cls)
    return tuple(types.SimpleNamespace(name=name) for name in cls.__struct_fields__)


dataclasses.fields = _fields

if key := os.environ.get("MP_AUTHKEY"):  # CPU tensors sent to a server by file descriptor need one key on both sides
    multiprocessing.current_process().authkey = key.encode()
