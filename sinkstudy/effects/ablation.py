"""What answers lose without a group of visual tokens: replaced by others, hidden from the decoder, or alone.

Three changes of the forward pass, each for a group of patches of every image:

- `replace` puts other values in their place, at the connector's input or output: the mean token, tokens of the same
  group from other pictures (shuffle), Gaussian noise, or zero. Zero is a value that no token ever has, so what is lost
  to it may be lost to the shock (2604.14433, on registers); it stands beside the others for comparison.
- `hide` with `visible_to="nobody"` removes them: no later token of the decoder sees them, in any layer. What remains
  keeps its position ids, so removal is exactly the sequence without the tokens, with a gap in the positions.
- `hide` with `visible_to="visual"` hides them from text only: other visual tokens still see them and may pass on what
  they hold (attention knock-out; Geva et al., 2304.14767).

The first two work on visual tokens: where several patches make one of them, it belongs to the group if any patch does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn
from transformers import BatchFeature

from sinkstudy.answers.evaluate import NONE, Intervention, Prefixes, evaluate, judged
from sinkstudy.model.capture import not_finite
from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM

Site = Literal["input", "output"]  # of the connector
Masks = Mapping[str, torch.Tensor]  # bool [patches] of each image, by its id
Values = Mapping[str, dict[int, torch.Tensor]]  # of each image, by the layer that feeds the connector: [group, width]

SUBSTITUTES = ("mean", "shuffle", "noise", "zero")


@dataclass(frozen=True)
class Tokens:
    """All tokens of some images at one place in the network, on the CPU in the model's dtype."""

    site: Site
    of: dict[str, dict[int, torch.Tensor]]  # image id -> layer that feeds the connector -> [tokens, width]
    layouts: dict[str, ImageLayout]

    def group(self, image: str, mask: torch.Tensor) -> dict[int, torch.Tensor]:
        """The tokens of a group of patches, bool [patches]: layer -> [group, width]."""
        layout = self.layouts[image]
        inside = torch.isin(_places(layout, torch.ones_like(mask), self.site), _places(layout, mask, self.site))
        return {layer: tokens[inside] for layer, tokens in self.of[image].items()}

    def mean(self) -> dict[int, torch.Tensor]:
        """The mean over all tokens of all images that the decoder gets: layer -> float64 [width]."""
        read = [self.group(image, layout.read) for image, layout in self.layouts.items()]
        return {layer: torch.cat([own[layer] for own in read]).double().mean(0) for layer in read[0]}


def _places(layout: ImageLayout, mask: torch.Tensor, site: Site) -> torch.Tensor:
    """Where the tokens of a group stand in what the connector reads or puts out: long [group]."""
    if mask.dtype != torch.bool or mask.shape != layout.vision.shape:
        raise ValueError(f"a group is bool [{len(layout.vision)}] here, not {mask.dtype} {list(mask.shape)}")
    places = layout.at(site)[mask]
    return places if site == "input" else places.unique()


@torch.no_grad()
def read_tokens(lvlm: LVLM, images: Mapping[str, Any], site: Site = "output", batch_size: int = 16) -> Tokens:
    """Read the tokens of all images at the connector's input ("input", [patches, vision width]) or output.

    In the order of patches at the input; at the output, [visual tokens before packing, decoder width], in the
    connector's. Several layers feed a connector of their own in Qwen3-VL, elsewhere only `lvlm.feature_layer`.
    576 tokens of 4,096 in half precision are 4.7 MB an image.

    Raises:
        ValueError: an unknown site, no images, or values that are not finite.
    """
    ids, of, layouts = list(images), {}, {}
    for batch, inputs in lvlm.batches(list(images.values()), batch_size):
        seen: dict[int, torch.Tensor] = {}

        def keep(tokens: torch.Tensor, layer: int) -> torch.Tensor:
            seen[layer] = tokens.detach().cpu().clone()
            return tokens

        with _editing(lvlm, site, keep):
            lvlm.model(**inputs, logits_to_keep=1)
        for image, layout in zip(ids[batch], lvlm.layout(inputs), strict=True):
            own = _places(layout, torch.ones(len(layout.vision), dtype=torch.bool), site)
            of[image] = {layer: tokens[own] for layer, tokens in seen.items()}
            if not all(tokens.isfinite().all() for tokens in of[image].values()):
                raise not_finite(lvlm, f"at the connector's {site}", repr(image))
            layouts[image] = layout
    return Tokens(site, of, layouts)


