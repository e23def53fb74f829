"""Load a vision-language model, once all is known to be there, whole and of one model.

Weights are read from safetensors only, and no code of a model's own is run.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from sinkstudy import devices
from sinkstudy.model import adapters, checkpoints, measure
from sinkstudy.model.lvlm import LVLM
from sinkstudy.model.registers import CLIPVisionModelWithRegisters
from sinkstudy.model.sinktower import CLIPVisionModelWithSinks
from sinkstudy.model.specs import SPECS, Spec, entries, n_prefix, pair, tile_grid
from sinkstudy.paths import ADAPTER, UNMERGED, hub_commit, model_folder

for _tower in (CLIPVisionModelWithRegisters, CLIPVisionModelWithSinks):  # the study's own, for models that have one
    AutoConfig.register(_tower.config_class.model_type, _tower.config_class, exist_ok=True)
    AutoModel.register(_tower.config_class, _tower, exist_ok=True)


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
) -> LVLM:
    """Load a model for study: evaluation mode, no gradients to weights, SDPA attention.

    Args:
        name: a lab model (a folder of `data/models`), the path of a local folder, or a hub id "owner/name". A folder
            with an adapter is its base with the adapter merged, see `adapters`.
        device: "cpu", "cuda", "cuda:1", …; "auto" spreads a large model over the GPUs that are there.
        dtype: "float32", "bfloat16" or "float16"; lab weights are stored in bfloat16 and run in float32.
        revision: commit, tag or branch of a hub model; None or "" is its main branch.

    Raises:
        ValueError: as `outline`; a device that is not there or does not compute in that dtype, or weights that are not
            finite in it.
    """
    dtype = devices.dtype_of(dtype)
    devices.check(device, dtype)
    known = outline(name, dtype=dtype, revision=revision)
    if adapter := adapters.read(name):
        base = load(adapter.base, device=device, dtype=dtype, revision=adapter.revision)
        if any(weight.is_meta for weight in base.model.parameters()):
            raise ValueError(f"{name}: its base does not fit on the device, and parts of it are elsewhere: {UNMERGED}")
        adapter.merge(base.model)
        checkpoints.check_values(name, base.model.named_parameters(), dtype)
        return replace(base, name=name)
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
        ValueError: unknown architecture or vision layout, no processor for pictures and text, or a model that is being
            trained, or whose attention is neither PyTorch's SDPA nor eager.
    """
    name, config = model.config.name_or_path or type(model).__name__, model.config
    spec = spec_of(name, config.model_type)
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
    if model.training:
        raise ValueError(f"{name}: it is being trained, so that dropout would play a part: call eval() on it first")
    ways = {getattr(part, "_attn_implementation", None) for part in (config, *vars(config).values())} - {None}
    if odd := ways - {"sdpa", "eager"}:
        raise ValueError(f"{name}: its attention is {odd.pop()}: load it with attn_implementation='sdpa'")
    _check_layout(name, config)
    checkpoints.check_values(name, model.named_parameters(), model.dtype)
    lvlm = _measured(LVLM(model, processor, name, getattr(config, "_commit_hash", None), spec))
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
    if adapter := adapters.read(name):
        _no_revision(name, revision)
        base = outline(adapter.base, dtype=dtype, revision=adapter.revision)
        adapter.merge(base.model)
        adapters.check_processor(name, base.processor)
        return replace(base, name=name)
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
    checkpoints.check_once(name, model, weights)
    model.tie_weights()  # also what is stored twice
    lvlm = _measured(LVLM(model.eval(), _processor(name, spec, revision), name, hub_commit(name, revision), spec))
    _check_parts(lvlm)
    return lvlm


def _measured(lvlm: LVLM) -> LVLM:
    """The same with its parts found, where `SPECS` does not have them.

    Raises:
        ValueError: the processor fails, or the architecture keeps patches and visual tokens in a way that is not known.
    """
    config = lvlm.model.config
    if config.model_type in SPECS:
        several = isinstance(getattr(config, "vision_feature_layer", None), (list, tuple))
        return replace(lvlm, spec=replace(lvlm.spec, whole_rows=True)) if several else lvlm
    with _reading(lvlm.name, "its processor or its parts: "):
        inputs = lvlm.prepared([blank(lvlm)], ["What is this?"])
        return replace(lvlm, spec=measure.spec(config, inputs, lvlm.spec.processor_class))


def _configuration(name: str, revision: str | None) -> tuple[Spec, PretrainedConfig]:
    """The architecture of a model and its configuration, once it is known to be one that the study can read."""
    source = find(name)
    _no_revision(name, revision)
    with _reading(name):
        adapter = find_adapter_config_file(source, revision=revision or None)
    if adapter:  # transformers would put it on top of the weights, whether they hold it already or not
        raise ValueError(f"{name}: {ADAPTER} is in it: {UNMERGED}")
    with _reading(name):
        known, _ = PretrainedConfig.get_config_dict(source, revision=revision or None)
    spec = spec_of(name, known.get("model_type"))
    for key, value in entries(known):
        if key in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method", key) if isinstance(value, dict) else key
            raise ValueError(f"{name}: its weights are quantised ({method}); {checkpoints.UNQUANTISED}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: {key} in its config.json is {value}, which is no number")
    with _reading(name, "its config.json: "):
        config = CONFIG_MAPPING[known["model_type"]].from_dict(_without_switches(known))
    _check_layout(name, config)
    return spec, config


