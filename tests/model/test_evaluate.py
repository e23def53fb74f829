"""Answers with shared work are those of one `generate` for each question; they outlive a kill; bad input is named."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import architectures
import noise
import numpy as np
import pandas as pd
import pytest
import torch

from sinkstudy.answers.evaluate import NONE, Intervention, evaluate
from sinkstudy.model import loading
from sinkstudy.paths import ROOT

STEPS = 4
TEXTS = ["how many", "what is the texture", "what is the texture red blue yes no", "is red the texture"]
SIZES = {"wide": (64, 32), "high": (40, 70), "square": (32, 32)}  # (width, height)

pytestmark = pytest.mark.filterwarnings("ignore:.*share no prefix")


def half(lvlm, inputs):
    return lvlm.editing(after=lambda tokens, layer: tokens * 0.5)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Mixed rows, of an image four, three or one."""
    pictures = dict(zip(SIZES, noise.pictures(SIZES.values())))
    asked = [("high", 0), ("wide", 2), ("high", 1), ("square", 1), ("wide", 0), ("high", 2), ("wide", 3), ("high", 3)]
    return pd.DataFrame(
        [
            {"id": f"{name}-{i}", "image_id": name, "question": TEXTS[i], "answer": "yes", "image": pictures[name]}
            for name, i in asked
        ],
        index=[5, 6, 7, 8] * 2,
    )


