"""Training data in LLaVA's format: pictures with conversations about them.

A file holds a JSON list of `{"id": .., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>What is
it?"}, {"from": "gpt", "value": "A cat."}, ..]}`; the pictures lie in a folder. As LLaVA does (2310.03744), the picture
goes before the first question, wherever the marker stands, and the loss is on the answers and the tokens that end them.
"""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature

from sinkstudy import digests
from sinkstudy.answers.evaluate import Prefixes
from sinkstudy.model.lvlm import LVLM
from sinkstudy.pictures import check, opened
from sinkstudy.progress import Progress

MARKER = "<image>"


@dataclass(frozen=True)
class Sample:
    """A conversation about a picture: (question, answer) after (question, answer)."""

    id: str
    image: Any  # a path, or what else `pictures.opened` takes
    turns: tuple[tuple[str, str], ...]


def read(file: str | Path, images: str | Path, *, outside: bool = False) -> list[Sample]:
    """Read a file and check it and its pictures; how many samples have no picture, and are left out, is said on stderr.

    Args:
        images: the folder of pictures.
        outside: whether pictures may lie outside of it, by `../`, an absolute path or a link.

    Raises:
        ValueError: not such a file, or no sample with a picture; a sample, by its id, whose picture is not there, not
            in the folder or not whole, or whose conversation is empty or not by human and gpt in turn.
    """
    file, images = Path(file), Path(images)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(found, list):
        raise ValueError(f"{file} holds no list of samples")
    if not images.is_dir():
        raise ValueError(f"the folder of pictures {images} is not there")
    samples = [_sample(file, i, raw, images) for i, raw in enumerate(found)]
    shown = [sample for sample in samples if sample is not None]
    if not shown:
        raise ValueError(f"{file} has no sample with a picture")
    if lost := [sample for sample in shown if not sample.image.is_file()]:
        raise ValueError(
            f"{file}: {len(lost)} of {len(shown)} pictures are not there, the first is that of sample {lost[0].id!r}: "
            f"{lost[0].image}"
        )
    inside = images.resolve()
    for sample in () if outside else shown:
        if not sample.image.resolve().is_relative_to(inside):
            raise ValueError(
                f"{file}: the picture of sample {sample.id!r} lies outside of {images} ({sample.image}): "
                "move it there, or allow this with --outside"
            )
    damaged = []
    files = {sample.image: sample.id for sample in shown}
    with Progress("pictures", len(files)) as bar:
        for image, name in files.items():
            try:
                check(image)
            except ValueError as problem:
                damaged.append(f"sample {name!r}: {problem}")
            bar.update()
    if damaged:
        more = f" ({len(damaged)} of {len(files)} pictures are damaged)" if len(damaged) > 1 else ""
        raise ValueError(f"{file}: {damaged[0]}{more}")
    if len(shown) < len(samples):
        left_out = len(samples) - len(shown)
        print(f"{file}: {left_out} of {len(samples)} samples without picture left out", file=sys.stderr)
    return shown


