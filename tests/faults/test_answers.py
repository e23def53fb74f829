"""Kept answers that were damaged or edited: none is used, none ends in a crash, all are answered again."""

import hashlib
import json
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import write

from sinkstudy import capture, models
from sinkstudy.evaluate import NONE, Intervention, evaluate


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> models.LVLM:
    folder = tmp_path_factory.mktemp("llava")
    write(folder, "llava")
    return models.load(str(folder))


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    pixels = np.random.default_rng(3).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    rows = [{"image_id": str(i), "question": q, "answer": "yes", "image": pixels[i]}
            for i in range(3) for q in ("how many", "what is the texture")]
    return pd.DataFrame(rows).assign(id=range(6))


def signed(said: bytes) -> bytes:
    return said + b" " + hashlib.sha256(said).hexdigest().encode()


def edited(change):
    """The first line with another content, its digest as it was."""
    def of(lines: list[bytes]) -> list[bytes]:
        said, _, digest = lines[0].rpartition(b" ")
        answer = json.loads(said)
        change(answer)
        return [json.dumps(answer).encode() + b" " + digest, *lines[1:]]
    return of


CORRUPTIONS = {
    "another prediction": edited(lambda a: a.update(prediction="no")),
    "a prediction of another type": edited(lambda a: a.update(prediction=3)),
    "no prediction": edited(lambda a: a.pop("prediction")),
    "another score": edited(lambda a: a["scores"].update(yes=-0.1)),
    "a score that is NaN": edited(lambda a: a["scores"].update(yes=float("nan"))),
    "a score that is infinite": edited(lambda a: a["scores"].update(no=float("-inf"))),
    "a score as text": edited(lambda a: a["scores"].update(yes="-0.1")),
    "a score that is null": edited(lambda a: a["scores"].update(yes=None)),
    "a candidate less": edited(lambda a: a["scores"].pop("no")),
    "a candidate more": edited(lambda a: a["scores"].update(maybe=-1.0)),
    "no scores": edited(lambda a: a.pop("scores")),
    "scores as a list": edited(lambda a: a.update(scores=[1, 2])),
    "scores swapped": edited(lambda a: a.update(scores=dict(yes=a["scores"]["no"], no=a["scores"]["yes"]))),
    "no key": edited(lambda a: a.pop("key")),
    "another key": edited(lambda a: a.update(key="0" * 64)),
    "a key of another type": edited(lambda a: a.update(key=7)),
    "more entries": edited(lambda a: a.update(checked=True)),
    "a key for another answer": lambda lines: [
        lines[1].replace(json.loads(lines[1].rpartition(b" ")[0])["key"].encode(),
                         json.loads(lines[0].rpartition(b" ")[0])["key"].encode()), *lines[1:]],
    "cut off": lambda lines: [*lines[:-1], lines[-1][:40]],
    "cut off in the digest": lambda lines: [*lines[:-1], lines[-1][:-5]],
    "only a digest": lambda lines: [lines[0].rpartition(b" ")[2], *lines[1:]],
    "no digest": lambda lines: [lines[0].rpartition(b" ")[0], *lines[1:]],
    "another line's digest": lambda lines: [
        lines[0].rpartition(b" ")[0] + b" " + lines[1].rpartition(b" ")[2], *lines[1:]],
    "two lines in one": lambda lines: [lines[0] + lines[1], *lines[2:]],
    "a bit": lambda lines: [bytes([lines[0][30] ^ 1]).join([lines[0][:30], lines[0][31:]]), *lines[1:]],
    "zeros": lambda lines: [b"\0" * len(lines[0]), *lines[1:]],
    "bytes that are no text": lambda lines: [b"\xff\xfe\x80" + lines[0], *lines[1:]],
    "a list": lambda lines: [b"[1, 2]", *lines[1:]],
    "a number": lambda lines: [b"3", *lines[1:]],
    "null": lambda lines: [b"null", *lines[1:]],
    "empty lines": lambda lines: [b"", b"", *lines[1:]],
    "an older form": lambda lines: [json.dumps({"key": "a", "prediction": "b", "scores": {}}).encode(), *lines[1:]],
    "all gone": lambda lines: [],
    "all reversed": lambda lines: [line[::-1] for line in lines],
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_does_not_prove_itself_is_answered_again(llava, table, tmp_path, name):
    whole = evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    lines = [line for line in file.read_bytes().splitlines() if line]
    damaged = CORRUPTIONS[name](lines)
    assert damaged != lines
    file.write_bytes(b"\n".join(damaged) + b"\n")
    pd.testing.assert_frame_equal(evaluate(llava, table, max_new_tokens=2, cache=tmp_path), whole, check_exact=True)
    # and is there again, whole
    asked = []
    hook = llava.decoder.register_forward_pre_hook(lambda *_: asked.append(1))
    evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
    hook.remove()
    assert not asked


def test_the_same_line_twice_is_one_answer(llava, table, tmp_path):
    whole = evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() * 2)
    pd.testing.assert_frame_equal(evaluate(llava, table, max_new_tokens=2, cache=tmp_path), whole, check_exact=True)


