"""DIYSink's two connectors (2510.08510, "To Sink or Not to Sink"): one for the tower's sinks, one for other patches.

The visual tokens of both stand behind each other, those of the sinks first, and take position ids in that order. Either
block can be left out, as stage 1 of the training and hard routing do, and each can have a weight, as soft routing does.
Four controls have the same training: one new connector (`OneConnector`), one with as many parameters as two, two
connectors between which as many random tokens are divided, and two whose tokens stay in their places.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from sinkstudy import sinks
from sinkstudy.answers.evaluate import Intervention, Prefixes
from sinkstudy.effects import moving
from sinkstudy.effects.ablation import narrowed, token_places
from sinkstudy.model import capture
from sinkstudy.model.groups import judged
from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM
from sinkstudy.trained.loop import Method

Show = Literal["both", "sinks", "others"]


class OneConnector(Method):
    """The baseline: a connector trained anew, from the same start and for as long as those of DIYSink.

    Args:
        width: neurons between its two linear layers; those of the model's own by default. `matched_width` gives one
            with as many parameters as two connectors.
        normed: whether a LayerNorm follows the connector, whose gain begins where a visual token has the median norm of
            the decoder's word embeddings. A rival that came later (2512.08374): visual tokens are much longer than
            words, and move little in a decoder that adds to them. The form is ours as far as the source leaves it open.
        seed: of the connector's first weights.
        decoder: whether training may change the decoder.
    """

    kind = "one-connector"
    show: Show = "both"  # of two connectors one may be shown alone, see `DIYSink`

    def __init__(
        self, lvlm: LVLM, *, width: int | None = None, normed: bool = False, seed: int = 0, decoder: bool = True
    ) -> None:
        super().__init__(lvlm, width=width, normed=normed, seed=seed, decoder=decoder)
        torch.manual_seed(seed)
        if width is not None:
            set_width(lvlm.connector, width)
        renew(lvlm, lvlm.connector)
        self.norm = nn.Identity()
        if normed:
            words = lvlm.model.get_input_embeddings().weight
            self.norm = nn.LayerNorm(words.shape[1]).to(words)
            nn.init.constant_(self.norm.weight, float(words.norm(dim=-1).median()) / words.shape[1] ** 0.5)

    @contextmanager
    def around(self, inputs: Prefixes) -> Iterator[None]:
        with self.lvlm.connector.register_forward_hook(lambda module, args, tokens: self.norm(tokens)):
            yield

    def changed(self) -> dict[str, nn.Parameter]:
        """The connectors, and the decoder with its head if it is trained."""
        parts = {"connector": self.lvlm.connector}
        if self.settings["decoder"]:
            parts |= {"decoder": self.lvlm.decoder, "head": self.model.get_output_embeddings()}
        # which names no tensor twice: a head may be the embeddings
        return super().changed() | dict(nn.ModuleDict(parts).named_parameters())


class DIYSink(OneConnector):
    """Two connectors, both new: the model's own place keeps that of the ordinary patches.

    Args:
        criterion, threshold: what a sink is, see `sinks.rule`; judged on the norms of the patches as the
            connector reads them.
        split: "sinks"; or "random", the control: as many visual tokens of the picture, drawn at random.
        front: whether the tokens of the sinks stand in front of the others. Where they stay in their places, the
            control, what two connectors do is told apart from what the place does.
        show: "both", or only the "sinks" or the "others"; what is not shown, no token of the decoder can see. Also an
            attribute, which a stage of the training may change.

    Qwen3-VL's further connectors, whose tokens are added later, are left as they are.
    """

    kind = "diysink"

    def __init__(
        self,
        lvlm: LVLM,
        *,
        criterion: str = "above_median",
        threshold: float = 3.0,
        split: Literal["sinks", "random"] = "sinks",
        front: bool = True,
        show: Show = "both",
        seed: int = 0,
        decoder: bool = True,
    ) -> None:
        rule = sinks.rule(criterion, threshold)
        if split not in ("sinks", "random"):
            raise ValueError(f"split is 'sinks' or 'random', not {split!r}")
        super().__init__(lvlm, seed=seed, decoder=decoder)
        known = {"criterion": criterion, "threshold": threshold, "split": split, "front": front, "show": show}
        self.settings = known | {"seed": seed, "decoder": decoder}
        self.rule = rule
        self.sink = copy.deepcopy(lvlm.connector)
        renew(lvlm, self.sink)
        self.show = show

    def chosen(self, norms: torch.Tensor, layout: ImageLayout) -> torch.Tensor:
        """The patches that the sinks' connector reads: norms, float [patches] -> bool [patches]."""
        mask = judged(self.rule, norms, layout.read)
        return random_split(mask, norms, layout) if self.settings["split"] == "random" else mask

    @contextmanager
    def around(
        self, inputs: Prefixes, weights: torch.Tensor | None = None, show: Show | None = None
    ) -> Iterator[None]:
        """A context in which the model reads `inputs` with two connectors.

        Args:
            weights: float [images, 2], of the tokens of the sinks and of the others; ones by default.
            show: in place of the attribute.

        Raises:
            ValueError: the decoder checkpoints its gradients, see `refuse_checkpointing`.
        """
        self.refuse_checkpointing()
        lvlm, layouts, show = self.lvlm, self.lvlm.layout(inputs), show or self.show
        masks: list[torch.Tensor] = []  # bool [patches] of each image, from the connector's pass on
        hidden: list[torch.Tensor] = []  # and then what nobody sees, and all visual tokens

        def merge(module: nn.Module, args: tuple, ordinary: torch.Tensor) -> torch.Tensor:
            norms = capture.token_norms(lvlm.rows_read(args[0])).detach().cpu()  # [patches of the batch]
            masks[:] = [self.chosen(norms[layout.at("input")], layout) for layout in layouts]
            if show != "both":
                hidden[:] = out_of_sight()
            flat = ordinary.reshape(-1, ordinary.shape[-1])  # [tokens of the batch, width]
            image, other = torch.zeros(2, len(flat), dtype=torch.long)
            for i, (layout, mask) in enumerate(zip(layouts, masks, strict=True)):
                image[layout.at("output")] = i
                other[layout.output] = 1
                other[layout.output[mask]] = 0
            image, other = image.to(flat.device), other.to(flat.device)
            both = torch.where(other[:, None] == 0, self.sink(*args).reshape(flat.shape), flat)
            if weights is not None:
                both = both * weights[image, other][:, None].to(flat)
            return both.view_as(ordinary)

        def out_of_sight() -> tuple[torch.Tensor, torch.Tensor]:
            """Behind the reordering, if there is one: an image's sinks are then its first visual tokens."""
            group, visual = token_places(layouts, inputs, masks)
            for layout in layouts:
                of_sinks = group[layout.row, layout.visual]
                if self.settings["front"]:
                    of_sinks = torch.arange(len(of_sinks)) < int(of_sinks.sum())
                group[layout.row, layout.visual] = of_sinks if show == "others" else ~of_sinks
            return group, visual

        with ExitStack() as hooks:
            hooks.enter_context(lvlm.connector.register_forward_hook(merge))
            if self.settings["front"]:
                hooks.enter_context(moving.moving(lvlm, layouts, masks, ids="renumber"))
            if show != "both":
                hooks.enter_context(narrowed(lvlm, inputs, lambda: tuple(hidden)))
            yield

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"show": self.show}

    def intervention(  # type: ignore[override]
        self, name: str, show: Show = "both", weights: tuple[float, float] | None = None
    ) -> Intervention:
        """The method for `evaluate`, with the same weights (sinks, others) for every question if given."""

        def around(lvlm: LVLM, inputs: Prefixes) -> AbstractContextManager:
            of_images = None if weights is None else torch.tensor([weights] * len(inputs.image_ids), device=lvlm.device)
            return self.around(inputs, of_images, show)

        known = super().intervention(name, show=show, weights_of_blocks=weights)
        return replace(known, around=around)


