"""Hooks of pytest: where all tests are wanted, a skip for a reason that is not in `allowed_skips` fails the run."""

import os

from allowed_skips import allowed

__all__ = ["pytest_collectreport", "pytest_runtest_logreport", "pytest_sessionfinish", "pytest_terminal_summary"]

_others: list[str] = []


def _look_at(report):
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if not allowed(reason):
            _others.append(f"{report.nodeid}: {reason}")


pytest_runtest_logreport = pytest_collectreport = _look_at


def pytest_sessionfinish(session, exitstatus):
    if _others and os.environ.get("PYFAST_XAI_ALL_TESTS") and exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    if _others and os.environ.get("PYFAST_XAI_ALL_TESTS"):
        terminalreporter.section("skipped for reasons that tests/support/allowed_skips.py does not have")
        for line in _others:
            terminalreporter.line(line)
