"""Gates and LoRA on tiny random models: an eager computation, identities, training as in generation, planted truth."""

import copy
import importlib
import math
from contextlib import nullcontext

import architectures
import noise
import numpy as np
import pandas as pd
import passes
import pytest
import torch
import transformers

from sinkstudy import sinks
from sinkstudy.answers.evaluate import evaluate
from sinkstudy.effects import moving
from sinkstudy.model import loading
from sinkstudy.model.lvlm import LVLM
from sinkstudy.trained.gates import Gates, LoRA, n_parameters, prompt_ends, ranks
from sinkstudy.trained.loop import Settings, fit

close = dict(atol=2e-5, rtol=1e-4)
SIZES = [(48, 32), (32, 64), (64, 64)]  # (width, height)
QUESTIONS = ["how many", "what is the texture", "what is the texture red blue yes no"]
RULE = dict(criterion="percentile", threshold=80.0)  # sinks in every picture
DECODE = dict(
    max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True,
    return_dict_in_generate=True,
)


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def two(request, tmp_path_factory) -> LVLM:
    return architectures.load(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def llava(tmp_path) -> LVLM:
    """One that a test may change."""
    return architectures.load(tmp_path / "llava", "llava")


def pictures():
    return noise.pictures(SIZES)


def shaken(lvlm, **how) -> Gates:
    """Gates that are far from their beginning, and from each other."""
    gates = Gates(lvlm, **RULE, **how)
    torch.manual_seed(1)
    for gate in gates.gates.values():
        for parameter in gate.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        gate[1].weight.data *= 0.3  # a gate that is always open would hide what it reads
    return gates


def logits(lvlm, inputs, context=None) -> torch.Tensor:
    with context or nullcontext():
        return passes.logits(lvlm, inputs)


def answered(inputs, answers):
    """Prompts with answers behind them, and their labels; later answers of a row are padded on the right."""
    n = max(map(len, answers))
    ids = torch.tensor([[*answer, *[0] * (n - len(answer))] for answer in answers])
    there = torch.tensor([[1] * len(answer) + [0] * (n - len(answer)) for answer in answers])
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1)}
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], there], 1)
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        whole["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(ids)], 1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), ids.masked_fill(there == 0, -100)], 1)
    return transformers.BatchFeature(whole), labels


# ------------------------------------------------------------------------------------------------- what a gate does
def sinks_by_hand(lvlm, inputs) -> torch.Tensor:
    """0 for text, 1 for visual tokens of sinks, 2 for others, [rows, tokens]: without `layout` and `sinks`."""
    seen = []
    with lvlm.connector.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach())):
        logits(lvlm, inputs)
    norms = seen[0].reshape(-1, 16).norm(dim=-1).double().numpy()
    grids = inputs.get("image_grid_thw", torch.tensor([[1, 4, 4]] * len(inputs["input_ids"])))
    counts = grids.prod(1).tolist()
    group = torch.zeros_like(inputs["input_ids"])
    for row, own in enumerate(np.split(norms, np.cumsum(counts)[:-1])):
        sink = own > np.quantile(own, 0.8)
        visual = (inputs["input_ids"][row] == lvlm.image_token_id).nonzero()[:, 0]
        sink = sink.reshape(len(visual), -1).any(1)  # Qwen2-VL reads the four patches of a token behind each other
        group[row, visual] = torch.from_numpy(np.where(sink, 1, 2))
    return group


def gate_by_hand(gate, x: torch.Tensor) -> torch.Tensor:
    w = {name: p.detach().double() for name, p in gate.named_parameters()}
    x = x.double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    x = (x * w["0.weight"] + w["0.bias"]) @ w["1.weight"].T + w["1.bias"]
    x = (x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))) @ w["3.weight"].T + w["3.bias"]
    return x.exp() / x.exp().sum(-1, keepdim=True)


