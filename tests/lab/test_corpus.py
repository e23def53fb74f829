"""Words, ids and slots: nothing is lost between a question's text and what the decoder trains on."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from oracle import oracle

from sinkstudy.lab import corpus as c
from sinkstudy.world import questions as q
from sinkstudy.world.drawing import COLOURS, GRID, KINDS, RADIUS, SIZES, TEXTURES, render


@pytest.fixture(scope="module")
def codec() -> c.Codec:
    return c.Codec()


@pytest.fixture(scope="module")
def made() -> c.Corpus:
    return c.Corpus(256)


def test_the_vocabulary_covers_every_word_and_the_slots_every_length(codec):
    rng = random.Random(0)
    for f in q.facts(render("test", 0, 2000, pictures=False)):
        assert len(codec.encode(q.caption(f, rng))) + 2 <= c.CAPTION
        short, options = q.mixture(f, 6, 2, rng)
        for kind, pairs in (("short", short), ("options", options), ("region", q.regions(f, 4, rng))):
            for text, answer in pairs:
                assert len(codec.encode(f"{text} assistant : {answer} </s>")) <= c.SLOTS[kind][1], text
    for sentence in q.fact_sentences():
        codec.encode(sentence)


def test_codec_is_the_tokenizer(codec):
    tokenizer = c.tokenizer()
    rng = random.Random(1)
    special = [tokenizer.convert_tokens_to_ids(t) for t in ("<pad>", "<s>", "</s>", "<unk>", "<image>")]
    assert special == [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id,
                       tokenizer.unk_token_id, 4] == list(range(5))
    assert [codec.ids[w] for w in codec.words] == list(range(len(codec.words)))
    for f in q.facts(render("val", 0, 50, pictures=False)):
        asked = sum(q.mixture(f, 5, 2, rng), [])
        for text in (q.caption(f, rng), *(f"{question} assistant : {answer}" for question, answer in asked)):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert ids == codec.encode(text)
            assert tokenizer.decode(ids) == text
    with pytest.raises(KeyError):
        codec.encode("what is the elephant ?")


def test_captions_read_back(made):
    for row, f in zip(made.caption.tolist(), q.facts(render("train", 0, 256, pictures=False)), strict=True):
        words = [made.codec.words[i] for i in row if i >= 0]
        assert row[len(words):] == [-1] * (c.CAPTION - len(words))
        assert (words[0], words[-1]) == ("<s>", "</s>")
        text = " ".join(words[1:-1])
        assert f.scene in text and f.light in text
        assert all(f"{t.size} {t.colour} {t.kind} " in text for t in f.things)


def test_slots_hold_true_questions_and_answers(made):
    """Each slot: question, "assistant :", answer, end; labels on answer and end alone."""
    lengths = [length for number, length in c.SLOTS.values() for _ in range(number)]
    rows = torch.arange(100, 164)
    counts = Counter()
    for ids, labels, row in zip(*made.slots(rows, seed=3), rows.tolist(), strict=True):
        f = q.facts(render("train", row, 1, pictures=False))[0] if row % 16 == 0 else made.facts[row]
        for slot, label in zip(ids.split(lengths), labels.split(lengths), strict=True):
            words = [made.codec.words[i] for i in slot.tolist() if i]
            assert words[-1] == "</s>"
            question, answer = " ".join(words[:-1]).split(" assistant : ")
            taught = label >= 0
            assert torch.equal(label[taught], slot[taught])
            assert " ".join(made.codec.words[i] for i in label[taught].tolist()) == f"{answer} </s>"
            stem, _, listed = question.removesuffix(" . answer with the letter .").partition(" options : ")
            options = dict(o.split(" ", 1) for o in listed.split(" , ")) if listed else {answer: answer}
            counts["options" if listed else "region" if answer.startswith(("a ", "there")) else "short"] += 1
            assert options[answer] == oracle(stem, f)
    assert counts == {kind: number * len(rows) for kind, (number, _) in c.SLOTS.items()}


def test_half_the_yes_no_answers_are_yes_and_regions_are_often_missing(made):
    ids, _ = made.slots(torch.arange(256), seed=0)
    words = Counter(w for row in ids.tolist() for w, before in zip(row[1:], row, strict=False)
                    if before == made.codec.ids[":"] for w in [made.codec.words[w]])
    assert 0.45 < words["yes"] / (words["yes"] + words["no"]) < 0.55
    assert 0.2 < words["there"] / (words["there"] + words["a"]) < 0.4


def test_a_scene_seen_again_is_asked_other_things(made):
    rows = torch.tensor([5, 9])
    (ids, labels), (again, same), (other, _) = made.slots(rows, 1), made.slots(rows, 1), made.slots(rows, 2)
    assert torch.equal(ids, again) and torch.equal(labels, same) and not torch.equal(ids, other)
    assert torch.equal(made.slots(rows[1:], 1)[0], ids[1:])  # whatever stands beside it in the batch


def test_a_corpus_is_seeded(made):
    again, other = c.Corpus(256), c.Corpus(256, seed=1)
    for name in ("caption", "calm", "grounding", "fact"):
        assert torch.equal(getattr(again, name), getattr(made, name)), name
    assert not torch.equal(other.caption, made.caption)


def test_grounding_says_what_lies_in_a_patch(made):
    scenes = render("train", 0, 64)
    ground = made.grounding[:64].long()
    assert (ground[scenes.calm] == -1).all()
    for i in range(64):
        for row in range(GRID):
            for column in range(GRID):
                y, x = 8 * row + 4, 8 * column + 4
                near = [t for t in range(4) if scenes.kind[i, t] >= 0 and all(
                    abs(a - b) <= RADIUS[scenes.size[i, t]] for a, b in zip((y, x), scenes.centre[i, t].tolist()))]
                values = ground[i, row, column].tolist()
                part = int(scenes.part_map[i, y, x])
                if near:
                    t = near[0]
                    wanted = [-1, -1, scenes.kind[i, t], scenes.thing_colour[i, t], scenes.size[i, t],
                              scenes.mark[i, t]]
                elif scenes.calm[i, row, column]:
                    wanted = [-1] * 6
                else:
                    wanted = [scenes.texture[i, part], scenes.colour[i, part], -1, -1, -1, -1]
                assert values == [int(v) for v in wanted]
    assert ground.flatten(0, 2).max(0).values.tolist() == [
        len(TEXTURES) - 1, len(COLOURS) - 1, len(KINDS) - 1, len(COLOURS) - 1, len(SIZES) - 1, 1]


def test_ngrams(made):
    grams = made.ngrams(least=20)
    assert grams.shape[0] == 256 and grams.dtype == torch.bool
    counts = grams.sum(0)
    assert (counts >= 20).all()
    rows = [[w for w in row if w >= 0] for row in made.caption[:, 1:].tolist()]
    wanted = {g for row in rows for g in (*row, *zip(row, row[1:]))}
    frequent = [g for g in wanted if sum(g in {*row, *zip(row, row[1:])} for row in rows) >= 20]
    assert len(frequent) == grams.shape[1]


def test_training_pictures_are_the_rendered_ones(tmp_path):
    wanted = render("train", 0, 8).images.numpy()
    assert np.array_equal(c.training_pictures(tmp_path, 8), wanted)
    (file,) = tmp_path.iterdir()  # and nothing half-written beside it
    stamp = file.stat().st_mtime_ns
    assert np.array_equal(c.training_pictures(tmp_path, 8), wanted)
    assert file.stat().st_mtime_ns == stamp


def test_slot_positions_continue_the_prefix():
    assert c.slot_positions(3, ((2, 2), (1, 3))).tolist() == [0, 1, 2, 3, 4, 3, 4, 3, 4, 5]
