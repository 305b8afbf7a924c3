"""The demo behind demo.sh: two submitted Ray jobs on a private cluster, live progress, an audit, a picture.

Exit code 0 only if both jobs succeeded and the audit found no rollout lost or duplicated.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import shlex
import signal
import statistics
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.job_submission import JobStatus, JobSubmissionClient
from tqdm import tqdm

from job_api import job_client, probe_http
from local_cluster import CREDENTIALS, LocalCluster, begin_without, says_why

ROOT = Path(__file__).resolve().parent.parent
OVERLAY = ROOT / "slime_overlay"
EXAMPLE = OVERLAY / "examples" / "cross_job_cpu"
sys.path[:0] = [str(OVERLAY), str(EXAMPLE)]

from recipe import Recipe  # noqa: E402

from slime.cross_job.client.connection import Connection, ensure_ray, find_address, probe  # noqa: E402
from slime.cross_job.client.jobs import run  # noqa: E402
from slime.cross_job.errors import BadInput, ClusterUnreachable, CrossJobError  # noqa: E402
from slime.cross_job.ledger.state import CLAIMED, PUBLISHED  # noqa: E402
from slime.cross_job.ops.report import write_report  # noqa: E402
from slime.cross_job.ops.viewer import Viewer  # noqa: E402
from slime.cross_job.types import check_job_id  # noqa: E402

_OVER = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
_SAMPLE_S = 0.25  # between two looks at the broker
_LINE_S = 5.0  # between two lines where there is no terminal
_LISTENS_S, _ANSWERS_S = 4.0, 8.0  # for a cluster that was named to take a connection, and to say something
_FREED_S = 20.0  # without anything freed, after which the object store counts as what it is


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo.sh", description=__doc__)
    parser.add_argument("--rollouts", type=int, default=Recipe.rollouts, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-ahead", type=int, default=1, help="0: slime's train.py, 1: its train_async.py (default)"
    )
    parser.add_argument("--job-id", default="demo", help="name of the experiment (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for logs, figures and picture (default: a new one in out/)")
    parser.add_argument("--json", type=Path, help="write the summary there, machine-readable")
    parser.add_argument("--device", default="cpu", help="where both models are: cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--num-gpus", type=float, default=0, help="GPUs of each job, or a fraction of one (default: none)"
    )
    parser.add_argument(
        "--tensors", action="store_true", help="publish rollouts from tensors of the device, not lists"
    )
    parser.add_argument("--keep-cluster", action="store_true", help="leave the Ray cluster running, to look around")
    parser.add_argument(
        "--address",
        help="run on this Ray cluster instead, from one of its nodes (auto: the one that runs here); this folder "
        "and --out must be at the same path on all; a job runs on a node with the resource rollout or train, if any",
    )
    args = parser.parse_args()
    begin_without(CREDENTIALS if args.address else ())
    check_job_id(args.job_id)
    if args.rollouts < 1:
        raise BadInput(f"--rollouts {args.rollouts}: at least 1")
    if args.max_ahead < 0:
        raise BadInput(f"--max-ahead {args.max_ahead}: at least 0")
    args.out = (args.out or ROOT / "out" / time.strftime(f"{args.job_id}-%Y%m%d-%H%M%S-{os.getpid()}")).absolute()
    for folder in [args.out, *([args.json.absolute().parent] if args.json else [])]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise BadInput(
                f"cannot write to {folder} ({error.strerror}): choose another folder with --out/--json"
            ) from None
    for name in ("rollout.jsonl", "train.jsonl"):
        (args.out / name).unlink(missing_ok=True)
    return args


def runtime_env() -> dict[str, Any]:
    return {"env_vars": {"PYTHONPATH": os.pathsep.join([str(OVERLAY), str(EXAMPLE)])}}


def submit(client: JobSubmissionClient, script: str, name: str, args: argparse.Namespace) -> None:
    options = ["--rollouts", args.rollouts, "--seed", args.seed, "--job-id", args.job_id, "--out", args.out]
    options += ["--device", args.device, "--cross-job-max-ahead", args.max_ahead]
    role = script.removesuffix("_job.py")
    if role == "rollout":  # its sampler has the model, in the train job the driver
        options += ["--num-gpus", args.num_gpus, *(["--tensors"] if args.tensors else [])]
    command = [sys.executable, EXAMPLE / script, *options]
    client.submit_job(
        entrypoint=shlex.join(map(str, command)),
        submission_id=name,
        entrypoint_resources={role: 0.01} if role in ray.cluster_resources() else None,
        entrypoint_num_gpus=args.num_gpus if role == "train" and args.num_gpus else None,
        runtime_env=runtime_env(),
    )


def stop(client: JobSubmissionClient, names: Iterable[str]) -> None:
    """Ask Ray to stop those of these jobs that have been submitted and are not over."""
    for name in names:
        try:
            if client.get_job_status(name) not in _OVER:
                client.stop_job(name)
                print(f"asked Ray to stop {name}", file=sys.stderr, flush=True)
        except RuntimeError as error:
            if "does not exist" not in str(error):
                print(f"{name} may go on (ray job stop {name}): {error}", file=sys.stderr, flush=True)
        except OSError as error:  # as of requests, where nobody answers
            print(f"{name} may go on (ray job stop {name}): {error}", file=sys.stderr, flush=True)


def end_on_signals() -> None:
    """End by an exception, so that what was started here is stopped; what is sent again disturbs nobody."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def end(received: int, frame: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + received)

    for number in numbers:
        signal.signal(number, end)


