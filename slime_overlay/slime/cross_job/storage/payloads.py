"""Payloads in a durable store: a file of Arrow IPC for each part, then a manifest in JSON that says what they are.

    JOB/payload/NAME.0.arrow ...   the parts; with compression, the same bytes compressed by Arrow's codec
    JOB/payload/NAME.json          the manifest, written last: what has none was never published
    JOB/quarantine/NAME.json       why a payload is not read any more; its files stay, for whoever wants to know
    JOB/mark.json                  that the broker sees this store; who does not find it there looks at another one

NAME begins with the time (ms), so that names in order are payloads in the order in which they were written, as far
as the clocks of nodes agree: nothing else hangs on it. Every part and the manifest have a checksum (XXH3, 128 bits),
which is verified whenever they are read; what does not match goes to quarantine. Reading executes nothing that a store
may hold: JSON, and Arrow buffers that are checked as they are used.
"""

import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..batch import Batch
from ..errors import BadInput, BatchError, CrossJobError, NotStored, PayloadDamaged, StoreUnreachable
from ..settings import COMPRESSIONS
from ..types import shortened
from . import Store
from .calls import progress

logger = logging.getLogger(__name__)

FORMAT = 1
_FEW = 8  # manifests, which are read sooner than all names are listed
_PAGE = 64  # keys that are deleted at once
_LEFT_S = 0.1  # at most, to others, after each page
_LONG_S = 600.0  # for a payload to be written
_SUFFIX = {"none": "arrow", "lz4": "arrow.lz4", "zstd": "arrow.zst"}


