"""Routing of DIYSink on tiny models: against the decoder run by hand, and by planted rules."""

import json
from pathlib import Path

import architectures
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_llava import write_tiny_llava
from torch import nn

from sinkstudy import paths
from sinkstudy.answers.evaluate import Prefixes, evaluate
from sinkstudy.model import loading
from sinkstudy.model.lvlm import LVLM
from sinkstudy.trained import loop, routers
from sinkstudy.trained.connectors import DIYSink
from sinkstudy.trained.kinds import load_method
from sinkstudy.world import benchmarks

THRESHOLD = 1.15  # leaves some patches of a random tower on either side
ASKED = ["how many", "what is the texture red", "yes"]
TINY = routers.Wording(
    image="what is the texture", simple=("red", "no"), complex=("blue", "yes"),
    question="{question} no", holistic=("many",), local=("how",),
)  # fmt: skip


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def base(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_llava(folder, "clip") if request.param == "llava" else architectures.write(folder, request.param)
    DIYSink(loading.load(str(folder)), threshold=THRESHOLD).save(folder / "diysink")
    return folder


@pytest.fixture
def lvlm(base) -> LVLM:
    """A fresh one for each test: methods change its weights."""
    return loading.load(str(base))


def rew(lvlm: LVLM, router: tuple[float, float] | None = None, **settings) -> routers.ReW:
    """With weights (1 + router) for every question, or with random ones that depend on it."""
    method = routers.ReW(lvlm, **{"diysink": Path(lvlm.name) / "diysink", "activation": "free"} | settings)
    torch.manual_seed(1)
    with torch.no_grad():
        if router is None:
            method.router[2].weight.normal_(std=2)
        else:
            method.router[2].bias.copy_(torch.tensor(router))
    return method


def asked(lvlm: LVLM, images: list, questions: list[str] = ASKED) -> Prefixes:
    pictures = [images[i % len(images)] for i in range(len(questions))]
    return Prefixes(lvlm.inputs(pictures, questions), [str(i) for i in range(len(questions))], questions)


@torch.no_grad()
def logits(method, inputs: Prefixes, *args) -> torch.Tensor:
    with method.around(inputs, *args):
        return method.model(**inputs).logits


def test_begins_as_diysink(lvlm, images):
    method, inputs = routers.ReW(lvlm, diysink=Path(lvlm.name) / "diysink"), asked(lvlm, images)
    assert torch.equal(method.weights(ASKED), torch.ones(3, 2))
    assert torch.equal(logits(method, inputs), logits(method.diysink, inputs))


def test_weights_multiply_the_features(lvlm, images):
    """What the decoder reads under DIYSink, multiplied by hand and read by the bare decoder."""
    method, inputs, seen, norms = rew(lvlm), asked(lvlm, images), {}, []
    weights = method.weights(ASKED).detach()
    assert (weights - weights[0]).abs().max() > 0.1  # questions differ
    with (
        torch.no_grad(),
        method.diysink.around(inputs),
        lvlm.decoder.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True),
        lvlm.connector.register_forward_pre_hook(lambda m, args: norms.append(args[0].flatten(0, -2).norm(dim=-1))),
    ):
        plain = lvlm.model(**inputs).logits
    embeds = seen["inputs_embeds"].clone()
    for row, layout in enumerate(lvlm.layout(inputs)):
        of_image = norms[0][layout.connector]
        n_sinks = int(layout.lift(of_image >= THRESHOLD * of_image.quantile(0.5), "any").sum())
        assert 0 < n_sinks < len(layout.visual)
        embeds[row, layout.visual[:n_sinks]] *= weights[row, 0]
        embeds[row, layout.visual[n_sinks:]] *= weights[row, 1]
    with torch.no_grad():
        hidden = lvlm.decoder(**seen | {"inputs_embeds": embeds, "past_key_values": None}).last_hidden_state
    expected = lvlm.model.lm_head(hidden)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(method, inputs)[real], expected[real], rtol=1e-4, atol=1e-4)
    assert (plain - expected)[real].abs().max() > 0.01


def test_only_the_router_learns(lvlm, images):
    lvlm.model.requires_grad_(True)  # as an earlier stage of the training leaves it
    method, inputs = rew(lvlm), asked(lvlm, images)
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    method(inputs=inputs, labels=labels).backward()
    router = list(method.router.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in router)
    assert all(p.grad is None for p in method.parameters() if not any(p is own for own in router))
    assert list(method.changed()) == ["router.0.weight", "router.0.bias", "router.2.weight", "router.2.bias"]