def random_split(mask: torch.Tensor, norms: torch.Tensor, layout: ImageLayout) -> torch.Tensor:
    """The patches of as many random visual tokens as have a patch in `mask`: bool [patches].

    The draw follows from which patches have the largest and the smallest norm, so that a picture is always split in
    the same way and rounding does not matter.
    """
    n_tokens, n = len(layout.visual), int(layout.lift(mask, "any").sum())
    generator = torch.Generator().manual_seed(int(norms.argmax()) * len(norms) + int(norms.argmin()))
    patch_of_token = layout.lift(torch.ones_like(mask), "any").nonzero()[:, 0]
    drawn = torch.zeros(n_tokens, dtype=torch.bool)
    drawn[patch_of_token[torch.randperm(len(patch_of_token), generator=generator)[:n]]] = True
    token = torch.searchsorted(layout.visual, layout.positions.clamp(min=0))
    return (drawn[token.clamp(max=n_tokens - 1)] & (layout.positions >= 0)).any(1)


# ------------------------------------------------------------------------------------------------- new connectors
def linear_pair(connector: nn.Module) -> tuple[nn.Module, str, str]:
    """The two linear layers of a connector, one of which reads what the other puts out.

    Returns:
        The module that holds them, and their names in it.

    Raises:
        ValueError: it has no such two.
    """
    for module in connector.modules():
        names = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
        if len(names) == 2:
            first, second = (getattr(module, name) for name in names)
            if first.out_features == second.in_features:
                return module, *names
    raise ValueError(f"{type(connector).__name__} does not have two linear layers, one behind the other")


def matched_width(connector: nn.Module) -> int:
    """Neurons between the linear layers that give one connector as many parameters as two such have.

    A neuron has in + 1 + out parameters: as many more as have those of one connector, rounded down.
    """
    module, *names = linear_pair(connector)
    first, second = (getattr(module, name) for name in names)
    each = first.in_features + second.out_features + (first.bias is not None)
    return first.out_features + sum(p.numel() for p in connector.parameters()) // each


def set_width(connector: nn.Module, width: int) -> None:
    """Give a connector new linear layers with `width` neurons between them."""
    module, *names = linear_pair(connector)
    first, second = (getattr(module, name) for name in names)
    like = {"device": first.weight.device, "dtype": first.weight.dtype}
    setattr(module, names[0], nn.Linear(first.in_features, width, first.bias is not None, **like))
    setattr(module, names[1], nn.Linear(width, second.out_features, second.bias is not None, **like))


def renew(lvlm: LVLM, connector: nn.Module) -> None:
    """Give a connector the first weights that its library gives a new model, from torch's random state."""
    connector.apply(lvlm.model._init_weights)
