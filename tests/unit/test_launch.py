"""launch_rollout.sh and launch_train.sh: what is wrong is said before anything is submitted; the job's environment."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

import launch
import launch_environment
from tests.support.patience import patient

SCRIPTS = Path(launch.__file__).parent


def checkout(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).write_text("")
    return folder


@pytest.fixture(autouse=True)
def named(monkeypatch):
    """A cluster that the environment names."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")


def parse(words: str, role: str = "train"):
    return launch.parse(role, shlex.split(words))


def test_options_are_taken_apart():
    options, cross_job, slime_arguments = parse(
        "--job-id exp --slime . --env A=1 --env B=x=y --cross-job-max-ahead 1 -- --lr 1 --"
    )
    assert (options.job_id, options.env, options.script, options.action) == ("exp", ["A=1", "B=x=y"], None, None)
    assert options.entrypoint_resources is None
    assert cross_job == ["--cross-job-max-ahead", "1"]
    assert slime_arguments == ["--lr", "1", "--"]
    words = ["--cross-job-max-ahead=1", "--cross-job-retain", "2"]
    assert parse(f"--job-id exp --slime . {' '.join(words)} --")[1] == words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-- --lr 1", "required: --job-id"),
        ("--job-id exp --lr 1", "-- is missing: give it before slime's arguments"),
        ("--job-id exp --lr 1 --", "--lr is no option here: slime's arguments go after --"),
        ("--job-id exp --cross-job-max-aheda 1 --", "--cross-job-max-aheda is no option here: --cross-job-max-ahead?"),
        ("--job-id exp --cross-job-max-aheda=1 --", "--cross-job-max-aheda is no option here: --cross-job-max-ahead?"),
        ("--job-id exp --cross-job-max-ahead 1 2 --", "2 is no option here"),
        ("--job-id exp --cross-job-max-ahead=one --", "argument --cross-job-max-ahead: invalid int value: 'one'"),
        ("--job-id exp --cross-job-max-ahead -1 --", "--cross-job-max-ahead -1 must be 0 or more"),
        ("--job-id exp --cross-job-heartbeat-s nan --", "--cross-job-heartbeat-s nan must be 0.05 or more"),
        (
            "--job-id exp --cross-job-on-stale wiat --",
            "--cross-job-on-stale wiat must be one of wait, drop, regenerate",
        ),
        ("--job-id exp --cross-job-role train --", "--cross-job-role is no option here"),
        ("--job-id exp --cross-job-max-ahead --", "argument --cross-job-max-ahead: expected one argument"),
        ("--job-id exp --env A --", "an --env without =: give NAME=VALUE"),
        ("--job-id exp --", "Give one of --slime, --working-dir and --image-checkout"),
        ("--job-id exp --slime a --working-dir b --", "not allowed with argument --slime"),
        ("--job-id exp --image-checkout slime --", "--image-checkout slime: give an absolute path"),
        ("--job-id exp --slime . --entrypoint-resources rollout --", "'rollout' is neither none nor like {"),
        ("--job-id exp --stop --status", "not allowed with argument"),
        ("--job-id exp --stop -- --lr 1", "--stop is about a job that was submitted before: it takes no --"),
        ("--job-id exp --status --lr 1", "it takes no --lr"),
        ("--job-id exp --follow --no-wait", "--no-wait does not go with --follow"),
        ("--job-id exp --stop --json", "--json goes with --status"),
        ("--job-id exp --status --address ray://head:10001", "give that of Ray's job API, http://HOST:PORT"),
    ],
)
def test_wrong_options_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        parse(words, "rollout")
    assert end.value.code == 2
    assert said in capsys.readouterr().err


PASSWORD = "hunter2"


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--cross-job-store redis://:hunter2@host:6379/0 --", "--cross-job-store"),
        ("--cross-job-store s3://KEY:hunter2/x@bucket/run --", "--cross-job-store"),
        ("--cross-job-store elsewhere://KEY:hunter2/x@bucket/run --", "--cross-job-store"),
        ("--env STORE=redis://:hunter2@host:6379/0 --", "--env STORE"),
        ("--env STORE=abfs://run@account?sas_sig=hunter2 --", "--env STORE"),
        ("--env STORE=hunter2 --cross-job-store-env STORE --", "--env STORE"),
        ("--env STORE=hunter2 -- --cross-job-store-env STORE", "--env STORE"),
        ("--env STORE=hunter2 -- --cross-job-store-env=STORE", "--env STORE"),
        ("-- --cross-job-store redis://:hunter2@host:6379/0", "--cross-job-store"),
        ("-- --cross-job-store=redis://:hunter2@host:6379/0", "--cross-job-store"),
        ("-- --stores redis://host redis://:hunter2@host:6379/0", "--stores"),
        ("-- redis://:hunter2@host:6379/0", "slime's arguments"),
    ],
)
def test_a_password_never_comes_into_the_entry_of_a_job(words, option, capsys):
    with pytest.raises(SystemExit) as end:
        parse(f"--job-id exp --slime . {words}")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"error: {option}: a password would stand in the job's entry" in said
    assert "--cross-job-store-env NAME" in said
    assert PASSWORD not in said


@pytest.mark.parametrize(
    "value", ["http://host", "http://u:p@proxy:3128", "http://host:8080/@me", "redis://host:6379/0"]
)
def test_what_is_no_password_of_a_store_may_be_given(value):
    words = f"--env A={value} --cross-job-store-env STORE -- --data {value} --x={value} --mail a@b"
    assert parse(f"--job-id exp --slime . {words}")[1] == ["--cross-job-store-env", "STORE"]