def test_generates_with_a_cache(lvlm, images):
    method, inputs = rew(lvlm), asked(lvlm, images)
    said = []
    for cache in (True, False):
        with method.around(inputs), torch.no_grad():
            said.append(lvlm.model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=cache))
    assert torch.equal(*said)
    with method.diysink.around(inputs), torch.no_grad():  # and the weights did something
        plain = lvlm.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert said[0].shape != plain.shape or not torch.equal(said[0], plain)


def test_evaluates_in_batches_as_one_by_one(lvlm, images):
    method = rew(lvlm)
    table = pd.DataFrame({"question": [*ASKED, "yes", "what is the"], "image": [images[i] for i in (0, 0, 1, 2, 2)]})
    table = table.assign(id=list("abcde"), image_id=[str(i) for i in (0, 0, 1, 2, 2)])
    how = [method.intervention("rew")]
    batch, alone = (
        evaluate(lvlm, table, how, candidates=("red", "blue"), max_new_tokens=3, batch_size=n, cache=None)
        for n in (4, 1)
    )
    assert batch.prediction.equals(alone.prediction)
    np.testing.assert_allclose(batch[["logp_red", "logp_blue"]], alone[["logp_red", "logp_blue"]], atol=2e-4)
    tokenizer = lvlm.processor.tokenizer
    for row in table.itertuples():
        inputs = Prefixes(lvlm.inputs([row.image], [row.question]), [row.image_id], [row.question])
        logp = logits(method, inputs)[0, -1].log_softmax(-1)[tokenizer.convert_tokens_to_ids("red")]
        assert batch.logp_red[row.Index] == pytest.approx(float(logp), abs=2e-4)


def test_the_question_comes_from_the_inputs(lvlm, images):
    method, inputs = rew(lvlm), asked(lvlm, images)
    with pytest.raises(ValueError, match="needs whole prompts with their questions"):
        logits(method, Prefixes(inputs, inputs.image_ids))


@pytest.mark.parametrize(
    "activation, start, weights",
    [  # of R's output (0, log 3); the logistic function of log 3 is 3/4
        ("2softmax", (1, 1), (0.5, 1.5)),
        ("softmax", (0.5, 0.5), (0.25, 0.75)),
        ("sigmoid", (0.5, 0.5), (0.5, 0.75)),
        ("free", (1, 1), (1, 1 + np.log(3))),
    ],
)
def test_activations_in_closed_form(activation, start, weights):
    torch.testing.assert_close(routers.ACTIVATIONS[activation](torch.zeros(2)), torch.tensor(start).float())
    found = routers.ACTIVATIONS[activation](torch.tensor([0.0, np.log(3)]))
    torch.testing.assert_close(found.float(), torch.tensor(weights).float())


