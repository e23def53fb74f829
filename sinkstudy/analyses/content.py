"""What sinks hold: facts of the picture and of the patch, read from single tokens of groups beside random ones.

`known` gathers what is known of the pictures, `PatchSampler` says from which patches it is read and which random
patches are their control. `fit_probes` then fits the probes of `probing` on one model. It returns observations: a row a
picture, with the `value` of the group, that of as many `random` tokens in the same picture (mean over draws), and the
difference, `lead`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from sinkstudy import sinks
from sinkstudy.analyses import probing
from sinkstudy.model.groups import of_patches
from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM
from sinkstudy.world import drawing

# ---- what is known of the pictures


@dataclass(frozen=True)
class Known:
    """What is known of pictures, patch by patch as in `ImageLayout`; on the first `n_fit` probes are fitted."""

    n_fit: int
    tiles: int
    grid: tuple[int, int]  # (rows, columns) of the patches of a tile
    places: torch.Tensor  # long [patches, 2], row and column
    true: dict[str, torch.Tensor]  # what -> long [pictures, patches]
    dealt: dict[str, torch.Tensor]  # the same of another picture: labels of the control task
    kinds: dict[str, list[str]]  # kind -> what it is the mean of; empty where the facts are not known
    calm: torch.Tensor | None  # bool [pictures, patches]
    things: torch.Tensor | None  # bool [pictures, patches], mostly covered by a thing

    def of_patch(self) -> list[str]:
        """What is known of the patch rather than of the picture."""
        return [what for what in self.true if what not in self.kinds["global"]]

    def in_layers(self) -> dict[str, list[str]]:
        """The kinds that are read in every layer; "in the decoder" are those of the published probes there."""
        inside = [what for what in self.kinds["global"] if what != "main colour"]
        return {kind: self.kinds[kind] for kind in ("global", "local")} | {"in the decoder": inside}


def known(
    scenes: drawing.Scenes | None, n: int, n_fit: int, tiles: int, grid: tuple[int, int], seed: int = 0
) -> Known:
    """What is known of `n` pictures.

    Args:
        scenes: the lab's scenes; None for other pictures, of whose patches only place and pixels are known.
        n_fit: on so many pictures, the first, probes are fitted.
        tiles, grid: how the models cut the pictures. Of several tiles the lab's facts of a patch are not known.
        seed: of the control task. There each picture has the labels of another one of its half, and each place any
            of nine cells, the same in all pictures.
    """
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid)).repeat(tiles, 1)
    thirds = places * 3 // torch.tensor(grid)
    true = {"cell": (thirds[:, 0] * 3 + thirds[:, 1]).expand(n, -1)}
    whole = {} if scenes is None else of_pictures(scenes)
    true |= {what: values[:, None].expand(-1, len(places)) for what, values in whole.items()}
    calm = things = None
    local: list[str] = []
    if scenes is not None and tiles == 1:
        calm, things = _at_patches(scenes.calm, grid), _at_patches(scenes.thing_share, grid) > 0.5
        part = _at_patches(drawing.patch_contents(scenes)[0], grid)
        local = ["texture there", "colour there"]
        true |= {"texture there": scenes.texture.gather(1, part), "colour there": scenes.colour.gather(1, part),
                 "thing there": things.long()}
    kinds = {"global": list(whole), "local": local, **({"thing there": ["thing there"]} if local else {}),
             "position": ["cell"], "row and column": ["row and column"], "pixels": ["pixels"]}
    return Known(n_fit, tiles, grid, places, true, _dealt(true, n_fit, seed), kinds, calm, things)


def of_pictures(scenes: drawing.Scenes) -> dict[str, torch.Tensor]:
    """Facts of the whole picture, long [pictures] each; main texture and colour are those of the largest part."""
    main = scenes.area.masked_fill(scenes.texture < 0, 0).argmax(1, keepdim=True)
    return {"scene": scenes.scene, "light": scenes.light, "main texture": scenes.texture.gather(1, main)[:, 0],
            "main colour": scenes.colour.gather(1, main)[:, 0], "number of things": (scenes.kind >= 0).sum(1)}


def _at_patches(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Facts of the lab's patches on a model's grid: [pictures, 12, 12] -> [pictures, patches]."""
    row, column = (((torch.arange(side) + 0.5) * drawing.GRID / side).long() for side in grid)
    return values[:, row][:, :, column].flatten(1)


