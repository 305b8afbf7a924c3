"""The benchmark behind bench.sh: cross-job against plain Ray and against slime's own ways, in one run.

It starts a private Ray cluster and stops it at the end. A missed target is reported, and is no failure: on a busy
machine figures differ; all ways are measured in turns, so that their ratios suffer less than their milliseconds.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ray

from local_cluster import LocalCluster, begin_without, says_why

ROOT = Path(__file__).resolve().parent.parent
OVERLAY = ROOT / "slime_overlay"
sys.path.insert(0, str(OVERLAY))

import bench_batch  # noqa: E402
import bench_broker  # noqa: E402
from bench_report import figure, machine, targets_table  # noqa: E402
from slime.cross_job.client.jobs import run  # noqa: E402
from slime.cross_job.errors import BadInput  # noqa: E402

_MB = 1_000_000
_STORE_BYTES = {"full": 8_000 * _MB, "quick": 2_000 * _MB}
_MEMORY_GB = {"full": 14, "quick": 5}  # object store, lists and batches; with less, swapping would be measured


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench.sh", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures there, machine-readable")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, neither 10x nor 1 GB; a minute")
    parser.add_argument("--seed", type=int, default=0, help="of the generated batch (default: %(default)s)")
    args = parser.parse_args()
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that needs the cluster; tables are printed as they come."""
    scales = {0.1: 5, 1.0: 3} if args.quick else {0.1: 15, 1.0: 9, 10.0: 5}
    sizes = {1: 7, 10: 7, 100: 5} if args.quick else {1: 15, 10: 15, 100: 11, 1000: 7}
    hand_overs = []
    with bench_batch.Bench(args.seed) as bench:
        bench.warm_up(200 * _MB if args.quick else 1000 * _MB, 4)
        for scale, repeats in scales.items():
            hand_overs.append(bench.hand_over(scale, repeats))
            print(bench_batch.hand_over_table(hand_overs[-1]), flush=True)
        publishes = [bench.publish(size * _MB, repeats) for size, repeats in sizes.items()]
        print(bench_batch.publish_table(publishes), flush=True)
    broker = bench_broker.measure(args.quick)
    print(bench_broker.tables(broker), flush=True)
    targets = bench_batch.targets(hand_overs, publishes) + bench_broker.targets(broker)
    print(targets_table(targets), flush=True)
    found = {"hand_over": hand_overs, "publish": publishes, "broker": broker}
    return {**found, "targets": [target.to_json() for target in targets]}


def end_on_signals() -> None:
    """End in order, also on Ctrl-C: what was started here is stopped."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: sys.exit(128 + received))


@says_why
def main() -> None:
    end_on_signals()
    args = arguments()
    begin_without()
    started = time.monotonic()
    size = "quick" if args.quick else "full"
    facts = machine()
    if facts["memory_available_gb"] < _MEMORY_GB[size]:
        raise BadInput(
            f"{facts['memory_available_gb']} GB of memory are free, this needs {_MEMORY_GB[size]}: "
            "end other programs, or use --quick"
        )
    print("\n".join(f"{name:22} {value}" for name, value in facts.items()) + "\n", flush=True)
    if facts["load_average_at_start"][0] > facts["cores"] / 2:
        print("NOTE: this machine is busy; on an idle one the figures are better, and vary less\n", flush=True)
    path = os.pathsep.join([str(OVERLAY), str(ROOT / "scripts")])
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(
            LocalCluster(num_cpus=2, object_store_bytes=_STORE_BYTES[size], env={"PYTHONPATH": path})
        )
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        stack.callback(ray.shutdown)
        end_on_signals()  # ray.init has put its own handler there, which aborts without cleaning up
        found = measure(args)
    load = [round(value, 2) for value in os.getloadavg()]
    wall_s = round(time.monotonic() - started, 1)
    print(f"{figure(wall_s)} s in all; load average now {load}")
    if args.json:
        run_facts = {"quick": args.quick, "seed": args.seed, "wall_s": wall_s, "load_average_at_end": load}
        args.json.write_text(json.dumps({"machine": facts, "run": run_facts, **found}, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("SLIME_CROSS_JOB_LOG_LEVEL", "WARNING")
    run(main)
