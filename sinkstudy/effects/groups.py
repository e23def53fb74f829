"""Groups of visual tokens, each beside its matched controls: what is taken away, and what answers lose without it.

Groups are those of `model.groups`. The controls of a group are other visual tokens of the same picture, as many as it
has:

- random, drawn several times;
- next in norm, for sinks: the highest norms that are no sinks;
- alike, where sinks lie on things: some of these, and as many other visual tokens on things.

Where several patches make one visual token, it belongs to a group if one of its patches does, and its other patches go
with it. Numbers are matched in visual tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from sinkstudy import sinks, stats
from sinkstudy.answers import study
from sinkstudy.answers.evaluate import Intervention, evaluate
from sinkstudy.effects import ablation
from sinkstudy.effects.ablation import Masks, Tokens
from sinkstudy.model.groups import NAMES, of_patches
from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM
from sinkstudy.world import drawing

ALIKE = ("sinks on things", "others on things")
ORDERS = ("highest norm first", "in random order")

Cut = tuple[str, str, str]  # a way to take tokens away; a group, or an order; and which: itself, a control, or a dose


# ------------------------------------------------------------------------------------------------- what is chosen
@dataclass(frozen=True)
class Patches:
    """The patches of one picture, and the visual tokens that the connector makes of them."""

    norms: torch.Tensor  # float [patches], at the connector's input
    token: torch.Tensor  # long [patches], the visual token that a patch ends in, from 0; -1 for padding that is cut off

    @property
    def read(self) -> torch.Tensor:
        """The patches that are in some visual token: bool [patches]."""
        return self.token >= 0

    @property
    def highest(self) -> torch.Tensor:
        """The highest norm among the patches of each visual token: float [visual tokens]."""
        n = int(self.token.max()) + 1
        return torch.zeros(n).scatter_reduce(0, self.token[self.read], self.norms[self.read], "amax")

    def tokens(self, patches: torch.Tensor) -> torch.Tensor:
        """The visual tokens that have some of these patches: bool [patches] -> bool [visual tokens]."""
        return torch.zeros_like(self.highest).index_add_(0, self.token[self.read], patches[self.read].float()) > 0

    def patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """All patches of some visual tokens: bool [visual tokens] -> bool [patches]."""
        return tokens[self.token] & self.read


@dataclass(frozen=True)
class Groups:
    """The groups of a model in some pictures, with their controls."""

    patches: dict[str, Patches]  # of each picture, by its id
    masks: dict[tuple[str, str], Masks]  # (group, which) -> bool [patches] of each picture

    def tokens(self, group: str, which: str = "itself") -> pd.Series:
        """Visual tokens of a group in each picture, by its id; empty if the group is not known."""
        masks = self.masks.get((group, which), {})
        numbers = {image: int(self.patches[image].tokens(mask).sum()) for image, mask in masks.items()}
        return pd.Series(numbers, dtype=int)

    def there(self, least: int) -> list[str]:
        """The groups that so many pictures have."""
        return [group for group in NAMES if (self.tokens(group) > 0).sum() >= least]

    def main(self, least: int) -> list[str]:
        """The groups that are followed in all pictures: sinks and calm patches; without them, the top 2 %."""
        return [group for group in ("sinks", "calm") if group in self.there(least)] or ["top 2 %"]

    def sizes(self) -> pd.DataFrame:
        """A row a picture and group: `group`, `image_id`, `picture` (its number), `tokens`, `on_things` (of these)."""
        rows = []
        for group in (group for group in NAMES if (group, "itself") in self.masks):
            things = self.masks.get(("things", "itself"), {})
            for i, (image, mask) in enumerate(self.masks[group, "itself"].items()):
                tokens = self.patches[image].tokens
                shared = int(tokens(mask & things[image]).sum()) if image in things else float("nan")
                rows.append((group, image, i, int(tokens(mask).sum()), shared))
        return pd.DataFrame(rows, columns=["group", "image_id", "picture", "tokens", "on_things"])


def choose(
    tokens: Tokens,
    layer: int,
    criterion: str,
    threshold: float,
    scenes: drawing.Scenes | None = None,
    *,
    doses: Sequence[int] = (),
    seed: int = 0,
) -> Groups:
    """The groups of all pictures, with their controls.

    Args:
        tokens: of the pictures, at the connector's input.
        layer: the layer that feeds the connector, whose norms are judged.
        criterion, threshold: the rule for sinks, of `sinks.NORM_CRITERIA`.
        scenes: of the lab, in the order of the pictures. Where patches are not the lab's, nothing is taken from them.
        doses: numbers of visual tokens to take in the order of norms, and in random order. Those that a picture does
            not have are left out.
    """
    known = {image: Patches(tokens.of[image][layer].float().norm(dim=-1), _visual_token(layout))
             for image, layout in tokens.layouts.items()}
    fewest = min(len(patches.highest) for patches in known.values())
    masks: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for i, (image, patches) in enumerate(known.items()):
        marked = _marked(patches, criterion, threshold, scenes, i)
        chosen = in_order(patches, [dose for dose in doses if dose < fewest], 7919 * seed + i)
        for group, inside in marked.items():
            chosen |= {(group, "itself"): inside} | matched(patches, group, inside, seed, i)
        if "things" in marked:
            chosen |= alike(marked["sinks"], marked["things"], 7919 * seed + i)
        for name, inside in chosen.items():
            masks.setdefault(name, {})[image] = patches.patches(inside)
    return Groups(known, {**masks})


def _visual_token(layout: ImageLayout) -> torch.Tensor:
    """The visual token that each patch ends in, as `Patches.token`: those of one row of the connector's output."""
    token = torch.full_like(layout.output, -1)
    token[layout.read] = layout.at("output")[layout.read].unique(return_inverse=True)[1]
    return token


