"""From the tower into the language model: which visual tokens it looks at, and what its layers hold of them.

Luo et al. (2510.08510) say that sinks of the vision tower *propagate* into the decoder and that others *emerge* there.
`token_groups` names the visual tokens of each picture, `contrast` sets the tokens of a group against the other patches,
`look_inside` follows one question a picture through the decoder's layers, `decoder_sinks` and `fates` say where a
token is a sink. Tables are long, a row a measured value; `chapter.ratios` makes estimates of them.

A *visual token* is a patch, or several where the connector merges them. Tokens without a patch (newlines) belong to no
group and are no "other patches" either.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from sinkstudy import sinks
from sinkstudy.model import capture
from sinkstudy.model.groups import all_read, lifted, mean, median, of_patches
from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM
from sinkstudy.world import drawing

CONTRASTED = ("sinks", "random", "next in norm", "top 2 %", "calm patches")  # those that are set against other patches
SINK_CONTROLS = ("random", "next in norm")  # as many tokens as there are sinks, none of them a sink
DECODER_RULES = ("attention", "norm", "dimensions")  # what makes a visual token a sink of the decoder
FATES = ("propagated", "emerged", "stopped", "ordinary")  # of `sinks.kinds`


# --- groups of visual tokens ---


@dataclass(frozen=True)
class TokenGroups:
    """Which visual tokens of each picture are what."""

    norms: torch.Tensor  # [images, visual tokens], norm in the tower over the picture's median; NaN without a patch
    masks: dict[str, torch.Tensor]  # bool [images, visual tokens] by group
    things: torch.Tensor | None  # bool, tokens with a thing on them; None if the pictures are not the lab's

    @property
    def patches(self) -> torch.Tensor:
        """Tokens that hold a patch: bool [images, visual tokens]."""
        return self.norms.isfinite()

    @property
    def marked(self) -> str:
        """The group to look at: the sinks, or where no picture has one the top 2 %."""
        return "sinks" if self.masks["sinks"].any() else "top 2 %"


def token_groups(
    norms: torch.Tensor,
    layouts: Sequence[ImageLayout],
    scenes: drawing.Scenes | None,
    *,
    criterion: str,
    threshold: float,
    seed: int = 0,
) -> TokenGroups:
    """The sinks of the tower, their controls and other groups, as masks of visual tokens.

    Args:
        norms: [images, patches], at the connector's input.
        scenes: the lab's, which know calm patches and things; used where the model cuts them into the same patches.
        criterion, threshold: what makes a patch a sink; see `sinks.rule`. A token is one if any of its patches is.

    Raises:
        ValueError: as `sinks.rule`.
    """
    if (layouts[0].tiles, *layouts[0].grid) != (1, drawing.GRID, drawing.GRID):
        scenes = None
    read = all_read(layouts)
    relative = lifted(layouts, norms / median(norms, read), "max")
    chosen = of_patches(norms, sinks.rule(criterion, threshold), scenes, read)
    of = {group: lifted(layouts, mask) for group, mask in chosen.items()}
    sink, patches = of["sinks"], relative.isfinite()
    masks = {
        "sinks": sink,
        "random": sinks.random_like(sink, seed, among=patches),
        "next in norm": sinks.next_in_norm(relative, sink, among=patches),
        "top 2 %": of["top 2 %"],
        "others": ~sink & patches,
    }
    if scenes is None:
        return TokenGroups(relative, masks, None)
    things = lifted(layouts, scenes.thing_share.flatten(1) > 0)
    return TokenGroups(relative, masks | {"calm patches": of["calm"]}, things)


def sizes(groups: TokenGroups) -> pd.DataFrame:
    """Tokens of each of `CONTRASTED` in a picture, and their mean norm: `group`, `image`, `tokens`, `norm`."""
    parts = [pd.DataFrame({"group": group, "image": range(len(mask)), "tokens": mask.sum(1),
                           "norm": mean(groups.norms, mask)})
             for group, mask in groups.masks.items() if group in CONTRASTED]
    return pd.concat(parts, ignore_index=True)


# --- a group against the other patches ---


def mean_by_image(values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Mean over the questions of a picture, whose index is `image`: [rows, tokens], long [rows] -> [images, tokens]."""
    total = torch.zeros(int(image.max()) + 1, values.shape[1]).index_add_(0, image, values)
    return total / torch.bincount(image)[:, None]


