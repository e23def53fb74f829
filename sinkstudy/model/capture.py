"""What a forward pass shows: hidden states and attention, reduced where they arise.

Whole attention maps of a 7B model take gigabytes per image, so nothing here keeps them. Three context
managers watch the layers of one side ("vision" or "decoder") of an `LVLM`, hand every tensor at once to a
reduction, and keep only what that returns:

- `hidden_states`: the residual stream after each layer, by forward hooks;
- `attention_rows`: attention of chosen queries to all keys;
- `attention_received`: mean attention that each key gets from the queries that can see it.

Each yields a dict {layer: [one result per call of that layer]}. A forward pass calls each layer once;
`generate` calls the decoder's layers once for the prompt and once for each further token. What the model
computes does not change: its attention stays PyTorch's SDPA, and the weights are computed beside it, in
float32, for the wanted rows only. On exit, also by an exception, hooks and attention are as before.

Layers count from 0. The hidden states of layer l are what it puts out; its attention reads what it takes in,
the hidden states of layer l - 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM

Side = Literal["vision", "decoder"]


ADVICE = "the model may need another dtype (bfloat16 or float32 in place of float16), or its weights are damaged"


def not_finite(lvlm: LVLM, where: str, picture: Any) -> ValueError:
    """What to raise where numbers are none, with the picture's name or number."""
    return ValueError(f"{lvlm.name}: NaN or infinite values {where}, picture {picture}: {ADVICE}")


def check_finite(lvlm: LVLM, values: torch.Tensor, first: int, of: str) -> None:
    """Norms of pictures by layer, [pictures, layers, ..]: all finite.

    Args:
        first: the number of the first picture.
        of: which layers these are.

    Raises:
        ValueError: with the first layer, and picture, that are not.
    """
    bad = ~values.flatten(2).isfinite().all(-1).T
    if bad.any():
        layer, picture = bad.nonzero()[0].tolist()
        raise not_finite(lvlm, f"behind layer {layer} of the {of}", first + picture)


def token_norms(hidden: torch.Tensor, layer: int | None = None) -> torch.Tensor:
    """L2 norm of every token in float32: [.., tokens, width] -> [.., tokens]."""
    return hidden.float().norm(dim=-1)