def _marked(
    patches: Patches, criterion: str, threshold: float, scenes: drawing.Scenes | None, i: int
) -> dict[str, torch.Tensor]:
    """The visual tokens of each group in picture number i: bool [visual tokens]."""
    scene = scenes[i : i + 1] if scenes is not None and len(patches.norms) == drawing.GRID**2 else None
    marked = of_patches(patches.norms[None], sinks.rule(criterion, threshold), scene, patches.read[None])
    return {group: patches.tokens(mask[0]) for group, mask in marked.items()}


def matched(
    patches: Patches, group: str, inside: torch.Tensor, seed: int, i: int
) -> dict[tuple[str, str], torch.Tensor]:
    """As many other visual tokens of picture number i: (group, which) -> bool [visual tokens].

    `inside` is the group, bool [visual tokens]. The picture's number and the draw's give the seed.
    """
    of = {f"random {draw}": sinks.random_like(inside[None], seed=7919 * (seed + draw) + i)[0] for draw in (1, 2)}
    if group == "sinks":
        of["next in norm"] = sinks.next_in_norm(patches.highest[None], inside[None])[0]
    return {(group, which): chosen for which, chosen in of.items()}


def alike(sink: torch.Tensor, things: torch.Tensor, seed: int) -> dict[tuple[str, str], torch.Tensor]:
    """Sinks on things and as many other tokens on things, drawn at random: bool [visual tokens], given and returned."""
    both = dict(zip(ALIKE, (things & sink, things & ~sink), strict=True))
    number = min(int(mask.sum()) for mask in both.values())
    return {("alike", which): _first(mask, number, seed) for which, mask in both.items()}


def _first(mask: torch.Tensor, number: int, seed: int) -> torch.Tensor:
    """Some of the tokens of a mask, drawn at random: bool [tokens]."""
    drawn = torch.randperm(int(mask.sum()), generator=torch.Generator().manual_seed(seed))[:number]
    return torch.isin(torch.arange(len(mask)), mask.nonzero()[:, 0][drawn])


def in_order(patches: Patches, doses: Sequence[int], seed: int) -> dict[tuple[str, str], torch.Tensor]:
    """The first visual tokens in the order of norms, in a random order, and all: (order, dose) -> bool [tokens]."""
    ranks = {ORDERS[0]: patches.highest.argsort(descending=True)}
    ranks[ORDERS[1]] = torch.randperm(len(patches.highest), generator=torch.Generator().manual_seed(seed))
    tokens = torch.arange(len(patches.highest))
    return {(order, str(dose)): torch.isin(tokens, rank if dose == "all" else rank[:dose])
            for order, rank in ranks.items() for dose in (*doses, "all")}


