"""Answers of a model to a benchmark, under interventions, without doing the same work twice.

Most of what a vision-language model does for a question does not depend on the question. So each image goes through
the vision tower once; its *prefix*, the prompt up to the last visual token, goes through the decoder once; and all
questions about it continue from the prefix's key-value cache, as a batch. An `Intervention` says how much of that it
leaves as it is: one that edits what the connector puts out shares the tower's pass, but not the prefix.

Answers come in two ways: as greedy text by the library's own `generate` (the reference), and by the
log-probabilities of the possible answers' first tokens (one pass, no text). They are kept on disk, so that a run
that was killed goes on where it stopped.
"""

import copy
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import BatchFeature, DynamicCache, ProcessorMixin

from sinkstudy import benchmarks, digests
from sinkstudy.benchmarks.rows import letters
from sinkstudy.model.capture import ADVICE, hidden_states, until_end
from sinkstudy.model.identity import Identity, Unknown, model_digest
from sinkstudy.model.lvlm import LVLM, ahead
from sinkstudy.paths import CACHE
from sinkstudy.pictures import opened
from sinkstudy.progress import Progress

ANSWERS = Path(os.environ.get("SINKSTUDY_ANSWERS", CACHE / "answers"))


class Prefixes(BatchFeature):
    """Model inputs of the prefixes of some images, [images, tokens], or of whole prompts.

    `image_ids` names the images. `rows`, long [rows], says at any time which of them each row of the decoder's batch is
    about: 0, 1, .. while it reads the prefixes, and later that of each question. `questions` are those of whole
    prompts, a row each, and None for prefixes.
    """

    def __init__(
        self, data: Mapping[str, Any], image_ids: Sequence[str], questions: Sequence[str] | None = None
    ) -> None:
        super().__init__(dict(data))
        self.image_ids = list(image_ids)
        self.questions = None if questions is None else list(questions)
        self.rows = torch.arange(len(self.image_ids))

    def __reduce__(self) -> tuple:
        """Between processes too, all comes along."""
        return Prefixes, (self.data, self.image_ids, self.questions)


