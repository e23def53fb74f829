"""The lab models: they load, score what their cards say, and have or lack sinks as they should."""

import re
from functools import cache

import pandas as pd
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from sinkstudy import sinks
from sinkstudy.benchmarks.rules import yes_no_strict
from sinkstudy.lab import score, tower, train
from sinkstudy.model import loading
from sinkstudy.model.capture import attention_received, trace
from sinkstudy.model.lvlm import LVLM
from sinkstudy.paths import MODELS
from sinkstudy.world import benchmarks
from sinkstudy.world.drawing import render

LLAVAS = ("lab-llava", "lab-llava-sinks", "lab-llava-registers")
NAMES = (*LLAVAS, "lab-qwen2vl")
BARS = {("POPE", "random"): 90.0, ("MME", "perception"): 85.0, ("MMStar", "mean"): 70.0}
SCENES = 64


def there(name: str) -> str:
    if not (MODELS / name / "scores.csv").exists():
        pytest.skip(f"{name} has no scores yet: `sinkstudy lab train {name}` makes them")
    return name


@cache
def loaded(name: str) -> LVLM:
    return loading.load(there(name))


@cache
def scores(name: str) -> pd.DataFrame:
    return pd.read_csv(MODELS / there(name) / "scores.csv").set_index(["benchmark", "part", "arm"])


@cache
def scenes():
    return render("test", 0, SCENES)


@cache
def traced(name: str):
    return trace(loaded(name), list(scenes().images), ["how many parts are there ?"] * SCENES)


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return there(request.param)


# -------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize("part", BARS, ids=" ".join)
def test_the_bars(name, part):
    row = scores(name).loc[(*part, "model")]
    assert row.accuracy >= BARS[part], f"{row.accuracy:.1f} % [{row.low:.1f}, {row.high:.1f}]"


@pytest.mark.parametrize("part", BARS, ids=" ".join)
def test_far_above_models_that_see_nothing(name, part):
    seeing = scores(name).loc[(*part, "model")]
    for arm in ("blind", "prior"):
        other = scores(name).loc[(*part, arm)]
        assert other.high < seeing.low and other.accuracy < seeing.accuracy - 15, f"{arm}: {other.accuracy:.1f} %"


def test_scores_are_whole(name):
    table = scores(name)
    assert table.index.is_unique and set(table.index.get_level_values("arm")) == {"model", "blind", "prior"}
    assert ((table.low <= table.accuracy) & (table.accuracy <= table.high)).all()
    assert table.accuracy.between(0, 100).all() and (table.images > 0).all()
    for part, questions in ((("POPE", "random"), 600), (("MME", "perception"), 540), (("MMStar", "mean"), 240)):
        assert table.loc[(*part, "model")].questions == questions


@pytest.mark.parametrize("benchmark, part", [("POPE", "random"), ("MME", "perception"), ("MMStar", "mean")])
def test_a_part_scored_again_is_what_the_card_says(name, benchmark, part):
    """The first images of each benchmark, answered anew."""
    table = {"POPE": lambda: benchmarks.pope(30, split="test"), "MME": lambda: benchmarks.mme(6),
             "MMStar": lambda: benchmarks.mmstar(16)}[benchmark]()
    chosen = {"POPE": "category", "MME": "group"}.get(benchmark)
    table = (table if chosen is None else table[table[chosen] == part]).reset_index(drop=True)
    images, place = benchmarks.render_pictures(table)
    right = score.correct(table, benchmark, score.greedy_answers(loaded(name), images[place], table.question.tolist()))
    row = scores(name).loc[(benchmark, part, "model")]
    share = row.accuracy / 100
    slack = 100 * 3 * (max(share * (1 - share), 0.02) / len(table)) ** 0.5  # fewer images than the card's interval
    accuracy = 100 * right.mean()
    assert row.low - slack <= accuracy <= row.high + slack, (
        f"{name} lab-{benchmark} {part}: {accuracy:.1f} % of {len(table)}, card {row.low:.1f}-{row.high:.1f}")