# ------------------------------------------------------------------------------------------------- what is asked
def draw_questions(
    lvlm: LVLM, images: Mapping[str, Any], scenes: drawing.Scenes | None, prompt: str, *, seed: int = 0, **how: Any
) -> pd.DataFrame:
    """What is asked about each picture, with the answer that counts as right.

    Of the lab two global, two local and two mixed questions, drawn at random; one that is drawn twice counts once.
    About other pictures `prompt`; nobody knows the right answer, so the model's own is what has to stay, and pictures
    for which it has none are left out.

    Args:
        how: further arguments of `evaluate`.

    Returns:
        The rows of `study.questions`, with `draw`.
    """
    drawn = [study.questions(scenes, len(images), prompt, seed + draw).assign(draw=draw)
             for draw in range(1 if scenes is None else 2)]
    asked = pd.concat(drawn, ignore_index=True).drop(columns="image").drop_duplicates(["image_id", "question"])
    asked = asked.assign(id=asked.draw.astype(str) + "-" + asked.id)
    if scenes is not None:
        return asked
    own = evaluate(lvlm, asked, images=images, **how).prediction.to_numpy()
    return asked.assign(answer=own)[own != ""]


# ------------------------------------------------------------------------------------------------- what is taken away
def cuts(found: Groups, of: Sequence[str], ways: Sequence[str]) -> list[Cut]:
    """Each group in each way, and one draw of random tokens; by the mean also its other controls."""
    every = [(way, group, which) for group, which in found.masks if group in of for way in ways
             if way == "mean" or which in ("itself", "random 1")]
    return [cut for cut in every if cut[0] != "shuffle" or _mixes(found.masks[cut[1:]])]


def pairs(found: Groups, least: int) -> list[Cut]:
    """Sinks on things, and others like them, by the mean; none if fewer than `least` pictures have both."""
    enough = (found.tokens("alike", ALIKE[0]) > 0).sum() >= least
    return [("mean", "alike", which) for which in ALIKE] if enough else []


def doses(found: Groups) -> list[Cut]:
    """Every number of tokens, in both orders."""
    return [("dose", order, number) for order, number in found.masks if order in ORDERS]


def _mixes(masks: Masks) -> bool:
    """Can tokens of a group change places: has no picture more than half of them?"""
    sizes = [int(mask.sum()) for mask in masks.values()]
    return 2 * max(sizes) <= sum(sizes)


def removal(cut: Cut, found: Groups, read: Mapping[str, Tokens], seed: int = 0) -> Intervention:
    """A group taken away in one way; its name is the cut.

    Ways are "only" (all other visual tokens removed), "without" (removed), "knockout" (hidden from text), and what
    stands in the place of the tokens: "mean at the input" of the connector, or at its output "mean", "zero", "noise",
    "shuffle"; "dose" is the mean.

    Args:
        read: the tokens of all pictures at the connector's "input" and "output".
    """
    way, group, which = cut
    name, masks = "|".join(cut), found.masks[group, which]
    if way == "only":
        return ablation.hide(name, masks, others=True)
    if way in ("without", "knockout"):
        return ablation.hide(name, masks, visible_to="nobody" if way == "without" else "visual")
    if way == "mean at the input":
        return ablation.replace(name, read["input"], masks)
    return ablation.replace(name, read["output"], masks, "mean" if way == "dose" else way, seed)