def test_what_is_about_a_job_of_before_needs_no_more_than_its_name():
    assert [parse(f"--job-id exp --{action}")[0].action for action in ("follow", "stop", "status")] == [
        *("follow", "stop", "status")
    ]
    assert parse("--job-id exp --slime . --follow -- --lr 1")[0].action is None  # submitted, and followed


@pytest.mark.parametrize(
    ("environment", "words", "address"),
    [
        ({"RAY_ADDRESS": "http://head:1", "RAY_API_SERVER_ADDRESS": "http://api:2"}, "", "http://api:2"),
        ({"RAY_API_SERVER_ADDRESS": "http://api:2"}, "--address here:3", "http://here:3"),
    ],
)
def test_the_address_of_the_job_api(environment, words, address, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert parse(f"--job-id exp --status {words}")[0].address == address


@pytest.mark.parametrize("words", ["--stop", "--status", "--follow", "--slime . --"])
@pytest.mark.parametrize("api", [None, ""])
def test_no_cluster_is_gone_to_that_was_not_named(words, api, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "http://theirs:8265")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    if api is not None:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", api)
    with pytest.raises(SystemExit) as end:
        parse(f"--job-id exp {words}")
    assert end.value.code == 2
    assert "on which cluster? Give --address http://HOST:8265" in capsys.readouterr().err


def test_the_target_is_said_before_anything_is_asked_of_it(capsys, monkeypatch):
    monkeypatch.setattr(launch, "check", lambda options, role: None)
    for words, said in ((["--stop"], "stop"), (["--slime", ".", "--"], "submit")):
        assert launch.main("train", ["--job-id", "exp", "--address", "127.0.0.1:9", *words]) == 4
        assert capsys.readouterr().err.startswith(f"{said}: to Ray's job API at http://127.0.0.1:9\nerror: no Ray job")


def test_resources_of_the_driver():
    def given(text: str):
        return parse(f"--job-id exp --slime . --entrypoint-resources '{text}' --")[0].entrypoint_resources

    assert given("none") == {}
    assert given('{"gpu-node": 1}') == {"gpu-node": 1.0}


@pytest.mark.parametrize("where", ["--slime", "--working-dir"])
@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "is no checkout of slime: it has no train.py"),
        (("train.py",), "is not patched: run scripts/apply.sh"),
        (("train.py", "cross_job_rollout.py"), "run scripts/apply.sh"),
    ],
)
def test_a_folder_that_is_no_patched_checkout_is_refused(files, said, where, tmp_path):
    slime = checkout(tmp_path, *files)
    command = [SCRIPTS / "launch_train.sh", "--job-id", "exp", where, slime, "--"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_cluster_that_is_not_there_is_named(tmp_path):
    slime = checkout(tmp_path, "train.py", "cross_job_rollout.py")
    command = [SCRIPTS / "launch_rollout.sh", "--job-id", "exp", "--slime", slime, "--no-verify"]
    command += ["--address", "http://127.0.0.1:9", "--"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patient(120))
    assert done.returncode == 4
    assert "error: no Ray job API at http://127.0.0.1:9" in done.stderr


def environment(words: str, other: dict[str, str] | None = None) -> dict[str, str]:
    return launch_environment.environment(parse(f"--job-id exp {words} --")[0], other or {})


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ("--slime /slime", "/root/Megatron-LM:/slime"),
        ("--slime /slime --env PYTHONPATH=/megatron:/x", "/megatron:/x:/root/Megatron-LM:/slime"),
        ("--image-checkout /opt/slime", "/root/Megatron-LM:/opt/slime"),
        ("--working-dir /slime", "/root/Megatron-LM"),  # Ray puts its copy in front
        ("--slime /slime --no-default-env", "/slime"),
    ],
)
def test_the_checkout_comes_behind_megatron_and_what_was_given_on_the_path(words, path):
    assert environment(words)["PYTHONPATH"] == path


def test_the_environment_of_slimes_own_scripts_can_be_changed_and_left_out(monkeypatch):
    monkeypatch.setattr(launch_environment, "has_nvlink", lambda: True)
    defaults = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "1"}
    assert defaults.items() <= environment("--slime .").items()
    assert environment("--slime . --env NCCL_NVLS_ENABLE=0 --env X=")["NCCL_NVLS_ENABLE"] == "0"
    assert environment("--slime . --no-default-env --env X=").keys() == {"X", "PYTHONPATH"}


def test_what_must_agree_is_taken_from_the_other_job(monkeypatch):
    monkeypatch.setattr(launch_environment, "has_nvlink", lambda: False)
    other = {"NCCL_NVLS_ENABLE": "1", "PYTHONPATH": "/other", "SECRET": "x"}
    env = environment("--slime /slime", other)
    assert (env["NCCL_NVLS_ENABLE"], env["NCCL_CUMEM_ENABLE"]) == ("1", "0")
    assert "SECRET" not in env
    assert "/other" not in env["PYTHONPATH"]
    assert environment("--slime . --env NCCL_NVLS_ENABLE=0", other)["NCCL_NVLS_ENABLE"] == "0"


@pytest.mark.parametrize(
    ("topology", "found"), [("GPU0 X NV18 NV18", True), ("GPU0 X PHB NODE", False), (None, False)]
)
def test_nvlink_is_found_as_slimes_scripts_find_it(topology, found, tmp_path, monkeypatch):
    if topology is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n[ \"$*\" = 'topo -m' ] && echo '{topology}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), "/usr/bin", "/bin"]))
    assert launch_environment.has_nvlink() is found
