"""How the ledger declares what it can be asked, where it is defined: `@reads` and `@writes` on a method of a part."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar


@dataclass(frozen=True)
class Operation:
    """What a broker must know of an operation."""

    changes: bool  # what it changes is kept before it is answered
    of_job: bool  # its first argument names a job, else a client: who asks is alive
    proxied: bool  # others may ask for it in the name of a client: no sign of life


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _declared(how: Operation) -> Callable[[_Method], _Method]:
    def declare(method: _Method) -> _Method:
        method.operation = how  # type: ignore[attr-defined]
        return method

    return declare


def reads(*, of_job: bool = False) -> Callable[[_Method], _Method]:
    """An operation after which there is nothing new to be kept."""
    return _declared(Operation(False, of_job, False))


def writes(*, of_job: bool = False, proxied: bool = False) -> Callable[[_Method], _Method]:
    """An operation that changes a job."""
    return _declared(Operation(True, of_job, proxied))


def declared_by(*parts: Any) -> dict[str, Callable[..., Any]]:
    """The operations of these objects: name -> bound method, with its `operation`."""
    found: dict[str, Callable[..., Any]] = {}
    for part in parts:
        for name, method in vars(type(part)).items():
            if hasattr(method, "operation"):
                assert name not in found, f"two operations {name}"
                found[name] = getattr(part, name)
    return found
