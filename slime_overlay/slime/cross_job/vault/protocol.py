"""What clients ask of a vault: plain values, so that whoever asks need not import the actor."""

from dataclasses import dataclass, field
from typing import Any

PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Durably:
    """In which durable store a job's payloads are kept, and how."""

    uri: str = field(repr=False)  # with its password
    job_id: str
    compression: str = "none"
    behind: bool = False  # soon, not before anybody hears of them
    patience_s: float = 3600.0  # for a store that is full or away
    mark: str = ""  # that the broker left there, see payloads.marked; empty: any


HEADER = "slime_cross_job"
"""Key that marks the header of what a producer's method returns; see producer.returned."""


@dataclass(frozen=True, slots=True)
class Target:
    """Under what a payload is recorded: a rollout (`rollout_id`) or a value of the job (`key`, `version`)."""

    token: str
    client_id: str
    rollout_id: int | None = None
    key: str | None = None
    version: int | None = None
    durably: Durably | None = None  # besides, in a durable store
    observed: str = ""  # job id, where it has metrics on: how long this takes goes into its figures
    patience_s: float = PATIENCE_S  # for a broker that is gone, or cannot keep what it is told


@dataclass(frozen=True, slots=True)
class FromRefs:
    """Objects that the caller owns: the vault copies each. The refs travel inside this container, unresolved."""

    refs: list[Any]
    header: dict[str, Any]


@dataclass(frozen=True, slots=True)
class FromMethod:
    """A method that returns (header, part, ..., source): the vault calls it and so owns what it returns."""

    actor: Any
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parts: int