def contrast(values: torch.Tensor, groups: TokenGroups, rows: pd.DataFrame, first: int = 1) -> pd.DataFrame:
    """Mean over the tokens of each of `CONTRASTED`, and over all other patches of the picture, layer by layer.

    What a control is set against are the other patches that are no sinks, as it has none.

    Args:
        values: [rows, layers, visual tokens].
        rows: what the rows are; `image` is the index of the picture.
        first: the number of the first layer.

    Returns:
        A row for each group, row and layer: the columns of `rows`, `group`, `layer`, `inside` and `outside` (in the
        unit of `values`; NaN where the group is empty).
    """
    layers, image = values.shape[1], torch.tensor(rows.image.to_numpy())
    repeated = rows.loc[rows.index.repeat(layers)].assign(layer=np.tile(np.arange(first, first + layers), len(rows)))
    parts = []
    for group in CONTRASTED:
        if group in groups.masks:
            mask = groups.masks[group]
            others = (groups.masks["others"] if group in SINK_CONTROLS else groups.patches) & ~mask
            means = [mean(values, of[image, None]).flatten().numpy() for of in (mask, others)]
            parts.append(repeated.assign(group=group, inside=means[0], outside=means[1]))
    return pd.concat(parts, ignore_index=True)


def by_head(attention: torch.Tensor, groups: TokenGroups, image: torch.Tensor) -> pd.DataFrame:
    """How many times the attention of the other patches the marked group draws: `layer`, `head` (from 1) and `ratio`.

    Args:
        attention: [rows, layers, heads, visual tokens].
        image: long [rows], the image of each row. Pictures without the group are left out.
    """
    mask = groups.masks[groups.marked][image][:, None, None]
    others = groups.patches[image][:, None, None] & ~mask
    kept = mask.any(-1)[:, 0, 0]
    ratio = mean(attention, mask)[kept].mean(0) / mean(attention, others)[kept].mean(0)  # [layers, heads]
    layer, head = (of.flatten() + 1 for of in np.indices(ratio.shape))
    return pd.DataFrame({"layer": layer, "head": head, "ratio": ratio.flatten()})


# --- inside the decoder ---


@dataclass(frozen=True)
class Inside:
    """What `look_inside` saw, on the CPU in float32."""

    received: torch.Tensor  # [images, layers, visual tokens], attention from all later tokens; 1: uniform attention
    phi: torch.Tensor  # the same shape, in the dimensions that the first token lights; 1: as bright as it
    to_first: torch.Tensor  # [images, layers, heads], share of the last prompt token's attention on the first token
    to_visual: torch.Tensor  # the same, on all visual tokens together
    profiles: dict[str, torch.Tensor]  # [layers, width] by group, mean |RMSNorm(x)|; also that of the "first token"


def look_inside(
    lvlm: LVLM, images: Sequence[Any], questions: Sequence[str], masks: Mapping[str, torch.Tensor], batch_size: int = 16
) -> Inside:
    """One prefill a picture: what the decoder's layers hold of groups of visual tokens, and whom they attend to.

    Args:
        masks: bool [images, visual tokens] by group.

    Raises:
        ValueError: as `LVLM.visual_positions`.
    """
    parts = []
    for of, inputs in lvlm.batches(images, batch_size, questions):
        parts.append(_look(lvlm, inputs, {group: mask[of] for group, mask in masks.items()}))

    def joined(name: str) -> torch.Tensor:
        return torch.cat([part[name] for part in parts])

    profiles = {group: sum(part[group] for part in parts) / mask.sum() for group, mask in masks.items()}
    profiles["first token"] = joined("first").mean(0)
    return Inside(joined("received"), joined("phi"), joined("to_first"), joined("to_visual"), profiles)