@pytest.mark.parametrize("normalised", [False, True])
@torch.no_grad()
def test_against_an_eager_computation(two, monkeypatch, normalised):
    """One pass up to each gate, from the first; then the keys of the next layer are scaled in eager attention."""
    inputs = two.inputs(pictures(), QUESTIONS)
    gates = shaken(two, normalised=normalised)
    ours = logits(two, inputs, gates.around(inputs))
    group, scales = sinks_by_hand(two, inputs), {}
    module = importlib.import_module(type(two.decoder).__module__)
    untouched = module.eager_attention_forward

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        if not hasattr(module, "layer_idx"):  # the tower's
            return untouched(module, query, key, value, attention_mask, scaling, **kwargs)
        if module.layer_idx in scales:
            key = key * scales[module.layer_idx][:, None, :, None]
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        weights = (query @ key.mT * scaling + attention_mask).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    monkeypatch.setattr(module, "eager_attention_forward", attention)
    plain = type(two.model).from_pretrained(two.name, attn_implementation="eager", dtype="float32").eval()
    for layer in (0, 1):
        last = plain(**inputs, output_hidden_states=True).hidden_states[layer + 1][:, -1]
        rho = gate_by_hand(gates.gates[str(layer)], last).float() * (2 if normalised else 1)
        assert (rho[:, 0] - rho[:, 1]).abs().max() > 0.1
        scales[layer + 1] = torch.cat([torch.ones(len(rho), 1), rho], 1).gather(1, group)
    here = passes.real(inputs)
    assert (group == 1).any(1).all() and (group == 2).any(1).all()
    torch.testing.assert_close(ours[here], plain(**inputs).logits[here], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(ours[:, -1], logits(two, inputs)[:, -1], atol=1e-2)


def test_the_beginning(lvlm):
    """Half of every visual key, as the source has it; or the untouched model, to the bit."""
    inputs = lvlm.inputs(pictures(), QUESTIONS)
    plain = logits(lvlm, inputs)
    assert torch.equal(logits(lvlm, inputs, Gates(lvlm, **RULE, normalised=True).around(inputs)), plain)
    gates = Gates(lvlm, **RULE)
    half = moving.gated(lvlm, inputs, lambda norms: norms < 0, 1.0, 0.5, layers=[1, 2])
    ours = logits(lvlm, inputs, gates.around(inputs))
    assert torch.equal(ours, logits(lvlm, inputs, half)) and not torch.allclose(ours[:, -1], plain[:, -1], atol=1e-3)
    assert torch.equal(gates.weights(inputs), torch.full((3, 2, 2), 0.5))
    assert torch.equal(logits(lvlm, inputs), plain)  # nothing is left behind


def test_a_gate_acts_on_the_next_layer_alone(two):
    inputs = two.inputs(pictures(), QUESTIONS)
    gates = shaken(two, layers=[-2])
    assert gates.settings["layers"] == [1] and list(gates.gates) == ["1"]
    with torch.no_grad():
        plain = two.model(**inputs, output_hidden_states=True).hidden_states
        with gates.around(inputs):
            gated = two.model(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.equal(plain[i], gated[i]) for i in (0, 1, 2)) and not torch.equal(plain[3], gated[3])


@torch.no_grad()
def test_generate_is_the_same_with_and_without_cache(lvlm):
    inputs = lvlm.inputs(pictures(), QUESTIONS)
    with shaken(lvlm).around(inputs):
        no_image = dict(suppress_tokens=[lvlm.image_token_id])
        ways = [lvlm.model.generate(**inputs, **DECODE, **no_image, use_cache=cache) for cache in (True, False)]
    assert torch.equal(ways[0].sequences, ways[1].sequences)
    for cached, anew in zip(ways[0].logits, ways[1].logits, strict=True):
        torch.testing.assert_close(cached, anew, **close)


@torch.no_grad()
def test_padding_and_the_rest_of_the_batch_do_not_matter(lvlm):
    images, gates = pictures(), shaken(lvlm)
    inputs = lvlm.inputs(images, QUESTIONS)
    together, rho = logits(lvlm, inputs, gates.around(inputs))[:, -1], gates.weights(inputs)
    for i in range(3):
        alone = lvlm.inputs(images[i : i + 1], QUESTIONS[i : i + 1])
        torch.testing.assert_close(gates.weights(alone)[0], rho[i], **close)
        torch.testing.assert_close(logits(lvlm, alone, gates.around(alone))[0, -1], together[i], atol=1e-4, rtol=1e-3)


def test_in_evaluate_as_question_by_question(llava):
    images = {name: np.asarray(picture) for name, picture in zip("ab", pictures()[:2], strict=True)}
    images = {name: pixels.transpose(2, 0, 1).copy() for name, pixels in images.items()}
    rows = [{"id": f"{name}{q}", "image_id": name, "question": q} for name in images for q in QUESTIONS]
    gates = shaken(llava)
    how = dict(images=images, candidates=["yes", "no"], max_new_tokens=3, cache=None)
    said = evaluate(llava, pd.DataFrame(rows), [gates.intervention("gates")], **how)
    yes = llava.processor.tokenizer.convert_tokens_to_ids("yes")
    for row in said.itertuples():
        inputs = llava.inputs([images[row.image_id]], [row.question])
        logp = logits(llava, inputs, gates.around(inputs))[0, -1].log_softmax(-1)
        assert abs(logp[yes].item() - row.logp_yes) < 1e-4
    for image in images:
        inputs = llava.inputs([images[image]] * 3, QUESTIONS)
        assert gates.weights(inputs)[:, 0, 0].std() > 0.01  # about one image, another gate for every question


# ------------------------------------------------------------------------------------------------- training
def test_where_a_prompt_ends():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1], [1] * 7])
    labels = torch.tensor([[-100, -100, -100, -100, 5, 6, -100], [-100] * 7, [-100, -100, -100, 0, -100, 7, 7],
                           [-100] * 6 + [3]])
    inputs = {"attention_mask": mask}
    assert prompt_ends(inputs).tolist() == [6, 4, 6, 6]
    assert prompt_ends(inputs, labels).tolist() == [3, 4, 2, 5]  # the third row has two turns