def lost(
    lvlm: LVLM,
    asked: pd.DataFrame,
    found: Groups,
    of: Sequence[Cut],
    read: Mapping[str, Tokens],
    *,
    seed: int = 0,
    **how: Any,
) -> pd.DataFrame:
    """What each answer loses when groups are taken away: `right` (points) and `logp` (nats), below zero if lost.

    Args:
        asked: questions with their right answers, as `ablation.scored` takes them.
        of: what is taken away, and how.
        read: as in `removal`.
        how: further arguments of `ablation.scored`.

    Returns:
        A row a question and cut: the columns of `asked`; `what` (the way), `group` and `which` of the cut, where all
        draws are "random"; `tokens`, the visual tokens that were taken; the measures, less those of the untouched
        model. A picture without such tokens says nothing about them and is left out.
    """
    made = {"|".join(cut): cut for cut in of}
    ways = [removal(cut, found, read, seed) for cut in made.values()]
    rows = ablation.effects(ablation.scored(lvlm, asked, ways, **how))
    taken = {name: found.tokens(*cut[1:]) for name, cut in made.items()}
    parts = [(*made[name], taken[name][image]) for name, image in zip(rows.intervention, rows.image_id, strict=True)]
    rows[["what", "group", "which", "tokens"]] = pd.DataFrame(parts, index=rows.index)
    rows["which"] = rows.which.str.replace(r"^random \d+$", "random", regex=True)
    return rows[rows.tokens > 0].drop(columns=["intervention", "prediction"])


# ------------------------------------------------------------------------------------------------- what is compared
def long_by_type(rows: pd.DataFrame, measures: Mapping[str, str]) -> pd.DataFrame:
    """A row a measure: `right` and `logp` become `measure`, named as in `measures`, and `value`.

    Each question is counted in its `type`, and once more in the type "all".
    """
    others = [column for column in rows if column not in measures]
    melted = rows.melt(others, list(measures), var_name="measure").assign(measure=lambda m: m.measure.map(measures))
    return pd.concat([melted, melted.assign(type="all")], ignore_index=True)


def complete(rows: pd.DataFrame, models: Sequence[str]) -> pd.DataFrame:
    """Estimates for every model and group, by the other columns of `rows`; `n` is 0 where nothing was measured."""
    others = rows[[column for column in rows if column not in ("model", "group", "value", "low", "high", "n")]]
    cells = pd.MultiIndex.from_product([models, NAMES], names=["model", "group"]).to_frame(index=False)
    rows = cells.merge(others.drop_duplicates(), how="cross").merge(rows, how="left")
    return rows.fillna({"n": 0}).astype({"n": int})


def worst_family(rows: pd.DataFrame, least: int) -> pd.Series:
    """The family of questions that loses most in the model and group of each row; None if no family is judged.

    Args:
        rows: `value` of questions, with `model`, `group` and `family`, a row a question.
        least: families with fewer questions are not judged.
    """
    worst = {}
    for cell, of in rows.groupby(["model", "group"]):
        mean = of.groupby("family").value.mean()[of.family.value_counts() >= least]
        worst[cell] = None if mean.empty else mean.idxmin()
    return pd.Series([worst[cell] for cell in zip(rows.model, rows.group, strict=True)], rows.index, dtype=object)


def mcnemar(rows: pd.DataFrame, by: Sequence[str], least: int) -> pd.DataFrame:
    """How many answers were lost and gained in each cell, with McNemar's test; one question a picture, the first.

    Args:
        rows: `value` of questions, below zero where the answer is no longer right, with `image_id`.
        by: the columns that name a cell.
        least: cells of fewer pictures are left out.

    Returns:
        `by`, `pictures`, `lost`, `gained`, `p` and, corrected over the table, `holm`.
    """
    found = []
    for cell, of in rows.groupby(list(by), sort=False):
        first = of.drop_duplicates("image_id").value.to_numpy()
        if len(first) >= least:
            p = stats.mcnemar_test(first < 0, first > 0)
            found.append((*cell, len(first), int((first < 0).sum()), int((first > 0).sum()), p))
    table = pd.DataFrame(found, columns=[*by, "pictures", "lost", "gained", "p"])
    return table.assign(holm=stats.holm(table.p.astype(float)))


def sign_flips(differences: pd.DataFrame, by: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """Is the mean difference (`value`) zero in each cell: `by`, `p` of a sign-flip test over pictures, and `p_holm`."""
    found = []
    for cell, of in differences.groupby(list(by), sort=False):
        p = stats.sign_flip_test(of.value, np.zeros(len(of)), clusters=of.image_id, seed=seed)
        found.append((*cell, p))
    table = pd.DataFrame(found, columns=[*by, "p"])
    return table.assign(p_holm=stats.holm(table.p.astype(float)))
