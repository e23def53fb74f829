"""By whom a patch is attended to in the vision tower, and to whom it attends: relevance maps and their shape.

The *relevance map* of patch j, in a layer and head, is column j of the attention map: how much each patch attends to j
(Luo et al., 2510.08510). The *row* of patch j is the other side: how much j attends to each patch. Both are taken over
the patches, without CLS and registers, with the patch itself, and scaled to sum 1, so that they are distributions on
the patch grid. How much attention a map holds before that is the matter of `capture.attention_received`.

Distances are Euclidean, between centres of patches, in units of a patch.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from sinkstudy.model import capture
from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM


def distances(places: torch.Tensor) -> torch.Tensor:
    """Distance of every patch to every other: (row, column) as [patches, 2] -> float32 [patches, patches]."""
    return torch.cdist(places.float(), places.float(), compute_mode="donot_use_mm_for_euclid_dist")


def spread(maps: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """Mean distance of a map's mass from the patch that it belongs to, in patches.

    Args:
        maps: [.., maps, patches], each map sums to 1.
        distance: [maps, patches], from the patch of each map.

    Returns:
        [.., maps]; 0 where all mass is on the patch itself.
    """
    return (maps * distance).sum(-1)


def within(maps: torch.Tensor, distance: torch.Tensor, radius: float = 1.5) -> torch.Tensor:
    """Share of a map's mass no further than `radius` from its patch, 0-1; 1.5 takes in the eight neighbours.

    `maps` and `distance` as in `spread`; returns [.., maps].
    """
    return (maps * (distance <= radius)).sum(-1)


def effective_patches(maps: torch.Tensor) -> torch.Tensor:
    """2 to the entropy in bits: over how many patches a map extends, [.., maps, patches] -> [.., maps].

    1 for a map on one patch, n for one that is even over n; where they lie does not matter.
    """
    return (-torch.xlogy(maps, maps).sum(-1)).exp()


def share_on(maps: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """Share of a map's mass on a region, 0-1: [.., maps, patches] and [patches] -> [.., maps].

    `cover` is how much of each patch belongs to the region, 0-1.
    """
    return maps @ cover.to(maps.dtype)


def specialisation(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How far the heads of a layer differ in what they pool, as a standard deviation, mean over layers.

    Of the patches of a group in all images, each head has a mean (say, of `share_on` things). The heads of a layer
    are all that there are, so the deviation is that of a population. Noise alone makes it larger than 0: compare
    groups of equal size.

    Args:
        sums: [.., images, layers, heads], the values of an image's patches, summed.
        counts: [.., images], how many patches these are.

    Returns:
        [..], in the unit of the values.
    """
    pooled = sums.sum(-3) / counts.sum(-1)[..., None, None]  # [.., layers, heads]
    return pooled.std(-1).mean(-1)


@dataclass(frozen=True)
class Relevance:
    """Shape of the maps of every patch, on the CPU in float32; what a dict holds is named as the functions above.

    `share_on` is there only if `cover` was given to `measure`. A patch to which nobody attends has no map: NaN.
    """

    columns: dict[str, torch.Tensor]  # [images, layers, heads, patches], of relevance maps
    rows: dict[str, torch.Tensor]  # the same, of rows
    uniform: dict[str, torch.Tensor]  # [images, layers, 1, patches], of a map that is even over all patches it can have
    norms: torch.Tensor  # [images, patches], at the connector's input


@torch.no_grad()
def measure(
    lvlm: LVLM, images: Sequence[Any], *, cover: torch.Tensor | None = None, batch_size: int = 16
) -> Relevance:
    """Shape of the relevance maps and rows of every patch, in the layers up to the connector's.

    Maps are reduced where they arise; those of one layer and batch, 4 x images x heads x tokens^2 bytes, are held at
    once. In a picture of several tiles, and in a layer that attends within windows, a map extends over its own tile or
    window, and so does the uniform map beside it.

    Args:
        images: of one size, as `LVLM.inputs` takes them.
        cover: [images, patches], 0-1: how much of each patch belongs to a region, for `share_on`.

    Raises:
        ValueError: no images, images of different numbers of patches, a `cover` that does not fit, or values that are
            not finite.
    """
    if len(images) == 0:
        raise ValueError("relevance needs at least one image")
    parts = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        inputs = lvlm.inputs(batch, [""] * len(batch))
        layouts = lvlm.layout(inputs)
        sizes = {(layout.tiles, *layout.grid) for layout in layouts} | {shape for _, shape in parts[:1]}
        if len(sizes) > 1:
            raise ValueError(f"images need one size; these have (tiles, rows, columns) of patches {sorted(sizes)}")
        if cover is not None and (len(cover), cover[0].numel()) != (len(images), len(layouts[0].vision)):
            raise ValueError(f"cover needs [images, patches], here [{len(images)}, {len(layouts[0].vision)}]")
        covered = None if cover is None else cover[start : start + batch_size].flatten(1).to(lvlm.device)
        parts.append((_measure_batch(lvlm, inputs, layouts, covered), sizes.pop()))
        norms = parts[-1][0][-1]  # what is not finite in a layer is not in those behind it either
        if (bad := ~norms.isfinite().all(1)).any():
            where = f"up to layer {lvlm.feature_layer} of the tower"
            raise capture.not_finite(lvlm, where, start + int(bad.nonzero()[0]))
    columns, rows, uniform, norms = zip(*(part for part, _ in parts), strict=True)

    def joined(dicts: Sequence[dict]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([d[name] for d in dicts]) for name in dicts[0]}

    return Relevance(joined(columns), joined(rows), joined(uniform), torch.cat(norms))