@torch.no_grad()
def one_by_one(lvlm, table, around=NONE.around) -> tuple[list[str], torch.Tensor]:
    """Answers of one `generate` each, and log-probabilities of their first tokens."""
    said, logp = [], []
    for row in table.itertuples():
        inputs = lvlm.inputs([row.image], [row.question])
        with around(lvlm, inputs):
            out = lvlm.model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        said += lvlm.processor.batch_decode(out.sequences[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        logp.append(out.logits[0][0].log_softmax(-1))
    return [text.strip() for text in said], torch.stack(logp)


@pytest.mark.parametrize(
    "name", ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "paligemma", "gemma3", "aya_vision", "idefics3"]
)
def test_answers_are_those_of_one_generate_for_each_question(name, table, tmp_path):
    lvlm = architectures.load(tmp_path, name)
    ways = [NONE, Intervention("half", half)]
    sizes = (3, 64) if name in ("llava", "qwen2_vl") else (5,)
    expected = {how.name: one_by_one(lvlm, table, how.around) for how in ways}
    passes = []
    hook = lvlm.vision_layers[0].get_submodule(lvlm.spec.vision_attention).register_forward_hook(
        lambda module, args, out: passes.append(1)
    )
    for batch_size in sizes:
        passes.clear()
        found = evaluate(lvlm, table, ways, max_new_tokens=STEPS, batch_size=batch_size, cache=None)
        assert len(passes) <= len(SIZES)  # for both interventions
        for how in ways:
            rows = found[found.intervention == how.name]
            said, logp = expected[how.name]
            assert rows.id.tolist() == table.id.tolist()
            assert rows.prediction.tolist() == said
            for word in ("yes", "no"):
                ids = lvlm.processor.tokenizer.convert_tokens_to_ids(word)
                np.testing.assert_allclose(rows[f"logp_{word}"], logp[:, ids], atol=2e-5)
            assert (rows["first"] == np.where(rows.logp_yes > rows.logp_no, "yes", "no")).all()
    hook.remove()
    # and the model is as it was
    torch.testing.assert_close(one_by_one(lvlm, table.head(2))[1], expected["none"][1][:2])


@pytest.mark.parametrize("keeps", ["nothing", "tower", "prefix"])
def test_an_intervention_changes_what_it_does_not_keep(llava, table, keeps):
    part = {"nothing": llava.vision_layers[0], "tower": llava.connector, "prefix": llava.decoder.norm}[keeps]

    def around(lvlm, inputs):
        return part.register_forward_hook(lambda module, args, out: 2 * out)

    ways = [NONE, Intervention("doubled", around, keeps=keeps)]
    found = evaluate(llava, table, ways, max_new_tokens=STEPS, cache=None)
    said, logp = one_by_one(llava, table, around)
    rows = found[found.intervention == "doubled"]
    assert rows.prediction.tolist() == said
    np.testing.assert_allclose(rows.logp_no, logp[:, llava.processor.tokenizer.convert_tokens_to_ids("no")], atol=2e-5)
    assert rows.logp_no.tolist() != found[found.intervention == "none"].logp_no.tolist()


def test_an_intervention_finds_visual_tokens_where_they_stand(llava, table):
    seen = []

    def around(lvlm, inputs):
        seen.extend((len(inputs["input_ids"]), layout.visual.tolist()) for layout in lvlm.layout(inputs))
        return NONE.around(lvlm, inputs)

    evaluate(llava, table, [Intervention("look", around)], max_new_tokens=1, cache=None, batch_size=8)
    assert seen == [(3, list(range(2, 18)))] * 3  # user : <image> x 16


def test_a_question_in_front_of_the_image_shares_no_prefix(table, tmp_path):
    architectures.write(tmp_path, "llava")
    template = "{% for c in messages[0]['content'] | reverse %}{{ '<image>' if c['type'] == 'image' else c['text'] }} "
    (tmp_path / "chat_template.jinja").write_text(template + "{% endfor %}")
    lvlm = loading.load(str(tmp_path))
    with pytest.warns(UserWarning, match="puts the question before the image, so questions share no prefix"):
        found = evaluate(lvlm, table, max_new_tokens=STEPS, cache=None)
    assert found.prediction.tolist() == one_by_one(lvlm, table)[0]


def test_half_precision_goes_through(table, tmp_path):
    lvlm = architectures.load(tmp_path, "qwen2_vl")
    lvlm.model.to(torch.bfloat16)
    found = evaluate(lvlm, table, max_new_tokens=1, cache=None)
    assert np.isfinite(found.logp_yes).all()


# ------------------------------------------------------------------------------------------------- cache
def counting(llava, forward):
    """A hook that counts the decoder's passes."""
    return llava.decoder.register_forward_hook(lambda module, args, out: forward.append(1))


def test_a_killed_run_goes_on_where_it_stopped(llava, table, tmp_path):
    whole = evaluate(llava, table, max_new_tokens=STEPS, cache=None, batch_size=2)
    broken = table.assign(image=[object() if name == "square" else image
                                 for name, image in zip(table.image_id, table.image)])
    with pytest.raises(ValueError, match="picture 'square' cannot be read"):
        evaluate(llava, broken, max_new_tokens=STEPS, cache=tmp_path, batch_size=2)
    (file,) = tmp_path.iterdir()
    lines = file.read_text()
    kept = [json.loads(line.rpartition(" ")[0]) for line in lines.split("\n") if line]
    assert len(kept) == 7  # all questions about the images before
    with open(file, "a") as stream:
        stream.write('{"key": "cut of')  # as a kill leaves it
    forward = []
    with counting(llava, forward):
        again = evaluate(llava, table, max_new_tokens=STEPS, cache=tmp_path, batch_size=2)
        assert 0 < len(forward) <= 1 + STEPS  # one prefix, one answer
        forward.clear()
        third = evaluate(llava, table, max_new_tokens=STEPS, cache=tmp_path, batch_size=2)
        assert not forward and file.read_text().startswith(lines)
        evaluate(llava, table, max_new_tokens=STEPS, cache=tmp_path, batch_size=64)
    assert forward and file.read_text().startswith(lines)  # other batches round differently
    for found in (again, third):
        pd.testing.assert_frame_equal(found, whole, check_exact=True)  # the batches are those of an undisturbed run


KILLED = """
import sys
import test_evaluate as tests
from sinkstudy.answers.evaluate import evaluate
from sinkstudy.model import loading

evaluate(loading.load(sys.argv[1]), tests.many(), max_new_tokens=1, cache=sys.argv[2], batch_size=1)
"""


def many() -> pd.DataFrame:
    """More pictures than can be looked at before the process is killed."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (3, 32, 32), dtype=np.uint8) for _ in range(2000)]
    names = [str(i) for i in range(len(pictures))]
    return pd.DataFrame({"id": names, "image_id": names, "question": TEXTS[0], "answer": "yes", "image": pictures})


def test_answers_outlive_a_kill(llava, tmp_path):
    """SIGKILL, sent once some answers are on disk; then only the others are asked for."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, llava.name, tmp_path], env=environment)
    try:
        for _ in range(2400):
            if any(file.stat().st_size > 2000 for file in tmp_path.glob("*.jsonl")):
                break
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    (file,) = tmp_path.iterdir()
    kept = [json.loads(line.rpartition(" ")[0])["key"] for line in file.read_text().split("\n")[:-1] if line]
    table = many().head(len(kept) + 3)
    passes = []
    with llava.connector.register_forward_hook(lambda module, args, out: passes.append(len(out))):
        found = evaluate(llava, table, max_new_tokens=1, cache=tmp_path, batch_size=1)
    assert 0 < len(kept) < 2000 and sum(passes) == 3
    fresh = evaluate(llava, table, max_new_tokens=1, cache=None, batch_size=1)
    pd.testing.assert_frame_equal(found, fresh, atol=1e-5)


def test_the_cache_tells_apart_whatever_changes_answers(llava, table, tmp_path):
    def asks_again(table=table, interventions=(NONE,), **how) -> bool:
        forward = []
        with counting(llava, forward):
            evaluate(llava, table, interventions, **{"max_new_tokens": 1, "cache": tmp_path, **how})
        return bool(forward)

    assert asks_again() and not asks_again()
    assert asks_again(table=table.assign(question=table.question + " yes"))
    assert asks_again(table=table.assign(image=[image.rotate(180) for image in table.image]))
    assert asks_again(candidates=("red", "blue"))
    assert asks_again(max_new_tokens=2)
    assert asks_again(interventions=[Intervention("half", half, {"factor": 0.5})])
    assert not asks_again(interventions=[Intervention("half", half, {"factor": 0.5})])
    assert asks_again(interventions=[Intervention("half", half, {"factor": 0.25})])
    weight = llava.connector.linear_1.weight
    weight[0, 0] += 1
    try:
        assert asks_again()
    finally:
        weight[0, 0] -= 1


# ------------------------------------------------------------------------------------------------- candidates
def test_letters_are_candidates_where_they_are_the_answers(llava, table):
    choices = table.assign(answer="A", choices=[["red", "blue"]] * 8)
    problem = "first tokens do not tell the candidates 'A', 'B' apart"  # the tiny vocabulary has no letters
    with pytest.warns(UserWarning, match=f"{problem}: their log-probabilities are NaN"):
        found = evaluate(llava, choices, max_new_tokens=1, cache=None)
    assert "first" not in found and found.prediction.notna().all()
    with pytest.raises(ValueError, match=problem):
        evaluate(llava, table, candidates=["A", "B"], max_new_tokens=1, cache=None)
    assert "first" not in evaluate(llava, table.assign(answer="a dog"), max_new_tokens=1, cache=None)


def test_candidates_may_differ_from_row_to_row(llava, table):
    each = [("red", "blue")] * 4 + [("yes", "no", "red")] * 4
    found = evaluate(llava, table, candidates=each, max_new_tokens=1, cache=None)
    assert found.logp_blue.notna().tolist() == [True] * 4 + [False] * 4
    assert found.logp_red.notna().all()
    assert all(first in options for first, options in zip(found["first"], each))


# ------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.head(0), "the table is empty"),
        (lambda t: t.drop(columns="question"), "no column 'question'"),
        (lambda t: t.drop(columns="image"), "no column 'image'"),
        (lambda t: t.assign(id="same"), "the id 'same' occurs twice"),
        (lambda t: t.assign(image="no/such/file.png"), "picture 'high' cannot be read.*no/such/file.png"),
        (lambda t: t.assign(image=[np.zeros((3, 8, 8))] * 8), "picture 'high' is float64.*not uint8"),
    ],
)
def test_bad_tables_are_named(llava, table, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(llava, change(table), cache=None)


def test_other_bad_input_is_named(llava, table, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    with pytest.raises(ValueError, match="picture 'high' cannot be read.*cut.png"):
        evaluate(llava, table.assign(image=tmp_path / "cut.png"), cache=None)
    with pytest.raises(ValueError, match="a name of its own"):
        evaluate(llava, table, [NONE, NONE], cache=None)
    with pytest.raises(ValueError, match="3 images are missing, such as 'high'"):
        evaluate(llava, table, images={}, cache=None)
    with pytest.raises(ValueError, match="keeps"):
        Intervention("odd", keeps="everything")
    with pytest.raises(ValueError, match="no plain values"):
        Intervention("odd", parameters={"tokens": {1, 2}})
    with pytest.raises(ValueError, match="candidates are for 2"):
        evaluate(llava, table, candidates=[("yes",), ("no",)], cache=None)


def test_a_model_that_cannot_share_says_so(table, tmp_path):
    lvlm = architectures.load(tmp_path, "paligemma")
    with warnings.catch_warnings(), pytest.warns(UserWarning, match="share no prefix"):
        warnings.simplefilter("always")
        evaluate(lvlm, table.head(1), max_new_tokens=1, cache=None)
