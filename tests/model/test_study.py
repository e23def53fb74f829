"""What chapters begin with: pictures of a folder or of the lab, questions, and controls that fit."""

import re
import shutil

import architectures
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sinkstudy import benchmarks, stats
from sinkstudy.answers import study
from sinkstudy.answers.evaluate import NONE, evaluate
from sinkstudy.effects import ablation, methods
from sinkstudy.model import loading
from sinkstudy.world import drawing
from sinkstudy.world import questions as lab


def test_lab_pictures_come_with_their_facts():
    shown, scenes = study.pictures("", 3)
    assert torch.equal(torch.stack(shown), drawing.render("test", 0, 3).images) and len(scenes) == 3


def test_pictures_of_a_folder(tmp_path):
    for name, value in (("b.png", 10), ("a.jpg", 200), ("c.PNG", 30)):
        Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    shown, scenes = study.pictures(str(tmp_path), 2)
    assert scenes is None and [p.open().getpixel((0, 0))[0] // 10 for p in shown] == [20, 1]


@pytest.mark.parametrize("make, message", [
    (lambda folder: None, "there is no folder"),
    (lambda folder: folder.mkdir(), "holds no picture"),
    (lambda folder: (folder.mkdir(), (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")), "torn.png cannot"),
])
def test_pictures_that_are_not_there(tmp_path, make, message):
    make(tmp_path / "pictures")
    with pytest.raises(ValueError, match=message):
        study.pictures(str(tmp_path / "pictures"), 2)


def test_questions_are_answered_by_the_scene_and_of_every_type():
    scenes = drawing.render("test", 0, 24)
    table = study.questions(scenes, 24, "", seed=5)
    assert table.id.is_unique and table.type.tolist() == ["global", "local", "mixed"] * 24
    assert (table.family.map(lab.TYPES) == table.type).all()
    facts = lab.facts(scenes)
    lights = table[(table.family == "light") & ~table.answer.isin(["yes", "no"])]
    assert len(lights) and all(facts[i].light == a for i, a in zip(lights.image, lights.answer, strict=True))
    assert table.equals(study.questions(scenes, 24, "", seed=5))
    assert not table.question.equals(study.questions(scenes, 24, "", seed=6).question)


def test_other_pictures_are_all_asked_the_prompt():
    table = study.questions(None, 2, "What is this?", seed=0)
    assert table.question.tolist() == ["What is this?"] * 2 and table.answer.isna().all()
    assert table.image_id.tolist() == ["0", "1"]


def test_controls_of_the_same_grid_stand_beside_the_model(capsys):
    shown, _ = study.pictures("", 1)
    lvlms, left_out = study.load("lab-llava", ["lab-llava-sinks", "no-such-model", "lab-llava"], shown[0])
    assert list(lvlms) == ["lab-llava", "lab-llava-sinks"] and left_out == ["no-such-model"]
    assert "no-such-model is left out of the controls: " in capsys.readouterr().err
    assert study.patch_grid(lvlms["lab-llava"], shown[0]) == (1, 12, 12)


def test_a_control_that_takes_no_such_picture_is_left_out(tmp_path, capsys):
    """Lab models take 96 x 96 pixels only; another model resizes. One that is damaged is said to be so."""
    architectures.write(tmp_path / "tiny", "llava")
    picture = Image.new("RGB", (200, 90))
    lvlms, left_out = study.load(str(tmp_path / "tiny"), ["lab-llava"], picture)
    assert list(lvlms) == ["tiny"] and left_out == ["lab-llava"]
    assert study.patch_grid(lvlms["tiny"], picture) == (1, 4, 4)
    shutil.copytree(tmp_path / "tiny", tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes((tmp_path / "tiny/model.safetensors").read_bytes()[:-1])
    assert study.load(str(tmp_path / "tiny"), [str(tmp_path / "cut")], picture)[1] == [str(tmp_path / "cut")]
    assert re.search(r"cut is left out of the controls: .*cut cannot be read: .*metadata", capsys.readouterr().err)


def test_a_revision_is_the_models_and_not_the_controls(monkeypatch):
    asked = {}

    def load(name, revision=None, **how):
        asked[name] = revision
        raise ValueError if name == "lab-llava-sinks" else LookupError

    monkeypatch.setattr(loading, "load", load)
    with pytest.raises(LookupError):
        study.load("owner/name", [], None, revision="v1")
    assert asked == {"owner/name": "v1"}


def test_mean_of_benchmarks():
    """By hand: the mean of the benchmarks' means; a row without a value counts nowhere."""
    rows = pd.DataFrame({
        "benchmark": ["POPE"] * 4 + ["MME"] * 2, "picture": list("aabbcd"),
        "right": [100.0, 0.0, 100.0, 100.0, 0.0, np.nan]})
    found = study.mean_of_benchmarks(rows, "right")
    assert found.value == pytest.approx((75 + 0) / 2) and found.n == 3
    assert found.low < found.value < found.high
    one = study.mean_of_benchmarks(rows[rows.benchmark == "POPE"], "right", seed=3)
    own = stats.mean_interval([50.0, 100.0], method="percentile", seed=3)
    assert one.value == own.value and (one.low, one.high) == (own.low, own.high)
    assert np.isnan(study.mean_of_benchmarks(rows.iloc[5:], "right").value)


def test_means_of_each_benchmark_and_of_all():
    rows = pd.DataFrame({"benchmark": ["POPE"] * 4 + ["MME"] * 2, "picture": list("aabbcd"), "way": list("xyxyxx"),
                         "right": [100.0, 0, 100, 100, 0, 50], "logp": [-1.0, -2, -3, -4, np.nan, -6]})
    found = study.means(study.long(rows), ["way"]).set_index(["way", "benchmark", "measure"])
    values = {("x", "POPE", "right"): 100, ("x", "MME", "right"): 25, ("x", "mean", "right"): 62.5,
              ("x", "POPE", "logp"): -2, ("x", "MME", "logp"): -6, ("x", "mean", "logp"): -4,
              ("y", "POPE", "right"): 50, ("y", "mean", "right"): 50,
              ("y", "POPE", "logp"): -3, ("y", "mean", "logp"): -3}
    assert found.value.to_dict() == values
    assert found.n["x", "mean", "right"] == 4 and found.n["x", "mean", "logp"] == 3
    own = study.mean_of_benchmarks(rows[rows.way == "x"], "right")
    assert tuple(found.loc[("x", "mean", "right"), ["low", "high"]]) == (own.low, own.high)


def test_columns_of_the_papers_tables():
    """By hand: the mean of four accuracies; acc + acc+ of two of MME's tasks, which sum to 150 + 50."""
    four = pd.DataFrame({"benchmark": ["GQA", "GQA", "ScienceQA-IMG", "TextVQA", "MMMU"], "id": list("abcde"),
                         "category": "all", "picture": list("uvwxy"), "right": [100.0, 0, 100, 30, 0]})
    mme = pd.DataFrame({"benchmark": "MME", "id": list("fghijk"), "category": ["count"] * 4 + ["scene"] * 2,
                        "picture": list("nnmmnn"), "right": [100.0, 100, 100, 0, 100, 0]})
    found = study.reported(pd.concat([four, mme]).assign(way="x"), ["way"])
    assert set(found.column) == {"LLaVA-eval average", "MME all"}
    assert not found.duplicated(["column", "benchmark", "id"]).any()
    score = {column: study.scaled(study.mean_of_benchmarks(of, "right"), of.scale.iloc[0]).value
             for column, of in found.groupby("column")}
    assert score == pytest.approx({"LLaVA-eval average": (50 + 100 + 30 + 0) / 4, "MME all": 75 + 50 + 50 + 0})
    assert study.reported(four[four.id != "e"].assign(way="x"), ["way"]).empty


def test_what_a_method_changes_in_these_columns():
    """A third of MathVista's answers turn right, and none of them with random tokens."""
    of = {"none": [0.0, 0, 100], "front": [100.0, 0, 100], "random-front": [0.0, 0, 100]}
    said = pd.concat([pd.DataFrame({"benchmark": "MathVista", "id": list("abc"), "picture": list("abc"),
                                    "category": "x", "method": way, "right": right}) for way, right in of.items()])
    for against, change in (("none", 100 / 3), ("random-front", 100 / 3)):
        (row,) = methods.reported_changes(said.assign(model="m"), ["model"], "front", against).itertuples()
        assert (row.column, row.n) == ("MathVista", 3) and row.low < row.value < row.high
        assert (row.before, row.score, row.value) == pytest.approx((100 / 3, 200 / 3, change))
    assert methods.reported_changes(said[:0].assign(model="m"), ["model"], "front", "none").empty


def test_mean_of_several_trainings_counts_benchmarks_alike():
    """Each seed's mean is that of the benchmarks' means; a row that one seed lacks counts for none."""
    rows = pd.DataFrame({"benchmark": ["POPE"] * 3 + ["MME"] * 3, "picture": list("abcdef")})
    rows = rows.assign(**{"0": [0.0, 100.0, 100.0, 0.0, 0.0, 100.0], "1": [0.0, 100.0, 0.0, 0.0, np.nan, 100.0]})
    found, df = study.mean_of_seeds(rows, ["0", "1"], "right")
    first, second = (200 / 3 + 50) / 2, (100 / 3 + 50) / 2  # without picture e
    assert found.value == pytest.approx((first + second) / 2) and found.n == 5 and 1 < df < 2
    assert found.low < second < first < found.high
    same, _ = study.mean_of_seeds(rows.assign(**{"0": 7.0, "1": 7.0}), ["0", "1"], "right")
    assert same.high == pytest.approx(7 + 100 * (1 - 0.05 ** (1 / 6)))  # the rule of three, over both benchmarks
    assert np.isnan(study.mean_of_seeds(rows, ["0"], "right")[0].low)
    assert np.isnan(study.mean_of_seeds(rows.assign(**{"0": np.nan}), ["0", "1"], "right")[0].value)


@pytest.mark.parametrize("differ", range(study.FEW + 1))
def test_few_pictures_that_differ_make_no_surer_than_none(differ):
    rows = pd.DataFrame({"benchmark": ["POPE"] * 40 + ["MME"] * 40, "picture": [str(i) for i in range(80)]})
    rows = rows.assign(right=np.where(np.arange(80) < differ, -100.0, 0.0))
    half = 100 * (1 - 0.05 ** (1 / 80))  # the rule of three, over both benchmarks
    alone = stats.mean_interval(rows.right, clusters=rows.picture, strata=rows.benchmark, method="percentile")
    of_seeds, _ = study.mean_of_seeds(rows.assign(**{"0": rows.right, "1": rows.right}), ["0", "1"], "right")
    found = study.mean_of_benchmarks(rows, "right")
    if differ == study.FEW:
        assert (found.low, found.high) == (alone.low, alone.high)
    else:
        assert all(of.low <= of.value - half and of.high >= of.value + half for of in (found, of_seeds))
        assert found.low <= alone.low


@pytest.fixture
def numbers(monkeypatch) -> list[int]:
    """How many questions each call of `evaluate` gets from `study`."""
    found = []

    def counting(lvlm, table, *more, **how):
        found.append(len(table))
        return evaluate(lvlm, table, *more, **how)

    monkeypatch.setattr(study, "evaluate", counting)
    return found


def test_what_is_asked_twice_is_answered_once(numbers):
    """POPE asks about what is there in each of its three parts. Every row gets its answer, under each intervention."""
    lvlm = loading.load("lab-llava-sinks")
    table, shown = study.benchmark("POPE", "", False, 2)
    sinks_off = ablation.hide("off", {i: torch.arange(144) < 100 for i in shown})
    said = study.answers(lvlm, "POPE", table, shown, [NONE, sinks_off], public=False, cache=None)
    assert numbers == [len(table[["image_id", "question"]].drop_duplicates())] and numbers[0] < len(table)
    asked = table.assign(question=benchmarks.prompts(table, "POPE", "lab"))
    direct = evaluate(lvlm, asked, [NONE, sinks_off], images=shown, cache=None)
    assert said.intervention.equals(direct.intervention) and said.id.equals(direct.id)
    assert said.prediction.equals(direct.prediction)
    columns = ["logp_yes", "logp_no"]
    np.testing.assert_allclose(said[columns], direct[columns], atol=1e-4)
    assert said["first"].equals(direct["first"])


def test_blind_one_picture_is_shown_and_each_question_answered_once(numbers):
    lvlm = loading.load("lab-llava-sinks")
    table, shown = study.benchmark("MME", "", False, 24)
    unseen = study.mean_picture(shown.values())
    said = study.answers(lvlm, "MME", table, shown, [NONE], public=False, blind=unseen, cache=None)
    assert numbers == [table.question.nunique()] and numbers[0] < len(table)
    asked = table.assign(question=benchmarks.prompts(table, "MME", "lab"))
    direct = evaluate(lvlm, asked, [NONE], images=dict.fromkeys(shown, unseen), cache=None)
    assert said.prediction.equals(direct.prediction) and said.image_id.equals(table.image_id)
    assert said.right.tolist() == (100.0 * (direct.prediction == table.answer)).tolist()


def test_the_mean_picture():
    """Of the lab's pictures by channel; of files at one size, whatever theirs is."""
    dark, light = torch.full((3, 4, 4), 10, dtype=torch.uint8), torch.full((3, 4, 4), 21, dtype=torch.uint8)
    assert (study.mean_picture([dark, light]) == 16).all()  # 15.5, rounded to even
    files = [Image.new("RGB", (8, 30), (0, 100, 7)), Image.new("RGB", (50, 9), (100, 0, 7))]
    mean = np.asarray(study.mean_picture(files))
    assert mean.shape == (336, 336, 3) and (mean == [50, 50, 7]).all()


def test_answers_are_judged_and_their_logp_is_the_true_ones():
    """Against `evaluate` and the benchmark's rule, called directly."""
    lvlm = loading.load("lab-llava-sinks")
    table, shown = study.benchmark("MMStar", "", False, 2)
    said = study.answers(lvlm, "MMStar", table, shown, [NONE], public=False, cache=None)
    asked = table.assign(question=benchmarks.prompts(table, "MMStar", "lab"))
    direct = evaluate(lvlm, asked, [NONE], images=shown, cache=None)
    assert said.prediction.equals(direct.prediction)
    assert said.right.tolist() == (100.0 * (direct.prediction.str.strip().str[:1] == table.answer)).tolist()
    assert said["logp"].tolist() == [direct[f"logp_{a}"][i] for i, a in enumerate(table.answer)]
    assert said.picture.tolist() == [f"MMStar {i}" for i in table.image_id]
