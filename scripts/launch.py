"""Behind launch_rollout.sh and launch_train.sh: submits one half of slime as a Ray job, follows it, stops it.

Runs in the environment that slime runs in (it needs ray). Exit code where a job is followed: the job's own (errors.py
says which), 1 when Ray stopped it or it gave none. 2 when it was not submitted, or there is none; 4 when no Ray
answers. With --stop: 1 when it had not ended in time.
"""

import argparse
import difflib
import functools
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

from launch_environment import environment

SCRIPTS = {"rollout": "cross_job_rollout.py", "train": "train.py"}
_FLAGS = Path(__file__).resolve().parents[1] / "slime_overlay" / "slime" / "cross_job_settings.py"
_VERIFY_S = 300.0
_STORES = ("redis", "rediss", "unix", "s3", "gs", "az", "abfs", "abfss")  # what stores/ opens


def main(role: str, words: list[str]) -> int:
    options, cross_job, slime_arguments = parse(role, words)
    if not options.action:
        check(options, role)
    try:
        from launch_job import Jobs, NoAnswer, Unanswered
    except ImportError as error:
        raise SystemExit(f"error: no ray here ({error}): activate the environment that slime runs in") from None
    if options.action in (None, "stop"):
        print(f"{options.action or 'submit'}: to Ray's job API at {options.address}", file=sys.stderr, flush=True)
    try:
        jobs = Jobs(options.address, options.job_id, role)
        if options.action == "status":
            return jobs.tell(as_json=options.json)
        if options.action == "stop":
            return jobs.stop(options.timeout_s)
        if options.action == "follow":
            return jobs.follow(jobs.latest())
        job = submit(jobs, options, cross_job, slime_arguments)
        return 0 if options.no_wait else jobs.follow(job)
    except NoAnswer as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except Unanswered as error:
        raise SystemExit(f"error: {error}") from None


def submit(jobs: Any, options: argparse.Namespace, cross_job: list[str], slime_arguments: list[str]) -> str:
    """Submit the job that the options describe; Ray's name for it. Refused where one of its role runs already."""
    jobs.refuse_a_second()
    resources = jobs.entry_resources(options.entrypoint_resources)
    placed = {
        "entrypoint_resources": resources or None,
        "entrypoint_num_cpus": options.entrypoint_num_cpus,
        "entrypoint_num_gpus": options.entrypoint_num_gpus,
    }
    script = options.script or SCRIPTS[jobs.role]
    if not options.working_dir:  # whose copy the job starts in
        script = str(checkout(options) / script)
    command = ["python3", "-u", script, *slime_arguments, "--enable-cross-job-communication"]
    command += ["--job-id", options.job_id, "--cross-job-role", jobs.role, *cross_job]
    if any(placed.values()) and not options.entrypoint_num_gpus:
        # Megatron looks at a GPU when it reads its arguments; older Rays hide them from a driver that is placed
        command = ["env", "-u", "CUDA_VISIBLE_DEVICES", *command]
    runtime_env: dict[str, Any] = {"env_vars": environment(options, jobs.env_of_the_other())}
    if options.working_dir:
        runtime_env |= {"working_dir": str(checkout(options)), "excludes": ["/.git"]}
    job: str = jobs.submit(
        entrypoint=shlex.join(command), runtime_env=runtime_env, submission_id=options.submission_id, **placed
    )
    where = f", on a node with {json.dumps(resources)}" if resources else ""
    print(f"submitted {job}: the {jobs.role} job of {options.job_id}{where}, to {options.address}", flush=True)
    return job


