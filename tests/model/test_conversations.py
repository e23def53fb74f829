"""LLaVA's data format: what is read, and that every architecture's loss is on the answers and nothing else."""

import json
import pickle
import re
from pathlib import Path

import noise
import pytest
import torch
from PIL import Image

from sinkstudy.answers.evaluate import Prefixes
from sinkstudy.trained.conversations import Collate, Sample, fitting, read

TURNS = [("what is the texture", "red blue"), ("how many", "yes"), ("is the red", "no red")]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, picture in zip(("a.png", "b.png"), noise.pictures([(48, 32), (64, 64)])):
        picture.save(folder / name)
    return folder


def sample(images: Path, turns: list, name: str = "a.png") -> Sample:
    return Sample(name, images / name, tuple(turns))


def said(tokenizer, labels: torch.Tensor) -> str:
    """Words of the labels, with a bar where there is none in between."""
    runs = re.findall(r"(?:\d+ )+", " ".join("x" if i < 0 else str(i) for i in labels.tolist()) + " ")
    return " | ".join(tokenizer.decode([int(i) for i in run.split()]) for run in runs)


def test_labels_are_the_answers(lvlm, images):
    turns = TURNS if len(fitting(lvlm, [sample(images, TURNS)])) == 1 else TURNS[:1]
    assert (len(turns) == 1) == Path(lvlm.name).name.startswith("paligemma")  # which has no chat format
    samples = [sample(images, turns), sample(images, TURNS[1:2], "b.png")]
    batch = Collate(lvlm)(samples, [0, 1])
    tokenizer, inputs = lvlm.processor.tokenizer, batch["inputs"]
    assert said(tokenizer, batch["labels"][0]) == " | ".join(f"{answer} </s>" for _, answer in turns)
    assert said(tokenizer, batch["labels"][1]) == "yes </s>"
    chosen = batch["labels"] >= 0
    assert torch.equal(batch["labels"][chosen], inputs["input_ids"][chosen])
    assert inputs.questions == [turns[0][0], "how many"]
    assert [Path(name).name for name in inputs.image_ids] == ["a.png", "b.png"]
    assert [layout.row for layout in lvlm.layout(inputs)] == [0, 1]


def test_one_question_each_without_chat_format(lvlm, images):
    samples = fitting(lvlm, [sample(images, TURNS)])
    if Path(lvlm.name).name.startswith("paligemma"):
        assert [s.turns for s in samples] == [(turn,) for turn in TURNS]
    else:
        assert samples == [sample(images, TURNS)]


def test_loss_is_that_of_the_answer_behind_the_prompt(lvlm, images):
    """By hand: the model's own prompt, the answer's tokens behind it, their probabilities."""
    question, answer = TURNS[0]
    one = sample(images, [(question, answer)])
    batch = Collate(lvlm)([one], [0])
    inputs = lvlm.inputs([Image.open(one.image)], [question])
    tokens = torch.tensor([lvlm.processor.tokenizer.encode(f"{answer} </s>", add_special_tokens=False)])
    n = tokens.shape[1]
    type_of_text = {"token_type_ids": 1 if lvlm.spec.prompt else 0}  # the answer sees what is before it, no more
    longer = {
        k: torch.cat([v, tokens if k == "input_ids" else torch.full_like(tokens, type_of_text.get(k, 0))], 1)
        for k, v in inputs.items()
        if v.shape == inputs["input_ids"].shape
    }
    longer["attention_mask"][:] = 1
    with torch.no_grad():
        logp = lvlm.model(**{**inputs, **longer}).logits[0, -n - 1 : -1].log_softmax(-1)
        loss = lvlm.model(**batch["inputs"], labels=batch["labels"]).loss
    torch.testing.assert_close(loss, -logp.gather(1, tokens[0][:, None]).mean(), rtol=1e-4, atol=1e-5)


def test_cut_off(tiny, images):
    whole = Collate(tiny)([sample(images, TURNS)] * 2, [0, 1])
    n = int(whole["inputs"]["attention_mask"][0].sum())
    samples = [sample(images, TURNS), sample(images, TURNS[:1])]
    with pytest.warns(UserWarning, match=rf"'a.png': cut off, from {n} tokens to {n - 3}$"):
        batch = Collate(tiny, n - 3)(samples, [0, 1])
    assert said(tiny.processor.tokenizer, batch["labels"][0]) == "red blue </s> | yes </s>"
    assert said(tiny.processor.tokenizer, batch["labels"][1]) == "red blue </s>"
    assert torch.equal(batch["inputs"]["input_ids"][0], whole["inputs"]["input_ids"][0, :-3])
    assert batch["inputs"]["attention_mask"].sum(1).tolist()[0] == n - 3
    assert torch.equal(batch["inputs"]["pixel_values"], whole["inputs"]["pixel_values"])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="'a.png': no answer begins within 18 tokens"):
        Collate(tiny, 18)(samples, [0, 1])


