"""The suites behind .ci/run: those worth most first, within a time, on a machine of whatever speed.

A machine is as many times slower as the suites that it ran took longer than QUIET_S says. A suite that does not fit
into the time left is left out, and the table at the end says so. What fails in a suite that ran fails the whole run;
so does a suite of LEAST that did not pass.

Of a running suite, silence is bounded; so is its time, as a multiple of what it should take on this machine. A suite
of pytest that is stopped only because the whole time is over, with no test failed until then, is "cut", and fails
nothing.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from local_cluster import end_with_parent

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 70 * 60.0
SILENCE_S = 600.0  # without output, on the quiet machine: longer than any single test waits
TIMES = 3.0  # a suite that takes so many times longer than it should here is stopped
END_S = 120.0  # for a suite that was told to end
QUIET_S = {
    "environment": 60,
    "slime environment": 240,
    "static": 35,
    "tests": 425,
    "demo": 99,
    "chaos": 170,
    "chaos with a store": 95,
    "slime": 680,
    "cluster": 136,
    "integration": 450,
}
"""Seconds that each suite takes on the quiet machine: 2 cores, nothing else on them. Each run ends with the table that
it measured, to be pasted here."""
PYTEST = "scripts/test.sh"
LEAST = ("environment", "static", "tests")
"""The suites that must have passed where none were named on the command line."""


@dataclass(frozen=True)
class Suite:
    """A command, and how it is run.

    Args:
        fixed: its time depends on the network or on given minutes, not on the machine.
        beside: it waits most of the time, so it runs beside the others, at a lower priority.
        alone: it looks at clocks or needs all cores, so it starts after those beside have ended.
        silence_s: how long it may be without output on the quiet machine.
    """

    name: str
    command: tuple[str, ...]
    fixed: bool = False
    beside: bool = False
    alone: bool = False
    silence_s: float = SILENCE_S

    @property
    def by_pytest(self) -> bool:
        return PYTEST in self.command


def suites(out: Path) -> list[Suite]:
    """All suites, in order of worth. They write to the folder `out`."""
    environment = ("bash", "-c", ". scripts/env.sh")
    kills = "cluster killed,vault killed,broker killed,train driver killed"
    chaos = ("scripts/chaos.sh", "--json", str(out / "chaos.json"), "--minutes")
    return [
        Suite("environment", environment, fixed=True, silence_s=1200),
        Suite(
            "slime environment", ("env", "ENVIRONMENT=slime", *environment), fixed=True, beside=True, silence_s=1200
        ),
        Suite("static", ("scripts/check.sh",)),
        Suite("tests", (PYTEST, "-q", "--durations=15")),
        Suite("demo", ("scripts/demo.sh", "--out", str(out), "--json", str(out / "summary.json"))),
        Suite("chaos", (*chaos, "2", "--seed", "0"), fixed=True, beside=True),
        Suite(
            "chaos with a store",
            (*chaos, "1", "--seed", "1", "--store", "file", "--least", "2", "--faults", kills),
            fixed=True,
            beside=True,
        ),
        Suite("slime", _tests("slime", "ci"), alone=True),
        Suite("cluster", _tests("cluster", "ci"), alone=True, silence_s=1200),
        Suite("integration", _tests("integration", "ci"), alone=True),
    ]


def _tests(suite: str, marker: str) -> tuple[str, ...]:
    return (PYTEST, suite, "-q", "-m", marker, "--durations=15")


# ------------------------------------------------------------------ what is decided


STATES = ("passed", "cut", "left out", "failed")


@dataclass
class Result:
    """What came of a suite. `state`: one of STATES; `not_run`: what it said that it did not run; `failures`: of its
    output what tells why it failed."""

    suite: Suite
    state: str
    seconds: float = 0.0
    why: str = ""
    not_run: str = ""
    failures: str = ""


def slower(results: Iterable[Result], quiet_s: Mapping[str, float]) -> float:
    """How many times slower this machine is, at least 1, by the suites that passed and ran by themselves."""
    told = [one for one in results if one.state == "passed" and not (one.suite.fixed or one.suite.beside)]
    return max(1.0, sum(one.seconds for one in told) / (sum(quiet_s[one.suite.name] for one in told) or 1.0))


def takes(suite: Suite, factor: float, quiet_s: Mapping[str, float]) -> float:
    """The seconds that a suite takes on a machine that is `factor` times slower."""
    return quiet_s[suite.name] * (1.0 if suite.fixed else factor)


def stop(ran_s: float, silent_s: float, left_s: float, limit_s: float, silence_s: float) -> str:
    """Why a suite is to be stopped that has run for so long; nothing, if it is not."""
    if silent_s > silence_s:
        return f"no output for {silence_s:.0f} s"
    if ran_s > limit_s:
        return f"not finished after {limit_s:.0f} s"
    return OVER if left_s <= 0 else ""


OVER = "the time was over"
_FAILED = re.compile(r"\b[1-9]\d* (failed|errors?)\b|^[.sxX]*[FE][.sxXFE]*( +\[ *\d+%\])?$", re.MULTILINE)
"""pytest's last line, or a line of its progress, where something failed."""
FAILURES = 25  # lines that tell why a suite failed
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def judge(code: int, stopped: str, output: str, by_pytest: bool) -> tuple[str, str]:
    """(state, why) of a suite that ended with this exit code, or was stopped for that reason after that output.

    Of what else than pytest was stopped, the output does not tell whether it was going well: it failed.
    """
    failed = _FAILED.search(_COLOUR.sub("", output))
    if stopped == OVER and by_pytest and not failed:
        return "cut", stopped
    if stopped:
        return "failed", ", ".join([stopped, *([failed[0]] if failed else [])])
    return ("failed", f"exit code {code}") if code else ("passed", "")


