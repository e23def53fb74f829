"""Where the patches of an image are: in the picture, the tower, the connector and the decoder.

A *patch* is one square of the picture that the vision tower sees as one token; a *visual token* is one position
of the decoder's input that an image fills. `LVLM.layout` says which patch ends in which position.
"""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class ImageLayout:
    """One image: its patches count row by row within a tile, tile after tile. All tensors are long, on the CPU."""

    row: int  # of the batch
    grid: tuple[int, int]  # (rows, columns) of the patches of a tile
    tiles: int
    visual: torch.Tensor  # [visual tokens], positions in `input_ids[row]`, newline tokens included
    vision: torch.Tensor  # [patches], index in the tower's hidden states flattened to [tokens of the batch, width]
    connector: torch.Tensor  # [patches], index in the connector's input as [patches of the batch, width]; see `at`
    output: torch.Tensor  # [patches], index in the connector's output as [tokens of the batch, decoder width]; likewise
    positions: torch.Tensor  # [patches, k], positions in `input_ids[row]`; -1 where there is none (k is mostly 1)

    @property
    def read(self) -> torch.Tensor:
        """Patches that some visual token holds: bool [patches]. Others are padding, which LLaVA-NeXT cuts off."""
        return (self.positions >= 0).any(1)

    def at(self, site: Literal["input", "output"]) -> torch.Tensor:
        """Where the patches stand in what the connector reads or puts out: `connector` or `output`.

        Raises:
            ValueError: it mixes the patches (Q-Former, resampler), or takes the pictures of a batch one by one.
        """
        found = self.connector if site == "input" else self.output
        if (found < 0).any():
            raise ValueError(f"the connector's {site} has no row for each patch: it mixes them, or takes the pictures "
                             "of a batch one by one (a batch size of 1 helps)")
        return found

    def lift(self, values: torch.Tensor, how: Literal["any", "mean", "max"]) -> torch.Tensor:
        """Bring a value of each patch to the visual tokens: [patches] -> [visual tokens].

        Args:
            values: a mask of patches for "any"; a mask or numbers for "mean" and "max".
            how: "any" gives bool, true where at least one patch of the token is; "mean" and "max" over the
                patches of the token give float32, NaN for a token without patches (newline).

        Raises:
            ValueError: if `how` is unknown, or if there are not as many values as patches.
        """
        if how not in ("any", "mean", "max"):
            raise ValueError(f"how is 'any', 'mean' or 'max', not {how!r}")
        if values.shape != self.vision.shape:
            raise ValueError(f"the image has {len(self.vision)} patches, got values {list(values.shape)}")
        patch, slot = (self.positions >= 0).nonzero(as_tuple=True)
        token = torch.searchsorted(self.visual, self.positions[patch, slot])
        numbers = values.detach().cpu().float()[patch]
        if how == "any":
            return torch.zeros(len(self.visual)).index_add_(0, token, (numbers != 0).float()) > 0
        empty = torch.full((len(self.visual),), float("nan"))
        return empty.scatter_reduce(0, token, numbers, {"mean": "mean", "max": "amax"}[how], include_self=False)

    def lower(self, values: torch.Tensor) -> torch.Tensor:
        """Bring what is known of the visual tokens to the patches that they read: [.., visual tokens] -> [.., patches].

        A patch that several tokens read has the value of the first, one that none reads 0, or False.
        """
        position = self.positions[:, 0].contiguous()
        return values[..., torch.searchsorted(self.visual, position.clamp(min=0))] * (position >= 0)


def block_order(rows: int, columns: int, merge: int) -> torch.Tensor:
    """Place of each patch, counted row by row, if each block of merge x merge patches stands together: [patches]."""
    places = torch.arange(rows * columns).view(rows // merge, columns // merge, merge, merge)
    return places.transpose(1, 2).flatten()
