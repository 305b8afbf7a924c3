"""What the ledger knows of a job, in a durable store: numbered entries, each created where there is none.

    JOB/journal/0000000000000042.json    the job as it was then, and what changed in its tables since the entry before

An entry is durable before anybody is answered, so a cluster that is lost entirely forgets nothing that it said. Of two
brokers that both think that they keep a job, one finds its next number taken: it is fenced, and knows it at once
(compare-and-set, by `Store.create`). From time to time an entry holds the tables whole, and those before it go, oldest
first, some with each entry that follows: a broker that slept meanwhile, and takes a number that is free again, knows
it by the one before, which is gone.

Where the one before is gone, and nobody else has written since, the store was emptied: a folder deleted, a Redis
flushed. The broker that keeps the job still knows all of it: its next entry is whole, under the next number.
"""

import logging
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import BadInput, Fenced, NotStored, PayloadDamaged, StoreRefused
from ..ledger.changes import Marks, bare, changes
from ..ledger.history import SMALL_EVENTS, SMALL_PROGRESS
from ..ledger.records_json import decode, encode
from ..ledger.state import FOR_PEOPLE, TABLES, Client, Job
from ..ledger.tables import Change, Table
from . import Store
from .calls import progress
from .payloads import opened, sealed

logger = logging.getLogger(__name__)

OWNER = "keeper.json"  # as the first versions named it
_OLD_AT_ONCE = 32  # entries that go with each that is written: who waits for it does not wait for thousands
_WHOLE_EVERY = 500  # entries, or twice as many as there are rows of what is retained, whichever is more


class Journal:
    """The entries of one job, as one broker writes them: one at a time; `is_ours` may be asked beside.

    Args:
        me: names this broker in its signs of life.
        on_emptied: called, in any thread, when it is found out that the store was emptied.
    """

    def __init__(self, store: Store, job_id: str, me: str = "", on_emptied: Callable[[], None] = lambda: None):
        self._store, self._job_id, self._me, self._on_emptied = store, job_id, me, on_emptied
        self._anew = False  # the next entry needs none before it
        self._writer = uuid.uuid4().hex  # which entries are ours
        self._number = -1  # of the newest entry
        self.written_by = ""  # the broker that wrote the newest entry, once it was read; earlier versions did not say
        self._marks: Marks = {}
        self._since_whole = 0
        self._old: list[str] = []  # entries that go, oldest first

    def load(self) -> tuple[Job, list[Client]] | None:
        """The job as its newest entry says, with its tables, and its clients; None: there is none.

        Raises:
            Torn: entries are missing. StoreRefused: entries are damaged, or of another version.
        """
        keys = self._store.keys(f"{self._job_id}/journal")
        self._number = int(keys[-1].rpartition("/")[2].removesuffix(".json")) if keys else -1
        found, whole, expected = None, False, 0
        deltas: list[dict[str, Any]] = []
        for key in reversed(keys):
            progress()
            try:
                body = opened(self._store.get(key))
                text, whole, number = body["state"].encode(), body["whole"], int(body["number"])
                if self.key(number) != key:
                    raise PayloadDamaged(f"it is entry {number}")
                state = decode(text)
            except (PayloadDamaged, BadInput, NotStored, KeyError, AttributeError, TypeError, ValueError) as error:
                raise self._unreadable(key, str(error)) from None
            if deltas and number != expected:
                raise self._torn(key, f"the entry after it, {expected}, is missing", found)
            expected = number - 1
            if found is None:
                found, self.written_by = state, str(body.get("broker", ""))
            deltas.append(state["changes"])
            if whole:
                break
        if found is None:
            return None
        if not whole:
            raise self._torn(keys[0], "no entry before it holds all", found)
        job: Job = found["job"]
        for name in TABLES:
            rows: dict[int, Any] = {}
            for told in reversed(deltas):
                Change(*told.get(name, (True, [], {}))).apply(rows)  # one that is newer than the entry
            setattr(job, name, Table(rows))
        self._marks = {}  # the next entry is whole, and ours
        return job, found["clients"]

    def _unreadable(self, key: str, why: str) -> StoreRefused:
        return StoreRefused(
            f"{self._store.shown}: {key}, which says how job {self._job_id} stands, cannot be read: {why}. Restore it "
            "from a backup, or begin anew under another --job-id, from a checkpoint"
        )

    def _torn(self, key: str, why: str, newest: dict[str, Any] | None) -> "Torn":
        torn = Torn(str(self._unreadable(key, why)))
        torn.revision = newest["job"].revision if newest else 0
        return torn

    def is_ours(self) -> bool:
        """Whether nobody else has written since. Also beside an entry that is on its way, in another thread: that
        cleans up only behind a number that is noted by then."""
        while True:
            number = self._number
            following = self.key(number + 1)
            if self._is_left(number) and (not self._store.exists(following) or self._is_writer(following)):
                return True
            if number != self._number:
                continue
            emptied = not self._has_another(number)
            if number == self._number:
                if emptied:
                    self.begin_anew()
                return emptied

    def begin_anew(self) -> None:
        """The store lost what was written: the next entry is whole, and needs none before it."""
        self._anew = True
        self._marks, self._old = {}, []
        self._on_emptied()

    def _has_another(self, number: int) -> bool:
        """Whether another broker goes on with this job: it has written an entry behind this one, or signs of life."""
        later = [key for key in self._store.keys(f"{self._job_id}/journal") if key > self.key(number)]
        if any(not self._is_writer(key) for key in later):
            return True
        owner = owner_of(self._store, self._job_id)
        return owner is not None and owner.get("broker") != self._me

    def _is_left(self, number: int) -> bool:
        """Whether nobody has gone on from this entry, and cleaned up behind himself; -1: from nothing."""
        if number < 0:
            return self._store.keys(f"{self._job_id}/journal") in ([], [self.key(0)])
        return self._store.exists(self.key(number))

    def _is_writer(self, key: str) -> bool:
        try:
            return bool(opened(self._store.get(key))["writer"] == self._writer)
        except (PayloadDamaged, NotStored, KeyError, TypeError):
            return False

    def entry(self, job: Job, clients: list[Client]) -> "Entry":
        """What is to be written of the job as it is now: serialised here, but for the changes, whose records nobody
        changes. Those are serialised where they are written, by `Entry.write` in any thread, because all of a job with
        thousands of rollouts take a second."""
        rows = sum(len(getattr(job, name)) for name in TABLES if name not in FOR_PEOPLE)
        whole = not self._marks or self._since_whole >= max(_WHOLE_EVERY, 2 * rows)
        tables, marks = changes(job, None if whole else self._marks)
        now = replace(bare(job), store=None)
        text = encode({"job": now, "clients": [_without_store(client) for client in clients]})
        told = {name: (c.whole, c.over, c.new) for name, c in tables.items()}
        return Entry(self, self._number + 1, text, told, all(c.whole for c in tables.values()), marks)

    def last_entry(self, job: Job, clients: list[Client]) -> "Entry":
        """An entry that needs none before it, with little of what is for people."""
        few = {"progress": SMALL_PROGRESS, "events": SMALL_EVENTS}
        newest: dict[str, Any] = {name: Table([*getattr(job, name).items()][-number:]) for name, number in few.items()}
        self._marks = {}
        return self.entry(replace(job, **newest), clients)

    def delete_before(self, entry: "Entry") -> None:
        """Delete every entry before this one, which is whole."""
        mine = self.key(entry.number)
        self._store.delete([key for key in self._store.keys(f"{self._job_id}/journal") if key < mine])

    def _written(self, entry: "Entry") -> None:
        self._number = entry.number
        if entry.whole or not self._anew:
            self._marks, self._anew = entry.marks, False
        self._since_whole = 0 if entry.whole else self._since_whole + 1

    def key(self, number: int) -> str:
        return f"{self._job_id}/journal/{number:016d}.json"


