"""What the split costs: seconds per training step of slime in one job, and of the same slime in two, in turn.

    scripts/bench.sh --slime [--pin main] [--rounds 3] [--rollouts 30] [--latency 0 2] [--json FILE]

Real slime on the CPU, with the stand-ins of this folder: a model so small that a step takes a second or so, which is
the worst case. `--latency` is what generating takes besides, in seconds a rollout. Two comparisons:

    in step     train.py in one job, and in two with --cross-job-max-ahead 0
    one ahead   train_async.py in one job, and train.py in two with --cross-job-max-ahead 1

Both ways train on the same data: the figures of all steps must be equal to the last bit, or the run ends with an
error. Of a step, slime's own generating (its perf/rollout_time, from v0.1.0 on) is shown, too: from run to run it
differs by more than what the split adds.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from local_cluster import LocalCluster
from tests.slime.conftest import script
from tests.slime.single_job import PINS
from tests.slime.slime_jobs import FIGURES, Run, end_well

WARM = 8  # steps at the begin that do not count: imports, connections; slime's own generating gets faster so long
WAYS: dict[tuple[str, str], tuple[str, tuple[str, ...] | None]] = {  # (comparison, jobs) -> slime's script, flags
    ("in step", "one job"): ("train.py", None),
    ("in step", "two jobs"): ("train.py", ("--cross-job-max-ahead", "0")),
    ("one ahead", "one job"): ("train_async.py", None),
    ("one ahead", "two jobs"): ("train.py", ("--cross-job-max-ahead", "1")),
}


def median(values: list[float]) -> float:
    """NaN of none."""
    return statistics.median(values) if values else math.nan


def seconds(run: Run) -> list[float]:
    """From each training step to the next, without those at the begin."""
    ends = [at for (at,) in run.steps("at")]
    return [after - before for before, after in itertools.pairwise(ends)][WARM:]


def generating(run: Run) -> list[float]:
    """Of each of those steps, what slime logs that generating took; empty: this pin does not log it."""
    logs = "\n".join(job.logs for job in run.jobs)
    return [float(found) for found in re.findall(r"perf/rollout_time': ([\d.e-]+)", logs)][WARM + 1 :]


def trained(run: Run, of_slime: str, flags: tuple[str, ...] | None) -> Run:
    """The run, once its jobs are through."""
    if flags is None:
        end_well(run.start(of_slime))
    else:
        end_well(run.rollout_job(*flags), run.train_job(*flags, script=of_slime))
    return run


def measure(cluster: LocalCluster, slime: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each comparison and latency."""
    rows = []
    for latency in options.latency:
        rollouts = max(WARM + 8, round(options.rollouts / (1 + latency)))
        found: dict[tuple[str, str], list[float]] = {way: [] for way in WAYS}
        generated: dict[tuple[str, str], list[float]] = {way: [] for way in WAYS}
        for turn in range(options.rounds):
            figures: dict[str, Any] = {}
            for (comparison, jobs), (of_slime, flags) in WAYS.items():
                name = f"{comparison}-{jobs}-{latency}-{turn}".replace(" ", "-")
                run = Run(cluster.api, options.pin, slime, folder / name, options={"num_rollout": rollouts})
                run.env["SLIME_CPU_GENERATE_S"] = str(latency)
                trained(run, of_slime, flags)
                found[comparison, jobs].append(median(seconds(run)))
                steps = run.steps(*FIGURES)
                if figures.setdefault(comparison, steps) != steps:
                    sys.exit(f"error: {name} trained another way: {steps}, not {figures[comparison]}")
                made = median(generating(run))
                generated[comparison, jobs].append(made)
                said = f"{median(seconds(run)):.3f} s a step, {made:.3f} of it generating"
                print(f"{name}: {said}", file=sys.stderr, flush=True)
        for comparison in dict.fromkeys(comparison for comparison, _ in WAYS):
            row: dict[str, Any] = {"comparison": comparison, "latency_s": latency, "steps": rollouts - 1 - WARM}
            for jobs in ("one job", "two jobs"):
                each, made = found[comparison, jobs], generated[comparison, jobs]
                row[jobs] = {"step_s": median(each), "each": each, "generating_s": median(made)}
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown; each figure is the median over rounds of a run's median, with the lowest and highest."""
    lines = [
        "| | added latency | one job, s a step | generating | two jobs, s a step | generating | added | ratio |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        one, two = row["one job"], row["two jobs"]
        cells = [row["comparison"], f"+{row['latency_s']:g} s"]
        for way in (one, two):
            cells.append(f"{way['step_s']:.3f} ({min(way['each']):.3f} to {max(way['each']):.3f})")
            cells.append(f"{way['generating_s']:.3f}")
        cells += [f"{two['step_s'] - one['step_s']:+.3f} s", f"{two['step_s'] / one['step_s']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench.sh --slime", description="What the split costs, see above.")
    parser.add_argument("--pin", choices=PINS, default="main")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=30, help="of a run without latency (default: 30)")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 2.0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cross-job-bench-") as folder:
        slime = Path(folder, "slime")
        script("fetch_slime.sh", slime, options.pin)
        script("apply.sh", slime)
        with LocalCluster(num_cpus=24, num_gpus=5, object_store_bytes=800_000_000) as cluster:
            rows = measure(cluster, slime, Path(folder), options)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
