"""Pictures of noise, in which every patch differs from every other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def pictures(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """Pictures of these (width, height)."""
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]


def write(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """A new folder with such pictures, `0.png` and on."""
    folder.mkdir()
    for i, size in enumerate(sizes):
        pictures([size], seed=i)[0].save(folder / f"{i}.png")
    return folder
