"""Every architecture of pictures and text that transformers has: what of the study works on a tiny random instance.

`data/architectures.csv` has a row for each, `architectures-parts.csv` what was found and the longer reasons. After a
change that is meant: `python tests/model/test_measured.py` writes them anew. Instances are narrow copies (`narrow`),
inputs come from the configuration (`bare`), the truth is planted: one patch is repainted, and the token that it changes
is made a sink.
"""

import functools
import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import bare
import pandas as pd
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, BatchFeature, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from sinkstudy.answers.evaluate import Prefixes
from sinkstudy.effects import moving
from sinkstudy.effects.ablation import read_tokens
from sinkstudy.effects.methods import METHODS, Case, Targets, applied
from sinkstudy.effects.neurons import norms
from sinkstudy.model import measure
from sinkstudy.model.capture import trace
from sinkstudy.model.lvlm import LVLM

TABLE = Path(__file__).parents[2] / "data" / "architectures.csv"
PARTS = TABLE.with_name("architectures-parts.csv")
SHOWN = ["works", "pictures", "prefix", "patches of a token", "processor", "methods", "without"]  # of `TABLE`
# random weights light no dimension for `var` to find, and look at no image more than at another
VAR = moving.intervention("var", moving.redistributed, dimensions=[0, 1], tau=1.0, p=0.0, rho=1.0, least=0.0)
OF_SINKS = [name for name, method in METHODS.items() if not method.at_random]
SPEECH = SimpleNamespace(  # in the place of a processor
    chat_template=None,
    image_processor=SimpleNamespace(do_resize=True),
    tokenizer=SimpleNamespace(bos_token=None, eos_token_id=None, pad_token_id=0),
    batch_decode=lambda tokens, **_: [" ".join(map(str, row.tolist())) for row in tokens],
)


@dataclass(frozen=True)
class Bare(LVLM):
    """A model without a processor: a picture is given as its (rows, columns) of patches, several as a list of these."""

    def inputs(self, images, questions) -> BatchFeature:
        several = isinstance(images[0], list)
        return BatchFeature(given(self.model, tuple(images[0] if several else images), several))


given = functools.lru_cache(maxsize=8)(bare.inputs)  # it runs the model, which must not happen under hooks


def tiny(kind: str) -> Bare:
    model = measure.Twin(bare.small(kind)).model
    return Bare(model, SPEECH, kind, None, measure.spec(model.config, given(model, ((8, 8),), False)))


def repainted(lvlm: Bare, inputs: dict, layout, patch: int) -> int:
    """The token of the tower's first layer, counted through the batch, that changes most with the pixels of a patch."""
    seen = []
    pixels = inputs["pixel_values"].clone()
    n, (rows, columns) = layout.grid[0] * layout.grid[1], layout.grid
    tile, (row, column) = patch // n, divmod(patch % n, columns)
    if lvlm.spec.packed and "image_sizes" not in inputs:  # patches one by one
        side = lvlm.merge if bare.blocks(lvlm.model) else 1
        block = row // side * (columns // side) + column // side
        place = block * side**2 + row % side * side + column % side
        flat = pixels if pixels.ndim != 3 else pixels.flatten(0, 1)
        if "target_sizes" in inputs:  # side by side
            flat = pixels[0].unflatten(-1, (-1, pixels.shape[-2])).movedim(-2, 0)
        flat[tile * n + place] += 1
    else:
        vision = getattr(lvlm.model.config, "vision_config", lvlm.model.config)
        size = bare.first(getattr(vision, "patch_size", 0))
        planes = pixels.flatten(0, -4)
        high = size if lvlm.spec.packed else planes.shape[-2] // rows
        wide = size if lvlm.spec.packed else planes.shape[-1] // columns
        planes[tile, :, high * row : high * (row + 1), wide * column : wide * (column + 1)] += 1
    with torch.no_grad(), lvlm.vision_layers[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append([*args, *kwargs.values()][0].flatten(0, -2)), with_kwargs=True
    ):
        lvlm.model(**inputs)
        lvlm.model(**{**inputs, "pixel_values": pixels})
    moved = (seen[1] - seen[0]).abs().amax(-1)
    return int(moved.argmax())


