"""`sinkstudy route`: every method of the table, and the command with its errors."""


import shutil

import architectures
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from sinkstudy import cli, paths, sinks
from sinkstudy.answers import evaluate, study
from sinkstudy.benchmarks import prompts
from sinkstudy.book import engine, parameters
from sinkstudy.effects import ablation, methods, moving, neurons
from sinkstudy.model import loading
from tests.benchmarks.test_data import FILES, write

YES_NO = ("yes", "no")


@pytest.fixture(scope="module")
def benchmark() -> tuple[pd.DataFrame, dict]:
    """POPE's columns: two questions about each of four pictures, in words that the tiny model knows."""
    random = np.random.default_rng(0)
    pictures = {name: random.integers(0, 256, (3, 32, 32), dtype=np.uint8) for name in "abcd"}
    rows = [{"id": f"{name}{i}", "image_id": name, "question": text, "answer": YES_NO[i], "category": "random"}
            for name in pictures for i, text in enumerate(("how many", "what is the texture"))]
    return pd.DataFrame(rows), pictures


def expected(method, lvlm, inputs, own, top):
    """The context of a method, called by hand, on sinks and the highest quarter, or what its control has for them."""
    contexts = {
        "front": lambda: moving.reordered(lvlm, inputs, [own], "front", "travel"),
        "front-renumber": lambda: moving.reordered(lvlm, inputs, [own], "front", "renumber"),
        "front-top-k": lambda: moving.reordered(lvlm, inputs, [top], "front", "travel"),
        "end": lambda: moving.reordered(lvlm, inputs, [own], "end", "travel"),
        "end-renumber": lambda: moving.reordered(lvlm, inputs, [own], "end", "renumber"),
        "sinks-only": lambda: ablation.hidden(lvlm, inputs, [~own]),
        "others-only": lambda: ablation.hidden(lvlm, inputs, [own]),
        "keep-top-k": lambda: ablation.hidden(lvlm, inputs, [~top]),
        "features": lambda: moving.reweighted(lvlm, inputs, [own], 0.5, 1.0),
        "keys": lambda: moving.gated(lvlm, inputs, [own], 0.0, 1.0),
    }
    return contexts[method.removeprefix("random-")]()


def hand_norms(lvlm, picture) -> torch.Tensor:
    inputs = lvlm.inputs([picture], [""])
    states = lvlm.vision(inputs["pixel_values"], output_hidden_states=True).hidden_states
    return states[-2][0, 1:].norm(dim=-1)


