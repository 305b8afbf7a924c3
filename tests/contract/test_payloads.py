"""Payloads in every store: what is damaged, foreign or hostile is named, goes to quarantine, and executes nothing."""

import json
import pickle
import time
from typing import Any

import pyarrow as pa
import pytest

from slime.cross_job.batch import Batch
from slime.cross_job.errors import BadInput, NotStored, PayloadDamaged, StoreUnreachable
from slime.cross_job.storage.payloads import Archive, checksum, new_name, opened, sealed

from .conftest import deaths

COLUMNS = {"tokens": [[1, 2, 3], [4]], "rewards": [0.5, 1.0], "texts": ["a", "é"]}


def batches(count: int = 2) -> list[Batch]:
    return [Batch.pack({**COLUMNS, "part": [n, n]}) for n in range(count)]


def saved(archive: Archive, token: str, parts: list[Batch] | None = None) -> str:
    name = new_name(token)
    archive.save(name, batches() if parts is None else parts, {"rollout_id": 3})
    return name


@pytest.fixture
def archive(store) -> Archive:
    return Archive(store, "exp")


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_what_is_saved_is_loaded_by_whoever_opens_the_store(place, store, compression):
    name = saved(Archive(store, "exp", compression), "t0")
    again = Archive(place.open(), "exp")
    assert [part.to_pydict() for part in again.load(name)] == [part.to_pydict() for part in batches()]
    manifest = opened(store.get(manifest_key(name)))
    assert manifest["about"] == {"rollout_id": 3}
    assert abs(manifest["written_at"] - time.time()) < 60
    assert [part["nbytes"] for part in manifest["parts"]] == [part.nbytes for part in batches()]
    stored = [part["stored_bytes"] for part in manifest["parts"]]
    assert stored == [store.get(key).size for key in store.keys("exp/payload") if not key.endswith(".json")]
    assert (stored == [part.nbytes for part in batches()]) == (compression == "none")
    assert again.names() == [name]
    assert Archive(store, "other").names() == []


def test_payloads_are_listed_in_the_order_in_which_they_were_written(archive):
    names = []
    for token in ("z", "a", "m"):
        names.append(saved(archive, token, batches(1)))
        time.sleep(0.002)
    assert archive.names() == names


def test_what_is_freed_is_gone_with_all_its_files(archive, store):
    keep, free = saved(archive, "t0"), saved(archive, "t1")
    archive.delete([free, "0000000000000-never"])
    assert archive.names() == [keep]
    assert len(store.keys("exp")) == 3
    with pytest.raises(NotStored):
        archive.load(free)
    assert archive.quarantined() == {}


def test_many_are_freed_by_one_listing(archive, store, monkeypatch):
    """With parts whose manifests are damaged, and none of what is kept."""
    parts = batches(1)
    names = [saved(archive, f"t{number}", parts) for number in range(20)]
    keep, damaged, free = names[0], names[1], names[1:]
    store.put(manifest_key(damaged), b"no manifest")
    read, listed = [], []
    keys = store.keys
    monkeypatch.setattr(store, "get", read.append)
    monkeypatch.setattr(store, "keys", lambda prefix: listed.append(prefix) or keys(prefix))
    archive.delete([*free, "0000000000000-never"])
    assert (read, listed) == ([], ["exp/payload"])
    assert keys("exp") == [f"exp/payload/{keep}.0.arrow", manifest_key(keep)]


def test_what_is_in_quarantine_is_not_swept(archive, store):
    """Its files stay for whoever wants to know; its manifest may be what is damaged."""
    whole, bad, worse = (saved(archive, token) for token in ("t0", "t1", "t2"))
    store.put(part_key(bad), b"")
    store.put(manifest_key(worse), b"no manifest")
    for name in (bad, worse):
        with pytest.raises(PayloadDamaged):
            archive.load(name)
    store.put(f"exp/payload/{new_name('left')}.0.arrow", b"v")
    before = [key for key in store.keys("exp") if "left" not in key]
    left = archive.leftovers()
    assert len(left) == 1, "what has no manifest is left: else nothing is tested"
    archive.delete_leftovers([*left, part_key(whole)])
    assert store.keys("exp") == before
    assert {*archive.quarantined()} == {bad, worse}
    assert whole in archive.names()


def test_a_payload_whose_parts_were_taken_for_leftovers_was_not_saved(archive, store, monkeypatch):
    """It took too long to write: its parts are gone before its manifest is there."""
    monkeypatch.setattr("slime.cross_job.storage.payloads._LONG_S", -1.0)
    saved(archive, "t0")
    put = store.put

    def swept(key: str, data: Any) -> None:
        if key.endswith(".json"):
            archive.delete_leftovers(archive.leftovers())
        put(key, data)

    monkeypatch.setattr(store, "put", swept)
    with pytest.raises(StoreUnreachable, match="took too long to write"):
        saved(archive, "t1")
    assert len(archive.names()) == 1


def manifest_key(name: str) -> str:
    return f"exp/payload/{name}.json"


def part_key(name: str) -> str:
    return f"exp/payload/{name}.1.arrow"


def rewritten(store, payload: str, /, **changes) -> bytes:
    """The manifest with something else in it, and a checksum that is right."""
    return sealed({**opened(store.get(manifest_key(payload))), **changes})


class Hostile:
    """Unpickling it would raise."""

    def __reduce__(self):
        return exec, ("raise SystemExit('it was executed')",)