def not_run(output: str) -> str:
    """What a suite says that it did not run: the section of that name in pytest's output, or lines of a script."""
    found = re.findall(
        r"^=+ not run =+\n(.*?)(?=^[=!]+ |^\d+ \w+[^\n]* in [\d.]+s|\Z)", output, re.DOTALL | re.MULTILINE
    )
    found += re.findall(r"^not run: .*\n", output, re.MULTILINE)
    return "".join(text for text in found if text != "everything that was selected was run\n")


def failures(output: str) -> str:
    """Of the output of a suite that failed: what pytest says of the errors and at its end, or the last lines."""
    lines = _COLOUR.sub("", output).splitlines()
    told = [line for line in lines if re.match(r"(FAILED|ERROR|INTERNALERROR|E  ) |!!!", line)]
    return "".join(f"{line[:300]}\n" for line in (told[-FAILURES:] or lines[-FAILURES:]))


# ------------------------------------------------------------------ what is done


class Runner:
    """Runs suites while there is time. `results` is what came of them; `end` ends those that run."""

    def __init__(self, budget_s: float, folder: Path, quiet_s: Mapping[str, float]):
        self._ends, self._folder, self._quiet_s = time.monotonic() + budget_s, folder, quiet_s
        self.results: list[Result] = []

    def end(self) -> None:
        self._ends = 0.0

    def run(self, suite: Suite, say: Callable[[str], object]) -> None:
        """Run the suite, or leave it out. `say` gets its output."""
        factor, left_s = slower(self.results, self._quiet_s), max(0.0, self._ends - time.monotonic())
        takes_s = takes(suite, factor, self._quiet_s)
        say(f"\n== {suite.name}: {' '.join(suite.command)}\n")
        if takes_s > left_s:
            result = Result(suite, "left out", why=f"it takes {takes_s:.0f} s here, {left_s:.0f} s were left")
        else:
            began = time.monotonic()
            code, stopped, before, output = self._watch(
                suite, say, TIMES * takes_s + SILENCE_S, suite.silence_s * factor
            )
            state, why = judge(code, stopped, before, suite.by_pytest)
            told = failures(output) if state == "failed" else ""
            result = Result(suite, state, time.monotonic() - began, why, not_run(output), told)
        self.results.append(result)
        say(f"== {suite.name}: {result.state}, {result.seconds:.0f} s{result.why and ', ' + result.why}\n")

    def _watch(
        self, suite: Suite, say: Callable[[str], object], limit_s: float, silence_s: float
    ) -> tuple[int, str, str, str]:
        """Exit code of the suite, why it was stopped, its output until then, and all of it."""
        path, stopped, stopped_at, before = self._folder / f"{suite.name}.log", "", 0.0, ""
        nice = ("nice", "-n", "10") if suite.beside else ()
        with path.open("wb") as log, path.open("rb") as reader:
            process = subprocess.Popen(
                [*nice, *suite.command],
                cwd=ROOT,
                env={k: v for k, v in os.environ.items() if k != "FORCE_COLOR"}
                | {"PY_COLORS": "0", "COLUMNS": "200", "CI": "true"},  # hypothesis: the same examples each time
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,  # of the thread that is here, whatever ends us
            )
            began = heard = time.monotonic()
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    now = time.monotonic()
                    if text := reader.read().decode(errors="replace"):
                        heard = now
                        say(text)
                    if stopped and now > stopped_at + END_S:
                        _signal(process, signal.SIGKILL)
                    elif not stopped:
                        stopped = stop(now - began, now - heard, self._ends - now, limit_s, silence_s)
                        if stopped:
                            stopped_at, before = now, path.read_text(errors="replace")
                            _signal(process, signal.SIGTERM)
            except BaseException:
                self.end()  # at once also for the suite beside, so that all end in the same END_S
                _signal(process, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(END_S)
                raise
            finally:
                _signal(process, signal.SIGKILL)  # what it left
            say(reader.read().decode(errors="replace"))
        return process.returncode, stopped, before, path.read_text(errors="replace")


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def table(results: Iterable[Result], all_suites: Sequence[Suite], quiet_s: Mapping[str, float]) -> str:
    """What ran, in how many seconds, and what did not; then QUIET_S as this run would have it."""
    of = {one.suite.name: one for one in results}
    lines = [f"{'suite':20} {'quiet s':>8} {'s':>8}"]
    measured = dict(quiet_s)
    for suite in all_suites:
        one = of.get(suite.name) or Result(suite, "left out", why="not asked for")
        lines.append(
            f"{suite.name:20} {quiet_s[suite.name]:8.0f} {one.seconds:8.0f}  {one.state}{one.why and ': ' + one.why}"
        )
        if one.state == "passed":
            measured[suite.name] = round(one.seconds)
    return "\n".join(
        [*lines, "", "QUIET_S = {", *(f'    "{name}": {s:.0f},' for name, s in measured.items()), "}", ""]
    )


def run_all(chosen: Iterable[Suite], runner: Runner, say: Callable[[str], object]) -> None:
    """Run these suites in their order, those that run beside others one after the other."""
    beside: list[tuple[Future[None], list[str]]] = []

    def hear() -> None:
        while beside and beside[0][0].done():
            done, said = beside.pop(0)
            say("".join(said))
            done.result()

    with ThreadPoolExecutor(1) as pool:
        try:
            for suite in chosen:
                if suite.beside:
                    said: list[str] = []
                    beside.append((pool.submit(runner.run, suite, said.append), said))
                    continue
                if suite.alone:
                    wait([future for future, _ in beside])
                hear()
                runner.run(suite, say)
        except BaseException:
            runner.end()
            raise
    hear()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help="only these")
    parser.add_argument("--minutes", type=float, default=BUDGET_S / 60, help="for all of it")
    args = parser.parse_args()
    for ends in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ends) is not signal.SIG_IGN:  # nohup
            signal.signal(ends, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as folder:
        known = suites(Path(folder))
        if unknown := {*args.suites} - {suite.name for suite in known}:
            parser.error(f"no suite {', '.join(sorted(unknown))}: {', '.join(suite.name for suite in known)}")
        runner = Runner(args.minutes * 60, Path(folder), QUIET_S)
        began = time.monotonic()
        run_all([one for one in known if not args.suites or one.name in args.suites], runner, _print)
    _print("\n== not run\n")
    for one in runner.results:
        _print(one.not_run and f"{one.suite.name}:\n{one.not_run}")
    factor = slower(runner.results, QUIET_S)
    _print(f"\n== {time.monotonic() - began:.0f} s on a machine {factor:.2f} times slower than the quiet one\n")
    _print(table(runner.results, known, QUIET_S))
    for one in runner.results:
        _print(one.failures and f"\n== {one.suite.name} failed:\n{one.failures}\n")
    states = {state: [one.suite.name for one in runner.results if one.state == state] for state in STATES}
    _print("; ".join(f"{state}: {', '.join(names)}" for state, names in states.items() if names) + "\n")
    if short := [] if args.suites else [name for name in LEAST if name not in states["passed"]]:
        _print(f"too little was run: {', '.join(short)} must pass\n")
    return 1 if states["failed"] or short else 0


def _print(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
