"""Shared by all tests: where things are, and a table of what was not run and why."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End with a table of what was not run."""
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.section("not run")
    if not skipped:
        terminalreporter.write_line("everything that was selected was run")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"{report.nodeid:80} {reason}")
