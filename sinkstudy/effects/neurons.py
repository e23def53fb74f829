"""Which neurons of the vision tower write high norms: find them, silence them, let them fire elsewhere.

A *neuron* is one entry of the hidden layer of a tower layer's MLP, after the nonlinearity: an input of the linear map
`Spec.vision_neurons`. Neurons are given as {layer: indices, long [k]}, tokens as rows of the tower's hidden states
flattened to [tokens of the batch, width], where `ImageLayout.vision` finds a patch.

The contexts change every forward pass inside them and leave no trace when they end. `silence`, `fire` and
`set_dimensions` wrap them for `evaluate.evaluate`.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from sinkstudy.answers.evaluate import NONE, Intervention, Prefixes
from sinkstudy.effects.ablation import Masks, of_images
from sinkstudy.model import capture
from sinkstudy.model.lvlm import LVLM

Neurons = Mapping[int, torch.Tensor]  # {vision layer: long [neurons]}


@torch.no_grad()
def mean_activations(
    lvlm: LVLM,
    pictures: Sequence[Any],
    masks: Mapping[str, torch.Tensor],
    magnitude: bool = True,
    batch_size: int = 16,
) -> dict[str, torch.Tensor]:
    """Mean post-activation of every neuron over the patches of each group.

    Args:
        pictures: as for `LVLM.inputs`, of one number of patches.
        masks: the patches of each group, bool [pictures, patches].
        magnitude: of `|activation|`; otherwise of the activation with its sign.

    Returns:
        For each group float32 [vision layers, neurons], over all its patches of all pictures; NaN for an empty group.
        Layers behind the connector's, which nothing reads, are there too.
    """
    sums: dict[str, list] = {group: [0.0] * len(lvlm.vision_layers) for group in masks}

    def add(layer: int, module: nn.Module, args: tuple) -> None:
        active = args[0].detach().flatten(0, -2).float()  # [tokens of the batch, neurons]
        active = active.abs() if magnitude else active
        for group, tokens in chosen.items():
            sums[group][layer] = sums[group][layer] + active[tokens.to(active.device)].sum(0).cpu()

    with ExitStack() as hooks:
        for layer in range(len(lvlm.vision_layers)):
            hooks.enter_context(_reader(lvlm, layer).register_forward_pre_hook(partial(add, layer)))
        for of, inputs in lvlm.batches(pictures, batch_size):
            layouts = lvlm.layout(inputs)
            chosen = {
                group: torch.cat([layout.vision[own] for layout, own in zip(layouts, mask[of], strict=True)])
                for group, mask in masks.items()
            }
            lvlm.see(inputs)
    counts = {group: mask.sum() for group, mask in masks.items()}
    return {group: torch.stack(of_layers) / counts[group] for group, of_layers in sums.items()}


def layer_of_rise(norms: torch.Tensor, masks: torch.Tensor) -> int:
    """The layer in which a group's norm rises: the first where it has come half the way to its largest value.

    Jiang et al., "Vision Transformers Don't Need Trained Registers" (2506.08010), look for neurons no further than the
    layer in which the norms of outliers first jump, and name it by hand: 5, counted from 0, in CLIP-B/16. Where norms
    rise step by step, half the way is our reading of it. A norm counts in units of the median norm of its own picture
    and layer, as in the rule for sinks (`sinks.above_median`), because all norms grow from layer to layer; the way
    leads from 1 up.

    Args:
        norms: float [pictures, layers, patches], in the layers up to the one that the connector reads.
        masks: the group, bool [pictures, patches].

    Raises:
        ValueError: in no layer is it above 1.
    """
    over_median = norms / norms.quantile(0.5, dim=-1, keepdim=True)
    ratio = torch.stack([of_layer[masks].mean() for of_layer in over_median.unbind(1)])  # [layers]
    if not ratio.max() > 1:
        raise ValueError("no neurons write the group's norm: in no layer of the tower is it above its picture's median")
    return int((ratio >= (1 + ratio.max()) / 2).nonzero()[0])


def register_scores(lvlm: LVLM, pictures: Sequence[Any], masks: torch.Tensor, batch_size: int = 16) -> torch.Tensor:
    """How much more active each neuron is on a group: mean `|activation|` on its patches less that on the others.

    Jiang et al. (2506.08010) take the plain mean on outliers, which a neuron that fires everywhere would win too.

    Args:
        pictures: as for `LVLM.inputs`, of one number of patches.
        masks: the group, bool [pictures, patches].

    Returns:
        Float32 [layers, neurons], of the layers up to `layer_of_rise`.

    Raises:
        ValueError: an empty group, pictures of different sizes, or as `layer_of_rise`.
    """
    if not masks.any() or masks.all():
        raise ValueError("register neurons are found by a group of patches and the others: one of the two is empty")
    norms = capture.trace_tower(lvlm, pictures, batch_size)[0][:, : lvlm.feature_layer + 1]
    active = mean_activations(lvlm, pictures, {"group": masks, "others": ~masks}, batch_size=batch_size)
    return (active["group"] - active["others"])[: layer_of_rise(norms, masks) + 1]


def strongest(scores: torch.Tensor, k: int) -> dict[int, torch.Tensor]:
    """The k neurons of the highest scores, [vision layers, neurons]; Jiang et al. (2506.08010) take 10 in CLIP-B/16.

    Raises:
        ValueError: if there are fewer than k.
    """
    if k > scores.numel():
        raise ValueError(f"{len(scores)} layers have {scores.numel()} neurons, fewer than k = {k}")
    best = scores.flatten().topk(k).indices
    layers, indices = best // scores.shape[1], best % scores.shape[1]
    return {layer: indices[layers == layer].sort().values for layer in sorted(set(layers.tolist()))}


def random_neurons(neurons: Neurons, n: int, seed: int) -> dict[int, torch.Tensor]:
    """As many other neurons of the same layers, drawn at random from the n that each layer has.

    Where a layer has too few others, all of them are taken.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for layer, taken in neurons.items():
        order = torch.randperm(n, generator=generator)
        drawn[layer] = order[~torch.isin(order, taken)][: len(taken)].sort().values
    return drawn