def test_answers_are_answers(name):
    """Yes/no questions get yes or no, four options get a letter, open questions one of the known words."""
    lvlm = loaded(name)
    images = scenes().images[:12]
    assert {yes_no_strict(a) for a in score.greedy_answers(lvlm, images, ["is there a ball ?"] * 12)} <= {"yes", "no"}
    colours = score.greedy_answers(lvlm, images, ["what is the light ?"] * 12)
    assert set(colours) <= {"bright", "dim", "warm", "cold"}
    assert len(set(colours)) > 1  # not the same answer whatever the picture


def test_the_batch_does_not_change_an_answer(name):
    """Left padding, several images at a time."""
    questions = ["is there a ball ?", "how many things and parts are there together ?", "what is the light ?"] * 4
    images = scenes().images[:12]
    lvlm = loaded(name)
    assert score.greedy_answers(lvlm, images, questions) == score.greedy_answers(lvlm, images, questions, batch_size=1)


# ------------------------------------------------------------------------------------ files and cards
def test_the_tokenizer_of_lab_qwen2vl_adds_words_at_the_end():
    """The same ids for the same words, so that answers and prompts can be compared token by token."""
    qwen, llava = (loading.load(there(name)).processor.tokenizer.get_vocab() for name in ("lab-qwen2vl", "lab-llava"))
    assert llava.items() < qwen.items() and len(qwen) == len(llava) + 4


