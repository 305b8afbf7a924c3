"""What .ci/run decides: how slow the machine is, what is left out, what is stopped, and what that means."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import ci
from ci import OVER, Result, Runner, Suite, judge, slower, stop, table, takes
from tests.support.patience import patient

QUIET_S = {"static": 60.0, "unit": 100.0, "chaos": 200.0}
STATIC, UNIT, CHAOS = Suite("static", ("true",)), Suite("unit", ("true",)), Suite("chaos", ("true",), fixed=True)


def passed(suite: Suite, seconds: float) -> Result:
    return Result(suite, "passed", seconds)


def test_a_machine_is_as_slow_as_all_that_it_ran():
    assert slower([], QUIET_S) == 1.0
    assert slower([passed(STATIC, 150), passed(UNIT, 250)], QUIET_S) == 2.5
    assert slower([passed(UNIT, 50)], QUIET_S) == 1.0, "a fast one is given the time of the quiet one"


@pytest.mark.parametrize(
    "told",
    [
        passed(CHAOS, 900),
        passed(Suite("unit", (), beside=True), 900),
        Result(UNIT, "failed", 3),
        Result(UNIT, "left out"),
    ],
)
def test_what_tells_nothing_of_the_machine_is_not_counted(told):
    assert slower([passed(STATIC, 120), told], QUIET_S) == 2.0


def test_what_waits_takes_as_long_on_any_machine():
    assert takes(UNIT, 2.5, QUIET_S) == 250
    assert takes(CHAOS, 2.5, QUIET_S) == 200


def test_silence_ends_a_suite_and_so_does_far_too_long_a_time_and_the_end_of_all():
    limits = {"limit_s": 1000, "silence_s": 300}
    assert stop(ran_s=999, silent_s=299, left_s=1, **limits) == ""
    assert stop(ran_s=999, silent_s=301, left_s=1, **limits) == "no output for 300 s"
    assert stop(ran_s=1001, silent_s=1, left_s=1, **limits) == "not finished after 1000 s"
    assert stop(ran_s=999, silent_s=299, left_s=0, **limits) == OVER
    assert stop(ran_s=999, silent_s=301, left_s=0, **limits) != OVER, "it hung: the clock is no excuse"


@pytest.mark.parametrize(
    ("code", "stopped", "output", "state"),
    [
        (0, "", "3 passed in 2.0s", "passed"),
        (1, "", "1 failed, 3 passed in 2.0s", "failed"),
        (2, "", "", "failed"),
        (143, OVER, "..s..  [ 20%]\n!!! Exit: terminated !!!\n5 passed, 1 skipped in 9.0s", "cut"),
        (143, OVER, "1 failed, 3 passed in 2.0s", "failed"),
        (143, OVER, "3 passed, 2 errors in 2.0s", "failed"),
        (-9, OVER, "......s....F.....  [ 20%]\n....", "failed"),
        (-9, OVER, "......s....  [ 20%]\n..E", "failed"),
        (143, OVER, "\x1b[32m.\x1b[0m\x1b[31mF\x1b[0m\x1b[32m.\x1b[0m\n", "failed"),
        (143, OVER, "\x1b[31m\x1b[1m1 failed\x1b[0m, \x1b[32m3 passed\x1b[0m\x1b[31m in 2.0s\x1b[0m", "failed"),
        (143, OVER, "\x1b[32m.\x1b[0m\x1b[32m.\x1b[0m\n", "cut"),
        (143, "no output for 300 s", "..s..  [ 20%]", "failed"),
    ],
)
def test_only_what_was_going_well_is_cut(code, stopped, output, state):
    assert judge(code, stopped, output, by_pytest=True)[0] == state


@pytest.mark.parametrize(("code", "stopped", "state"), [(0, "", "passed"), (1, "", "failed"), (143, OVER, "failed")])
def test_what_is_not_pytest_is_never_cut(tmp_path, code, stopped, state):
    output = "   12.1 s  broker killed   recovered in   3.5 s\n"
    assert judge(code, stopped, output, by_pytest=False)[0] == state
    names = {suite.name for suite in ci.suites(tmp_path) if not suite.by_pytest}
    assert names == {"environment", "slime environment", "static", "demo", "chaos", "chaos with a store"}


def test_suites_show_no_colours(run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("PY_COLORS", "1")
    assert "of 0 " in run(60.0, shell("unit", 'echo "of $PY_COLORS $FORCE_COLOR"'))[1]


@pytest.fixture
def run(tmp_path):
    """run(budget_s, *suites): what came of them, and what was said."""

    def all_of(budget_s: float, *suites: Suite, quiet_s: float = 5.0) -> tuple[dict[str, str], str]:
        said: list[str] = []
        runner = Runner(budget_s, tmp_path, {suite.name: quiet_s for suite in suites})
        ci.run_all(suites, runner, said.append)
        return {one.suite.name: one.state for one in runner.results}, "".join(said)

    return all_of


def shell(name: str, command: str, **how: bool) -> Suite:
    return Suite(name, ("sh", "-c", command, ci.PYTEST), **how)


def test_suites_run_in_order_and_a_failure_hides_no_other(run, tmp_path):
    states, said = run(
        60.0,
        shell("first", "echo one; exit 3"),
        shell("beside", f"until [ -e {tmp_path}/second ]; do sleep 0.05; done; touch {tmp_path}/beside", beside=True),
        shell("second", f"touch {tmp_path}/second; echo two"),
        shell("alone", f"[ -e {tmp_path}/beside ]", alone=True),
    )
    assert states == {"first": "failed", "second": "passed", "beside": "passed", "alone": "passed"}
    assert said.index("one") < said.index("first: failed") < said.index("two")


def test_what_does_not_fit_is_left_out_and_said(run):
    states, said = run(4.0, shell("unit", "echo it ran"))
    assert states == {"unit": "left out"}
    assert "it takes 5 s here" in said
    assert "it ran" not in said.splitlines()


@pytest.mark.parametrize(("told", "state"), [("..s.", "cut"), (".F..", "failed")])
def test_what_runs_when_the_time_is_over_is_stopped(run, told, state):
    states, said = run(
        0.5,
        shell("unit", f"trap 'echo F; exit 1' TERM; echo {told}; sleep 60 & wait"),
        shell("late", "true"),
        quiet_s=0.1,
    )
    assert states == {"unit": state, "late": "left out"}
    assert OVER in said


def test_the_table_says_what_was_left_out_and_can_be_pasted():
    results = [passed(STATIC, 61.4), Result(UNIT, "left out", why="too late"), Result(CHAOS, "failed", 7.0, "code 1")]
    told = table(results, [STATIC, UNIT, CHAOS], QUIET_S)
    assert [line.split()[0] for line in told.splitlines()[:4]] == ["suite", "static", "unit", "chaos"]
    assert "left out: too late" in told
    pasted: dict = {}
    exec(told[told.index("QUIET_S") :], pasted)
    assert pasted["QUIET_S"] == {**QUIET_S, "static": 61}


def test_why_a_suite_failed_is_told_at_the_end():
    told = ["...F\n", "E   assert 1 == 2\n", "  more\n", "!!!!! KeyboardInterrupt\n", "FAILED a.py::b - assert 1\n"]
    assert ci.failures("".join([*told, "1 failed in 1s\n"])) == "".join([told[1], *told[3:]])
    assert ci.failures("".join(f"{n}\n" for n in range(100))).split() == [str(n) for n in range(75, 100)]


def test_what_suites_did_not_run_is_found():
    told = """..s [100%]