@contextmanager
def setting(
    lvlm: LVLM,
    neurons: Neurons,
    tokens: torch.Tensor | None = None,
    values: Mapping[int, torch.Tensor] | float = 0.0,
) -> Iterator[None]:
    """Set the post-activation of neurons at some tokens of the tower; everything else computes as it does.

    Args:
        tokens: where, long [n]; by default everywhere, CLS and registers included.
        values: of each neuron, float [k] a layer; or one for all, by default 0: the neurons are silent.
    """

    def set_(layer: int, module: nn.Module, args: tuple) -> tuple:
        active = args[0].clone()
        flat = active.view(-1, active.shape[-1])  # [tokens of the batch, neurons]
        value = values if isinstance(values, float) else values[layer].to(flat)
        where = slice(None) if tokens is None else tokens.to(flat.device)[:, None]
        flat[where, neurons[layer].to(flat.device)] = value
        return (active, *args[1:])

    with ExitStack() as hooks:
        for layer in neurons:
            hooks.enter_context(_reader(lvlm, layer).register_forward_pre_hook(partial(set_, layer)))
        yield


def takes_register(lvlm: LVLM) -> bool:
    """Can a token be added to the tower? Not to images seen as one (Qwen) or merged before the connector (InternVL)."""
    return not lvlm.spec.packed and lvlm.spec.order == "rows"


def check_takes_register(lvlm: LVLM) -> None:
    """Raise ValueError for towers that take no further token, see `takes_register`."""
    if not takes_register(lvlm):
        raise ValueError(f"{lvlm.name}: this tower takes no added token; silence the neurons instead (`setting`)")