def test_a_chat_format_that_changes_its_mind(tiny, images, monkeypatch):
    """It writes only the last answer, as formats that drop thoughts do."""
    template = (
        "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% elif m['role'] == 'user' or loop.last and m == messages[-1] %}{{ c['text'] }} {% endif %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )
    monkeypatch.setattr(tiny.processor, "chat_template", template)
    collate = Collate(tiny)
    collate([sample(images, TURNS[:1])], [0])
    with pytest.raises(ValueError, match="sample 'a.png': the chat format of .* after question 1 as it began"):
        collate([sample(images, TURNS)], [0])


def test_an_end_token_of_the_format_is_enough(tiny, images, monkeypatch):
    """Some write a line break behind it, which is no part of the answer."""
    template = (
        "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% if m['role'] == 'assistant' %}</s> what {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )
    monkeypatch.setattr(tiny.processor, "chat_template", template)
    batch = Collate(tiny)([sample(images, TURNS)], [0])
    assert said(tiny.processor.tokenizer, batch["labels"][0]) == "red blue </s> | yes </s> | no red </s>"
    assert (batch["inputs"]["input_ids"] == tiny.processor.tokenizer.eos_token_id).sum() == 3


def test_prefixes_go_to_other_processes(tiny, images):
    inputs = Collate(tiny)([sample(images, TURNS)], [0])["inputs"]
    again = pickle.loads(pickle.dumps(inputs))
    assert isinstance(again, Prefixes) and again.questions == inputs.questions and again.image_ids == inputs.image_ids
    assert all(torch.equal(again[k], inputs[k]) for k in inputs)


# ------------------------------------------------------------------------------------------------- files
def raw(**changes) -> dict:
    conversation = [
        {"from": "human", "value": "how many\n<image>"}, {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "is the texture red"}, {"from": "gpt", "value": "no "},
    ]  # fmt: skip
    return {"id": "one", "image": "a.png", "conversations": conversation} | changes


def written(folder: Path, content) -> Path:
    file = folder / "data.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_read(tmp_path: Path, images, capsys):
    text_only = raw(id="two", image=None)
    no_id = {k: v for k, v in raw(image="b.png").items() if k != "id"}
    file = written(tmp_path, [raw(), text_only, no_id])
    turns = (("how many", "yes"), ("is the texture red", "no"))
    assert read(file, images) == [Sample("one", images / "a.png", turns), Sample("2", images / "b.png", turns)]
    assert "1 of 3 samples without picture left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{", "is no JSON"),
        ({}, "holds no list"),
        ([raw(image=None)], "has no sample with a picture"),
        ([raw(), raw(id="x", image="c.png")], "1 of 2 pictures are not there, the first is that of sample 'x'"),
        ([raw(), raw(id="x", conversations=[])], "sample 'x' has no conversation"),
        ([raw(), {"id": 7}], "sample 7 has no conversation"),
        ([raw(), "x"], "sample 1 has no conversation"),
        ([raw(id="x", conversations=raw()["conversations"][:1])], "sample 'x' is not by human and gpt in turn"),
        ([raw(id="x", conversations=raw()["conversations"][::-1])], "sample 'x' is not by human and gpt in turn"),
        ([raw(id="x", conversations=[{"from": "human"}, {"from": "gpt"}])], "sample 'x' is not by human and gpt"),
        ([raw(id="x", image=["a.png", "b.png"])], "sample 'x' has several pictures"),
        ([raw(conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}])], "answer that is empty"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, images, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read(written(tmp_path, content), images)
    assert "\n" not in str(error.value)


def test_folders_and_pictures_that_are_not_there(tiny, tmp_path: Path, images):
    with pytest.raises(ValueError, match="none.json cannot be read: No such file"):
        read(tmp_path / "none.json", images)
    with pytest.raises(ValueError, match="folder of pictures .*none is not there"):
        read(written(tmp_path, [raw()]), tmp_path / "none")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.png cannot be read"):
        Collate(tiny)([sample(tmp_path, TURNS, "broken.png")], [0])
