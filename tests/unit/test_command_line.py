"""The command line without a cluster: help, completion, what is refused before anybody is asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)


def test_help_names_every_command_and_the_exit_codes():
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: slime-cross-job ")
    assert [word for word in COMMANDS if f"\n  {word} " not in done.stdout] == []
    assert "Exit codes: 0 well" in done.stdout


def test_a_shell_completes_commands():
    shown = run("--show-completion", "bash")
    assert "_SLIME_CROSS_JOB_COMPLETE" in shown.stdout + shown.stderr
    asked = {"_SLIME_CROSS_JOB_COMPLETE": "complete_bash", "COMP_WORDS": "slime-cross-job qu", "COMP_CWORD": "1"}
    assert run(**asked).stdout.split() == ["quarantine"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nonsense"], 2, "No such command"),
        (["show"], 2, "Missing argument"),
        (["show", "-1"], 2, "-1"),
        (["ls", "--state", "lost-in-space"], 2, "BadInput: --state lost-in-space: there are demanded"),
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
