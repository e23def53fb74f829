"""By whom a patch is attended to in the vision tower, and to whom it attends: relevance maps and their shape.

The *relevance map* of patch j, in a layer and head, is column j of the attention map: how much each patch attends to j
(Luo et al., 2510.08510). The *row* of patch j is the other side: how much j attends to each patch. Both are taken over
the patches, without CLS and registers, with the patch itself, and scaled to sum 1, so that they are distributions on
the patch grid. How much attention a map holds before that is the matter of `capture.attention_received`.

Distances are Euclidean, between centres of patches, in units of a patch.

`measure` gives the shape of every map, `patch_groups` says which patches are compared, and `shapes`, `spread_by_layer`
and `things_by_head` say what the maps of a group are like.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from transformers import BatchFeature

from sinkstudy import sinks, stats
from sinkstudy.model import capture
from sinkstudy.model.groups import all_read, mean, of_patches
from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM
from sinkstudy.world import drawing

COUNTED = slice(1, None)
"""The layers that means are taken over: from the second on. It was fixed before the numbers were seen."""


class Measure(NamedTuple):
    """One number of a map: which side of attention, which of its shapes, and in what unit."""

    side: str  # "columns" or "rows"
    shape: str  # a key of `Relevance.columns`
    scale: int
    unit: str


MEASURES = {
    "spread": Measure("columns", "spread", 1, "patches"),
    "effective": Measure("columns", "effective_patches", 1, "patches"),
    "within": Measure("columns", "within", 100, "points"),
    "row_spread": Measure("rows", "spread", 1, "patches"),
}
"""What `shapes` measures, by the name that its metrics have."""


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


def within(maps: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """Share of a map's mass no further than 1.5 from its patch, 0-1: on it and its eight neighbours.

    `maps` and `distance` as in `spread`; returns [.., maps].
    """
    return (maps * (distance <= 1.5)).sum(-1)


def effective_patches(maps: torch.Tensor) -> torch.Tensor:
    """2 to the entropy in bits: over how many patches a map extends, [.., maps, patches] -> [.., maps].

    1 for a map on one patch, n for one that is even over n; where they lie does not matter.
    """
    return torch.special.entr(maps).sum(-1).exp()


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
    read: torch.Tensor  # bool [images, patches]: those that the decoder gets


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
    parts, sizes, read = [], set(), []
    for of, inputs in lvlm.batches(images, batch_size):
        layouts = lvlm.layout(inputs)
        sizes |= {(layout.tiles, *layout.grid) for layout in layouts}
        if len(sizes) > 1:
            raise ValueError(f"images need one size; these have (tiles, rows, columns) of patches {sorted(sizes)}")
        if cover is not None and (len(cover), cover[0].numel()) != (len(images), len(layouts[0].vision)):
            raise ValueError(f"cover needs [images, patches], here [{len(images)}, {len(layouts[0].vision)}]")
        read.append(all_read(layouts))
        covered = None if cover is None else cover[of].flatten(1).to(lvlm.device)
        parts.append(_measure_batch(lvlm, inputs, layouts, covered))
        norms = parts[-1][-1]  # what is not finite in a layer is not in those behind it either
        if (bad := ~norms.isfinite().all(1)).any():
            where = f"up to layer {lvlm.feature_layer} of the tower"
            raise capture.not_finite(lvlm, where, of.start + int(bad.nonzero()[0]))
    columns, rows, uniform, norms = zip(*parts, strict=True)

    def joined(dicts: Sequence[dict]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([d[name] for d in dicts]) for name in dicts[0]}

    return Relevance(joined(columns), joined(rows), joined(uniform), torch.cat(norms), torch.cat(read))


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
        layout = layouts[image]
        places = torch.cartesian_prod(*map(torch.arange, layout.grid)).repeat(layout.tiles, 1)  # [patches, 2]
        distance = distances(places[patches]).to(weights.device)
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


# --- groups of patches ---


@dataclass(frozen=True)
class PatchGroups:
    """Which patches of one model are compared."""

    masks: dict[str, torch.Tensor]  # bool [images, patches]
    random: dict[str, list[torch.Tensor]]  # beside some of them: groups of as many patches, drawn from those no sinks


def patch_groups(
    norms: torch.Tensor,
    rule: Callable[[torch.Tensor], torch.Tensor],
    scenes: drawing.Scenes | None = None,
    read: torch.Tensor | None = None,
    *,
    draws: int = 8,
    seed: int = 0,
) -> PatchGroups:
    """Sinks and the top 2 % of the norms; in the lab calm patches and things; and what they are held against.

    Args:
        norms: [images, patches].
        rule: what a sink is, of `sinks.rule`.
        scenes, read: see `model.groups.of_patches`.
        draws: random groups beside each of these.

    Returns:
        With "others", all patches that are no sinks, and "next in norm", as many as there are sinks.
    """
    chosen = of_patches(norms, rule, scenes, read)
    sink = chosen["sinks"]
    others = ~sink if read is None else ~sink & read
    random = {group: [sinks.random_like(mask, seed + draw, among=others) for draw in range(draws)]
              for group, mask in chosen.items()}
    return PatchGroups(chosen | {"others": others, "next in norm": sinks.next_in_norm(norms, sink, others)}, random)


def stacked(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The tables of several models as one, with the column `model` before theirs."""
    return pd.concat(tables, names=["model"]).reset_index("model").reset_index(drop=True)