def _sample(file: Path, index: int, raw: Any, images: Path) -> Sample | None:
    """A checked sample; None if it has no picture."""
    name = f"{file}: sample {raw.get('id', index) if isinstance(raw, dict) else index!r}"
    said = raw.get("conversations") if isinstance(raw, dict) else None
    if not isinstance(said, list) or not said:
        raise ValueError(f"{name} has no conversation")
    if not raw.get("image"):
        return None
    if not isinstance(raw["image"], str):
        raise ValueError(f"{name} has several pictures; only one is possible")
    speakers = [turn.get("from") for turn in said if isinstance(turn, dict) and isinstance(turn.get("value"), str)]
    if speakers != ["human", "gpt"] * (len(said) // 2) or len(speakers) != len(said):
        raise ValueError(f"{name} is not by human and gpt in turn, ending with gpt")
    questions = [turn["value"].replace(MARKER, "").strip() for turn in said[::2]]
    answers = [turn["value"].strip() for turn in said[1::2]]
    if not all(answers) or any(MARKER in answer for answer in answers):
        raise ValueError(f"{name} has an answer that is empty or contains {MARKER}")
    return Sample(str(raw.get("id", index)), images / raw["image"], tuple(zip(questions, answers, strict=True)))


def sample_key(sample: Sample, images: Path) -> str:
    """What a sample is, wherever its folder of pictures lies: its id, its picture's name and content, what is said."""
    name = os.path.relpath(sample.image, images)
    return json.dumps([sample.id, name, digests.sha256(sample.image), sample.turns])


class Collate:
    """Makes batches for `loop.fit` and `loop.Method`: on the CPU, padded on the left.

    A batch has `inputs`, `Prefixes` of whole conversations [batch, tokens] with the first question of each as
    `questions`, and `labels`, long [batch, tokens], -100 where no loss is taken. The conversations are in the model's
    own chat format. Where that ends no answer with a token at which the model would stop, the tokenizer's end token is
    put behind the answer.

    Args:
        longest: tokens, those of the picture included; what is longer is cut off, with a warning.

    Raises:
        ValueError: no end token is known; when called, a picture that cannot be read, a sample whose first answer does
            not begin within `longest`, or a chat format that writes a conversation's beginning otherwise once it goes
            on.
    """

    def __init__(self, lvlm: LVLM, longest: int = 2048) -> None:
        self.lvlm, self.longest, self.dtype = lvlm, longest, lvlm.model.dtype
        self.single = _is_single(lvlm)
        tokenizer = lvlm.processor.tokenizer
        self.ends = {tokenizer.eos_token_id, *lvlm.ends} - {None}
        if not self.ends:
            raise ValueError(f"{lvlm.name}: neither the tokenizer nor the generation's settings name an end token")
        self.end = ""
        if not self.single:
            begun, whole = self._ids([("a",)]), self._ids([("a", "a")])
            self.end = "" if self.ends.intersection(whole[len(begun) :]) else tokenizer.eos_token

    def __call__(self, samples: list[Sample], places: list[int]) -> dict[str, Any]:
        lvlm = self.lvlm
        pictures = [opened(sample.image, str(sample.image)) for sample in samples]
        if self.single:
            text = {"text": [lvlm.prompt(s.turns[0][0]) for s in samples], "suffix": [s.turns[0][1] for s in samples]}
        else:
            text = {"text": [self._text(self._closed(sample)) for sample in samples]}
        batch = lvlm.processor(
            images=[[picture] for picture in pictures],
            **text,
            padding=True,
            padding_side="left",
            add_special_tokens=lvlm.adds_bos(text["text"][0]),
            return_tensors="pt",
        )
        labels = batch.pop("labels", None)  # which only the processor of such a single prompt makes
        if not self.single:
            labels = torch.full_like(batch["input_ids"], -100)
            for row, sample in enumerate(samples):
                self._mark(labels[row], batch["input_ids"][row], sample)
        batch, labels = self._cut(batch, labels, samples)
        inputs = Prefixes(batch, [s.id for s in samples], [s.turns[0][0] for s in samples])
        return {"inputs": inputs.to(dtype=self.dtype), "labels": labels}

    def _closed(self, sample: Sample) -> list[tuple[str, str]]:
        return [(question, answer + self.end) for question, answer in sample.turns]

    def _text(self, turns: Sequence[tuple[str, ...]]) -> str:
        """A conversation in the chat format. The last turn may lack its answer; then the text ends where it begins."""
        messages = []
        for i, (question, *answer) in enumerate(turns):
            content = [*([{"type": "image"}] if i == 0 else []), {"type": "text", "text": question}]
            messages.append({"role": "user", "content": content})
            messages += [{"role": "assistant", "content": [{"type": "text", "text": a}]} for a in answer]
        return self.lvlm.processor.apply_chat_template(messages, add_generation_prompt=len(turns[-1]) == 1)

    def _ids(self, turns: Sequence[tuple[str, ...]]) -> list[int]:
        """Tokens of a conversation, with the picture as its marker."""
        text = self._text(turns)
        return self.lvlm.processor.tokenizer(text, add_special_tokens=self.lvlm.adds_bos(text))["input_ids"]

    def _mark(self, labels: torch.Tensor, ids: torch.Tensor, sample: Sample) -> None:
        """Put the tokens of the answers, each with its end token, into `labels`.

        An answer begins where the conversation ends that stops before it, and ends with the next end token. The picture
        has more tokens in `ids` than its one marker, so places count from the end.
        """
        turns = self._closed(sample)
        whole = self._ids(turns)
        for k, (question, _) in enumerate(turns):
            begun, closed = self._ids([*turns[:k], (question,)]), self._ids(turns[: k + 1])
            start = len(begun)
            end = next((i + 1 for i in range(start, len(closed)) if closed[i] in self.ends), 0)
            tail = ids[len(ids) - (len(whole) - start) :]
            if not end or whole[:start] != begun or whole[:end] != closed[:end] or tail.tolist() != whole[start:]:
                raise ValueError(
                    f"sample {sample.id!r}: the chat format of {self.lvlm.name} does not go on after question {k + 1} "
                    "as it began, so the tokens of the answer are not known: take another model, or its chat format"
                )
            at = len(labels) - len(whole)
            labels[at + start : at + end] = ids[at + start : at + end]

    def _cut(
        self, batch: BatchFeature, labels: torch.Tensor, samples: list[Sample]
    ) -> tuple[BatchFeature, torch.Tensor]:
        """No more than the first `longest` tokens of each row."""
        lengths = batch["attention_mask"].sum(1)  # [batch]
        if lengths.max() <= self.longest:
            return batch, labels
        for row in (lengths > self.longest).nonzero()[:, 0].tolist():
            name = samples[row].id
            warnings.warn(f"sample {name!r}: cut off, from {lengths[row]} tokens to {self.longest}", stacklevel=2)
        total, kept = batch["input_ids"].shape[1], lengths.clamp(max=self.longest)
        at = (total - lengths - (self.longest - kept))[:, None] + torch.arange(self.longest)  # [batch, longest]
        same = {k: v.gather(1, at) for k, v in batch.items() if v.shape == batch["input_ids"].shape}
        labels = labels.gather(1, at)
        if not (answered := (labels >= 0).any(1)).all():
            name = samples[int(answered.int().argmin())].id
            raise ValueError(f"sample {name!r}: no answer begins within {self.longest} tokens: leave it out")
        return BatchFeature({**batch, **same}), labels


def fitting(lvlm: LVLM, samples: list[Sample]) -> list[Sample]:
    """The samples; for a model without chat format each question with its answer as a sample of its own.

    Raises:
        ValueError: a sample, by its id, whose text holds one of the tokenizer's special tokens. It would be read as
            that token: what stands behind an end token, say, would get no loss.
    """
    tokens = lvlm.processor.tokenizer.added_tokens_decoder.values()
    special = {token.content for token in tokens if token.special} | set(lvlm.processor.tokenizer.all_special_tokens)
    for sample in samples:
        for text in (text for turn in sample.turns for text in turn):
            if found := sorted(token for token in special if token in text):
                raise ValueError(
                    f"sample {sample.id!r}: {found[0]!r} stands in its text and is a special token of {lvlm.name}: "
                    "write it otherwise, or leave the sample out"
                )
    return [Sample(s.id, s.image, (turn,)) for s in samples for turn in s.turns] if _is_single(lvlm) else samples


def _is_single(lvlm: LVLM) -> bool:
    return bool(lvlm.spec.prompt and not lvlm.processor.chat_template)
