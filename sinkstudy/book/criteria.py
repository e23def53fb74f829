"""Rules for sinks, compared: which patches each takes, and whether what is found of them depends on the rule.

`read_patches` gives what the rules judge by, `rule_masks` their masks. Headline numbers of a mask are ratios or
differences between its patches and the others (`against_others`), changes of answers when they are replaced
(`left_out`), and what probes read from one of them (`probed`). All give tidy rows, of which `book.chapter` makes
estimates.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from sinkstudy import sinks, stats
from sinkstudy.analyses import attribution, probing, relevance
from sinkstudy.answers.evaluate import Intervention
from sinkstudy.book import chapter, report
from sinkstudy.effects import ablation, moving, neurons
from sinkstudy.effects.neurons import Neurons
from sinkstudy.model import capture
from sinkstudy.model.groups import all_read, judged, lifted, mean
from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM

PHI = 20 / 4096**0.5
"""Kang et al. (2503.03321) ask for phi >= 20 where the decoder is 4,096 wide: so much of its largest possible value."""

THRESHOLDS = {"absolute": (3,), "mean_sd": (2, 3, 4), "percentile": (95, 98, 99), "above_median": (2, 3, 5),
              "norm_drop": (1.3, 1.5, 2)}
"""What each rule on norms is tried with; `absolute` in units of the median over all patches of all pictures."""

ATTENDED = (3, 5, 10)
"""How many times uniform attention `sinks.attended` is tried with."""

WORDS = {"absolute": "{}× median of all pictures", "mean_sd": "mean + {} sd", "percentile": "{}th percentile",
         "above_median": "{}× median", "norm_drop": "largest drop ≥ {}×", "attended": "attended {}×",
         "φ": "φ ≥ 0.31 √width"}
"""Each rule as a figure names it."""


# ------------------------------------------------------------------------------------------------- what rules judge by
@dataclass(frozen=True)
class PatchReadings:
    """What rules read of the patches of some pictures, on the CPU in float32."""

    layouts: list[ImageLayout]  # of the pictures, each within its batch
    by_layer: torch.Tensor  # norms [pictures, layers up to the connector's, patches]
    received: torch.Tensor  # [pictures, patches], attention in the tower, in units of uniform attention
    phi: torch.Tensor  # [1 + draws, pictures, visual tokens], see `decoder_phi`

    @property
    def norms(self) -> torch.Tensor:
        """Norms where the connector reads the patches, [pictures, patches]."""
        return self.by_layer[:, -1]

    @property
    def read(self) -> torch.Tensor:
        """Which patches the decoder gets, bool [pictures, patches]; others are padding, and no rule finds them."""
        return all_read(self.layouts)

    @property
    def median(self) -> torch.Tensor:
        """The median norm over these of all pictures."""
        return self.norms[self.read].median()

    @property
    def phi_of_patches(self) -> torch.Tensor:
        """phi of the visual token that reads each patch, [pictures, patches]."""
        return per_patch(self.layouts, self.phi[0])

    def whole(self, mask: torch.Tensor) -> torch.Tensor:
        """All patches of the visual tokens that read a patch of a mask: bool [first pictures, patches]."""
        layouts = self.layouts[: len(mask)]
        return per_patch(layouts, lifted(layouts, mask))

    def others(self, mask: torch.Tensor) -> torch.Tensor:
        """The patches of all other visual tokens: bool [first pictures, patches]."""
        return ~self.whole(mask) & self.read[: len(mask)]


def read_patches(
    lvlm: LVLM,
    pictures: Sequence[Any],
    questions: Sequence[str],
    lit: Sequence[Sequence[int]],
    draws: int = 0,
    batch_size: int = 16,
    seed: int = 0,
) -> PatchReadings:
    """What rules judge by. Attention is the mean over heads and over the layers from the second to the connector's.

    Args:
        pictures: as for `LVLM.inputs`, of one number of patches; with a question each.
        lit, draws, seed: as for `decoder_phi`.
    """
    layouts, phi = decoder_phi(lvlm, pictures, questions, lit, draws, batch_size, seed)
    norms, received, _ = capture.trace_tower(lvlm, pictures, batch_size)
    end = lvlm.feature_layer + 1
    return PatchReadings(layouts, norms[:, :end], received[:, 1:end].mean((1, 2)), phi)


def per_patch(layouts: Sequence[ImageLayout], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """`ImageLayout.lower` of each picture: [visual tokens] each -> [pictures, patches]."""
    return torch.stack([layout.lower(of_picture) for layout, of_picture in zip(layouts, values, strict=True)])


@torch.no_grad()
def lit_dimensions(lvlm: LVLM, picture: Any, question: str) -> list[list[int]]:
    """The dimensions of each decoder layer that the first token of the prompt lights, see `sinks.sink_dimensions`.

    In a causal decoder that token sees only itself, so it is the same in every picture.
    """
    inputs = lvlm.inputs([picture], [question])
    first = int(inputs.attention_mask.argmax(-1))  # behind the padding

    def profile(hidden: torch.Tensor, layer: int) -> torch.Tensor:
        return sinks.rms_normalised(hidden[0, first]).abs().cpu()

    with capture.hidden_states(lvlm, "decoder", profile) as seen:
        lvlm.model(**inputs, logits_to_keep=1)
    return [sinks.sink_dimensions(calls[0]) for calls in seen.values()]


def against_published(name: str, lit: Sequence[Sequence[int]], rows: pd.DataFrame) -> pd.DataFrame:
    """What was published as the dimensions of a model's own sinks, beside those that it lights here.

    Args:
        name: the model's; it is one of the published ones if it has such a one's name in it, in any spelling.
        lit: the dimensions of each decoder layer, of `lit_dimensions`.
        rows: of `data/paper/dimensions.csv`.

    Returns:
        Rows `model`, `source`, `dimension`, `published` (is it?), `layers` (decoder layers from the second on in which
        it is lit) and `of` (how many there are): of all published dimensions, and of those lit in most layers beside
        them. None if nothing was published about the model.
    """
    plain = {known: re.sub(r"[^a-z0-9]", "", known.lower()) for known in (name, *rows.model)}
    own = rows[(rows.row == "LLM-emerged sinks") & rows.model.map(lambda known: plain[known] in plain[name])]
    layers, sources = Counter(d for of_layer in lit[1:] for d in of_layer), ", ".join(own.source.unique())
    known, of = own.value.astype(int).tolist(), len(lit) - 1
    others = [d for d, n in layers.most_common() if 2 * n > of and d not in known] if known else []
    found = [(name, sources, d, d in known, layers[d], of) for d in [*known, *others]]
    return pd.DataFrame(found, columns=["model", "source", "dimension", "published", "layers", "of"])


def published_in_words(found: pd.DataFrame) -> str:
    """`against_published` of all models in a sentence each."""
    said = []
    for model, rows in found.groupby("model", sort=False):
        lit = {is_known: ", ".join(f"{row.dimension} ({row.layers} of {row.of})" for row in of.itertuples())
               for is_known, of in rows.groupby("published")}  # fmt: skip
        said.append(f"Published for {model}, and the decoder layers in which the first token lights it here: "
                    f"{lit[True]}; lit in most layers beside them: {lit.get(False, 'none')}.")
    return " ".join(said) or "No dimensions were published for any of these models."


@torch.no_grad()
def decoder_phi(
    lvlm: LVLM,
    pictures: Sequence[Any],
    questions: Sequence[str],
    lit: Sequence[Sequence[int]],
    draws: int,
    batch_size: int,
    seed: int = 0,
) -> tuple[list[ImageLayout], torch.Tensor]:
    """phi of each visual token as a share of its largest possible value, the root of the width.

    Args:
        lit: the dimensions of each decoder layer, of `lit_dimensions`.
        draws, seed: how often as many dimensions are drawn at random, for comparison.

    Returns:
        The pictures' layouts; and float32 [1 + draws, pictures, visual tokens], by the lit dimensions and then by the
        random ones: the largest value of the decoder layers from the second on.
    """
    width, rng = lvlm.model.config.get_text_config().hidden_size, np.random.default_rng(seed)
    sets = [[own, *(rng.choice(width, len(own), replace=False).tolist() for _ in range(draws))] for own in lit]
    layouts, found = [], []
    for _, inputs in lvlm.batches(pictures, batch_size, questions):
        layouts += (here := lvlm.layout(inputs))
        visual = torch.stack([layout.visual for layout in here]).to(lvlm.device)[..., None]

        def shares(hidden: torch.Tensor, layer: int, visual: torch.Tensor = visual) -> torch.Tensor:
            tokens = hidden.gather(1, visual.to(hidden.device).expand(-1, -1, width))
            return torch.stack([sinks.phi(tokens, own) for own in sets[layer]]).cpu() / width**0.5

        with capture.hidden_states(lvlm, "decoder", shares, layers=range(1, len(sets))) as phi:
            lvlm.model(**inputs, logits_to_keep=1)
        found.append(torch.stack([calls[0] for calls in phi.values()]).amax(0))
    return layouts, torch.cat(found, 1)


# ------------------------------------------------------------------------------------------------- rules
def rule_masks(patches: PatchReadings, median: float, criterion: str, threshold: float) -> dict[str, torch.Tensor]:
    """The mask of every rule, bool [pictures, patches], by its name and threshold, "above_median 3".

    Args:
        median: the norm that is usual in the model, over all patches of all pictures, in units of which `absolute` is.
        criterion, threshold: of a further rule of `sinks.NORM_CRITERIA`, the run's, if it is not among them.
    """
    found, read = {}, patches.read
    for rule, thresholds in THRESHOLDS.items():
        unit = median if rule == "absolute" else 1
        for value in thresholds:
            found[f"{rule} {value:g}"] = judged(sinks.rule(rule, value * unit), patches.norms, read)
    found[f"{criterion} {threshold:g}"] = judged(sinks.rule(criterion, threshold), patches.norms, read)
    for factor in ATTENDED:
        found[f"attended {factor}"] = sinks.attended(patches.received, 1.0, factor) & read
    return found | {"φ": (patches.phi_of_patches >= PHI) & read}


def rule_label(rule: str) -> str:
    """A rule as a figure names it: "above_median 3" -> "3× median"."""
    name, _, threshold = rule.partition(" ")
    return WORDS[name].format(threshold)


def by_id(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """A mask [pictures, patches] by the id of each picture, its place as text."""
    return {str(i): own for i, own in enumerate(mask)}


def per_picture(values: torch.Tensor, **columns: Any) -> pd.DataFrame:
    """A number a picture, [pictures], as rows: `columns`, `image_id`, `value`."""
    return pd.DataFrame({**columns, "image_id": range(len(values)), "value": values.double().numpy()})


# ------------------------------------------------------------------------------------------------- headline numbers
def quantities(
    lvlm: LVLM, pictures: Sequence[Any], questions: Sequence[str], max_new_tokens: int, batch_size: int = 16
) -> dict[str, torch.Tensor]:
    """Three numbers of each patch, float32 [pictures, patches].

    - "attention": from the answer's tokens to the visual token that reads it, mean over decoder layers and heads;
    - "attribution": `|gradient x activation|` of that token, for the first token of the model's answer;
    - "spread": mean distance of the patches of the tower that attend to it, in patches, see `relevance.spread`; mean
      over heads and over the layers from the second to the connector's.
    """
    trace = capture.trace(lvlm, pictures, questions, max_new_tokens, batch_size)
    spread = relevance.measure(lvlm, pictures, batch_size=batch_size).columns["spread"]
    f = attribution.first_of_answer(lvlm, pictures, questions, batch_size)
    gradients = attribution.gradient_x_activation(f, batch_size=batch_size)
    return {"attention": per_patch(trace.layouts, trace.output_attention.mean((1, 2))),
            "attribution": per_patch(f.layouts, gradients.abs()),
            "spread": spread[:, 1 : lvlm.feature_layer + 1].nanmean((1, 2))}


def against_others(
    patches: PatchReadings, numbers: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor], seed: int = 0
) -> pd.DataFrame:
    """What the patches of each rule (`rule_masks`) have over others in `quantities`: ratios; of "spread" differences.

    What the decoder does, it does to visual tokens: "attention" and "attribution" are over whole tokens.

    Returns:
        Estimates: `rule`, `headline`, `value`, `low`, `high`, `n`. A rule that finds nothing has no rows.
    """
    rows = []
    for rule, mask in masks.items():
        for headline, values in numbers.items() if mask.any() else ():
            own = mask if headline == "spread" else patches.whole(mask)
            inside, outside = mean(values, own), mean(values, ~own & patches.read)
            found = (stats.difference_interval(inside, outside, missing="drop", seed=seed) if headline == "spread"
                     else stats.ratio_interval(inside, outside, missing="drop"))
            rows.append((rule, headline, *found))
    return pd.DataFrame(rows, columns=["rule", "headline", "value", "low", "high", "n"])


def left_out(
    lvlm: LVLM,
    asked: pd.DataFrame,
    images: Mapping[str, Any],
    patches: PatchReadings,
    masks: Mapping[str, torch.Tensor],
    seed: int = 0,
    **how: Any,
) -> pd.DataFrame:
    """Changes of answers when the patches of each rule, or as many random others, become the mean visual token.

    Args:
        asked: questions about the first pictures, as for `answer_changes`.
        images: all pictures by id, over which the mean is taken.
        masks: of `rule_masks`; those that find the same patches share an intervention.
        how: further arguments of `evaluate`.

    Returns:
        The rows of `answer_changes`, with `rule`, and `way`: "group" or "random". A rule that finds nothing has none.
    """
    tokens = ablation.read_tokens(lvlm, images, batch_size=how.get("batch_size", 16))
    first, of, ways = {}, {}, []  # the first rule that finds some patches; that of each rule
    for rule in masks:
        mask = masks[rule][: asked.image_id.nunique()]
        if not mask.any():
            continue
        of[rule] = first.setdefault(mask.numpy().tobytes(), rule)
        if of[rule] == rule:
            drawn = sinks.random_like(mask, seed, among=patches.others(mask))
            ways += [ablation.replace(f"group {rule}", tokens, by_id(mask)),
                     ablation.replace(f"random {rule}", tokens, by_id(drawn))]
    said = answer_changes(lvlm, asked, ways, images=images, **how)
    said[["way", "of"]] = said.intervention.str.split(n=1, expand=True).reindex(columns=[0, 1])  # also of no row
    return said.merge(pd.DataFrame(of.items(), columns=["rule", "of"]), on="of")


def answer_changes(lvlm: LVLM, asked: pd.DataFrame, ways: Sequence[Intervention], **how: Any) -> pd.DataFrame:
    """What interventions change in the answers: `accuracy` in points, and `logp` of the right answer in nats.

    Args:
        asked: as `ablation.scored` takes it. Where right answers are not known, every value is NaN.
        how: further arguments of `evaluate`.

    Returns:
        A row a question and measure: `intervention`, `id`, `image_id`, `measure`, `value`.
    """
    if asked.answer.notna().all() and ways:
        said = ablation.effects(ablation.scored(lvlm, asked, ways, **how))
    else:
        named = pd.DataFrame({"intervention": [way.name for way in ways]}, dtype=str)
        said = named.merge(asked, how="cross").assign(right=float("nan"), logp=float("nan"))
    said = said.rename(columns={"right": "accuracy"})
    return said.melt(["intervention", "id", "image_id"], ["accuracy", "logp"], "measure")


# ------------------------------------------------------------------------------------------------- probes
@dataclass(frozen=True)
class ProbeSide:
    """Pictures on which probes are fitted, or judged."""

    patches: PatchReadings
    tokens: torch.Tensor  # [pictures, patches, width], where the connector reads them
    masks: Mapping[str, torch.Tensor]  # of `rule_masks`
    facts: Mapping[str, torch.Tensor]  # of `content.of_pictures`


def entering(lvlm: LVLM, images: Mapping[str, Any], batch_size: int = 16) -> torch.Tensor:
    """The vectors of patches where the connector reads them: float32 [pictures, patches, width]."""
    read = ablation.read_tokens(lvlm, images, "input", batch_size)
    return torch.stack([of_layer[lvlm.feature_layer] for of_layer in read.of.values()]).float()


def probed(fit: ProbeSide, judged: ProbeSide, draws: int, seed: int = 0) -> pd.DataFrame:
    """What a probe reads from one patch of a rule, less what one reads from a random patch outside it.

    A random patch of each picture stands for the group, and `draws` others for the rest; each gets probes of its own.

    Returns:
        Rows `rule`, `image_id`, `value`: the difference, in points, of the share of facts that are read rightly; NaN
        where a picture has no such patch, or where fewer than `probing.LEAST` have one to fit on.
    """
    rows, same = [], {}
    for rule, mask in judged.masks.items():
        key = mask.numpy().tobytes() + fit.masks[rule].numpy().tobytes()  # rules may find the same patches
        if key not in same:
            own = _read_rightly(fit, judged, fit.masks[rule], mask, 1000 * seed)
            to_fit, to_judge = (side.patches.others(m) & m.any(1, keepdim=True)
                                for side, m in ((fit, fit.masks[rule]), (judged, mask)))
            random = [_read_rightly(fit, judged, to_fit, to_judge, 1000 * seed + draw) for draw in range(1, draws + 1)]
            same[key] = torch.tensor(own - np.mean(random, axis=0))
        rows.append(per_picture(same[key], rule=rule))
    return pd.concat(rows)


def _read_rightly(
    fit: ProbeSide, judged: ProbeSide, fit_mask: torch.Tensor, mask: torch.Tensor, draw: int
) -> np.ndarray:
    """Share of facts, in %, that probes read from one patch of a group in each picture: [pictures judged]."""
    to_fit, to_judge = one_vector(fit.tokens, fit_mask, draw), one_vector(judged.tokens, mask, draw)
    fitted, there = to_fit.isfinite().all(1), to_judge.isfinite().all(1)
    share = np.full(len(to_judge), np.nan)
    if fitted.sum() >= probing.LEAST and there.any():
        probe = probing.Ridge(to_fit[fitted])
        hits = [probe.classify(fit.facts[what][fitted], to_judge[there]) == of[there]
                for what, of in judged.facts.items()]
        share[there] = 100 * torch.stack(hits).double().mean(0).numpy()
    return share


def one_vector(tokens: torch.Tensor, mask: torch.Tensor, draw: int) -> torch.Tensor:
    """The vector of one patch of a group in each picture, drawn at random; NaN where there is none.

    [pictures, patches, width], bool [pictures, patches] -> [pictures, width].
    """
    chosen = sinks.one_of(mask, torch.Generator().manual_seed(draw))
    return tokens[torch.arange(len(tokens)), chosen].masked_fill(chosen[:, None] < 0, float("nan"))


# ------------------------------------------------------------------------------------------------- lit dimensions
def flagged(phi: torch.Tensor, thresholds: Sequence[float]) -> pd.DataFrame:
    """Share of each picture's visual tokens that phi takes, in %.

    Args:
        phi: [1 + draws, pictures, visual tokens], of `decoder_phi`; for random dimensions the mean over draws.

    Returns:
        Rows `threshold`, `dimensions` ("lit by the first token" or "random"), `image_id`, `value`.
    """
    rows = []
    for at in thresholds:
        share = 100 * (phi >= at).float().mean(-1)  # [1 + draws, pictures]
        rows.append(per_picture(share[0], threshold=at, dimensions="lit by the first token"))
        rows.append(per_picture(share[1:].mean(0), threshold=at, dimensions="random"))
    return pd.concat(rows, ignore_index=True)


def flagged_of(
    patches: PatchReadings, groups: Mapping[str, torch.Tensor], lit: Sequence[Sequence[int]]
) -> pd.DataFrame:
    """Share of tokens that phi takes at the threshold `PHI`, in %, of all visual tokens and of groups of patches.

    Args:
        groups: bool [pictures, patches]; a patch counts if the visual token that reads it does.
        lit: of `lit_dimensions`. Where none is lit from the second layer on the rule has no object: all is NaN.

    Returns:
        Rows `group` ("all", "all, by random dimensions", and those of `groups`), `image_id`, `value`.
    """
    named = {"lit by the first token": "all", "random": "all, by random dimensions"}
    whole = flagged(patches.phi, [PHI])
    rows = [whole.assign(group=whole.dimensions.map(named))[["group", "image_id", "value"]]]
    there = (patches.phi_of_patches >= PHI).float()
    rows += [per_picture(100 * mean(there, mask), group=group) for group, mask in groups.items()]
    found = pd.concat(rows, ignore_index=True)
    return found if any(lit[1:]) else found.assign(value=float("nan"))


# ------------------------------------------------------------------------------------------------- verdicts
def with_verdicts(rows: pd.DataFrame, without_effect: Mapping[str, float]) -> pd.DataFrame:
    """Estimates with `verdict`: is the whole interval above or below the value without effect of its `headline`?"""
    verdict = [report.phrase(stats.Interval(row.value, row.low, row.high, row.n), without_effect[row.headline],
                             "above", "below", "unclear", "none") for row in rows.itertuples()]
    return rows.assign(verdict=verdict)


def agreeing(rows: pd.DataFrame, rule: str) -> pd.DataFrame:
    """How many of the other rules that find any patch reach the verdict of `rule`, in %.

    Args:
        rows: of `with_verdicts`, with `model` and `rule`.

    Returns:
        `model`, `headline`, `value`, `low`, `high` (NaN: rules are no sample), `n` (rules); without value, and `n` 0,
        where `rule` itself finds nothing.
    """
    found = []
    for (model, headline), of in rows.groupby(["model", "headline"], sort=False):
        own, others = of[(of.rule == rule) & (of.n > 0)], of[(of.rule != rule) & (of.n > 0)]
        there = len(own) and len(others)
        share = 100 * (others.verdict == own.verdict.iloc[0]).mean() if there else float("nan")
        found.append((model, headline, share, float("nan"), float("nan"), len(others) if len(own) else 0))
    return pd.DataFrame(found, columns=["model", "headline", "value", "low", "high", "n"])


# ------------------------------------------------------------------------------------------------- neurons, dimensions
def judged_by(mask: torch.Tensor, norms: torch.Tensor, found: int, tried: Sequence[int]) -> tuple[str, torch.Tensor]:
    """The group by which neurons are found: sinks, or the 2 % of highest norm of each picture in their place.

    Args:
        mask: sinks, bool [pictures, patches].
        norms: float [pictures, patches].
        found, tried: on the first `found` pictures neurons are found, on `tried` they are tried. Both need sinks.
    """
    if mask[:found].any() and mask[list(tried)].any():
        return "sinks", mask
    return "top 2 %", sinks.percentile(norms, 98)


def group_norms(norms: Mapping[str, torch.Tensor], mask: torch.Tensor) -> pd.DataFrame:
    """Mean norm of a group's patches in each picture under each intervention.

    Args:
        norms: [pictures, patches] by the intervention's name, of `neurons.norms_under`; "none" is among them.
        mask: the group, bool [pictures, patches].

    Returns:
        Rows `intervention`, `image_id` (the picture's place), `measure` ("norm_ratio"), `value` (the norm), `before`
        (the norm under "none"). NaN where a picture has none of the group.
    """
    before = mean(norms["none"], mask).numpy()
    rows = [per_picture(mean(of, mask), intervention=name, measure="norm_ratio").assign(before=before)
            for name, of in norms.items() if name != "none"]
    return pd.concat(rows, ignore_index=True)


def silencing(
    lvlm: LVLM, found: Mapping[int, Neurons], drawn: Mapping[int, Neurons], moved: Sequence[int]
) -> list[Intervention]:
    """Neurons, by their number, silenced ("found 10"), as many random ones ("random 10"), and those of some numbers
    moved to a register ("moved 10") where the tower takes one.
    """
    ways = [neurons.silence(f"{way} {n}", of[n]) for way, of in (("found", found), ("random", drawn)) for n in of]
    return ways + [to_register(f"moved {n}", found[n]) for n in moved if neurons.takes_register(lvlm)]


def to_register(name: str, own: Neurons) -> Intervention:
    """Neurons moved to a test-time register that is not passed on, see `moving.registered`."""
    return moving.intervention(name, moving.registered, neurons={layer: of.tolist() for layer, of in own.items()})


def effect_sizes(rows: pd.DataFrame, by: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """Estimates from `group_norms`, ratios of means, after over before, and from `answer_changes`, means.

    Returns:
        `by`, `measure` ("norm_ratio", "accuracy", "logp"), `value`, `low`, `high`, `n`.
    """
    norm, by = rows.measure == "norm_ratio", [*by, "measure"]
    left = chapter.ratios(rows[norm], by, "value", "before", images="image_id")
    return pd.concat([left, chapter.estimates(rows[~norm], by, seed=seed)], ignore_index=True)


def at_places(
    lvlm: LVLM,
    pictures: Mapping[str, Any],
    ways: Sequence[Intervention],
    places: torch.Tensor,
    behind: Sequence[int],
    batch_size: int,
) -> pd.DataFrame:
    """Norm of some patches, and the attention that they receive in the tower, under each intervention.

    Args:
        ways: interventions that add no token to the tower.
        places: bool [pictures, patches].
        behind: the layers of the tower over which attention is averaged.

    Returns:
        Rows `intervention`, `measure` ("norm / median", at the connector's input, in units of the median of the
        picture's patches; "attention received", in units of uniform attention), `image_id`, `value`.
    """
    norms, rows = neurons.norms_under(lvlm, pictures, ways, batch_size), []
    for way in ways:
        over_median = mean(norms[way.name], places) / norms[way.name].quantile(0.5, dim=-1)
        received = mean(neurons.received_under(lvlm, pictures, way, behind, batch_size), places)
        rows.append(per_picture(over_median, intervention=way.name, measure="norm / median"))
        rows.append(per_picture(received, intervention=way.name, measure="attention received"))
    return pd.concat(rows, ignore_index=True)


def stand_out(tokens: torch.Tensor, mask: torch.Tensor) -> tuple[list[int], pd.Series]:
    """Dimensions that a group of patches lights and the others do not, and the shape of the group's profile.

    Args:
        tokens: [pictures, patches, width], where the connector reads them.
        mask: the group, bool [pictures, patches].

    Returns:
        The dimensions, strongest first; and `lit` (their number), `largest_over_median` (of the profile,
        `sinks.dimension_profile`), `share_of_strongest` (of the profile's energy, in %), and `cosine`, the mean over
        pairs of two tokens of the group, over all pictures.
    """
    profile, others = (sinks.dimension_profile(tokens, m) for m in (mask, ~mask))
    lit = [d for d in sinks.sink_dimensions(profile) if d not in sinks.sink_dimensions(others)]
    directions = torch.nn.functional.normalize(tokens[mask], dim=-1)
    n = len(directions)
    cosine = (directions.sum(0).square().sum() - n) / (n * (n - 1))
    shape = {"lit": len(lit), "largest_over_median": (profile.max() / profile.median()).item(),
             "share_of_strongest": 100 * (profile.max() ** 2 / profile.square().sum()).item(), "cosine": cosine.item()}
    return lit, pd.Series(shape)


def with_dimensions_set(
    tokens: torch.Tensor, mask: torch.Tensor, dimensions: Sequence[int], values: torch.Tensor
) -> torch.Tensor:
    """Norms [pictures, patches] after some dimensions of a group's tokens were set to entries of `values`, [width]."""
    new = tokens.clone()
    own = new[mask]
    own[:, list(dimensions)] = values[list(dimensions)]
    new[mask] = own
    return new.norm(dim=-1)


# ------------------------------------------------------------------------------------------------- figures
VERDICT_LOOKS = {"above": ("+", "#e08214", "above no effect"), "below": ("−", "#8073ac", "below"),
                 "unclear": ("·", "#c4c4c4", "not clearly either")}
"""Sign, colour and words of each verdict in the figure; none of the colours is that of a group or model."""


def verdict_tiles(rows: pd.DataFrame, headlines: Sequence[str], marked: str) -> mpl.figure.Figure:
    """Verdicts as tiles: a panel a model, a row a rule, a column a headline number. A rule without patches has none.

    Args:
        rows: of `with_verdicts`. The values of the headline "patches" stand as numbers in place of tiles.
        headlines: the columns, in order.
        marked: the rule whose row is framed.
    """
    order, models = list(dict.fromkeys(rows.rule)), list(dict.fromkeys(rows.model))
    size = (1.9 + 1.75 * len(models), 2.2 + 0.26 * len(order))
    fig, axes = plt.subplots(1, len(models), figsize=size, sharey=True, squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        of = rows[(rows.model == model) & (rows.n > 0) & rows.headline.isin(headlines)]
        for row in of.itertuples():
            x, y = headlines.index(row.headline), order.index(row.rule)
            text = f"{row.value:.1f}" if 0 < row.value < 9.95 else f"{row.value:.0f}"
            if row.headline != "patches":
                text, colour, _ = VERDICT_LOOKS[row.verdict]
                ax.add_patch(plt.Rectangle((x - 0.45, y - 0.42), 0.9, 0.84, fc=colour))
            ax.text(x, y, text, ha="center", va="center", fontsize=9,
                    color=report.INK if row.headline == "patches" else "#1a1a1a")
        ax.add_patch(plt.Rectangle((-0.5, order.index(marked) - 0.5), len(headlines), 1, fill=False, ec=report.INK,
                                   lw=1.4, clip_on=False))
        ax.set(title=model, xlim=(-0.5, len(headlines) - 0.5), ylim=(len(order) - 0.5, -0.5),
               yticks=range(len(order)), yticklabels=map(rule_label, order), xticks=range(len(headlines)))
        ax.set_xticklabels(headlines, rotation=60, ha="right", rotation_mode="anchor")
        ax.tick_params(labelsize=9, length=0)
        ax.spines[:].set_visible(False)
    handles = [mpl.patches.Patch(fc=colour, label=f"{sign}  {what}") for sign, colour, what in VERDICT_LOOKS.values()]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return fig


def dose(
    rows: pd.DataFrame, x: str, line: str, looks: Mapping[str, tuple[str, str]], measures: Mapping[str, str], label: str
) -> mpl.figure.Figure:
    """Lines of estimates against how much was changed: a column a model, a row a measure. Lines stand a little apart.

    Args:
        rows: estimates with `model`, `group`, `measure`, `x` and `line`.
        looks: colour and marker of each value of `line`; without a colour a line takes that of the model's group.
        measures: the label of each measure that is drawn.
        label: of the x axis.
    """
    models = list(dict.fromkeys(rows.model))
    fig, axes = plt.subplots(len(measures), len(models), figsize=(1.2 + 1.9 * len(models), 0.9 + 1.6 * len(measures)),
                             sharex="col", sharey="row", squeeze=False)
    for (measure, what), row_of_axes in zip(measures.items(), axes, strict=True):
        row_of_axes[0].set_ylabel(what)
        for ax, model in zip(row_of_axes, models, strict=True):
            of = rows[(rows.model == model) & (rows.measure == measure)]
            for i, (name, (colour, marker)) in enumerate(looks.items()):
                own = of[of[line] == name].sort_values(x)
                half = np.clip([own.value - own.low, own.high - own.value], 0, None)
                ax.errorbar(own[x] * 1.1 ** (i - 1), own.value, yerr=half, marker=marker, ms=4, lw=1.2,
                            color=colour or chapter.colour(of.group.iloc[0]), mfc="none" if marker == "s" else None)
            ax.axhline(float(measure == "norm_ratio"), ls=":", color=report.INK)
            ax.set_xscale("log")
            ax.set_xticks(sorted(set(of[x])), sorted(set(of[x])), fontsize=9)
            ax.minorticks_off()
    for ax, model in zip(axes[0], models, strict=True):
        ax.set_title(f"{model}\n{rows[rows.model == model].group.iloc[0]}", fontsize="medium")
    axes[-1, len(models) // 2].set_xlabel(label)
    handles = [mpl.lines.Line2D([], [], color=colour or report.INK, marker=marker, label=name,
                                mfc="none" if marker == "s" else None) for name, (colour, marker) in looks.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(looks))
    return fig