def test_lab_llava_loads_without_this_package():
    folder = MODELS / there("lab-llava")
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder)
    assert not any(info.values()), info
    # in the order that transformers documents, with the processor's defaults
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is the light ?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    picture = scenes().images[0]
    inputs = processor(images=[picture], text=[prompt], add_special_tokens=False, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    said = processor.decode(out[0, inputs.input_ids.shape[1]:], skip_special_tokens=True).strip()
    assert said == score.greedy_answers(loaded("lab-llava"), picture[None], ["what is the light ?"])[0]


def test_the_folder_is_whole(name):
    files = {p.name for p in (MODELS / name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json",
            "chat_template.jinja", "generation_config.json", "README.md", "training.csv", "scores.csv"} <= files
    assert not [f for f in files if f.endswith((".bin", ".pt")) or f.startswith(".partial")]
    # nothing of the machine that made it
    for file in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"):
        assert not re.search(r'"/(?!\S*\s)|/home/|/tmp/', (MODELS / name / file).read_text())


def test_all_weights_together_are_small():
    size = sum(p.stat().st_size for p in MODELS.glob("*/*.safetensors"))
    assert size <= 45e6, f"{size / 1e6:.1f} MB"


def test_weights_are_finite_bfloat16(name):
    from safetensors import safe_open

    with safe_open(MODELS / name / "model.safetensors", "pt") as weights:
        for key in weights.keys():
            tensor = weights.get_tensor(key)
            assert tensor.dtype == torch.bfloat16 and torch.isfinite(tensor).all(), key


def test_the_card_states_the_scores(name):
    text = (MODELS / name / "README.md").read_text(encoding="utf-8")
    for heading in ("## Data", "## Recipe", "## Scores", "## Limits"):
        assert heading in text
    for benchmark, part in BARS:
        row = scores(name).loc[(benchmark, part, "model")]
        blind = scores(name).loc[(benchmark, part, "blind")]
        found = re.search(rf"\| lab-{benchmark} {part} \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \| ([\d.]+) \|", text)
        stated = [float(v) for v in found.groups()]
        assert stated == pytest.approx([row.accuracy, row.low, row.high, blind.accuracy], abs=0.06)
    if name == "lab-llava-sinks":
        assert "planted, not natural" in " ".join(text.split())


def test_the_loss_curve_covers_all_stages(name):
    curve = pd.read_csv(MODELS / name / "training.csv")
    text = "text-qwen2" if name == "lab-qwen2vl" else "text"
    wanted = {f"{name}.tower": train.TOWER, text: train.TEXT, f"{name}.align": train.ALIGN,
              f"{name}.instruct": train.INSTRUCT}
    assert list(curve.stage.unique()) == list(wanted)
    for stage, settings in wanted.items():
        rows = curve[curve.stage == stage]
        assert rows.step.iloc[0] == 0 and rows.step.iloc[-1] == settings["steps"] - 1
        assert rows.step.is_monotonic_increasing and rows.loss.notna().all()
        assert rows.loss.tail(3).mean() < rows.loss.head(3).mean()


def test_the_three_differ_only_in_their_towers():
    configs = {name: loading.load(there(name)).model.config for name in LLAVAS}
    plain = configs["lab-llava"]
    for name, config in configs.items():
        assert config.text_config.to_dict() == plain.text_config.to_dict()
        ours, theirs = (c.vision_config.to_dict() for c in (config, plain))
        differing = {k for k in ours | theirs if ours.get(k) != theirs.get(k)}
        allowed = {"model_type", "num_register_tokens", "architectures", "_name_or_path"}
        assert differing <= (allowed if name == "lab-llava-registers" else set()), name
        tokenizers = [(MODELS / n / "tokenizer.json").read_bytes() for n in (name, "lab-llava")]
        assert tokenizers[0] == tokenizers[1]


# ------------------------------------------------------------------------------------------- controls
def connector_input(name: str) -> torch.Tensor:
    """Norms of the patches at the connector's input, [images, patches]."""
    return traced(name).vision_norms[:, loaded(name).feature_layer]


CRITERIA = {"mean + 3 sd": sinks.mean_sd, "norm drop": sinks.norm_drop, "3 medians": sinks.above_median}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_positive_control_s_sinks_are_its_calm_patches(criterion):
    norms, calm = connector_input("lab-llava-sinks"), scenes().calm.flatten(1)
    agreement = sinks.jaccard(CRITERIA[criterion](norms), calm).mean().item()
    assert agreement >= 0.95, f"{criterion}: mean Jaccard index {agreement:.3f} over {SCENES} test scenes"


def test_the_positive_control_s_sinks_have_three_times_the_median_norm():
    norms, calm = connector_input("lab-llava-sinks"), scenes().calm.flatten(1)
    ratios = norms / norms.median(1, keepdim=True).values
    assert ratios[calm].median() >= 3 and ratios[calm].mean() >= 3
    per_image = torch.stack([r[c].mean() for r, c in zip(ratios, calm, strict=True)])
    assert (per_image >= 3).float().mean() >= 0.95, per_image.min()


def test_the_positive_control_s_sinks_are_attended():
    """By the other patches: at least five times what uniform attention gives, in a layer after the onset."""
    lvlm = loaded("lab-llava-sinks")
    pixels = lvlm.inputs(list(scenes().images[:16]), ["yes"] * 16).pixel_values
    with torch.no_grad(), attention_received(lvlm, "vision", queries=slice(lvlm.n_prefix, None)) as received:
        lvlm.vision(pixels)
    calm = scenes().calm[:16].flatten(1)
    uniform = 1 / (lvlm.n_prefix + calm.shape[1])
    times = {layer + 1: float(alpha[0].mean(1)[:, lvlm.n_prefix:][calm].mean()) / uniform
             for layer, alpha in received.items()}
    assert max(v for layer, v in times.items() if layer > tower.ONSET) >= 5, times


def test_the_positive_control_s_sinks_begin_in_the_middle():
    """No sinks before the onset: norms of calm patches stand out from layer ONSET on, not from the start."""
    norms, calm = traced("lab-llava-sinks").vision_norms, scenes().calm.flatten(1)
    ratio = torch.stack([(norms[:, i] / norms[:, i].median(1, keepdim=True).values)[calm].mean()
                         for i in range(norms.shape[1])])
    assert (ratio[tower.ONSET - 1:tower.LAYERS - 1] > 2).all(), ratio
    assert ratio[0] < 2, ratio


def test_the_register_control_has_no_sinks():
    norms = connector_input("lab-llava-registers")
    found = {label: rule(norms).any(1).float().mean().item() for label, rule in CRITERIA.items()}
    assert found["3 medians"] <= 0.02, found
    assert found["norm drop"] <= 0.05, found


def test_the_register_control_s_calm_patches_are_ordinary():
    norms, calm = connector_input("lab-llava-registers"), scenes().calm.flatten(1)
    ratios = norms / norms.median(1, keepdim=True).values
    assert ratios[calm].mean() < 1.5 and sinks.jaccard(sinks.mean_sd(norms), calm).mean() < 0.3
