"""What can be measured of an architecture: where its parts are, and which patch ends in which visual token.

Both come from a narrow copy of the model (`narrow`), by gradients: from the decoder's input back to the output of the
tower's feature layer, and from the tower's tokens back to the pixels. Only what is connected has a gradient.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig, PreTrainedModel

from sinkstudy.model.layout import ImageLayout, block_order
from sinkstudy.model.narrow import VOCABULARY, WIDTH, narrow, token_numbers
from sinkstudy.model.specs import Spec


def parts(model: PreTrainedModel) -> dict[str, Any]:
    """Find tower and decoder, their layers, and in these attention and the last map of the MLP: the paths of a `Spec`.

    Raises:
        ValueError: there is no decoder, or no stack of layers with attention beside it.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    decoder = paths.get(id(model.get_decoder()))
    if not decoder:
        raise ValueError(f"{type(model).__name__}: its decoder is no part of its own")
    outside = {path: m for path, m in model.named_modules() if not f"{path}.".startswith(f"{decoder}.")}
    vision = [
        path
        for path, module in outside.items()
        if isinstance(module, PreTrainedModel) and not decoder.startswith(f"{path}.") and path and _stacks(module)
        and "audio" not in path
    ]
    if not vision:
        raise ValueError(f"{type(model).__name__}: no tower of layers with attention beside its decoder")
    tower = min(vision, key=lambda path: (path.count("."), list(outside).index(path)))
    inner, layers = _stacks(model.get_submodule(tower))[0]
    below, blocks = _stacks(model.get_submodule(decoder))[0]
    return {
        "vision": tower,
        "vision_layers": f"{tower}.{inner}",
        "vision_attention": _attention(layers),
        "vision_neurons": _neurons(layers[-1], _attention(layers)),
        "decoder": decoder,
        "decoder_layers": f"{decoder}.{below}",
        "decoder_attention": _attention(blocks),
    }


def _stacks(part: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Lists of layers that have attention, the longest first."""
    found = [(path, m) for path, m in part.named_modules() if isinstance(m, nn.ModuleList) and _attention(m)]
    return sorted(found, key=lambda pair: -len(pair[1]))


QUERIES = {"q_proj", "qkv", "qkv_proj", "query", "q", "wq", "wqkv", "to_q", "q_a_proj", "query_key_value"}


def _attention(layers: nn.ModuleList) -> str | None:
    """The path within a layer of the module that makes queries and keys."""
    for layer in layers:
        for path, module in layer.named_modules():
            children = {name for name, child in module.named_children() if isinstance(child, nn.Module)}
            if path and children & QUERIES and "Linear" not in type(module).__name__:
                return path
    return None


def _neurons(layer: nn.Module, attention: str) -> str | None:
    """The last linear map of a layer outside its attention: it reads the neurons of the MLP."""
    inside = attention.split(".")[0] + "."
    linear = [p for p, module in layer.named_modules() if isinstance(module, nn.Linear) and not p.startswith(inside)]
    return linear[-1] if linear else None


def _rows(grad: torch.Tensor) -> torch.Tensor:
    return grad.flatten(0, -2)


MANY = 49  # patches behind one visual token above which a connector is said to mix: two strided convolutions read 7 x 7


def reached(source: torch.Tensor, target: torch.Tensor, rows: Callable = _rows) -> torch.Tensor | None:
    """Which rows of a target each row of a source reaches: long [source rows, k], -1 where there are less than k.

    Rows of the target are told apart by the bits of their numbers: two gradients for each bit. Only where a source
    row reaches several does each of the target's rows need one of its own. None where a target row is reached from
    more than `MANY` source rows: what lies between mixes them.

    Args:
        source: a tensor of the graph that `target` was computed from.
        target: [rows, width].
        rows: brings a gradient of the source to [source rows, values].
    """
    place = torch.arange(len(target))
    touch = _toucher(source, target, rows)
    bits = range(max(1, (len(target) - 1).bit_length()))
    ones = torch.stack([touch(place >> bit & 1 == 1) for bit in bits])
    zeros = torch.stack([touch(place >> bit & 1 == 0) for bit in bits])
    if not (ones & zeros).any():
        number = (ones * 2 ** torch.arange(len(ones))[:, None]).sum(0)
        return torch.where(ones[0] | zeros[0], number, -1)[:, None]
    if max(int(touch(place == token).sum()) for token in {0, len(target) // 2, len(target) - 1}) > MANY:
        return None
    table = torch.stack([touch(place == token) for token in range(len(target))], dim=1)  # [source rows, target rows]
    order = torch.where(table, place, len(target)).sort(1).values[:, : int(table.sum(1).max())]
    return torch.where(order < len(target), order, -1)


def _toucher(source: torch.Tensor, target: torch.Tensor, rows: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from a mask of target rows to a mask of the source rows that reach any of them."""
    # not a plain sum: the values of a normed row add up to a constant
    weighted = (target * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))).sum(-1)

    def touch(mask: torch.Tensor) -> torch.Tensor:
        grad = None
        if weighted.requires_grad and mask.any():
            (grad,) = torch.autograd.grad(weighted[mask].sum(), source, retain_graph=True, allow_unused=True)
        strength = rows(torch.zeros_like(source) if grad is None else grad).abs().amax(-1)
        return strength > 1e-5 * strength.max()

    return touch


