"""How much each visual token contributes to an answer: Captum's methods on the log-probability of the answer.

What is explained is f(tokens) = log p(answer | visual tokens, question), in nats, a function of the visual tokens as
the decoder reads them; everything else, question and answer among it, is held fixed. Methods compare a picture's
tokens with a *baseline*, tokens that say nothing about it. Integrated gradients and the Shapley value distribute
f(tokens) - f(baseline) without rest (Sundararajan et al. 2017, 1703.01365; Shapley 1953); gradient x activation and
ablation do not. All raise a ValueError, with the row, for what is not finite.

`occlusion` is the same question in pixels: areas of the picture are painted over before the vision tower sees it.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients, ShapleyValueSampling
from PIL import Image
from transformers import BatchFeature
from transformers.utils import ModelOutput

from sinkstudy.model.capture import not_finite
from sinkstudy.model.loading import LVLM, ImageLayout
from sinkstudy.pictures import opened

_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # inputs [rows, tokens]


@dataclass(frozen=True)
class AnswerLogProb:
    """log p(answer) of some questions, as a function of their visual tokens; made by `answer_log_prob`.

    A row is a question with its picture and its answer. The log-probability is natural and summed over the answer's
    tokens, each given those before it.
    """

    lvlm: LVLM
    tokens: torch.Tensor  # [rows, visual tokens, decoder width], what the model makes of the pictures
    layouts: list[ImageLayout]  # of the rows; `lift` brings a mask of patches to the visual tokens
    prompts: dict[str, torch.Tensor]  # the model's inputs but for the pictures, each [rows, ..], padded on the left
    answers: torch.Tensor  # long [rows, longest answer], padded on the left with -1
    encoded: ModelOutput  # of the tower; its tokens are replaced by those that are asked about
    deepstack: list[torch.Tensor]  # [rows, visual tokens, width] a layer, added in the decoder (Qwen3-VL): held fixed

    def __len__(self) -> int:
        return len(self.tokens)

    def __call__(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """log p(answer of a row | tokens): float32 [m], with gradients to `tokens`.

        Args:
            tokens: [m, visual tokens, decoder width].
            rows: long [m], the question and answer that each is read with.
        """
        logits, answers = self._logits(tokens, rows), self.answers[rows]
        logp = logits.float().log_softmax(-1).gather(-1, answers.clamp(min=0)[..., None])[..., 0]
        return (logp * (answers >= 0)).sum(-1)

    def _logits(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What the model says at each place of the answer: [m, longest answer, vocabulary]."""
        encoded = copy.copy(self.encoded)
        # some architectures want the batch as one tensor, the others one tensor a picture
        encoded.pooler_output = tokens if torch.is_tensor(self.encoded.pooler_output) else list(tokens)
        if self.deepstack:
            encoded.deepstack_features = [list(of_layer[rows]) for of_layer in self.deepstack]
        return self.lvlm.model(
            **{name: values[rows] for name, values in self.prompts.items()},
            mm_encoder_outputs={"image": encoded},
            logits_to_keep=self.answers.shape[1],
            use_cache=False,
        ).logits

    @torch.no_grad()
    def values(self, tokens: torch.Tensor | None = None, batch_size: int = 64) -> torch.Tensor:
        """log p(answer) of every row, without gradients: float32 [rows], on the CPU.

        Args:
            tokens: [rows, visual tokens, decoder width]; by default the pictures' own.
        """
        tokens = self.tokens if tokens is None else tokens
        return _finite(self, torch.cat([self(tokens[rows], rows) for rows in self._batches(batch_size)]).cpu())

    def take(self, rows: Sequence[int]) -> "AnswerLogProb":
        """The same function of some of its rows."""
        picked = torch.as_tensor(rows)
        return replace(
            self,
            tokens=self.tokens[picked],
            layouts=[self.layouts[row] for row in rows],
            prompts={name: values[picked] for name, values in self.prompts.items()},
            answers=self.answers[picked],
            deepstack=[of_layer[picked] for of_layer in self.deepstack],
        )

    def _batches(self, size: int) -> tuple[torch.Tensor, ...]:
        return torch.arange(len(self), device=self.tokens.device).split(max(1, size))


