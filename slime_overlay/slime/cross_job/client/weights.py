"""Weights as a value of the job: named arrays or tensors in one batch, read zero-copy, newest wins."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..batch import Batch
from ..errors import BatchError
from ..types import check_name

KEY = "weights"


def pack_weights(params: Mapping[str, Any]) -> Batch:
    """Named arrays or tensors as a batch with one row a parameter. Raises BatchError."""
    if not isinstance(params, Mapping) or not params:
        raise BatchError("no weights: give a mapping of at least one name to an array or tensor")
    for name, array in params.items():
        check_name(name, "the name of a parameter")
        if not (hasattr(array, "dtype") and hasattr(array, "shape")):
            raise BatchError(f"the weights {name!r} are a {type(array).__name__}: give an array or a tensor")
    return Batch.pack({"name": [*params], "tensor": [*params.values()]})


class Weights(Mapping[str, Any]):
    """A weight version: parameter name -> what was published (array or tensor), read-only views of shared memory.

    Copy what you keep: the memory is freed once a newer version has replaced it and the last view is gone.
    `ref` (where known) is the Ray ref behind it: hand it, inside a container, to actors that load weights themselves.
    `id` names this publication: a train job that went back to a checkpoint may publish other weights as a version.
    """

    def __init__(self, version: int, batch: Batch, ref: Any = None, id: str = ""):
        self.version = version
        self.id = id
        self.batch = batch
        self.ref = ref
        self._rows = {name: row for row, name in enumerate(batch["name"])}

    def __getitem__(self, name: str) -> Any:
        return self.batch["tensor"][self._rows[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
