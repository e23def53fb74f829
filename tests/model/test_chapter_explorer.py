"""Chapter 13: the numbers it hands to the explorer against other ways to them, and other models and pictures."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sinkstudy.answers import evaluate, study
from sinkstudy.model import capture, loading
from sinkstudy.paths import RESULTS
from tests.model import noise
from tests.model.chapters import printed
from tests.model.test_chapter_benchmarks import run

PICTURE, QUESTION = 2, 1


def data(folder: Path) -> dict:
    text = (folder / "explorer.js").read_text()
    return json.loads(text.removeprefix("window.sinkstudyExplorer = ").rstrip(";\n"))


def unpacked(packed: dict) -> torch.Tensor:
    codes = np.frombuffer(base64.b64decode(packed["codes"]), "<u2").astype(float)
    return torch.tensor(np.where(codes == 65535, np.nan, packed["low"] + packed["step"] * codes))


@pytest.fixture(scope="module")
def shown() -> dict:
    return data(RESULTS / "lab-llava" / "13-explorer")


@pytest.fixture(scope="module", params=[0, 1])
def one(request, shown):
    """A model of the run: what the explorer has of one picture, the model itself, the picture and its questions."""
    of = shown["models"][request.param]
    pictures, _ = study.pictures("", len(shown["pictures"]))
    questions = shown["pictures"][PICTURE]["questions"]
    return of["pictures"][PICTURE], loading.load(of["name"]), pictures, [q["text"] for q in questions], questions


def test_maps_are_those_of_a_trace(one):
    kept, lvlm, pictures, texts, _ = one
    trace = capture.trace(lvlm, [pictures[PICTURE]] * len(texts), texts)
    expected = {
        "tower_norm": trace.vision_norms[0],
        "tower_attention": 100 * trace.vision_received[0].mean(1),
        "decoder_norm": torch.cat([trace.projected_norms[:1], trace.decoder_norms[0]]),
        "decoder_attention": 100 * trace.last_attention.mean(2),
    }
    for name, values in expected.items():
        found, half = unpacked(kept[name]), kept[name]["step"] / 2
        assert torch.allclose(found, values.flatten().double(), rtol=1e-4, atol=1.01 * half), name

    norms = trace.vision_norms[0, lvlm.feature_layer]
    byte = np.frombuffer(base64.b64decode(kept["rules"]), np.uint8)
    norms = norms.numpy()
    for bit, mask in ((0, norms >= 3 * np.median(norms)), (2, norms > np.percentile(norms, 98)), (4, norms >= 100)):
        assert (byte >> bit & 1 == mask).all()


def replaced(lvlm, mask, factor=None, mean=None):
    """An intervention on the visual tokens of `mask` [patches]: multiplied, or replaced by a mean token [width]."""

    def around(lvlm, inputs):
        index = lvlm.layout(inputs)[0].output[mask]

        def after(output, layer):
            output = output.clone()
            output[index] = output[index] * factor if mean is None else mean
            return output

        return lvlm.editing(after=after)

    return evaluate.Intervention(f"{factor}", around)


def log_p(one, interventions):
    """Log-probability of the true answer's first token under each intervention, by the study's evaluation."""
    _, lvlm, pictures, texts, questions = one
    table = pd.DataFrame({"id": [0], "image_id": ["0"], "question": texts[QUESTION], "image": [pictures[PICTURE]]})
    answer = questions[QUESTION]["answer"]
    scored = evaluate.evaluate(lvlm, table, interventions, candidates=[answer], max_new_tokens=1, cache=None)
    return scored[f"logp_{answer}"].to_numpy()


def test_attribution_is_the_slope_along_the_token(one):
    kept, lvlm, *_ = one
    values = unpacked(kept["attribution"]).view(3, -1)[QUESTION]
    for patch in (int(values.argmax()), int(values.argmin())):
        mask = torch.arange(len(values)) == patch
        up, down = log_p(one, [replaced(lvlm, mask, 1.01), replaced(lvlm, mask, 0.99)])
        assert (up - down) / 0.02 == pytest.approx(values[patch].item(), rel=0.05, abs=1e-4)


def test_answers_without_a_group(one, shown):
    kept, lvlm, pictures, _, _ = one
    with torch.no_grad():
        inputs = lvlm.inputs(pictures, [""] * len(pictures))
        tokens = torch.cat(list(lvlm.model.get_image_features(inputs["pixel_values"]).pooler_output))
    for group in ("calm", "things"):
        mask = torch.tensor(list(base64.b64decode(shown["pictures"][PICTURE]["groups"][group])), dtype=torch.bool)
        answers = kept["answers"][QUESTION]
        (logp,) = log_p(one, [replaced(lvlm, mask, mean=tokens.mean(0))])
        assert answers["without"][group]["p"] == pytest.approx(np.exp(logp), abs=2e-4)
        assert answers["without"][group]["tokens"] == int(mask.sum())
    assert answers["p"] == pytest.approx(np.exp(log_p(one, [evaluate.NONE])[0]), abs=2e-4)


def test_way_of_one_picture(shown):
    table = pd.read_csv(RESULTS / "lab-llava" / "13-explorer" / "one_picture.csv").set_index(["model", "type"])
    assert list(table.index.get_level_values("model").unique()) == ["lab-llava", "lab-llava-gist"]
    pictures, scenes = study.pictures("", len(shown["pictures"]))
    for of in shown["models"][:2]:
        lvlm, own = loading.load(of["name"]), table.loc[of["name"]]
        trace = capture.trace(lvlm, pictures[:1], [""])
        norms = trace.vision_norms[0, lvlm.feature_layer]
        top, columns = int(norms.argmax()), 12
        assert (own.row * columns + own.column == top).all()
        assert own.norm.iloc[0] == pytest.approx(float(norms[top] / np.median(norms)), rel=1e-5)
        # who attends to it: the mean over queries of one column of the map is what the trace kept of that layer
        received = 100 * trace.vision_received[0].mean(1)[lvlm.feature_layer, top]
        assert own.attending.iloc[0] == pytest.approx(float(received), rel=0.05)
        group = "sinks" if of["name"] == "lab-llava-gist" else "top 2 %"
        assert (own.group == group).all()
        for q, question in enumerate(shown["pictures"][0]["questions"]):
            answers = of["pictures"][0]["answers"][q]
            row = own.loc[question["type"]]
            assert row.before == pytest.approx(answers["p"], abs=1e-4)
            assert row.without == pytest.approx(answers["without"][group.replace(" 2 %", "_2_percent")]["p"], abs=1e-4)


def test_what_lies_there(shown):
    _, scenes = study.pictures("", len(shown["pictures"]))
    for i, picture in enumerate(shown["pictures"]):
        share = scenes.thing_share[i].flatten()
        for patch, text in enumerate(picture["contents"]):
            assert text.startswith("calm") == scenes.calm[i].flatten()[patch].item()
            percent = re.search(r"(\d+)% of the patch", text)
            assert (int(percent[1]) if percent else 0) == pytest.approx(100 * share[patch].item(), abs=0.51)
        pixels = Image.open(io.BytesIO(base64.b64decode(picture["png"]))).convert("RGB")
        error = np.abs(np.asarray(pixels, int) - scenes.images[i].permute(1, 2, 0).numpy().astype(int))
        assert error.mean() < 5  # of 255: the palette


def test_pictures_of_a_folder_and_merged_patches(tmp_path):
    pictures = noise.write(tmp_path / "pictures", [(64, 48), (32, 64)])
    folder = run(tmp_path, "qwen2_vl", "13-explorer", images_dir=str(pictures), prompt="how many")
    assert "no facts are known of these patches" in printed(tmp_path)
    found = data(folder)
    assert {"tiny-qwen2_vl", "lab-llava"} & {model["name"].rpartition("/")[2] for model in found["models"]} == {
        "tiny-qwen2_vl"
    }
    for of, picture in [
        pair for model in found["models"] for pair in zip(model["pictures"], found["pictures"], strict=True)
    ]:
        rows, columns = picture["grid"]
        inner = unpacked(of["decoder_norm"]).view(-1, rows // 2, 2, columns // 2, 2)
        assert (inner == inner[:, :, :1, :, :1]).all()  # the patches of a visual token share its numbers
        assert len(unpacked(of["tower_norm"]).view(-1, rows * columns).unique(dim=1).T) > rows * columns // 4
        assert picture["contents"] is None and set(of["answers"][0]["without"]) <= {"sinks", "top_2_percent"}
    assert len({tuple(picture["grid"]) for picture in found["pictures"]}) == 2
