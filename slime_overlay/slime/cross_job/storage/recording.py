"""A recording: the rollouts of a run in a durable store, for as long as somebody wants them. Needs no Ray.

    NAME/payload/...        the rollouts, as payloads.py keeps payloads: checksums, nothing that could execute
    _recordings/NAME.json   whose they are: the job, the terms on which it ran (handshake.py), whether it ended

What a job keeps in its own durable store has the same form, so that it can be read as a recording, too, as far as the
job has not freed it yet. Only a recording can be written to: in a job's own folder the broker frees what it does not
know.

A rollout is in a recording whole or not at all. Of several versions the newest is the one that counts: it is what a
consumer would have got.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..batch import Batch
from ..errors import BadInput, NotStored, PayloadDamaged, RecordingNotFound, RolloutNotFound, StoreRefused
from ..types import Ids, check_job_id, ids_text
from . import Store
from .payloads import Archive, new_name, opened, sealed
from .wal import Journal

logger = logging.getLogger(__name__)

_HEADERS = "_recordings"  # no job id begins so

RECORDED, IMPORTED = "recorded", "imported"
"""How a recording was made."""


@dataclass(frozen=True)
class Header:
    """Whose rollouts a recording holds."""

    job_id: str  # of the run
    how: str  # recorded | imported
    terms: dict[str, Any] = field(default_factory=dict)  # what the run took for granted, see handshake.py
    begun_at: float = 0.0  # wall clock, seconds
    ended: str = ""  # why there is nothing more to come; empty: the recorder may still be there, or died


@dataclass(frozen=True)
class Recorded:
    """One version of a rollout in a recording."""

    name: str  # of its payload
    rollout_id: int
    version: int
    weight_version: int | None
    num_samples: int
    nbytes: int
    parts: int
    columns: tuple[str, ...]
    meta: dict[str, Any]


class Recording:
    """The rollouts of one run in a store. What is there is listed when it is opened, and by `refresh`.

    Raises:
        RecordingNotFound: the store has nothing under this name; names what it has.
        PayloadDamaged: its header is not what was written.
    """

    def __init__(self, store: Store, name: str, compression: str = "none"):
        self.name, self.shown = check_job_id(name), store.shown
        self._store = store
        self._archive = Archive(store, name, compression)
        self.header = _header(store, name)
        self.damaged: dict[str, str] = {}  # names of payloads whose manifests cannot be read -> why
        self._versions: dict[int, list[Recorded]] = {}
        self._told: dict[str, Any] | None = None  # by the producer of a job whose own folder this is
        self.refresh()
        if self.header is None and not self._versions and not self.damaged:
            there = ", ".join(recordings(store)) or "none"
            raise RecordingNotFound(
                f"{store.shown} has no recording {name!r}, nor rollouts of such a job: it has {there}"
            )

    @classmethod
    def make(cls, store: Store, name: str, header: Header, compression: str = "none") -> "Recording":
        """Begin a recording, or go on with one of the same job.

        Raises:
            BadInput: the name is that of a job's own folder, or of a recording of something else.
        """
        there = _header(store, check_job_id(name))
        if there is None:
            if store.keys(name):
                raise BadInput(
                    f"{store.shown} has {name!r} already, and it is no recording: a job keeps its own payloads there, "
                    "and frees them. Choose another --recording"
                )
            if not store.create(_key(name), _sealed(replace(header, begun_at=time.time()))):
                return cls.make(store, name, header, compression)  # somebody was faster
        elif (there.job_id, there.how) != (header.job_id, header.how):
            raise BadInput(
                f"recording {name!r} in {store.shown} is of another run, {there.how} from {there.job_id}: choose "
                "another --recording"
            )
        return cls(store, name, compression)

    @property
    def terms(self) -> dict[str, Any]:
        """What the run took for granted; {} where nobody said."""
        if self.header is None and self._told is None:
            self._told = _terms_in_journal(self._store, self.name)
        return self.header.terms if self.header is not None else dict(self._told or {})

    def refresh(self) -> None:
        """Look at what is there now."""
        known = {entry.name for versions in self._versions.values() for entry in versions}
        for name in self._archive.names():
            if name in known or name in self.damaged:
                continue
            try:
                body = self._archive.manifest(name)
            except PayloadDamaged as error:
                self.damaged[name] = str(error)
                continue
            except NotStored:  # a job has freed it since
                continue
            about = body["about"]
            if not isinstance(about.get("rollout_id"), int):
                continue  # a value of the job, or where its source of prompts stood
            self._add(_entry(name, about, body["parts"], len(self._versions.get(about["rollout_id"], [])) + 1))

    @property
    def ids(self) -> Ids:
        """Every rollout that is there."""
        return Ids(sorted(self._versions))

    def rollouts(self) -> list[Recorded]:
        """The newest version of each rollout, by id."""
        return [self._versions[rollout_id][-1] for rollout_id in sorted(self._versions)]

    def has(self, rollout_id: int, version: int) -> bool:
        """Whether this version is there."""
        return any(entry.version == version for entry in self._versions.get(rollout_id, []))

    def find(self, rollout_id: int, version: int | None = None) -> Recorded:
        """A rollout (default: its newest version). Raises RolloutNotFound, saying what there is."""
        versions = self._versions.get(rollout_id, [])
        if version is None and versions:
            return versions[-1]
        for entry in versions:
            if entry.version == version:
                return entry
        what = f"rollout {rollout_id}" if version is None else f"version {version} of rollout {rollout_id}"
        damaged = f"; {len(self.damaged)} payloads have damaged manifests" if self.damaged else ""
        raise RolloutNotFound(f"{what} is not in recording {self.name!r}, which has {ids_text(self.ids)}{damaged}")

    def load(self, entry: Recorded) -> list[Batch]:
        """The parts of a rollout, verified. Raises PayloadDamaged (it is in quarantine now), NotStored."""
        return self._archive.load(entry.name)

    def keep(
        self,
        rollout_id: int,
        parts: Sequence[Batch],
        *,
        version: int = 1,
        weight_version: int | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> bool:
        """Add a rollout; when this returns, it is durable. False: it was there, the same bytes.

        Raises:
            BadInput: something else is there under this id and version; `meta` that JSON would change.
            StoreFull, StoreRefused, StoreUnreachable: nothing of it is seen.
        """
        if self.header is None:
            raise BadInput(f"{self.name!r} in {self.shown} is no recording but a job's own folder: nothing is added")
        if self.has(rollout_id, version):
            there = self.load(self.find(rollout_id, version))
            if [part.ipc for part in there] == [part.ipc for part in parts]:
                return False
            raise BadInput(
                f"recording {self.name!r} has another rollout {rollout_id} (version {version}) already, as if job "
                f"{self.header.job_id} was begun anew: choose another --recording"
            )
        about = {
            "rollout_id": rollout_id,
            "version": version,
            "weight_version": weight_version,
            "num_samples": sum(part.num_samples for part in parts),
            "columns": [*parts[0]],
            "meta": _as_json(dict(meta or {}), f"`meta` of rollout {rollout_id}"),
        }
        name = new_name(f"r{rollout_id}-v{version}")
        self._archive.save(name, parts, about)
        self._add(_entry(name, about, [{"nbytes": part.nbytes} for part in parts], version))
        return True

    def end(self, why: str) -> None:
        """Nothing more will come, and why; empty: more may come."""
        self._say(ended=why)

    def set_terms(self, terms: Mapping[str, Any]) -> None:
        """What the run takes for granted."""
        self._say(terms=_as_json(dict(terms), "the terms of the run"))

    def _say(self, **said: Any) -> None:
        assert self.header is not None, "a job's own folder has no header"
        self.header = replace(self.header, **said)
        self._store.put(_key(self.name), _sealed(self.header))

    def _add(self, entry: Recorded) -> None:
        versions = self._versions.setdefault(entry.rollout_id, [])
        versions.append(entry)
        versions.sort(key=lambda e: (e.version, e.name))


def recordings(store: Store) -> list[str]:
    """Names of all recordings of a store, in order."""
    return [key.removeprefix(f"{_HEADERS}/").removesuffix(".json") for key in store.keys(_HEADERS)]


def is_recording(store: Store, name: str) -> bool:
    """Whether the store has a recording of this name."""
    return store.exists(_key(name))


def _entry(name: str, about: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], number: int) -> Recorded:
    return Recorded(
        name=name,
        rollout_id=about["rollout_id"],
        version=about.get("version") or number,
        weight_version=about.get("weight_version"),
        num_samples=about.get("num_samples", -1),
        nbytes=sum(part["nbytes"] for part in parts),
        parts=len(parts),
        columns=tuple(about.get("columns") or ()),
        meta=dict(about.get("meta") or {}),
    )


def _key(name: str) -> str:
    return f"{_HEADERS}/{name}.json"


def _sealed(header: Header) -> bytes:
    return sealed(vars(header))


def _header(store: Store, name: str) -> Header | None:
    try:
        body = opened(store.get(_key(name)))
    except NotStored:
        return None
    except PayloadDamaged as error:
        raise PayloadDamaged(f"the header of recording {name!r} in {store.shown}: {error}") from None
    try:
        return Header(**body)
    except TypeError:
        raise PayloadDamaged(
            f"the header of recording {name!r} in {store.shown} says something else than this version knows"
        ) from None


def _terms_in_journal(store: Store, job_id: str) -> dict[str, Any]:
    """What the producer of a job took for granted that keeps its payloads itself."""
    try:
        found = Journal(store, job_id).load()
    except StoreRefused as error:
        logger.warning("the terms of job %s are not known: %s", job_id, error)
        return {}
    return {} if found is None or found[0].producer is None else found[0].producer.terms


def _as_json(value: Any, what: str) -> Any:
    """The value, if JSON gives it back as it is. Raises BadInput."""
    try:
        same = json.loads(json.dumps(value)) == value
    except (TypeError, ValueError) as error:
        raise BadInput(f"{what} cannot be recorded: {error}") from None
    if not same:
        raise BadInput(f"{what} cannot be recorded, because JSON would change it: use lists, and keys that are texts")
    return value
