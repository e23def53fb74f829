"""The gist of a lab scene: facts that no patch shows alone.

Light and scene are global, yet every patch shows them. These are not: each needs places that lie apart.

- *add up* over places, so that the mean of tokens that know only their surroundings holds some of them: how many
  things, how many parts, which kinds are there, which two textures cover most (`pair`);
- *do not add up*: how many different colours the things have, whether two have the same one (`twins`), whether the
  same part covers most of the left half and of the right half (`sides`).
"""

from __future__ import annotations

import torch

from sinkstudy.world.drawing import COLOURS, KINDS, MAX_PARTS, MAX_THINGS, TEXTURES, Scenes, patch_contents

PAIRS = len(TEXTURES) * (len(TEXTURES) - 1) // 2
CLASSES = {"things": MAX_THINGS, "parts": MAX_PARTS - 1, "colours": MAX_THINGS, "twins": 2, "sides": 2, "pair": PAIRS}
KINDS_THERE = tuple(f"{kind} there" for kind in KINDS)
N_CLASSES = [*CLASSES.values(), *[2] * len(KINDS_THERE)]


def fact_classes(s: Scenes) -> dict[str, torch.Tensor]:
    """The class of each scene by each fact, long [n], of `CLASSES` and then of `KINDS_THERE` (0 or 1)."""
    n_things, n_parts = (s.kind >= 0).sum(1), (s.texture >= 0).sum(1)
    tints = torch.stack([(s.thing_colour == c).sum(1) for c in range(len(COLOURS))], 1)  # [n, colours], things of each
    part, _ = patch_contents(s)  # [n, 12, 12]
    left, right = ((half[..., None] == torch.arange(MAX_PARTS)).sum((1, 2)).argmax(1) for half in part.chunk(2, 2))
    largest = s.area.masked_fill(s.texture < 0, -1).topk(2).indices
    one, other = s.texture.gather(1, largest).sort(1).values.unbind(1)  # [n], one < other
    pair = one * (2 * len(TEXTURES) - one - 1) // 2 + other - one - 1
    found = {
        "things": n_things - 1, "parts": n_parts - 2, "colours": (tints > 0).sum(1) - 1,
        "twins": (tints > 1).any(1).long(), "sides": (left == right).long(), "pair": pair,
    }
    return found | {name: (s.kind == k).any(1).long() for k, name in enumerate(KINDS_THERE)}