@dataclass(frozen=True)
class Intervention:
    """A change of the forward pass, as a context manager that is entered anew for every batch of images.

    `around(lvlm, inputs)` gives the context. `inputs` are `Prefixes`: those of the images, [images, tokens] without
    padding, so `lvlm.layout(inputs)` finds patches and visual tokens, at the positions that they have in every later
    pass too. Inside, the decoder sees the prefixes [images, tokens, width] (unless they are kept), then the rest of the
    prompts [questions, tokens, width], then one token of each answer at a time; padding, where questions differ in
    length, stands between prefix and question. Where prefixes cannot be shared (see `evaluate`), `inputs` and what the
    decoder sees are one whole prompt.

    `keeps` is what of the unchanged model's work the intervention leaves as it is, and what is therefore not done
    again: "nothing" if it changes the tower, "tower" if it begins at the connector, "prefix" if it changes only how
    question and answer are read. Where the tower is kept, only those of its layers that feed a connector show what
    they should to a hook.

    With `asks`, what it does to an image depends on the question, so nothing is shared between questions: `inputs` are
    whole prompts [questions, tokens], padded on the left, with their `questions`.

    Among kept answers an intervention is known by what it does: the code of `around` and all that it reaches, see
    `identity.Identity`. `parameters` (plain values) describe it, and tell apart what is read from elsewhere, such as a
    file, in the forward pass.

    Raises:
        ValueError: an unknown `keeps`, or parameters that are no plain values.
    """

    name: str
    around: Callable[[LVLM, Prefixes], AbstractContextManager[Any, Any]] = lambda lvlm, inputs: nullcontext()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    keeps: Literal["nothing", "tower", "prefix"] = "tower"
    asks: bool = False

    def __post_init__(self) -> None:
        if self.keeps not in ("nothing", "tower", "prefix"):
            raise ValueError(f"an intervention keeps 'nothing', 'tower' or 'prefix', not {self.keeps!r}")
        try:
            json.dumps(self.parameters, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the parameters of {self.name!r} are no plain values: {error}") from None


NONE = Intervention("none", keeps="prefix")


@torch.no_grad()
def evaluate(
    lvlm: LVLM,
    table: pd.DataFrame,
    interventions: Sequence[Intervention] = (NONE,),
    *,
    images: Mapping[str, Any] | None = None,
    candidates: Sequence[str] | Sequence[Sequence[str]] | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    cache: str | Path | None = ANSWERS,
) -> pd.DataFrame:
    """Answer every question of a table under every intervention.

    A model whose whole prompt sees itself (`Spec.prefix_mask`: PaliGemma), or whose chat format puts the question in
    front of the image, has no prefix to share: a warning says so, each question then goes through the decoder alone,
    and only the tower's pass is shared.

    Args:
        lvlm: the model.
        table: columns `id`, `image_id`, `question` (the text that is asked, see `benchmarks.prompts`) and, unless
            `images` is given, `image`: a PIL image, a path, an array or tensor uint8 [3, height, width], or something
            to open, such as a `benchmarks.parquet.Picture`. The rows of an image need not stand together.
        interventions: each under its own name; `NONE` is the model as it is.
        images: the image of each `image_id`, instead of the column.
        candidates: the possible answers, the same for all rows or some for each row; by default yes and no if these
            are the table's answers, letters if these are (as many as the row has `choices`), else none. Those for all
            must be told apart by first tokens.
        max_new_tokens: length of the longest answer, in tokens.
        batch_size: the number of questions that go through the decoder at once, about one image or several. In float32
            answers do not depend on it, but for rounding; in half precision they may.
        cache: folder of answers already given, a file for each model, code and batch size; None keeps nothing. What is
            kept is used where the same questions go together as before, so that a run that was killed ends with the
            numbers of an undisturbed one, to the bit (on a GPU, as far as it repeats itself). A folder that cannot be
            written, and an intervention of which it cannot be told what it does, give a warning, and answers that are
            not kept.

    Returns:
        The table's columns but `image`, once for each intervention, with `intervention`; `prediction`, the greedy
        answer without blanks around it; and, if there are candidates, `first`, the most likely of them by its first
        token, and `logp_<candidate>`, log-probability (natural, over the whole vocabulary) that the answer begins
        with it, summed over its spellings (capital letters, a space before it). NaN where a row has no such
        candidate, or, with a warning, where first tokens do not tell a row's candidates apart or the tokenizer knows
        none; no such column if it is so in all rows. The index counts from 0.

    Raises:
        ValueError: an empty table; a missing column or image; an image that cannot be read, by its name; an id or an
            intervention's name that occurs twice; candidates for all that are not told apart; NaN or infinity among
            the logits of any of an answer's tokens, or a candidate of probability 0, with the layer in which numbers
            stop being finite, and the picture. Such an answer is never kept.
    """
    _check(table, interventions, images)
    table = table.reset_index(drop=True)  # which may repeat, where tables were put together
    shown = dict(zip(table.image_id, table["image"], strict=True)) if images is None else images
    options = _options(table, candidates)
    tokens = {several: first_tokens(lvlm, several) for several in dict.fromkeys(options)}
    if alike := [several for several, told in tokens.items() if several and not told]:
        problem = f"{lvlm.name}: first tokens do not tell the candidates {', '.join(map(repr, alike[0]))} apart"
        if candidates is not None and all(isinstance(c, str) for c in candidates):
            raise ValueError(problem)
        warnings.warn(f"{problem}: their log-probabilities are NaN", stacklevel=2)
    first = table.image_id.iloc[0]
    if reason := _not_shared(lvlm, opened(shown[first], repr(first))):
        warnings.warn(f"{lvlm.name}: {reason}, so questions share no prefix", stacklevel=2)
    store = _Answers(cache, lvlm, max_new_tokens, batch_size)
    rows: dict[str, list[int]] = {}
    for row, image in enumerate(table.image_id):
        rows.setdefault(image, []).append(row)
    texts = table.question.tolist()
    asking = _Asking(lvlm, texts, max_new_tokens, batch_size)
    told = {how.name: store.told(how) for how in interventions}
    said: dict[tuple[str, int], dict] = {}  # (intervention, row) -> answer
    total = len(table) * len(interventions)
    other = lvlm.for_thread()

    def ready() -> Iterator[_Group]:
        """What is asked together, prepared; under which interventions, in the batches of an undisturbed run."""
        for group in _groups(rows, batch_size):
            pictures = {image: opened(shown[image], repr(image)) for image in group}
            of_group = {image: rows[image] for image in group}
            asked = digests.of_values(
                [
                    [_picture_sha256(pictures[image]), [[lvlm.prompt(texts[row]), options[row]] for row in of_image]]
                    for image, of_image in of_group.items()
                ]
            )
            numbers = {row: number for number, row in enumerate(row for own in of_group.values() for row in own)}
            keys = {name: {row: does and digests.of_values([asked, does, n]) for row, n in numbers.items()}
                    for name, does in told.items()}
            missing = [how for how in interventions if any(key not in store.known for key in keys[how.name].values())]
            split = _split(other, pictures, texts, of_group) if missing else (None, {})
            yield _Group(pictures, of_group, keys, missing, *split)

    with Progress("answers", total) as bar, _images_once(lvlm.processor), _images_once(other.processor):
        for group in ahead(ready()):
            pictures, keys = group.pictures, group.keys
            for how in interventions:
                if how not in group.missing:
                    said |= {(how.name, row): store.known[key] for row, key in keys[how.name].items()}
            # so that the time left is of what is done
            bar.total -= sum(map(len, group.wanted.values())) * (len(interventions) - len(group.missing))
            answers = asking.answers(group)
            before = None
            for how, row, prediction, logp in answers:
                scores = {c: logp[ids].logsumexp(0).item() for c, ids in tokens[options[row]].items()}
                if logp.isnan().any() or not all(map(math.isfinite, scores.values())):
                    answers.close()  # so that nothing intervenes any more
                    picture = table.image_id.iloc[row]
                    inputs = lvlm.inputs([pictures[picture]], [texts[row]])
                    raise ValueError(f"{lvlm.name}: {_not_finite(lvlm, inputs, how)}, picture {picture!r}: {ADVICE}")
                if how is not before:
                    store.write()
                    before = how
                said[how.name, row] = {"prediction": prediction, "scores": scores}
                store.add(keys[how.name][row], said[how.name, row])
                bar.update()
            store.write()
    parts = [_result(table, how.name, [said[how.name, r] for r in range(len(table))]) for how in interventions]
    return pd.concat(parts, ignore_index=True)


def _not_finite(lvlm: LVLM, inputs: BatchFeature, how: Intervention) -> str:
    """Where numbers first stop being numbers for a prompt, or that it is the intervention that makes them so."""
    with ExitStack() as watching:
        sides = {side: watching.enter_context(hidden_states(lvlm, side, lambda hidden, layer: hidden.isfinite().all()))
                 for side in ("vision", "decoder")}
        lvlm.model(**inputs, logits_to_keep=1)
    for side, layers in sides.items():
        for layer, calls in layers.items():
            if not all(calls):
                return f"NaN or infinite values behind layer {layer} of the {side}"
    among = "NaN or infinity among the logits"
    return f"{among}, under {how.name!r}" if how is not NONE else among


def _check(table: pd.DataFrame, interventions: Sequence[Intervention], images: Mapping[str, Any] | None) -> None:
    needed = ["id", "image_id", "question", *(["image"] if images is None else [])]
    if missing := [column for column in needed if column not in table.columns]:
        raise ValueError(f"the table has no column {missing[0]!r}; it has {', '.join(table.columns)}")
    if table.empty:
        raise ValueError("the table is empty")
    if table.id.duplicated().any():
        raise ValueError(f"the id {table.id[table.id.duplicated()].iloc[0]!r} occurs twice")
    if images is not None and (lost := [image for image in table.image_id.unique() if image not in images]):
        raise ValueError(f"{len(lost)} images are missing, such as {lost[0]!r}")
    names = [how.name for how in interventions]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"every intervention needs a name of its own, got {names}")