@contextmanager
def moved_to_register(lvlm: LVLM, neurons: Neurons, passed: torch.Tensor | None = None) -> Iterator[None]:
    """Move what neurons write to a token that is added behind the patches of every tile: a test-time register.

    The added token enters the first layer as zeros. There each of the neurons takes the activation of the largest
    magnitude that it has anywhere in the tile, and everywhere else 0. Before the connector the token is left out
    again, so that nobody reads it, or takes the place of some patches. Jiang et al. (2506.08010). Inside the context
    the tower's hidden states have one token more in each tile, so `ImageLayout.vision` does not hold for more than one
    tile.

    Args:
        passed: patches in whose place the connector reads their tile's register: rows of its input as
            `ImageLayout.connector` has them, long [n]; none by default.

    Raises:
        ValueError: as `check_takes_register`.
    """
    check_takes_register(lvlm)

    def append(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], dim=1)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def move(layer: int, module: nn.Module, args: tuple) -> tuple:
        active = args[0].clone()  # [tiles, tokens + 1, neurons]
        of = neurons[layer].to(active.device)
        own = active[..., of]
        active[..., of] = 0.0
        active[:, -1, of] = own.gather(1, own.abs().argmax(1, keepdim=True))[:, 0]
        return (active, *args[1:])

    def leave_out(module: nn.Module, args: tuple) -> tuple:
        hidden, register = args[0][:, :-1], args[0][:, -1:]  # [tiles, patches, width], [tiles, 1, width]
        if passed is not None:
            there = torch.zeros(hidden.shape[0] * hidden.shape[1], dtype=torch.bool, device=hidden.device)
            there[passed.to(hidden.device)] = True
            hidden = torch.where(there.view(*hidden.shape[:2], 1), register, hidden)
        return (hidden, *args[1:])

    with ExitStack() as hooks:
        hooks.enter_context(lvlm.vision_layers[0].register_forward_pre_hook(append, with_kwargs=True))
        for layer in neurons:
            hooks.enter_context(_reader(lvlm, layer).register_forward_pre_hook(partial(move, layer)))
        for connector in lvlm.connectors.values():
            hooks.enter_context(connector.register_forward_pre_hook(leave_out))
        yield


@contextmanager
def setting_dimensions(
    lvlm: LVLM, dimensions: Sequence[int], patches: torch.Tensor, values: torch.Tensor | float
) -> Iterator[None]:
    """Set some dimensions of some patches where the connector reads them.

    The intervention of Sun et al., "Massive Activations in Large Language Models" (2402.17762), who set massive
    activations to zero or to their mean over inputs. Of several connectors (Qwen3-VL) only the main one is meant.

    Args:
        dimensions: which, of the width that the connector reads.
        patches: where: rows of the connector's input as `ImageLayout.connector` has them, long [n].
        values: for each of the dimensions, float [dimensions], or one for all.
    """

    def set_(hidden: torch.Tensor, layer: int) -> torch.Tensor:
        if layer != lvlm.feature_layer:
            return hidden
        hidden = hidden.clone()
        where = patches.to(hidden.device)[:, None], torch.tensor(dimensions, device=hidden.device, dtype=torch.long)
        hidden[where] = values if isinstance(values, float) else values.to(hidden)
        return hidden

    with lvlm.editing(before=set_):
        yield


# ------------------------------------------------------------------------------------------------- interventions
def silence(name: str, neurons: Neurons) -> Intervention:
    """Neurons that are 0 at every token, as an intervention."""
    return Intervention(name, lambda lvlm, inputs: setting(lvlm, neurons), keeps="nothing")


def fire(name: str, neurons: Neurons, values: Mapping[int, torch.Tensor], masks: Masks) -> Intervention:
    """Neurons that have given values at some patches of each image, as an intervention.

    Args:
        values: of each neuron, float [neurons] a layer.
    """

    def around(lvlm: LVLM, inputs: Prefixes) -> AbstractContextManager:
        of = zip(lvlm.layout(inputs), of_images(masks, inputs), strict=True)
        return setting(lvlm, neurons, torch.cat([layout.vision[mask] for layout, mask in of]), values)

    return Intervention(name, around, keeps="nothing")