def by_hand(lvlm, benchmark, context) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One pass a question, without and with a context: log-probability of the right answer's word, twice, and
    [questions, 2] whether an answer of one word is right; whatever is not no counts as yes in POPE."""
    table, pictures = benchmark
    before, after, right = [], [], []
    for row, text in zip(table.itertuples(), prompts(table, "POPE", "lab"), strict=True):
        inputs = lvlm.inputs([pictures[row.image_id]], [text])
        token = lvlm.processor.tokenizer.convert_tokens_to_ids(row.answer)
        plain = lvlm.model(**inputs).logits[0, -1].log_softmax(-1)
        with context(inputs, row.image_id):
            changed = lvlm.model(**inputs).logits[0, -1].log_softmax(-1)
        before.append(plain[token].item())
        after.append(changed[token].item())
        words = [lvlm.processor.tokenizer.decode([of.argmax().item()]) for of in (plain, changed)]
        right.append([("no" if word == "no" else "yes") == row.answer for word in words])
    return np.array(before), np.array(after), np.array(right)


def logp(rows: pd.DataFrame) -> dict[str, float]:
    return rows[rows.measure == "logp"].set_index("what").value.to_dict()


HOW = {"criterion": "percentile", "threshold": 80.0, "seed": 3, "max_new_tokens": 1, "cache": None}


@pytest.mark.parametrize("method", [m for m in methods.METHODS if m != "var" and "registers" not in m])
@torch.no_grad()
def test_a_method_is_what_its_name_says(llava, benchmark, method):
    """Log-probabilities of the table against one pass a question under the context called by hand."""
    rows = methods.effect(llava, method, methods.option(method), "POPE", *benchmark, **HOW)
    groups = {}
    for i, (name, picture) in enumerate(benchmark[1].items()):
        norms = hand_norms(llava, picture)
        own = norms > norms.quantile(0.8), norms >= norms.sort().values[-4]
        at_random = [sinks.random_like(mask, seed=3 + i) for mask in own]
        groups[name] = at_random if method.startswith("random-") else own
    before, after, right = by_hand(
        llava, benchmark, lambda inputs, name: expected(method, llava, inputs, *groups[name])
    )
    found = {"baseline": before.mean(), "method": after.mean(), "difference": (after - before).mean()}
    assert logp(rows) == pytest.approx(found, abs=1e-4)
    shares = 100 * right.mean(0)
    found_right = rows[rows.measure == "right"].set_index("what").value.to_dict()
    wanted = {"baseline": shares[0], "method": shares[1], "difference": shares[1] - shares[0]}
    assert found_right == pytest.approx(wanted)
    assert np.abs(after - before).max() > 1e-3
    assert set(rows.pictures) == {4} and set(rows.questions) == {8} and set(rows.group) == {"sinks"}
    low, high = rows[(rows.measure == "logp") & (rows.what == "difference")][["low", "high"]].to_numpy()[0]
    assert low < found["difference"] < high


@pytest.mark.parametrize("method", [m for m in methods.METHODS if "registers" in m])
@torch.no_grad()
def test_registers_take_the_neurons_of_the_sinks(llava, benchmark, method):
    pictures = benchmark[1]
    norms = torch.stack([hand_norms(llava, picture) for picture in pictures.values()])
    own = norms > norms.quantile(0.8, dim=1, keepdim=True)
    moved = neurons.strongest(neurons.register_scores(llava, list(pictures.values()), own), 5)
    first = {name: norms[i] == norms[i].max() for i, name in enumerate(pictures)}
    if method.startswith("random-"):
        wide = llava.vision_layers[0].mlp.fc1.out_features
        found, moved = moved, neurons.random_neurons(moved, wide, seed=3)
        assert all(len(moved[layer]) == len(of) and not set(moved[layer].tolist()) & set(of.tolist())
                   for layer, of in found.items())
    rows = methods.effect(llava, method, 5, "POPE", *benchmark, **HOW)

    def context(inputs, name):
        return moving.registered(llava, inputs, [first[name]] if "passed" in method else None, neurons=moved)

    before, after, _ = by_hand(llava, benchmark, context)
    assert logp(rows)["difference"] == pytest.approx((after - before).mean(), abs=1e-4)
    assert np.abs(after - before).max() > 1e-3


@torch.no_grad()
def test_norm_that_a_register_leaves(llava, benchmark):
    pictures = benchmark[1]
    case = methods.Case(llava, {"POPE": pictures}, criterion="percentile", threshold=80.0)
    means = []
    for picture in pictures.values():
        before = hand_norms(llava, picture)
        own = before > before.quantile(0.8)
        with moving.registered(llava, llava.inputs([picture], [""]), neurons=case.neurons(5)):
            after = hand_norms(llava, picture)[:-1]  # the added token stands last
        means.append((after[own].mean().item(), before[own].mean().item()))
    after, before = np.array(means).sum(0)
    found = case.norm_left(5)
    assert found.value == pytest.approx(after / before, rel=1e-4) and found.n == 4 and found.value != pytest.approx(1)


@torch.no_grad()
def test_var_is_about_the_dimension_that_the_first_token_lights(benchmark, tmp_path, monkeypatch, capsys):
    lvlm = architectures.load(tmp_path, "llava")
    first = lvlm.inputs([benchmark[1]["a"]], [""])["input_ids"][0, 0]
    lvlm.model.get_input_embeddings().weight.data[first, 3] = 1000
    case = methods.Case(lvlm, {"POPE": benchmark[1]})
    made = methods.applied(case, "POPE", "var", None)
    assert made.parameters["dimensions"][0] == 3
    assert made.parameters["tau"] == pytest.approx(20 * (32 / 4096) ** 0.5)
    asked = [("var", None), ("keys", 0.5)]
    assert methods.applicable(case, asked) == asked and not capsys.readouterr().out
    monkeypatch.setattr(case, "dimensions", [])
    with pytest.raises(ValueError, match="VAR has nothing to move"):
        methods.applied(case, "POPE", "var", None)
    assert methods.applicable(case, asked) == asked[1:]
    assert capsys.readouterr().out.count("VAR has nothing to move") == 1


@torch.no_grad()
def test_changes_in_several_benchmarks(llava, benchmark):
    """Two benchmarks name different pictures alike. Each question's change is that of one pass by hand."""
    table, pictures = benchmark
    others = dict(zip(pictures, reversed(pictures.values()), strict=True))
    shown = {"POPE": pictures, "MME": others}
    case = methods.Case(llava, shown, criterion="percentile", threshold=80.0, seed=3)
    ways = [("keys", 0.5), ("random-keys", 0.5), ("front-top-k", 2)]
    tables = dict.fromkeys(shown, table.assign(group="a column that MME has"))
    rows = methods.changes(case, tables, ways, public=False, max_new_tokens=1, cache=None)
    assert set(zip(rows.method, rows.way)) == {("keys", "weight 0.5"), ("random-keys", "weight 0.5"),
                                               ("front-top-k", "k 2")}
    for i, name in enumerate(shown):
        norms = {image: hand_norms(llava, picture) for image, picture in shown[name].items()}
        own = {image: of > of.quantile(0.8) for image, of in norms.items()}
        top = {image: of >= of.sort().values[-2] for image, of in norms.items()}
        at_random = {image: sinks.random_like(mask, seed=3 + 4 * i + j) for j, (image, mask) in enumerate(own.items())}
        contexts = {"keys": lambda inputs, image: moving.gated(llava, inputs, [own[image]], 0.5),
                    "random-keys": lambda inputs, image: moving.gated(llava, inputs, [at_random[image]], 0.5),
                    "front-top-k": lambda inputs, image: moving.reordered(llava, inputs, [top[image]])}
        for method, context in contexts.items():
            before, after, _ = by_hand(llava, (table, shown[name]), context)
            of = rows[(rows.benchmark == name) & (rows.method == method) & (rows.measure == "logp")]
            np.testing.assert_allclose(of.set_index("id").value[table.id], after - before, atol=1e-4)
    assert rows.value[rows.measure == "logp"].abs().max() > 1e-3 and set(rows.group) == {"sinks"}