@torch.no_grad()
def test_training_computes_what_generation_does(two):
    """Answers that were generated, read with their labels: the same logits, whatever stands behind the prompt."""
    gates, inputs = shaken(two), two.inputs(pictures(), QUESTIONS)
    with gates.around(inputs):
        out = two.model.generate(**inputs, **DECODE, suppress_tokens=[two.image_token_id, 5])
    n = inputs["input_ids"].shape[1]
    answers = [ids.tolist()[: 3 - i] for i, ids in enumerate(out.sequences[:, n:])]  # the later ones cut
    whole, labels = answered(inputs, answers)
    read = logits(two, whole, gates.around(whole, labels))
    for i, answer in enumerate(answers):
        for j in range(len(answer)):
            torch.testing.assert_close(read[i, n - 1 + j], out.logits[j][i], atol=1e-4, rtol=1e-3)
    logp = torch.stack([read[i, n - 1 + j].log_softmax(-1)[token]
                        for i, answer in enumerate(answers) for j, token in enumerate(answer)])
    torch.testing.assert_close(gates(whole, labels), -logp.mean(), **close)


def test_gradient_reaches_every_gate_and_nothing_else(two):
    whole, labels = answered(two.inputs(pictures(), QUESTIONS), [[5, 6, 7], [8, 9], [10]])
    for gates in (shaken(two), Gates(two, **RULE)):
        gates(whole, labels).backward()
        found = {name for name, p in gates.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        last = {f"gates.{layer}.3.{kind}" for layer in (0, 1) for kind in ("weight", "bias")}
        assert found == (set(gates.changed()) if gates.gates["0"][3].bias.any() else last)


def planted(lvlm, seed, n, rules):
    """Questions of two kinds about random pictures, answered by the model under fixed gates, another for each kind.

    Args:
        rules: for each kind, what layer 1's keys of sinks and of other visual tokens are multiplied by.

    Returns:
        Prompts, prompts with answers, labels, and the kind of each row. Only questions whose answers tell the two
        rules apart are there; answers are words.
    """
    words, images = len(architectures.SPECIAL), noise.pictures([(32, 32)] * n, seed)
    asked, answers, kinds = [], [], []
    for kind, question in enumerate(QUESTIONS[:2]):
        inputs = lvlm.inputs(images, [question] * n)
        said = [logits(lvlm, inputs, moving.gated(lvlm, inputs, sinks.rule(**RULE), *by, layers=[1])) for by in rules]
        said = [words + of_rule[:, -1, words:].argmax(-1) for of_rule in said]
        for i in (said[0] != said[1]).nonzero()[:, 0].tolist():
            asked.append((images[i], question))
            answers.append([said[kind][i].item()])
            kinds.append(kind)
    inputs = lvlm.inputs(*zip(*asked, strict=True))
    return inputs, *answered(inputs, answers), torch.tensor(kinds)


@pytest.mark.parametrize("sinks_first", [True, False])
def test_planted_rule(llava, sinks_first):
    """Answers to one kind of question came from sinks, those to the other from other tokens: gates find out which."""
    rules = [(1.0, 0.0), (0.0, 1.0)] if sinks_first else [(0.0, 1.0), (1.0, 0.0)]
    _, whole, labels, _ = planted(llava, 3, 48, rules)
    unseen, unseen_whole, unseen_labels, kinds = planted(llava, 4, 32, rules)
    gates = Gates(llava, layers=[0], **RULE)
    with torch.no_grad():
        before = gates(unseen_whole, unseen_labels).item()
    optimiser = torch.optim.AdamW(gates.changed().values(), lr=1e-2)
    for _ in range(25):
        optimiser.zero_grad()
        gates(whole, labels).backward()
        optimiser.step()
    with torch.no_grad():
        assert gates(unseen_whole, unseen_labels).item() < before - 0.2
    of_sinks = gates.weights(unseen)[:, 0, 0]
    first, second = (of_sinks[kinds == kind] for kind in (0, 1))
    high, low = (first, second) if sinks_first else (second, first)
    assert min(len(high), len(low)) > 3 and high.mean() > 0.7 and low.mean() < 0.3


@pytest.mark.parametrize("kind", ["lsg", "lora"])
def test_fit_trains_what_is_the_methods_own(llava, tmp_path, kind):
    """By the project's own training, and twice with the same weights."""
    whole, labels = answered(llava.inputs(pictures(), QUESTIONS), [[30, 31], [32], [33]])
    untouched = copy.deepcopy(llava.model.state_dict())
    ends = []
    for again in ("a", "b"):
        own = loading.load(llava.name)
        torch.manual_seed(len(ends))  # what was drawn before does not matter
        method = Gates(own, **RULE) if kind == "lsg" else LoRA(own, parameters=1000)
        settings = Settings(steps=3, batch_size=1, lr=1e-2, bf16=False)
        curve = fit(method, [0], tmp_path / again, settings, lambda rows, places: {"inputs": whole, "labels": labels})
        assert curve.loss.iloc[-1] < curve.loss.iloc[0]
        left = {name.replace(".base_layer", ""): x for name, x in own.model.state_dict().items() if "lora_" not in name}
        assert left.keys() == untouched.keys() and all(torch.equal(untouched[name], x) for name, x in left.items())
        ends.append({name: p.detach().clone() for name, p in method.changed().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_saved_and_read(llava, tmp_path):
    inputs, gates = llava.inputs(pictures(), QUESTIONS), shaken(llava, layers=[1])
    for parameter in gates.changed().values():
        parameter.data = parameter.data.bfloat16().float()  # as they are kept
    gates.save(tmp_path / "gates")
    again = Gates(llava, layers=[1], **RULE)
    again.read(tmp_path / "gates")
    assert torch.equal(logits(llava, inputs, again.around(inputs)), logits(llava, inputs, gates.around(inputs)))
    assert again.intervention("x").parameters == gates.intervention("x").parameters and gates.intervention("x").asks
    with pytest.raises(ValueError, match="does not hold the weights"):
        Gates(llava, **RULE).read(tmp_path / "gates")


def test_bad_choices(llava):
    for layers in ([2], [-1], [3], [-4]):
        with pytest.raises(ValueError, match="behind layer 0 to 1"):
            Gates(llava, layers=layers)
    for layers in ([], [0, 0], [0, -3]):
        with pytest.raises(ValueError, match="one gate or more"):
            Gates(llava, layers=layers)
    with pytest.raises(ValueError, match="unknown criterion"):
        Gates(llava, criterion="loud")
    gates, (whole, labels) = Gates(llava, **RULE), answered(llava.inputs(pictures(), QUESTIONS), [[5], [5], [5]])
    with pytest.raises(ValueError, match="row 1: labels begin before"):
        labels[1, whole["input_ids"][1] == llava.image_token_id] = 4
        gates(whole, labels)
    llava.model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpointing"):
        gates(whole, labels)


# ------------------------------------------------------------------------------------------------- LoRA
def test_lora_begins_at_the_untouched_model_and_leaves_its_parts_in_place(lvlm):
    inputs = lvlm.inputs(pictures(), QUESTIONS)
    own = loading.load(lvlm.name)
    lora = LoRA(own, parameters=1000, targets=["q_proj", "k_proj", "v_proj"])
    assert torch.equal(logits(own, inputs), logits(lvlm, inputs))
    torch.manual_seed(0)
    for name, parameter in lora.changed().items():
        if "lora_B" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    by_hand = loading.load(lvlm.name)  # the same change as full matrices, W + B A
    for plain, adapted in zip(by_hand.decoder_layers, own.decoder_layers, strict=True):
        for target in ("q_proj", "k_proj", "v_proj"):
            one, two = (x.get_submodule(f"{lvlm.spec.decoder_attention}.{target}") for x in (plain, adapted))
            if hasattr(two, "lora_A"):
                one.weight.data += two.lora_B["default"].weight.data @ two.lora_A["default"].weight.data
    assert not torch.allclose(logits(own, inputs)[:, -1], logits(lvlm, inputs)[:, -1], atol=1e-2)
    here = passes.real(inputs)
    for contexts in ([None, None], [moving.gated(x, inputs, sinks.rule(**RULE), 2.0, 0.5) for x in (own, by_hand)]):
        ours, expected = (logits(x, inputs, context) for x, context in zip((own, by_hand), contexts, strict=True))
        torch.testing.assert_close(ours[here], expected[here], atol=1e-4, rtol=1e-3)
    assert {name for name, p in own.model.named_parameters() if p.requires_grad} == {
        f"{lvlm.spec.decoder}.{name}" for name in lora.changed()
    }


def test_ranks_come_near_to_what_is_wanted(two):
    one = 32 + 32 + 32 + 16  # inputs and outputs of q_proj and v_proj: what rank 1 has in a layer
    for wanted, of_layers in ((one, [0, 0, 1]), (2 * one, [0, 1, 1]), (3 * one, [1, 1, 1]), (7 * one, [2, 2, 3])):
        assert ranks(two, wanted + one // 3) == ranks(two, wanted - one // 3) == (of_layers, wanted)
    assert ranks(two, 300, ["k_proj"]) == ([2, 2, 2], 288)
    with pytest.raises(ValueError, match="112 parameters, 50 are too few"):
        ranks(two, 50)
    with pytest.raises(ValueError, match="no attribute `up_proj`"):
        ranks(two, 500, ["up_proj"])


def test_lora_as_large_as_gates(llava):
    gates = Gates(llava)
    wanted = n_parameters(gates)
    assert wanted == 2 * (2 * 32 + 33 * 64 + 65 * 2)
    lora = LoRA(llava, parameters=wanted)
    assert n_parameters(lora) == ranks(llava, wanted)[1] and abs(n_parameters(lora) - wanted) <= 112 / 2
    with pytest.raises(ValueError, match="has adapters already"):
        LoRA(llava, parameters=wanted)


def test_lora_trained_saved_and_read(llava, tmp_path):
    inputs = llava.inputs(pictures(), QUESTIONS)
    whole, labels = answered(inputs, [[30, 31], [32], [33]])
    again, lora = LoRA(copy.deepcopy(llava), parameters=1000), LoRA(llava, parameters=1000)
    plain = copy.deepcopy(dict(llava.model.named_parameters()))
    optimiser = torch.optim.AdamW(lora.changed().values(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        losses.append(lora(whole, labels))
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0] - 0.1
    changed = {name for name, p in llava.model.named_parameters() if not torch.equal(p, plain[name])}
    assert changed == {f"{llava.spec.decoder}.{name}" for name in lora.changed()}
    for parameter in lora.changed().values():
        parameter.data = parameter.data.bfloat16().float()  # as they are kept
    lora.save(tmp_path / "lora")
    again.read(tmp_path / "lora")
    assert torch.equal(logits(again.lvlm, inputs), logits(llava, inputs))
    assert again.intervention("x").parameters == lora.intervention("x").parameters
    assert (tmp_path / "lora" / "weights.safetensors").stat().st_size < 2 * 1000 + 4000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_what_is_trained_is_in_float32(tmp_path, dtype):
    llava = architectures.load(tmp_path, "llava", dtype=dtype)
    whole, labels = answered(llava.inputs(pictures(), QUESTIONS), [[30, 31], [32], [33]])
    for method in (Gates(llava, **RULE), LoRA(llava, parameters=1000)):
        method(whole, labels).backward()
        assert all(p.dtype == torch.float32 and p.grad is not None for p in method.changed().values())