def set_dimensions(name: str, dimensions: Sequence[int], values: torch.Tensor, masks: Masks) -> Intervention:
    """`setting_dimensions` at some patches of each image, as an intervention.

    Args:
        dimensions: which, of the width that the connector reads.
        values: float [width]; the entries of `dimensions` are used.
    """

    def around(lvlm: LVLM, inputs: Prefixes) -> AbstractContextManager:
        of = zip(lvlm.layout(inputs), of_images(masks, inputs), strict=True)
        patches = torch.cat([layout.at("input")[mask] for layout, mask in of])
        return setting_dimensions(lvlm, dimensions, patches, values[list(dimensions)])

    return Intervention(name, around, {"dimensions": list(dimensions)})


@torch.no_grad()
def norms(
    lvlm: LVLM, pictures: Mapping[Hashable, Any], way: Intervention = NONE, batch_size: int = 16
) -> dict[Hashable, torch.Tensor]:
    """Norms of each picture's patches where the connector reads them: float32 [patches], on the CPU.

    Args and errors are those of `norms_and_read`.
    """
    return {key: of for key, (of, _) in norms_and_read(lvlm, pictures, way, batch_size).items()}


def norms_and_read(
    lvlm: LVLM, pictures: Mapping[Any, Any], way: Intervention = NONE, batch_size: int = 16
) -> dict[Any, tuple[torch.Tensor, torch.Tensor]]:
    """`norms`, and which of the patches the decoder gets, bool [patches], see `ImageLayout.read`.

    Args:
        pictures: by any key; of any sizes, as for `LVLM.inputs` or in a parquet file.
        way: under which the tower sees them.

    Raises:
        ValueError: norms that are not finite, with the picture's key.
    """
    found: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
    for _, inputs in _batches(lvlm, pictures, batch_size):
        layouts = lvlm.layout(inputs)
        with way.around(lvlm, inputs), capture.norms_at_connector(lvlm, layouts) as norms:
            lvlm.see(inputs)
        found |= zip(inputs.image_ids, zip(norms, [layout.read for layout in layouts], strict=True), strict=True)
        if odd := [key for key in inputs.image_ids if not found[key][0].isfinite().all()]:
            raise capture.not_finite(lvlm, "at the connector's input", repr(odd[0]))
    return found


def norms_under(
    lvlm: LVLM, pictures: Mapping[str, Any], ways: Sequence[Intervention], batch_size: int = 16
) -> dict[str, torch.Tensor]:
    """`norms` of pictures of one number of patches under each intervention: by name, float32 [pictures, patches]."""
    return {way.name: torch.stack(list(norms(lvlm, pictures, way, batch_size).values())) for way in ways}


@torch.no_grad()
def received_under(
    lvlm: LVLM, pictures: Mapping[str, Any], way: Intervention, layers: Sequence[int], batch_size: int = 16
) -> torch.Tensor:
    """Attention that patches receive in the tower under an intervention that adds no token to it.

    Args:
        pictures: by id, of one number of patches.
        layers: of the tower, over which and over whose heads the mean is taken.

    Returns:
        Float32 [pictures, patches], in units of uniform attention.
    """
    found = []
    for batch, inputs in _batches(lvlm, pictures, batch_size):
        with way.around(lvlm, inputs):
            found.append(capture.trace_tower(lvlm, batch, batch_size)[1][:, list(layers)].mean((1, 2)))
    return torch.cat(found)


def _batches(lvlm: LVLM, pictures: Mapping[Any, Any], size: int) -> Iterator[tuple[list[Any], Prefixes]]:
    ids, shown = list(pictures), list(pictures.values())
    for of, inputs in lvlm.batches(shown, size):
        yield shown[of], Prefixes(inputs, ids[of])


def _reader(lvlm: LVLM, layer: int) -> nn.Module:
    """The linear map that reads a layer's neurons."""
    return lvlm.vision_layers[layer].get_submodule(lvlm.spec.vision_neurons)