def _groups(rows: Mapping[str, list[int]], batch_size: int) -> Iterator[list[str]]:
    """Images that go together: as many as have `batch_size` questions, and at least one."""
    group: list[str] = []
    questions = 0
    for image, of_image in rows.items():
        if group and questions + len(of_image) > batch_size:
            yield group
            group, questions = [], 0
        group.append(image)
        questions += len(of_image)
    yield group


def _result(table: pd.DataFrame, name: str, answers: list[dict]) -> pd.DataFrame:
    scores = pd.DataFrame([answer["scores"] for answer in answers], index=table.index)
    out = table.drop(columns="image", errors="ignore").assign(
        intervention=name, prediction=[answer["prediction"] for answer in answers]
    )
    if scores.shape[1]:
        out["first"] = scores.dropna(how="all").idxmax(axis=1)
    return out.join(scores.add_prefix("logp_"))


def judged(said: pd.DataFrame, benchmark: str = "") -> pd.DataFrame:
    """Answers of `evaluate` beside the right ones, in the column `answer`.

    Args:
        benchmark: whose official rule judges; without one, the greedy answer has to be `answer`.

    Returns:
        `said` with `right`, 100 or 0; and `logp`, the log-probability (nats) that the answer begins with the first
        token of the right one, in any of its spellings; NaN where `evaluate` has none.
    """
    right = said.prediction == said.answer
    if benchmark:
        right = pd.concat([benchmarks.right(of, benchmark) for _, of in said.groupby("intervention")])
    logp = [row.get(f"logp_{row['answer']}", float("nan")) for row in said.to_dict("records")]
    return said.assign(right=100.0 * right, logp=logp)