# ------------------------------------------------------------------------------------------------- encoders
def test_own_encoder_is_the_language_model(lvlm):
    """The whole model without a picture; its last hidden state over the words of the question."""
    found = rew(lvlm).encode(ASKED)
    tokenizer = lvlm.processor.tokenizer
    for vector, question in zip(found, ASKED, strict=True):
        ids = tokenizer(question, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = lvlm.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        words = hidden[-len(question.split()) :]  # behind <s>, where there is one
        torch.testing.assert_close(vector, words.mean(0) / words.mean(0).norm(), rtol=1e-4, atol=1e-5)


def write_bert(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(ASKED).split()]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


def test_sentence_encoder(lvlm, tmp_path):
    """Mean over the tokens of a padded batch, normalised."""
    write_bert(tmp_path)
    method = rew(lvlm, encoder=str(tmp_path))
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)(ASKED, padding=True, return_tensors="pt")
    assert tokens.attention_mask.min() == 0
    with torch.no_grad():
        hidden = transformers.BertModel.from_pretrained(tmp_path).eval()(**tokens).last_hidden_state
    mean = np.stack([h[m.bool()].mean(0).numpy() for h, m in zip(hidden, tokens.attention_mask, strict=True)])
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(method.encode(ASKED), expected, atol=1e-5)
    assert not any(p.requires_grad for p in method.encoder.parameters())
    before = method.encode(ASKED)
    method.train().vectors.clear()
    assert torch.equal(method.encode(ASKED), before)  # without its dropout
    (tmp_path / "model.safetensors").rename(tmp_path / "kept")
    torch.save(load_file(tmp_path / "kept"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="sentence encoder .* cannot be loaded"):
        rew(lvlm, encoder=str(tmp_path))


def test_a_vector_is_computed_once(lvlm, monkeypatch):
    method, calls = rew(lvlm), []
    monkeypatch.setattr(method, "_vector", lambda question: calls.append(question) or torch.ones(3))
    method.encode(["a", "b", "a"])
    method.encode(["b", "c"])
    assert calls == ["a", "b", "c"]


# ------------------------------------------------------------------------------------------------- on disk
def test_saved_and_read_back(lvlm, base, tmp_path, images):
    method = rew(lvlm, seed=5, width=8)
    with torch.no_grad():
        for p in method.router.parameters():
            p.copy_(p.bfloat16())  # as they are stored
    method.save(tmp_path / "rew", steps=3)
    assert load_file(tmp_path / "rew" / "weights.safetensors").keys() == method.changed().keys()
    known = json.loads((tmp_path / "rew" / "method.json").read_text())
    assert known["kind"] == "rew" and known["steps"] == 3
    assert (tmp_path / "rew" / known["diysink"]["folder"]).samefile(base / "diysink")
    assert not Path(known["diysink"]["folder"]).is_absolute()
    inputs = asked(lvlm, images)
    before = logits(method, inputs)
    again = routers.ReW.open(loading.load(str(base)), tmp_path / "rew")
    assert torch.equal(logits(again, inputs), before)
    assert method.intervention("rew").parameters == again.intervention("rew").parameters


def test_belongs_to_its_diysink(lvlm, base, tmp_path):
    method = rew(lvlm)
    method.save(tmp_path / "rew")
    trained_on = DIYSink.open(loading.load(str(base)), base / "diysink")
    with torch.no_grad():
        next(trained_on.sink.parameters()).mul_(2)
    trained_on.save(tmp_path / "other")
    other = rew(loading.load(str(base)), diysink=tmp_path / "other")
    assert other.settings == method.settings and other.diysink.settings == method.diysink.settings
    with pytest.raises(ValueError, match="belongs to another DIYSink"):
        other.read(tmp_path / "rew")
    assert other.intervention("rew").parameters != method.intervention("rew").parameters
    with pytest.raises(ValueError, match="holds a method of the kind 'rew', not 'diysink'"):
        routers.ReW(lvlm, diysink=tmp_path / "rew")
    with pytest.raises(ValueError, match="no folder of a trained method"):
        routers.ReW(lvlm, diysink=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown activation 'relu'; known: 2softmax, softmax, sigmoid, free"):
        routers.ReW(lvlm, diysink=base / "diysink", activation="relu")


# ------------------------------------------------------------------------------------------------- what weights do
def normalised_inputs(method: routers.ReW, inputs: Prefixes, weights: tuple[float, float]) -> list[torch.Tensor]:
    """What each decoder layer reads of the visual tokens of the first picture, behind its norm."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda m, args, out: seen.append(out))
        for layer in method.lvlm.decoder_layers
    ]
    logits(method.diysink, inputs, torch.tensor([weights] * len(inputs.image_ids)))
    for hook in hooks:
        hook.remove()
    return [out[0, method.lvlm.layout(inputs)[0].visual] for out in seen]


def test_the_first_layer_reads_the_same_whatever_the_weights(lvlm, images):
    """RMSNorm(w · x) = RMSNorm(x) up to its epsilon; with a large weight the layers in between add nothing visible."""
    method, inputs = rew(lvlm), asked(lvlm, images)
    plain, weighted = (normalised_inputs(method, inputs, w) for w in ((1.0, 1.0), (0.3, 3.0)))
    torch.testing.assert_close(weighted[0], plain[0], rtol=1e-3, atol=1e-3)
    assert (weighted[1] - plain[1]).abs().max() > 0.1
    large = normalised_inputs(method, inputs, (1e6, 1e6))
    scales = [layer.input_layernorm.weight for layer in lvlm.decoder_layers]
    for read, scale in zip(large[1:], scales[1:], strict=True):
        torch.testing.assert_close(read / scale, large[0] / scales[0], rtol=1e-3, atol=1e-3)


def test_a_planted_rule_is_learned(lvlm, images):
    """A teacher gives (1.8, 0.2) to questions of one kind and (0.2, 1.8) to those of the other."""
    method = rew(lvlm, (0.0, 0.0), activation="2softmax")
    words = ["red", "blue", "yes", "no"]
    questions = [f"{kind} {word}" for word in words for kind in ("how many", "what is the")]
    truth = torch.tensor([(1.8, 0.2), (0.2, 1.8)]).repeat(len(words), 1)
    inputs = asked(lvlm, images, questions[:6])
    goal = logits(method.diysink, inputs, truth[:6])[:, -1].log_softmax(-1)
    optimizer = torch.optim.Adam(method.router.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        with method.around(inputs):
            said = lvlm.model(**inputs).logits[:, -1].log_softmax(-1)
        loss = nn.functional.kl_div(said, goal, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    unseen = method.weights(questions[6:])
    assert unseen[0, 0] > 1.3 > 0.7 > unseen[0, 1] and unseen[1, 1] > 1.3 > 0.7 > unseen[1, 0]


def test_trained_by_fit(lvlm, images, tmp_path):
    """R alone changes and is kept."""
    method, questions = rew(lvlm, (0.0, 0.0)), [*ASKED, "no"]

    def collate(samples: list[int], places: list[int]) -> dict:
        inputs = asked(lvlm, images, [questions[i] for i in samples])
        labels = inputs["input_ids"].clone()
        labels[:, :-1] = -100
        return {"inputs": inputs, "labels": labels}

    before = {name: p.clone() for name, p in method.named_parameters()}
    curve = loop.fit(method, range(4), tmp_path / "fit", loop.Settings(steps=4, batch_size=2, lr=1e-2), collate)
    moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(method.changed()) and len(curve) == 4
    assert load_file(tmp_path / "fit" / "trained.safetensors").keys() == moved


# ------------------------------------------------------------------------------------------------- asking the model
def test_the_model_decides_by_its_own_answers(lvlm, images):
    table = pd.DataFrame({"id": list("abcd"), "image_id": list("0011"), "question": ["yes", "how many", "yes", "red"]})
    pictures = {"0": images[0], "1": images[1]}
    diysink = DIYSink.open(lvlm, Path(lvlm.name) / "diysink")
    found = routers.cot(lvlm, table, diysink.intervention("both"), wording=TINY, images=pictures, cache=None)
    tokenizer = lvlm.processor.tokenizer

    def logp(image: str, question: str) -> dict[str, float]:
        last = logits(diysink, Prefixes(lvlm.inputs([pictures[image]], [question]), [image]))[0, -1].log_softmax(-1)
        words = ("red", "no", "blue", "yes", "many", "how")
        return dict(zip(words, last[tokenizer.convert_tokens_to_ids(words)].tolist(), strict=True))

    assert found.index.tolist() == list("abcd")
    for row in table.itertuples():
        of_image, of_question = logp(row.image_id, "what is the texture"), logp(row.image_id, f"{row.question} no")
        simple = max(of_image["red"], of_image["no"]) - max(of_image["blue"], of_image["yes"])
        holistic = of_question["many"] - of_question["how"]
        assert found.simple[row.id] == pytest.approx(simple, abs=2e-4)
        assert found.holistic[row.id] == pytest.approx(holistic, abs=2e-4)
        route = {(True, True): "sinks", (False, False): "others"}.get((simple > 0, holistic > 0), "both")
        assert found.route[row.id] == route


def test_each_picture_is_judged_once(lvlm, images, monkeypatch):
    table = pd.DataFrame({"id": list("abcd"), "image_id": list("0011"), "question": ["yes", "how many", "yes", "red"]})
    sizes = []

    def counted(lvlm, table, *args, **kwargs):
        sizes.append(len(table))
        return evaluate(lvlm, table, *args, **kwargs)

    monkeypatch.setattr(routers, "evaluate", counted)
    routers.cot(lvlm, table, wording=TINY, images={"0": images[0], "1": images[1]}, cache=None)
    assert sizes == [2, 4]


def test_a_model_without_the_words_is_not_asked(lvlm):
    table = pd.DataFrame({"id": ["a"], "image_id": ["0"], "question": ["yes"]})
    with pytest.raises(ValueError, match="does not know Is, this, image.*: it cannot be asked in this wording"):
        routers.cot(lvlm, table)


def test_an_arm_tells_simple_pictures_apart():
    """The half of CoT routing that asks about the picture, of an arm that saw simple and dense ones."""
    folder = paths.TRAINED / "lab-llava-gist" / "one-0"
    if not folder.is_dir():
        pytest.skip("the arm is not there")
    arm = load_method(folder)
    table = pd.concat([benchmarks.mmstar(questions=4, split=split) for split in ("test", "test simple")])
    table = table.assign(id=table.image_id)
    drawn, place = benchmarks.render_pictures(table)
    shown = {image: drawn[at].numpy() for image, at in zip(table.image_id, place, strict=True)}
    found = routers.cot(arm.lvlm, table, arm.intervention("one"), wording=routers.LAB, images=shown, cache=None)
    assert ((found.simple > 0) == table.set_index("id").simple).mean() >= 0.9