@contextmanager
def hidden_states(
    lvlm: LVLM,
    side: Side,
    reduce: Callable[[torch.Tensor, int], Any] = token_norms,
    layers: Sequence[int] | None = None,
) -> Iterator[dict[int, list]]:
    """Collect `reduce(hidden, layer)` of the residual stream after each layer.

    `hidden` is [batch, tokens, width]. On the vision side it is [tiles, tokens, width], and the first
    `lvlm.n_prefix` tokens are CLS and registers; in a packed tower (Qwen) it is [patches of the batch, width];
    `LVLM.layout` finds each patch in either. The last decoder layer's is taken before the final norm, and where
    features are added behind a decoder layer (Qwen3-VL), before they are. `layers` counts from 0, also from the end
    if negative; all by default.
    """
    results: dict[int, list] = {}

    def keep(layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        results[layer].append(reduce(hidden, layer))

    with ExitStack() as hooks:
        for layer, module in _select(lvlm, side, layers).items():
            results[layer] = []
            hooks.enter_context(module.register_forward_hook(partial(keep, layer)))
        yield results


@contextmanager
def attention_rows(
    lvlm: LVLM,
    side: Side,
    reduce: Callable[[torch.Tensor, int], Any] = lambda weights, layer: weights,
    rows: int | Sequence[int] | Literal["all"] = -1,
    layers: Sequence[int] | None = None,
) -> Iterator[dict[int, list]]:
    """Collect `reduce(weights, layer)` of the attention of chosen query rows.

    `weights` is float32 [batch, heads, rows, keys] and sums to 1 over keys (0 for a row of padding). Rows
    count within the queries of the current call, from the end if negative: while decoding with a cache each
    call has one query, and -1, the default, is the token being decoded, or the last token of the prompt.
    "all" has [heads, tokens, tokens] per image until it is reduced: for small towers; to average over
    queries, see `attention_received`. A packed tower (Qwen) attends within chunks, in the order of its sequence:
    whole images or, in most layers of Qwen2.5-VL, windows. There each chunk is a call, [1, heads, rows, its patches].
    While decoding, a layer with a sliding window (Gemma 3) may have forgotten the first keys; the last is the query.

    Raises:
        IndexError: in the forward pass, if a call has fewer queries than a row asks for.
    """
    modules = _attending(lvlm, side, layers)
    results: dict[int, list] = {layer: [] for layer in modules}

    def see(layer: int, attention: "_Attention") -> None:
        index = torch.arange(attention.n_queries, device=attention.query.device)
        if rows != "all":
            index = index[torch.as_tensor([rows] if isinstance(rows, int) else rows, device=index.device)]
        results[layer].append(reduce(attention.weights(index), layer))

    with _watching(lvlm, side, modules, see):
        yield results


@contextmanager
def attention_received(
    lvlm: LVLM,
    side: Side,
    queries: slice = slice(None),
    block: int = 256,
    relative: bool = False,
) -> Iterator[dict[int, list]]:
    """Collect the mean attention that each key receives: float32 [batch, heads, keys] per call.

    Key k's value is the mean of A[i, k] over the queries i that can see it: all queries in a vision tower,
    i >= k in a causal decoder (alpha_k of Gu et al., "When Attention Sink Emerges in Language Models",
    2410.10781). Padding neither asks nor answers; a key that no query sees has NaN. `queries` restricts the
    queries of a call, e.g. `slice(lvlm.n_prefix, None)` for patches only. Weights exist for `block` rows at a
    time. Meant for one pass over a whole sequence: while decoding, a call averages over its own query only. In a
    packed tower (Qwen) the chunks of a layer are put together again: [1, heads, patches of the batch], each patch with
    the mean over the queries of its own image or window.

    With `relative`, values are in units of uniform attention: in a tower that over all keys of a call, in windows too,
    which have fewer keys than the image; in a decoder that over the keys which each query sees.
    """
    modules = _attending(lvlm, side, None)
    by_query = relative and side == "decoder"  # uniform over what each query sees
    results: dict[int, list] = {layer: [] for layer in modules}
    chunks: dict[int, list] = {layer: [] for layer in modules}

    def see(layer: int, attention: "_Attention") -> None:
        index = torch.arange(attention.n_queries, device=attention.query.device)
        total = count = even = 0
        for rows in index[queries].split(block):
            if attention.all_visible:  # a vision tower, where this takes most of a trace's time
                total = total + attention.weights(rows).sum(2)
                count = count + len(rows)
                continue
            visible = attention.visible(rows)
            asking = visible & attention.real(rows)  # [batch or 1, 1, rows, keys]
            if by_query:
                even = even + (asking / visible.sum(-1, keepdim=True).clamp(min=1)).sum(2)  # if it were uniform
            total = total + (attention.weights(rows) * asking).sum(2)  # [batch, heads, keys]
            count = count + asking.sum(2)
        if by_query:
            chunks[layer].append(total / even)
        else:
            chunks[layer].append(total / count * (attention.n_keys if relative else 1))

    def finish(layer: int) -> None:
        results[layer].append(torch.cat(chunks[layer], dim=-1))
        chunks[layer].clear()

    with _watching(lvlm, side, modules, see, finish):
        yield results


@contextmanager
def norms_at_connector(
    lvlm: LVLM,
    layouts: Sequence[ImageLayout],
    reduce: Callable[[torch.Tensor, ImageLayout], torch.Tensor] = lambda norms, layout: norms,
) -> Iterator[list[torch.Tensor]]:
    """Collect `reduce(norms, layout)` of each image: norms of its patches at the connector, float32, on the CPU."""
    found: list[torch.Tensor] = []

    def keep(patches: torch.Tensor, layer: int) -> torch.Tensor:
        if layer == lvlm.feature_layer:
            norms = token_norms(patches.detach()).cpu()  # [patches of the batch]
            found[:] = [reduce(norms[layout.at("input")], layout) for layout in layouts]
        return patches

    with lvlm.editing(before=keep):
        yield found


@dataclass(frozen=True)
class Trace:
    """What `trace` saw, on the CPU in float32.

    For LLaVA patch j of the tower is visual token j of the decoder; elsewhere see `layouts`.
    """

    vision_norms: torch.Tensor  # [images, vision layers, patches]
    vision_received: torch.Tensor  # [images, vision layers, heads, patches], mean attention from all tokens
    projected_norms: torch.Tensor  # [images, visual tokens], as they enter the decoder
    decoder_norms: torch.Tensor  # [images, decoder layers, visual tokens]
    last_attention: torch.Tensor  # [images, decoder layers, heads, visual tokens], from the last prompt token
    output_attention: torch.Tensor | None  # the same, mean over the queries that produced the answer
    answers: list[str] | None  # None, as output_attention, if nothing was generated
    layouts: list[ImageLayout]  # of the images, each within its batch; `lift` brings patches to visual tokens


@torch.no_grad()
def trace(
    lvlm: LVLM,
    images: Sequence[Any],
    questions: Sequence[str],
    max_new_tokens: int = 0,
    batch_size: int = 16,
) -> Trace:
    """Follow each image with its question through tower, connector and decoder, in one vision pass each.

    With `max_new_tokens` > 0 the model answers greedily, and `output_attention` is the mean over the queries
    that produced the answer's tokens, the end token included: the last prompt token, whose output is the
    first token of the answer, and then each token of the answer but the last.

    Raises:
        ValueError: as `LVLM.batches`, or if the images have different numbers of patches or visual tokens.
    """
    batches = lvlm.batches(images, batch_size, questions)
    parts = [_trace_batch(lvlm, inputs, max_new_tokens, of.start) for of, inputs in batches]
    _same_sizes([layout for part in parts for layout in part.layouts])
    return Trace(**{field.name: _joined([getattr(part, field.name) for part in parts]) for field in fields(Trace)})


@torch.no_grad()
def trace_tower(
    lvlm: LVLM, images: Sequence[Any], batch_size: int = 16
) -> tuple[torch.Tensor, torch.Tensor, list[ImageLayout]]:
    """Follow each image through the tower alone.

    Returns:
        On the CPU in float32: the norms of patches after each layer [images, vision layers, patches]; the mean
        attention that they receive from all tokens that see them, in units of uniform attention, [images, vision
        layers, heads, patches]; and the images' layouts. Patches stand row by row, tile after tile.

    Raises:
        ValueError: as `LVLM.batches`, or if the images have different numbers of patches.
    """
    norms, received, layouts = [], [], []
    for of, inputs in lvlm.batches(images, batch_size):
        of_batch = lvlm.layout(inputs)
        layouts += of_batch
        _same_sizes(layouts)
        with (
            hidden_states(lvlm, "vision") as norms_of,
            attention_received(lvlm, "vision", relative=True) as received_by,
        ):
            lvlm.see(inputs)
        norms.append(_of_patches(norms_of, of_batch))
        check_finite(lvlm, norms[-1], of.start, "tower")
        received.append(_of_patches(received_by, of_batch))
    return torch.cat(norms), torch.cat(received), layouts


def _joined(parts: list) -> torch.Tensor | list | None:
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return None if parts[0] is None else sum(parts, [])


def _same_sizes(layouts: list[ImageLayout]) -> None:
    sizes = {(len(layout.vision), len(layout.visual)) for layout in layouts}
    if len(sizes) > 1:
        raise ValueError(
            f"a trace needs images of one size: these have (patches, visual tokens) {sorted(sizes)}; bring them to one"
        )


def _of_patches(results: dict[int, list], layouts: list[ImageLayout]) -> torch.Tensor:
    """[tiles, (heads,) tokens] of each layer of the tower -> [batch, layers, (heads,) patches]."""
    patches = torch.stack([layout.vision for layout in layouts])  # [batch, patches]
    found = []
    for calls in results.values():
        tiles = calls[0].cpu()  # a packed tower has norms [patches of the batch]
        flat = tiles.transpose(1, 2).flatten(0, 1) if tiles.ndim == 3 else tiles.flatten()
        found.append(flat[patches].transpose(1, -1))
    return torch.stack(found, dim=1)


def _trace_batch(lvlm: LVLM, inputs: BatchFeature, max_new_tokens: int, first: int) -> Trace:
    layouts = lvlm.layout(inputs)
    _same_sizes(layouts)
    visual = torch.stack([layout.visual for layout in layouts]).to(lvlm.device)  # [batch, visual tokens]

    def to_visual(weights: torch.Tensor, layer: int) -> torch.Tensor:
        forgotten = inputs["input_ids"].shape[1] + len(rows[layer]) - weights.shape[-1]  # by a sliding window's cache
        columns = (visual - forgotten)[:, None].expand(-1, weights.shape[1], -1).to(weights.device)
        return weights[:, :, 0].gather(-1, columns.clamp(min=0)) * (columns >= 0)  # [batch, heads, visual tokens]

    def keep_norms(module: nn.Module, args: tuple, kwargs: dict) -> None:
        entering.append(token_norms(args[0] if args else kwargs["hidden_states"]))

    entering: list[torch.Tensor] = []
    with (
        lvlm.decoder_layers[0].register_forward_pre_hook(keep_norms, with_kwargs=True),
        hidden_states(lvlm, "vision") as vision_norms,
        hidden_states(lvlm, "decoder") as decoder_norms,
        attention_received(lvlm, "vision") as received,
        attention_rows(lvlm, "decoder", to_visual) as rows,
    ):
        if max_new_tokens:
            sequences = lvlm.generate(inputs, max_new_tokens).sequences
        else:
            lvlm.model(**inputs, logits_to_keep=1)

    def stack(results: dict[int, list], call: int = 0) -> torch.Tensor:
        seen = {layer: calls[call].cpu() for layer, calls in results.items()}
        none = torch.full_like(next(iter(seen.values())), float("nan"))  # of a layer without attention
        return torch.stack([seen.get(layer, none) for layer in range(len(lvlm.decoder_layers))], dim=1)

    tower_norms, of_decoder = _of_patches(vision_norms, layouts), stack(decoder_norms)
    check_finite(lvlm, tower_norms, first, "tower")
    padding = inputs["attention_mask"].cpu()[:, None] == 0
    check_finite(lvlm, of_decoder.masked_fill(padding, 0), first, "decoder")  # the first token may be what overflows
    of_decoder = of_decoder.gather(-1, visual.cpu()[:, None].expand(-1, len(decoder_norms), -1))
    output_attention = answers = None
    if max_new_tokens:
        tokens = sequences[:, inputs.input_ids.shape[1] :]  # [batch, steps]
        n_steps = len(next(iter(rows.values())))
        steps = torch.stack([stack(rows, call) for call in range(n_steps)])
        weight = until_end(tokens.cpu(), lvlm.ends).T  # [steps, batch]
        weight = (weight / weight.sum(0))[:, :, None, None, None]
        output_attention = (steps * weight).sum(0)  # [steps, batch, layers, heads, visual tokens] -> [batch, ..]
        answers = [text.strip() for text in lvlm.processor.batch_decode(tokens, skip_special_tokens=True)]
    return Trace(
        vision_norms=tower_norms,
        vision_received=_of_patches(received, layouts),
        projected_norms=entering[0].cpu().gather(-1, visual.cpu()),
        decoder_norms=of_decoder,
        last_attention=stack(rows),
        output_attention=output_attention,
        answers=answers,
        layouts=layouts,
    )


def until_end(tokens: torch.Tensor, end_ids: list[int]) -> torch.Tensor:
    """1 for the tokens of an answer up to and with its first end token, then 0: [batch, steps], float."""
    is_end = torch.isin(tokens, torch.tensor(end_ids, dtype=tokens.dtype))
    ends_before = is_end.cumsum(1) - is_end.long()
    return (ends_before == 0).float()


def _select(lvlm: LVLM, side: Side, layers: Sequence[int] | None) -> dict[int, nn.Module]:
    """Layer modules by index from 0, in order."""
    if side not in ("vision", "decoder"):
        raise ValueError(f"side is 'vision' or 'decoder', not {side!r}")
    modules = lvlm.vision_layers if side == "vision" else lvlm.decoder_layers
    wanted = range(len(modules)) if layers is None else sorted(range(len(modules))[layer] for layer in layers)
    return {layer: modules[layer] for layer in wanted}


def _attending(lvlm: LVLM, side: Side, layers: Sequence[int] | None) -> dict[int, nn.Module]:
    """Attention modules by layer; a layer of another kind (a convolution, linear attention) has none."""
    path = lvlm.spec.vision_attention if side == "vision" else lvlm.spec.decoder_attention
    found = {}
    for layer, block in _select(lvlm, side, layers).items():
        try:
            found[layer] = block.get_submodule(path)
        except AttributeError:
            continue
    return found


@dataclass(frozen=True)
class _Attention:
    """One call of one attention module, from which any rows can be had."""

    query: torch.Tensor  # [batch, heads, queries, head width], rotated
    key: torch.Tensor  # [batch, key heads, keys, head width]
    mask: torch.Tensor | None  # [batch or 1, 1 or heads, queries, keys]: bool (True is seen) or float, added
    causal: bool  # SDPA's own causal mask is on; then `mask` is None
    scaling: float

    @property
    def n_queries(self) -> int:
        return self.query.shape[2]

    @property
    def n_keys(self) -> int:
        return self.key.shape[2]

    @property
    def all_visible(self) -> bool:
        """Every query sees every key, and nothing is padding."""
        return self.mask is None and not self.causal

    @cached_property
    def _keys(self) -> torch.Tensor:
        """[batch, key heads, head width, keys], float32, as a product of matrices takes them."""
        return self.key.float().contiguous().transpose(-1, -2)

    def visible(self, rows: torch.Tensor) -> torch.Tensor:
        """Which keys each of these queries may attend to: bool [batch or 1, 1 or heads, rows, keys]."""
        if self.mask is None:
            last = rows if self.causal else torch.full_like(rows, self.n_keys)
            return (torch.arange(self.n_keys, device=rows.device) <= last[:, None])[None, None]
        mask = self.mask[:, :, rows, : self.n_keys]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2

    def real(self, rows: torch.Tensor) -> torch.Tensor:
        """Which queries see themselves, so are no padding: bool [batch or 1, 1 or heads, rows, 1]."""
        itself = self.n_keys - self.n_queries + rows  # the queries are the newest keys
        visible = self.visible(rows)
        return visible.gather(-1, itself.view(1, 1, -1, 1).expand(*visible.shape[:2], -1, 1))

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        """softmax(q k^T * scaling + mask) of these queries, float32 [batch, heads, rows, keys]."""
        q = self.query[:, :, rows].float() * self.scaling  # there are fewer of these than of scores
        q = q.unflatten(1, (self.key.shape[1], -1))  # [batch, key heads, group, rows, width]
        scores = q.flatten(2, 3) @ self._keys  # query head h reads key head h // group
        scores = scores.unflatten(2, (-1, len(rows))).flatten(1, 2)
        if self.all_visible:
            return scores.softmax(-1)
        if self.mask is not None and self.mask.dtype != torch.bool:
            scores = scores + self.mask[:, :, rows, : self.n_keys].float()
        scores = scores.masked_fill(~self.visible(rows), float("-inf"))
        return scores.softmax(-1).nan_to_num(0.0)  # a row that sees nothing is padding


def _watched_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA attention that first shows its inputs to whoever watches this module, and lets editors change its output."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    attention = _Attention(
        query=query,
        key=key,
        mask=attention_mask,
        causal=causal and attention_mask is None and query.shape[2] > 1,  # as sdpa_attention_forward has it
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    for see in getattr(module, "_watchers", ()):
        see(attention)
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
    )
    for edit in getattr(module, "_editors", ()):
        output = edit(attention, value, output)
    return output, None


