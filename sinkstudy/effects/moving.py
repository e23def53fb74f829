"""Ways to make a trained model use its sinks differently, without training.

Each is a context manager that changes no weight and leaves no trace when it ends. It acts on the images of `inputs`,
the model's inputs as `LVLM.inputs` makes them, in every forward pass and `generate` inside the context, with a
key-value cache or without. `intervention` wraps it for `evaluate.evaluate`.

Which patches are meant (`chosen`) is given for each image, bool [patches]; or judged inside, from the norms of the
patches as the connector reads them, by a function: norms, float [patches] of one image -> bool [patches]. A visual
token that reads several patches is meant if any of them is.

To leave tokens out, or all but some, see `ablation.hidden`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import BatchFeature

from sinkstudy import sinks
from sinkstudy.answers.evaluate import Intervention, Prefixes
from sinkstudy.effects.ablation import Masks, attentions, marked_at, of_images
from sinkstudy.effects.neurons import moved_to_register
from sinkstudy.model import capture
from sinkstudy.model.groups import judged
from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM

Chosen = Sequence[torch.Tensor] | Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def _judging(lvlm: LVLM, layouts: list[ImageLayout], chosen: Chosen) -> Iterator[list[torch.Tensor]]:
    """Yields a list that holds, from the connector's pass on at the latest, the chosen patches of each image."""
    if not callable(chosen):
        for layout, mask in zip(layouts, chosen, strict=True):
            layout.lift(mask, "any")  # raises where it does not fit
        yield list(chosen)
        return
    def judge(norms: torch.Tensor, layout: ImageLayout) -> torch.Tensor:
        return judged(chosen, norms, layout.read)

    with capture.norms_at_connector(lvlm, layouts, judge) as masks:
        yield masks


@contextmanager
def reordered(
    lvlm: LVLM,
    inputs: BatchFeature,
    chosen: Chosen,
    to: Literal["front", "end"] = "front",
    ids: Literal["travel", "renumber"] = "travel",
) -> Iterator[None]:
    """Move the chosen visual tokens of an image to the front, or the end, of its visual tokens.

    Sink-to-the-front of 2510.08510 ("To Sink or Not to Sink"). The others keep their order; tokens that read no patch
    (newlines of LLaVA-NeXT) count as others. In a causal decoder every later token sees what is in front.

    Args:
        ids: with "travel" a token keeps its own position ids, so that only the causal order changes; with "renumber" it
            takes those of its new place. Accounts of the paper disagree about which was done. Holds for 1-D ids and
            for those of M-RoPE.

    Raises:
        ValueError: an unknown `to` or `ids`, or images without visual tokens.
    """
    if to not in ("front", "end") or ids not in ("travel", "renumber"):
        raise ValueError(f"to is 'front' or 'end' and ids 'travel' or 'renumber', not {to!r} and {ids!r}")
    layouts = lvlm.layout(inputs)
    with _judging(lvlm, layouts, chosen) as masks, moving(lvlm, layouts, masks, to, ids):
        yield


