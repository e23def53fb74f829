"""Public benchmarks: load them as tidy tables, ask in a model family's words, score by named rules."""

from sinkstudy.benchmarks import harness
from sinkstudy.benchmarks.data import SOURCES, askable, check, load, remarks
from sinkstudy.benchmarks.prompts import FAMILIES, prompts
from sinkstudy.benchmarks.rules import RULES
from sinkstudy.benchmarks.score import answered, observed, readings, right

__all__ = ["FAMILIES", "RULES", "SOURCES", "answered", "askable", "check", "harness", "load", "observed", "prompts",
           "readings", "remarks", "right"]