def _dealt(true: Mapping[str, torch.Tensor], n_fit: int, seed: int) -> dict[str, torch.Tensor]:
    n, n_patches = true["cell"].shape
    rng = torch.Generator().manual_seed(seed)
    swapped = torch.cat([torch.randperm(n_fit, generator=rng), n_fit + torch.randperm(n - n_fit, generator=rng)])
    dealt = {what: values[swapped] for what, values in true.items()}
    return dealt | {"cell": (torch.randperm(n_patches, generator=rng) % 9).expand(n, -1)}


# ---- the groups of patches


@dataclass(frozen=True)
class PatchSampler:
    """Sinks and other groups of patches of each picture, and random patches as their controls, alike in every model."""

    rule: Callable[[torch.Tensor], torch.Tensor]  # norms -> sinks, see `sinks.rule`
    known: Known
    draws: int = 5  # of random patches
    most: int = 4  # patches of a group that are read in one picture
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """Calm patches and things are known of the lab's pictures only."""
        return ["sinks", "top 2 %", *(["calm", "things", "sinks on things"] if self.known.calm is not None else [])]

    @property
    def singles(self) -> list[str | tuple[str, int]]:
        """What single patches are drawn from; (group, draw) is a random control."""
        return [*self.names, "next in norm", *((group, draw) for group in self.names for draw in range(self.draws))]

    @property
    def means(self) -> list[str | tuple[str, int]]:
        """What is averaged in a picture."""
        found: list[str | tuple[str, int]] = []
        for group in self.names:
            found += [group, *((group, draw) for draw in range(self.draws))]
        return found

    def masks(self, index: int, layout: ImageLayout, norms: torch.Tensor) -> dict[str, torch.Tensor]:
        """The groups in the picture of this index, bool [patches]; patches that no visual token holds are in none."""
        masks = of_patches(norms, self.rule, read=layout.read)
        if self.known.calm is not None and self.known.things is not None:
            masks |= {"calm": self.known.calm[index], "things": self.known.things[index]}
        masks = {group: mask & layout.read for group, mask in masks.items()}
        if self.known.calm is not None:  # no more than there are other patches on things
            others = self._outside("sinks on things", masks, layout)
            masks["sinks on things"] = sinks.random_like(others, self._seed(index), masks["sinks"] & masks["things"])
        return masks

    def patches(self, index: int, layout: ImageLayout, norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The patches that are read one by one, and the weights of all readings for `probing.states`.

        Returns:
            long [singles, most], drawn at random from each; float [readings, patches]: the first patch of each of
            `singles` and the mean of all, which are followed through the layers; their other patches; `means`.

        Raises:
            ValueError: the picture is cut into other patches than the first.
        """
        if (layout.tiles, *layout.grid) != (self.known.tiles, *self.known.grid):
            raise ValueError(f"the model cuts picture {index} into other patches than the first: "
                             "give pictures of one size")
        masks = self.masks(index, layout, norms)
        randoms = {group: sinks.random_like(mask.expand(self.draws, -1), self._seed(index),
                                            self._outside(group, masks, layout)) for group, mask in masks.items()}
        next_to = sinks.next_in_norm(norms, masks["sinks"], among=layout.read)
        of = torch.cat([torch.stack([*masks.values(), next_to]), *randoms.values()])  # [singles, patches]
        order = torch.rand(len(norms), generator=torch.Generator().manual_seed(self._seed(index)))
        patch = order.masked_fill(~of, -1).topk(self.most).indices
        one = torch.nn.functional.one_hot(patch, len(norms)) * of[:, None]  # [singles, most, patches]
        every = layout.read[None]
        together = [torch.cat([masks[group][None], randoms[group]]) for group in self.names]
        return patch, torch.cat([_average(of) for of in (one[:, 0], every, one[:, 1:].flatten(0, 1), *together)])

    def tokens(
        self, index: int, layout: ImageLayout, masks: Mapping[str, torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Visual tokens of each group, bool [visual tokens], and its random controls [draws, visual tokens]."""
        lifted = {group: layout.lift(mask, "any") for group, mask in masks.items()}
        # newline tokens have no patch
        among = dict.fromkeys(lifted, layout.lift(torch.ones(len(layout.vision)), "any"))
        if "things" in lifted:
            among["sinks on things"] = lifted["things"] & ~lifted["sinks"]
            lifted["sinks on things"] = sinks.random_like(among["sinks on things"], self._seed(index),
                                                          lifted["sinks on things"])
        return {group: (mask, sinks.random_like(mask.expand(self.draws, -1), self._seed(index),
                                                among[group].expand(self.draws, -1)))
                for group, mask in lifted.items()}

    def _outside(self, group: str, masks: Mapping[str, torch.Tensor], layout: ImageLayout) -> torch.Tensor:
        """Patches that a control is drawn from: those of visual tokens without a patch of the group."""
        of, among = ("sinks", masks["things"]) if group == "sinks on things" else (group, layout.read)
        return ~layout.lower(layout.lift(masks[of], "any")) & among

    def _seed(self, index: int) -> int:
        return self.seed * 100_003 + index


def _average(mask: torch.Tensor) -> torch.Tensor:
    """Weights that average the patches of a mask: [.., patches] -> float; NaN where there are none."""
    return mask / mask.sum(-1, keepdim=True)


# ---- probes


@dataclass(frozen=True)
class Probed:
    """What probes read from the tokens of one model, in % of the test pictures or of variance.

    Observations have the columns `group`, `what`, `image_id` (index among the test pictures), `value`, `random` and
    `lead`. Beside the groups there are "next in norm", "all" (the mean of all patches), "CLS" and "registers" (their
    mean), which have no random control.
    """

    at_input: pd.DataFrame  # at the connector's input: with `reading` "token", "half", "dealt anew" or "mean"
    layers: pd.DataFrame  # from one token after each layer: with `place` (order), `side`, `layer` (from 1)
    sizes: pd.DataFrame  # `group`, `image_id` (of all pictures), `patches` and, of these, `on_things`
    layouts: list[ImageLayout]  # of each picture
    masks: list[dict[str, torch.Tensor]]  # of each picture, see `PatchSampler.masks`


def fit_probes(
    lvlm: LVLM, pictures: Sequence[Any], known: Known, groups: PatchSampler, *, batch_size: int
) -> Probed:
    """Fit the probes on one model and judge them.

    `reading` "token": what holds for the picture is read from one patch a picture, what holds for the patch from up to
    `groups.most`, each for itself. "half": fitted on half the pictures. "dealt anew": the control task (Hewitt & Liang
    2019). "mean": what holds for the picture, read from the mean over the group's tokens.

    Raises:
        ValueError: as `probing.states` and `PatchSampler.patches`.
    """
    patches = []

    def choose(index: int, layout: ImageLayout, norms: torch.Tensor) -> torch.Tensor:
        patch, weights = groups.patches(index, layout, norms)
        patches.append(patch)
        return weights

    followed = len(groups.singles) + 1
    seen = probing.states(lvlm, pictures, choose, followed=followed, batch_size=batch_size)
    patch = torch.stack(patches)  # [pictures, singles, most]
    masks = [groups.masks(i, *of) for i, of in enumerate(zip(seen.layouts, seen.norms, strict=True))]
    return Probed(
        at_input=_at_input(seen, lvlm.feature_layer, patch, _pixels(lvlm, pictures, patch, batch_size), known, groups),
        layers=_layers(seen, patch, known, groups),
        sizes=_sizes(masks),
        layouts=seen.layouts,
        masks=masks,
    )


def _sizes(masks: Sequence[Mapping[str, torch.Tensor]]) -> pd.DataFrame:
    return pd.DataFrame([
        {"group": group, "image_id": i, "patches": int(mask.sum()),
         "on_things": int((mask & of["things"]).sum()) if "things" in of else np.nan}
        for i, of in enumerate(masks) for group, mask in of.items()
    ])


def _pixels(lvlm: LVLM, pictures: Sequence[Any], patch: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The pixels of the chosen patches: [pictures, singles, most] -> [pictures, singles, most, values]."""
    found = []
    for of, inputs in lvlm.batches(pictures, batch_size):
        found += [pixels[own] for pixels, own in zip(lvlm.patch_pixels(inputs), patch[of], strict=True)]
    return torch.stack(found)


def _labels(of: Mapping[str, torch.Tensor], whats: Sequence[str], patches: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels of these patches, long [pictures, k]: {what: [pictures, patches]} -> {what: [pictures, k]}."""
    return {what: of[what].gather(1, patches) for what in whats}


def _at_input(
    seen: probing.States, layer: int, patch: torch.Tensor, pixels: torch.Tensor, known: Known, groups: PatchSampler
) -> pd.DataFrame:
    tokens, n = seen.stages["tower", layer], known.n_fit
    n_singles, rest = len(groups.singles), groups.most - 1
    whole, found = known.kinds["global"], {}
    for i, single in enumerate(groups.singles):
        first, behind = tokens[:, i : i + 1], n_singles + 1 + i * rest
        several = torch.cat([first, tokens[:, behind : behind + rest]], 1)  # [pictures, most, width]
        for reading, labels, fitted in (("token", known.true, n), ("dealt anew", known.dealt, n),
                                        ("half", known.true, n // 2)):
            of_patch = _labels(labels, known.of_patch(), patch[:, i])
            found[reading, single] = (probing.hit_rates(first, _labels(labels, whole, patch[:, i, :1]), n, fitted)
                                      | probing.hit_rates(several, of_patch, n, fitted))
        found["token", single]["row and column"] = probing.explained(several, known.places[patch[:, i]], n)
        found["token", single]["pixels"] = probing.explained(several, pixels[:, i], n)
    for i, mean in enumerate(groups.means, n_singles + 1 + n_singles * rest):
        found["mean", mean] = _of_whole(tokens[:, i, None], known)
    found |= {("token", name): of for name, of in _ceilings(seen, ("tower", layer), n_singles, known)}
    single = {what: [what] for what in known.true if what != "cell"}
    return _table(found, single | known.kinds, groups.draws, len(tokens) - n)


def _layers(seen: probing.States, patch: torch.Tensor, known: Known, groups: PatchSampler) -> pd.DataFrame:
    parts, whats = [], [*known.kinds["global"], *known.kinds["local"]]
    for place, (stage, tokens) in enumerate(seen.stages.items()):
        found = {("token", single): probing.hit_rates(tokens[:, i : i + 1], _labels(known.true, whats, patch[:, i, :1]),
                                                      known.n_fit)
                 for i, single in enumerate(groups.singles)}
        found |= {("token", name): of for name, of in _ceilings(seen, stage, len(groups.singles), known)}
        side, layer = stage
        table = _table(found, known.in_layers(), groups.draws, len(tokens) - known.n_fit).drop(columns="reading")
        parts.append(table.assign(place=place, side=side, layer=layer + 1))
    return pd.concat(parts, ignore_index=True)


def _of_whole(tokens: torch.Tensor, known: Known) -> dict[str, np.ndarray]:
    """What holds for the whole picture, read from one vector a picture, [pictures, 1, width]."""
    return probing.hit_rates(tokens, {what: known.true[what][:, :1] for what in known.kinds["global"]}, known.n_fit)


def _ceilings(
    seen: probing.States, stage: tuple[str, int], n_singles: int, known: Known
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The whole picture read from the mean of all patches, and in the tower from CLS and the mean of the registers."""
    yield "all", _of_whole(seen.stages[stage][:, n_singles, None], known)
    prefix = seen.prefix[stage[1]] if stage[0] == "tower" else torch.empty(len(seen.norms), 0, 1)
    if prefix.shape[1]:
        yield "CLS", _of_whole(prefix[:, :1], known)
    if prefix.shape[1] > 1:
        yield "registers", _of_whole(prefix[:, 1:].mean(1, keepdim=True), known)


def _table(
    found: Mapping[tuple, Mapping[str, np.ndarray]], kinds: Mapping[str, list[str]], draws: int, n: int
) -> pd.DataFrame:
    """Observations: {(reading, group or (group, draw)): {what: [n pictures], 0–1}} -> a row a picture, in %."""
    parts = []
    for (reading, group), of in found.items():
        if isinstance(group, tuple):
            continue
        for what, attributes in kinds.items():
            if not all(attribute in of for attribute in attributes):
                continue
            value = _percent(of, attributes, n)
            controls = [_percent(found[reading, (group, draw)], attributes, n) for draw in range(draws)
                        if (reading, (group, draw)) in found]
            random = np.mean(controls, axis=0) if controls else np.full(len(value), np.nan)
            parts.append(pd.DataFrame({"reading": reading, "group": group, "what": what, "image_id": range(len(value)),
                                       "value": value, "random": random, "lead": value - random}))
    return pd.concat(parts, ignore_index=True)


def _percent(of: Mapping[str, np.ndarray], attributes: Sequence[str], n: int) -> np.ndarray:
    """Mean over attributes in %, [pictures]; NaN if there are none, since the facts are not known."""
    return 100 * np.mean([of[what] for what in attributes], axis=0) if attributes else np.full(n, np.nan)