def test_without_sinks_the_tail_stands_for_them(llava, benchmark):
    of = neurons.norms_and_read(llava, benchmark[1], batch_size=3)
    for name, picture in benchmark[1].items():
        torch.testing.assert_close(of[name][0], hand_norms(llava, picture))
        assert of[name][1].all()
    name, own, random = methods.targets(of, "absolute", 1e9)
    assert name == "top 2 %"
    assert all(mask.sum() == 1 and of[key][0][mask] == of[key][0].max() for key, mask in own.items())
    assert all(mask.sum() == 1 and not (mask & own[key]).any() for key, mask in random.items())
    half = sorted(norms.max().item() for norms, _ in of.values())[1:]
    assert methods.targets(of, "absolute", half[1]).name == "sinks"  # one in two pictures
    assert methods.targets(of, "absolute", half[2]).name == "top 2 %"  # one in four


@pytest.mark.parametrize("settings, method, k, message", [
    ({}, "random-keep-top-k", 9, "9 of the 16 patches of picture 'a' are meant: there are not as many others"),
    ({}, "keep-top-k", 16, "k is 16, and picture 'a' has no more than 16 patches"),
    ({}, "front-top-k", 1000, "k is 1000, and picture 'a' has no more than 16 patches"),
    ({"criterion": "absolute", "threshold": 0.0}, "random-front", None, "16 of the 16 patches of picture 'a'"),
    ({"criterion": "mean_sd", "threshold": -1.0}, "random-features", None, "there are not as many others"),
    ({}, "random-test-time-registers", 30, "has fewer other neurons for a control"),
])
def test_a_control_has_as_many_others_or_is_none(llava, benchmark, settings, method, k, message):
    case = methods.Case(llava, {"POPE": benchmark[1]}, **settings)
    with pytest.raises(ValueError, match=message):
        methods.applied(case, "POPE", method, k or methods.METHODS[method].default)
    assert methods.applied(case, "POPE", "keep-top-k", 9).name == "keep-top-k|k 9"


# ------------------------------------------------------------------------------------------------- the command
def call(*arguments: str):
    return CliRunner().invoke(cli.app, ["route", *arguments])


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evaluate, "ANSWERS", tmp_path / "answers")
    return tmp_path


def test_the_command_writes_what_it_prints_and_answers_once(elsewhere, monkeypatch):
    arguments = ("lab-llava-sinks", "--method", "sinks-only", "--benchmark", "MME", "--limit", "1")
    ended = call(*arguments)
    assert ended.exit_code == 0, ended.exception
    rows = pd.read_csv(elsewhere / "results" / "lab-llava-sinks" / "route" / "lab-mme-sinks-only-limit-1.csv")
    right = rows[rows.measure == "right"].set_index("what")
    assert right.value["difference"] == pytest.approx(right.value["method"] - right.value["baseline"], abs=1e-3)
    assert right.high["difference"] < 0 and set(rows.limit) == {1} and set(rows.data) == {"lab"}
    printed = ended.stdout.replace("−", "-")
    assert f"difference {right.value['difference']:+.1f} [{right.low['difference']:+.1f}" in printed
    assert f"{rows.questions[0]} questions about {rows.pictures[0]} pictures" in printed
    table, pictures = study.benchmark("MME", "", False, 1)
    assert rows.questions[0] == len(table) and rows.pictures[0] == len(pictures) < len(table)
    monkeypatch.setattr(evaluate, "_generate", None)  # what is answered is not asked again
    assert call(*arguments).stdout == ended.stdout
    assert call(*arguments, "--seed", "1").exit_code == 0
    assert call(*arguments, "--limit", "24").exception is not None


