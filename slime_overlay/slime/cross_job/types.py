"""The words of the protocol: names, limits, and the records that travel between clients, broker and vaults.

Plain data only: no Ray, no Arrow, so that the ledger and its tests need neither.
"""

import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .errors import BadInput

PROTOCOL = 7
"""Version of what clients, broker and vaults say to each other; all of one cluster must agree."""

DEFAULT_NAMESPACE = "slime_shared"
BROKER_NAME = "slime_cross_job_broker"
VAULT_NAME = "slime_cross_job_vault"

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_job_id(job_id: Any) -> str:
    """Return `job_id` if it can name an experiment, else raise BadInput."""
    if job_id is None or job_id == "":
        raise BadInput("no job id: pass --job-id NAME (or job_id=), the same name to the rollout and to the train job")
    if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id):
        raise BadInput(
            f"job id {job_id!r} is not usable: 1 to 128 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )
    return job_id


def check_rollout_id(rollout_id: Any) -> int:
    """Return `rollout_id` as an int if it is a whole number from 0 (numpy's integers too), else raise BadInput."""
    a_bool = isinstance(rollout_id, bool) or getattr(getattr(rollout_id, "dtype", None), "kind", "") == "b"
    if a_bool or not hasattr(rollout_id, "__index__"):
        raise BadInput(f"rollout id {rollout_id!r} is a {type(rollout_id).__name__}: it must be an int, 0 or greater")
    try:
        value = rollout_id.__index__()
    except TypeError:  # arrays and tensors have the method whatever they hold
        raise BadInput(f"rollout id {rollout_id!r} is no whole number: it must be an int, 0 or greater") from None
    if value < 0:
        raise BadInput(f"rollout id {value} is negative: ids count from 0")
    return value


class Ids:
    """A set of whole numbers, kept as ranges: those of a long run are nearly all neighbours."""

    def __init__(self, ids: Iterable[int] = ()):
        self._ranges: list[tuple[int, int]] = []  # [first, after the last), in order, never touching
        for number in ids:
            self.add(number)

    @classmethod
    def below(cls, end: int) -> "Ids":
        """All from 0 to `end` - 1."""
        made = cls()
        made._ranges = [(0, end)] if end > 0 else []
        return made

    @classmethod
    def of_ranges(cls, ranges: Iterable[tuple[int, int]]) -> "Ids":
        """From what `ranges` said. Raises ValueError for anything else."""
        made = cls()
        made._ranges = [(int(first), int(end)) for first, end in ranges]
        flat = [number for found in made._ranges for number in found]
        if flat != sorted(set(flat)):
            raise ValueError("ranges that overlap, touch, or are out of order")
        return made

    def ranges(self) -> list[list[int]]:
        """[first, after the last] of each range, in order."""
        return [[first, end] for first, end in self._ranges]

    def add(self, number: int) -> None:
        if number in self:
            return
        at = bisect_right(self._ranges, (number, number))
        first, end = number, number + 1
        if at < len(self._ranges) and self._ranges[at][0] == end:
            end = self._ranges.pop(at)[1]
        if at and self._ranges[at - 1][1] == first:
            first = self._ranges.pop(at - 1)[0]
            at -= 1
        self._ranges.insert(at, (first, end))

    def discard(self, number: int) -> None:
        if number not in self:
            return
        at = bisect_right(self._ranges, (number, sys.maxsize)) - 1
        first, end = self._ranges[at]
        self._ranges[at : at + 1] = [r for r in ((first, number), (number + 1, end)) if r[0] < r[1]]

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._ranges, (number, sys.maxsize))
        return bool(at) and number < self._ranges[at - 1][1]

    def __len__(self) -> int:
        return sum(end - first for first, end in self._ranges)

    def __iter__(self) -> Iterator[int]:
        return (number for first, end in self._ranges for number in range(first, end))

    def last(self) -> int:
        """The greatest; -1 where there is none."""
        return self._ranges[-1][1] - 1 if self._ranges else -1


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """What a producer or consumer says of itself when it attaches; shown in verdicts."""

    client_id: str
    job_id: str
    role: str  # "producer" | "consumer" | "writer" (of values only)
    group: str = ""  # consumers only
    ray_job_id: str = ""
    submission_id: str = ""
    actor_id: str = ""
    node_id: str = ""
    host: str = ""
    pid: int = 0
    cluster: str = ""  # its broker says which Ray cluster that is
    one_cluster: bool = False  # it exchanges handles of actors with its peer: both must be on one cluster


@dataclass(frozen=True, slots=True)
class Payload:
    """Where a published payload lies: `token` names it inside `vault`; `parts` objects of `nbytes` bytes in all.

    `vault` is the vault's actor name, and after a slash its incarnation: what was restarted holds nothing of before.
    Empty: it lies in the durable store only.
    """

    token: str
    vault: str
    nbytes: int
    parts: int = 1
    num_samples: int = -1  # -1: an opaque value, not a batch
    weight_version: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()  # names of the batch's columns
    source: Any = None  # where the producer's source of prompts stood after it (JSON-able), see Producer.source_before
    source_apart: bool = False  # that is large, and lies in the vault beside the payload
    made_at: float = 0.0  # wall clock of its vault, s: when all of it was there; 0: nobody said
    stored: str = ""  # its name in the job's durable store (archive.py); its source there: source_name


def source_name(stored: str) -> str:
    """Name in the durable store of what lies beside a payload there: where the source of prompts stood."""
    return f"{stored}-source"


@dataclass(frozen=True, slots=True)
class Located:
    """A published version as a reader sees it."""

    job_id: str
    rollout_id: int
    version: int
    payload: Payload
    published_at: float  # wall clock, seconds
    epoch: int  # of the producer that published it
    serial: int = 0  # counts what was published in the job, values too


@dataclass(frozen=True, slots=True)
class LocatedValue:
    """The newest value of a key (weights, say) as a reader sees it."""

    job_id: str
    key: str
    version: int
    payload: Payload
    published_at: float
    author: str = ""  # client that published it
    serial: int = 0  # see Located
