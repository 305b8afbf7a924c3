"""Amends slime's SGLangEngine at v0.3.1 so that it starts its server on the CPU; everything else of it stays slime's.

slime builds ServerArgs, which asks for a GPU, and starts SGLang in a child process. Here the same fields go to
sgl_server; the settings that matter on a CPU are its own. sitecustomize applies this when the module is imported.
"""

import types

import sgl_server


def amend(module: types.ModuleType) -> None:
    """Replace the two names in slime.backends.sglang_utils.sglang_engine."""

    class Settings(types.SimpleNamespace):
        __struct_fields__ = module.ServerArgs.__struct_fields__  # slime lists ServerArgs' fields

    def launch_server_process(settings):
        if settings.node_rank != 0 or settings.tp_size != 1:
            raise ValueError("one process serves one engine here: --rollout-num-gpus-per-engine 1")
        version = getattr(settings, "weight_version", None)
        return sgl_server.start(settings.model_path, settings.host.strip("[]"), settings.port, version)

    module.ServerArgs, module.launch_server_process = Settings, launch_server_process