def test_the_command_on_public_files(elsewhere):
    architectures.write(elsewhere / "tiny", "llava")
    write(elsewhere / "data" / "POPE", FILES["POPE"])
    how = (str(elsewhere / "tiny"), "--method", "keep-top-k", "--k", "2", "--data-dir", str(elsewhere / "data"))
    ended = call(*how)
    assert ended.exit_code == 0, ended.exception
    assert "POPE: 12 of 9000 questions are there" in ended.output
    file = elsewhere / "results" / "tiny" / "route" / "public-pope-keep-top-k-2.csv"
    rows, written = pd.read_csv(file), file.read_bytes()
    assert call(*how, "--dtype", "bfloat16").exit_code == 0  # which stands beside it
    assert file.read_bytes() == written
    assert set(pd.read_csv(file.with_name("public-pope-keep-top-k-2-bfloat16.csv")).dtype) == {"bfloat16"}
    assert set(rows.option_value) == {2} and set(rows.data) == {"public"} and set(rows.measure) == {"right", "logp"}
    shutil.copytree(elsewhere / "data", elsewhere / "same")
    shutil.copytree(elsewhere / "data", elsewhere / "other")
    changed = next((elsewhere / "other").rglob("*.parquet"))
    of = pq.read_table(changed).to_pylist()
    pq.write_table(pa.Table.from_pylist([row | {"question": row["question"] + " Say."} for row in of]), changed)
    assert call(*how[:-1], str(elsewhere / "same")).exit_code == 0 and file.read_bytes() == written
    refused = call(*how[:-1], str(elsewhere / "other"))
    assert "is about other data of POPE: give the run about these a name" in str(refused.exception)
    assert file.read_bytes() == written
    assert call(*how[:-1], str(elsewhere / "other"), "--name", "others").exit_code == 0


LAB = ["lab-llava"]
BAD = {
    "method": (LAB + ["--method", "back"], "unknown method 'back'; known: front, front-renumber"),
    "model": (["lab-lava", "--method", "front"], "unknown model 'lab-lava'"),
    "benchmark": (LAB + ["--method", "front", "--benchmark", "own"], "unknown benchmark 'own'; those of the lab are"),
    "no public data": (["owner/name", "--method", "front"], "the lab's benchmarks are for lab models: --hub or"),
    "no folder": (LAB + ["--method", "front", "--data-dir", "nowhere"], "parameter 'data_dir': there is no"),
    "not in the folder": (LAB + ["--method", "front", "--data-dir", "data"], "no data of POPE: there is no folder"),
    "device": (LAB + ["--method", "front", "--device", "tpu"], "unknown device 'tpu'"),
    "dtype": (LAB + ["--method", "front", "--dtype", "int3"], "parameter 'dtype' is 'float32', 'bfloat16'"),
    "limit": (LAB + ["--method", "front", "--limit", "-1"], "parameter 'limit' is 0 at least"),
    "batch size": (LAB + ["--method", "front", "--batch-size", "0"], "'batch_size' is 1 at least"),
    "revision": (LAB + ["--method", "front", "--revision", "v1"], "lab-llava is a folder and has no revision"),
    "weight": (LAB + ["--method", "front", "--weight", "2"], "the method front takes no weight"),
    "k": (LAB + ["--method", "keep-top-k", "--k", "0"], "k is 1 at least, and 0 is not"),
    "tower": (["lab-qwen2vl", "--method", "test-time-registers"], "lab-qwen2vl: this tower takes no added token"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_before_a_model_is_loaded(elsewhere, monkeypatch, case):
    monkeypatch.setattr(loading, "load", None)
    arguments, message = BAD[case]
    problem = call(*arguments).exception
    assert isinstance(problem, engine.UserError) and message in str(problem) and "\n" not in str(problem)
    assert not (elsewhere / "results").exists()


def test_what_is_not_given_is_as_in_the_chapter():
    of_chapter = parameters.defaults("10-training-free")
    assert methods.DEFAULTS == {key: of_chapter[key] for key in methods.DEFAULTS}


def test_methods_are_listed():
    listed = call("lab-llava").stdout.splitlines()
    assert [line.split(":")[0] for line in listed] == list(methods.METHODS)