@torch.no_grad()
def _look(lvlm: LVLM, inputs: Any, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One batch: the fields of `Inside`, `first` [batch, layers, width], and sums of profiles by group."""
    visual = lvlm.visual_positions(inputs.input_ids).cpu()  # [batch, visual tokens]
    begin = inputs.attention_mask.argmax(-1).cpu()  # place of the first token, which is BOS where the model has one
    here = torch.arange(len(begin))

    def of_states(hidden: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        light = sinks.rms_normalised(hidden).abs()
        tokens = light[here[:, None], visual]  # [batch, visual tokens, width]
        first = light[here, begin]  # [batch, width]
        sums = {group: torch.einsum("btw,bt->w", tokens, mask.to(tokens)).cpu() for group, mask in masks.items()}
        return {"first": first.cpu(), "phi": _relative_phi(tokens, first).cpu(), **sums}

    def of_last(weights: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:  # [batch, heads, 1, keys]
        weights = weights[:, :, 0].cpu()
        columns = visual[:, None].expand(-1, weights.shape[1], -1)
        return {"to_first": weights[here, :, begin], "to_visual": weights.gather(-1, columns).sum(-1)}

    with (
        capture.hidden_states(lvlm, "decoder", of_states) as states,
        capture.attention_rows(lvlm, "decoder", of_last) as last,
        capture.attention_received(lvlm, "decoder", relative=True) as received,
    ):
        lvlm.model(**inputs, logits_to_keep=1)
    alpha = torch.stack([calls[0].mean(1).cpu() for calls in received.values()], 1)  # [batch, layers, keys]
    alpha = alpha.gather(-1, visual[:, None].expand(-1, alpha.shape[1], -1))
    return {"received": alpha, **_by_layer(states, masks), **_by_layer(last)}


def _relative_phi(tokens: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """phi of tokens over that of the first token, in the dimensions that it lights; 0 if it lights none.

    |RMSNorm(x)|, [batch, tokens, width] and [batch, width] -> [batch, tokens]. In a causal
    decoder the first token sees itself only and is the same in every picture; where a prompt sees itself it is not.
    """
    of = []
    for own, one in zip(tokens, first, strict=True):
        dimensions = sinks.sink_dimensions(one.cpu())
        of.append(own[:, dimensions].amax(-1) / one[dimensions].amax() if dimensions else torch.zeros_like(own[:, 0]))
    return torch.stack(of)


def _by_layer(calls: Mapping[int, list], sums: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """Layers side by side: [batch, layers, ..], or [layers, ..] of what has no batch."""
    of_layers = [of[0] for of in calls.values()]
    return {name: torch.stack([of[name] for of in of_layers], 0 if name in sums else 1) for name in of_layers[0]}


# --- lit dimensions ---


def lit_table(profiles: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """Which dimensions each group lights after each layer, by `sinks.sink_dimensions`.

    Args:
        profiles: [layers, width] by group, of `look_inside`.

    Returns:
        `group`, `layer` (from 1), `largest_over_median` of the profile, `dimensions` (numbers with blanks between).
    """
    rows = []
    for group, of_layers in profiles.items():
        for layer, profile in enumerate(of_layers, 1):
            found = sinks.sink_dimensions(profile) if profile.isfinite().all() else []
            rows.append({"group": group, "layer": layer, "largest_over_median": sinks.max_median_ratio(profile).item(),
                         "dimensions": " ".join(map(str, sorted(found)))})
    return pd.DataFrame(rows)


def sharpest(profiles: Mapping[str, torch.Tensor], group: str) -> int:
    """The layer, from 0, in which the largest dimension of a group's profile is most above its median."""
    return int(sinks.max_median_ratio(profiles[group]).argmax())


def lit_by(profiles: Mapping[str, torch.Tensor], group: str, layer: int) -> dict[str, Any]:
    """What a group lights in a layer that ordinary patches do not: the cells of a row of a table.

    Raises:
        KeyError: the profiles of the "first token", of "others" or of the group are not there.
    """
    of = {name: profiles[name][layer] for name in (group, "others", "first token")}
    lit = {name: set(sinks.sink_dimensions(profile)) for name, profile in of.items()}
    own = lit[group] - lit["others"]
    return {
        "group": group,
        "layer": layer + 1,
        **{f"peak, {'group' if name == group else name}": sinks.max_median_ratio(of[name]).item() for name in of},
        "lit": len(own),
        "also by first token": len(own & lit["first token"]),
        "twice others": int((of[group] >= 2 * of["others"]).sum()),
    }


# --- dimensions over a training ---


def light(lvlm: LVLM, images: Sequence[Any], questions: Sequence[str], batch_size: int) -> torch.Tensor:
    """`|RMSNorm(x)|` of visual tokens after every decoder layer, on the CPU: [images, layers, visual tokens, width].

    For models of the lab's size: it keeps all of them. There is one question for each picture.
    """

    def of_visual(hidden: torch.Tensor, layer: int) -> torch.Tensor:
        return sinks.rms_normalised(hidden[here, visual]).abs().cpu()

    parts = []
    with torch.no_grad(), capture.hidden_states(lvlm, "decoder", of_visual) as states:
        for _, inputs in lvlm.batches(images, batch_size, questions):
            visual = lvlm.visual_positions(inputs.input_ids)
            here = torch.arange(len(visual), device=visual.device)[:, None]
            lvlm.model(**inputs, logits_to_keep=1)
            parts.append(torch.stack([calls.pop() for calls in states.values()], 1))
    return torch.cat(parts)


def excess(light: torch.Tensor, mask: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """How far each dimension is lit by a group and not by others: the median over its tokens less that over theirs.

    Args:
        light: [images, layers, visual tokens, width].
        mask, others: bool [images, visual tokens]; tokens of all pictures together.

    Returns:
        Float [layers, width].
    """
    of_layers = light.transpose(0, 1)  # [layers, images, visual tokens, width]
    return torch.stack([of[mask].quantile(0.5, dim=0) - of[others].quantile(0.5, dim=0) for of in of_layers])


def lit_in(light: torch.Tensor, dimensions: torch.Tensor) -> torch.Tensor:
    """phi, the largest of a token's values in k dimensions of each layer; see `sinks.phi`.

    [images, layers, visual tokens, width] and long [layers, k] -> [images, layers, visual tokens].
    """
    index = dimensions[None, :, None].expand(light.shape[0], -1, light.shape[2], -1)
    return light.gather(-1, index).amax(-1)


def over_steps(
    lights: Mapping[int, torch.Tensor], groups: TokenGroups, k: int = 3
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How far the k dimensions that the marked group lights most stand out in it, at each step of a training.

    They are those of the largest `excess` over the other patches, found on every second picture that has the group; phi
    in them is read on the rest of these.

    Args:
        lights: of `light`, by step.

    Returns:
        `contrast` of phi, with `step` and `dimensions`: those of the "last step", or of the "same step". And `step`,
        `layer`, `cosine` of the excess with that of the last step, and the k `lit` dimensions.
    """
    mask = groups.masks[groups.marked]
    others, having = groups.patches & ~mask, mask.any(1).nonzero()[:, 0]
    seeking, reading = having[::2], having[1::2]
    found = {step: excess(of[seeking], mask[seeking], others[seeking]) for step, of in lights.items()}
    last = found[max(found)]
    phi, profiles = [], []
    for step, of in lights.items():
        for which, own in (("last step", last), ("same step", found[step])):
            phi_of = lit_in(of[reading], own.topk(k).indices)
            seen = contrast(phi_of, groups, pd.DataFrame({"image": reading.numpy()}))
            phi.append(seen.assign(step=step, dimensions=which))
        cosine = torch.nn.functional.cosine_similarity(found[step], last, dim=-1)
        lit = [" ".join(map(str, sorted(of_layer))) for of_layer in found[step].topk(k).indices.tolist()]
        profiles.append(pd.DataFrame({"step": step, "layer": range(1, len(last) + 1), "cosine": cosine, "lit": lit}))
    return pd.concat(phi, ignore_index=True), pd.concat(profiles, ignore_index=True)


# --- sinks of the tower and of the decoder ---


def decoder_sinks(inside: Inside, norms: torch.Tensor, *, factor: float, threshold: float) -> dict[str, torch.Tensor]:
    """The sinks of each decoder layer, by each of `DECODER_RULES`: bool [images, layers, visual tokens].

    Args:
        norms: [images, layers, visual tokens], after each decoder layer.
        factor: "attention": a sink receives more than so many times what uniform causal attention gives its place.
        threshold: "norm": a sink has at least so many times the median norm of the picture's visual tokens.

    "dimensions": a sink's phi is at least half the first token's. Without dimensions that the first token lights there
    is no such sink.
    """
    return {
        "attention": sinks.attended(inside.received, 1.0, factor),
        "norm": sinks.above_median(norms, threshold),
        "dimensions": inside.phi >= 0.5,
    }


def fates(tower: torch.Tensor, decoder: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """How many tokens of a picture are sinks where, and how far the sinks of tower and decoder are the same.

    Args:
        tower: bool [images, visual tokens].
        decoder: bool [images, layers, visual tokens] by rule.

    Returns:
        A row for each rule, layer and image: `rule`, `layer` (from 1), `image`, each of `FATES` (tokens), `in_tower`
        (tokens) and `jaccard` (NaN where neither has a sink).
    """
    parts = []
    for rule, mask in decoder.items():
        layer, image = (of.flatten() for of in np.mgrid[1 : mask.shape[1] + 1, : len(mask)])
        kinds = sinks.kinds(tower[:, None], mask)
        counts = {kind: kinds[kind].sum(-1).T.flatten().numpy() for kind in FATES}
        overlap = sinks.jaccard(tower[:, None], mask, empty=float("nan")).T.flatten().numpy()
        parts.append(pd.DataFrame({"rule": rule, "layer": layer, "image": image, **counts, "jaccard": overlap}))
    return pd.concat(parts, ignore_index=True).assign(in_tower=lambda of: of.propagated + of.stopped)


def attention_by_fate(
    attention: torch.Tensor, image: torch.Tensor, tower: torch.Tensor, decoder: torch.Tensor
) -> pd.DataFrame:
    """Mean attention a token of each of `FATES`, judged anew in every layer.

    Args:
        attention: [rows, layers, visual tokens].
        image: long [rows], the image of each row.
        tower: bool [images, visual tokens].
        decoder: bool [images, layers, visual tokens].

    Returns:
        A row for each fate, row and layer: `kind`, `image`, `value` (NaN where the picture has no such token).
    """
    kinds = sinks.kinds(tower[:, None].expand_as(decoder), decoder)
    of_row = image.repeat_interleave(attention.shape[1])
    parts = [pd.DataFrame({"kind": kind, "image": of_row, "value": mean(attention, kinds[kind][image]).flatten()})
             for kind in FATES]
    return pd.concat(parts, ignore_index=True)


def lies_on(tokens: torch.Tensor, region: torch.Tensor | None) -> pd.DataFrame:
    """Which tokens lie on a region: a row for each token, `image` and `value` (1 or 0); no rows where none is known.

    Args:
        tokens: bool [images, tokens], or [images, layers, tokens], where a token counts in each layer that has it.
        region: bool [images, tokens].
    """
    if region is None:
        return pd.DataFrame({"image": [], "value": []})
    where = tokens.nonzero()
    return pd.DataFrame({"image": where[:, 0], "value": region[where[:, 0], where[:, -1]].float()})
