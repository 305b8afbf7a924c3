"""The words of the protocol: names, limits, and the records that travel between clients, broker and vaults.

Plain data only: no Ray, no Arrow, so that the ledger and its tests need neither.
"""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..cross_job_settings import Table
from .errors import BadInput, ClusterUnreachable

PROTOCOL = 9
"""Version of what clients, broker and vaults say to each other; all of one cluster must agree."""

DEFAULT_NAMESPACE: str = Table.namespace
BROKER_NAME = "slime_cross_job_broker"
VAULT_NAME = "slime_cross_job_vault"

MOST_ID = 2**63 - 2
"""Greatest rollout id and weight version: one more still fits into 64 bits."""
MOST_META_BYTES = 1 << 18
"""Of `meta`, as JSON: it lies in the memory of broker and vaults."""
MOST_SOURCE_BYTES = 1 << 16
"""Of a `source` inside a record; what is larger lies beside the payload, see session.small_or_apart."""
MOST_NAME = 200
"""Characters of a name: of a group, a key, a column."""
MOST_ACTIVITY = 200
MOST_STAMP = 400
"""Characters of what engines say of their weights."""
WEIGHTS_SAID = "weights_said"
"""Key of a rollout's `meta`: what the engines that generated it said of their weights, a list of texts."""
MOST_REASON = 4000
"""Characters of the reason for which a client ended; what is longer is cut, with a note."""
_MOST_DEPTH = 50

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, where an IPv6 address stands in brackets. Raises ClusterUnreachable: it is none."""
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or not port.isdigit() or (":" in bare and bare == host):
        raise ClusterUnreachable(
            f"{address!r} is no address of a Ray cluster: give HOST:PORT (port 6379 by default), an IPv6 address in "
            "brackets, as [fd00::1]:6379"
        )
    return bare, int(port)


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
    """Return `rollout_id` as an int if it is a whole number from 0 to MOST_ID (numpy's integers too), else raise
    BadInput."""
    return check_number(rollout_id, "rollout id")


def check_version(version: Any, what: str = "weight_version") -> int | None:
    """Like check_rollout_id, for the version of weights or of another value; None stays None."""
    return None if version is None else check_number(version, what)


def check_stamp(stamp: Any) -> str:
    """Return `stamp` if it is a text of at most MOST_STAMP characters (empty: engines say nothing), else raise
    BadInput."""
    if not isinstance(stamp, str) or len(stamp) > MOST_STAMP:
        raise BadInput(f"{_brief(stamp)} is no stamp of weights: give a text of at most {MOST_STAMP} characters")
    return stamp


def check_number(value: Any, what: str, least: int = 0) -> int:
    """Return `value` as an int if it is a whole number from `least` to MOST_ID, else raise BadInput."""
    a_bool = isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b"
    must = f"it must be an int, {least} or greater"
    if a_bool or not hasattr(value, "__index__"):
        raise BadInput(f"{what} {_brief(value)} is a {type(value).__name__}: {must}")
    try:
        number = int(value.__index__())
    except (TypeError, ValueError, RuntimeError):  # arrays and tensors have the method whatever they hold
        raise BadInput(f"{what} {_brief(value)} is no whole number: {must}") from None
    if number < least:
        raise BadInput(f"{what} {number} is too small: {must}")
    if number > MOST_ID:
        raise BadInput(f"{what} {_brief(number)} is too large: the greatest is {MOST_ID} (2**63 - 2)")
    return number


def check_seconds(value: Any, what: str) -> float:
    """Return a number of seconds as a float (below 0: 0), else raise BadInput."""
    try:
        seconds = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        seconds = math.nan
    if math.isnan(seconds):
        raise BadInput(f"{what} {_brief(value)} is a {type(value).__name__}: it must be a number of seconds")
    return max(0.0, seconds)


def check_name(name: Any, what: str) -> str:
    """Return `name` if it is a str of 1 to MOST_NAME characters, else raise BadInput."""
    if not isinstance(name, str) or not name:
        raise BadInput(f"{what} must be a non-empty str, not {_brief(name)}")
    if len(name) > MOST_NAME:
        raise BadInput(f"{what} {_brief(name)} has {len(name)} characters: the most is {MOST_NAME}")
    return str.__str__(name)


def check_names(names: Any, what: str) -> tuple[str, ...]:
    """Return several names as a tuple, else raise BadInput. A single str is refused, not taken as its letters."""
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise BadInput(f"{what} must be a list of names, not {_brief(names)}")
    return tuple(check_name(name, f"a name in {what}") for name in names)


def check_facts(facts: Any, what: str, most_bytes: int | None = MOST_META_BYTES) -> dict[str, Any]:
    """`check_plain` of a dict; None stands for an empty one."""
    if not isinstance(facts, (Mapping, type(None))):
        raise BadInput(f"{what} must be a dict, not {_brief(facts)}")
    found: dict[str, Any] = check_plain({} if facts is None else facts, what, most_bytes)
    return found


def check_plain(value: Any, what: str, most_bytes: int | None = None) -> Any:
    """A copy of `value` in the types that JSON has: None, bool, int, float, str, list, and dict with str keys.

    Tuples become lists, and numpy's numbers Python's; NaN and the infinities stay what they are.

    Raises:
        BadInput: it holds anything else (a tensor, an array, an object, a ref), named by its path; or it takes more
            than `most_bytes` as JSON.
    """
    plain = _plain(value, what, 0)
    try:
        nbytes = len(json.dumps(plain))
    except ValueError as error:  # an int of thousands of digits
        raise BadInput(f"{what} cannot be written as JSON: {error}") from None
    if most_bytes is not None and nbytes > most_bytes:
        raise BadInput(f"{what} takes {nbytes} bytes as JSON, at most {most_bytes} may be: publish arrays as columns")
    return plain


def _plain(value: Any, path: str, depth: int) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    converters: tuple[tuple[type, Callable[[Any], Any]], ...] = ((int, int.__int__), (float, float.__float__))
    for base, convert in (*converters, (str, str.__str__)):
        if isinstance(value, base):  # an enum, numpy's float64
            return convert(value)
    if depth > _MOST_DEPTH:
        raise BadInput(f"{shortened(path, MOST_NAME)} is nested more than {_MOST_DEPTH} deep")
    if isinstance(value, (list, tuple)):
        if {*map(type, value)} <= _PLAIN:  # quick for a million of them
            return [*value]
        return [_plain(item, f"{path}[{number}]", depth + 1) for number, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise BadInput(f"{path} has the key {_brief(key)}, a {type(key).__name__}: keys must be str")
        return {str.__str__(key): _plain(item, f"{path}[{_brief(key)}]", depth + 1) for key, item in value.items()}
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        number = value.item()
        if type(number) in _PLAIN:
            return number
    raise BadInput(
        f"{path} is a {kind.__module__}.{kind.__qualname__}: only what JSON has is taken (numbers, texts, lists, "
        "dicts); publish arrays and tensors as columns"
    )


_PLAIN = {type(None), bool, int, float, str}


def shortened(text: Any, most: int) -> str:
    """A text that is cut behind a word where it has more than `most` characters, with a note of how many are left
    out."""
    text = str(text)
    if len(text) <= most:
        return text
    words = text[: most + 1].rstrip()
    space = max(words.rfind(" "), words.rfind("\n"))
    head = text[: space if len(words) > most and space > most // 2 else most].rstrip()
    return f"{head}... ({len(text) - len(head):,} more characters)"


def in_words(value: Any) -> str:
    """A value that JSON has, as a message shows it: what is not given is "not set", a text is quoted."""
    if value is None:
        return "not set"
    return json.dumps(value) if isinstance(value, (dict, list)) else repr(value)


def _brief(value: Any) -> str:
    """A value as an error message shows it."""
    try:
        return shortened(repr(value), 100)
    except Exception:  # whatever a foreign class does there; an int of thousands of digits
        return f"<{type(value).__name__}>"


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
        at = bisect_right(self._ranges, (number, math.inf)) - 1
        first, end = self._ranges[at]
        self._ranges[at : at + 1] = [r for r in ((first, number), (number + 1, end)) if r[0] < r[1]]

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._ranges, (number, math.inf))
        return bool(at) and number < self._ranges[at - 1][1]

    def __len__(self) -> int:
        return sum(end - first for first, end in self._ranges)

    def __iter__(self) -> Iterator[int]:
        return (number for first, end in self._ranges for number in range(first, end))

    def last(self) -> int:
        """The greatest; -1 where there is none."""
        return self._ranges[-1][1] - 1 if self._ranges else -1


def ids_text(ids: Iterable[int]) -> str:
    """Rollouts in words: "rollouts 0 to 4, 7"."""
    ranges = [(first, end - 1) for first, end in (ids if isinstance(ids, Ids) else Ids(ids)).ranges()]
    if not ranges:
        return "no rollouts"
    alone = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
    words = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in ranges)
    return f"rollout {words}" if alone else f"rollouts {words}"


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
    of_slime: bool = False  # one of slime's jobs, which cannot go on without a rollout that is set aside


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
    stored: str = ""  # its name in the job's durable store (payloads.py); its source there: source_name

    @property
    def made_by(self) -> int | None:
        """`weight_version`; None also where that is no number, as in a record that an older version left."""
        return self.weight_version if type(self.weight_version) is int else None

    @property
    def sound(self) -> bool:
        """Whether the fields have their types. `check_payload` says what is wrong; this is quicker."""
        return (
            (self.weight_version is None or type(self.weight_version) is int)
            and type(self.meta) is dict
            and type(self.nbytes) is int
            and type(self.num_samples) is int
        )


def check_payload(payload: Payload) -> Payload:
    """The record in plain types, as the ledger and its views rely on. Raises BadInput, naming what is wrong."""
    return replace(
        payload,
        nbytes=check_number(payload.nbytes, "nbytes"),
        parts=check_number(payload.parts, "parts", 1),
        num_samples=check_number(payload.num_samples, "num_samples", -1),
        weight_version=check_version(payload.weight_version),
        meta=check_facts(payload.meta, "meta"),
        columns=check_names(payload.columns, "columns"),
        source=check_plain(payload.source, "source", MOST_SOURCE_BYTES),
    )


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
