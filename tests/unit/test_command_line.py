"""The command line without a cluster: help, completion, what is refused before anybody is asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slime.cross_job.ops import app as common
from tests.support.patience import patient

ROOT = Path(__file__).parents[2]
COMMANDS = (
    *("jobs", "status", "top", "ls", "show", "tail", "wait", "doctor", "trace", "report", "web"),
    *(
        "peek",
        "export",
        "pause",
        "resume",
        "drain",
        "requeue",
        "drop",
        "close-group",
        "give-up",
        "gc",
        "shutdown",
        "quarantine",
    ),
)


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """scripts/slime-cross-job, in this Python."""
    given = {**os.environ, "PYTHON": sys.executable, "RAY_ADDRESS": "127.0.0.1:1", "COLUMNS": "120", **env}
    command = [str(ROOT / "scripts" / "slime-cross-job"), *words]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=patient(60))


def test_help_names_every_command_and_the_exit_codes():
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: slime-cross-job ")
    assert [word for word in COMMANDS if f"\n  {word} " not in done.stdout] == []
    assert "Exit codes: 0 well" in done.stdout


SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in (
        *ROOT.glob("scripts/*.sh"),
        *ROOT.glob("docker/*.sh"),
        ROOT / "scripts/slime-cross-job",
        ROOT / ".ci/run",
    )
    if path.name != "env.sh"
)


@pytest.mark.parametrize("script", [*SCRIPTS, "scripts/bench.sh --views", "scripts/bench.sh --slime"])
def test_help_needs_no_environment(script, tmp_path):
    bare = Path(sys.base_prefix, "bin")
    env = {"HOME": str(tmp_path), "PATH": f"{bare}:/usr/bin:/bin", "PYTHON": str(bare / "python3")}
    done = subprocess.run(
        [*script.split(), "--help"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=patient(60)
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) > 10
    assert [path for path in tmp_path.rglob("*") if path.is_dir() and (path / "bin").exists()] == []


def test_help_of_commands_without_the_environment_names_them_all():
    from usage import commands, help_of

    assert [word for word in COMMANDS if f"\n  {word} " not in commands()] == []
    shown = help_of(ROOT / "scripts" / "demo.py")
    assert "--keep-cluster" in shown
    assert "__name__" not in shown


def test_a_shell_completes_commands():
    shown = run(
        "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )  # else: of the ancestors
    assert "_SLIME_CROSS_JOB_COMPLETE" in shown.stdout + shown.stderr
    asked = {"_SLIME_CROSS_JOB_COMPLETE": "complete_bash", "COMP_WORDS": "slime-cross-job qu", "COMP_CWORD": "1"}
    assert run(**asked).stdout.split() == ["quarantine"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nonsense"], 2, "No such command"),
        (["show"], 2, "Missing argument"),
        (["show", "-1"], 2, "-1"),
        (["ls", "--state", "lost-in-space"], 2, "BadInput: --state lost-in-space is not a state: there are demanded"),
        (["wait"], 2, "BadInput: say what to wait for"),
        (["status"], 4, "ClusterUnreachable: no Ray cluster at 127.0.0.1:1"),
        (["pause", "--yes"], 4, "ClusterUnreachable"),
        (["web"], 4, "ClusterUnreachable"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(words, code, said):
    done = run(*words)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert said in done.stderr
    assert done.stdout == ""


def test_what_ray_prints_is_not_in_what_programs_read(monkeypatch, capsys):
    """Ray prints warnings of any raylet of the cluster to the stdout of each driver."""
    monkeypatch.setattr("slime.cross_job.client.connection.find_address", lambda address: "127.0.0.1:1")
    monkeypatch.setattr("slime.cross_job.ops.viewer.Viewer", lambda namespace, address: None)
    monkeypatch.setattr(common, "_ours", None)
    before = sys.stdout
    try:
        common.connected(None, "ns")
        print("(raylet) WARNING: 8 PYTHON worker processes have been started")
        common.out_json({"a": 1})
        common.out("shown")
    finally:
        sys.stdout = before
    out, err = capsys.readouterr()
    assert json.loads(out.removesuffix("shown\n")) == {"a": 1}
    assert "raylet" in err