@torch.no_grad()
def answer_log_prob(
    lvlm: LVLM, images: Sequence[Any], questions: Sequence[str], answers: Sequence[str], batch_size: int = 32
) -> AnswerLogProb:
    """Read pictures, questions and answers, and make f(tokens) = log p(answer | tokens, question) of them.

    Args:
        images, questions: as `LVLM.inputs` takes them, one question a picture.
        answers: the answer of each question as text. It follows the prompt after a space, unless the prompt ends in
            white space. Of an answer without tokens, the end of the text is explained.

    Raises:
        ValueError: no rows; numbers that differ; pictures with different numbers of visual tokens; or an answer of
            several tokens for a model whose whole prompt sees itself (PaliGemma), which would show it the answer.
    """
    if not len(images) == len(questions) == len(answers) or len(images) == 0:
        numbers = f"{len(images)}, {len(questions)}, {len(answers)}"
        raise ValueError(f"each picture needs its question and its answer; got {numbers}")
    inputs = lvlm.inputs(images, questions)
    ids = _answer_ids(lvlm, questions, answers)
    longest = max(map(len, ids))
    if lvlm.spec.prefix_mask and longest > 1:
        raise ValueError(f"{lvlm.name}: its prompt sees itself, so an answer must be one token; {answers} are not")
    layouts = lvlm.layout(inputs)
    if len({len(layout.visual) for layout in layouts}) > 1:
        raise ValueError("pictures of one size are needed; these have different numbers of visual tokens")
    padded = torch.stack([torch.cat([torch.full((longest - len(a),), -1), a]) for a in ids]).to(lvlm.device)

    encoded = []
    for start in range(0, len(images), batch_size):
        stop = start + batch_size
        of_batch = lvlm.inputs(images[start:stop], questions[start:stop])
        pictures = {name: values for name, values in of_batch.items() if name not in _OF_TOKENS}
        encoded.append(lvlm.model.get_image_features(**pictures, return_dict=True))
    rows = (len(images), len(layouts[0].visual), -1)
    return AnswerLogProb(
        lvlm=lvlm,
        tokens=torch.cat([tokens for one in encoded for tokens in one.pooler_output]).reshape(rows),
        layouts=layouts,
        prompts=_with_answers(inputs, padded),
        answers=padded,
        encoded=encoded[0],
        deepstack=[
            torch.stack([tokens for of_batch in of_layer for tokens in of_batch])
            for of_layer in zip(*(getattr(one, "deepstack_features", None) or [] for one in encoded))
        ],
    )


@torch.no_grad()
def first_of_answer(lvlm: LVLM, images: Sequence[Any], questions: Sequence[str], batch_size: int = 32) -> AnswerLogProb:
    """f(tokens) = log p(first token of the model's own greedy answer | tokens, question), see `answer_log_prob`.

    Raises:
        ValueError: no rows; numbers that differ; or pictures with different numbers of visual tokens.
    """
    f = answer_log_prob(lvlm, images, questions, [""] * len(questions), batch_size)
    said = [f._logits(f.tokens[rows], rows)[:, -1].argmax(-1) for rows in f._batches(batch_size)]
    return replace(f, answers=torch.cat(said)[:, None])


def _answer_ids(lvlm: LVLM, questions: Sequence[str], answers: Sequence[str]) -> list[torch.Tensor]:
    """Tokens of each answer, long [its tokens]: what tokenising the prompt with the answer adds to the prompt."""
    tokenizer = lvlm.processor.tokenizer
    rows = []
    for question, answer in zip(questions, answers):
        prompt = lvlm.prompt(question)
        whole = prompt + ("" if prompt[-1:].isspace() else " ") * bool(answer) + answer
        start = len(tokenizer.encode(prompt, add_special_tokens=False))
        rows.append(torch.tensor(tokenizer.encode(whole, add_special_tokens=False)[start:] or [tokenizer.eos_token_id]))
    return rows


