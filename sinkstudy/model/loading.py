"""Load a vision-language model and say where its parts are.

An architecture is one `Spec`: the classes to load, the dotted paths of the parts, and how patches become visual
tokens. Other modules reach the parts through `LVLM`. How to add one stands in `book/architectures.md`.

A *patch* is one square of the picture that the vision tower sees as one token; a *visual token* is one position
of the decoder's input that an image fills. `LVLM.layout` says which patch ends in which position.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from PIL import Image
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    BatchFeature,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file
from transformers.vision_utils import get_vision_window_index

from sinkstudy import devices
from sinkstudy.model import checkpoints
from sinkstudy.model.registers import CLIPVisionModelWithRegisters
from sinkstudy.model.sinktower import CLIPVisionModelWithSinks
from sinkstudy.paths import UNMERGED, hub_commit, model_folder
from sinkstudy.pictures import opened

for _tower in (CLIPVisionModelWithRegisters, CLIPVisionModelWithSinks):  # the study's own, for models that have one
    AutoConfig.register(_tower.config_class.model_type, _tower.config_class, exist_ok=True)
    AutoModel.register(_tower.config_class, _tower, exist_ok=True)


@dataclass(frozen=True)
class Spec:
    """Where an architecture keeps its parts: dotted paths from the model, attention paths from a layer.

    The defaults are those of LLaVA: a tower that sees tiles of one size, [tiles, prefix + patches, width], and a
    connector that makes one visual token of each patch.
    """

    model_class: str
    processor_class: str
    vision: str = "model.vision_tower"
    vision_layers: str = "model.vision_tower.encoder.layers"
    vision_attention: str = "self_attn"
    vision_neurons: str = "mlp.fc2"  # the map that reads the neurons of a layer's MLP, behind the nonlinearity
    connector: str = "model.multi_modal_projector"
    deepstack: str | None = None  # further connectors, whose tokens are added to the residual stream of the decoder
    decoder: str = "model.language_model"
    decoder_layers: str = "model.language_model.layers"
    decoder_attention: str = "self_attn"
    # how many patches along each side become one visual token
    merge: Callable[[PretrainedConfig], int] = lambda config: 1
    # the order in which the connector reads patches: row by row; the patches of each visual token together; or as
    # "blocks", with the visual tokens of each attention window together
    order: Literal["rows", "blocks", "windows"] = "rows"
    packed: bool = False  # the tower sees all images as one sequence [patches, width], in the connector's order
    anyres: bool = False  # overview, then the tiles put together, padding cut off, with a newline token per row
    prompt: str | None = None  # for a model without chat format
    prefix_mask: bool = False  # the whole prompt sees itself, so that image tokens depend on the question


_QWEN = dict(
    vision="model.visual",
    vision_layers="model.visual.blocks",
    vision_attention="attn",
    connector="model.visual.merger",
    merge=lambda config: config.vision_config.spatial_merge_size,
    packed=True,
)
_IDEFICS = dict(
    processor_class="Idefics3Processor",  # that of SmolVLM does the same and needs num2words for videos
    vision="model.vision_model",
    vision_layers="model.vision_model.encoder.layers",
    connector="model.connector",
    decoder="model.text_model",
    decoder_layers="model.text_model.layers",
    merge=lambda config: config.scale_factor,
)

SPECS = {  # by model_type of the config
    "llava": Spec("LlavaForConditionalGeneration", "LlavaProcessor"),
    "llava_next": Spec("LlavaNextForConditionalGeneration", "LlavaNextProcessor", anyres=True),
    "llava_onevision": Spec("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor", anyres=True),
    "qwen2_vl": Spec("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor", order="blocks", **_QWEN),
    "qwen2_5_vl": Spec(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLProcessor",
        order="windows",
        vision_neurons="mlp.down_proj",
        **_QWEN,
    ),
    "qwen3_vl": Spec(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLProcessor",
        order="blocks",
        vision_neurons="mlp.linear_fc2",
        deepstack="model.visual.deepstack_merger_list",
        **_QWEN,
    ),
    "internvl": Spec(
        "InternVLForConditionalGeneration",
        "InternVLProcessor",
        vision_layers="model.vision_tower.encoder.layer",
        vision_attention="attention",
        merge=lambda config: round(1 / config.downsample_ratio),
        order="blocks",
    ),
    "paligemma": Spec(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaProcessor",
        prompt="<image>answer en {question}",
        prefix_mask=True,
    ),
    "gemma3": Spec(
        "Gemma3ForConditionalGeneration",
        "Gemma3Processor",
        merge=lambda config: _tile_grid(config)[0] // round(config.mm_tokens_per_image**0.5),
    ),
    "aya_vision": Spec(
        "AyaVisionForConditionalGeneration", "AyaVisionProcessor", merge=lambda config: config.downsample_factor
    ),
    "idefics3": Spec("Idefics3ForConditionalGeneration", **_IDEFICS),
    "smolvlm": Spec("SmolVLMForConditionalGeneration", **_IDEFICS),
}

# tokens before the patches in the sequence that the layers of a tower see: CLS (and registers, see `_n_prefix`)
_PREFIX = {
    "clip_vision_model": 1,
    "clip_vision_model_with_sinks": 1,
    "siglip_vision_model": 0,
    "internvl_vision": 1,
    "idefics3_vision": 0,
    "smolvlm_vision": 0,
    "qwen2_vl_vision": 0,
    "qwen2_5_vl_vision": 0,
    "qwen3_vl_vision": 0,
}


@dataclass(frozen=True)
class ImageLayout:
    """Where the patches of one image are: in the picture, the tower, the connector and the decoder.

    Patches count row by row within a tile, tile after tile. All tensors are long, on the CPU.
    """

    row: int  # of the batch
    grid: tuple[int, int]  # (rows, columns) of the patches of a tile
    tiles: int
    visual: torch.Tensor  # [visual tokens], positions in `input_ids[row]`, newline tokens included
    vision: torch.Tensor  # [patches], index in the tower's hidden states flattened to [tokens of the batch, width]
    connector: torch.Tensor  # [patches], index in the connector's input as [patches of the batch, width]
    output: torch.Tensor  # [patches], index in the connector's output as [tokens of the batch, decoder width]
    positions: torch.Tensor  # [patches, k], positions in `input_ids[row]`; -1 where there is none (k is mostly 1)

    def lift(self, values: torch.Tensor, how: Literal["any", "mean", "max"]) -> torch.Tensor:
        """Bring a value of each patch to the visual tokens: [patches] -> [visual tokens].

        Args:
            values: a mask of patches for "any"; a mask or numbers for "mean" and "max".
            how: "any" gives bool, true where at least one patch of the token is; "mean" and "max" over the
                patches of the token give float32, NaN for a token without patches (newline).

        Raises:
            ValueError: if `how` is unknown, or if there are not as many values as patches.
        """
        if how not in ("any", "mean", "max"):
            raise ValueError(f"how is 'any', 'mean' or 'max', not {how!r}")
        if values.shape != self.vision.shape:
            raise ValueError(f"the image has {len(self.vision)} patches, got values {list(values.shape)}")
        patch, slot = (self.positions >= 0).nonzero(as_tuple=True)
        token = torch.searchsorted(self.visual, self.positions[patch, slot])
        numbers = values.detach().cpu().float()[patch]
        if how == "any":
            return torch.zeros(len(self.visual)).index_add_(0, token, (numbers != 0).float()) > 0
        empty = torch.full((len(self.visual),), float("nan"))
        return empty.scatter_reduce(0, token, numbers, {"mean": "mean", "max": "amax"}[how], include_self=False)


@dataclass(frozen=True)
class LVLM:
    """A loaded model with its processor, and the names that the study uses for their parts.

    Layers count from 0 and *layer l* always means the residual stream after layer l. The vision sequence of a
    tile is `n_prefix` tokens (CLS, registers) and then the patches, row by row: [tiles, n_prefix + patches, width].
    The Qwen towers see all images of a batch as one sequence [patches, width] in an order of their own;
    `layout(inputs)` gives each patch's place in it.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    name: str
    revision: str | None  # commit of a hub model; None for a local folder
    spec: Spec

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vision(self) -> PreTrainedModel:
        return self.model.get_submodule(self.spec.vision)

    @property
    def decoder(self) -> PreTrainedModel:
        return self.model.get_submodule(self.spec.decoder)

    @property
    def vision_layers(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.spec.vision_layers))

    @property
    def decoder_layers(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.spec.decoder_layers))

    @property
    def connector(self) -> nn.Module:
        """The module that maps patches [.., vision width] to visual tokens [.., decoder width]."""
        return self.model.get_submodule(self.spec.connector)

    @property
    def connectors(self) -> dict[int, nn.Module]:
        """Every connector by the vision layer that feeds it; more than one where features are stacked (Qwen3-VL)."""
        modules = {self.feature_layer: self.connector}
        if self.spec.deepstack:
            layers = self.model.config.vision_config.deepstack_visual_indexes
            modules = {**dict(zip(layers, self.model.get_submodule(self.spec.deepstack))), **modules}
        return modules

    @property
    def n_prefix(self) -> int:
        """Leading tokens of the vision sequence that are not patches: CLS and registers."""
        return _n_prefix(self.model.config.vision_config)

    @property
    def vision_width(self) -> int:
        """Width of the tower's hidden states."""
        vision = self.model.config.vision_config
        return getattr(vision, "embed_dim", vision.hidden_size)  # hidden_size of Qwen2-VL's tower is the decoder's

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of a tile; token `n_prefix + row * columns + column` is the patch.

        Raises:
            ValueError: if the grid differs from image to image (Qwen).
        """
        if self.spec.packed:
            raise ValueError(f"{self.name}: the patch grid differs from image to image; see LVLM.layout")
        return _tile_grid(self.model.config)

    @property
    def merge(self) -> int:
        """How many patches along each side of the grid become one visual token."""
        return self.spec.merge(self.model.config)

    @property
    def feature_layer(self) -> int:
        """Index of the vision layer whose output enters the connector (LLaVA's -2 is the last but one).

        Where it is the last layer the tower's final norm, if it has one, may stand in between.
        """
        layer = getattr(self.model.config, "vision_feature_layer", -1)  # of hidden_states: they begin with embeddings
        return len(self.vision_layers) + layer if layer < 0 else layer - 1

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder that stands once for each visual token in `input_ids`."""
        return self.model.config.image_token_id

    def prompt(self, question: str) -> str:
        """The question about one image in the model's own chat format, up to where the answer begins."""
        if self.spec.prompt and not self.processor.chat_template:
            return self.spec.prompt.format(question=question)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True)

    def inputs(self, images: Sequence[Any], questions: Sequence[str]) -> BatchFeature:
        """Model inputs for one question per image, padded on the left, on the model's device.

        Args:
            images: n of them, of any sizes, each as `pictures.opened` takes it: PIL images, arrays or tensors uint8
                [3, height, width], paths, or what is opened when it is needed.
            questions: n plain questions, without the chat format.

        Returns:
            `input_ids` and `attention_mask` int [n, tokens]; `pixel_values` float in the model's dtype, for LLaVA
            [n, 3, height, width], elsewhere as the architecture has it; and what else the model takes.

        Raises:
            ValueError: if the numbers of images and questions differ, or for a picture that the model does not take.
        """
        return self._prepared(images, questions).to(self.device, dtype=self.model.dtype)

    def _prepared(self, images: Sequence[Any], questions: Sequence[str]) -> BatchFeature:
        """`inputs` as the processor makes them, in float32 on the CPU."""
        if len(images) != len(questions):
            raise ValueError(f"one question per image: got {len(images)} images and {len(questions)} questions")
        images = [opened(image) for image in images]
        for image in images:
            self.check_size(*(image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])))
        prompts = [self.prompt(question) for question in questions]
        bos = self.processor.tokenizer.bos_token
        batch = self.processor(
            images=[[image] for image in images],
            text=prompts,
            padding=True,
            padding_side="left",
            # never two BOS; the processor of a model with a prompt of its own adds one itself
            add_special_tokens=not self.spec.prompt and not (bos and prompts[0].startswith(bos)),
            return_tensors="pt",
        )
        batch.pop("labels", None)
        return batch

    def check_size(self, width: int, height: int) -> None:
        """Make sure that the model takes pictures of so many pixels; only one whose processor resizes takes all.

        Raises:
            ValueError: it does not.
        """
        if getattr(self.processor.image_processor, "do_resize", True):
            return
        vision = self.model.config.vision_config
        if self.spec.packed:
            step = vision.patch_size * self.merge
            takes, fits = f"whole {step}s of", width % step == height % step == 0
        else:
            high, wide = _pair(vision.image_size)
            takes, fits = f"{wide} x {high}", (width, height) == (wide, high)
        if not fits:
            raise ValueError(
                f"{self.name} takes pictures of {takes} pixels, for its processor resizes none, and this one has "
                f"{width} x {height}: resize the pictures, or take another model"
            )

    @property
    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer: those of the checkpoint's generation settings, or the tokenizer's."""
        ends = self.model.generation_config.eos_token_id
        ends = self.processor.tokenizer.eos_token_id if ends is None else ends
        return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]

    def generate(self, inputs: Mapping[str, Any], max_new_tokens: int) -> GenerateDecoderOnlyOutput:
        """Greedy answers by the library's own `generate`, with the logits of each step.

        The settings are the study's, so that answers of all models, alone and behind a shared prefix, are made alike:
        greedy, one answer, a growing cache of keys and values. Of the checkpoint's own settings only `ends` count, and
        padding is the tokenizer's; penalties, suppressed words, beams, samples, stop strings, caches of other kinds do
        not.

        Args:
            inputs: of `inputs`, or what continues a cache.
        """
        ends, kept = self.ends, self.model.generation_config
        padding = self.processor.tokenizer.pad_token_id
        settings = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            bos_token_id=kept.bos_token_id,
            eos_token_id=ends or None,
            pad_token_id=padding if padding is not None else next(iter(ends), None),
            return_dict_in_generate=True,
            output_logits=True,
        )
        self.model.generation_config = settings  # what `settings` leave open would come from there
        try:
            return self.model.generate(**inputs, generation_config=settings)
        finally:
            self.model.generation_config = kept

    def see(self, inputs: BatchFeature) -> None:
        """Send the images of a batch through tower and connector, without the decoder, for hooks to watch."""
        self.model.get_image_features(**{k: v for k, v in inputs.items() if "pixel" in k or "image" in k})

    def visual_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Positions of the visual tokens, long [batch, n_visual]; for LLaVA visual token j is patch j.

        Raises:
            ValueError: if the rows of `input_ids` [batch, tokens] hold different numbers of them, or none.
        """
        visual = input_ids == self.image_token_id
        counts = visual.sum(-1)
        if counts.min() == 0 or counts.min() != counts.max():
            raise ValueError(f"every prompt needs the same number of visual tokens, got {counts.tolist()}")
        return visual.nonzero()[:, 1].view(len(input_ids), -1)

    def layout(self, inputs: BatchFeature) -> list[ImageLayout]:
        """Where the patches of each image of a batch are; one image for each row, as `inputs` makes them.

        Raises:
            ValueError: if a row has no image, or a number of visual tokens that does not fit its image.
        """
        layouts = []
        start = 0  # patches of the images before
        size = self.merge**2  # patches of a visual token
        window = self._window_order(inputs)
        for row, ids in enumerate(inputs["input_ids"].cpu()):
            visual = (ids == self.image_token_id).nonzero()[:, 0]
            (rows, columns), tiles = self._shape(inputs, row, len(visual))
            n = rows * columns
            tile = torch.arange(tiles)[:, None]
            raster = (start + tile * n + torch.arange(n)).flatten()
            block = (start + tile * n + _block_order(rows, columns, self.merge)).flatten()
            output = block // size
            if self.spec.anyres:
                tokens = self._anyres_tokens(inputs["image_sizes"][row], tiles)
            else:
                tokens = (output - start // size)[:, None]
            if window is not None:
                output = window[output]
            connector = raster if self.spec.order == "rows" else output * size + block % size
            if tokens.max() >= len(visual):
                raise ValueError(f"row {row} has {len(visual)} visual tokens, too few for {tiles} x {rows} x {columns}")
            layouts.append(
                ImageLayout(
                    row=row,
                    grid=(rows, columns),
                    tiles=tiles,
                    visual=visual,
                    vision=connector if self.spec.packed else raster + self.n_prefix * (raster // n + 1),
                    connector=connector,
                    output=output,
                    positions=torch.where(tokens >= 0, visual[tokens.clamp(min=0)], -1),
                )
            )
            start += tiles * n
        return layouts

    def patch_pixels(self, inputs: BatchFeature) -> list[torch.Tensor]:
        """What the tower sees of each patch: for each image float32 [patches, values], in the order of `layout`."""
        pixels = inputs["pixel_values"].float().cpu()
        found, start = [], 0
        for layout in self.layout(inputs):
            rows, columns = layout.grid
            if self.spec.packed:  # one row a patch, the patches of a visual token together
                found.append(pixels[start + _block_order(rows, columns, self.merge)])
                start += rows * columns
                continue
            tiles = pixels[layout.row, : layout.tiles] if pixels.ndim == 5 else pixels[start : start + layout.tiles]
            start += layout.tiles
            vision = self.model.config.vision_config
            values = nn.functional.unfold(tiles, vision.patch_size, stride=vision.patch_size)
            found.append(values.transpose(1, 2).flatten(0, 1))  # from [tiles, values, patches]
        return found

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logit lens: final norm and LM head on the residual stream, [.., decoder width] -> [.., vocabulary]."""
        return self.model.get_output_embeddings()(self.decoder.norm(hidden))

    def _shape(self, inputs: BatchFeature, row: int, n_visual: int) -> tuple[tuple[int, int], int]:
        """Patch grid of an image's tiles, and how many there are."""
        if n_visual == 0:
            raise ValueError(f"row {row} has 0 visual tokens")
        if self.spec.packed:
            _, rows, columns = inputs["image_grid_thw"][row].tolist()
            return (rows, columns), 1
        rows, columns = self.grid
        if self.spec.anyres:
            high, wide = self._anyres_tiles(inputs["image_sizes"][row])
            return (rows, columns), 1 + high * wide
        tiles, left = divmod(n_visual * self.merge**2, rows * columns)
        if left:
            raise ValueError(f"row {row} has {n_visual} visual tokens, which are no whole tiles of {rows} x {columns}")
        return (rows, columns), tiles

    def _anyres_tiles(self, image_size: torch.Tensor) -> tuple[int, int]:
        """(rows, columns) of the tiles into which LLaVA-NeXT cuts an image of (height, width) pixels."""
        config = self.model.config
        return get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, config.vision_config.image_size)

    def _window_order(self, inputs: BatchFeature) -> torch.Tensor | None:
        """Place of each visual token in the order of attention windows, long [visual tokens of the batch]."""
        if self.spec.order != "windows":
            return None
        vision = self.model.config.vision_config
        order, _ = get_vision_window_index(
            inputs["image_grid_thw"].cpu(), self.merge, vision.window_size, vision.patch_size
        )
        return order.argsort()

    def _anyres_tokens(self, image_size: torch.Tensor, tiles: int) -> torch.Tensor:
        """Visual tokens of an image that read each patch of overview and tiles: long [patches, k], -1 for none.

        The model's own packing runs on coordinates in the place of features. Bilinear shrinking, which
        LLaVA-OneVision applies to images of many tiles, turns them into those between which each token reads.
        """
        rows, columns = self.grid
        n = rows * columns
        high, wide = self._anyres_tiles(image_size)
        y, x = torch.meshgrid(torch.arange(high * rows), torch.arange(wide * columns), indexing="ij")
        where = torch.stack([y, x], -1).float()  # [rows of all tiles, columns of all tiles, 2]
        where = where.view(high, rows, wide, columns, 2).transpose(1, 2).reshape(high * wide, n, 2)
        config = self.model.config
        if self.spec.model_class == "LlavaOnevisionForConditionalGeneration":
            how = dict(vision_aspect_ratio=config.vision_aspect_ratio)
        else:
            how = dict(vision_feature_select_strategy=config.vision_feature_select_strategy)
        packed, _ = self.model.model.pack_image_features(
            [torch.cat([torch.zeros(1, n, 2), where])], image_size[None].cpu(), image_newline=-torch.ones(2), **how
        )
        token = n + (packed[0][n:, 0] >= 0).nonzero()[:, 0]  # behind the overview, without newlines
        low = (packed[0][token] + 1e-3).floor().long()  # an exact coordinate reads one patch, not two
        high_end = (packed[0][token] - 1e-3).ceil().long()
        pairs = {(patch, patch) for patch in range(n)}  # (patch, token): the overview comes first
        for y in (low[:, 0], high_end[:, 0]):
            for x in (low[:, 1], high_end[:, 1]):
                tile = 1 + (y // rows) * wide + x // columns
                pairs |= set(zip((tile * n + (y % rows) * columns + x % columns).tolist(), token.tolist()))
        read_by: list[list[int]] = [[] for _ in range(tiles * n)]
        for patch, visual_token in sorted(pairs):
            read_by[patch].append(visual_token)
        k = max(map(len, read_by))
        return torch.tensor([tokens + [-1] * (k - len(tokens)) for tokens in read_by])

    @contextmanager
    def editing(
        self,
        before: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        after: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> Iterator[None]:
        """Change what the connector reads or puts out, in every forward pass inside the context.

        Args:
            before: gets the connector's input as [patches of the batch, vision width], where `ImageLayout.connector`
                finds a patch, and the vision layer that it comes from; returns the same shape.
            after: gets the connector's output as [tokens of the batch, decoder width], see `ImageLayout.output`, and
                the same layer; returns the same shape.

        Qwen3-VL has several connectors; each is called with its own layer, `feature_layer` for the main one.
        """

        def like(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
            # the same strides too: with others, bfloat16 products round differently
            same = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=old.device)
            return same.copy_(new.view_as(old))

        def reader(layer: int) -> Callable:
            return lambda module, args: (like(before(args[0].reshape(-1, width), layer), args[0]), *args[1:])

        def writer(layer: int) -> Callable:
            return lambda module, args, out: like(after(out.reshape(-1, out.shape[-1]), layer), out)

        width, handles = self.vision_width, []
        try:
            for layer, module in self.connectors.items():
                if before is not None:
                    handles.append(module.register_forward_pre_hook(reader(layer)))
                if after is not None:
                    handles.append(module.register_forward_hook(writer(layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
) -> LVLM:
    """Load a model for study: evaluation mode, no gradients to weights, SDPA attention.

    Args:
        name: a lab model (a folder of `data/models`), the path of a local folder, or a hub id "owner/name".
        device: "cpu", "cuda", "cuda:1", …; "auto" spreads a large model over the GPUs that are there.
        dtype: "float32", "bfloat16" or "float16"; lab weights are stored in bfloat16 and run in float32.
        revision: commit, tag or branch of a hub model; None or "" is its main branch.

    Weights are read from safetensors only, and no code of the model's own is run.

    Raises:
        ValueError: as `outline`; a device that is not there or does not compute in that dtype, or weights that are not
            finite in it.
    """
    dtype = devices.dtype_of(dtype)
    devices.check(device, dtype)
    known = outline(name, dtype=dtype, revision=revision)
    model = _read(
        name,
        find(name),
        known.model.config,
        generation_config=known.model.generation_config,
        revision=revision or None,
        dtype=dtype,
        device_map=None if device == "cpu" else device,  # straight to the device, without a copy in main memory
        use_safetensors=True,
    )
    checkpoints.check_values(name, model.named_parameters(), dtype)
    return replace(known, model=model.eval().requires_grad_(False), revision=hub_commit(name, revision))


def wrap(model: PreTrainedModel, processor: ProcessorMixin) -> LVLM:
    """A model that the transformers library has loaded, with its processor, as the study's functions take it.

    The model stays as it is, on its device.

    Raises:
        ValueError: unknown architecture or vision layout, or no processor for pictures and text.
    """
    name, config = model.config.name_or_path or type(model).__name__, model.config
    spec = _spec(name, config.model_type)
    if type(model).__name__ != spec.model_class:
        raise ValueError(f"{name}: load it as {spec.model_class}, not as {type(model).__name__}")
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ValueError(f"{name}: a {type(processor).__name__} is no processor for pictures and text (AutoProcessor)")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{name}: its weights are not there (torch's meta device): load it with from_pretrained")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{name} has an adapter: {UNMERGED}")
    if getattr(model, "hf_quantizer", None) or not all(weight.is_floating_point() for weight in model.parameters()):
        raise ValueError(f"{name}: its weights are quantised; {checkpoints.UNQUANTISED}")
    _check_layout(name, config)
    checkpoints.check_values(name, model.named_parameters(), model.dtype)
    lvlm = LVLM(model, processor, name, getattr(config, "_commit_hash", None), spec)
    _check_parts(lvlm)
    return lvlm


def outline(name: str, *, dtype: str | torch.dtype = "float32", revision: str | None = None) -> LVLM:
    """The model as `load` gives it but without weights, on torch's meta device: names and shapes, no memory.

    Configuration, processor and the headers of the weights' files are read, or downloaded, and checked.

    Raises:
        ValueError: unknown model, architecture, dtype or vision layout; a revision of a folder; an adapter or quantised
            weights; weights that are absent, left over or of another shape; a processor or chat format that does not
            fit the model; files that are absent or damaged; no network where one is needed.
    """
    spec, config = _configuration(name, revision)
    with _reading(name):
        weights = checkpoints.headers(find(name), revision)
        settings = _special_tokens(find(name), revision, config)
    # as it is loaded in earnest, but that the weights are names and shapes alone
    model = _read(
        name,
        None,
        config,
        generation_config=settings,
        state_dict=weights,
        dtype=devices.dtype_of(dtype),
        device_map={"": "meta"},
    )
    model.tie_weights()  # also what is stored twice
    lvlm = LVLM(model.eval(), _processor(name, spec, revision), name, hub_commit(name, revision), spec)
    _check_parts(lvlm)
    return lvlm


def _configuration(name: str, revision: str | None) -> tuple[Spec, PretrainedConfig]:
    """The architecture of a model and its configuration, once it is known to be one that the study can read."""
    source = find(name)
    if revision and Path(source).is_dir():
        raise ValueError(f"{name} is a folder and has no revision {revision!r}; revisions are for models of the hub")
    with _reading(name):
        adapter = find_adapter_config_file(source, revision=revision or None)
    if adapter:  # transformers would put it on top of the weights, whether they hold it already or not
        raise ValueError(f"{name}: {checkpoints.ADAPTER} is in it: {UNMERGED}")
    with _reading(name):
        known, _ = PretrainedConfig.get_config_dict(source, revision=revision or None)
    spec = _spec(name, known.get("model_type"))
    for key, value in _entries(known):
        if key in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method", key) if isinstance(value, dict) else key
            raise ValueError(f"{name}: its weights are quantised ({method}); {checkpoints.UNQUANTISED}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: {key} in its config.json is {value}, which is no number")
    with _reading(name, "its config.json: "):
        config = CONFIG_MAPPING[known["model_type"]].from_dict(_without_switches(known))
    _check_layout(name, config)
    return spec, config


# What says how a model was last used, not what it is: training with gradient checkpointing leaves use_cache off.
_SWITCHES = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing")


def _without_switches(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as read from a file, parts included, without `_SWITCHES`: they then have their defaults."""
    return {
        key: _without_switches(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _SWITCHES
    }


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of a configuration as read from a file, and those of its parts."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(value)


def _read(name: str, source: str | None, config: PretrainedConfig, **how: Any) -> PreTrainedModel:
    """A model by `from_pretrained`.

    transformers gives what a checkpoint lacks random values, and passes over what it has too much; both are refused.
    """
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # not its report, which is checked here
    # a progress bar in a notebook is a widget, and a page with a widget asks another host for its scripts
    transformers.utils.logging.disable_progress_bar()
    try:
        with _reading(name, "" if source else "its config.json: "):
            model, report = getattr(transformers, SPECS[config.model_type].model_class).from_pretrained(
                source,
                config=config,
                attn_implementation="sdpa",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are reported
                **how,
            )
    finally:
        transformers.utils.logging.set_verbosity(level)
    checkpoints.check_names(name, model, report)
    return model


def _special_tokens(source: str, revision: str | None, config: PretrainedConfig) -> transformers.GenerationConfig:
    """The ids of begin, end and padding in a checkpoint's generation settings, and nothing else of these."""
    file = cached_file(
        source, "generation_config.json", revision=revision or None, _raise_exceptions_for_missing_entries=False
    )
    of = transformers.GenerationConfig.from_model_config(config).to_dict()
    if file is not None:
        of |= json.loads(Path(file).read_text(encoding="utf-8"))
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")
    return transformers.GenerationConfig(**{key: of.get(key) for key in kept})


def _spec(name: str, model_type: str | None) -> Spec:
    if model_type not in SPECS:
        raise ValueError(
            f"{name}: architecture {model_type!r} is not known; known: {', '.join(SPECS)}. "
            "A text-only model has no patches to study; how to add another one: book/architectures.md"
        )
    return SPECS[model_type]


def _processor(name: str, spec: Spec, revision: str | None) -> ProcessorMixin:
    with _reading(name, "its processor, are preprocessor_config.json and the tokenizer's files there? "):
        # the PIL image processor, because the torchvision one gives slightly different pixels
        return without_video(spec.processor_class).from_pretrained(
            find(name), revision=revision or None, backend="pil"
        )


def blank(lvlm: LVLM, size: tuple[int, int] = (640, 480)) -> Image.Image:
    """A grey picture of (width, height) pixels, or of the only size that the model takes."""
    if not getattr(lvlm.processor.image_processor, "do_resize", True):
        rows, columns = _tile_grid(lvlm.model.config) if not lvlm.spec.packed else (12, 12)
        patch = lvlm.model.config.vision_config.patch_size
        size = columns * patch, rows * patch
    return Image.new("RGB", size, "grey")


def _check_parts(lvlm: LVLM) -> None:
    """Make sure that tower, processor, chat format and tokenizer are those of one model, by asking about a picture.

    It takes the CPU and none of the model's weights.

    Raises:
        ValueError: the features are those of no layer; the chat format leaves out the picture or the question; the
            processor fails, or cuts a picture into other tiles, patches or visual tokens than the model reads.
    """
    name, question, config = lvlm.name, "What is this?", lvlm.model.config
    if not 0 <= lvlm.feature_layer < len(lvlm.vision_layers):
        raise ValueError(f"{name}: vision_feature_layer {config.vision_feature_layer} is none of the tower's layers")
    try:
        prompt = lvlm.prompt(question)
        if lvlm.processor.chat_template:
            alone = [{"role": "user", "content": [{"type": "text", "text": question}]}]
            if lvlm.processor.apply_chat_template(alone, add_generation_prompt=True) == prompt:
                raise ValueError("its chat format drops the picture")
        if question not in prompt:
            raise ValueError("its chat format drops the question")
        inputs = lvlm._prepared([blank(lvlm)], [question])
        visual = inputs["input_ids"][0].tolist().count(lvlm.image_token_id)
        layout = lvlm.layout(inputs)[0] if visual else None
    except Exception as error:  # a processor's own, of any kind, where an entry of its files is absent or wrong
        raise ValueError(
            f"{name}: its processor does not prepare a picture and a question ({_line(error)}): an entry of "
            "processor_config.json, preprocessor_config.json or tokenizer_config.json is absent or wrong"
        ) from error
    if not visual:
        raise ValueError(
            f"{name}: no image token (id {lvlm.image_token_id}) is in a prompt with a picture: its chat format "
            "drops the picture, or processor and model have different image tokens"
        )
    rows = lvlm.model.get_input_embeddings().num_embeddings
    if inputs["input_ids"].max() >= rows or lvlm.processor.tokenizer.vocab_size > rows:
        raise ValueError(f"{name}: its tokenizer is another model's: it has more tokens than the model, {rows}")
    pixels, vision = inputs["pixel_values"], config.vision_config
    if lvlm.spec.packed:  # [patches, values]
        tiles, made = 1, pixels.shape[-1]
        taken = 3 * vision.temporal_patch_size * vision.patch_size**2
    else:  # [.., 3, height, width]
        tiles, made, taken = pixels[..., 0, 0, 0].numel(), tuple(pixels.shape[-2:]), _pair(vision.image_size)
    if made != taken:
        what = "patches of {} values" if lvlm.spec.packed else "pictures of {} pixels"
        raise ValueError(f"{name}: its processor makes {what.format(made)}, and its tower takes {taken}")
    newline = int(lvlm.spec.anyres)  # behind the last row of patches
    if layout.tiles != tiles or layout.positions.max() + newline != layout.visual.max():
        raise ValueError(
            f"{name}: its processor gives a picture {visual} visual tokens, which are not those of {tiles} tiles of "
            f"{layout.grid} patches: an entry of processor_config.json is absent or wrong, such as patch_size"
        )


@contextmanager
def _reading(name: str, what: str = "") -> Iterator[None]:
    """Tells in one line what transformers has to say about files that are absent, damaged or out of reach."""
    try:
        yield
    except Exception as error:  # whatever a damaged or foreign file provokes: KeyError, TypeError, a strict config ..
        raise ValueError(f"{name} cannot be read: {what}{_line(error)}") from error


def _line(error: Exception) -> str:
    """What an error says, in one line: the first that says something, with its type where that is part of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said if isinstance(error, (OSError, ValueError)) and said else f"{type(error).__name__}: {said}"


def find(name: str) -> str:
    """What `from_pretrained` needs for `name`: a folder's path, or the hub id itself; see `paths.model_folder`."""
    folder = model_folder(name)
    return name if folder is None else str(folder)


def without_video(name: str) -> type[ProcessorMixin]:
    """The processor class without its part for videos, which needs torchvision and which no image needs."""
    parent = getattr(transformers, name)
    parts = [part for part in parent.get_attributes() if part != "video_processor"]
    return type(name, (parent,), {"get_attributes": classmethod(lambda cls: parts)})


def _n_prefix(vision: PretrainedConfig) -> int:
    """Tokens before the patches in the sequence that the vision layers see."""
    if vision.model_type == "clip_vision_model_with_registers":
        return 1 + vision.num_register_tokens
    if vision.model_type not in _PREFIX:
        raise ValueError(
            f"vision tower {vision.model_type!r} is not known; known: {', '.join(_PREFIX)}; "
            "how to add one: book/architectures.md"
        )
    return _PREFIX[vision.model_type]


def _tile_grid(config: PretrainedConfig) -> tuple[int, int]:
    """(rows, columns) of the patches of a tile of a tower that sees tiles of one size."""
    image, patch = config.vision_config.image_size, config.vision_config.patch_size
    (high, wide), (patch_high, patch_wide) = _pair(image), _pair(patch)
    return high // patch_high, wide // patch_wide


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of what a configuration gives as one number where both are the same."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def _block_order(rows: int, columns: int, merge: int) -> torch.Tensor:
    """Place of each patch, counted row by row, if each block of merge x merge patches stands together: [patches]."""
    places = torch.arange(rows * columns).view(rows // merge, columns // merge, merge, merge)
    return places.transpose(1, 2).flatten()


def _check_layout(name: str, config: PretrainedConfig) -> None:
    """The study needs the patches, all of them and nothing else, taken from one vision layer."""
    n_prefix = _n_prefix(config.vision_config)
    if not isinstance(getattr(config, "vision_feature_layer", -1), int):
        raise ValueError(f"{name}: vision_feature_layer {config.vision_feature_layer} is not a single layer")
    wanted = "default" if n_prefix else "full"  # "default" drops the first token, CLS
    if getattr(config, "vision_feature_select_strategy", wanted) != wanted:
        raise ValueError(f"{name}: visual tokens are not the patches (strategy is not {wanted!r})")
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        raise ValueError(f"{name}: the decoder caps its attention logits (Gemma 2), which SDPA cannot do")
