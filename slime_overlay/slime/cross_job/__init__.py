"""slime cross-job: rollout and training as separate Ray jobs.

The names below are the whole public API; each is loaded when it is first used, so that reading a batch needs neither
ray nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch, Column
    from .client.consumer import Consumer, Rollout
    from .client.producer import Producer, Published

_HOME = {
    "Batch": "batch",
    "Column": "batch",
    "Consumer": "client.consumer",
    "Producer": "client.producer",
    "Published": "client.producer",
    "Rollout": "client.consumer",
}
__all__ = ["Batch", "Column", "Consumer", "Producer", "Published", "Rollout", "errors"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(".errors", __name__)
    if name == "hooks":  # as the patched lines of slime import it
        return import_module(".adapter.hooks", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