# ------------------------------------------------------------------------------------------------- forward passes
Filled = tuple[DynamicCache, torch.Tensor | None]  # with Qwen's shift of positions behind each image, [images, 1]
Said = tuple[Intervention, int, str, torch.Tensor]  # with the row, and the first token's log-probabilities [vocabulary]


@dataclass(frozen=True)
class _Group:
    """Questions that go through the decoder together."""

    pictures: Mapping[str, Any]  # by image
    wanted: Mapping[str, list[int]]  # rows of the table, by image
    keys: Mapping[str, Mapping[int, str | None]]  # {intervention: {row: where the answer is kept}}
    missing: Sequence[Intervention]  # under which the group has to be asked
    prefix: Prefixes | None  # of `_split`
    rest: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class _Asking:
    """How questions are asked."""

    lvlm: LVLM
    texts: Sequence[str]  # of all rows
    max_new_tokens: int
    batch_size: int

    def answers(self, group: _Group) -> Generator[Said]:
        """Answers to a group's questions under each intervention that is missing."""
        if group.prefix is None and len(group.wanted) > 1:  # of different length, or none: each image for itself
            for image, rows in group.wanted.items() if group.missing else ():
                alone = {image: rows}
                prefix, rest = _split(self.lvlm, group.pictures, self.texts, alone)
                yield from self.answers(replace(group, wanted=alone, prefix=prefix, rest=rest))
            return
        tower: dict[int, torch.Tensor] = {}
        untouched = None
        for how in group.missing:
            if how.asks:
                yield from self._whole(group, how)
            elif group.prefix is None:
                yield from self._one_by_one(group, how, tower)
            else:
                if how.keeps == "prefix" and untouched is None:
                    with _tower_once(self.lvlm, tower, "tower"):
                        untouched = _prefilled(self.lvlm, group.prefix)
                group.prefix.rows = torch.arange(len(group.wanted))
                with _tower_once(self.lvlm, tower, how.keeps), how.around(self.lvlm, group.prefix):
                    filled = untouched if how.keeps == "prefix" else _prefilled(self.lvlm, group.prefix)
                    yield from self._behind_prefixes(group, group.prefix, filled, how)

    def _whole(self, group: _Group, how: Intervention) -> Iterator[Said]:
        """Answers under an intervention that asks: whole prompts, in batches of similar length."""
        image_of = {row: image for image, rows in group.wanted.items() for row in rows}
        by_length = sorted(image_of, key=lambda row: len(self.texts[row]))
        for start in range(0, len(by_length), self.batch_size):
            chunk = by_length[start : start + self.batch_size]
            asked, about = [self.texts[row] for row in chunk], [image_of[row] for row in chunk]
            inputs = Prefixes(self.lvlm.inputs([group.pictures[image] for image in about], asked), about, asked)
            with how.around(self.lvlm, inputs):
                yield from self._said(inputs, chunk, how)

    def _one_by_one(self, group: _Group, how: Intervention, tower: dict[int, torch.Tensor]) -> Iterator[Said]:
        """Answers about an image whose prompts share no prefix: only the tower's pass is shared."""
        ((image, rows),) = group.wanted.items()
        for row in rows:
            asked = [self.texts[row]]
            inputs = Prefixes(self.lvlm.inputs([group.pictures[image]], asked), [image], asked)
            with _tower_once(self.lvlm, tower, how.keeps), how.around(self.lvlm, inputs):
                yield from self._said(inputs, [row], how)

    def _behind_prefixes(self, group: _Group, prefix: Prefixes, filled: Filled, how: Intervention) -> Iterator[Said]:
        """Answers that go on from the images' prefixes in a cache."""
        place = {row: i for i, rows in enumerate(group.wanted.values()) for row in rows}
        for chunk in _chunks({row: len(group.rest[row]) for row in place}, self.batch_size, filled[0]):
            prefix.rows = torch.tensor([place[row] for row in chunk])
            of = prefix.rows.to(self.lvlm.device)
            inputs = _continuation(self.lvlm, prefix, filled, of, [group.rest[row] for row in chunk])
            yield from self._said(inputs, chunk, how)

    def _said(self, inputs: Mapping[str, Any], rows: Sequence[int], how: Intervention) -> Iterator[Said]:
        return zip([how] * len(rows), rows, *_generate(self.lvlm, inputs, self.max_new_tokens))


