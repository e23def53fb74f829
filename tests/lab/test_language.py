"""What the decoder is trained on is what it is asked later: slots in training, prompts of the processor after."""

from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from sinkstudy.lab import corpus as c
from sinkstudy.lab import language, train
from sinkstudy.lab import tower as t
from sinkstudy.lab.families import LLAVA, QWEN2VL, family
from sinkstudy.model import loading
from sinkstudy.world.drawing import render

N = 2
SEED = 7


def slots(made: c.Corpus, row: int):
    """The slots of a row: (kind, ids, labels) each."""
    ids, labels = (t[0] for t in made.slots(torch.tensor([row]), SEED))
    at = 0
    for kind, (number, length) in c.SLOTS.items():
        for _ in range(number):
            yield kind, ids[at:at + length], labels[at:at + length]
            at += length


@pytest.fixture(scope="module")
def made() -> c.Corpus:
    return c.Corpus(N)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return render("train", 0, N).images


@pytest.fixture(scope="module", params=["plain", "registers", "qwen2vl"])
def assembled(request, pictures, tmp_path_factory):
    """A random lab model: as assembled for training (weights rounded to bfloat16), and exported and loaded again."""
    tower = t.build(request.param)
    kind = family(tower.config)
    codec = c.Codec(kind.special)
    decoder = language.build_decoder(len(codec.words), kind)
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(2)  # attention that is not uniform
    model = language.assemble(tower, decoder, codec, t.normalise(pictures))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "MODELS", tmp_path_factory.mktemp("models"))
        loaded = loading.load(str(train.export("lab-random", model)))
    again = language.assemble(tower, decoder, codec, t.normalise(pictures))
    again.load_state_dict(loaded.model.state_dict())  # export has cast the first one's rotary frequencies too
    return model.float(), again, loaded


def test_an_exported_model_is_the_assembled_one(assembled):
    model, _, loaded = assembled
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    words = loaded.model.get_input_embeddings().weight
    assert loaded.model.lm_head.weight.data_ptr() == words.data_ptr()  # tied


def test_the_processor_gives_the_pixels_of_training(assembled, pictures):
    loaded = assembled[-1]
    inputs = loaded.inputs(list(pictures), ["how many parts are there ?"] * N)
    pixels = t.normalise(pictures)
    if family(loaded.model.config) is QWEN2VL:
        pixels = t.patched(pixels)[:, t.blocks()].flatten(0, 1)
    torch.testing.assert_close(inputs.pixel_values, pixels, atol=1e-5, rtol=1e-5)


def test_the_prompt_is_the_one_of_training(assembled, made):
    loaded = assembled[-1]
    inputs = loaded.inputs([torch.zeros(3, 96, 96, dtype=torch.uint8)], ["is there a ball ?"])
    kind = family(loaded.model.config)
    words = c.Codec(kind.special).words
    picture = {LLAVA: ["<image>"] * 144,
               QWEN2VL: ["<|vision_start|>", *["<|image_pad|>"] * 36, "<|vision_end|>"]}[kind]
    said = [words[i] for i in inputs.input_ids[0].tolist()]
    assert said == ["<s>", "user", ":", *picture, *"is there a ball ? assistant :".split()]
    assert words[:len(made.codec.words)] == made.codec.words


def test_the_connector_starts_at_the_scale_of_its_data(pictures):
    """Both families: unit pre-activations of mean 0 over all units, visual tokens as long as words."""
    for name in ("plain", "qwen2vl"):
        tower = t.build(name)
        kind = family(tower.config)
        codec, pixels = c.Codec(kind.special), t.normalise(pictures)
        model = language.assemble(tower, language.build_decoder(len(codec.words), kind), codec, pixels)
        connector = model.model.get_submodule(kind.connector)
        with torch.no_grad():
            tokens = kind.read(connector, t.features(tower, t.states(tower, pixels)))
            first = next(m for m in connector.modules() if isinstance(m, torch.nn.Linear))(tokens)
            visual = kind.mlp(connector)(tokens)
        assert visual.shape == (N, kind.visual, 128)
        assert abs(first.mean()) < 0.1 and 0.8 < first.std() < 1.3, name
        words = model.get_input_embeddings().weight.norm(dim=-1).median()
        assert visual.norm(dim=-1).median() == pytest.approx(words.item(), rel=0.1)