class Archive:
    """The payloads of one job in a store."""

    @property
    def store(self) -> Store:
        return self._store

    def __init__(self, store: Store, job_id: str, compression: str = "none"):
        if compression not in COMPRESSIONS:
            raise BadInput(f"compression {compression!r} must be one of {', '.join(COMPRESSIONS)}")
        self._store, self._job_id, self._compression = store, job_id, compression

    def save(self, name: str, parts: Sequence[Batch], about: Mapping[str, Any]) -> None:
        """Keep the parts of a payload under a `new_name`. When this returns, it is durable.

        Args:
            about: JSON-able facts, for whoever looks at the store.

        Raises:
            StoreFull, StoreRefused, StoreUnreachable: nothing of it is seen.
        """
        described, written, began = [], [], time.monotonic()
        self._store.check_room(sum(part.nbytes for part in parts))
        try:
            for number, part in enumerate(parts):
                raw = part.ipc
                data = raw if self._compression == "none" else pa.compress(raw, codec=self._compression)
                written.append(self._part(name, number, self._compression))
                self._store.put(written[-1], data)
                described.append(
                    {"nbytes": raw.size, "stored_bytes": memoryview(data).nbytes, "xxh3_128": checksum(data)}
                )
            body = {
                "job_id": self._job_id,
                "name": name,
                "written_at": time.time(),
                "compression": self._compression,
                "parts": described,
                "about": dict(about),
            }
            self._store.put(self._manifest(name), sealed(body))
            if time.monotonic() - began > _LONG_S and not all(map(self._store.exists, written)):
                raise StoreUnreachable(f"parts of payload {name} were taken for leftovers: it took too long to write")
        except Exception:
            self._forget([self._manifest(name), *written])
            raise

    def load(self, name: str) -> list[Batch]:
        """As `read`; what is damaged is put into quarantine."""
        try:
            return self.read(name)
        except PayloadDamaged as error:
            self._quarantine(name, str(error))
            raise

    def read(self, name: str) -> list[Batch]:
        """The parts of a payload, each verified. Writes nothing.

        Raises:
            PayloadDamaged: it is not what was saved. NotStored: it was freed. StoreUnreachable.
        """
        try:
            manifest = self._read_manifest(name)
            parts = manifest["parts"]
            return [self._read_part(name, number, part, manifest) for number, part in enumerate(parts)]
        except (PayloadDamaged, NotStored) as error:
            if isinstance(error, NotStored) and not self._store.exists(self._manifest(name)):
                raise
            raise PayloadDamaged(f"payload {name} of job {self._job_id} in {self._store.shown}: {error}") from None

    def manifest(self, name: str) -> dict[str, Any]:
        """What a payload is, without reading it: {"about", "parts", "written_at", ...} as it was saved.

        Raises:
            PayloadDamaged: its manifest is not what was written. NotStored. StoreUnreachable.
        """
        return self._read_manifest(name)

    def names(self) -> list[str]:
        """Every payload that is whole, oldest first."""
        return [
            key.rpartition("/")[2].removesuffix(".json")
            for key in self._store.keys(f"{self._job_id}/payload")
            if key.endswith(".json")
        ]

    def delete(self, names: Sequence[str]) -> None:
        """Free payloads: the manifests first, so that none is there without its parts. Which parts there are say the
        manifests of few, and one listing of many: to read thousands, one after the other, takes minutes. Many go page
        by page, and three quarters of the time are left to those who write."""
        if len(names) > _FEW:
            parts = self._listed_parts({*names})
        else:
            parts = [part for name in names for part in self._parts_of(name)]
        for keys in ([self._manifest(name) for name in names], parts):
            for at in range(0, len(keys), _PAGE):
                progress()
                began = time.monotonic()
                self._store.delete(keys[at : at + _PAGE])
                if len(keys) > _PAGE:
                    time.sleep(min(3 * (time.monotonic() - began), _LEFT_S))

    def leftovers(self) -> list[str]:
        """Keys of parts without a manifest: a writer is at them, or has died."""
        keys = self._store.keys(f"{self._job_id}/payload")
        whole = {key.removesuffix(".json") for key in keys if key.endswith(".json")}
        return [k for k in keys if not k.endswith(".json") and f"{k.rpartition('/')[0]}/{_stem(k)}" not in whole]

    def delete_leftovers(self, keys: Sequence[str]) -> None:
        """Delete those of these parts that have no manifest still."""
        left = {*self.leftovers()}
        self._store.delete([key for key in keys if key in left])

    def forget_quarantined(self, names: Sequence[str]) -> None:
        """Delete what is in quarantine under these names, with what it was about."""
        self.delete(names)
        self._store.delete([f"{self._job_id}/quarantine/{name}.json" for name in names])

    def quarantined(self) -> dict[str, str]:
        """Name -> why it is not read any more."""
        found = {}
        for key in self._store.keys(f"{self._job_id}/quarantine"):
            progress()
            try:
                why = str(opened(self._store.get(key))["why"])
            except (PayloadDamaged, NotStored, KeyError) as error:
                why = str(error)
            found[key.rpartition("/")[2].removesuffix(".json")] = why
        return found

    # ------------------------------------------------------------------ inside

    def _parts_of(self, name: str) -> list[str]:
        try:
            body = self._read_manifest(name)
            return [self._part(name, number, body["compression"]) for number in range(len(body["parts"]))]
        except NotStored:
            return []  # what a writer that died left of it is found by `leftovers`
        except PayloadDamaged:
            return self._listed_parts({name})

    def _listed_parts(self, names: set[str]) -> list[str]:
        keys = self._store.keys(f"{self._job_id}/payload")
        return [key for key in keys if not key.endswith(".json") and _stem(key) in names]

    def _read_manifest(self, name: str) -> dict[str, Any]:
        body = opened(self._store.get(self._manifest(name)))
        try:
            shape_is_right = (
                body["name"] == name
                and body["job_id"] == self._job_id
                and body["compression"] in COMPRESSIONS
                and isinstance(body["written_at"], (int, float))
                and isinstance(body["about"], dict)
                and all(
                    isinstance(part["nbytes"], int)
                    and part["nbytes"] >= 0
                    and isinstance(part["stored_bytes"], int)
                    and isinstance(part["xxh3_128"], str)
                    for part in body["parts"]
                )
            )
        except (KeyError, TypeError):
            shape_is_right = False
        if not shape_is_right:
            raise PayloadDamaged("its manifest is of another payload, or says less than it must")
        return body

    def _read_part(self, name: str, number: int, part: Mapping[str, Any], manifest: Mapping[str, Any]) -> Batch:
        compression = manifest["compression"]
        data = self._store.get(self._part(name, number, compression))
        if data.size != part["stored_bytes"]:
            raise PayloadDamaged(f"part {number} has {data.size} bytes, and was written with {part['stored_bytes']}")
        if checksum(data) != part["xxh3_128"]:
            raise PayloadDamaged(f"part {number} has another checksum than when it was written")
        try:
            raw = data if compression == "none" else pa.decompress(data, part["nbytes"], codec=compression)
            return Batch.from_ipc(raw)
        except (BatchError, pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise PayloadDamaged(f"part {number} is no batch: {error}") from None

    def _quarantine(self, name: str, why: str) -> None:
        logger.error("job %s: payload %s goes to quarantine: %s", self._job_id, name, why)
        note = sealed({"name": name, "why": why, "at": time.time()})
        try:
            self._store.put(f"{self._job_id}/quarantine/{name}.json", note)
        except CrossJobError as error:  # that it is damaged matters more
            logger.error("job %s: that cannot be noted: %s", self._job_id, error)

    def _forget(self, keys: list[str]) -> None:
        try:
            self._store.delete(keys)
        except Exception as error:  # they are found later, see leftovers
            logger.info("%s: what was written of a payload stays for now: %s", self._store.shown, error)

    def _manifest(self, name: str) -> str:
        return f"{self._job_id}/payload/{name}.json"

    def _part(self, name: str, number: int, compression: str) -> str:
        return f"{self._job_id}/payload/{name}.{number}.{_SUFFIX[compression]}"


def marked(store: Store, job_id: str, mark: str = "") -> str:
    """Mark a store as that of the broker of a job: with `mark`, if it has none. Returns its mark."""
    key, mark = f"{job_id}/mark.json", mark or uuid.uuid4().hex
    if store.create(key, sealed({"mark": mark})):
        return mark
    return mark_of(store, job_id) or mark


def mark_of(store: Store, job_id: str) -> str:
    """The mark that the broker of this job has left in a store; empty: none."""
    try:
        return str(opened(store.get(f"{job_id}/mark.json"))["mark"])
    except (NotStored, PayloadDamaged, KeyError, TypeError):
        return ""


def new_name(token: str) -> str:
    """Name for a payload that is written from now on."""
    return f"{int(time.time() * 1000):013d}-{token}"


def sealed(body: Mapping[str, Any]) -> bytes:
    """JSON with a format version and a checksum of its own."""
    try:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise BadInput(f"a durable store takes what JSON can hold: {error}") from None
    seal = {"format": FORMAT, "xxh3_128": checksum(text.encode())}
    return json.dumps(seal)[:-1].encode() + b', "body": ' + text.encode() + b"}"


def opened(data: Any) -> Any:
    """The body of what was `sealed`. Raises PayloadDamaged, naming what is wrong."""
    try:
        whole = json.loads(bytes(memoryview(data)))
        version, seal, body = whole["format"], whole["xxh3_128"], whole["body"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PayloadDamaged(f"its manifest is not readable: {type(error).__name__}: {error}") from None
    if version != FORMAT:
        raise PayloadDamaged(
            f"it has format {shortened(version, 20)}, this version reads format {FORMAT}: upgrade slime cross-job"
        )
    if checksum(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()) != seal:
        raise PayloadDamaged("its manifest has another checksum than when it was written")
    return body


def checksum(data: Any) -> str:
    """XXH3 (128 bits) of a buffer, as hexadecimal digits."""
    try:
        import xxhash
    except ImportError:
        raise BadInput("durable stores need the package xxhash: pip install xxhash") from None
    return str(xxhash.xxh3_128_hexdigest(memoryview(data)))


def _stem(key: str) -> str:
    return key.rpartition("/")[2].partition(".")[0]