def _split(
    lvlm: LVLM, pictures: Mapping[str, Any], texts: Sequence[str], wanted: Mapping[str, list[int]]
) -> tuple[Prefixes | None, dict[int, torch.Tensor]]:
    """The images' prefixes [images, tokens] as model inputs, and for each row the token ids that follow, on the CPU.

    The prefixes are None where they differ in length from image to image, or where an image has none.
    """
    if lvlm.spec.prefix_mask:
        return None, {}
    images = [pictures[image] for image in wanted]
    first, rest, lengths = None, {}, set()
    for k in range(max(map(len, wanted.values()))):  # the k-th question of every image
        rows = [of_image[min(k, len(of_image) - 1)] for of_image in wanted.values()]
        inputs = lvlm.prepared(images, [texts[row] for row in rows])
        if first is None:
            first = inputs
        for i, row in enumerate(rows):
            ids = _unpadded(inputs, i)
            end = int((ids == lvlm.image_token_id).nonzero()[-1]) + 1
            lengths.add(end)
            rest[row] = ids[end:]
            if len(ids) == end or not torch.equal(ids[:end], _unpadded(first, i)[:end]):
                return None, {}
    if len(lengths) > 1:
        return None, {}
    length = lengths.pop()
    at = (first["attention_mask"].argmax(1)[:, None] + torch.arange(length))  # behind the padding
    tokenwise = {k: v.gather(1, at) for k, v in first.items() if v.shape == first["input_ids"].shape}
    return Prefixes(lvlm.moved(BatchFeature({**first, **tokenwise})), list(wanted)), rest


def _not_shared(lvlm: LVLM, picture: Any) -> str:
    """Why no two questions about a picture share their prompts' prefix; empty if they do."""
    if lvlm.spec.prefix_mask:
        return "its whole prompt sees itself"
    inputs = lvlm.inputs([picture, picture], ["a", "a a"])
    short, long = _unpadded(inputs, 0), _unpadded(inputs, 1)
    end = int((short == lvlm.image_token_id).nonzero()[-1]) + 1
    return "" if torch.equal(short[:end], long[:end]) else "its chat format puts the question before the image"


def _unpadded(inputs: BatchFeature, row: int) -> torch.Tensor:
    return inputs["input_ids"][row][inputs["attention_mask"][row] == 1]


def _prefilled(lvlm: LVLM, prefix: Prefixes) -> Filled:
    filled = lvlm.model(**prefix, use_cache=True, logits_to_keep=1).past_key_values
    return filled, getattr(lvlm.model.model, "rope_deltas", None)


def _chunks(lengths: Mapping[int, int], batch_size: int, filled: DynamicCache) -> Iterator[list[int]]:
    """Rows that are read together, by length. Padding behind a prefix would push tokens out of a sliding window."""
    no_padding = any(filled.is_sliding)
    by_length = sorted(lengths, key=lengths.get)
    start = 0
    for end in range(1, len(by_length) + 1):
        chunk = by_length[start:end]
        if (
            end == len(by_length)
            or len(chunk) == batch_size
            or (no_padding and lengths[by_length[end]] != lengths[chunk[0]])
        ):
            yield chunk
            start = end