@pytest.mark.parametrize("target", ["caption", "questions"])
def test_the_loss_is_that_of_plain_forward_passes(assembled, made, pictures, target, monkeypatch):
    """The stage's loss: teacher-forced answers in separate passes of the Hugging Face model give the same number."""
    monkeypatch.setattr(language, "compiled", lambda function: function)
    monkeypatch.setattr(language, "autocast", nullcontext)
    _, model, loaded = assembled
    stage = language.ImageStage(model, made, pictures.numpy(), target)
    with torch.no_grad():
        loss, values = stage.loss(torch.arange(N), SEED)

    said = [("caption", i, None, made.caption[i][made.caption[i] >= 0][1:]) for i in range(N)]
    if target == "questions":
        for i in range(N):
            for kind, ids, labels in slots(made, i):
                answer = labels[labels >= 0]
                asked = ids[: int((labels >= 0).nonzero()[0])].tolist()
                question = " ".join(made.codec.words[w] for w in asked).removesuffix(" assistant :")
                said.append((kind, i, question, answer))
    entropies, right = defaultdict(list), defaultdict(list)
    for kind, i, question, answer in said:
        inputs = loaded.inputs([pictures[i]], [question or ""])
        for name in inputs.keys() & {"attention_mask", "mm_token_type_ids"}:  # all words, none of them visual
            inputs[name] = F.pad(inputs[name], (0, len(answer)), value=int(name == "attention_mask"))
        inputs["input_ids"] = torch.cat([inputs.input_ids[0], answer])[None]
        with torch.no_grad():
            logits = loaded.model(**inputs).logits[0, -len(answer) - 1:-1]
        entropies[kind] += F.cross_entropy(logits, answer, reduction="none").tolist()
        right[kind] += (logits.argmax(-1) == answer).tolist()
    wanted = sum(language.LOSS_WEIGHTS.get(kind, 1) * sum(e) / len(e) for kind, e in entropies.items())
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    assert values == {f"{kind} words": pytest.approx(sum(r) / len(r), abs=1e-6) for kind, r in right.items()}
    assert len(values) == (1 if target == "caption" else 4)


@pytest.mark.parametrize("kind", [LLAVA, QWEN2VL])
def test_an_ordinary_pass_of_the_training_decoder_is_causal(made, kind):
    """Left on its training attention, a decoder still gives what SDPA gives, padding included."""
    decoder = language.build_decoder(len(made.codec.words), kind).eval()
    ids = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        ours = decoder(input_ids=ids, attention_mask=mask).logits
        decoder.set_attn_implementation("sdpa")
        theirs = decoder(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask > 0], theirs[mask > 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [LLAVA, QWEN2VL])
def test_text_loss_is_that_of_plain_forward_passes(made, kind, monkeypatch):
    """Caption, questions behind it and the fact: left-padded slots in training, separate causal passes here."""
    monkeypatch.setattr(language, "autocast", nullcontext)
    decoder, plain = (language.build_decoder(len(made.codec.words), kind).eval() for _ in range(2))
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(2)
        loss, values = language.text_loss(decoder, decoder.model, made, torch.arange(N), SEED)
    user = made.codec.encode("user :")
    entropies, right = defaultdict(list), defaultdict(list)
    plain.load_state_dict(decoder.state_dict())
    plain.set_attn_implementation("sdpa")

    def passed(kind, prefix, more, labels):
        ids = torch.tensor([*prefix, *more])[None]
        logits = plain(input_ids=ids).logits[0, :-1]
        labels = torch.tensor(labels)[1:]
        at = labels >= 0
        entropies[kind] += F.cross_entropy(logits[at], labels[at], reduction="none").tolist()
        right[kind] += (logits[at].argmax(-1) == labels[at]).tolist()

    with torch.no_grad():
        for i in range(N):
            caption = made.caption[i][made.caption[i] >= 0].tolist()
            prefix = [caption[0], *user, *caption[1:-1]]
            hidden = [-100] * len(prefix)
            passed("caption", prefix, [], prefix)
            fact = made.fact[i].tolist()
            passed("fact", prefix, [made.codec.ids["."], *fact], [*hidden, -100, *fact])
            for kind, ids, labels in slots(made, i):
                words = ids[ids > 0].tolist()
                passed(kind, prefix, words, [*hidden, *labels[: len(words)].tolist()])
    wanted = sum(language.LOSS_WEIGHTS.get(kind, 1) * sum(e) / len(e) for kind, e in entropies.items())
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    assert values == {f"{kind} words": pytest.approx(sum(r) / len(r), abs=1e-6) for kind, r in right.items()}
