"""The words that visual tokens become in the language model: do they say what the picture shows?

A word *hits* if it is true of the picture: its scene, its light, a texture, a colour or a kind of thing in it. Texture
and colour words are true of many pictures, so *chance* is how often the same words are true of the other pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from sinkstudy import stats
from sinkstudy.analyses import probing
from sinkstudy.analyses.content import PatchSampler, Probed
from sinkstudy.model.lvlm import LVLM
from sinkstudy.world import drawing, questions

READINGS = ("alone", "behind the first token", "lens")
"""How a token is made to say a word, see `probing.Words`."""

_VOCABULARY = {"scene": drawing.SCENES, "light": drawing.LIGHTS, "texture": drawing.TEXTURES,
               "colour": drawing.COLOURS, "kind of thing": drawing.KINDS, "number": questions.NUMBERS}
KIND_OF_WORD = {word: kind for kind, of in _VOCABULARY.items() for word in of}
"""What a word of the lab is about; words that are not here say nothing of a picture."""


def true_words(scenes: drawing.Scenes | None) -> list[set[str]]:
    """The words that are true of each picture: scene, light, textures, colours and kinds; none without facts."""
    return [] if scenes is None else [
        {of.scene, of.light, *(word for part in of.parts for word in part),
         *(word for thing in of.things for word in (thing.kind, thing.colour))}
        for of in questions.facts(scenes)
    ]


@dataclass(frozen=True)
class Spoken:
    """The words that visual tokens of one model become; `reading` is one of `READINGS`."""

    # observations as of `content`, % of tokens whose word is true; with `reading`, `layer` (of the lens, from 1),
    # `chance`, the % whose word is true of another picture, and `over_chance`
    hits: pd.DataFrame
    bits: pd.DataFrame  # estimates: `reading`, `group`, and the entropy of its words minus that of random tokens
    words: pd.DataFrame  # `reading`, `group` or "random for ..", `word`, `class`, `share` (%)


def spoken(
    lvlm: LVLM,
    pictures: Sequence[Any],
    truth: Sequence[set[str]],
    groups: PatchSampler,
    read: Probed,
    *,
    batch_size: int = 32,
) -> Spoken:
    """What the tokens of each group say in the test pictures, alone and by the logit lens.

    Args:
        pictures: all that `read` was made of.
        truth: the words that are true of each test picture; empty if they are not known.

    Returns:
        Where no visual token stands alone (features are added behind decoder layers as well), estimates without value.
    """
    n = groups.known.n_fit
    if lvlm.spec.deepstack:
        return _unspoken(len(pictures) - n, groups)
    found = probing.words(lvlm, pictures[n:], batch_size=batch_size)
    tokens = [groups.tokens(i, read.layouts[i], read.masks[i]) for i in range(n, len(pictures))]
    of = [torch.cat([words.alone[None], words.behind_first[None], words.lens]) for words in found]
    ids, place = torch.unique(torch.cat(of, 1), return_inverse=True)
    lexicon = [lvlm.processor.decode([i]).strip().lower() for i in ids.tolist()]
    place = place.split([words.shape[1] for words in of], 1)  # of each picture [2 + layers, visual tokens]
    hits, counts = [], {}
    for group in groups.names:
        own, random = zip(*(of[group] for of in tokens), strict=True)
        hits.append(_hits([mask[None] for mask in own], random, place, lexicon, truth).assign(group=group))
        for row, reading in enumerate(READINGS[:2]):
            said = [words[row] for words in place]
            counts[reading, group] = (_counts(said, [mask[None] for mask in own], len(lexicon))[0],
                                      _counts(said, random, len(lexicon)))
    return Spoken(pd.concat(hits, ignore_index=True), _bits(counts, groups.seed), _histogram(counts, lexicon))


def _unspoken(n_test: int, groups: PatchSampler) -> Spoken:
    hits = [{"reading": reading, "layer": 0, "group": group, "image_id": i}
            for reading in READINGS[:2] for group in groups.names for i in range(n_test)]
    values = dict.fromkeys(["value", "chance", "random", "lead", "over_chance"], np.nan)
    bits = [{"reading": reading, "group": group, **stats.NOTHING._asdict()}
            for reading in READINGS[:2] for group in groups.names]
    nothing = pd.DataFrame(columns=["reading", "group", "word", "class", "share"])
    return Spoken(pd.DataFrame(hits).assign(**values), pd.DataFrame(bits), nothing)


def _hits(
    own: Sequence[torch.Tensor],
    random: Sequence[torch.Tensor],
    place: Sequence[torch.Tensor],
    lexicon: Sequence[str],
    truth: Sequence[set[str]],
) -> pd.DataFrame:
    """Of one group, masks [1 or draws, visual tokens] of each picture; words by their place in the lexicon."""
    true = torch.tensor([[word in words for word in lexicon] for words in truth]).float()
    true = true.reshape(len(truth), len(lexicon))
    others = (true.sum(0) - true) / max(1, len(place) - 1)  # share of the other pictures of which a word is true
    parts = []
    for row in range(len(place[0])):
        said = [words[row] for words in place]
        parts.append(pd.DataFrame({
            "reading": READINGS[min(row, 2)], "layer": row - 1 if row > 1 else 0, "image_id": range(len(said)),
            "value": _share(true, said, own), "random": _share(true, said, random), "chance": _share(others, said, own),
        }))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(lead=table.value - table.random, over_chance=table.value - table.chance)


def _share(of_word: torch.Tensor, said: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> np.ndarray:
    """Mean of a value of each word, [pictures, words], over the tokens of each mask, in %: [pictures]."""
    if not len(of_word):
        return np.full(len(said), np.nan)
    return 100 * np.array([((of_word[i][words] * mask).sum(-1) / mask.sum(-1)).numpy().mean()
                           for i, (words, mask) in enumerate(zip(said, masks, strict=True))])


def _counts(said: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], n_words: int) -> np.ndarray:
    """How often each word is said: masks [draws, visual tokens] of each picture -> [draws, pictures, words]."""
    return np.stack([np.stack([np.bincount(words[mask], minlength=n_words) for mask in of])
                     for words, of in zip(said, masks, strict=True)], 1)


def _bits(counts: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]], seed: int) -> pd.DataFrame:
    rows = [(*of, *probing.entropy_difference(own, random, seed=seed)) for of, (own, random) in counts.items()]
    return pd.DataFrame(rows, columns=["reading", "group", "value", "low", "high", "n"])


def _histogram(
    counts: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]], lexicon: Sequence[str]
) -> pd.DataFrame:
    """Share of the group's words, in %, pooled over the pictures; ids that are spelt alike are one word."""
    parts = []
    for (reading, group), (own, random) in counts.items():
        for name, times in ((group, own.sum(0)), (f"random for {group}", random.sum((0, 1)))):
            said = pd.Series(times, index=lexicon)[times > 0].groupby(level=0).sum()
            parts.append(pd.DataFrame({"reading": reading, "group": name, "word": said.index,
                                       "class": [KIND_OF_WORD.get(word, "other words") for word in said.index],
                                       "share": 100 * said.to_numpy() / max(1, times.sum())}))
    return pd.concat(parts, ignore_index=True)