def planted(lvlm: Bare, token: int):
    """A hook that makes one token of the feature layer a sink."""

    def plant(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        hidden.view(-1, hidden.shape[-1])[token] = 100 * torch.linspace(-1, 1, hidden.shape[-1])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return lvlm.vision_layers[lvlm.feature_layer].register_forward_hook(plant, prepend=True)


def follow(lvlm: Bare, grids: list) -> None:
    """Plant a sink in one patch of the second picture, and find it in tower, connector and decoder."""
    inputs = lvlm.inputs(grids, [""] * len(grids))
    layout = lvlm.layout(inputs)[-1]
    patch = len(layout.vision) // 2 + 1
    if (layout.positions[patch] < 0).all():
        patch = 1
    before = sum(other.tiles for other in lvlm.layout(inputs)[:-1])
    token = repainted(lvlm, inputs, layout, patch + before * layout.grid[0] * layout.grid[1])
    assert token == layout.vision[patch], "the tower"
    plain = trace(lvlm, grids, [""] * len(grids))
    with planted(lvlm, token):
        sunk = trace(lvlm, grids, [""] * len(grids))
    assert sunk.vision_norms[-1, lvlm.feature_layer].argmax() == patch, "the tower's norms"
    assert torch.isfinite(sunk.vision_received).all(), "the tower's attention"
    read = layout.lift(torch.arange(len(layout.vision)) == patch, "any")
    reached = (sunk.projected_norms - plain.projected_norms)[-1].abs()
    assert read[reached.argmax()], "the connector"
    changed = (sunk.decoder_norms[-1, 0] - plain.decoder_norms[-1, 0]).abs()
    assert (changed[read] > 0).any(), "the decoder"
    if "token_type_ids" not in inputs:  # causal among the tokens of a picture too
        assert not changed[: read.nonzero()[0]].any(), "the decoder"
    if not lvlm.spec.mixes:
        assert (reached[~read] == 0).all(), "the connector"


def answers(lvlm: Bare) -> None:
    """Answers under observation are those of `generate`."""
    seen = trace(lvlm, [(8, 8)], [""], max_new_tokens=3)
    inputs = lvlm.inputs([(8, 8)], [""])
    with torch.no_grad():
        own = lvlm.model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert seen.answers == SPEECH.batch_decode(own[:, inputs["input_ids"].shape[1] :]), "answers"


def halved(lvlm: Bare, inputs, sink: torch.Tensor) -> None:
    """With weight 0.5 the first keys that attention sees otherwise are half as long, and those of the sink alone.

    A norm behind what makes the keys would undo any weight but 0.
    """
    seen: list[list[torch.Tensor]] = []

    def noting(query, key, *args, **kwargs):
        seen[-1].append(key.detach().clone())
        return attend(query, key, *args, **kwargs)

    attend = torch.nn.functional.scaled_dot_product_attention
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", noting), torch.no_grad():
        for context in (nullcontext(), moving.gated(lvlm, inputs, [sink], 0.5)):
            seen.append([])
            with context:
                lvlm.model(**inputs)
    if not seen[0]:
        return  # its attention is eager
    own, weighed = next((pair for pair in zip(*seen, strict=True) if not torch.equal(*pair)), (None, None))
    if own is None:
        raise ValueError("keys are as long as before")
    moved = (own != weighed).any(-1).any(1)[0].nonzero()[:, 0]  # places of keys
    layout = lvlm.layout(inputs)[0]
    assert set(moved.tolist()) <= set(layout.visual[layout.lift(sink, "any")].tolist()), "other keys are weighed"
    torch.testing.assert_close(weighed[:, :, moved], own[:, :, moved] / 2)


def methods(lvlm: Bare) -> list[str]:
    """The training-free methods that do not run, or change nothing, each with the reason."""
    inputs = lvlm.inputs([(8, 8)], [""])
    try:
        case = Case(lvlm, {"": {"a": (8, 8)}}, criterion="percentile", threshold=98.0)
        read = (lvlm.layout(inputs)[0].positions >= 0).any(1)  # what is cut off moves nothing
        sink = torch.arange(len(read)) == read.nonzero()[len(read.nonzero()) // 2]
        case.targets = Targets("sinks", {("", "a"): sink}, {("", "a"): sink.roll(3)})  # planted
    except Exception as error:
        return [f"{name} ({said(error)})" for name in OF_SINKS]
    with torch.no_grad():
        plain = lvlm.model(**inputs).logits[:, -1]
    missing = []
    for name in OF_SINKS:
        try:
            if METHODS[name].check:
                METHODS[name].check(lvlm)
            change = VAR if name == "var" else applied(case, "", name, METHODS[name].default)
            with torch.no_grad(), change.around(lvlm, Prefixes(inputs, ["a"])):
                changed = lvlm.model(**inputs).logits[:, -1]
            if torch.equal(changed, plain):
                raise ValueError("nothing changes")
            if name == "keys":
                halved(lvlm, inputs, sink)
        except Exception as error:
            missing.append(f"{name} ({said(error)})")
    return missing


def row(kind: str) -> dict:
    """What works on one architecture."""
    found = {"architecture": kind, "class": CLASSES[kind], "works": "no", "without": "", "processor": processor(kind)}
    failed: list[str] = []
    try:
        torch.manual_seed(0)
        lvlm = tiny(kind)
    except Exception as error:
        return {**found, "without": said(error)}
    spec = lvlm.spec
    (layout,) = lvlm.layout(lvlm.inputs([(8, 8)], [""]))
    found |= {
        "tower": spec.vision,
        "connector": spec.connector or "",
        "prefix": spec.prefix,
        "patches of a token": "all" if spec.mixes else spec.merge**2,
        "pictures": "any size" if spec.packed else f"tiles of {layout.grid[0]} x {layout.grid[1]}",
    }
    shapes = {"square": [(8, 8)] * 2, "wide": [(4, 12)] * 2, "several": [[(8, 8), (8, 8)]]}
    for name, grids in shapes.items():
        attempt(failed, name, lambda: follow(lvlm, grids))
    attempt(failed, "answers", lambda: answers(lvlm))
    found["works"] = "yes" if not failed else "no" if len(failed) == 4 else "in part"
    if spec.mixes and not failed:
        found["works"] = "in part"
        failed.append("the connector mixes all patches")
    lacking = [] if found["works"] == "no" else methods(lvlm)
    found["methods"] = f"{len(OF_SINKS) - len(lacking)} of {len(OF_SINKS)}"
    return {**found, "without": "; ".join(failed), "methods that do not run": "; ".join(lacking)}


def processor(kind: str) -> str:
    """Is there a processor of pictures and text, and can it be used without packages that are not installed?"""
    kind_of = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(kind) or "", None)
    lacking = [] if kind_of is None else [name for name in getattr(kind_of, "_backends", []) if not has(name)]
    return "none" if kind_of is None else "needs " + ", ".join(lacking) if lacking else "yes"


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def attempt(failed: list[str], what: str, do) -> None:
    try:
        do()
    except Exception as error:
        failed.append(f"{what}: {said(error)}"[:80])


def said(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "needs " + ("timm" if "timm" in str(error) else str(error).split()[0])
    text = str(error).partition("\nassert")[0]  # without what pytest adds
    line = " ".join(text.split())[:90]
    return line if isinstance(error, ValueError) else f"{type(error).__name__} {line}"


KINDS = [kind for kind in CLASSES if kind in CONFIG_MAPPING]


@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture(kind):
    how = dict(keep_default_na=False, dtype=str, index_col="architecture")
    table = pd.read_csv(TABLE, **how).join(pd.read_csv(PARTS, **how))
    now = pd.DataFrame([row(kind)]).astype(str).set_index("architecture")
    assert dict(table.loc[kind, now.columns]) == dict(now.loc[kind])


def test_where_patches_have_no_row_of_their_own_nothing_is_taken_for_it():
    """Aria's connector mixes patches, so none has an output; LFM2-VL's takes the pictures of a batch one by one."""
    mixing, one_by_one = tiny("aria"), tiny("lfm2_vl")
    with pytest.raises(ValueError, match="connector's output has no row for each patch"):
        read_tokens(mixing, {"a": (8, 8)})
    inputs, one = mixing.inputs([(8, 8)], [""]), torch.arange(64) == 5
    with pytest.raises(ValueError, match="connector's output"), moving.reweighted(mixing, inputs, [one]):
        mixing.model(**inputs)
    assert norms(one_by_one, {"a": (8, 8)})["a"].isfinite().all()
    with pytest.raises(ValueError, match="connector's input has no row for each patch.*batch size of 1"):
        norms(one_by_one, {"a": (8, 8), "b": (8, 8)})


def test_there_are_forty():
    table = pd.read_csv(TABLE, keep_default_na=False)
    assert set(table.architecture) == set(KINDS)
    assert (table.works == "yes").sum() >= 40
    page = (TABLE.parents[1] / "book" / "architectures.md").read_text(encoding="utf-8")
    counts = table.works.value_counts()
    assert f"maps {len(table)} kinds" in page
    assert f"{counts['yes']} work here, {counts['in part']} in part, and {counts['no']} do not" in page


if __name__ == "__main__":
    logging.set_verbosity_error()
    rows = []
    for kind in sys.argv[1:] or KINDS:
        rows.append({name: str(value) for name, value in row(kind).items()})
        print(*rows[-1].values(), sep=" | ", flush=True)
    if not sys.argv[1:]:
        table = pd.DataFrame(rows).astype(object).fillna("").set_index("architecture")
        table[SHOWN].to_csv(TABLE)
        table.drop(columns=SHOWN).to_csv(PARTS)
