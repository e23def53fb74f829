"""How lab models are asked: the only words that they know for a question with options."""

from collections.abc import Sequence


def with_options(question: str, options: Sequence[str]) -> str:
    """A question with its options: "what is here ? options : A ball , B ring . answer with the letter ."."""
    listed = " , ".join(f"{chr(ord('A') + i)} {option}" for i, option in enumerate(options))
    return f"{question} options : {listed} . answer with the letter ."