def connect(address: str, theirs: bool) -> tuple[str, JobSubmissionClient]:
    """Become a driver of the cluster there; the address of its job API, and a client of that. `theirs`: it is not one
    that was started here, and may not answer."""
    if theirs:
        try:
            probe(address, _LISTENS_S, _ANSWERS_S)
        except TimeoutError as error:
            raise ClusterUnreachable(f"no Ray cluster answers at {address}: {error}; check the address") from None
    context = ensure_ray(address, logging_level=logging.ERROR, runtime_env=runtime_env())
    if not context.dashboard_url:
        raise ClusterUnreachable(f"the Ray cluster at {address} has no dashboard, hence takes no jobs")
    api = f"http://{context.dashboard_url}"
    try:
        if theirs:
            probe_http(f"{api}/api/version", _ANSWERS_S)
        return api, job_client(api)
    except (OSError, RuntimeError) as error:
        raise ClusterUnreachable(f"no Ray job API answers at {api}: {error}") from None


def store_bytes() -> int:
    """Bytes of the object store in use, over all nodes."""
    return int(ray.cluster_resources()["object_store_memory"] - ray.available_resources()["object_store_memory"])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def watch(
    client: JobSubmissionClient, jobs: dict[str, str], connection: Connection, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Show progress until both jobs are over; returns what the broker said over time."""
    seen: list[dict[str, Any]] = []
    started, shown = time.monotonic(), 0.0
    terminal = sys.stderr.isatty()
    bar = tqdm(total=args.rollouts, unit="rollout", disable=not terminal)
    while True:
        over = all(client.get_job_status(job) in _OVER for job in jobs.values())
        status = connection.call("status").get(args.job_id)
        if status is not None:
            trained = lines(args.out / "train.jsonl")
            rewards = [line["reward"] for line in trained[-5:]]
            now = {k: status[k] for k in ("published", "claimed", "acked", "queue_depth", "staleness", "held_bytes")}
            now |= {"t": time.monotonic() - started, "reward": statistics.fmean(rewards) if rewards else None}
            seen.append(now)
            figures = {
                "published": now["published"],
                "claimed": now["claimed"],
                "acked": now["acked"],
                "queue": now["queue_depth"],
                "staleness": trained[-1]["staleness"] if trained else "-",
                "reward": "-" if now["reward"] is None else f"{now['reward']:.3f}",
            }
            bar.n = now["acked"]
            bar.set_postfix(figures)
            if not terminal and (over or now["t"] - shown >= _LINE_S):
                shown = now["t"]
                print(f"{now['t']:6.1f} s  " + "  ".join(f"{k} {v}" for k, v in figures.items()), flush=True)
        if over:
            bar.close()
            return seen
        time.sleep(_SAMPLE_S)


def audit(out: Path, broker: dict[str, Any], held: set[int]) -> dict[str, Any]:
    """Count from the two jobs' own records; what the broker counted must agree with them, see `finish`. What was
    published and not trained on is lost, unless the broker knows that it is `held`."""
    published, trained = lines(out / "rollout.jsonl"), lines(out / "train.jsonl")
    times = Counter(line["rollout_id"] for line in trained)
    rewards = [line["reward"] for line in trained]
    return {
        "published": len(published),
        "claimed": broker.get("claimed", 0),  # the only figure that the jobs' own records do not hold
        "acked": len(trained),
        "lost": len({line["rollout_id"] for line in published} - set(times) - held),
        "not_acked": len(({line["rollout_id"] for line in published} & held) - set(times)),
        "duplicated": sum(n - 1 for n in times.values()),
        "reward_first5": statistics.fmean(rewards[:5]) if rewards else None,
        "reward_last5": statistics.fmean(rewards[-5:]) if rewards else None,
        "publish_ms_p50": statistics.median([line["publish_ms"] for line in published]) if published else None,
        "claim_ms_p50": statistics.median([line["claim_ms"] for line in trained]) if trained else None,
        "staleness_max": max((line["staleness"] for line in trained), default=None),
        "nodes": {
            "rollout": sorted({line["node"] for line in published}),
            "train": sorted({line["node"] for line in trained}),
        },
    }


def draw(path: Path, out: Path, seen: list[dict[str, Any]], title: str) -> None:
    """Reward over rollouts above queue depth over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trained = lines(out / "train.jsonl")
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), layout="constrained")
    top.plot([line["rollout_id"] for line in trained], [line["reward"] for line in trained])
    top.set(title=title, xlabel="rollout", ylabel="mean reward", ylim=(0, 1.02))
    bottom.step([s["t"] for s in seen], [s["queue_depth"] for s in seen], where="post", color="tab:orange")
    bottom.set(xlabel="seconds", ylabel="queue depth", ylim=(0, None))
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


