"""Kept answers that were damaged or edited: none is used, none ends in a crash, all are answered again."""

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sinkstudy import sinks
from sinkstudy.analyses import attribution, probing, relevance
from sinkstudy.answers.evaluate import NONE, Intervention, evaluate
from sinkstudy.effects import ablation, neurons
from sinkstudy.model import capture
from sinkstudy.paths import ROOT


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
    with llava.decoder.register_forward_pre_hook(lambda *_: asked.append(1)):
        evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
    assert not asked


def test_the_same_line_twice_is_one_answer(llava, table, tmp_path):
    whole = evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() * 2)
    pd.testing.assert_frame_equal(evaluate(llava, table, max_new_tokens=2, cache=tmp_path), whole, check_exact=True)


# ------------------------------------------------------------------------------------------- what is kept at all
FACTOR = 1.0  # the cases below set it


def scaled(by) -> Intervention:
    return Intervention("it", lambda lvlm, inputs: lvlm.editing(after=lambda x, layer: by * x), {"kind": "scaled"})


def closed_over_deeply(by) -> Intervention:
    def scale(x, layer):
        return by["how"][0] * x

    return Intervention("it", partial(lambda scale, lvlm, inputs: lvlm.editing(after=scale), scale))


def in_a_default(by) -> Intervention:
    return Intervention("it", lambda lvlm, inputs, by=by: lvlm.editing(after=lambda x, layer: by * x))


def in_the_code(by) -> Intervention:
    twice = Intervention("it", lambda lvlm, inputs: lvlm.editing(after=lambda x, layer: 2.0 * x))
    return twice if by == 2.0 else Intervention("it", lambda lvlm, inputs: lvlm.editing(after=lambda x, layer: 0.5 * x))


def read_of_the_module(by) -> Intervention:
    global FACTOR
    FACTOR = by
    return Intervention("it", lambda lvlm, inputs: lvlm.editing(after=lambda x, layer: FACTOR * x))


class Scale:
    def __init__(self, by) -> None:
        self.by = by

    def around(self, lvlm, inputs):
        return lvlm.editing(after=lambda x, layer: self.by * x)


def of_an_object(by) -> Intervention:
    return Intervention("it", Scale(by).around)


def of_a_module(by) -> Intervention:
    layer = torch.nn.Linear(32, 32, bias=False)
    layer.weight.data = by * torch.eye(32)
    return Intervention("it", lambda lvlm, inputs: lvlm.editing(after=lambda x, _: layer(x)))


def of_masks(by) -> Intervention:
    mask = torch.arange(16) < 4 * by
    return Intervention("it", lambda lvlm, inputs: ablation.hidden(lvlm, inputs, [mask] * len(inputs.image_ids)))


def of_an_array(by) -> Intervention:
    values = np.full(32, by, np.float32)
    return Intervention("it", lambda lvlm, inputs: lvlm.editing(after=lambda x, layer: x * torch.from_numpy(values)))


def kept_otherwise(by) -> Intervention:
    return Intervention("it", lambda lvlm, inputs: lvlm.editing(after=lambda x, layer: 2 * x),
                        keeps="tower" if by == 2.0 else "prefix")  # fmt: skip


REACHED = {
    "closed over": scaled,
    "deep in what is closed over": lambda by: closed_over_deeply({"how": [by]}),
    "a default": in_a_default,
    "the code": in_the_code,
    "a global": read_of_the_module,
    "an attribute": of_an_object,
    "weights": of_a_module,
    "masks": of_masks,
    "an array": of_an_array,
    "what it keeps": kept_otherwise,
    "the package's masks": lambda by: ablation.hide("it", {str(i): torch.arange(16) < 4 * by for i in range(3)}),
}


@pytest.mark.parametrize("name", REACHED)
def test_interventions_that_differ_in_what_they_reach_have_answers_of_their_own(llava, table, tmp_path, name):
    """Two under one name: each has its own, and finds them again."""
    fresh = {by: evaluate(llava, table, [REACHED[name](by)], max_new_tokens=2, cache=None) for by in (2.0, 0.5)}
    assert not fresh[2.0].logp_yes.equals(fresh[0.5].logp_yes)
    asked = []
    for again in (False, True):
        for by, new in fresh.items():
            how = REACHED[name](by)
            with llava.decoder.register_forward_pre_hook(lambda *_: asked.append(1)):
                kept = evaluate(llava, table, [how], max_new_tokens=2, cache=tmp_path)
            pd.testing.assert_frame_equal(kept, new, check_exact=True)
            assert bool(asked) is not again
            asked.clear()


