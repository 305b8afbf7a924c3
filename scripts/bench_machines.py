"""What goes over the network, and what the broker carries, on several machines (tests/cluster): containers of
docker/docker-compose.yml, or namespaces. Run by itself: `scripts/bench.sh --machines [--on namespaces]`.

Bytes are read from the machines' interface counters. Parts: bytes, speed, load (--parts chooses).
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_report import Target, figure, machine, table, targets_table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.compose import ComposeCluster, daemon  # noqa: E402
from tests.support.namespaces import NamespaceCluster  # noqa: E402
from tests.support.node_cluster import NodeCluster  # noqa: E402

_MB, _GB = 1_000_000, 1 << 30
_PROGRAM = ROOT / "tests" / "cluster" / "measured.py"
_ROLLOUTS = ("rollout", "rollout2", "rollout3", "rollout4")
_BROKER = """
import os, pathlib
for p in pathlib.Path("/proc").iterdir():
    if p.name.isdigit() and (p / "cmdline").read_bytes().startswith(b"ray::Broker"):
        fields = (p / "stat").read_text().rpartition(")")[2].split()
        cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        print(cpu_s, int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))
"""


class Running:
    """measured.py on a machine."""

    def __init__(self, cluster: NodeCluster, where: str, what: str, name: str, **options: Any):
        self.folder, self.name = cluster.folder, name
        words = [cluster.python, "-u", str(_PROGRAM), what, "--name", name, "--folder", str(cluster.folder)]
        for key, value in options.items():
            words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
        self._log = (cluster.folder / f"{name}.log").open("wb")
        self._process = subprocess.Popen(
            cluster.command(where, words), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )

    def wait_for(self, suffix: str, timeout_s: float) -> Path:
        path, deadline = self.folder / f"{self.name}.{suffix}", time.monotonic() + timeout_s
        while not path.exists():
            if time.monotonic() > deadline or self._process.poll() not in (None, 0):
                log = (self.folder / f"{self.name}.log").read_text(errors="replace")
                raise SystemExit(f"error: {self.name} did not write its .{suffix} file:\n{log[-3000:]}")
            time.sleep(0.05)
        return path

    def go(self) -> None:
        (self.folder / f"{self.name}.go").touch()

    def found(self, timeout_s: float) -> Any:
        path = self.wait_for("json", timeout_s)
        time.sleep(0.2)
        return json.loads(path.read_text())

    def end(self) -> None:
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def bytes_over_the_network(cluster: NodeCluster) -> dict[str, Any]:
    """Received by the training machines, against what their ranks need: whole batches, and batches in two parts."""
    count, nbytes, found = 5, 100 * _MB, {}
    machines = ("train", "train2")
    for name, parts, ranks in (
        ("two ranks of one machine, whole", 1, ["train"] * 2),
        ("one rank a machine", 2, machines),
    ):
        job_id = f"bytes{parts}"
        producer = Running(
            cluster,
            "rollout",
            "produce",
            f"p{parts}",
            job_id=job_id,
            count=count,
            nbytes=nbytes,
            parts=parts,
            ahead=count,
        )
        addresses = [cluster.address(rank) for rank in ranks]
        reader = Running(cluster, "train", "read", f"c{parts}", job_id=job_id, count=count, ranks=addresses)
        reader.wait_for("ready", 180)
        watched = ("train", "train2", "head")
        before = {m: cluster.counters(m)[0] for m in watched}
        reader.go()
        read = reader.found(180)["nbytes"]
        after = {m: cluster.counters(m)[0] for m in watched}
        got = {m: after[m] - before[m] for m in watched}
        needed = {m: sum(max((n for n, r in zip(row, ranks) if r == m), default=0) for row in read) for m in machines}
        found[name] = {"received": got, "needed": needed}
        for running in (reader, producer):
            running.end()
    return found


def speed(cluster: NodeCluster) -> dict[str, Any]:
    """Seconds for 1 GiB from machine to machine, by cross-job and by Ray alone; bytes through the broker's machine."""
    count = 6
    producer = Running(cluster, "rollout", "produce", "ps", job_id="speed", count=count, nbytes=_GB, ahead=0)
    racer = Running(cluster, "train", "race", "cs", job_id="speed", count=count, nbytes=_GB)
    racer.wait_for("ready", 180)
    before = sum(cluster.counters("head"))
    racer.go()
    took = racer.found(600)
    through = sum(cluster.counters("head")) - before
    for running in (racer, producer):
        running.end()
    return {"seconds": took, "through_broker": through}


