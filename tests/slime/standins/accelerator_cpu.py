"""Stands for slime's CUDA accelerator, from the pin main on: slime's own registry is given one for the CPU."""

import types


def amend(module: types.ModuleType) -> None:
    """Register it with slime.utils.accelerator; it is chosen where there is no other."""
    torch = module.torch

    class CPUAccelerator(module.Accelerator):
        name = device_type = "cpu"
        communication_backend_name = "gloo"

        def is_available(self):
            return True

        def device(self, index=None):
            return torch.device("cpu")

        def device_name(self, index=None):
            return "cpu"

        def set_device(self, index): ...

        def current_device(self):
            return "cpu"

        def device_count(self):
            return 1

        def synchronize(self, device=None): ...

        def current_stream(self, device=None):
            return None

        def empty_cache(self): ...

        def mem_get_info(self, device=None):
            return 0, 0

        def memory_allocated(self, device=None):
            return 0

        def memory_reserved(self, device=None):
            return 0

    module.register_accelerator("cpu", CPUAccelerator, communication_backends=("gloo",))