def foreign_arrow() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"x": [1]})
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def with_right_checksum(store, name: str, data: bytes) -> None:
    """The part is something else, and the manifest says that this is right: as a hostile writer would do it."""
    parts = opened(store.get(manifest_key(name)))["parts"]
    parts[1] = {"nbytes": len(data), "stored_bytes": len(data), "xxh3_128": checksum(data)}
    store.put(part_key(name), data)
    store.put(manifest_key(name), rewritten(store, name, parts=parts))


DAMAGES = {
    "a part that is cut off": (
        lambda s, n: s.put(part_key(n), s.get(part_key(n)).to_pybytes()[:-8]),
        "part 1 has .* bytes, and was written with",
    ),
    "a part that is empty": (lambda s, n: s.put(part_key(n), b""), "part 1 has 0 bytes"),
    "a part that is missing": (lambda s, n: s.delete([part_key(n)]), r"has no exp/payload/.*\.1\.arrow"),
    "a bit of a part": (
        lambda s, n: s.put(part_key(n), flipped(s.get(part_key(n)).to_pybytes(), 700)),
        "part 1 has another checksum",
    ),
    "a bit of the manifest": (
        lambda s, n: s.put(
            manifest_key(n), s.get(manifest_key(n)).to_pybytes().replace(b'"nbytes":', b'"nbytez":', 1)
        ),
        "its manifest has another checksum",
    ),
    "a manifest that is cut off": (
        lambda s, n: s.put(manifest_key(n), s.get(manifest_key(n)).to_pybytes()[:-20]),
        "its manifest is not readable",
    ),
    "a manifest that is a pickle": (
        lambda s, n: s.put(manifest_key(n), pickle.dumps(Hostile())),
        "its manifest is not readable",
    ),
    "a manifest of another payload": (
        lambda s, n: s.put(manifest_key(n), rewritten(s, n, name="0000000000000-other")),
        "of another payload, or says less",
    ),
    "a manifest that lacks something": (
        lambda s, n: s.put(manifest_key(n), sealed({"name": n})),
        "of another payload, or says less",
    ),
    "a manifest with impossible sizes": (
        lambda s, n: s.put(
            manifest_key(n), rewritten(s, n, parts=[{"nbytes": -1, "stored_bytes": 0, "xxh3_128": ""}])
        ),
        "of another payload, or says less",
    ),
    "an unknown format version": (
        lambda s, n: s.put(manifest_key(n), json.dumps({"format": 99, "xxh3_128": "", "body": {}}).encode()),
        "it has format 99, this version reads format 1: upgrade",
    ),
    "a manifest that is deep": (lambda s, n: s.put(manifest_key(n), b"[" * 100_000), "its manifest is not readable"),
    "a part that is a pickle": (
        lambda s, n: with_right_checksum(s, n, pickle.dumps(Hostile())),
        "part 1 is no batch",
    ),
    "a part of another Arrow writer": (lambda s, n: with_right_checksum(s, n, foreign_arrow()), "part 1 is no batch"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_payload_goes_to_quarantine(place, store, archive, damage):
    harm, said = DAMAGES[damage]
    good, bad = saved(archive, "t0"), saved(archive, "t1")
    harm(store, bad)
    before = {key: bytes(memoryview(store.get(key))) for key in store.keys("exp")}
    with pytest.raises(PayloadDamaged, match=said):
        archive.read(bad)
    assert {key: bytes(memoryview(store.get(key))) for key in store.keys("exp")} == before
    with pytest.raises(PayloadDamaged, match=said) as raised:
        archive.load(bad)
    assert bad in str(raised.value)
    assert [*archive.quarantined()] == [bad]
    assert [part.to_pydict() for part in Archive(place.open(), "exp").load(good)]
    archive.delete([bad])
    assert [key for key in store.keys("exp/payload") if bad in key] == []


def test_compressed_parts_that_lie_about_their_size_are_damage(store):
    archive = Archive(store, "exp", "zstd")
    name = saved(archive, "t0", batches(1))
    parts = opened(store.get(manifest_key(name)))["parts"]
    parts[0]["nbytes"] += 8
    store.put(manifest_key(name), rewritten(store, name, parts=parts))
    with pytest.raises(PayloadDamaged, match="part 0 is no batch"):
        archive.load(name)


def test_what_is_no_json_is_refused_before_anything_is_written(archive, store):
    with pytest.raises(BadInput, match="what JSON can hold"):
        archive.save(new_name("t0"), batches(), {"meta": {"x": object()}})
    assert store.keys("exp") == []


@pytest.mark.parametrize("place", ["file", "redis"], indirect=True)
def test_a_payload_whose_writer_dies_anywhere_is_whole_or_not_there(place, store):
    """And what the dead one left is found and removed; nothing else is."""
    whole = saved(Archive(store, "exp"), "good")
    seen = set()
    for after, death in deaths():
        dying = Archive(place.open_crashing(after), "exp")
        name = f"{after:013d}-t{after}"
        with death:
            dying.save(name, batches(), {})
        archive = Archive(place.open(), "exp")
        there = name in archive.names()
        seen.add(there)
        if there:
            assert [part.to_pydict() for part in archive.load(name)] == [part.to_pydict() for part in batches()]
        assert whole in archive.names()
    assert False in seen, "nothing died before the manifest: nothing was tested"
    archive = Archive(place.open(), "exp")
    archive.delete([name for name in archive.names() if name != whole])
    archive.delete_leftovers(archive.leftovers())
    assert {key.partition(".")[0] for key in store.keys("exp/payload")} == {f"exp/payload/{whole}"}
