"""A loaded vision-language model, as the study's functions take it: its parts by one name each, and its tokens."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
import transformers
from PIL import Image
from torch import nn
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from transformers.vision_utils import get_vision_window_index

from sinkstudy.model import measure
from sinkstudy.model.layout import ImageLayout, block_order
from sinkstudy.model.specs import Spec, n_prefix, pair, tile_grid
from sinkstudy.pictures import opened
from sinkstudy.progress import Progress

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made by a thread while the one before is used; an error comes in the place of its item."""
    iterator, end = iter(items), cast(T, object())
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item


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
        """The module that maps patches [.., vision width] to visual tokens [.., decoder width].

        Raises:
            ValueError: no one module does.
        """
        if not self.spec.connector:
            raise ValueError(f"{self.name}: no one module stands between tower and decoder")
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
        return n_prefix(self.model.config.vision_config) if self.spec.prefix is None else self.spec.prefix

    @property
    def vision_width(self) -> int:
        """Width of the tower's hidden states."""
        return next(m for m in self.vision_layers[0].modules() if isinstance(m, nn.Linear)).in_features

    def rows_read(self, read: torch.Tensor) -> torch.Tensor:
        """What the connector reads as [patches of the batch, width], where `ImageLayout.connector` finds a patch."""
        return read.reshape(-1, read.shape[-1] if self.spec.whole_rows else self.vision_width)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of a tile; token `n_prefix + row * columns + column` is the patch.

        Raises:
            ValueError: if the grid differs from image to image (Qwen).
        """
        if self.spec.packed:
            raise ValueError(f"{self.name}: the patch grid differs from image to image; see LVLM.layout")
        return tile_grid(self.model.config)

    @property
    def merge(self) -> int:
        """How many patches along each side of the grid become one visual token."""
        return self.spec.merge(self.model.config) if callable(self.spec.merge) else self.spec.merge

    @property
    def feature_layer(self) -> int:
        """Index of the vision layer whose output enters the connector (LLaVA's -2 is the last but one).

        Of several that it reads side by side it is the last. Where it is the tower's last layer the final norm of the
        tower, if it has one, may stand in between.
        """
        return max(self.feature_layers)

    @property
    def feature_layers(self) -> list[int]:
        """Indices of all vision layers that the connector reads side by side, in its order; -1 are the embeddings."""
        named = getattr(self.model.config, "vision_feature_layer", -1)  # of hidden_states: they begin with embeddings
        named = named if isinstance(named, (list, tuple)) else [named]
        return [len(self.vision_layers) + layer if layer < 0 else layer - 1 for layer in named]

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
            ValueError: if the numbers of images and questions differ, for a picture that the model does not take, or a
                prompt beyond `longest`.
        """
        return self.moved(self.prepared(images, questions))

    def batches(
        self, images: Sequence[Any], size: int = 16, questions: Sequence[str] | None = None
    ) -> Iterator[tuple[slice, BatchFeature]]:
        """`inputs` of `size` images at a time, in their order, with the places that these have among all.

        Each batch is made `ahead` of its use. Without questions the prompts hold the image alone.

        Raises:
            ValueError: as `inputs`, or if there are no images.
        """
        asked, other = [""] * len(images) if questions is None else questions, self.for_thread()
        if not len(images):
            raise ValueError("there are no images")
        if len(asked) != len(images):
            raise ValueError(f"one question per image: got {len(images)} images and {len(asked)} questions")
        places = [slice(start, start + size) for start in range(0, len(images), size)]
        with Progress("pictures", len(images)) as bar:
            for of, inputs in ahead((of, other.inputs(images[of], list(asked[of]))) for of in places):
                yield of, inputs
                bar.update(len(images[of]))

    def for_thread(self) -> "LVLM":
        """The same model with a processor of its own: a tokenizer is used by one thread at a time."""
        return replace(self, processor=copy.deepcopy(self.processor))

    def moved(self, batch: BatchFeature) -> BatchFeature:
        """A prepared batch on the model's device, in its dtype; a GPU fetches it while it computes."""

        def move(value: torch.Tensor) -> torch.Tensor:
            value = value.to(self.model.dtype) if value.is_floating_point() else value
            if self.device.type == "cuda":
                return value.pin_memory().to(self.device, non_blocking=True)
            return value.to(self.device)

        return BatchFeature({k: move(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})

    def prepared(self, images: Sequence[Any], questions: Sequence[str]) -> BatchFeature:
        """`inputs` as the processor makes them, in float32 on the CPU."""
        if len(images) != len(questions):
            raise ValueError(f"one question per image: got {len(images)} images and {len(questions)} questions")
        images = [opened(image) for image in images]
        for image in images:
            self.check_size(*(image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])))
        prompts = [self.prompt(question) for question in questions]
        batch = self.processor(
            images=[[image] for image in images],
            text=prompts,
            padding=True,
            padding_side="left",
            truncation=False,  # which a tokenizer's settings may ask for
            add_special_tokens=self.adds_bos(prompts[0]),
            return_tensors="pt",
        )
        batch.pop("labels", None)
        tokens = int(batch["attention_mask"].sum(1).max())
        if self.longest is not None and tokens > self.longest:
            raise ValueError(
                f"{self.name}: this prompt has {tokens} tokens, and beyond {self.longest} the decoder's rotary "
                "embedding changes with the length of the text, so that answers depend on what was read before: ask "
                "shorter questions, or about smaller pictures"
            )
        return batch

    @property
    def longest(self) -> int | None:
        """Tokens of the longest prompt whose positions mean the same as in shorter ones; None where they always do.

        Rope types "dynamic" and "longrope" have other frequencies for longer texts.
        """
        text = self.model.config.get_text_config()
        rope = getattr(text, "rope_parameters", None) or {}
        kinds = [rope] if "rope_type" in rope else [of for of in rope.values() if isinstance(of, dict)]  # of each layer
        return min((of.get("original_max_position_embeddings") or text.max_position_embeddings
                    for of in kinds if of.get("rope_type") in ("dynamic", "longrope")), default=None)

    def adds_bos(self, text: str) -> bool:
        """Is BOS to be put before a text? Never twice; a processor with a prompt of its own puts it there itself."""
        bos = self.processor.tokenizer.bos_token
        return not self.spec.prompt and not (bos and text.startswith(bos))

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
            high, wide = pair(vision.image_size)
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
        """Send the images of a batch through tower and connector, for hooks to watch, and if possible no further.

        Llama 4 projects images only as it embeds a prompt: there the decoder reads them too.
        """
        of_text = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        model = self.model if hasattr(self.model, "get_image_features") else self.model.model
        read = [] if self.spec.connector else [True]  # has the connector run?
        with ExitStack() as hooks:
            if not read:
                hooks.enter_context(self.connector.register_forward_pre_hook(lambda *_: read.append(True)))
            model.get_image_features(**{k: v for k, v in inputs.items() if k not in of_text})
        if not read:
            self.model(**inputs, logits_to_keep=1)

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
        if self.spec.measured:
            copy = measure.twin(self.model.config)
            return measure.layouts(copy, copy.like(inputs))
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
            block = (start + tile * n + block_order(rows, columns, self.merge)).flatten()
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
                found.append(pixels[start + block_order(rows, columns, self.merge)])
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
            before: gets the connector's input, see `rows_read`, and the vision layer that it comes from; returns the
                same shape.
            after: gets the connector's output as [tokens of the batch, decoder width], see `ImageLayout.output`, and
                the same layer; returns the same shape.

        Qwen3-VL has several connectors; each is called with its own layer, `feature_layer` for the main one.
        """

        def like(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
            # the same strides too: with others, bfloat16 products round differently
            same = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=old.device)
            return same.copy_(new.view_as(old))

        def reader(layer: int) -> Callable:
            return lambda module, args: (like(before(self.rows_read(args[0]), layer), args[0]), *args[1:])

        def writer(layer: int) -> Callable:
            return lambda module, args, out: like(after(out.reshape(-1, out.shape[-1]), layer), out)

        with ExitStack() as hooks:
            for layer, module in self.connectors.items():
                if before is not None:
                    hooks.enter_context(module.register_forward_pre_hook(reader(layer)))
                if after is not None:
                    hooks.enter_context(module.register_forward_hook(writer(layer)))
            yield