def _with_answers(inputs: BatchFeature, answers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs without pixels, behind each prompt its answer but for the last token, which nothing is predicted from.

    Every row ends where its answer does. `answers` is padded on the left with -1.
    """
    read = answers[:, :-1]  # [rows, longest - 1]
    real = torch.cat([torch.ones_like(inputs["input_ids"]), (read >= 0).long()], dim=1)
    order = real.argsort(dim=1, stable=True)  # padding between prompt and answer comes to the front
    extended = {}
    for name, values in inputs.items():
        if name in _OF_TOKENS:
            new = {"input_ids": read.clamp(min=0), "attention_mask": (read >= 0).long()}
            # types of tokens (of an image or not) are 0 in text
            longer = torch.cat([values, new.get(name, torch.zeros_like(read)).to(values.dtype)], dim=1)
            extended[name] = longer.gather(1, order)
        elif not name.startswith("pixel"):
            extended[name] = values
    return extended


def _finite(f: AnswerLogProb, found: torch.Tensor) -> torch.Tensor:
    """What was found for each row, [rows, ..]. Raises ValueError, with the row, if it is not finite."""
    bad = ~found.flatten(1).isfinite().all(1) if found.ndim > 1 else ~found.isfinite()
    if bad.any():
        raise not_finite(f.lvlm, "in the answer's log-probability or its gradients", int(bad.nonzero()[0]))
    return found


# ------------------------------------------------------------------------------------------------- by token
def integrated_gradients(
    f: AnswerLogProb, baseline: torch.Tensor, *, steps: int = 16, batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integrated gradients (Sundararajan et al. 2017, eq. 1), summed over a token's entries.

    Args:
        baseline: the tokens that say nothing, broadcast to [rows, visual tokens, decoder width].
        steps: of the Gauss-Legendre quadrature between baseline and tokens.
        batch_size: forward passes at once.

    Returns:
        Attributions, float [rows, visual tokens], in nats with sign; and the convergence delta [rows], the sum of a
        row's attributions minus f(tokens) - f(baseline), which is 0 where the steps suffice.
    """
    method, baseline = IntegratedGradients(f), baseline.expand_as(f.tokens)
    found = [
        method.attribute(
            f.tokens[rows],
            baseline[rows],
            additional_forward_args=(rows,),
            n_steps=steps,
            internal_batch_size=batch_size,
            return_convergence_delta=True,
        )
        for rows in f._batches(batch_size // steps)
    ]
    by_token = torch.cat([by_entry.sum(-1) for by_entry, _ in found])
    return _finite(f, by_token.float().cpu()), torch.cat([delta for _, delta in found]).float().cpu()


def gradient_x_activation(f: AnswerLogProb, *, batch_size: int = 64) -> torch.Tensor:
    """Gradient times activation at the picture itself, summed over a token's entries: float [rows, visual tokens].

    The first-order change of f if a token were taken to zero, with opposite sign; it has no baseline but zero.
    """
    method = InputXGradient(f)
    found = [
        method.attribute(f.tokens[rows].requires_grad_(), additional_forward_args=(rows,))
        for rows in f._batches(batch_size)
    ]
    return _finite(f, torch.cat([by_entry.detach().sum(-1) for by_entry in found]).float().cpu())


# ------------------------------------------------------------------------------------------------- by group
def group_ablation(
    f: AnswerLogProb, baseline: torch.Tensor, groups: torch.Tensor, *, batch_size: int = 64
) -> torch.Tensor:
    """What f loses when the tokens of a group are replaced by the baseline, the others kept: float [rows, groups].

    Args:
        baseline: as in `integrated_gradients`.
        groups: long [rows, visual tokens], the group of each token, from 0; a group without tokens gets 0.
    """
    method, baseline = FeatureAblation(f), baseline.expand_as(f.tokens)
    mask = groups.to(f.tokens.device)[..., None]
    found = [
        method.attribute(f.tokens[rows], baseline[rows], additional_forward_args=(rows,), feature_mask=mask[rows])
        for rows in f._batches(batch_size)
    ]
    return _finite(f, _of_groups(torch.cat(found), groups))


def shapley(
    f: AnswerLogProb,
    baseline: torch.Tensor,
    groups: torch.Tensor,
    *,
    samples: int = 8,
    seed: int = 0,
    batch_size: int = 64,
) -> torch.Tensor:
    """Shapley values of groups of tokens, by sampled orders (Strumbelj & Kononenko 2010): float [rows, groups].

    A group's value is what f gains when its tokens are put back behind those of random other groups. The values of a
    row add up to f(tokens) - f(baseline) whatever the number of samples.

    Args:
        baseline, groups: as in `group_ablation`.
        samples: random orders of the groups, the same for the rows of a batch.
    """
    method, baseline = ShapleyValueSampling(f), baseline.expand_as(f.tokens)
    mask = groups.to(f.tokens.device)[..., None]
    found = []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # Captum draws from torch's global generator
        warnings.filterwarnings("ignore", message="Feature mask is missing")  # a group may have no tokens
        torch.manual_seed(seed)
        for rows in f._batches(batch_size):
            found.append(
                method.attribute(
                    f.tokens[rows],
                    baseline[rows],
                    additional_forward_args=(rows,),
                    feature_mask=mask[rows],
                    n_samples=samples,
                ).detach()
            )
    return _finite(f, _of_groups(torch.cat(found), groups))


def _of_groups(by_entry: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Captum gives every entry of a group the group's value: [rows, tokens, width] -> [rows, groups]."""
    return torch.zeros(len(groups), int(groups.max()) + 1).scatter(1, groups.cpu(), by_entry[..., 0].float().cpu())


# ------------------------------------------------------------------------------------------------- faithfulness
@torch.no_grad()
def replaced(
    f: AnswerLogProb,
    scores: torch.Tensor,
    baseline: torch.Tensor,
    counts: Sequence[int],
    *,
    keep: bool = False,
    batch_size: int = 64,
) -> torch.Tensor:
    """f after the tokens of highest score are replaced by the baseline (deletion): float32 [rows, counts].

    With `keep` all tokens but these are replaced (insertion). Petsiuk et al. 2018 (RISE, 1806.07421) do so in pixels.

    Args:
        scores: float [rows, visual tokens]; among equal scores, the earlier token is first.
        baseline: as in `integrated_gradients`.
        counts: how many tokens.
    """
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1).to(f.tokens.device)
    baseline = baseline.expand_as(f.tokens)
    found = []
    for count in counts:
        gone = (rank >= count) if keep else (rank < count)
        found.append(f.values(torch.where(gone[..., None], baseline, f.tokens), batch_size))
    return torch.stack(found, dim=1)


def occlusion(
    lvlm: LVLM,
    images: Sequence[Any],
    questions: Sequence[str],
    answers: Sequence[str],
    areas: torch.Tensor,
    *,
    batch_size: int = 32,
) -> torch.Tensor:
    """What log p(answer) loses when an area of the picture is painted in the picture's mean colour.

    The vision tower sees the painted picture, so that tokens outside the area change too. Captum's own way to this,
    `LLMAttribution` of an `ImageMaskInput`, takes one picture at a time, and none for Qwen's inputs, which name the
    type of each token and so cannot be lengthened by the answer's ids alone.

    Args:
        images: of one size, each as `pictures.opened` takes it.
        areas: bool [areas, height, width], in pixels.

    Returns:
        Float32 [rows, areas], in nats.
    """
    shown = [opened(image) for image in images]
    arrays = [np.array(image).transpose(2, 0, 1) if isinstance(image, Image.Image) else image for image in shown]
    pictures = torch.stack([torch.as_tensor(array) for array in arrays])  # uint8 [rows, 3, height, width]
    colour = pictures.float().mean((2, 3), keepdim=True).round().to(torch.uint8)
    whole = answer_log_prob(lvlm, list(pictures), questions, answers, batch_size).values(batch_size=batch_size)
    painted = [
        answer_log_prob(lvlm, list(torch.where(area, colour, pictures)), questions, answers, batch_size).values(
            batch_size=batch_size
        )
        for area in areas
    ]
    return whole[:, None] - torch.stack(painted, dim=1)
