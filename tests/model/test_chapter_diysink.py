"""Chapter 11 on a model of one's own, with methods that were not trained: it counts as a plain evaluation does."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from sinkstudy import benchmarks
from sinkstudy.answers import evaluate, study
from sinkstudy.model import loading
from sinkstudy.trained.connectors import DIYSink, OneConnector
from sinkstudy.trained.gates import Gates, LoRA
from sinkstudy.trained.kinds import load_method
from sinkstudy.trained.routers import ReW
from tests.benchmarks.test_data import FILES, write
from tests.model import architectures, chapters


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_own_model(tmp_path: Path, name: str):
    base, methods = str(tmp_path / "tiny"), tmp_path / "methods" / "tiny"
    architectures.write(tmp_path / "tiny", name)
    rule = dict(criterion="percentile", threshold=90.0)
    for seed in (0, 1):
        OneConnector(loading.load(base), seed=seed).save(methods / f"one-{seed}")
        DIYSink(loading.load(base), **rule, seed=seed).save(methods / f"two-{seed}")
        ReW(loading.load(base), diysink=methods / f"two-{seed}", seed=seed).save(methods / f"rew-{seed}")
        Gates(loading.load(base), **rule, seed=seed).save(methods / f"gates-{seed}")
    LoRA(loading.load(base), parameters=500).save(methods / "adapters-0")
    for folder in methods.iterdir():
        pd.DataFrame({"step": [1], "loss": [1.0]}).to_csv(folder / "training.csv", index=False)
    write(tmp_path / "data" / "POPE", FILES["POPE"])

    given = {"model": base, "controls": [], "data_dir": str(tmp_path / "data"), "sweep": [1.0]}
    given["methods_dir"] = str(tmp_path / "methods")
    folder = chapters.execute("11-diysink", tmp_path, **given, limit=1, max_new_tokens=2)
    said = chapters.printed(tmp_path)
    assert "methods trained on: tiny" in said and "CoT router not run" in said  # its tokenizer has few words
    effects = pd.read_csv(folder / "comparisons.csv")
    assert {"two_minus_one", "soft_router_minus_both", "gates_minus_base", "gates_minus_adapters"} <= set(effects.key)
    assert "two_minus_random" not in set(effects.key) and "true_router_minus_both" not in set(effects.key)
    dose = pd.read_csv(folder / "dose.csv")
    assert (dose.value.abs() < 1e-9).all()  # a weight of one changes nothing

    table, shown = study.benchmark("POPE", str(tmp_path / "data"), False, 1)
    found = pd.read_csv(folder / "accuracy.csv").query("benchmark == 'POPE' and measure == 'right'")
    found = found.set_index("arm").value
    of_seeds = []
    for seed in (0, 1):
        method = load_method(methods / f"two-{seed}")
        asked = table.assign(question=benchmarks.prompts(table, "POPE", study.prompt_family(method.lvlm, True)))
        with torch.no_grad():
            answers = evaluate.evaluate(method.lvlm, asked, [method.intervention("x", show="others")], images=shown,
                                        max_new_tokens=2, cache=None, batch_size=1)
        of_seeds.append(100 * benchmarks.right(answers, "POPE", "official").mean())
    assert found["two others"] == pytest.approx(sum(of_seeds) / 2)
    assert "tiny.two_minus_one.mean.accuracy" in chapters.metrics(folder)
