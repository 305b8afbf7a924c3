"""The commands, over a ledger in this process: what is shown at 80 columns, and what is refused."""

import io
import re
import sys
from collections.abc import Callable

import pytest
from click.testing import Result
from typer.testing import CliRunner

from slime.cross_job.errors import GroupNotFound, HeldBack, JobNotFound, Refused, WaitTimeout
from slime.cross_job.ops import app as common
from slime.cross_job.ops import cli, export, main, steer  # noqa: F401  they add their commands
from tests.support.viewer_stand_in import ViewerStandIn

ADDRESS = "10.0.0.1:6379"
Ask = Callable[..., Result]


@pytest.fixture(autouse=True)
def environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """main sets what is not set."""
    monkeypatch.setenv("RAY_LOG_TO_STDERR", "0")
    monkeypatch.setenv("SLIME_CROSS_JOB_LOG_LEVEL", "ERROR")


@pytest.fixture
def viewer(monkeypatch: pytest.MonkeyPatch) -> ViewerStandIn:
    made = ViewerStandIn().begin()
    monkeypatch.setattr("slime.cross_job.ops.viewer.Viewer", lambda namespace, address: made)
    for name, value in (("_ours", None), ("_cluster", ""), ("_named", False)):
        monkeypatch.setattr(common, name, value)
    return made


@pytest.fixture
def ask(viewer: ViewerStandIn, monkeypatch: pytest.MonkeyPatch) -> Ask:
    def run(*words: object, columns: int = 80) -> Result:
        monkeypatch.setattr(common, "_named", False)
        before = sys.stdout
        try:
            env = {"COLUMNS": str(columns), "RAY_ADDRESS": ADDRESS}
            return CliRunner().invoke(common.app, [*map(str, words)], env=env)
        finally:
            sys.stdout = before

    return run


LONG = "the-seventh-of-the-experiments-with-a-long-name"
HEADERS = ["rollout", "state", "published", "samples", "weights", "behind", "reward", "size"]


@pytest.mark.parametrize("words", [("jobs",), ("ls",), ("show", 38), ("top", "--once"), ("status",)])
def test_80_columns_are_enough(viewer, ask, words):
    viewer.run(40)
    viewer.begin(LONG)
    viewer.ledger.end("c-exp", "failed", "the engine of rank 17 did not answer " * 20)
    shown = ask(*words) if words == ("jobs",) else ask(*words, "--job-id", "exp")
    assert shown.exit_code == 0, shown.exception
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"Ray cluster at {ADDRESS}"
    for line in lines:  # no column so narrow that words are broken in it
        assert not re.search(r"\b(publ|genera|sampl|weigh|acke|roll)\b", line), line


@pytest.mark.parametrize(("words", "more"), [(("jobs",), "how it stands"), (("ls",), "generated in")])
def test_wide_shows_every_column_on_one_line(viewer, ask, words, more):
    viewer.run(4)
    rows = len(ask(*words).stdout.splitlines())
    assert more not in ask(*words).stdout
    wide = ask(*words, "--wide").stdout.splitlines()
    assert (more in wide[1], len(wide)) == (True, rows)


@pytest.mark.parametrize("words", [("jobs",), ("ls",), ("show", 1), ("peek", 1), ("trace",), ("wait", "--acked", 1)])
def test_every_output_names_its_cluster(viewer, ask, words):
    viewer.run(3)
    done = ask(*words)
    assert done.exit_code == 0, done.exception
    assert (done.stdout + done.stderr).count(f"Ray cluster at {ADDRESS}") == 1
    as_json = [] if words[0] in ("peek", "trace") else ["--json"]
    assert f"Ray cluster at {ADDRESS}\n" == ask(*words, *as_json).stderr


def test_an_error_names_its_cluster(viewer, monkeypatch, capsys):
    monkeypatch.setattr("os._exit", lambda code: None)
    monkeypatch.setattr(viewer, "look", lambda job, **_: viewer.ledger.look(job))
    before = sys.stdout
    try:
        main.main(["status", "--address", ADDRESS, "--job-id", "nosuch"])
    finally:
        sys.stdout = before
    said = f"JobNotFound: this namespace has no job 'nosuch'; it has exp (Ray cluster at {ADDRESS})\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("command", ["jobs", "status", "ls", "pause"])
def test_of_several_clusters_here_none_is_picked(viewer, monkeypatch, command):
    here = ["10.0.0.1:6379", "10.0.0.2:6379"]
    monkeypatch.setattr("slime.cross_job.client.connection.local_clusters", lambda: here)
    done = CliRunner().invoke(common.app, [command], env={"RAY_ADDRESS": None})
    assert ", ".join(here) in str(done.exception)
    assert viewer.calls == []


def test_the_state_of_a_job_that_failed_is_not_running(viewer, ask):
    viewer.ledger.end("c-exp", "failed", "boom")
    for words in (("jobs",), ("status",), ("top", "--once")):
        shown = ask(*words).stdout
        assert "failed" in shown
        assert "running" not in shown


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["close-group", "nosuch"], GroupNotFound),
        (["close-group", "train"], Refused),
        (["requeue", 0], Refused),
        (["requeue", 0, "--group", "nosuch"], GroupNotFound),
        (["drop", 0], Refused),
        (["pause", "--job-id", "nosuch"], JobNotFound),
        (["gc", "--forget", "exp"], Refused),
        (["gc", "--forget", "nosuch"], JobNotFound),
    ],
)
def test_what_is_refused_is_not_announced(viewer, ask, words, error):
    viewer.run(1)
    done = ask(*words, "--yes")
    assert type(done.exception) is error
    assert (done.stdout, done.stderr) == ("", "")


def test_what_is_done_is_announced_with_its_cluster(viewer, ask):
    viewer.run(1)
    viewer.ledger.end("c-exp", "dead", "its node died")
    done = ask("close-group", "train", "--yes")
    assert done.exit_code == 0, done.exception
    assert done.stderr.startswith(f"on the Ray cluster at {ADDRESS}: group train of job exp is closed")


def test_messages_hold_no_dicts(viewer, ask):
    viewer.run(1)
    late = ask("wait", "--acked", 9, "--timeout", 0.01).exception
    assert type(late) is WaitTimeout
    assert "within 0.01 s: 1 published, 1 claimed, 1 acked; " in str(late)
    viewer.ledger.control("exp", "paused")
    assert type(ask("wait", "--acked", 9, "--timeout", 0.01).exception) is HeldBack
    for client in ("p-exp", "c-exp"):
        viewer.ledger.end(client, "finished")
    over = str(ask("wait", "--acked", 9, "--published", 8).exception)
    assert over == "job exp is complete, with only 1 published, 1 acked rollouts"


@pytest.mark.parametrize("words", [("top", "--once"), ("status",), ("ls",), ("show", 1), ("jobs",)])
def test_terminals_that_know_ascii_only_are_shown_ascii(viewer, monkeypatch, words):
    viewer.run(3)
    viewer.ledger.heartbeat("p-exp", "größer ≥ 数学")
    out = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr("os._exit", lambda code: None)
    monkeypatch.setenv("COLUMNS", "80")
    main.main([*map(str, words), "--address", ADDRESS])
    out.flush()
    shown = raw.getvalue().decode("ascii")
    assert "rollout" in shown or "exp" in shown
    assert "█" not in shown
