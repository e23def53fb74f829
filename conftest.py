"""Settings of `pytest --nbval notebooks`: what is compared with the stored outputs, and what is not.

It stands at the root because collection hooks reach only what lies below them, and notebooks/ is not under tests/.
"""

import os
import tempfile

import pytest

from sinkstudy.paths import DEFAULT_MODEL, FULL, RESULTS, ROOT

# HTML repeats the text beside it with generated ids; stderr holds progress bars and warnings with paths.
# Pictures are not compared either (nbval leaves PNG and JPEG out); the numbers behind them are printed or in results/.
NOT_COMPARED = ("text/html", "stderr", "image/svg+xml", "application/javascript")


def pytest_configure(config: pytest.Config) -> None:
    """Choose nbval's kernel, time limit and sanitizer, and keep the kernels' tables out of `results/`."""
    if not getattr(config.option, "nbval", False):
        return
    config.option.nbval_current_env = True  # the kernel is this very Python
    config.option.nbval_cell_timeout = 1800.0
    config.option.nbval_sanitize_with = str(ROOT / "nbval.cfg")
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["PYTHONHASHSEED"] = "0"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the engine has it
    os.environ["HF_HUB_OFFLINE"] = "1"
    answers = tempfile.TemporaryDirectory(prefix="sinkstudy-answers-")  # computed, not remembered from another run
    os.environ["SINKSTUDY_ANSWERS"] = answers.name
    config.add_cleanup(answers.cleanup)
    if "SINKSTUDY_RESULTS" not in os.environ:
        scratch = tempfile.TemporaryDirectory(prefix="sinkstudy-results-")
        os.environ["SINKSTUDY_RESULTS"] = scratch.name
        config.add_cleanup(scratch.cleanup)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave out of nbval's comparison what cannot repeat itself."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += NOT_COMPARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Compare what reads the results of all runs only where there is no other run than the default one.

    With another, a chapter of that kind rightly shows more than the outputs that are stored.
    """
    others = sorted({path.parent.name for path in RESULTS.glob("*/*/")} - {DEFAULT_MODEL, FULL})
    reason = f"it shows all runs, and its stored outputs are those of the default run; here is also {', '.join(others)}"
    for item in items if others else ():
        if item.path.suffix == ".ipynb" and "results/*/" in item.path.read_text(encoding="utf-8"):
            item.add_marker(pytest.mark.skip(reason=reason))
