"""How far work is: lines in a log, a bar on a terminal, and nothing about what is over soon."""

import io
import sys

import pytest
from tqdm.auto import tqdm

from sinkstudy import progress


class Clock:
    """Seconds, as a test sets them."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("tqdm.std.time", made)
    return made


def test_lines_of_a_log_come_every_half_minute_and_say_how_long_it_takes(clock, capsys, monkeypatch):
    monkeypatch.setenv(progress.CHAPTER, "07-ablation")
    with progress.Progress("pictures", 100) as bar:
        for start in range(0, 100, 8):
            clock.now += 16
            bar.update(min(8, 100 - start))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "07-ablation: pictures 16 of 100, 02:48 left"  # 2 s each, 84 are left
    assert said[1] == "07-ablation: pictures 32 of 100, 02:16 left"
    assert len(said) == 6 and not any(line.strip() != line for line in said)


def test_what_was_done_before_does_not_count_for_the_time_left(clock, capsys):
    with progress.Progress("steps", 100, initial=90) as bar:
        clock.now += 40
        bar.set_postfix(loss="0.5", refresh=False)
        bar.update()
    assert capsys.readouterr().err == "steps 91 of 100, 06:00 left, loss=0.5\n"


def test_short_work_says_nothing(clock, capsys):
    with progress.Progress("pictures", 5) as bar:
        for _ in range(3):
            clock.now += 5
            bar.update(2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("through_a_pipe", [False, True])
def test_cells_of_a_notebook_are_lines_in_a_log_and_a_bar_on_a_terminal(clock, capsys, monkeypatch, through_a_pipe):
    monkeypatch.setenv(progress.TERMINAL, "yes" if through_a_pipe else "")
    with tqdm(total=10, **progress.of_cells("07-ablation")) as bar:
        for _ in range(10):
            clock.now += 20
            bar.update()
    said = capsys.readouterr().err
    assert ("\r" in said) == through_a_pipe
    if not through_a_pipe:
        assert said.splitlines() == [f"07-ablation: cell {n}/10 (0{n // 3}:{20 * n % 60:02})" for n in (2, 4, 6, 8, 10)]


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.Progress("answers", 4) as bar:
        bar.update(1)
        bar.refresh()
    assert "answers:  25%|" in sys.stderr.getvalue() and "\n" not in sys.stderr.getvalue()


@pytest.fixture
def monotonic(monkeypatch):
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made)
    return made


def test_the_time_left_of_a_run_is_by_the_pace_of_the_chapters_so_far(monotonic):
    """Two of six are up to date; the others once took 100, 300, 100 and nobody knows how long, here twice as long."""
    run = progress.Chapters(6, {"a": 100, "b": 300, "c": 100, "d": None})
    monotonic.now = 200
    assert run.ended("a", well=True) == "3 of 6 chapters are up to date, about 19 min left"  # 2 x (300 + 100 + 167) s
    monotonic.now = 800
    assert run.ended("b", well=True) == "4 of 6 chapters are up to date, about 9 min left"  # 2 x (100 + 167) s
    assert run.ended("d", well=False) == ""
    assert run.ended("e", well=True) == "4 of 6 chapters are up to date, about 3 min left"  # another, made once more
    monotonic.now = 1000
    assert run.ended("c", well=True) == "5 of 6 chapters are up to date"


def test_of_chapters_at_the_same_time_each_takes_a_share(monotonic):
    run = progress.Chapters(4, dict.fromkeys("abcd"))
    monotonic.now = 60
    run.ended("a", well=True)
    assert run.ended("b", well=True) == "2 of 4 chapters are up to date, about 60 s left"


def test_of_the_time_left_nothing_is_said_before_it_is_known(monotonic):
    run = progress.Chapters(3, {"a": 10, "b": 10})
    monotonic.now = 5
    assert run.ended("other", well=True) == "1 of 3 chapters are up to date"
    assert progress.Chapters(1, {"a": None}).ended("a", well=True) == ""
