"""The fault campaign (`tests/faults`): how many faults were tried, by kind, at the end of a run of the tests."""

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each file of the campaign: cases that passed of all that ran."""
    passed, ran = Counter(), Counter()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            folder, _, case = report.nodeid.partition("tests/faults/test_")
            if case and not folder and (report.when == "call" or outcome == "error"):
                kind = case.partition(".py")[0].replace("_", " ")
                ran[kind] += 1
                passed[kind] += outcome == "passed"
    if ran:
        terminalreporter.section("fault campaign")
        for kind in sorted(ran):
            terminalreporter.write_line(f"{kind}: {passed[kind]} of {ran[kind]} held")
        terminalreporter.write_line(f"together: {passed.total()} of {ran.total()} held")