def values(tokens: Tokens, masks: Masks, kind: str, seed: int = 0) -> Values:
    """What takes the place of a group's tokens in every image.

    Args:
        tokens: of all images of `masks`, and perhaps of more.
        masks: the group, bool [patches] of each image; images with an empty group have nothing to replace.
        kind: "mean", over all tokens of all images of `tokens`; "shuffle", tokens of the same group, each used once
            and none in its own image; "noise", Gaussian, with mean and standard deviation of the group's tokens in each
            dimension; "zero".
        seed: of shuffle and noise.

    Raises:
        ValueError: an unknown kind; an image that was not read; or, for "shuffle", an image that has more than half of
            all tokens of the group.
    """
    if kind not in SUBSTITUTES:
        raise ValueError(f"unknown replacement {kind!r}; known: {', '.join(SUBSTITUTES)}")
    if missing := [image for image in masks if image not in tokens.of]:
        raise ValueError(f"{len(missing)} images were not read, such as {missing[0]!r}")
    groups = {image: tokens.group(image, mask) for image, mask in masks.items()}
    generator = torch.Generator().manual_seed(seed)
    if not groups or kind == "zero":
        return {image: {layer: torch.zeros_like(x) for layer, x in own.items()} for image, own in groups.items()}
    if kind == "mean":
        mean = tokens.mean()
        return {image: {k: mean[k].to(x.dtype).expand_as(x) for k, x in own.items()} for image, own in groups.items()}
    layers = list(next(iter(tokens.of.values())))
    sizes = {image: len(own[layers[0]]) for image, own in groups.items()}
    if kind == "shuffle":
        order = _derangement(list(sizes.values()), generator)
    out: dict[str, dict[int, torch.Tensor]] = {image: {} for image in groups}
    for layer in layers:
        pooled = torch.cat([own[layer] for own in groups.values()])  # [tokens of all groups, width]
        if kind == "shuffle":
            new = pooled[order]
        elif len(pooled):
            x = pooled.float()
            noise = torch.randn(x.shape, generator=generator)
            new = (x.mean(0) + x.std(0, correction=0) * noise).to(pooled.dtype)
        else:
            new = pooled
        for image, part in zip(sizes, new.split(list(sizes.values())), strict=True):
            out[image][layer] = part
    return out


