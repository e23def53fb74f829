"""Settings of all tests; and the fault campaign (`tests/faults`): how many faults were tried, by kind, at the end."""

import os
import tempfile
from collections import Counter

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Answers are computed, not remembered from another run."""
    answers = tempfile.TemporaryDirectory(prefix="sinkstudy-answers-")
    os.environ["SINKSTUDY_ANSWERS"] = answers.name
    config.add_cleanup(answers.cleanup)


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
