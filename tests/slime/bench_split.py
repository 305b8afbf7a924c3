"""What the split costs: seconds per training step of slime in one job, and of the same slime in two, in turn.

    scripts/bench.sh --slime [--pin main] [--rounds 3] [--rollouts 20] [--latency 0 2] [--json FILE]

Real slime on the CPU, with the stand-ins of this folder: a model so small that a step takes a second or so, which is
the worst case. `--latency` is what generating takes besides, in seconds a rollout. Two comparisons:

    in step     train.py in one job, and in two with --cross-job-max-ahead 0
    one ahead   train_async.py in one job, and train.py in two with --cross-job-max-ahead 1

Both ways train on the same data: the figures of all steps must be equal to the last bit, or the run ends with an
error.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from local_cluster import LocalCluster
from tests.slime.conftest import script
from tests.slime.single_job import PINS
from tests.slime.slime_jobs import FIGURES, Run, end_well

WARM = 3  # steps at the begin that do not count: imports, first connections
WAYS: dict[tuple[str, str], tuple[str, tuple[str, ...] | None]] = {  # (comparison, jobs) -> slime's script, flags
    ("in step", "one job"): ("train.py", None),
    ("in step", "two jobs"): ("train.py", ("--cross-job-max-ahead", "0")),
    ("one ahead", "one job"): ("train_async.py", None),
    ("one ahead", "two jobs"): ("train.py", ("--cross-job-max-ahead", "1")),
}


def seconds(run: Run) -> list[float]:
    """From each training step to the next, without those at the begin."""
    ends = [at for (at,) in run.steps("at")]
    return [after - before for before, after in itertools.pairwise(ends)][WARM:]


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
        rollouts = max(WARM + 4, round(options.rollouts / (1 + latency)))
        found: dict[tuple[str, str], list[list[float]]] = {way: [] for way in WAYS}
        for turn in range(options.rounds):
            figures: dict[str, Any] = {}
            for (comparison, jobs), (of_slime, flags) in WAYS.items():
                name = f"{comparison}-{jobs}-{latency}-{turn}".replace(" ", "-")
                run = Run(cluster.api, options.pin, slime, folder / name, options={"num_rollout": rollouts})
                run.env["SLIME_CPU_GENERATE_S"] = str(latency)
                trained(run, of_slime, flags)
                found[comparison, jobs].append(seconds(run))
                steps = run.steps(*FIGURES)
                if figures.setdefault(comparison, steps) != steps:
                    sys.exit(f"error: {name} trained another way: {steps}, not {figures[comparison]}")
                print(f"{name}: {statistics.median(seconds(run)):.3f} s a step", file=sys.stderr, flush=True)
        for comparison in dict.fromkeys(comparison for comparison, _ in WAYS):
            one, two = (found[comparison, jobs] for jobs in ("one job", "two jobs"))
            every = [[statistics.median(turn) for turn in way] for way in (one, two)]
            row: dict[str, Any] = {"comparison": comparison, "latency_s": latency, "steps": rollouts - 1 - WARM}
            row |= {"one_job_s": statistics.median(every[0]), "two_jobs_s": statistics.median(every[1])}
            row |= {"ratio": row["two_jobs_s"] / row["one_job_s"], "one_job_each": every[0], "two_jobs_each": every[1]}
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown; each figure is the median over rounds of a run's median, with the lowest and highest."""
    lines = [
        "| | generating takes | one job, s a step | two jobs, s a step | ratio |",
        "| --- | --: | --: | --: | --: |",
    ]
    for row in rows:
        cells = [row["comparison"], f"+{row['latency_s']:g} s"]
        for jobs in ("one_job", "two_jobs"):
            each = row[f"{jobs}_each"]
            cells.append(f"{row[f'{jobs}_s']:.3f} ({min(each):.3f} to {max(each):.3f})")
        lines.append(f"| {' | '.join([*cells, format(row['ratio'], '.3f')])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench.sh --slime", description="What the split costs, see above.")
    parser.add_argument("--pin", choices=PINS, default="main")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=20, help="of a run without latency (default: 20)")
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