class Torn(StoreRefused):
    """Entries of a journal are missing: nobody can go on from it who does not know the job otherwise."""

    revision = 0  # of the job, in the newest entry


class Outdated(Exception):
    """This entry was made before it was known that another one of ours has its number, or that the store was emptied:
    make it anew."""


class Entry:
    """One entry, on its way into the store."""

    def __init__(
        self,
        journal: Journal,
        number: int,
        now: bytes,
        changes: dict[str, Any],
        whole: bool,
        marks: Marks,
    ):
        self.journal, self._now, self._changes, self.job_id = journal, now, changes, journal._job_id
        self._state = ""
        self.number, self.whole, self.marks = number, whole, marks
        self.drops: list[str] = []  # names of payloads that it gives up

    def write(self) -> None:
        """Make it durable.

        Raises:
            Fenced: another broker has written this number: it keeps the job now.
            Outdated. StoreFull, StoreRefused, StoreUnreachable: it may be tried again.
        """
        journal = self.journal
        store = journal._store
        if not self._state:
            self._state = f'{{"changes":{encode(self._changes).decode()},{self._now.decode()[1:]}'
        body = {"state": self._state, "whole": self.whole, "number": self.number, "writer": journal._writer}
        body["broker"] = journal._me
        data = sealed(body)
        key = journal.key(self.number)
        is_new = store.create(key, data)
        needs_one_before = not (journal._anew and self.whole)
        if not needs_one_before or not journal._is_left(self.number - 1):
            has_another = journal._has_another(self.number - 1)
            if is_new and (has_another or needs_one_before):  # an emptied store is to begin with all
                store.delete([key])
            if has_another:
                raise Fenced(f"job {journal._job_id} is kept by another broker now, in the same store {store.shown}")
            if needs_one_before:
                journal.begin_anew()
                raise Outdated(f"{store.shown} was emptied before entry {self.number}")
        if not is_new and bytes(memoryview(store.get(key))) != data:
            if journal._is_writer(key):  # an earlier one of ours, of which we did not hear that it was written
                journal._number, journal._marks = self.number, {}
                raise Outdated(f"entry {self.number} was written before")
            raise Fenced(f"job {journal._job_id} is kept by another broker now, in the same store {store.shown}")
        journal._written(self)
        if self.whole:
            journal._old = [old for old in store.keys(f"{journal._job_id}/journal") if old < key]
        store.delete(journal._old[:_OLD_AT_ONCE])
        del journal._old[:_OLD_AT_ONCE]


def owner_of(store: Store, job_id: str) -> dict[str, Any] | None:
    """The last sign of life of who keeps a journal."""
    try:
        return dict(opened(store.get(f"{job_id}/{OWNER}")))
    except (NotStored, PayloadDamaged):
        return None


def _without_store(client: Client) -> Client:
    """Its URI may hold a password."""
    return replace(client, stated={name: value for name, value in client.stated.items() if name != "store"})