=========== not run ===========
2 tests that the run had not come to when it was ended:
    tests/a.py::test_b
tests/a.py::test_c     no redis
====== slowest durations ======
"""
    lines = told.splitlines(keepends=True)
    assert ci.not_run(told) == "".join(lines[2:5])
    assert ci.not_run("".join([*lines[:5], "1 passed, 1 skipped in 0.1s\n"])) == "".join(lines[2:5])
    assert ci.not_run(f"{lines[1]}everything that was selected was run\n3 passed in 1s\n") == ""
    assert ci.not_run("a\nnot run: 'GCS killed', no redis\nb\n") == "not run: 'GCS killed', no redis\n"


def test_every_suite_has_a_recorded_time(tmp_path):
    assert [suite.name for suite in ci.suites(tmp_path)] == [*ci.QUIET_S]


@pytest.mark.parametrize(("last", "code"), [("exit 0", 0), ("exit 1", 1)])
def test_the_run_fails_if_a_suite_did(monkeypatch, capsys, last, code):
    known = [shell("unit", "echo '3 passed in 0.1s'"), shell("tools", "sleep 60"), shell("chaos", last)]
    monkeypatch.setattr(ci, "LEAST", ("unit",))
    assert main_of(monkeypatch, known, {"tools": 5000.0}) == code
    told = capsys.readouterr().out.splitlines()
    assert "3 passed in 0.1s" in told
    assert told[-1] == (
        "passed: unit, chaos; left out: tools" if code == 0 else "passed: unit; left out: tools; failed: chaos"
    )


@pytest.mark.parametrize(("words", "code"), [((), 1), (("chaos",), 0)])
def test_a_run_that_ran_too_little_fails(monkeypatch, capsys, words, code):
    known = [*(shell(name, "true") for name in ci.LEAST), shell("chaos", "true")]
    assert main_of(monkeypatch, known, {}) == 0
    capsys.readouterr()
    assert main_of(monkeypatch, known, {"tests": 5000.0}, *words) == code
    assert ("too little was run: tests must pass" in capsys.readouterr().out) is bool(code)


def main_of(monkeypatch, known: list[Suite], quiet_s: dict[str, float], *words: str) -> int:
    """The exit code of a run of these suites with this command line."""
    monkeypatch.setattr(ci, "suites", lambda out: known)
    monkeypatch.setattr(ci, "QUIET_S", {suite.name: 1.0 for suite in known} | quiet_s)
    monkeypatch.setattr("sys.argv", ["ci.py", *words])
    monkeypatch.setattr(ci.signal, "signal", lambda number, handler: None)  # this process has one of its own
    return ci.main()


def interrupted(text: str) -> None:
    if text == "running\n":
        raise KeyboardInterrupt


def test_whoever_stops_the_run_stops_what_runs(tmp_path):
    runner = Runner(60.0, tmp_path, {"unit": 5.0})
    pid = tmp_path / "pid"
    with pytest.raises(KeyboardInterrupt):
        runner.run(shell("unit", f"echo $$ >{pid}; echo running; exec sleep 60"), interrupted)
    assert _until(lambda: not _is_there(int(pid.read_text())))


def test_whoever_stops_the_run_stops_what_runs_beside_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ci, "END_S", 10.0)
    beside = f"trap 'touch {tmp_path}/ended; exit' TERM; touch {tmp_path}/began; sleep 60 & wait"
    main = (
        f"until [ -e {tmp_path}/began ]; do sleep 0.05; done; trap : TERM; echo running; sleep 60 & wait; "
        f"until [ -e {tmp_path}/ended ]; do sleep 0.05; done; touch {tmp_path}/in_time"
    )
    runner = Runner(60.0, tmp_path, {"beside": 1.0, "unit": 1.0})
    with pytest.raises(KeyboardInterrupt):
        ci.run_all([shell("beside", beside, beside=True), shell("unit", main)], runner, interrupted)
    assert (tmp_path / "in_time").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_no_suite_outlives_the_run(tmp_path, number):
    command = f"echo $$ >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 60"
    run = (
        "import ci, sys\n"
        f"suite = ci.Suite('unit', ('sh', '-c', {command!r}))\n"
        "ci.suites, ci.QUIET_S, sys.argv = lambda out: [suite], {'unit': 1.0}, ['ci.py']\n"
        "sys.exit(ci.main())"
    )
    ours = subprocess.Popen(
        [sys.executable, "-c", run],
        env={**os.environ, "PYTHONPATH": str(Path(ci.__file__).parent)},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # ignored, where nohup runs the tests
    )
    assert _until((tmp_path / "pid").exists)
    ours.send_signal(number)
    assert ours.wait(patient(30)) in (-number, 128 + number)
    suite = int((tmp_path / "pid").read_text())
    assert _until(lambda: not _is_there(suite))


def _until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + patient(30)
    while not (now := true()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return now


def _is_there(pid: int) -> bool:
    return psutil.pid_exists(pid)