def _measure_batch(
    lvlm: LVLM, inputs: BatchFeature, layouts: list[ImageLayout], cover: torch.Tensor | None
) -> tuple[dict, dict, dict, torch.Tensor]:
    columns, rows, uniform = {}, {}, {}
    n_layers, n_patches = lvlm.feature_layer + 1, len(layouts[0].vision)

    def put(found: dict, layer: int, image: int, patches: torch.Tensor, shapes: dict[str, torch.Tensor]) -> None:
        for name, values in shapes.items():  # [heads, maps]
            empty = torch.full((len(layouts), n_layers, len(values), n_patches), float("nan"))
            found.setdefault(name, empty)[image, layer][:, patches] = values.cpu()

    def see(layer: int, image: int, patches: torch.Tensor, weights: torch.Tensor) -> None:
        distance = distances(places(layouts[image])[patches]).to(weights.device)
        region = None if cover is None else cover[image, patches.to(cover.device)].to(weights.device)

        def shapes(maps: torch.Tensor) -> dict[str, torch.Tensor]:
            found = {"spread": spread(maps, distance), "within": within(maps, distance),
                     "effective_patches": effective_patches(maps)}
            return found if region is None else found | {"share_on": share_on(maps, region)}

        received = weights.transpose(1, 2)  # [heads, patches, queries]
        put(columns, layer, image, patches, shapes(received / received.sum(-1, keepdim=True)))
        put(rows, layer, image, patches, shapes(weights / weights.sum(-1, keepdim=True)))
        put(uniform, layer, image, patches, shapes(torch.full_like(weights[:1], 1 / len(patches))))

    with capture.hidden_states(lvlm, "vision", layers=[lvlm.feature_layer]) as norms:
        _each_map(lvlm, inputs, layouts, range(n_layers), see)
    flat = norms[lvlm.feature_layer][0].cpu().flatten()  # [tokens of the batch]
    return columns, rows, uniform, torch.stack([flat[layout.vision] for layout in layouts])


def places(layout: ImageLayout) -> torch.Tensor:
    """(row, column) of each patch within its tile, long [patches, 2]."""
    patch = torch.arange(len(layout.vision)) % (layout.grid[0] * layout.grid[1])
    return torch.stack([patch // layout.grid[1], patch % layout.grid[1]], -1)


@torch.no_grad()
def relevance_maps(lvlm: LVLM, image: Any, patches: Sequence[int], layer: int) -> torch.Tensor:
    """How much each patch of an image attends to some of them: float32 [heads, chosen, patches], as it is, unscaled.

    `patches` count row by row, tile after tile; `layer` counts from 0. Patches of another tile or window have 0.
    """
    inputs = lvlm.inputs([image], [""])
    layouts = lvlm.layout(inputs)
    found = []

    def see(layer: int, image: int, here: torch.Tensor, weights: torch.Tensor) -> None:
        whole = torch.zeros(len(weights), len(layouts[0].vision), len(layouts[0].vision))
        whole[:, here[:, None], here[None]] = weights.cpu()
        found.append(whole)

    _each_map(lvlm, inputs, layouts, [layer], see)
    return sum(found)[:, :, list(patches)].transpose(1, 2)


def _each_map(
    lvlm: LVLM,
    inputs: BatchFeature,
    layouts: list[ImageLayout],
    layers: Sequence[int],
    see: Callable[[int, int, torch.Tensor, torch.Tensor], None],
) -> None:
    """Call `see(layer, image, patches, weights)` for every attention map of the tower, cut to the patches.

    A map belongs to a tile, to an image or, in some layers of Qwen2.5-VL, to a window; the calls of a layer follow
    the tower's sequence of tokens. `patches` long [n] says which patches of the image these are, and `weights`
    float32 [heads, n queries, n keys] how much each attends to each.
    """
    owner = torch.full((1 + max(int(layout.vision.max()) for layout in layouts), 2), -1)  # [tokens of the batch, 2]
    for i, layout in enumerate(layouts):
        owner[layout.vision] = torch.stack([torch.full_like(layout.vision, i), torch.arange(len(layout.vision))], -1)
    taken = Counter()  # tokens of each layer that were seen

    def cut(weights: torch.Tensor, layer: int) -> None:
        for one in weights:  # [heads, tokens, tokens]
            image, patch = owner[taken[layer] : taken[layer] + one.shape[-1]].T
            taken[layer] += one.shape[-1]
            kept = (patch >= 0).nonzero()[:, 0]  # without CLS and registers
            at = kept.to(one.device)
            see(layer, int(image[kept[0]]), patch[kept], one[:, at[:, None], at[None]])

    with capture.attention_rows(lvlm, "vision", cut, rows="all", layers=layers):
        lvlm.see(inputs)