# ------------------------------------------------------------------------------------------- what is kept at all
def test_an_intervention_that_does_not_say_what_it_does_is_not_kept(llava, table, tmp_path):
    """Two that differ in what they close over only, under one name."""
    def silenced(factor: float) -> Intervention:
        return Intervention("silenced", lambda lvlm, inputs: lvlm.editing(after=lambda x, layer: factor * x))

    parts = [evaluate(llava, table, [silenced(f)], max_new_tokens=2, cache=tmp_path) for f in (0.0, 3.0)]
    fresh = [evaluate(llava, table, [silenced(f)], max_new_tokens=2, cache=None) for f in (0.0, 3.0)]
    for kept, new in zip(parts, fresh, strict=True):
        pd.testing.assert_frame_equal(kept, new, check_exact=True)
    assert not parts[0].logp_yes.equals(parts[1].logp_yes)
    assert not any(file.read_bytes().strip() for file in tmp_path.iterdir())


def test_changed_weights_have_answers_of_their_own(llava, table, tmp_path):
    before = evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
    with torch.no_grad():
        llava.decoder_layers[0].mlp.down_proj.weight.mul_(-1)
    after = evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
    with torch.no_grad():
        llava.decoder_layers[0].mlp.down_proj.weight.mul_(-1)
    assert not before.logp_yes.equals(after.logp_yes)
    pd.testing.assert_frame_equal(evaluate(llava, table, max_new_tokens=2, cache=tmp_path), before, check_exact=True)


# ------------------------------------------------------------------------------------------- numbers that are none
@contextmanager
def poisoned(module, value: float):
    """Inside, one number of what a module puts out is `value`."""
    def spoil(_, args, out):
        out = out.clone()
        out[..., 0] = value
        return out

    handle = module.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


SIDES = {"vision": ("vision_layers", 0), "decoder": ("decoder_layers", 1)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", SIDES)
def test_answers_of_nan_are_refused_and_not_kept(llava, table, tmp_path, side, value):
    layers, layer = SIDES[side]
    with poisoned(getattr(llava, layers)[layer], value), pytest.raises(ValueError) as problem:
        evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
    said = str(problem.value)
    assert f"NaN or infinite values behind layer {layer} of the {side}, picture '0'" in said and "another dtype" in said
    assert not any(file.read_bytes().strip() for file in tmp_path.glob("*"))
    assert np.isfinite(evaluate(llava, table, max_new_tokens=2, cache=tmp_path).logp_yes).all()


def test_an_intervention_that_makes_nan_is_named(llava, table):
    bad = Intervention("bad", lambda lvlm, inputs: lvlm.editing(after=lambda x, layer: x * float("nan")), {"a": 1})
    with pytest.raises(ValueError, match="NaN among the logits, under 'bad', picture '0'"):
        evaluate(llava, table, [NONE, bad], max_new_tokens=2, cache=None)


@pytest.mark.parametrize("side", SIDES)
def test_a_trace_of_nan_is_refused(llava, table, side):
    layers, layer = SIDES[side]
    pictures = list(table.image[::2])
    with poisoned(getattr(llava, layers)[layer], float("nan")):
        with pytest.raises(ValueError, match=f"behind layer {layer} of the .*, picture 0"):
            capture.trace(llava, pictures, ["how many"] * 3)
        if side == "vision":
            with pytest.raises(ValueError, match="behind layer 0 of the tower, picture 0"):
                capture.trace_tower(llava, pictures)