def _derangement(sizes: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """A permutation of the members of groups that takes each member into another group: long [members].

    Groups stand in random order, members within each too; then all move on by the size of the largest group.
    """
    total, most = sum(sizes), max(sizes)
    if 2 * most > total:
        raise ValueError("shuffle needs tokens of other images: one image has more than half of them")
    members = torch.arange(total).split(list(sizes))
    mixed = [members[i][torch.randperm(sizes[i], generator=generator)]
             for i in torch.randperm(len(sizes), generator=generator)]
    place = torch.cat(mixed)
    order = torch.empty(total, dtype=torch.long)
    order[place] = place.roll(most)
    return order


# ------------------------------------------------------------------------------------------------- contexts
@contextmanager
def replaced(
    lvlm: LVLM,
    inputs: BatchFeature,
    masks: Sequence[torch.Tensor],
    new: Sequence[Mapping[int, torch.Tensor]],
    site: Site = "output",
) -> Iterator[None]:
    """Inside, the tokens of a group have other values at the connector's input or output; all others stay, to the bit.

    Args:
        inputs: of n images, as `lvlm.inputs` makes them, in every pass of the tower inside the context.
        masks: the group of each image, bool [patches].
        new: for each image, layer that feeds the connector -> [group, width], as `values` gives it.

    Raises:
        ValueError: an unknown site, a mask that does not fit its image, or values that do not fit the group.
    """
    at = [_places(layout, mask, site) for layout, mask in zip(lvlm.layout(inputs), masks, strict=True)]
    for places, own in zip(at, new, strict=True):
        if wrong := [x for x in own.values() if len(x) != len(places)]:
            raise ValueError(f"the group has {len(places)} tokens, there are values for {len(wrong[0])}")

    def put(tokens: torch.Tensor, layer: int) -> torch.Tensor:
        tokens = tokens.clone()
        for places, own in zip(at, new, strict=True):
            tokens[places.to(tokens.device)] = own[layer].to(tokens)
        return tokens

    with _editing(lvlm, site, put):
        yield


def _editing(lvlm: LVLM, site: str, change: Callable[[torch.Tensor, int], torch.Tensor]) -> AbstractContextManager:
    if site not in ("input", "output"):
        raise ValueError(f"a site is the connector's 'input' or 'output', not {site!r}")
    return lvlm.editing(**{"before" if site == "input" else "after": change})


@contextmanager
def hidden(
    lvlm: LVLM,
    inputs: BatchFeature,
    masks: Sequence[torch.Tensor],
    *,
    visible_to: Literal["nobody", "visual"] = "nobody",
    others: bool = False,
) -> Iterator[None]:
    """Inside, tokens of the decoder cannot attend to the visual tokens of a group, in any layer.

    Position ids stay, and so does what each hidden token itself sees; a visual token without patches (newline of
    LLaVA-NeXT) is never hidden. Whatever watches attention (`capture`) sees it as it is then.

    Args:
        inputs: of n images: what the decoder reads first, and behind which it goes on with a cache.
        masks: the group of each image, bool [patches].
        visible_to: "nobody", as if the tokens were not there; or "visual", so that only text cannot see them.
        others: hide all other visual tokens in place of the group.

    Raises:
        ValueError: an unknown `visible_to`, or a mask that does not fit its image.
    """
    if visible_to not in ("nobody", "visual"):
        raise ValueError(f"hidden tokens are visible to 'nobody' or 'visual', not {visible_to!r}")
    gone, visual = token_places(lvlm.layout(inputs), inputs, masks, others)
    with narrowed(lvlm, inputs, lambda: (gone, visual), visible_to):
        yield


def token_places(
    layouts: Sequence[ImageLayout], inputs: BatchFeature, masks: Sequence[torch.Tensor], others: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the visual tokens of a group stand, or all others that read patches; and all: both bool [images, tokens].

    Raises:
        ValueError: a mask, bool [patches], that does not fit its image.
    """
    group = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    visual = torch.zeros_like(group)
    for layout, mask in zip(layouts, masks, strict=True):
        inside = layout.lift(mask, "any")
        if others:
            inside = ~inside & layout.lift(torch.ones_like(mask), "any")
        group[layout.row, layout.visual] = inside
        visual[layout.row, layout.visual] = True
    return group, visual


@contextmanager
def narrowed(
    lvlm: LVLM,
    inputs: BatchFeature,
    where: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    visible_to: Literal["nobody", "visual"] = "nobody",
) -> Iterator[None]:
    """`hidden` for places that need not be known before the decoder reads them.

    Args:
        where: gives the tokens to hide and all visual tokens, both bool [images, tokens of `inputs`].
    """

    def narrow(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        gone, visual = where()
        rows = inputs.rows if isinstance(inputs, Prefixes) else torch.arange(len(gone))
        mask = kwargs["attention_mask"]  # [batch or 1, 1 or heads, queries, keys], bool or added; None: causal
        n, cache = kwargs["hidden_states"].shape[1], kwargs.get("past_key_values")
        length, start = (n, 0) if cache is None else cache.get_mask_sizes(n, module.layer_idx)
        keys = torch.arange(start, start + length)  # places in the whole sequence
        queries = keys[-n:]
        blocked = marked_at(gone, rows, keys)[:, None] & (queries[:, None] != keys)  # [batch, queries, keys]
        if visible_to == "visual":
            blocked &= ~marked_at(visual, rows, queries)[:, :, None]
        blocked = blocked[:, None].to(kwargs["hidden_states"].device)  # [batch, 1, queries, keys]
        if mask is None:
            mask = (queries[:, None] >= keys).to(blocked.device)
        mask = mask & ~blocked if mask.dtype == torch.bool else mask.masked_fill(blocked, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    with ExitStack() as hooks:
        for attention in attentions(lvlm):
            hooks.enter_context(attention.register_forward_pre_hook(narrow, with_kwargs=True))
        yield


def attentions(lvlm: LVLM) -> list[nn.Module]:
    """The attention of each layer of the decoder.

    Raises:
        ValueError: a layer has none (linear attention, a state space), and carries on what attention does not show.
    """
    path, found = lvlm.spec.decoder_attention, []
    for i, layer in enumerate(lvlm.decoder_layers):
        try:
            found.append(layer.get_submodule(path))
        except AttributeError:
            raise ValueError(f"{lvlm.name}: layer {i} of its decoder has no attention ({path}), and what such a layer "
                             "carries on cannot be hidden") from None
    return found


def marked_at(marked: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What is marked at some places of a sequence that goes on behind it, where nothing is: bool [rows, places]."""
    inside = places < marked.shape[1]
    return marked[rows][:, places.clamp(max=marked.shape[1] - 1)] & inside


# ------------------------------------------------------------------------------------------------- interventions
def replace(name: str, tokens: Tokens, masks: Masks, kind: str = "mean", seed: int = 0) -> Intervention:
    """`replaced` as an intervention, with `values` of a kind, at the place where `tokens` were read.

    Raises:
        ValueError: as `values`; in `evaluate`, if an image has no mask.
    """
    new, site = values(tokens, masks, kind, seed), tokens.site

    def around(lvlm: LVLM, inputs: Prefixes) -> Any:
        own = of_images(masks, inputs)
        return replaced(lvlm, inputs, own, [new[image] for image in inputs.image_ids], site)

    return Intervention(name, around, {"site": site, "kind": kind})


def hide(
    name: str, masks: Masks, *, visible_to: Literal["nobody", "visual"] = "nobody", others: bool = False
) -> Intervention:
    """`hidden` as an intervention.

    Raises:
        ValueError: in `evaluate`, as `hidden`, or if an image has no mask.
    """

    def around(lvlm: LVLM, inputs: Prefixes) -> Any:
        return hidden(lvlm, inputs, of_images(masks, inputs), visible_to=visible_to, others=others)

    return Intervention(name, around, {"visible_to": visible_to, "others": others})


def of_images(masks: Masks, inputs: Prefixes) -> list[torch.Tensor]:
    """The masks of the images of `inputs`, in their order. Raises ValueError if an image has none."""
    if missing := [image for image in inputs.image_ids if image not in masks]:
        raise ValueError(f"image {missing[0]!r} has no group")
    return [masks[image] for image in inputs.image_ids]


# ------------------------------------------------------------------------------------------------- effects
def scored(
    lvlm: LVLM, asked: pd.DataFrame, interventions: Sequence[Intervention], *, benchmark: str = "", **how: Any
) -> pd.DataFrame:
    """Is the answer right, and how likely is the right one, under each intervention and without any.

    Args:
        asked: as `evaluate` takes it, with `answer`, the right one.
        interventions: beside `NONE`, which is added.
        how: further arguments of `evaluate`, but candidates.

    Returns:
        The rows of `evaluate` with `right`, in %, and `logp`, in nats, of `judged`.

    Raises:
        ValueError: as `evaluate`, or where an answer is missing.
    """
    if asked.answer.isna().any():
        raise ValueError("every question needs its right answer")
    said = evaluate(lvlm, asked, [NONE, *interventions], candidates=[[answer] for answer in asked.answer], **how)
    return judged(said, benchmark).drop(columns=[c for c in said if c.startswith("logp_") or c == "first"])


def effects(said: pd.DataFrame) -> pd.DataFrame:
    """What each intervention changes in each answer: the rows of `scored` but those of `NONE`, less those of `NONE`.

    Raises:
        ValueError: if a question was not asked without intervention.
    """
    before = said[said.intervention == NONE.name].set_index("id")
    after = said[said.intervention != NONE.name]
    if not after.id.isin(before.index).all():
        raise ValueError(f"a question was not asked under {NONE.name!r}")
    return after.assign(**{m: after[m].to_numpy() - before[m].reindex(after.id).to_numpy() for m in ("right", "logp")})
