"""The groups of patches that chapters look at: sinks, the highest norms, and of the lab what its scenes say.

*Sinks* are chosen by a rule on norms; the *top 2 %* of a picture's norms always exist; where the scene is known, *calm*
patches hold one flat colour, and *things* cover more than half of theirs. What a group
is held against, as many random tokens or those next in norm, comes from `sinks.random_like` and `sinks.next_in_norm`.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from sinkstudy import sinks
from sinkstudy.model.layout import ImageLayout
from sinkstudy.world import drawing

NAMES = ("sinks", "top 2 %", "calm", "things")


def of_patches(
    norms: torch.Tensor,
    rule: Callable[[torch.Tensor], torch.Tensor],
    scenes: drawing.Scenes | None = None,
    read: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Which patches are in each group of `NAMES`; those of a scene only where it is known.

    Args:
        norms: [.., patches], at the connector's input.
        rule: what a sink is, of `sinks.rule`.
        scenes: of the lab, if the patches are the lab's.
        read: where it matters which patches the decoder gets, these, bool [.., patches], see `ImageLayout.read`. Norms
            are judged among them alone, as padding has norms of its own.

    Returns:
        Bool [.., patches] by group.
    """
    rules = {"sinks": rule, "top 2 %": lambda norms: sinks.percentile(norms, 98)}
    return {group: judged(judge, norms, read) for group, judge in rules.items()} | of_scenes(scenes)


def judged(
    judge: Callable[[torch.Tensor], torch.Tensor], norms: torch.Tensor, read: torch.Tensor | None
) -> torch.Tensor:
    """What a rule finds among the patches that the decoder gets, see `of_patches`; no other is among it."""
    if read is None or read.all():
        return judge(norms)
    if norms.ndim > 1:
        return torch.stack([judged(judge, *of) for of in zip(norms, read, strict=True)])
    found = torch.zeros_like(read)
    found[read] = judge(norms[read])
    return found


def of_scenes(scenes: drawing.Scenes | None) -> dict[str, torch.Tensor]:
    """"calm" and "things", bool [pictures, patches] each; nothing of pictures that are not the lab's."""
    if scenes is None:
        return {}
    return {"calm": scenes.calm.flatten(1), "things": scenes.thing_share.flatten(1) > 0.5}


def lifted(
    layouts: Sequence[ImageLayout], values: torch.Tensor, how: Literal["any", "mean", "max"] = "any"
) -> torch.Tensor:
    """Values of patches [pictures, patches] as those of visual tokens [pictures, tokens], see `ImageLayout.lift`."""
    return torch.stack([layout.lift(of, how) for layout, of in zip(layouts, values, strict=True)])


def mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of a group: two [.., tokens] -> [..]; NaN where it is empty."""
    return values.where(mask, 0).sum(-1) / mask.sum(-1)
