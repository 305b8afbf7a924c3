"""The check behind check.sh: the demo and the jobs of jobs.py on one private cluster; tables, a JSON file, a verdict.

The cluster has one logical GPU; each of the two jobs takes half of it. Exit code 0 only if all passed in time.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "slime_overlay")]

from demo import lines, runtime_env  # noqa: E402
from job_api import job_client  # noqa: E402
from local_cluster import LocalCluster, begin_without  # noqa: E402

SHARE = 0.5  # of the GPU, for each job
LEARNT = 0.8  # mean reward of the last 5 of the demo's 80 rollouts
NCCL = "not possible on one GPU: NCCL wants each rank on a GPU of its own"
HAND_OVER = ("plain copy to host", "pack", "publish", "claim", "to device", "plain copy to device")
WEIGHTS = ("publish", "open and copy to device")


def demo(args: argparse.Namespace, cluster: LocalCluster) -> dict[str, Any]:
    """Train with the demo's two jobs, models on the device, rollouts published from tensors; its summary."""
    out = args.out / "demo"
    options = ["--address", cluster.address, "--device", args.device, "--num-gpus", SHARE, "--tensors"]
    options += ["--rollouts", args.rollouts, "--out", out, "--json", args.out / "demo.json"]
    subprocess.run([sys.executable, *map(str, [ROOT / "scripts" / "demo.py", *options])], check=True)
    summary: dict[str, Any] = json.loads((args.out / "demo.json").read_text())
    published, trained = lines(out / "rollout.jsonl"), lines(out / "train.jsonl")
    summary["devices"] = sorted({line["device"] for line in published + trained})
    summary["published_from"] = sorted({line["published_from"] for line in published})
    assert all(device.startswith(args.device) for device in summary["devices"]), summary["devices"]
    assert all(args.device in what for what in summary["published_from"]), summary["published_from"]
    learnt = args.rollouts < 80 or summary["reward_last5"] >= LEARNT
    assert learnt, (
        f"mean reward {summary['reward_last5']} at the end, less than {LEARNT}: weights or rollouts are wrong"
    )
    return summary


def bench(args: argparse.Namespace, cluster: LocalCluster) -> dict[str, Any]:
    """Milliseconds of the hand-overs of jobs.py, both jobs' together: row -> step -> median."""
    client = job_client(cluster.api)
    jobs = {}
    for role in ("rollout", "train"):
        options = [role, "--job-id", "gpu-check", "--device", args.device, "--out", args.out / f"{role}.json"]
        jobs[role] = client.submit_job(
            entrypoint=shlex.join(map(str, [sys.executable, Path(__file__).with_name("jobs.py"), *options])),
            entrypoint_num_gpus=SHARE,
            runtime_env=runtime_env(),
        )
    while not all(client.get_job_status(job).is_terminal() for job in jobs.values()):
        time.sleep(0.3)
    figures: dict[str, Any] = {}
    for role, job in jobs.items():
        (args.out / f"{role}.log").write_text(client.get_job_logs(job))
        with contextlib.suppress(FileNotFoundError):
            for row, found in json.loads((args.out / f"{role}.json").read_text()).items():
                figures.setdefault(row, {}).update(found)
    args.result["figures"] = figures  # also where a job failed
    for role, job in jobs.items():
        status, log = client.get_job_status(job).value, (args.out / f"{role}.log").read_text()
        assert status == "SUCCEEDED", f"the {role} job of the bench is {status}: {log[-1500:]}"
    return figures


def table(title: str, rows: list[str], columns: tuple[str, ...], figures: dict[str, Any]) -> str:
    """In Markdown, milliseconds."""
    out = [f"| {title}, ms | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    for row in rows:
        cells = [f"{figures.get(row, {})[c]:.2f}" if c in figures.get(row, {}) else "not run" for c in columns]
        out.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def report(result: dict[str, Any]) -> str:
    figures = result.get("figures", {})
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    hand_over = table("from device to device", [row for row in figures if row.endswith("MB")], HAND_OVER, figures)
    other = "CUDA IPC" if result["device"] == "cuda" else "torch's shared memory"
    weights = table("100 MB of weights", ["shared memory", other], WEIGHTS, figures)
    return f"{facts}\n\n{hand_over}\n{weights}\nCUDA IPC: {result['cuda_ipc']}\nNCCL: {NCCL}\n"


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU with {os.cpu_count()} cores"
    versions = {"Python": sys.version.split()[0], "torch": torch.__version__}
    return {"device": name, **versions, **{package: version(package) for package in ("ray", "pyarrow", "numpy")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json and logs")
    parser.add_argument("--rollouts", type=int, default=80, help="of the demo (default: %(default)s)")
    parser.add_argument("--deadline-s", type=int, default=440, help="for all of it (default: %(default)s)")
    args = parser.parse_args()
    begin_without()
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    args.result = result = {"passed": False, "why": "", "device": args.device, "nccl": NCCL}
    result["cuda_ipc"] = "not run" if args.device == "cuda" else "not run: the device is a CPU"

    def late(received: int, _: object) -> None:
        raise TimeoutError(f"not over after {args.deadline_s} s" if received == signal.SIGALRM else "asked to end")

    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGTERM, late)
    signal.alarm(args.deadline_s)
    try:
        result["machine"] = machine(args.device)
        with LocalCluster(num_gpus=1, object_store_bytes=2_000_000_000) as cluster:
            result["demo"] = demo(args, cluster)
            bench(args, cluster)
        if args.device == "cuda":
            result["cuda_ipc"] = "run: the rollout job opened the train job's memory, equal to the last bit"
        result["passed"] = True
    except BaseException as error:
        traceback.print_exc()
        result["why"] = f"{type(error).__name__}: {error}"
    signal.alarm(0)
    result["wall_s"] = round(time.monotonic() - began, 1)
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(report(result) if "machine" in result else "", flush=True)
    print(f"passed in {result['wall_s']} s" if result["passed"] else f"failed: {result['why']}", flush=True)
    sys.exit(not result["passed"])


if __name__ == "__main__":
    main()
