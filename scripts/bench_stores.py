"""What a durable store costs: a rollout written and read again, against the plain ways on the same disk or server.

Plain ways: torch.save and torch.load (not synced), of what slime holds (lists, or a tensor a sample), and pickle
through Redis. Ours: pack, write durably (synced, with checksums), read, verify, open every column. Bare: as many
bytes, already in one piece, written, synced and read, which no way can be faster than. All ways read from the page
cache. Run by itself: `scripts/bench.sh --stores [--quick]`.
"""

import contextlib
import os
import pickle
import random
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench_actors import columns_of, tensors_of
from bench_report import Target, spread, summary, table, targets_table
from slime.cross_job.batch import Batch
from slime.cross_job.storage import open_store
from slime.cross_job.storage.payloads import Archive, new_name

_MB = 1_000_000


def large(nbytes: int) -> dict[str, list[Any]]:
    """64 samples, a tensor each."""
    rng = np.random.default_rng(0)
    return {"tokens": [torch.from_numpy(rng.integers(0, 1 << 30, nbytes // 256).astype(np.int32)) for _ in range(64)]}


def measure(quick: bool, folder: Path) -> dict[str, Any]:
    """Medians by (store, what is handed over, way): {"write_ms", "read_ms", "both_ms"}."""
    lists = columns_of(512, 0)
    cases: list[tuple[str, Any, int]] = [
        ("20 MB, lists", lists, 3 if quick else 7),
        ("20 MB, tensors", tensors_of(lists), 3 if quick else 7),
    ]
    if not quick:
        cases.append(("1 GB, tensors", large(1000 * _MB), 3))
    found: dict[str, Any] = {}
    with own_redis() as redis_uri:
        for store, uri in (("filesystem", f"file://{folder}/store"), ("Redis", redis_uri)):
            if uri is None:
                continue
            for what, columns, repeats in cases:
                on_disk = store == "filesystem"
                ways = {
                    "plain": plain_file(folder) if on_disk else plain_redis(uri),
                    "ours": ours(uri),
                    "bare": bare_file(folder) if on_disk else bare_redis(uri),
                }
                times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
                for turn in range(repeats + 1):
                    for way in random.Random(turn).sample([*ways], len(ways)):
                        write_ms, read_ms = ways[way](columns)
                        if turn:
                            times[way]["write_ms"].append(write_ms)
                            times[way]["read_ms"].append(read_ms)
                            times[way]["both_ms"].append(write_ms + read_ms)
                found[f"{store}, {what}"] = {
                    way: {name: summary(values) for name, values in by_name.items()} for way, by_name in times.items()
                }
    return found


def ours(uri: str) -> Callable[[Any], tuple[float, float]]:
    archive = Archive(open_store(uri), "bench")

    def hand_over(columns: Any) -> tuple[float, float]:
        name = new_name("t")
        start = time.perf_counter()
        archive.save(name, [Batch.pack(columns)], {})
        written = time.perf_counter()
        (batch,) = archive.load(name)
        opened = {column: batch[column] for column in batch}
        done = time.perf_counter()
        assert len(opened) == len(columns)
        archive.delete([name])
        return 1e3 * (written - start), 1e3 * (done - written)

    return hand_over


def plain_file(folder: Path) -> Callable[[Any], tuple[float, float]]:
    def hand_over(value: Any) -> tuple[float, float]:
        path = folder / "plain.pt"
        start = time.perf_counter()
        torch.save(value, path)
        written = time.perf_counter()
        read = torch.load(path, weights_only=False)
        done = time.perf_counter()
        assert len(read) == len(value)
        path.unlink()
        return 1e3 * (written - start), 1e3 * (done - written)

    return hand_over


def plain_redis(uri: str) -> Callable[[Any], tuple[float, float]]:
    import redis

    client = redis.Redis.from_url(uri)

    def hand_over(value: Any) -> tuple[float, float]:
        start = time.perf_counter()
        text = pickle.dumps(value)
        pieces = [text[at : at + (500 << 20)] for at in range(0, len(text), 500 << 20)]
        for number, piece in enumerate(pieces):
            client.set(f"plain{number}", piece)
        written = time.perf_counter()
        got: list[Any] = [client.get(f"plain{number}") for number in range(len(pieces))]
        read = pickle.loads(got[0] if len(got) == 1 else b"".join(got))
        done = time.perf_counter()
        assert len(read) == len(value)
        client.delete(*(f"plain{number}" for number in range(len(pieces))))
        return 1e3 * (written - start), 1e3 * (done - written)

    return hand_over


def bare_file(folder: Path) -> Callable[[Any], tuple[float, float]]:
    def hand_over(value: Any) -> tuple[float, float]:
        text, path = _packed(value), folder / "bare"
        start = time.perf_counter()
        with path.open("wb") as file:
            file.write(text)
            os.fsync(file.fileno())
        written = time.perf_counter()
        read = path.read_bytes()
        done = time.perf_counter()
        assert len(read) == len(text)
        path.unlink()
        return 1e3 * (written - start), 1e3 * (done - written)

    return hand_over


def bare_redis(uri: str) -> Callable[[Any], tuple[float, float]]:
    """The bytes by a bare socket into memory that is there, at most 500 MB at once."""
    import redis

    client = redis.Redis.from_url(uri)
    address = client.connection_pool.connection_kwargs
    room = bytearray(500 << 20)  # touched, as zeros are

    def ask(raw: socket.socket, *words: Any) -> None:
        raw.sendall(b"*%d\r\n" % len(words))
        for word in words:
            raw.sendall(b"$%d\r\n" % len(word))
            raw.sendall(word)
            raw.sendall(b"\r\n")

    def hand_over(value: Any) -> tuple[float, float]:
        text = memoryview(_packed(value))
        pieces = [text[at : at + (500 << 20)] for at in range(0, len(text), 500 << 20)]
        with socket.create_connection((address["host"], address["port"])) as raw:
            start = time.perf_counter()
            for number, piece in enumerate(pieces):
                ask(raw, b"SET", b"bare%d" % number, piece)
                assert raw.recv(100) == b"+OK\r\n"
            written = time.perf_counter()
            for number, piece in enumerate(pieces):
                ask(raw, b"GET", b"bare%d" % number)
                left = len(b"$%d\r\n\r\n" % len(piece)) + len(piece)
                while left:
                    left -= raw.recv_into(room, min(left, len(room)))
            done = time.perf_counter()
        client.delete(*(f"bare{number}" for number in range(len(pieces))))
        return 1e3 * (written - start), 1e3 * (done - written)

    return hand_over


def _packed(value: Any) -> bytes:
    return bytes(Batch.pack(value).ipc)


@contextlib.contextmanager
def own_redis() -> Iterator[str | None]:
    """URI of a redis-server of our own, where there is one; its persistence is off, as for the plain way."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from tests.support.redis_server import RedisServer, program

    if not program():
        yield None
        return
    server = RedisServer()
    try:
        yield server.uri
    finally:
        server.stop()


def tables(found: dict[str, Any]) -> str:
    rows = []
    for what, ways in found.items():
        for way in ("plain", "ours", "bare"):
            rows.append([f"{what}: {way}", *(spread(ways[way][f"{name}_ms"]) for name in ("write", "read", "both"))])
    return table("Durable stores; ms, median (min-max)", ["", "write", "read", "both"], rows)


def targets(found: dict[str, Any]) -> list[Target]:
    checks = []
    for what, ways in found.items():
        plain, mine = ({name: ways[way][name]["median"] for name in ways[way]} for way in ("plain", "ours"))
        if what.startswith("filesystem"):
            checks.append(Target(f"{what}: read", 5, plain["read_ms"] / mine["read_ms"], "x", "higher"))
            checks.append(Target(f"{what}: write", 1, plain["write_ms"] / mine["write_ms"], "x", "higher"))
        else:
            checks.append(Target(f"{what}: both", 3, plain["both_ms"] / mine["both_ms"], "x", "higher"))
    return checks


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="xjobbench", dir=os.environ.get("TMPDIR")) as made:
        result = measure("--quick" in sys.argv, Path(made))
    print(tables(result))
    print(targets_table(targets(result)))
