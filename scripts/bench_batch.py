"""What handing a batch over costs: from Python lists in every way (A), and already packed, by size (B)."""

import itertools
import random
import time
from collections import defaultdict
from types import TracebackType
from typing import Any

import ray

from bench_actors import CROSS_JOB, DICTS, FLOOR, PACKED, TENSORS, Maker, Reader, batch_of
from bench_report import Target, figure, spread, summary, table
from slime.cross_job.client.producer import Producer

WAYS = (DICTS, TENSORS, FLOOR, PACKED, CROSS_JOB)
SAMPLES = 512
_LABELS = {
    DICTS: "dict of lists (slime 079dbcf)",
    TENSORS: "tensors (slime v0.3.1)",
    FLOOR: "one array of as many bytes",  # what Ray itself takes for an object of that size
    PACKED: "packed, plain Ray",
    CROSS_JOB: "cross-job, end to end",
}
_SETTLE_S = 0.05  # Ray frees objects behind our back; the next measurement should not meet that
_MB = 1_000_000


class Bench:
    """A producer here, a maker and a reader as actors, all of one job."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._ids = itertools.count()
        self._producer = Producer("bench")
        self._maker: Any = ray.remote(Maker).options(num_cpus=0).remote()
        self._reader: Any = ray.remote(Reader).options(num_cpus=0).remote("bench")

    def __enter__(self) -> "Bench":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            ray.get(self._reader.finish.remote())
        self._producer.__exit__(kind, error, trace)

    def warm_up(self, nbytes: int, pieces: int) -> None:
        """Touch `pieces` x `nbytes` of the object store from every process that reads or writes: first touches are
        several times slower, and are not what is measured."""
        ray.get(self._maker.touch.remote(nbytes, pieces))
        batch = batch_of(nbytes)
        ids = [self._producer.publish(next(self._ids), batch).rollout_id for _ in range(pieces)]
        ray.get(self._reader.touch.remote(ids))
        time.sleep(1)

    # ------------------------------------------------------------------ A

    def hand_over(self, scale: float, repeats: int) -> dict[str, Any]:
        """Medians of every way at `scale` times 512 samples; one round that is not counted comes first."""
        batch = ray.get(self._maker.fill.remote(int(SAMPLES * scale), self._seed))
        found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in WAYS}
        rng = random.Random(self._seed)
        for turn in range(repeats + 1):
            for way in rng.sample(WAYS, len(WAYS)):  # each leaves memory behind that the next one may find useful
                times = self._hand_over_once(way, batch["token_sum"])
                for name, value in times.items() if turn else ():
                    found[way][name].append(value)
                time.sleep(_SETTLE_S)
        ray.get(self._maker.empty.remote())
        ways = {way: {name: summary(values) for name, values in found[way].items()} for way in WAYS}
        medians = {way: {name: value["median"] for name, value in ways[way].items()} for way in WAYS}
        ratios = {
            way: {
                f"{name}_vs_{base}": medians[base][f"{name}_ms"] / medians[way][f"{name}_ms"]
                for base in (DICTS, TENSORS)
                for name in ("produce", "consume", "total", "total_touch")
            }
            for way in (PACKED, CROSS_JOB)
        }
        ns = 1e6 * medians[PACKED]["convert_ms"] / batch["elements"]
        return {"scale": scale, "batch": batch, "ways": ways, "ratios": ratios, "pack_ns_per_element": ns}

    def _hand_over_once(self, way: str, token_sum: int) -> dict[str, float]:
        if way == CROSS_JOB:
            rollout_id = next(self._ids)
            start = time.perf_counter()
            self._producer.publish_from(rollout_id, self._maker, "generate")
            times = {"produce_ms": 1e3 * (time.perf_counter() - start)}
            read = ray.get(self._reader.claim.remote(rollout_id))
        else:
            made = ray.get(self._maker.make.remote(way))
            times = {"convert_ms": made["convert_ms"], "put_ms": made["put_ms"]}
            times["produce_ms"] = made["convert_ms"] + made["put_ms"]
            read = ray.get(self._reader.read.remote(made["refs"]))
        if way != FLOOR and read["token_sum"] != token_sum:
            raise RuntimeError(f"{way}: the tokens that were read are not those that were made")
        times |= {"consume_ms": read["consume_ms"], "touch_ms": read["touch_ms"]}
        times["consume_touch_ms"] = read["consume_ms"] + read["touch_ms"]
        times["total_ms"] = times["produce_ms"] + read["consume_ms"]
        times["total_touch_ms"] = times["total_ms"] + read["touch_ms"]
        return times

    # ------------------------------------------------------------------ B

    def publish(self, nbytes: int, repeats: int) -> dict[str, Any]:
        """Medians for a batch that is packed already; two rounds that are not counted come first."""
        ray.get(self._maker.hold.remote(nbytes))
        batch = batch_of(nbytes)
        found: dict[str, list[float]] = defaultdict(list)
        for turn in range(repeats + 2):
            times = {"put_ms": ray.get(self._maker.put_held.remote())}
            time.sleep(_SETTLE_S)
            for name in ("publish_from", "publish"):
                rollout_id = next(self._ids)
                start = time.perf_counter()
                if name == "publish":
                    self._producer.publish(rollout_id, batch)
                else:
                    self._producer.publish_from(rollout_id, self._maker, "give_held")
                times[f"{name}_ms"] = 1e3 * (time.perf_counter() - start)
                read = ray.get(self._reader.open.remote(rollout_id))
                times[f"claim_after_{name}_ms"] = read["claim_ms"]
                times[f"open_after_{name}_ms"] = read["open_ms"]
                times[f"claim_open_after_{name}_ms"] = read["claim_ms"] + read["open_ms"]
                time.sleep(_SETTLE_S)
            for name, value in times.items() if turn >= 2 else ():
                found[name].append(value)
        opened = found["claim_open_after_publish_from_ms"] + found["claim_open_after_publish_ms"]
        figures = {name: summary(values) for name, values in found.items()} | {"claim_open_ms": summary(opened)}
        put = figures["put_ms"]["median"]
        ratios = {name: figures[f"{name}_ms"]["median"] / put for name in ("publish_from", "publish")}
        return {"nbytes": batch.nbytes, "figures": figures, "ratios_to_put": ratios}


def hand_over_table(found: dict[str, Any]) -> str:
    batch = found["batch"]
    rows = []
    for way in WAYS:
        times = {name: value["median"] for name, value in found["ways"][way].items()}
        ratios = found["ratios"].get(way)
        rows.append(
            [
                _LABELS[way],
                spread(found["ways"][way]["produce_ms"]),
                spread(found["ways"][way]["consume_ms"]),
                figure(times["total_ms"]),
                *([f"{figure(ratios[f'total_vs_{base}'])}x" for base in (DICTS, TENSORS)] if ratios else ["", ""]),
                figure(times["consume_touch_ms"]),
                figure(times["total_touch_ms"]),
                *(
                    [f"{figure(ratios[f'total_touch_vs_{base}'])}x" for base in (DICTS, TENSORS)]
                    if ratios
                    else ["", ""]
                ),
            ]
        )
    header = ["ms", "produce (min-max)", "consume (min-max)", "both", "vs lists", "vs tensors"]
    header += ["consume+touch", "both+touch", "vs lists", "vs tensors"]
    medians = {name: figure(found["ways"][PACKED][f"{name}_ms"]["median"]) for name in ("convert", "put")}
    title = (
        f"A. Hand-over from Python lists, {found['scale']:g}x: {batch['samples']} samples, "
        f"{batch['tokens']:,} tokens, {batch['elements']:,} elements; packing {medians['convert']} ms = "
        f"{figure(found['pack_ns_per_element'])} ns an element, then ray.put {medians['put']} ms"
    )
    return table(title, header, rows)


def publish_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for size in found:
        times, ratios = size["figures"], size["ratios_to_put"]
        rows.append(
            [
                f"{size['nbytes'] / _MB:,.0f} MB",
                spread(times["put_ms"]),
                spread(times["publish_from_ms"]),
                f"{figure(ratios['publish_from'])}x",
                spread(times["publish_ms"]),
                f"{figure(ratios['publish'])}x",
                spread(times["claim_open_ms"]),
            ]
        )
    title = "B. Publishing a batch that is packed already, and opening it on the same node; ms, median (min-max)"
    header = ["size", "one ray.put", "publish_from", "/put", "publish (driver)", "/put", "claim + open"]
    return table(title, header, rows)


def targets(hand_overs: list[dict[str, Any]], publishes: list[dict[str, Any]]) -> list[Target]:
    """The bounds of A (at 1x) and B."""
    found = next(h for h in hand_overs if h["scale"] == 1)
    checks = []
    for way in (PACKED, CROSS_JOB):
        ratios = found["ratios"][way]
        name = _LABELS[way]
        checks += [
            Target(f"produce + consume vs dict of lists: {name}", 4, ratios[f"total_vs_{DICTS}"], "x", "higher"),
            Target(f"produce + consume vs tensors: {name}", 6, ratios[f"total_vs_{TENSORS}"], "x", "higher"),
        ]
    for base in (DICTS, TENSORS):
        value = found["ratios"][PACKED][f"consume_vs_{base}"]
        checks.append(Target(f"consume vs {base}: packed, plain Ray", 200, value, "x", "higher"))
    checks.append(Target("packing, per element", 25, found["pack_ns_per_element"], "ns", "lower"))
    for name, factor in (("publish_from", 1.6), ("publish", 3.0)):
        for size in publishes:
            bound = factor * size["figures"]["put_ms"]["median"] + 20
            value = size["figures"][f"{name}_ms"]["median"]
            what = f"{name} of {size['nbytes'] / _MB:,.0f} MB ({factor:g} x ray.put + 20 ms)"
            checks.append(Target(what, bound, value, "ms", "lower"))
    slowest = max(size["figures"]["claim_open_ms"]["median"] for size in publishes)
    checks.append(Target("claim + open, slowest size", 10, slowest, "ms", "lower"))
    return checks