def contents(groups: PatchGroups, things: torch.Tensor | None = None) -> pd.DataFrame:
    """How many patches a group has, and how much of them things cover.

    Args:
        things: [images, patches], 0-1, what things cover of each patch; None where it is not known.

    Returns:
        `group`, `measure`, `image_id`, `value`: "a picture", a row a picture; "on things, %", a row a patch, or one
        without value for a group that has none.
    """
    parts = []
    for group in groups.random:
        mask = groups.masks[group]
        parts.append(pd.DataFrame({"group": group, "measure": "a picture", "image_id": range(len(mask)),
                                   "value": mask.sum(1)}))
        if things is not None:
            there = {"image_id": mask.nonzero()[:, 0], "value": 100 * things[mask]}
            there = there if mask.any() else {"image_id": [0], "value": [float("nan")]}
            parts.append(pd.DataFrame({"group": group, "measure": "on things, %", **there}))
    return pd.concat(parts, ignore_index=True)


# --- the maps of a group ---


def shapes(found: Relevance, groups: PatchGroups) -> pd.DataFrame:
    """What the maps of each group are like: mean over its patches, all heads and the layers that count.

    Returns:
        A row a picture: `measure` (of `MEASURES`), `group`, `against`, `image_id`, `value` in the measure's unit, NaN
        where a picture lacks such patches. `against` is "" for the group itself; "_minus_uniform", less a uniform map
        at the same places; "_minus_random", less the mean of the random groups; "_minus_random_over_uniform", the same
        where each is first taken less its uniform map, so that places do not matter; "_minus_things";
        "_minus_next_in_norm".
    """
    parts = []
    for measure, (side, shape, scale, _) in MEASURES.items():
        values, even = scale * getattr(found, side)[shape], scale * found.uniform[shape]
        for group in groups.masks:
            for against, value in _against(values, even, groups, group).items():
                parts.append(pd.DataFrame({"measure": measure, "group": group, "against": against,
                                           "image_id": range(len(value)), "value": value}))
    return pd.concat(parts, ignore_index=True)