def _read_by(leaf: torch.Tensor, read: torch.Tensor, layers: int) -> tuple[torch.Tensor | None, bool]:
    """Which rows of what a connector reads each token of the tower reaches, and whether each has a whole one alone.

    Patches may stand side by side in a row, which become one visual token, and then a row is only as wide as the tower.
    Where several layers are read and a wider row holds a single patch, these stand side by side in it.
    """
    narrow = read.shape[-1] == WIDTH
    if narrow or layers > 1:
        table = reached(leaf, _rows(read))
        rows = None if table is None or table.shape[1] > 1 else table[table >= 0]
        alone = rows is not None and len(rows.unique()) == len(rows)
        if narrow or alone:
            return table, alone
    return reached(leaf, read.reshape(-1, WIDTH)), False


class _Stop(Exception):
    """The decoder was reached."""


class Twin:
    """A narrow copy of a model, random and in float32 on the CPU, that layouts are measured on."""

    def __init__(self, config: PretrainedConfig):
        """
        Raises:
            ValueError: as `parts`, or if no narrow copy can be built.
        """
        self.config, self.tokens = narrow(config), token_numbers(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            of = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
            self.model = of._from_config(self.config, attn_implementation="sdpa", dtype=torch.float32)
            self.model.eval().requires_grad_(False)
            for parameter in self.model.parameters():  # what begins at zero would cut a path
                parameter.data += 0.05 * torch.randn_like(parameter)
        self.parts = parts(self.model)
        self.between: str | None = None  # the connector's path, "" where there is none; see `flow`
        self.spec: Spec | None = None
        self.known: dict[tuple, tuple[Flow, torch.Tensor]] = {}  # what was measured, by the form of the inputs
        self.layers = list(self.model.get_submodule(self.parts["vision_layers"]))

    def like(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of the model as its narrow copy takes them: the same shapes and special tokens, random pictures.

        What is zero stays zero, for by that padding is told.
        """
        made = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        pixels = made["pixel_values"].float()
        noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
        made["pixel_values"] = torch.where(pixels == 0, 0.0, noise)
        words = torch.full_like(made["input_ids"], VOCABULARY - 1)
        for old, new in self.tokens.items():
            words[made["input_ids"] == old] = new
        return {**made, "input_ids": words}

    @contextmanager
    def _leaves(self) -> Iterator[dict[int, torch.Tensor]]:
        """The outputs of the tower's layers, each cut off from those below it."""
        leaves: dict[int, torch.Tensor] = {}

        def cut(layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            leaves[layer] = hidden.detach().requires_grad_()
            return (leaves[layer], *output[1:]) if isinstance(output, tuple) else leaves[layer]

        with ExitStack() as stack:
            for layer, module in enumerate(self.layers):
                stack.enter_context(module.register_forward_hook(partial(cut, layer), prepend=True))
            yield leaves

    def embedded(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What enters the decoder, [batch, tokens, width]."""
        return self._entering(self.model.get_submodule(self.parts["decoder"]), inputs, "inputs_embeds")

    def _entering(self, part: nn.Module, inputs: Mapping[str, Any], name: str = "") -> torch.Tensor:
        """What enters a part of the model, by its name or else the first tensor; the forward pass ends there."""
        seen = []

        def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            seen.append(kwargs[name] if name else next(tensors))
            raise _Stop

        with part.register_forward_pre_hook(stop, with_kwargs=True), suppress(_Stop):
            self.model(**inputs)
        return seen[0]

    @torch.enable_grad()
    def flow(self, inputs: Mapping[str, Any]) -> "Flow":
        """Where the tokens of the tower go.

        Raises:
            ValueError: no layer of the tower reaches the decoder's input.
        """
        if self.between is None:
            self.between = self.connector(inputs)
        through: list[tuple[torch.Tensor, torch.Tensor]] = []  # what the connector read and put out

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, torch.Tensor) and args and args[0].is_floating_point():
                through.append((args[0], output))

        with ExitStack() as stack:
            if self.between:
                stack.enter_context(self.model.get_submodule(self.between).register_forward_hook(keep))
            leaves = stack.enter_context(self._leaves())
            embedded = self.embedded(inputs)
        image = inputs["input_ids"] == self.config.image_token_id
        target = embedded[image]
        whole = torch.ones(len(target), dtype=torch.bool)
        read = [k for k, leaf in leaves.items() if _toucher(leaf, target, _rows)(whole).any()]
        if not read:
            raise ValueError(f"{self.config.model_type}: no layer of the tower reaches the decoder's input")
        leaf = leaves[read[-1]]
        touch, row = _toucher(leaf, target, _rows), image.nonzero()[:, 0]
        connector, alone = _read_by(leaf, through[0][0], len(read)) if len(through) == 1 else (None, False)
        return Flow(
            read=read,
            shape=tuple(leaf.shape),
            tokens=reached(leaf, target),
            rows=torch.stack([touch(row == r) for r in range(len(image))], dim=1),
            connector=connector,
            alone=alone,
            wide=alone and through[0][0].shape[-1] > WIDTH,
            output=reached(leaf, _rows(through[0][1])) if len(through) == 1 else None,
        )

    def connector(self, inputs: Mapping[str, Any]) -> str:
        """The path of the module between tower and decoder: the last outermost one whose output the tower reaches."""
        names = {id(module): path for path, module in self.model.named_modules()}
        kept = [self.parts["vision_layers"], self.parts["decoder"]]
        called: list[str] = []

        def note(module: nn.Module, args: tuple, output: Any) -> None:
            path = names.get(id(module))
            holds = any(f"{part}.".startswith(f"{path}.") for part in kept) or path == ""
            inside = any(f"{path}.".startswith(f"{part}.") for part in kept)
            if path is None or holds or inside or not any(p.ndim > 1 for p in module.parameters()):
                return
            if isinstance(output, torch.Tensor) and output.requires_grad:
                called[:] = [other for other in called if not other.startswith(f"{path}.")]
                called.append(path)

        with register_module_forward_hook(note), torch.enable_grad(), self._leaves():
            self.embedded(inputs)
        return called[-1] if called else ""

    @torch.enable_grad()
    def pixels(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The token of the tower's first layer that each pixel, or row of values, reaches: long [pixels, k]."""
        pixels = inputs["pixel_values"].detach().clone().requires_grad_()
        first = self._entering(self.layers[0], {**inputs, "pixel_values": pixels}).flatten(0, -2)
        in_planes = pixels.ndim >= 4  # [.., channels, height, width]
        by_row = (lambda grad: grad.movedim(-3, -1).flatten(0, -2)) if in_planes else _rows
        return reached(pixels, first, by_row)


@dataclass(frozen=True)
class Flow:
    """Where the tokens of a tower go. A matrix is None where what lies between mixes the tokens."""

    read: list[int]  # the layers whose outputs are read
    shape: tuple[int, ...]  # of the feature layer's output
    tokens: torch.Tensor | None  # long [tokens of the tower, k]: visual tokens of the batch that each reaches, or -1
    rows: torch.Tensor  # bool [tokens of the tower, batch]: the prompts that each reaches
    connector: torch.Tensor | None  # long [tokens of the tower, k]: rows of the connector's input
    alone: bool  # each token has such a row for itself, before any merge
    wide: bool  # a row that holds several layers side by side
    output: torch.Tensor | None  # the same of its output, [.., decoder width]


KEPT = 8
_TWINS: dict[str, Twin] = {}


def twin(config: PretrainedConfig) -> Twin:
    """The narrow copy of a model with this configuration; the last few are kept."""
    key = config.to_json_string(use_diff=False)
    if key not in _TWINS:
        while len(_TWINS) >= KEPT:
            del _TWINS[next(iter(_TWINS))]
        _TWINS[key] = Twin(config)
    return _TWINS[key]


def spec(config: PretrainedConfig, inputs: Mapping[str, Any], processor_class: str = "") -> Spec:
    """What a `Spec` says of an architecture, as far as it can be measured.

    Args:
        inputs: a prompt with a picture, as the model takes it.

    Raises:
        ValueError: as `parts` and `layouts`.
    """
    copy = twin(config)
    if copy.spec is None:
        like = copy.like(inputs)
        flow, found = copy.flow(like), layouts(copy, like)
        layout, patches = found[0], sum(len(one.vision) for one in found)
        in_own_size = "image_sizes" in like and not getattr(config, "image_grid_pinpoints", None)  # Pixtral
        packed = in_own_size or _grids(like, patches) is not None
        tokens = layout.positions[layout.positions >= 0].unique()
        several = 0 if flow.tokens is None else layout.read.sum() / len(tokens)
        copy.spec = Spec(
            model_class=type(copy.model).__name__,
            processor_class=processor_class,
            **copy.parts,
            connector=copy.between,
            deepstack=next((p for p, _ in copy.model.named_modules() if p.endswith(".deepstack_merger_list")), None),
            merge=round(float(several) ** 0.5),
            packed=packed,
            prefix=0 if packed else flow.shape[1] - len(layout.vision) // layout.tiles,
            order="rows" if flow.alone else "blocks",
            whole_rows=flow.wide,
            mixes=flow.tokens is None,
            measured=True,
        )
    return copy.spec


def layouts(twin: Twin, inputs: Mapping[str, Any]) -> list[ImageLayout]:
    """Where the patches of the pictures of each prompt are, measured once for each form of the inputs.

    Args:
        inputs: those of the narrow copy, see `Twin.like`.

    Raises:
        ValueError: pictures of one prompt have different grids, or the order of the patches cannot be told.
    """
    key = _form(inputs, twin.config.image_token_id)
    if key not in twin.known:
        flow, seen = twin.flow(inputs), twin.pixels(inputs)
        if seen is None or seen.shape[1] > 1:
            raise ValueError(f"{twin.config.model_type}: a pixel is seen by several of the tower's tokens")
        if int(seen.max()) >= len(flow.rows):
            raise ValueError(f"{twin.config.model_type}: the tower merges tokens between its layers, so that those of "
                             "its feature layer are no patches")
        twin.known[key] = flow, _places(inputs["pixel_values"], seen[:, 0], len(flow.rows))
    flow, places = twin.known[key]
    grids = _grids(inputs, int((flow.rows.any(1) & (places[:, 0] >= 0)).sum()))
    found = []
    for row in range(len(inputs["input_ids"])):
        visual = (inputs["input_ids"][row] == twin.config.image_token_id).nonzero()[:, 0]
        before = int((inputs["input_ids"][:row] == twin.config.image_token_id).sum())
        mine = flow.rows[:, row]
        if grids is None:  # whole tiles, for what is cut off reaches nothing
            mine = torch.isin(places[:, 0], places[mine, 0].unique()) & (places[:, 0] >= 0)
        index = mine.nonzero()[:, 0]
        index = index[torch.from_numpy(np.lexsort(places[index].T.flip(0).numpy()))]
        if flow.tokens is None:
            tokens = torch.arange(len(visual)).expand(len(index), -1)
        else:
            k = max(1, int((flow.tokens[index] >= 0).sum(1).max()))
            tokens = torch.where(flow.tokens[index] >= 0, flow.tokens[index] - before, -1)[:, :k]
        if grids is None:
            _, tile = places[index, 0].unique_consecutive(return_inverse=True)
            of_tiles = [places[index[tile == t]] for t in tile.unique()]
            sizes = {(len(one[:, 1].unique()), len(one[:, 2].unique())) for one in of_tiles}
        else:
            first = sum(int(other.sum()) for other in flow.rows.T[:row])
            tile, sizes, index, tokens = _in_rows(grids, first, index, tokens, flow.tokens is None)
        if len(sizes) > 1:
            raise ValueError(f"row {row} has pictures of several grids: {sorted(sizes)}")
        found.append(
            ImageLayout(
                row=row,
                grid=sizes.pop(),  # type: ignore[arg-type]
                tiles=int(tile.max()) + 1,
                visual=visual,
                vision=index,
                connector=_first(flow.connector, index),
                output=_first(flow.output, index),
                positions=torch.where(tokens >= 0, visual[tokens.clamp(min=0)], -1),
            )
        )
    return found


def _form(inputs: Mapping[str, Any], image: int) -> tuple:
    """What the flow depends on: shapes, whole numbers such as grids, and visual tokens of each prompt."""
    form = [tuple((inputs["input_ids"] == image).sum(1).tolist())]
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor) and key not in ("input_ids", "attention_mask") and "type_ids" not in key:
            form.append((key, tuple(value.shape), () if value.is_floating_point() else tuple(value.flatten().tolist())))
    return tuple(form)


def _first(table: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor:
    """The one row that each patch reaches; -1 where there is none or more than one."""
    if table is None or table.shape[1] > 1:
        return torch.full_like(index, -1)
    return table[index, 0]


def _places(pixels: torch.Tensor, seen: torch.Tensor, n: int) -> torch.Tensor:
    """(tile, top, left) of what each of n tokens sees, -1 for a token that sees no pixel: long [n, 3]."""
    if pixels.ndim >= 4:
        tiles = pixels.movedim(-3, -1).flatten(0, -4)  # [tiles, height, width, channels]
        where = torch.cartesian_prod(*(torch.arange(size) for size in tiles.shape[:3]))
    else:
        where = torch.stack([torch.zeros(len(seen)), torch.arange(len(seen)), torch.zeros(len(seen))], 1).long()
    far = torch.full((n, 3), torch.iinfo(torch.long).max)
    kept = seen >= 0
    places = far.scatter_reduce(0, seen[kept, None].expand(-1, 3), where[kept], "amin")
    return torch.where(places < torch.iinfo(torch.long).max, places, -1)


def _grids(inputs: Mapping[str, Any], patches: int) -> list[tuple[int, int]] | None:
    """(rows, columns) of the patches of each picture, where an input says so: its products count all patches."""
    for key, value in inputs.items():
        whole = isinstance(value, torch.Tensor) and value.ndim == 2 and not value.is_floating_point()
        if whole and value.shape[1] in (2, 3) and key not in ("input_ids", "attention_mask"):
            if int(value.prod(1).sum()) == patches:
                return [(int(one[-2]), int(one[-1])) for one in value]
    return None


def _in_rows(
    grids: list[tuple[int, int]], first: int, index: torch.Tensor, tokens: torch.Tensor, mixed: bool
) -> tuple[torch.Tensor, set, torch.Tensor, torch.Tensor]:
    """Bring patches of pictures of any size into rows, by the visual tokens that they reach, which stand in rows.

    Returns:
        the picture of each patch, the grids, and `index` and `tokens` in the new order.
    """
    order, own, sizes, start, begun = [], [], set(), 0, 0
    for rows, columns in grids:
        if begun >= first and start < len(index):
            n = rows * columns
            part = slice(start, start + n)
            mine = tokens[part, 0].unique(return_inverse=True)[1]  # without newlines and the like between
            side = 1 if mixed else round((n / (int(mine.max()) + 1)) ** 0.5)
            options = [torch.arange(n), block_order(rows, columns, side)]
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            expected = (y // side * (columns // side) + x // side).flatten()
            fits = [option for option in options if mixed or torch.equal(mine[option], expected)]
            if not fits:
                raise ValueError("the order of the patches is neither by rows nor by visual tokens")
            order.append(start + fits[0])
            own.append(torch.full((n,), len(own)))
            sizes.add((rows, columns))
            start += n
        begun += rows * columns
    place = torch.cat(order)
    return torch.cat(own), sizes, index[place], tokens[place]