def _no_revision(name: str, revision: str | None) -> None:
    if revision and Path(find(name)).is_dir():
        raise ValueError(f"{name} is a folder and has no revision {revision!r}; revisions are for models of the hub")


# What says how a model was last used, not what it is: training with gradient checkpointing leaves use_cache off.
_SWITCHES = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing")


def _without_switches(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as read from a file, parts included, without `_SWITCHES`: they then have their defaults."""
    return {
        key: _without_switches(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _SWITCHES
    }


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
            model, report = getattr(transformers, spec_of(name, config.model_type).model_class).from_pretrained(
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


def spec_of(name: str, model_type: str | None) -> Spec:
    """The hand-made description of an architecture, or its classes alone, where the rest is measured.

    Raises:
        ValueError: transformers has no model of this type for pictures and text.
    """
    if model_type in SPECS:
        return SPECS[model_type]
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or model_type not in PROCESSOR_MAPPING_NAMES:
        raise ValueError(
            f"{name}: architecture {model_type!r} is not known; known: {', '.join(SPECS)}, "
            "and those that transformers has for pictures and text. "
            "A text-only model has no patches to study; how to add another one: book/architectures.md"
        )
    return Spec(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type], PROCESSOR_MAPPING_NAMES[model_type])


def _processor(name: str, spec: Spec, revision: str | None) -> ProcessorMixin:
    with _reading(name, "its processor, are preprocessor_config.json and the tokenizer's files there? "):
        # the PIL image processor, because the torchvision one gives slightly different pixels
        return without_video(spec.processor_class).from_pretrained(
            find(name), revision=revision or None, backend="pil"
        )


def blank(lvlm: LVLM, size: tuple[int, int] = (640, 480)) -> Image.Image:
    """A grey picture of (width, height) pixels, or of the only size that the model takes."""
    if not getattr(lvlm.processor.image_processor, "do_resize", True):
        rows, columns = tile_grid(lvlm.model.config) if not lvlm.spec.packed else (12, 12)
        patch = lvlm.model.config.vision_config.patch_size
        size = columns * patch, rows * patch
    return Image.new("RGB", size, "grey")


def _check_parts(lvlm: LVLM) -> None:
    """Make sure that tower, processor, chat format and tokenizer are those of one model, by asking about a picture.

    It takes the CPU and none of the model's weights.

    Raises:
        ValueError: the features are those of no layer; the chat format leaves out the picture or the question; the
            processor fails, ends each prompt, or cuts a picture into other tiles, patches or visual tokens than the
            model reads.
    """
    name, question, config = lvlm.name, "What is this?", lvlm.model.config
    if lvlm.feature_layer < 0 or not all(layer < len(lvlm.vision_layers) for layer in lvlm.feature_layers):
        raise ValueError(f"{name}: vision_feature_layer {config.vision_feature_layer} is none of the tower's layers")
    try:
        prompt = lvlm.prompt(question)
        if lvlm.processor.chat_template:
            alone = [{"role": "user", "content": [{"type": "text", "text": question}]}]
            if lvlm.processor.apply_chat_template(alone, add_generation_prompt=True) == prompt:
                raise ValueError("its chat format drops the picture")
        if question not in prompt:
            raise ValueError("its chat format drops the question")
        inputs = lvlm.prepared([blank(lvlm)], [question])
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
    last = int(inputs["input_ids"][0, -1])
    if last in lvlm.ends and not prompt.rstrip().endswith(lvlm.processor.tokenizer.decode([last]).strip()):
        raise ValueError(f"{name}: its tokenizer ends each prompt, so that the answer begins behind the end: take "
                         "add_eos_token out of its settings, or the end token out of its post_processor")
    if lvlm.spec.measured:
        return
    pixels, vision = inputs["pixel_values"], config.vision_config
    if lvlm.spec.packed:  # [patches, values]
        tiles, made = 1, pixels.shape[-1]
        taken = 3 * vision.temporal_patch_size * vision.patch_size**2
    else:  # [.., 3, height, width]
        tiles, made, taken = pixels[..., 0, 0, 0].numel(), tuple(pixels.shape[-2:]), pair(vision.image_size)
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


def _check_layout(name: str, config: PretrainedConfig) -> None:
    """The study needs the patches, all of them and nothing else, from one vision layer or several side by side."""
    if config.model_type not in SPECS:
        return  # it is measured
    prefix = n_prefix(config.vision_config)
    layers = getattr(config, "vision_feature_layer", -1)
    if not isinstance(layers, int) and (not layers or SPECS[config.model_type].order != "rows"):
        raise ValueError(f"{name}: vision_feature_layer {layers} is not a single layer")
    wanted = "default" if prefix else "full"  # "default" drops the first token, CLS
    if getattr(config, "vision_feature_select_strategy", wanted) != wanted:
        raise ValueError(f"{name}: visual tokens are not the patches (strategy is not {wanted!r})")
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        raise ValueError(f"{name}: the decoder caps its attention logits (Gemma 2), which SDPA cannot do")
