"""How far long work is: a bar on a terminal, else, in a log or in a chapter's kernel, a line every half minute.

Work that ends sooner says nothing, so that logs and executed notebooks stay short.
"""

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

SECONDS = 30  # between two lines
CHAPTER = "SINKSTUDY_CHAPTER"  # a variable of the environment, set by the engine: with it the lines of a kernel begin
TERMINAL = "SINKSTUDY_TERMINAL"  # another: what is written reaches a terminal, though through a pipe


def on_terminal() -> bool:
    return sys.stderr.isatty() or bool(os.environ.get(TERMINAL))


def say(text: str) -> None:
    """Say something on stderr, in a chapter's kernel behind its name, so that the engine passes it on."""
    name = os.environ.get(CHAPTER)
    print(f"{name}: {text}" if name else text, file=sys.stderr, flush=True)


def of_cells(notebook: str) -> dict[str, Any]:
    """What makes papermill's bar of a notebook's cells one like `Progress`: a bar on a terminal, lines in a log."""
    bar = {"desc": notebook, "bar_format": "{desc}: cell {n_fmt}/{total_fmt} ({elapsed})"}
    if on_terminal():
        return bar
    return bar | {"file": Lines(), "mininterval": SECONDS, "delay": SECONDS, "miniters": 1, "leave": False}


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Chapters:
    """How far runs are: how many of their chapters are up to date, and about how long those that are left take.

    The pace is that of the chapters executed so far, which weigh what they took earlier, so that neither notebooks
    executed at the same time nor another machine or limit lead astray. Before the first has ended nothing is known.

    Args:
        n: number of chapters.
        took: seconds that an earlier execution took of each that is to be executed; None where that is not known,
            which weighs as much as the mean of the others.
    """

    def __init__(self, n: int, took: Mapping[str, float | None]) -> None:
        known = [seconds for seconds in took.values() if seconds] or [1.0]
        self.n, self.fresh, self.done = n, n - len(took), 0.0
        self.left = {name: seconds or sum(known) / len(known) for name, seconds in took.items()}
        self.started = time.monotonic()

    def ended(self, name: str, well: bool) -> str:
        """What to say once one has been executed: "3 of 14 chapters are up to date, about 5 min left"; else nothing."""
        weight = self.left.pop(name, None)
        if not well or self.n == 1:
            return ""
        if weight is not None:
            self.fresh, self.done = self.fresh + 1, self.done + weight
        left = sum(self.left.values())
        about = (time.monotonic() - self.started) * left / self.done if self.done else 0
        return f"{self.fresh} of {self.n} chapters are up to date" + (f", about {minutes(about)} left" if about else "")


class Lines:
    """A file for a bar, on stderr: what would be drawn over what stands there becomes a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


class Progress(tqdm):
    """tqdm on stderr that writes whole lines where that is no terminal: "07-ablation: answers 120 of 3000, 02:05 left".

    Args:
        what: the things that are counted, "pictures".
        total: how many there are.
        more: as tqdm takes it.
    """

    def __init__(self, what: str, total: int, **more: Any) -> None:
        self.on_terminal = sys.stderr.isatty()
        lines = {} if self.on_terminal else {"mininterval": SECONDS, "delay": SECONDS, "miniters": 1}
        name = f"{chapter}: {what}" if (chapter := os.environ.get(CHAPTER)) else what
        super().__init__(desc=name, total=total, file=sys.stderr, leave=False, **lines, **more)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Say how far the work is; tqdm calls this when it is time to."""
        if self.on_terminal or msg == "":  # at the end a bar is taken away, and a line is not
            return self.on_terminal and super().display(msg, pos)
        of = self.format_dict
        left = of["elapsed"] * (of["total"] - of["n"]) / max(1, of["n"] - of["initial"])
        note = f", {self.postfix}" if self.postfix else ""
        self.fp.write(f"{self.desc} {of['n']} of {of['total']}, {self.format_interval(left)} left{note}\n")
        self.fp.flush()
        return True