def _continuation(
    lvlm: LVLM, prefix: Prefixes, filled: Filled, of: torch.Tensor, rest: list[torch.Tensor]
) -> dict[str, Any]:
    """What `generate` needs to read questions about images whose prefixes are in a cache."""
    longest = max(map(len, rest))
    # a token of the prompt itself as padding, so that a repetition penalty finds no token that the prompt has not
    padded = torch.stack([torch.cat([ids[:1].expand(longest - len(ids)), ids]) for ids in rest])
    real = torch.stack([torch.arange(longest) >= longest - len(ids) for ids in rest])
    cache, deltas = filled
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in branch.layers:  # nothing writes into keys and values: a longer tensor takes their place
        layer.keys, layer.values = (
            kept.expand(len(of), -1, -1, -1) if len(kept) == 1 else kept[of.to(kept.device)]
            for kept in (layer.keys, layer.values)
        )
    if deltas is not None:
        lvlm.model.model.rope_deltas = deltas[of]
    return {
        "input_ids": torch.cat([prefix["input_ids"][of], padded.to(of.device)], dim=1),
        "attention_mask": torch.cat([prefix["attention_mask"][of], real.long().to(of.device)], dim=1),
        "past_key_values": branch,
    }


def _generate(lvlm: LVLM, inputs: Mapping[str, Any], max_new_tokens: int) -> tuple[list[str], torch.Tensor]:
    """Greedy answers, and log-probabilities of their first token [questions, vocabulary], float32 on the CPU.

    These are NaN for an answer in which the logits of any token are NaN or infinite.
    """
    out = lvlm.generate(inputs, max_new_tokens)
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in lvlm.processor.batch_decode(tokens, skip_special_tokens=True)]
    logp = out.logits[0].float().log_softmax(-1).cpu()
    odd = torch.stack([~step.amax(-1).isfinite() for step in out.logits], 1).cpu()  # [questions, steps]
    logp[(odd & (until_end(tokens.cpu(), lvlm.ends) > 0)).any(1)] = float("nan")
    return texts, logp


@contextmanager
def _images_once(processor: ProcessorMixin) -> Iterator[None]:
    """Inside, pictures that come again are not processed again: the last ones' pixels are kept."""
    process = processor._process_images
    last: list = [None, None]

    def once(images: Any, **kwargs: Any) -> tuple[dict, list]:
        same = [id(image) for several in images for image in several]
        if last[0] is None or [id(image) for image in last[0]] != same:
            last[:] = [[image for several in images for image in several], process(images, **kwargs)]
        processed, replacements = last[1]
        return copy.copy(processed), replacements

    processor._process_images = once
    try:
        yield
    finally:
        del processor._process_images


@contextmanager
def _tower_once(lvlm: LVLM, seen: dict[int, torch.Tensor], keeps: str) -> Iterator[None]:
    """Inside, vision layers do not compute, but put out what they did when `seen` was filled: in the first context.

    Only what feeds a connector is kept, {layer: output}; the layers in between pass on what they get. Embeddings and
    connectors, which cost little, compute as always, and so do their hooks. The inputs must be the same every time.
    """
    if keeps == "nothing":
        yield
        return
    layers = lvlm.vision_layers

    def keep(layer: int) -> Callable:
        return lambda module, args, output: seen.__setitem__(layer, output)

    def instead(layer: int) -> Callable:
        return lambda hidden, *args, **kwargs: seen.get(layer, hidden)

    if not seen:
        with ExitStack() as hooks:
            for layer in lvlm.connectors:
                hooks.enter_context(layers[layer].register_forward_hook(keep(layer)))
            yield
        return
    own: list[tuple[nn.Module, Any]] = [(module, module.__dict__.get("forward")) for module in layers]
    try:
        for layer, module in enumerate(layers):
            module.forward = instead(layer)
        yield
    finally:
        for module, forward in own:  # accelerate has put a forward of its own there; otherwise it is the class's
            if forward is None:
                del module.forward
            else:
                module.forward = forward


