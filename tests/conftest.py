"""Shared by all tests: a table of what was not run and why."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End with a table of what was not run."""
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.section("not run")
    if not skipped:
        terminalreporter.write_line("everything that was selected was run")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"{report.nodeid:80} {reason}")