@pytest.mark.parametrize("hidden", [random.Random, torch.Generator, lambda: iter([2.0]), lambda: open(__file__)])
def test_an_intervention_whose_state_is_hidden_is_not_kept(llava, table, tmp_path, hidden):
    state = hidden()
    how = Intervention("odd", lambda lvlm, inputs: lvlm.editing(after=lambda x, layer: x if state else 2 * x), {"a": 1})
    for _ in range(2):
        with pytest.warns(UserWarning, match="answers under 'odd' are not kept: what a .* holds cannot be told"):
            evaluate(llava, table, [NONE, how], max_new_tokens=2, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    assert len([line for line in file.read_bytes().splitlines() if line]) == len(table)  # those of the model as it is


TOLD = """
import numpy, torch
from functools import partial
from sinkstudy import sinks
from sinkstudy.effects import ablation
from sinkstudy.model.identity import Identity
names = {"a", "b", "c", "d"}
class Own:
    def __init__(self): self.mine = self, {"x": torch.arange(3), "y": numpy.ones(2)}
def around(lvlm, inputs, which=frozenset("pq")):
    return partial(ablation.hidden, lvlm, masks=[x for x in names if x in "ab"], rule=sinks.rule)
told = Identity()([around, Own(), Own, -0.0, sinks.rule("absolute", 3.0), torch.float16, torch.sqrt])
"""


def test_what_an_intervention_is_does_not_depend_on_the_process():
    here = {"__name__": "__main__"}
    exec(TOLD, here)
    there = subprocess.run([sys.executable, "-c", TOLD + "print(told)"], capture_output=True, text=True, check=True,
                           env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert there.stdout.strip() == here["told"] and len(here["told"]) == 64


def test_answers_do_not_depend_on_what_was_asked_before(llava, table, tmp_path):
    """Kept are answers of a whole batch: some of its questions in another batch are not taken from there."""
    part, asked = table[table.question == "how many"], []
    evaluate(llava, table, max_new_tokens=2, cache=tmp_path, batch_size=4)
    with llava.decoder.register_forward_pre_hook(lambda *_: asked.append(1)):
        kept = evaluate(llava, part, max_new_tokens=2, cache=tmp_path, batch_size=4)
    assert asked
    pd.testing.assert_frame_equal(
        kept, evaluate(llava, part, max_new_tokens=2, cache=None, batch_size=4), check_exact=True
    )


def test_another_models_file_proves_nothing(llava, table, tmp_path):
    evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
    (of_before,) = tmp_path.iterdir()
    weight = llava.decoder_layers[0].mlp.down_proj.weight
    weight.data.mul_(-1)  # which torch does not count as a change
    try:
        fresh = evaluate(llava, table, max_new_tokens=2, cache=None)
        evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
        (own,) = [file for file in tmp_path.iterdir() if file != of_before]
        own.write_bytes(of_before.read_bytes())
        kept = evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
    finally:
        weight.data.mul_(-1)
    pd.testing.assert_frame_equal(kept, fresh, check_exact=True)


def test_a_group_that_was_kept_in_part_is_answered_in_whole(llava, table, tmp_path):
    """Cut after every line in turn: the numbers are those of an undisturbed run, to the bit."""
    ways = [NONE, scaled(2.0)]
    whole = evaluate(llava, table, ways, max_new_tokens=2, cache=tmp_path, batch_size=4)
    (file,) = tmp_path.iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    for end in range(0, len(lines), 3):
        file.write_bytes(b"".join(lines[:end]) + lines[end][:20])
        again = evaluate(llava, table, ways, max_new_tokens=2, cache=tmp_path, batch_size=4)
        pd.testing.assert_frame_equal(again, whole, check_exact=True)


def no_folder(folder):
    (folder / "file").write_text("")
    return folder / "file" / "answers"


def a_folder_for_the_file(folder):
    for file in folder.iterdir():
        file.unlink()
        file.mkdir()
    return folder


@pytest.mark.parametrize("place", [no_folder, a_folder_for_the_file, lambda folder: Path("/proc/answers")])
def test_answers_are_given_where_none_can_be_kept(llava, table, tmp_path, place):
    whole = evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
    with pytest.warns(UserWarning, match="answers are not kept, and a run that is killed begins anew"):
        said = evaluate(llava, table, max_new_tokens=2, cache=place(tmp_path))
    pd.testing.assert_frame_equal(said, whole, check_exact=True)


def test_a_full_disk_costs_no_answer(llava, table, tmp_path):
    """Files may not grow beyond a kilobyte: what was written is used later, the rest is asked again."""
    whole = evaluate(llava, table, max_new_tokens=2, cache=None)
    kept, before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.warns(UserWarning, match="answers are not kept.*File too large"):
            said = evaluate(llava, table, max_new_tokens=2, cache=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, kept)
    for found in (said, evaluate(llava, table, max_new_tokens=2, cache=tmp_path)):
        pd.testing.assert_frame_equal(found, whole, check_exact=True)


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

    with module.register_forward_hook(spoil):
        yield


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
    with pytest.raises(ValueError, match="NaN or infinity among the logits, under 'bad', picture '0'"):
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_behind_the_first_token_is_refused(llava, table, tmp_path, value):
    """The first token is right, and overflow begins with the second."""
    def spoil(module, args, out):
        return out * value if out.shape[1] == 1 else out

    with llava.model.lm_head.register_forward_hook(spoil):
        with pytest.raises(ValueError, match="among the logits, picture '0'.*another dtype"):
            evaluate(llava, table, max_new_tokens=3, cache=tmp_path)
    assert not any(file.read_bytes().strip() for file in tmp_path.glob("*"))


def test_a_candidate_of_probability_0_is_refused(llava, table, tmp_path):
    words = torch.tensor(llava.processor.tokenizer.convert_tokens_to_ids(["no"]))
    with llava.model.lm_head.register_forward_hook(lambda m, args, out: out.index_fill(-1, words, -float("inf"))):
        with pytest.raises(ValueError, match="among the logits, picture '0'"):
            evaluate(llava, table, max_new_tokens=2, cache=tmp_path)


def attributed(llava, pictures):
    f = attribution.answer_log_prob(llava, pictures, ["how many"] * 3, ["red"] * 3)
    return attribution.gradient_x_activation(f)


READERS = {  # of the tower
    "relevance": lambda llava, pictures: relevance.measure(llava, pictures),
    "norms of a method": lambda llava, pictures: neurons.norms(llava, dict(enumerate(pictures))),
    "tokens": lambda llava, pictures: ablation.read_tokens(llava, dict(enumerate(pictures))),
    "attribution": attributed,
    "log-probability": lambda llava, pictures: attribution.answer_log_prob(
        llava, pictures, ["how many"] * 3, ["red"] * 3).values(),
    "probes": lambda llava, pictures: probing.states(
        llava, pictures, lambda i, layout, norms: torch.ones(1, len(norms)) / len(norms), followed=1),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_what_reads_the_model_refuses_nan(llava, table, name):
    with poisoned(llava.vision_layers[0], float("nan")), pytest.raises(ValueError, match="NaN or inf.*picture 0.*dty"):
        READERS[name](llava, list(table.image[::2]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_text_token_is_watched_too(llava, table, value):
    """Where half precision overflows first: at the token on which attention rests."""
    def spoil(module, args, out):
        out = out.clone()
        out[:, 0, 3] = value
        return out

    with llava.decoder_layers[-1].register_forward_hook(spoil):
        with pytest.raises(ValueError, match="behind layer 2 of the decoder, picture 0"):
            capture.trace(llava, list(table.image[::2]), ["how many"] * 3)


@pytest.mark.parametrize("criterion", sinks.NORM_CRITERIA)
def test_norms_that_are_none_have_no_sinks(criterion):
    norms = torch.ones(4, 16)
    norms[2, 3] = float("nan")
    with pytest.raises(ValueError, match="norms that are NaN or infinite"):
        sinks.rule(criterion, 3.0)(norms)