def parse(role: str, words: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """(options of this script, cross-job flags, slime's arguments); exits with 2 and the reason on wrong ones."""
    parser = parser_for(role)
    at = words.index("--") if "--" in words else len(words)
    options, rest = parser.parse_known_args(words[:at])
    if "--" in words and options.action == "follow":
        options.action = None  # a job that is submitted is followed anyway
    if options.action and (rest or "--" in words):
        parser.error(f"--{options.action} is about a job that was submitted before: it takes no {(rest or ['--'])[0]}")
    if options.action and options.no_wait:
        parser.error(f"--no-wait does not go with --{options.action}")
    if options.json and options.action != "status":
        parser.error("--json goes with --status")
    if not options.action:
        _check_submission(parser, options, words, rest)
    if not options.address:
        parser.error(
            "on which cluster? Give --address http://HOST:8265, that of its dashboard, or set RAY_API_SERVER_ADDRESS "
            "(RAY_ADDRESS is not read)"
        )
    if "://" not in options.address:
        options.address = f"http://{options.address}"
    if not options.address.startswith(("http://", "https://")):
        parser.error(
            f"--address {options.address}: give that of Ray's job API, http://HOST:PORT (port 8265 by default)"
        )
    return options, rest, words[at + 1 :]


def _check_submission(
    parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str], rest: list[str]
) -> None:
    if "--" not in words:
        parser.error("-- is missing: give it before slime's arguments")
    _check_settings(parser, rest)
    if any("=" not in text for text in options.env):
        parser.error("an --env without =: give NAME=VALUE")  # not shown: it may be a secret
    _refuse_passwords(parser, options, words, rest)
    if not (options.slime or options.working_dir or options.image_checkout):
        parser.error("where is slime? Give one of --slime, --working-dir and --image-checkout")
    if options.image_checkout and not Path(options.image_checkout).is_absolute():
        parser.error(f"--image-checkout {options.image_checkout}: give an absolute path, on the nodes")


@functools.cache
def _table() -> types.ModuleType:
    """The overlay's table of the cross-job flags, which is there also where slime is not."""
    spec = importlib.util.spec_from_file_location("cross_job_settings", _FLAGS)
    assert spec is not None
    assert spec.loader is not None
    table = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up there
    spec.loader.exec_module(table)
    return table


def _check_settings(parser: argparse.ArgumentParser, rest: list[str]) -> None:
    """Exits with the reason if these words are not cross-job flags of the table, with values that may be."""
    table = _table()
    reader = argparse.ArgumentParser(prog=parser.prog, usage=parser.usage, allow_abbrev=False, add_help=False)
    given, wrong = table.add_settings(reader).parse_known_args(rest)
    if wrong:
        word = wrong[0].partition("=")[0]  # its value may be a secret
        known = [table.flag(name) for name in (*table.ABOUT, *table.STORE_SOURCES)]
        meant = difflib.get_close_matches(word, known, n=1, cutoff=0.85)
        parser.error(f"{word} is no option here: " + (f"{meant[0]}?" if meant else "slime's arguments go after --"))
    for name, about in table.ABOUT.items():
        value = getattr(given, f"cross_job_{name}")
        if value is None:
            continue
        if about["choices"] and value not in about["choices"]:
            parser.error(f"{table.flag(name)} {value} must be one of {', '.join(about['choices'])}")
        if about["kind"] is not str and not about["least"] <= value < math.inf:
            parser.error(f"{table.flag(name)} {value} must be {about['least']} or more")


def _refuse_passwords(
    parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str], rest: list[str]
) -> None:
    """Ray shows a job's command line and its variables to all who may list jobs, and keeps them."""
    flags = _table()
    named, option, found = set(), "", []
    for word in (*rest, *words[words.index("--") + 1 :]):
        option, _, value = word.partition("=") if word.startswith("--") else (option, "", word)
        if option == "--cross-job-store-env":
            named.add(value)
        if _of_a_store(value, option) and flags.holds_password(value):
            found.append(option or "slime's arguments")
    for name, _, value in (text.partition("=") for text in options.env):
        if name in named or (_of_a_store(value) and flags.holds_password(value)):
            found.append(f"--env {name}")
    if found:
        parser.error(
            f"{found[0]}: a password would stand in the job's entry, which `ray job list`, dashboard and `ps` show. "
            "Put the URI of a durable store into an environment variable where Ray is started on the nodes (not into "
            "--env) and give --cross-job-store-env NAME, or into a file on the nodes and give "
            "--cross-job-store-file PATH"
        )


def _of_a_store(value: str, option: str = "") -> bool:
    """Whether it is the URI of a durable store. Others may be what they like: that of a proxy is nothing for us."""
    scheme, colon, _ = value.partition("://")
    return bool(colon) and (option == "--cross-job-store" or scheme.lower() in _STORES)