@says_why
def main() -> None:
    end_on_signals()
    args = arguments()
    address = args.address and find_address(args.address)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        cluster = None
        if address is None:
            cluster = LocalCluster(outlives_us=args.keep_cluster, num_gpus=math.ceil(2 * args.num_gpus))
            if args.keep_cluster:
                cluster.start()
                kept = f"the cluster stays: dashboard {cluster.api}; end it with `kill {cluster.pid}`"
                stack.callback(print, kept, flush=True)  # also where we are interrupted
            else:
                stack.enter_context(cluster)
            address = cluster.address
        api, client = connect(address, theirs=cluster is None)
        stack.callback(ray.shutdown)
        print(f"Ray cluster at {address}, dashboard {api}; output in {args.out}", flush=True)
        end_on_signals()  # ray.init has put a handler of its own in place, which ends without cleaning up
        connection = Connection(patience_s=300)  # a machine that has just started Ray may be slow
        before = store_bytes()
        jobs = {role: f"demo-{role}-{uuid.uuid4().hex[:12]}" for role in ("rollout", "train")}
        stack.callback(stop, client, jobs.values())  # where we are interrupted
        for role, name in jobs.items():
            submit(client, f"{role}_job.py", name, args)
        print("submitted two Ray jobs: " + ", ".join(f"{role} {job}" for role, job in jobs.items()), flush=True)
        seen = watch(client, jobs, connection, args)
        after = store_bytes()
        deadline = time.monotonic() + _FREED_S
        while after > 1.05 * before and time.monotonic() < deadline:
            time.sleep(0.2)
            last, after = after, store_bytes()
            if after < last:
                deadline = time.monotonic() + _FREED_S
        held: set[int] = set()
        if seen:
            viewer = Viewer()
            write_report(viewer, args.job_id, args.out / "report.html")
            rows = viewer.look(args.job_id)["progress"]
            held = {row["rollout_id"] for row in rows if row["state"] in (PUBLISHED, CLAIMED)}
        states = {role: client.get_job_status(job).value for role, job in jobs.items()}
        for role, job in jobs.items():
            (args.out / f"{role}.log").write_text(client.get_job_logs(job))
    summary = {
        "job_id": args.job_id,
        "ray_job_ids": jobs,
        "states": states,
        "rollouts": args.rollouts,
        "seed": args.seed,
        "max_ahead": args.max_ahead,
        **audit(args.out, seen[-1] if seen else {}, held),
        "object_store_bytes_before": before,
        "object_store_bytes_after": after,
        "wall_s": round(time.monotonic() - started, 1),
    }
    finish(args, summary, seen)


def finish(args: argparse.Namespace, summary: dict[str, Any], seen: list[dict[str, Any]]) -> None:
    """Write summary and picture, and fail loudly if anything is wrong."""
    text = json.dumps(summary, indent=2)
    (args.out / "summary.json").write_text(text + "\n")
    if args.json:
        args.json.write_text(text + "\n")
    for key, value in summary.items():
        print(f"{key:27} {value}")
    try:
        draw(args.out / "demo.png", args.out, seen, f"{args.job_id}: seed {args.seed}, max-ahead {args.max_ahead}")
        print(f"picture: {args.out / 'demo.png'}")
    except ImportError as error:
        print(f"picture: none ({error})")
    if seen:
        print(f"report: {args.out / 'report.html'}")
    wrong = [f"the {role} job is {state}: see {args.out}/{role}.log" for role, state in summary["states"].items()]
    wrong = [text for text in wrong if "SUCCEEDED" not in text]
    wrong += [
        f"{summary[k]} rollouts {k.replace('_', ' ')}" for k in ("lost", "duplicated", "not_acked") if summary[k]
    ]
    counted = {k: seen[-1][k] if seen else 0 for k in ("published", "claimed", "acked")}
    if not wrong and any(summary[k] != args.rollouts or counted[k] != args.rollouts for k in counted):
        own, brokers = (", ".join(f"{of[k]} {k}" for k in counted) for of in (summary, counted))
        wrong.append(f"of {args.rollouts} rollouts the jobs count {own}; the broker counts {brokers}")
    before, after = summary["object_store_bytes_before"], summary["object_store_bytes_after"]
    if not wrong and after > 1.05 * before:
        wrong.append(f"the object store holds {after} bytes, {before} at the start")
    if wrong:
        raise CrossJobError("; ".join(wrong))


if __name__ == "__main__":
    os.environ.setdefault("SLIME_CROSS_JOB_LOG_LEVEL", "WARNING")
    run(main)
