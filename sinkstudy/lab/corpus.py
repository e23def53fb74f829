"""From scenes to numbers: the tokenizer, the training pictures on disk, captions and question slots as ids."""

from __future__ import annotations

import random
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sinkstudy.paths import atomic
from sinkstudy.world import gist
from sinkstudy.world import questions as q
from sinkstudy.world.drawing import GRID, SIDE, SIMPLE, Scenes, patch_contents, render

TRAIN_SCENES = 65_536
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CAPTION = 84          # longest caption, in words, with room
# Slots for questions about one picture: (how many, words of the longest "question assistant : answer </s>").
SLOTS = {"short": (16, 16), "region": (6, 25), "options": (4, 34)}
VISUAL = GRID * GRID


def tokenizer(more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over everything the lab world says; ids 0-4 are the special tokens.

    `more` special tokens come last, so that the ids of all words stay as they are without them.
    """
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *q.vocabulary(), *more))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", additional_special_tokens=["<image>", *more], padding_side="left",
                                   model_input_names=["input_ids", "attention_mask"])


class Codec:
    """Words to ids and back; `more` as in `tokenizer`."""

    def __init__(self, more: tuple[str, ...] = ()):
        self.ids = tokenizer(more).get_vocab()
        self.words = [w for w, _ in sorted(self.ids.items(), key=lambda item: item[1])]

    def encode(self, text: str) -> list[int]:
        return [self.ids[w] for w in text.split()]  # KeyError on an unknown word: the vocabulary is complete


def training_pictures(folder: Path, n: int = TRAIN_SCENES, split: str = "train") -> np.ndarray:
    """The first n pictures of a split, uint8 [n, 3, 96, 96], rendered once into a file and then mapped."""
    file = folder / f"{split.replace(' ', '-')}-{n}.npy"
    if not file.exists():
        with atomic(file) as temporary:
            out = np.lib.format.open_memmap(temporary, "w+", np.uint8, (n, 3, SIDE, SIDE))
            for start in range(0, n, 4096):
                out[start:start + 4096] = render(split, start, min(4096, n - start)).images.numpy()
                print(f"rendering: {min(start + 4096, n)}/{n} scenes of {split}", flush=True)
            out.flush()
    return np.load(file, mmap_mode="r")


def grounding(s: Scenes) -> torch.Tensor:
    """The caption's words at the patches they speak of: int8 [n, 12, 12, 6], -1 where none applies.

    Last axis: texture and colour of the part (where no thing lies), kind, colour, size and mark of the thing.
    Calm patches have none.
    """
    part, thing = patch_contents(s)

    def at(values, index):
        return values.gather(1, index.clamp_min(0).flatten(1)).view_as(index).long()

    ground = (thing < 0) & ~s.calm
    columns = [at(v, part).masked_fill(~ground, -1) for v in (s.texture, s.colour)]
    columns += [at(v, thing).masked_fill(thing < 0, -1) for v in (s.kind, s.thing_colour, s.size, s.mark)]
    return torch.stack(columns, -1).to(torch.int8)


class Corpus:
    """What the lab's training needs to know of n scenes besides their pictures.

    `caption` [n, CAPTION] starts with <s> and ends with </s>, padded with -1; `facts` are the scenes in words,
    `fact` [n, words] sentences about the lab world at large, `gist` [n, facts] the classes of `world.gist`.

    With `simple`, so many simple scenes follow the n dense ones, and one question with options in `slots` is one about
    a question (`questions.routing`). `gist` is of the dense scenes alone.
    """

    def __init__(self, n: int, seed: int = 0, simple: int = 0):
        self.codec, self.routing = Codec(), simple > 0
        scenes = render("train", 0, n, pictures=False)
        self.calm = scenes.calm
        self.grounding = grounding(scenes)
        self.gist = torch.stack(list(gist.fact_classes(scenes).values()), 1)
        if simple:
            scenes = Scenes.cat([scenes, render("train" + SIMPLE, 0, simple, pictures=False)])
            n += simple
        self.facts = q.facts(scenes)
        rng = random.Random(seed)
        encode, ids = self.codec.encode, self.codec.ids
        self.caption = torch.full((n, CAPTION), -1)
        known = [encode(s) for s in q.fact_sentences()]
        self.fact = torch.tensor([rng.choice(known) for _ in range(n)])
        for i, f in enumerate(self.facts):
            words = [ids["<s>"], *encode(q.caption(f, rng)), ids["</s>"]]
            self.caption[i, :len(words)] = torch.tensor(words)

    def slots(self, rows: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Questions about each scene in fixed places, as `SLOTS` lists them, with their answers.

        Drawn anew for each seed, so that a scene seen again is asked other things. Both long [rows, words]: ids
        (0 where a slot ends early), and labels, -100 where no loss is taken.
        """
        all_ids, all_labels = [], []
        for row in rows.tolist():
            f, rng = self.facts[row], random.Random(seed * TRAIN_SCENES + row)
            short, options = q.mixture(f, SLOTS["short"][0], SLOTS["options"][0], rng)
            if self.routing:
                options[-1] = q.routing(f, rng)
            asked = {"short": short, "region": q.regions(f, SLOTS["region"][0], rng), "options": options}
            for kind, (_, length) in SLOTS.items():
                for text, answer in asked[kind]:
                    question, said = self.codec.encode(f"{text} assistant :"), self.codec.encode(f"{answer} </s>")
                    rest = length - len(question) - len(said)
                    all_ids += [*question, *said, *[0] * rest]
                    all_labels += [*[-100] * len(question), *said, *[-100] * rest]
        return torch.tensor(all_ids).view(len(rows), -1), torch.tensor(all_labels).view(len(rows), -1)

    grams = cached_property(lambda self: self.ngrams())

    def ngrams(self, least: int = 40) -> torch.Tensor:
        """Which frequent words and adjacent pairs each caption holds: bool [n, k]."""
        rows = [[w for w in row if w >= 0] for row in self.caption[:, 1:].tolist()]
        grams = [set(row) | set(zip(row, row[1:], strict=False)) for row in rows]
        counts = Counter(g for row in grams[:16_384] for g in row)
        kept = sorted((g for g, c in counts.items() if least <= c < 16_000), key=str)
        place = {g: i for i, g in enumerate(kept)}
        out = torch.zeros(len(rows), len(kept), dtype=torch.bool)
        for i, row in enumerate(grams):
            out[i, [place[g] for g in row if g in place]] = True
        return out


def slot_positions(prefix: int, groups: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Positions [tokens] of a prefix and the slots behind it: every slot continues the prefix."""
    ticks = [prefix + torch.arange(length) for number, length in groups for _ in range(number)]
    return torch.cat([torch.arange(prefix), *ticks])