def load(cluster: NodeCluster, minutes: float) -> dict[str, Any]:
    """200 rollouts a minute of 1 MB, from 4 producers on machines of their own, to 2 groups of consumers."""
    jobs, each = [f"load{number}" for number in range(4)], round(50 * minutes)
    groups = [
        Running(cluster, "train", "follow", group, jobs=jobs, group=group, count=each)
        for group in ("train", "archive")
    ]
    producers = [
        Running(cluster, m, "produce", f"pl{m}", job_id=j, count=each, nbytes=_MB, ahead=2, every_s=1.15)
        for m, j in zip(_ROLLOUTS, jobs, strict=True)
    ]
    for group in groups:
        group.wait_for("ready", 120)
    for group in groups:
        group.go()
    time.sleep(15)
    began, usage = time.monotonic(), []
    while not (cluster.folder / "archive.json").exists():
        cpu_s, rss = map(float, cluster.run("head", cluster.python, "-c", _BROKER).split())
        usage.append((time.monotonic() - began, cpu_s, rss))
        groups[0].wait_for("ready", 1)  # or it has ended
        time.sleep(5)
        if time.monotonic() - began > 60 * minutes * 1.5 + 120:
            raise SystemExit("error: the load does not end")
    found = [group.found(120) for group in groups]
    for running in (*groups, *producers):
        running.end()
    times = sorted(t for one in found[:1] for of_job in one["counted"].values() for t in of_job)
    span = times[-1] - times[len(times) // 10]
    return {
        "per_minute": 60 * 0.9 * len(times) / span,
        "depth": max(max(one["depth"]) for one in found),
        "cores": (usage[-1][1] - usage[0][1]) / (usage[-1][0] - usage[0][0]),
        "rss": [usage[len(usage) // 4][2], usage[-1][2]],
    }


@contextlib.contextmanager
def machines(kind: str) -> Iterator[NodeCluster]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="machines")))
        workers = (*_ROLLOUTS, "train", "train2", "control")
        room = {"SHM_SIZE": "4500m", "OBJECT_STORE_BYTES": "3500000000", "CPUS": "4"}
        if kind == "compose":
            stack.enter_context(daemon(folder / "dockerd.log"))
            yield stack.enter_context(ComposeCluster(folder, workers, **room))
        else:
            yield stack.enter_context(NamespaceCluster(folder, workers, None, **room))


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench.sh --machines", description=__doc__)
    parser.add_argument("--on", choices=["compose", "namespaces"], default="compose")
    parser.add_argument("--parts", default="bytes,speed,load")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "on": args.on}
    targets: list[Target] = []
    with machines(args.on) as cluster:
        if "bytes" in args.parts:
            found["bytes"] = bytes_over_the_network(cluster)
            rows = []
            for name, case in found["bytes"].items():
                for m, needed in case["needed"].items():
                    got = case["received"][m]
                    rows.append([f"{name}: {m}", figure(needed / _MB), figure(got / _MB)])
                    if needed:
                        targets.append(Target(f"{name}: {m}, received of needed", 1.05, got / needed, "x", "lower"))
                rows.append([f"{name}: the broker's machine", "0", figure(case["received"]["head"] / _MB)])
            print(table("Bytes of 5 rollouts of 100 MB, MB", ["", "needed", "received"], rows))
        if "speed" in args.parts:
            found["speed"] = speed(cluster)
            mine, plain = (statistics.median(found["speed"]["seconds"][name]) for name in ("cross-job", "plain"))
            rows = [
                [name, figure(s), figure(_GB / s / 1e9)] for name, s in (("cross-job", mine), ("Ray alone", plain))
            ]
            print(table("1 GiB from machine to machine, median", ["", "s", "GB/s"], rows))
            through = found["speed"]["through_broker"]
            print(f"through the broker's machine meanwhile: {figure(through / _MB)} MB\n")
            targets.append(Target("throughput of Ray alone", 0.9, plain / mine, "x", "higher"))
        if "load" in args.parts:
            found["load"] = load(cluster, args.minutes)
            was = found["load"]
            print(f"load, {args.minutes:g} minutes: {json.dumps(was)}\n")
            targets += [
                Target("rollouts a minute", 200.0, was["per_minute"], "", "higher"),
                Target("queue depth at most", 4.0, was["depth"], "", "lower"),
                Target("broker's CPU, cores", 0.2, was["cores"], "", "lower"),
                Target(
                    "broker's memory at the end, of that after a quarter",
                    1.1,
                    was["rss"][1] / was["rss"][0],
                    "x",
                    "lower",
                ),
            ]
    print(targets_table(targets))
    if args.json:
        args.json.write_text(json.dumps(found | {"targets": [t.to_json() for t in targets]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
