"""Stands for torch_memory_saver: slime offloads the training ranks of PPO by it, between their steps, and has no flag
against that. A CPU has no CUDA memory to give back.

slime's group of training actors preloads its library into each rank and looks for the file beside this package. The
file is empty here: the dynamic linker says so on stderr, and goes on without it.
"""


class _Saver:
    def pause(self) -> None: ...

    def resume(self) -> None: ...


torch_memory_saver = _Saver()
