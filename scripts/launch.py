"""Submits one half of slime as a Ray job, from a patched checkout, and follows its log: see launch_rollout.sh --help.

Runs in the environment that slime runs in (it needs ray). Exit code: the job's own (errors.py says which), 1 when it
was stopped by Ray or gave none, 2 when it was not submitted.
"""

import argparse
import asyncio
import os
import shlex
import subprocess
import sys
from pathlib import Path

SCRIPTS = {"rollout": "cross_job_rollout.py", "train": "train.py"}


def main(role: str, words: list[str]) -> int:
    options, cross_job, slime_arguments = parse(role, words)
    slime = check(options, SCRIPTS[role] if options.script is None else options.script)
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise SystemExit("error: no ray here: activate the environment that slime runs in") from None
    try:
        client = JobSubmissionClient(options.address)
    except (ConnectionError, RuntimeError) as error:
        raise SystemExit(f"error: no Ray job API at {options.address}: {error}") from None
    script = slime / (options.script or SCRIPTS[role])
    switch = ["--enable-cross-job-communication", "--job-id", options.job_id, "--cross-job-role", role, *cross_job]
    job = client.submit_job(
        entrypoint=shlex.join(["python3", "-u", str(script), *slime_arguments, *switch]),
        runtime_env={"env_vars": environment(options.env, slime)},
        submission_id=options.submission_id,
    )
    print(f"submitted {job}: the {role} job of {options.job_id}", flush=True)
    return 0 if options.no_wait else asyncio.run(follow(client, job))


def parse(role: str, words: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """(options of this script, cross-job flags, slime's arguments); exits with 2 and the reason on wrong ones."""
    parser = argparse.ArgumentParser(
        prog=f"launch_{role}.sh",
        usage="%(prog)s --job-id NAME [OPTIONS] [--cross-job-... VALUE] -- SLIME-ARGUMENTS",
        description=f"Submits the {role} job of an experiment to a Ray cluster. Give both jobs the same NAME and the "
        "same SLIME-ARGUMENTS, those that slime's train.py takes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--job-id", required=True, help="name of the experiment, the same in its rollout and train job")
    add("--slime", default=".", metavar="DIR", help="patched checkout of slime, at the same path on every node")
    add(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        help="Ray's job API (default: %(default)s)",
    )
    add("--script", help=f"what the job runs, a file in DIR (default: {SCRIPTS[role]})")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="environment of the job's processes")
    add("--submission-id", help="Ray's name for the job (default: Ray's choice)")
    add("--no-wait", action="store_true", help="return when the job is submitted, instead of following its log")
    add("--no-verify", action="store_true", help="do not check that DIR is patched as this repository would do it")
    if "--" not in words and not {"-h", "--help"} & {*words}:
        parser.error("no -- before slime's arguments")
    at = words.index("--") if "--" in words else len(words)
    options, rest = parser.parse_known_args(words[:at])
    if wrong := [word for word in rest[::2] if not word.startswith("--cross-job-") or word == "--cross-job-role"]:
        parser.error(f"{wrong[0]} is no option here: slime's own arguments go behind --")
    if len(rest) % 2:
        parser.error(f"{rest[-1]} needs a value")
    if wrong := [text for text in options.env if "=" not in text]:
        parser.error(f"--env {wrong[0]}: give NAME=VALUE")
    return options, rest, words[at + 1 :]


def check(options: argparse.Namespace, script: str) -> Path:
    """The checkout, if it is patched and has the script; exits with the reason otherwise."""
    slime = Path(options.slime).resolve()
    for name, trouble in (
        ("train.py", f"{slime} is no checkout of slime: it has no train.py; --slime names one"),
        ("cross_job_rollout.py", f"{slime} is not patched: run scripts/apply.sh {slime}"),
        (script, f"no {script} in {slime}"),
    ):
        if not (slime / name).is_file():
            raise SystemExit(f"error: {trouble}")
    apply = Path(__file__).with_name("apply.sh")
    if not options.no_verify and subprocess.run([apply, slime, "--verify"], stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"error: run scripts/apply.sh {slime}, or pass --no-verify")
    return slime


def environment(given: list[str], slime: Path) -> dict[str, str]:
    """The job's variables, with the checkout on PYTHONPATH behind what was given."""
    env = dict(text.split("=", 1) for text in given)
    env["PYTHONPATH"] = os.pathsep.join([*filter(None, [env.get("PYTHONPATH")]), str(slime)])
    return env


async def follow(client: "JobSubmissionClient", job: str) -> int:  # type: ignore[name-defined]  # noqa: F821
    """Print the job's log until it ends; ending this leaves the job running."""
    printed = 0
    while True:
        seen = 0
        async for text in client.tail_job_logs(job):  # from its beginning, each time
            print(text[max(0, printed - seen) :], end="", flush=True)
            seen += len(text)
            printed = max(printed, seen)
        info = client.get_job_info(job)
        if info.status.is_terminal():
            break
        await asyncio.sleep(1)  # the connection was lost, not the job
    print(f"{job}: {info.status.value} {info.message or ''}", flush=True)
    code = info.driver_exit_code
    return 0 if info.status.value == "SUCCEEDED" or code == 0 else max(code or 1, 1)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit("the job goes on: stop it with `ray job stop`")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            sys.exit(2)
        raise