def _against(values: torch.Tensor, even: torch.Tensor, groups: PatchGroups, group: str) -> dict[str, np.ndarray]:
    """A group's value and its differences to controls, float64 [images] each."""

    def overall(values: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        each = torch.stack([mean(values, mask[:, None, None]) for mask in masks]).mean(0)
        return each[:, COUNTED].mean((1, 2))

    masks = groups.masks
    own, own_even = overall(values, masks[group]), overall(even, masks[group])
    found = {"": own, "_minus_uniform": own.double() - own_even}
    if random := groups.random.get(group):
        chance, chance_even = overall(values, *random), overall(even, *random)
        found["_minus_random"] = own.double() - chance
        found["_minus_random_over_uniform"] = (own - own_even).double() - (chance - chance_even)
    if group in ("sinks", "top 2 %") and "things" in masks:
        found["_minus_things"] = own.double() - overall(values, masks["things"])
    if group == "sinks":
        found["_minus_next_in_norm"] = own.double() - overall(values, masks["next in norm"])
    return {against: value.double().numpy() for against, value in found.items()}


def spread_by_layer(found: Relevance, groups: PatchGroups) -> pd.DataFrame:
    """Spread of the maps ("columns") and of the rows of each group in every layer, mean over its patches and heads.

    Returns:
        A row a picture: `side`, `group`, `layer` (from 1), `image_id`, `value` in patches. The group "uniform map" is a
        uniform map at the places of the others.
    """
    parts = []
    for side, values in (("columns", found.columns["spread"]), ("rows", found.rows["spread"])):
        masks = {group: groups.masks[group][:, None, None] for group in (*groups.random, "others")}
        means = {group: mean(values, mask) for group, mask in masks.items()}
        means["uniform map"] = mean(found.uniform["spread"], masks["others"])
        for group, of in means.items():
            for layer, value in enumerate(of.mean(2).double().T, start=1):
                parts.append(pd.DataFrame({"side": side, "group": group, "layer": layer,
                                           "image_id": range(len(value)), "value": value}))
    return pd.concat(parts, ignore_index=True)


# --- heads ---


def head_specialisation(found: Relevance, groups: PatchGroups, *, seed: int = 0) -> pd.DataFrame:
    """How far heads differ in the share of a group's maps that lies on things: `specialisation`, in points.

    Maps are pooled over the patches of a group in all pictures, so this is no mean of a number a picture. Intervals
    are those of `stats.pooled_interval`: they draw pictures, and pool their maps anew in every draw. A group and what
    it is held against are drawn together. Pictures without such patches are left out.

    Returns:
        Estimates, a row for each group and `against`: "" for the group itself, "random" for the mean of its random
        groups, "_minus_random" and "_minus_things" for the differences. `n` is 0 where there are no such patches, or
        `found` has no `share_on`.
    """
    rows = []
    for group in groups.random:
        of = _specialisations(found.columns.get("share_on"), groups, group, seed)
        rows += [{"group": group, "against": against, **interval._asdict()} for against, interval in of.items()]
    return pd.DataFrame(rows)


def _specialisations(
    values: torch.Tensor | None, groups: PatchGroups, group: str, seed: int
) -> dict[str, stats.Interval]:
    if values is None:
        return dict.fromkeys(("", "random", "_minus_random", "_minus_things"), stats.NOTHING)

    def pooled(mask: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:  # [images, layers, heads], [images]
        sums, counts = _sums(values, mask)
        return sums[some, COUNTED].numpy(), counts[some].numpy()

    def of_draws(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:  # [.., images, draws, layers, heads], [.., draws]
        return specialisation(sums.swapaxes(1, 2), counts.swapaxes(1, 2)).mean(-1)

    def less(sums: np.ndarray, counts: np.ndarray, *draws: np.ndarray) -> np.ndarray:
        return specialisation(sums, counts) - of_draws(*draws)

    some = groups.masks[group].any(1)
    own, things = pooled(groups.masks[group]), [of[:, None] for of in pooled(groups.masks["things"])]  # one draw
    random = [np.stack(of, 1) for of in zip(*map(pooled, groups.random[group]), strict=True)]
    return {
        "": stats.pooled_interval(specialisation, *own, seed=seed),
        "random": stats.pooled_interval(of_draws, *random, seed=seed),
        "_minus_random": stats.pooled_interval(less, *own, *random, seed=seed),
        "_minus_things": stats.pooled_interval(less, *own, *things, seed=seed),
    }


def _sums(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of a share over the patches of a group, %, and their number: float64 [images, layers, heads] and [images]."""
    return 100 * torch.where(mask[:, None, None], values, 0).double().sum(-1), mask.sum(1).double()


def things_by_head(found: Relevance, groups: PatchGroups, names: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Share of the maps of some groups that lies on things, %, pooled over their patches, in each layer and head.

    Returns:
        Estimates, `group`, `layer` and `head` (both from 1), `value`, `low`, `high`, `n`; no rows if `found` has no
        `share_on`.
    """
    rows = []
    for group in names if "share_on" in found.columns else []:
        some = groups.masks[group].any(1)
        sums, counts = (of[some] for of in _sums(found.columns["share_on"], groups.masks[group]))
        for layer, head in np.ndindex(*sums.shape[1:]):
            share = stats.mean_interval(sums[:, layer, head], over=counts, seed=seed)
            rows.append({"group": group, "layer": layer + 1, "head": head + 1, **share._asdict()})
    return pd.DataFrame(rows, columns=["group", "layer", "head", "value", "low", "high", "n"])


# --- maps of a few patches, to be looked at ---


class Example(NamedTuple):
    """The map of one patch in one head."""

    map: torch.Tensor  # [rows, columns] of the patch's tile
    patch: int  # within the tile
    head: int  # from 1
    times: float  # how many times the attention of a uniform map the patch receives from the patches


def example_patches(
    norms: torch.Tensor, scenes: drawing.Scenes | None = None, seed: int = 0
) -> tuple[int, dict[str, int]]:
    """A picture and a few of its patches, by what they are, that show what maps look like.

    In the lab the first picture that has them well inside: its first calm patch, an ordinary one at random, and the one
    that things cover most. Elsewhere, in the first picture, the patches of the highest and of the median norm.

    Args:
        norms: [images, patches]; of no matter in the lab.
    """
    if scenes is None:
        order = norms[0].argsort().tolist()
        return 0, {"highest norm": order[-1], "median norm": order[len(order) // 2]}
    inner = torch.zeros(scenes.calm.shape[1:], dtype=torch.bool)
    inner[2:-2, 2:-2] = True
    inner = inner.flatten()
    calm, things = scenes.calm.flatten(1) & inner, scenes.thing_share.flatten(1) * inner
    image = int((calm.any(1) & (things > 0.9).any(1)).float().argmax())
    ordinary = inner & ~calm[image] & (things[image] == 0)
    return image, {"calm": int(calm[image].nonzero()[0]), "things": int(things[image].argmax()),
                   "others": int(np.random.default_rng(seed).choice(ordinary.nonzero()[:, 0]))}


def examples(lvlm: LVLM, picture: Any, patches: Sequence[int], spread: torch.Tensor) -> list[list[Example]]:
    """Maps of some patches in the connector's layer, in the heads whose map of the first patch spreads least and most.

    Args:
        patches: as in `relevance_maps`.
        spread: [heads, patches], of the maps of this picture in that layer.

    Returns:
        For each patch, an example of each of the two heads; of one, if there is but one.
    """
    layout = lvlm.layout(lvlm.inputs([picture], [""]))[0]
    tile = layout.grid[0] * layout.grid[1]
    maps = relevance_maps(lvlm, picture, patches, lvlm.feature_layer)  # [heads, chosen, patches]
    heads = spread[:, patches[0]].argsort()[[0, -1]].tolist()[: len(maps)]
    found = []
    for i, patch in enumerate(patches):
        own = [maps[head, i].view(layout.tiles, *layout.grid)[patch // tile] for head in heads]
        found.append([Example(of, patch % tile, head + 1, (of.sum() / tile).item() * (tile + lvlm.n_prefix))
                      for head, of in zip(heads, own, strict=True)])
    return found


def draw_examples(
    axes: Sequence[Axes], picture: np.ndarray, examples: Sequence[Sequence[Example]], colours: Sequence[str]
) -> None:
    """The picture with its patches outlined, then the maps of each patch, from dark (0) to the map's own maximum.

    Args:
        axes: one for the picture, then as many for each patch as the model with most heads needs. What is not needed is
            taken out.
        picture: [height, width, 3].
    """
    rows, columns = examples[0][0].map.shape
    axes[0].imshow(picture, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))  # a patch is a square of side 1
    each = (len(axes) - 1) // len(examples)
    for i, (of, colour) in enumerate(zip(examples, colours, strict=True)):
        _outline(axes[0], of[0].patch, columns, colour)
        for ax, example in zip(axes[1 + i * each :], of, strict=False):
            ax.imshow((example.map / example.map.max()).numpy(), vmin=0, vmax=1, cmap="viridis")
            ax.set_title(f"head {example.head}: {example.times:.2g}×", fontsize="small")
            _outline(ax, example.patch, columns, colour)
    for ax in axes:
        ax.set(xticks=[], yticks=[], visible=ax.has_data())
        ax.spines[:].set_visible(False)


def _outline(ax: Axes, patch: int, columns: int, colour: str) -> None:
    corner = (patch % columns - 0.5, patch // columns - 0.5)
    edge = Rectangle(corner, 1, 1, fill=False, lw=2, edgecolor=colour)
    edge.set_path_effects([patheffects.Stroke(linewidth=3.2, foreground="white"), patheffects.Normal()])
    ax.add_patch(edge)