@contextmanager
def moving(
    lvlm: LVLM, layouts: list[ImageLayout], masks: Sequence[torch.Tensor], to: str = "front", ids: str = "travel"
) -> Iterator[None]:
    """`reordered` for masks that need not be there before the decoder reads the images: then `masks` has them."""

    def move(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not _reads_images(kwargs, layouts):
            return None
        hidden = kwargs["inputs_embeds"]  # [batch, tokens, width]
        place = torch.arange(hidden.shape[1]).repeat(len(hidden), 1)  # [batch, tokens], where each token comes from
        of_visual: list[torch.Tensor] = []  # the same among the visual tokens of the batch
        for layout, mask in zip(layouts, masks, strict=True):
            moved = layout.lift(mask, "any")
            order = (~moved if to == "front" else moved).long().argsort(stable=True)  # [visual tokens]
            of_visual.append(order + sum(map(len, of_visual)))
            place[layout.row, layout.visual] = layout.visual[order]
        place = place.to(hidden.device)
        kwargs = {**kwargs, "inputs_embeds": hidden.gather(1, place[..., None].expand_as(hidden))}
        if kwargs.get("deepstack_visual_embeds") is not None:
            order = torch.cat(of_visual).to(hidden.device)
            kwargs["deepstack_visual_embeds"] = [stacked[order] for stacked in kwargs["deepstack_visual_embeds"]]
        if ids == "travel":
            kwargs["position_ids"] = _travelled(kwargs.get("position_ids"), place)
        return args, kwargs

    with lvlm.decoder.register_forward_pre_hook(move, with_kwargs=True):
        yield


def _reads_images(kwargs: dict[str, Any], layouts: list[ImageLayout]) -> bool:
    """Is this call of the decoder the one that reads the images, and not a later one that continues from its cache?"""
    cache = kwargs.get("past_key_values")
    last = max(int(layout.visual[-1]) for layout in layouts)
    return (cache is None or cache.get_seq_length() == 0) and kwargs["inputs_embeds"].shape[1] > last


def _travelled(position_ids: torch.Tensor | None, place: torch.Tensor) -> torch.Tensor:
    """Position ids [.., batch, tokens] in the order of `place` [batch, tokens]."""
    if position_ids is None:
        return place  # ids count from 0, so the place that a token comes from is its id
    index = place.expand_as(position_ids) if position_ids.shape[-2] == len(place) else place
    position_ids = position_ids.expand(index.shape) if position_ids.shape[-2] == 1 else position_ids
    moved = position_ids.gather(-1, index)
    if position_ids.ndim == 3 and len(position_ids) == 4:  # Qwen: the first row only serves to make the mask
        moved[0] = position_ids[0]
    return moved


@contextmanager
def reweighted(
    lvlm: LVLM, inputs: BatchFeature, chosen: Chosen, chosen_by: float = 1.0, others_by: float = 1.0
) -> Iterator[None]:
    """Multiply the projected features of the chosen visual tokens by one weight and those of the others by another.

    What ReW of 2510.08510 does with weights that a router gives, here with fixed ones. Qwen3-VL's further connectors,
    which come before the one whose input is judged, are left as they are.
    """
    layouts = lvlm.layout(inputs)

    def weigh(tokens: torch.Tensor, layer: int) -> torch.Tensor:
        if layer != lvlm.feature_layer:
            return tokens
        weight = torch.ones(len(tokens))  # [tokens of the batch]
        for layout, mask in zip(layouts, masks, strict=True):
            weight[layout.at("output")] = others_by
            weight[layout.output[mask]] = chosen_by
        return tokens * weight.to(tokens)[:, None]

    with _judging(lvlm, layouts, chosen) as masks, lvlm.editing(after=weigh):
        yield


@contextmanager
def gated(
    lvlm: LVLM,
    inputs: BatchFeature,
    chosen: Chosen,
    chosen_by: float,
    others_by: float = 1.0,
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """Multiply the keys of the chosen visual tokens by one number, those of the other visual tokens by another.

    A = softmax(Q (diag(s) K)^T / sqrt(width)) V of 2604.03316 ("When Sinks Help or Hurt"). With s = 0 a token's score
    is 0, which is not no attention. The keys are scaled before they enter the cache, so that every later query meets
    them; rotation by position commutes with this.

    Args:
        layers: decoder layers, from 0, negative ones from the end, each once however often it is named; all by default.

    Raises:
        IndexError: there is no such layer.
    """
    with scaled_keys(lvlm, inputs, chosen, lambda layer, hidden: torch.tensor([[chosen_by, others_by]]), layers):
        yield


@contextmanager
def scaled_keys(
    lvlm: LVLM,
    inputs: BatchFeature,
    chosen: Chosen,
    by: Callable[[int, torch.Tensor], torch.Tensor],
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """`gated` with factors that may follow from what a layer reads.

    Args:
        by: the layer, from 0, and the hidden states [images, tokens, width] that it reads -> float
            [images or 1, 2], by what the keys of the chosen visual tokens of an image, and those of its others, are
            multiplied. It is asked whenever the layer reads the images: once, or for every token of an answer where
            there is no cache.
        layers: as in `gated`.
    """
    layouts = lvlm.layout(inputs)
    groups: list[torch.Tensor] = []  # [images, tokens] during the pass that reads the images, otherwise none
    scales: dict[int, torch.Tensor] = {}  # layer -> [images, tokens], likewise

    def prepare(module: nn.Module, args: tuple, kwargs: dict) -> None:
        groups.clear()
        scales.clear()
        if _reads_images(kwargs, layouts):
            group = torch.zeros(kwargs["inputs_embeds"].shape[:2], dtype=torch.long)  # 1: chosen, 2: others
            for layout, mask in zip(layouts, masks, strict=True):
                group[layout.row, layout.visual] = torch.where(layout.lift(mask, "any"), 1, 2)
            groups.append(group)

    def weigh(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if groups:
            hidden = args[0] if args else kwargs["hidden_states"]
            factors = nn.functional.pad(by(layer, hidden), (1, 0), value=1.0)  # [images or 1, 3]
            group = groups[0].to(factors.device)
            scales[layer] = factors.expand(len(group), -1).gather(1, group)

    def scale(layer: int, module: nn.Module, args: tuple, made: torch.Tensor) -> torch.Tensor | None:
        if layer not in scales:
            return None
        factor = scales[layer].to(made)
        tokens_first = made.shape[1] == factor.shape[1]  # Gemma's norm of keys sees [batch, heads, tokens, width]
        shape = (*factor.shape, *[1] * (made.ndim - 2)) if tokens_first else (len(factor), 1, -1, 1)
        return made * factor.view(shape)

    every = range(len(lvlm.decoder_layers))
    blocks = every if layers is None else sorted({every[layer] for layer in layers})
    with _judging(lvlm, layouts, chosen) as masks, ExitStack() as hooks:
        hooks.enter_context(lvlm.decoder.register_forward_pre_hook(prepare, with_kwargs=True))
        makers = key_makers(lvlm)
        for layer in blocks:
            block = lvlm.decoder_layers[layer]
            hooks.enter_context(block.register_forward_pre_hook(partial(weigh, layer), with_kwargs=True))
            hooks.enter_context(makers[layer].register_forward_hook(partial(scale, layer)))
        yield


def key_makers(lvlm: LVLM) -> list[nn.Module]:
    """What makes the keys in each layer of the decoder: their norm, which would undo a weight, or else their map.

    Raises:
        ValueError: as `attentions`; where keys and values come from one latent vector, or one norm is for keys and
            queries.
    """
    found = []
    for attention in attentions(lvlm):
        parts, kind = dict(attention.named_children()), type(attention).__name__
        norms = [part for name, part in parts.items() if re.fullmatch(r"(k|key)_?(layer_?)?norm", name)]
        if "k_proj" not in parts:
            raise ValueError(f"{lvlm.name}: {kind} has no map that makes keys alone (k_proj)")
        if shared := [name for name in parts if re.fullmatch(r"qk_?(layer_?)?norms?", name)]:
            raise ValueError(f"{lvlm.name}: {kind} norms keys and queries by one module ({shared[0]})")
        found.append(norms[0] if norms else parts["k_proj"])
    return found


@contextmanager
def redistributed(
    lvlm: LVLM,
    inputs: BatchFeature,
    dimensions: Sequence[int],
    tau: float = 20.0,
    p: float = 0.6,
    rho: float = 0.5,
    least: float = 0.2,
) -> Iterator[None]:
    """VAR, visual attention redistribution (Kang et al., "See What You Are Told", 2503.03321).

    Sinks of the decoder are judged by its own rule, in the hidden states that each layer reads (`sinks.llm_sinks`),
    over all tokens up to the last visual one. In the decoder layers from the third to the last but one, queries behind
    the image move attention from sinks to visual tokens that are none, in heads that look at the image (`moved_mass`).

    Args:
        dimensions: the decoder's sink dimensions, {1415, 2533} in Llama-2-7B; for others see `sinks.sink_dimensions`.
        tau: threshold of phi, at most the square root of the width; 20 is for width 4,096.
        p, rho, least: see `moved_mass`.

    Raises:
        ValueError: a `tau` that phi cannot reach, or shares outside 0-1.
    """
    sinks.llm_sinks(torch.zeros(1, lvlm.model.config.get_text_config().hidden_size), dimensions, tau)
    if wrong := [share for share in (p, rho, least) if not 0 <= share <= 1]:
        raise ValueError(f"p, rho and least are shares from 0 to 1, not {wrong[0]}")
    layouts = lvlm.layout(inputs)
    end = max(int(layout.visual[-1]) for layout in layouts) + 1
    visual = torch.zeros(len(layouts), end, dtype=torch.bool)
    for layout in layouts:
        visual[layout.row, layout.visual] = True
    found: dict[int, torch.Tensor] = {}  # layer -> bool [images, end]
    reading, length = False, 0  # of the whole sequence, of which a sliding window's cache has only the last keys
    layers = range(2, len(lvlm.decoder_layers) - 1)

    def notice(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal reading, length
        reading, cache = _reads_images(kwargs, layouts), kwargs.get("past_key_values")
        length = kwargs["inputs_embeds"].shape[1] + (0 if cache is None else cache.get_seq_length())

    def judge(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if reading:
            hidden = args[0] if args else kwargs["hidden_states"]
            found[layer] = sinks.llm_sinks(hidden[:, :end], dimensions, tau).cpu()

    def edit(layer: int, attention: Any, value: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        of = inputs.rows if isinstance(inputs, Prefixes) else torch.arange(len(layouts))
        keys = torch.arange(length - attention.n_keys, length)  # places in the whole sequence
        behind = (keys[-attention.n_queries :] >= end).nonzero()[:, 0].to(value.device)
        if len(behind) == 0 or not found[layer][of].any():
            return output
        sink, seen = (marked_at(x, of, keys).to(value.device)[:, None, None]  # [batch, 1, 1, keys]
                      for x in (found[layer], visual))
        weights = attention.weights(behind)  # [batch, heads, queries behind, keys]
        moved = moved_mass(weights, sink, seen, p, rho, least)
        group = weights.shape[1] // value.shape[1]  # heads that share a value
        new = moved @ value.float().repeat_interleave(group, 1)  # [batch, heads, queries behind, head width]
        changed = (moved != weights).any(-1)  # what VAR leaves alone stays to the bit
        output = output.clone()  # [batch, queries, heads, head width]
        output[:, behind] = torch.where(changed[..., None], new.to(output.dtype), output[:, behind].transpose(1, 2)
                                        ).transpose(1, 2)
        return output

    with ExitStack() as hooks:
        hooks.enter_context(lvlm.decoder.register_forward_pre_hook(notice, with_kwargs=True))
        for layer in layers:
            block = lvlm.decoder_layers[layer]
            hooks.enter_context(block.register_forward_pre_hook(partial(judge, layer), with_kwargs=True))
        hooks.enter_context(capture.editing_attention(lvlm, edit, layers))
        yield


def moved_mass(
    weights: torch.Tensor, sink: torch.Tensor, visual: torch.Tensor, p: float, rho: float, least: float
) -> torch.Tensor:
    """VAR's rule for attention weights [.., keys]: every row keeps its sum.

    A row counts as looking at the image if visual tokens have at least `least` of its attention and no more than `rho`
    of that goes to sinks. There every sink, visual or not, keeps `p` of its attention; what is taken goes to the visual
    tokens that are no sinks, in proportion to their attention. Other rows stay as they are.

    Args:
        weights: [.., keys], which sum to 1 over keys.
        sink, visual: bool, which broadcast to `weights`.
    """
    on_image = (weights * visual).sum(-1, keepdim=True)
    on_sinks = (weights * (visual & sink)).sum(-1, keepdim=True)
    receivers = weights * (visual & ~sink)
    total = receivers.sum(-1, keepdim=True)
    looks = (on_image >= least) & (on_sinks <= rho * on_image) & (total > 0)
    budget = (1 - p) * (weights * sink).sum(-1, keepdim=True)
    new = torch.where(sink, p * weights, weights) + budget * receivers / total.clamp(min=1e-30)
    return torch.where(looks, new, weights)


@contextmanager
def registered(
    lvlm: LVLM,
    inputs: BatchFeature,
    chosen: Sequence[torch.Tensor] | None = None,
    *,
    neurons: Mapping[int, Sequence[int]],
) -> Iterator[None]:
    """A test-time register in the vision tower (Jiang et al., 2506.08010), see `neurons.moved_to_register`.

    Args:
        chosen: patches in whose place the language model gets the register, bool [patches] of each image; without
            them it gets nothing of it.
        neurons: whose activation moves there: {vision layer: neurons}, see `neurons.strongest`.

    Raises:
        ValueError: for a tower that takes no added token, or a mask that does not fit its image.
    """
    passed = None
    if chosen is not None:
        layouts = lvlm.layout(inputs)
        for layout, mask in zip(layouts, chosen, strict=True):
            layout.lift(mask, "any")  # raises where it does not fit
        passed = torch.cat([layout.at("input")[mask] for layout, mask in zip(layouts, chosen, strict=True)])
    with moved_to_register(lvlm, {layer: torch.as_tensor(of) for layer, of in neurons.items()}, passed):
        yield


def intervention(
    name: str, method: Callable[..., AbstractContextManager], masks: Masks | None = None, **how: Any
) -> Intervention:
    """A method of this module, or `ablation.hidden`, for `evaluate.evaluate`.

    Args:
        method: `reordered`, `reweighted`, `gated`, `redistributed` or `registered`.
        masks: `chosen` for each image, by its id; none for `redistributed`, or a register that is not passed on.
        how: the method's further arguments, plain values.

    Raises:
        ValueError: in `evaluate`, as the method, or if an image has no mask.
    """

    def around(lvlm: LVLM, inputs: Prefixes) -> AbstractContextManager:
        own = [] if masks is None else [of_images(masks, inputs)]
        return method(lvlm, inputs, *own, **how)

    keeps: Literal["nothing", "tower"] = "nothing" if method is registered else "tower"
    return Intervention(name, around, {"method": method.__name__, **how}, keeps)