# transformers finds attention and mask functions by name; without the second line the mask would be None
AttentionInterface.register("sinkstudy_watched", _watched_attention)
AttentionMaskInterface.register("sinkstudy_watched", sdpa_mask)


def editing_attention(
    lvlm: LVLM,
    edit: Callable[[int, "_Attention", torch.Tensor, torch.Tensor], torch.Tensor],
    layers: Sequence[int],
) -> AbstractContextManager[None]:
    """Change what attention modules of the decoder put out, before their output projection.

    `edit(layer, attention, value, output)` gets queries, keys and mask as `attention`, the values
    [batch, key heads, keys, head width] and SDPA's output [batch, queries, heads, head width], and returns such an
    output. Whoever watches attention inside sees it as it was before the change.
    """
    modules = _attending(lvlm, "decoder", layers)
    return _attached(lvlm.decoder, "_editors", {module: partial(edit, layer) for layer, module in modules.items()})


@contextmanager
def _watching(
    lvlm: LVLM,
    side: Side,
    modules: Mapping[int, nn.Module],
    see: Callable[[int, _Attention], None],
    finish: Callable[[int], None] = lambda layer: None,
) -> Iterator[None]:
    """Call `see(layer, attention)` at every attention of these modules, and `finish(layer)` when one is done.

    A module attends more than once where the tower is packed. Contexts may be nested.
    """
    part = lvlm.vision if side == "vision" else lvlm.decoder
    with ExitStack() as stack:
        for layer, module in modules.items():
            stack.enter_context(module.register_forward_hook(lambda m, args, out, layer=layer: finish(layer)))
        watchers = {module: partial(see, layer) for layer, module in modules.items()}
        stack.enter_context(_attached(part, "_watchers", watchers))
        yield


@contextmanager
def _attached(part: PreTrainedModel, attribute: str, functions: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Inside, attention modules of a part of the model hold these functions, which `_watched_attention` calls."""
    before = part.config._attn_implementation
    try:
        for module, function in functions.items():
            setattr(module, attribute, [*getattr(module, attribute, []), function])
        part.set_attn_implementation("sinkstudy_watched")
        yield
    finally:
        part.set_attn_implementation(before)
        for module, function in functions.items():
            kept = [other for other in getattr(module, attribute, []) if other is not function]
            setattr(module, attribute, kept) if kept else delattr(module, attribute)
