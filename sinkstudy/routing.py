"""Ways to make a trained model use its sinks differently, without training.

Each is a context manager that changes no weight and leaves no trace when it ends. It acts on the images of `inputs`,
the model's inputs as `LVLM.inputs` makes them, in every forward pass and `generate` inside the context, with a
key-value cache or without. Which patches are sinks is judged inside, from the norms of the patches as the connector
reads them, by a function `select`: norms, float [patches] of one image -> bool [patches]. A visual token that reads
several patches is a sink if any of them is.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from transformers import BatchFeature

from sinkstudy.models import LVLM, ImageLayout

Select = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def _judging(lvlm: LVLM, layouts: list[ImageLayout], select: Select) -> Iterator[list[torch.Tensor]]:
    """Yields a list that holds, from the connector's pass on, the chosen patches of each image: bool [patches]."""
    chosen: list[torch.Tensor] = []

    def judge(patches: torch.Tensor, layer: int) -> torch.Tensor:
        if layer == lvlm.feature_layer:
            norms = patches.detach().float().norm(dim=-1).cpu()  # [patches of the batch]
            chosen[:] = [select(norms[layout.connector]) for layout in layouts]
        return patches

    with lvlm.editing(before=judge):
        yield chosen


@contextmanager
def reordered(
    lvlm: LVLM,
    inputs: BatchFeature,
    select: Select,
    to: Literal["front", "end"] = "front",
    ids: Literal["travel", "renumber"] = "travel",
) -> Iterator[None]:
    """Move the chosen visual tokens of an image to the front, or the end, of its visual tokens.

    Sink-to-the-front of 2510.08510 ("To Sink or Not to Sink"). The others keep their order; tokens that read no patch
    (newlines of LLaVA-NeXT) count as others. In a causal decoder every later token sees what is in front.

    Args:
        inputs: of the images; several rows may be padded.
        select: norms of an image's patches -> which of them to move.
        to: "front" or "end".
        ids: with "travel" a token keeps its own position ids, so that only the causal order changes; with "renumber" it
            takes those of its new place. Accounts of the paper disagree about which was done. Holds for 1-D ids and
            for those of M-RoPE.

    Raises:
        ValueError: an unknown `to` or `ids`, or images without visual tokens.
    """
    if to not in ("front", "end") or ids not in ("travel", "renumber"):
        raise ValueError(f"to is 'front' or 'end' and ids 'travel' or 'renumber', not {to!r} and {ids!r}")
    layouts = lvlm.layout(inputs)

    def move(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not _reads_images(kwargs, layouts):
            return None
        hidden = kwargs["inputs_embeds"]  # [batch, tokens, width]
        place = torch.arange(hidden.shape[1]).repeat(len(hidden), 1)  # [batch, tokens], where each token comes from
        of_visual = []  # the same among the visual tokens of the batch
        for layout, mask in zip(layouts, chosen, strict=True):
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

    with _judging(lvlm, layouts, select) as chosen:
        hook = lvlm.decoder.register_forward_pre_hook(move, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


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
    lvlm: LVLM, inputs: BatchFeature, select: Select, chosen_by: float = 1.0, others_by: float = 1.0
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
        for layout, mask in zip(layouts, chosen, strict=True):
            weight[layout.output] = others_by
            weight[layout.output[mask]] = chosen_by
        return tokens * weight.to(tokens)[:, None]

    with _judging(lvlm, layouts, select) as chosen, lvlm.editing(after=weigh):
        yield


@contextmanager
def gated(
    lvlm: LVLM,
    inputs: BatchFeature,
    select: Select,
    chosen_by: float,
    others_by: float = 1.0,
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """Multiply the keys of the chosen visual tokens by one number, those of the other visual tokens by another.

    A = softmax(Q (diag(s) K)^T / sqrt(width)) V of 2604.03316 ("When Sinks Help or Hurt"). With s = 0 a token's score
    is 0, which is not no attention. The keys are scaled before they enter the cache, so that every later query meets
    them; rotation by position commutes with this.

    Args:
        layers: decoder layers, from 0, negative ones from the end; all by default.
    """
    layouts = lvlm.layout(inputs)
    scales: list[torch.Tensor] = []  # [batch, tokens] during the pass that reads the images, otherwise none

    def prepare(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        scales.clear()
        if _reads_images(kwargs, layouts):
            by = torch.ones(kwargs["inputs_embeds"].shape[:2])
            for layout, mask in zip(layouts, chosen, strict=True):
                by[layout.row, layout.visual] = torch.where(layout.lift(mask, "any"), chosen_by, others_by)
            scales.append(by)

    def scale(module: torch.nn.Module, args: tuple, keys: torch.Tensor) -> torch.Tensor | None:
        if not scales:
            return None
        by = scales[0].to(keys)
        tokens_first = keys.shape[1] == by.shape[1]  # Gemma's norm of keys sees [batch, heads, tokens, width]
        return keys * (by.view(*by.shape, *[1] * (keys.ndim - 2)) if tokens_first else by[:, None, :, None])

    blocks = list(range(len(lvlm.decoder_layers))) if layers is None else layers
    with _judging(lvlm, layouts, select) as chosen, ExitStack() as hooks:
        hooks.callback(lvlm.decoder.register_forward_pre_hook(prepare, with_kwargs=True).remove)
        for layer in blocks:
            attention = lvlm.decoder_layers[layer].get_submodule(lvlm.spec.decoder_attention)
            keys = getattr(attention, "k_norm", None) or attention.k_proj  # a norm would undo what is done before it
            hooks.callback(keys.register_forward_hook(scale).remove)
        yield


def at_random(select: Select, seed: int = 0) -> Select:
    """As many patches as `select` chooses, drawn at random from the others: the control for "any tokens would do".

    The draw differs from image to image, and is the same for an image in every batch.
    """

    def draw(norms: torch.Tensor) -> torch.Tensor:
        mask = select(norms)
        # what rounding does not change, unlike the norms themselves
        own = zlib.crc32(bytes(mask.tolist()) + bytes(f"{norms.argmax()} {norms.argmin()}", "ascii"))
        order = torch.rand(len(norms), generator=torch.Generator().manual_seed(own ^ seed)).masked_fill(mask, 2.0)
        return (order.argsort().argsort() < mask.sum()) & ~mask

    return draw


def top(k: int) -> Select:
    """The k patches of highest norm."""
    return lambda norms: norms.argsort(descending=True, stable=True).argsort() < k