def parser_for(role: str) -> argparse.ArgumentParser:
    other = {"rollout": "train", "train": "rollout"}[role]
    parser = argparse.ArgumentParser(
        prog=f"launch_{role}.sh",
        usage="%(prog)s --job-id NAME (--slime|--working-dir|--image-checkout) DIR [OPTIONS] "
        "[--cross-job-... VALUE] -- SLIME-ARGUMENTS\n       %(prog)s --job-id NAME (--follow | --stop | --status)",
        description=f"Submits the {role} job of an experiment to a Ray cluster, and follows its log. Give both jobs "
        f"(launch_{other}.sh) the same NAME and the same SLIME-ARGUMENTS, those that slime's train.py takes. Where "
        "the cluster asks for a token: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--job-id", required=True, help="name of the experiment, the same in its rollout and train job")
    add(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS"),
        help="Ray's job API, http://HOST:PORT of the dashboard; needed (or RAY_API_SERVER_ADDRESS; now: %(default)s)",
    )
    group = parser.add_argument_group("where slime is, patched (one of them)").add_mutually_exclusive_group()
    add = group.add_argument
    add("--slime", metavar="DIR", help="checkout on a disk that all nodes share, at the same path here")
    add("--working-dir", metavar="DIR", help="checkout here, which Ray uploads to the nodes (up to 512 MiB, packed)")
    add("--image-checkout", metavar="DIR", help="checkout in the nodes' image, which is not here: it is not checked")
    add = parser.add_argument_group("the job").add_argument
    add("--script", help=f"what the job runs, a file in DIR (default: {SCRIPTS[role]})")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment of the job's processes, before all defaults; `ray job list` shows it: no place for secrets",
    )
    add(
        "--no-default-env",
        action="store_true",
        help="leave out the defaults, those of slime's own scripts: CUDA_DEVICE_MAX_CONNECTIONS, "
        "NCCL_CUMEM_ENABLE, NCCL_NVLS_ENABLE, Megatron-LM on PYTHONPATH",
    )
    add("--submission-id", help="Ray's name for the job (default: Ray's choice)")
    add("--no-verify", action="store_true", help="do not check that DIR is patched as this repository would do it")
    add(
        "--entrypoint-resources",
        type=_resources,
        metavar="JSON",
        help=f'what the node of the driver must have: {{"{role}": 0.01}} (default, where a node has it), or none',
    )
    add("--entrypoint-num-cpus", type=float, metavar="N", help="CPUs that the driver takes")
    add("--entrypoint-num-gpus", type=float, metavar="N", help="GPUs that the driver takes")
    add("--no-wait", action="store_true", help="return when the job is submitted, instead of following its log")
    group = parser.add_argument_group(f"the newest {role} job of NAME").add_mutually_exclusive_group()
    for action, text in (
        ("follow", "its log from the beginning, until it ends; exit code: its own"),
        (
            "stop",
            "ask it to stop (SIGTERM), wait for its end, and say how it ended; Ray kills it after the cluster's "
            "RAY_JOB_STOP_WAIT_TIME_S, 3 s by default",
        ),
        ("status", "say how it stands, with the last lines of its log"),
    ):
        group.add_argument(f"--{action}", dest="action", action="store_const", const=action, help=text)
    add = parser.add_argument_group("with those").add_argument
    add("--timeout-s", type=float, default=900.0, help="how long --stop waits (default: %(default)s s)")
    add("--json", action="store_true", help="--status as JSON")
    return parser


def _resources(text: str) -> dict[str, float]:
    if text == "none":
        return {}
    try:
        return {str(name): float(amount) for name, amount in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        raise argparse.ArgumentTypeError(f'{text!r} is neither none nor like {{"rollout": 0.01}}') from None


def checkout(options: argparse.Namespace) -> Path:
    """The checkout: here, or, with --image-checkout, on the nodes."""
    if options.image_checkout:
        return Path(options.image_checkout)
    return Path(options.slime or options.working_dir).resolve()


def check(options: argparse.Namespace, role: str) -> None:
    """Exits with the reason if the checkout is here, and is not patched or does not have the script."""
    if options.image_checkout:
        return
    slime, script = checkout(options), options.script or SCRIPTS[role]
    for name, trouble in (
        ("train.py", f"{slime} is no checkout of slime: it has no train.py"),
        ("cross_job_rollout.py", f"{slime} is not patched: run scripts/apply.sh {slime}"),
        (script, f"no {script} in {slime}"),
    ):
        if not (slime / name).is_file():
            raise SystemExit(f"error: {trouble}")
    if options.no_verify:
        return
    command = [str(Path(__file__).with_name("apply.sh")), str(slime), "--verify"]
    try:
        if subprocess.run(command, stdout=subprocess.DEVNULL, timeout=_VERIFY_S).returncode == 0:
            return
    except subprocess.TimeoutExpired:
        print(f"apply.sh --verify took more than {_VERIFY_S:g} s", file=sys.stderr)
    raise SystemExit(f"error: run scripts/apply.sh {slime}, or pass --no-verify")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit("a job that was submitted goes on: end it with --stop, watch it again with --follow")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            sys.exit(2)
        raise
