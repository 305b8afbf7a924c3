"""Amends slime's SGLangEngine from v0.3.1 on so that it starts its server on the CPU, and joins groups over gloo.

slime builds ServerArgs, which asks for a GPU, and starts SGLang in a child process. Here the same fields go to
sgl_server; the settings that matter on a CPU are its own. The rest of the class stays slime's. sitecustomize applies
this when the module is imported.
"""

import types

import sgl_server


def amend(module: types.ModuleType) -> None:
    """Replace two names in slime.backends.sglang_utils.sglang_engine, and a backend that is NCCL."""
    join = module.SGLangEngine.init_weights_update_group

    def over_gloo(engine, *, backend, **group):
        return join(engine, backend="gloo" if backend == "nccl" else backend, **group)

    class Settings(types.SimpleNamespace):
        __struct_fields__ = module.ServerArgs.__struct_fields__  # slime lists ServerArgs' fields

    def launch_server_process(settings):
        if settings.node_rank != 0 or settings.tp_size != 1:
            raise ValueError("one process serves one engine here: --rollout-num-gpus-per-engine 1")
        version = getattr(settings, "weight_version", None)
        return sgl_server.start(settings.model_path, settings.host.strip("[]"), settings.port, version)

    module.SGLangEngine.init_weights_update_group = over_gloo
    module.ServerArgs, module.launch_server_process = Settings, launch_server_process