# ------------------------------------------------------------------------------------------------- first tokens
def _options(table: pd.DataFrame, candidates: Any) -> list[tuple[str, ...]]:
    """Possible answers of each row."""
    if candidates is not None:
        if any(isinstance(c, str) for c in candidates):
            return [tuple(candidates)] * len(table)
        if len(candidates) != len(table):
            raise ValueError(f"the table has {len(table)} rows, the candidates are for {len(candidates)}")
        return [tuple(several) for several in candidates]
    answers = set(table["answer"]) if "answer" in table else {None}
    if answers <= {"yes", "no"}:
        return [("yes", "no")] * len(table)
    if not all(isinstance(a, str) and len(a) == 1 and "A" <= a <= "Z" for a in answers):
        return [()] * len(table)
    if "choices" not in table:
        return [tuple(letters(ord(max(answers)) - ord("A") + 1))] * len(table)
    return [tuple(letters(len(choices))) for choices in table["choices"]]


def first_tokens(lvlm: LVLM, options: Sequence[str]) -> dict[str, list[int]]:
    """Tokens with which each option can begin, in its spellings, without those that say nothing about which it is.

    Empty if no first token tells one of the options from the others, or the tokenizer knows none.
    """
    tokenizer = lvlm.processor.tokenizer
    begins: dict[str, set[int]] = {}
    for option in options:
        # "a" is a word, not the letter A
        spellings = {option} if len(option) == 1 else {option, option.lower(), option.capitalize(), option.upper()}
        ids = {
            tokenizer.encode(before + text, add_special_tokens=False)[0] for text in spellings for before in ("", " ")
        }
        begins[option] = {i for i in ids if i != tokenizer.unk_token_id and tokenizer.decode([i]).strip()}
    shared = {i for i in set().union(*begins.values()) if sum(i in ids for ids in begins.values()) > 1}
    own = {option: sorted(ids - shared) for option, ids in begins.items()}
    return own if all(own.values()) else {}


# ------------------------------------------------------------------------------------------------- pictures
def _picture_sha256(image: Any) -> str:
    pixels = np.asarray(image)
    return hashlib.sha256(f"{type(image).__name__} {pixels.shape}".encode() + pixels.tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------------- answers on disk
class _Answers:
    """Answers by key, in memory and in one file of JSON lines that only grows.

    Each line ends with a digest of the rest and of the file's name: what was cut off by a kill, damaged, edited or
    taken from another model's file does not prove itself, is left out when it is read, and so is answered again.
    """

    def __init__(self, folder: str | Path | None, lvlm: LVLM, max_new_tokens: int, batch_size: int) -> None:
        self.known: dict[str, dict] = {}
        self.new: list[str] = []
        self.path = None
        self.identity = Identity()
        if folder is None:
            return
        name = digests.of_values([model_digest(lvlm), max_new_tokens, batch_size])[:32]
        self.path, self._name = Path(folder) / f"{name}.jsonl", name.encode()
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        except OSError as problem:
            return self._give_up(problem)
        for line in lines:
            said, _, digest = line.rpartition(b" ")
            if self._digest(said).encode() == digest:
                answer = json.loads(said)
                self.known[answer.pop("key")] = answer

    def told(self, how: Intervention) -> str | None:
        """What an intervention does, as a digest; None if it cannot be told, or nothing is kept."""
        if self.path is None:
            return None
        try:
            return self.identity([how.name, how.around, how.parameters, how.keeps, how.asks])
        except Unknown as problem:
            warnings.warn(f"answers under {how.name!r} are not kept: {problem}", stacklevel=3)
            return None

    def add(self, key: str | None, answer: dict) -> None:
        if key is not None:
            said = json.dumps({"key": key, **answer}, allow_nan=False)
            self.new.append(f"{said} {self._digest(said.encode())}\n")

    def write(self) -> None:
        if self.path is not None and self.new:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab") as file:
                    # the line break closes a line that was cut off
                    file.write(("\n" + "".join(self.new)).encode())
            except OSError as problem:
                self._give_up(problem)
        self.new.clear()

    def _digest(self, said: bytes) -> str:
        return hashlib.sha256(self._name + said).hexdigest()

    def _give_up(self, problem: OSError) -> None:
        warnings.warn(f"answers are not kept, and a run that is killed begins anew: {problem}", stacklevel=4)
        self.path = None
