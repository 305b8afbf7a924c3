"""Behind launch_cluster.sh: a Ray cluster for slime's two jobs.

`local` starts one on this machine, `compose` calls docker compose; `commands` and `slurm` print a script and start
nothing. Exit code 2, and the reason, where it does not work.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from launch_cluster_texts import ROLES, STOP_WAIT_S, commands, slurm
from local_cluster import CREDENTIALS, LocalCluster, NotStarted, is_alive, processes_of

ROOT = Path(__file__).resolve().parent.parent
COMPOSE_FILE = ROOT / "docker" / "docker-compose.yml"
RECORD = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "slime-cross-job" / "launch-local.json"
GONE_S = 20.0


def main(words: list[str]) -> int:
    parser = parser_for()
    options, rest = parser.parse_known_args(words)
    if rest and options.kind != "compose":
        parser.error(f"{options.kind} takes no {rest[0]}")
    if options.kind == "local":
        stop_local() if options.stop else start_local(options)
    elif options.kind == "compose":
        command = compose(options, rest)
        os.execvp(command[0], command)
    else:
        print(commands(options) if options.kind == "commands" else slurm(options), end="")
    return 0


def parser_for() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch_cluster.sh", description="A Ray cluster for slime's two jobs.", allow_abbrev=False
    )
    kinds = parser.add_subparsers(dest="kind", required=True)

    def kind(name: str, text: str) -> argparse.ArgumentParser:
        return kinds.add_parser(name, help=text, description=text, allow_abbrev=False)

    sub = kind("local", "start a cluster on this machine, to try things out, with the Ray of this environment")
    sub.add_argument("--num-cpus", type=int, default=8, help="logical CPUs (default: %(default)s)")
    sub.add_argument("--num-gpus", type=int, default=0, help="GPUs (default: %(default)s)")
    sub.add_argument("--object-store-bytes", type=int, default=500_000_000, help="(default: %(default)s)")
    sub.add_argument("--stop", action="store_true", help="end it, and everything that runs in it")

    sub = kind("compose", "docker compose with docker/docker-compose.yml; what is not known here is handed on")
    sub.add_argument("verb", help="up, down, ps ...")
    for role in ROLES:
        sub.add_argument(f"--{role}", type=int, metavar="N", help=f"up: number of {role} nodes")

    sub = kind("commands", "print a script with the `ray start` of each kind of node, for bare metal")
    sub.add_argument("--head", required=True, metavar="ADDRESS", help="address of the head, as the other nodes see it")
    sub.add_argument(
        "--head-is",
        choices=ROLES,
        help="the head is such a node, too (default: neither; no job uses its CPUs and GPUs)",
    )
    sub.add_argument("--redis", metavar="HOST:PORT", help="where the head keeps its tables, to survive its own death")
    sub.add_argument("--num-gpus", type=int, metavar="N", help="GPUs a node (default: what Ray finds)")
    _common(sub)

    sub = kind("slurm", "print an sbatch script")
    for role in ROLES:
        sub.add_argument(
            f"--nodes-{role}", type=_at_least_1, required=True, metavar="N", help=f"number of {role} nodes"
        )
    sub.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(default: %(default)s)")
    sub.add_argument("--time", default="24:00:00", help="Slurm's limit (default: %(default)s)")
    sub.add_argument("--image", help="container image, for Slurm's pyxis plugin (default: the nodes' own environment)")
    _common(sub)
    return parser


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return int(text)


def _common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--object-store-bytes", type=int, metavar="N", help="a node (default: Ray's, 30 %% of its memory)"
    )
    sub.add_argument("--port", type=int, default=6379, help="of Ray's head (default: %(default)s)")
    sub.add_argument("--dashboard-port", type=int, default=8265, help="of its job API (default: %(default)s)")


def start_local(options: argparse.Namespace) -> None:
    if (record := _record()) and _processes(record):
        fail(f"it runs already, at {record['api']}: end it first, with --stop")
    if not Path(sys.executable).with_name("ray").exists():
        fail(
            f"no ray beside {sys.executable}: activate the environment that slime runs in, or, to try "
            "things out without slime: . scripts/env.sh"
        )
    if find_spec("psutil") is None:
        fail("it needs psutil, which slime's environment has: pip install psutil")
    wanted = {name: value for name, value in os.environ.items() if name.startswith(CREDENTIALS)}
    stop_wait_s = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", STOP_WAIT_S)
    cluster = LocalCluster(
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        object_store_bytes=options.object_store_bytes,
        env={**wanted, "RAY_JOB_STOP_WAIT_TIME_S": stop_wait_s},
        outlives_us=True,
    )
    try:
        cluster.start()
    except NotStarted as error:
        fail(str(error), 4)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    facts = {"pid": cluster.pid, "marker": cluster.marker, "folder": str(cluster.folder), "api": cluster.api}
    RECORD.write_text(json.dumps(facts))
    print(f"a Ray cluster on this machine, with its dashboard at {cluster.api}")
    print(f"    export RAY_API_SERVER_ADDRESS={cluster.api}    # for launch_rollout.sh and launch_train.sh")
    print(f"    scripts/slime-cross-job jobs --address {cluster.address}    # or export RAY_ADDRESS")
    print("    scripts/launch_cluster.sh local --stop             # ends it, and everything that runs in it")


def stop_local() -> None:
    """Ends the processes of the cluster that `local` started, gently first; nothing else on the machine."""
    if not (record := _record()):
        fail("no cluster was started here with launch_cluster.sh local")
    began = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        if record["pid"] in _processes(record):
            os.kill(record["pid"], signal.SIGTERM)
    while left := _processes(record):
        waited = time.monotonic() - began
        if waited > 2 * GONE_S:
            fail(f"these processes of the cluster do not end: {', '.join(map(str, left))}")
        if waited > GONE_S:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(record["folder"], ignore_errors=True)
    RECORD.unlink()
    print(f"the cluster at {record['api']} has ended")


def fail(reason: str, code: int = 2) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(code)


def _record() -> dict:
    try:
        return json.loads(RECORD.read_text())
    except FileNotFoundError:
        return {}


def _processes(record: dict) -> list[int]:
    """Process ids of the cluster: those of its head's session, and those that have its marker (drivers of jobs)."""
    head, marker = record["pid"], record["marker"]
    known = processes_of(marker, -1)
    reused = is_alive(head) and head not in known  # its number is another's by now
    return known if reused else processes_of(marker, head)


def compose(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """The command line: of docker's plugin, where it is there, else of the older docker-compose."""
    if not COMPOSE_FILE.exists():
        fail(f"there is no {COMPOSE_FILE}")
    if not (command := compose_words()):
        fail("neither `docker compose` nor docker-compose works here")
    scales = {role: getattr(options, role) for role in ROLES if getattr(options, role) is not None}
    if scales and options.verb != "up":
        fail(f"--{next(iter(scales))} goes with up")
    words = [f"--scale={role}={number}" for role, number in scales.items()]
    return [*command, "-f", str(COMPOSE_FILE), options.verb, *words, *rest]


def compose_words() -> list[str]:
    """The words of compose: docker's plugin, where it is there, else the older docker-compose; [] without either."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["docker", "compose", "version"], check=True, capture_output=True, timeout=30)
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
