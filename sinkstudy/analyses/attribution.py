"""How much each visual token contributes to an answer: Captum's methods on the log-probability of the answer.

What is explained is f(tokens) = log p(answer | visual tokens, question), in nats, a function of the visual tokens as
the decoder reads them; everything else, question and answer among it, is held fixed. Methods compare a picture's
tokens with a *baseline*, tokens that say nothing about it. Integrated gradients and the Shapley value distribute
f(tokens) - f(baseline) without rest (Sundararajan et al. 2017, 1703.01365; Shapley 1953); gradient x activation and
ablation do not. All raise a ValueError, with the row, for what is not finite.

`occlusion` is the same question in pixels: areas of the picture are painted over before the vision tower sees it.

The second half compares tokens. `matched_groups` says which belong together, and which others each group is held
against; `against_controls`, `whole_groups`, `rank_correlations` and `curves` give observations, a row a measured value,
of several models; `chapter.ratios` and `ratios_between` make estimates of them.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients, ShapleyValueSampling
from PIL import Image, ImageFilter
from transformers import BatchFeature
from transformers.utils import ModelOutput

from sinkstudy import sinks, stats
from sinkstudy.model.capture import not_finite
from sinkstudy.model.groups import lifted, mean
from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM
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
            tokens: broadcast to [rows, visual tokens, decoder width]; by default the pictures' own.
        """
        tokens = self.tokens if tokens is None else tokens.expand_as(self.tokens)
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
    for _, of_batch in lvlm.batches(images, batch_size, questions):
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
def first_of_answer(lvlm: LVLM, images: Sequence[Any], questions: Sequence[str], batch_size: int) -> AnswerLogProb:
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
    added = {"input_ids": read.clamp(min=0), "attention_mask": (read >= 0).long()}
    extended = {}
    for name, values in inputs.items():
        if name in _OF_TOKENS:
            behind = added.get(name, torch.zeros_like(read))  # types of tokens (of an image or not) are 0 in text
            extended[name] = torch.cat([values, behind.to(values.dtype)], dim=1).gather(1, order)
        elif not name.startswith("pixel"):
            extended[name] = values
    return extended


def _finite(f: AnswerLogProb, found: torch.Tensor) -> torch.Tensor:
    """What was found for each row, [rows, ..]. Raises ValueError, with the row, if it is not finite."""
    if (bad := ~found.reshape(len(found), -1).isfinite().all(1)).any():
        raise not_finite(f.lvlm, "in the answer's log-probability or its gradients", int(bad.nonzero()[0]))
    return found


# ------------------------------------------------------------------------------------------------- by token
def integrated_gradients(
    f: AnswerLogProb, baseline: torch.Tensor, *, steps: int, batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integrated gradients (Sundararajan et al. 2017, eq. 1) by Gauss-Legendre steps, summed over a token's entries.

    Args:
        baseline: the tokens that say nothing, broadcast to [rows, visual tokens, decoder width].

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


@dataclass(frozen=True)
class Explained:
    """Answers with what their tokens account for, by integrated gradients; made by `explain`. A row is a question."""

    f: AnswerLogProb
    baseline: torch.Tensor  # [rows, visual tokens, decoder width]
    logp: torch.Tensor  # [rows], log p(answer) of the pictures' own tokens
    gain: torch.Tensor  # [rows], `logp` less that of the baseline: what is distributed
    by_token: torch.Tensor  # [rows, visual tokens], in nats with sign
    delta: torch.Tensor  # [rows], the sum of `by_token` less `gain`

    @property
    def converged(self) -> np.ndarray:
        """Whether the attributions of a row add up to its gain, within 2 % of it: bool [rows]."""
        return (self.delta.abs() <= 0.02 * self.gain.abs()).numpy()

    @property
    def missed(self) -> float:
        """What the sums of all rows miss, in % of what they should be, both without sign."""
        return 100 * self.delta.abs().sum().item() / self.gain.abs().sum().item()

    def take(self, rows: Sequence[int]) -> "Explained":
        """The same of some rows."""
        picked = torch.as_tensor(rows)
        return Explained(self.f.take(rows), self.baseline[picked], self.logp[picked], self.gain[picked],
                         self.by_token[picked], self.delta[picked])  # fmt: skip

    def early(self, share: float = 0.001, batch_size: int = 64) -> float:
        """How much of the gain is there after a small share of the way from the baseline, in %.

        Both are summed over rows without sign, so that it can be more than 100.
        """
        begun = self.f.values(self.baseline + share * (self.f.tokens - self.baseline), batch_size)
        changed = begun - self.f.values(self.baseline, batch_size)
        return 100 * (changed.abs().sum() / self.gain.abs().sum()).item()


def explain(
    f: AnswerLogProb, baseline: torch.Tensor | None = None, *, steps: int = 16, batch_size: int = 64
) -> Explained:
    """Integrated gradients of all rows.

    Args:
        baseline: broadcast to [rows, visual tokens, decoder width]; by default the mean over all tokens of all rows.
    """
    baseline = (f.tokens.mean((0, 1)) if baseline is None else baseline).expand_as(f.tokens)
    logp = f.values(batch_size=batch_size)
    by_token, delta = integrated_gradients(f, baseline, steps=steps, batch_size=batch_size)
    return Explained(f, baseline, logp, logp - f.values(baseline, batch_size), by_token, delta)


# ------------------------------------------------------------------------------------------------- by group
def group_ablation(
    f: AnswerLogProb, baseline: torch.Tensor, groups: torch.Tensor, *, batch_size: int = 64
) -> torch.Tensor:
    """What f loses when the tokens of a group are replaced by the baseline, the others kept: float [rows, groups].

    Args:
        baseline: as in `integrated_gradients`.
        groups: long [rows, visual tokens], the group of each token, from 0; a group without tokens gets 0.
    """
    return _by_group(f, FeatureAblation(f), baseline, groups, batch_size)


def shapley(
    f: AnswerLogProb,
    baseline: torch.Tensor,
    groups: torch.Tensor,
    *,
    samples: int,
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
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # Captum draws from torch's global generator
        warnings.filterwarnings("ignore", message="Feature mask is missing")  # a group may have no tokens
        torch.manual_seed(seed)
        return _by_group(f, ShapleyValueSampling(f), baseline, groups, batch_size, n_samples=samples)


def _by_group(
    f: AnswerLogProb, method: Any, baseline: torch.Tensor, groups: torch.Tensor, batch_size: int, **more: Any
) -> torch.Tensor:
    """A method of Captum's on groups of tokens: float [rows, groups]. It gives every entry of a group its value."""
    baseline, mask = baseline.expand_as(f.tokens), groups.to(f.tokens.device)[..., None]
    found = [
        method.attribute(
            f.tokens[rows], baseline[rows], additional_forward_args=(rows,), feature_mask=mask[rows], **more
        ).detach()
        for rows in f._batches(batch_size)
    ]  # [rows, visual tokens, decoder width] each
    nothing = torch.zeros(len(groups), int(groups.max()) + 1)
    return _finite(f, nothing.scatter(1, groups.cpu(), torch.cat(found)[..., 0].float().cpu()))


# ------------------------------------------------------------------------------------------------- faithfulness
@torch.no_grad()
def perturbed(
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
    batch_size: int,
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

    def logp(shown: torch.Tensor) -> torch.Tensor:
        return answer_log_prob(lvlm, list(shown), questions, answers, batch_size).values(batch_size=batch_size)

    arrays = [np.array(as_image(image)) for image in images]
    pictures = torch.as_tensor(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()  # uint8 [rows, 3, height, width]
    colour = pictures.float().mean((2, 3), keepdim=True).round().to(torch.uint8)
    whole, painted = logp(pictures), [logp(torch.where(area, colour, pictures)) for area in areas]
    return whole[:, None] - torch.stack(painted, dim=1)


# ------------------------------------------------------------------------------------------------- groups of tokens
@dataclass(frozen=True)
class MatchedGroups:
    """Groups of visual tokens, and the tokens that each is held against; made by `matched_groups`."""

    members: dict[str, torch.Tensor]  # bool [images, visual tokens]
    controls: dict[tuple[str, str], torch.Tensor]  # bool [draws, images, visual tokens], by group and control
    norms: torch.Tensor  # [images, visual tokens], the largest of a token's patches; 0 for a token without patches
    on_things: torch.Tensor  # bool [images, visual tokens], at least in part; none if it is not known

    def split(self, names: Sequence[str]) -> torch.Tensor:
        """The first group that each token is in, by its index in `names`: long [images, visual tokens].

        A token of none of them has the index behind the last.
        """
        rest = torch.ones_like(self.norms, dtype=torch.bool)
        return torch.stack([*(self.members[name] for name in names), rest]).int().argmax(0)  # the first that is true


def matched_groups(
    layouts: Sequence[ImageLayout],
    norms: torch.Tensor,
    patches: Mapping[str, torch.Tensor],
    things: torch.Tensor | None = None,
    *,
    draws: int,
    seed: int = 0,
) -> MatchedGroups:
    """Groups of patches as groups of visual tokens; a token belongs to a group if any of its patches does.

    Controls have as many tokens of the same picture, all from outside the group: for every group "random" ones; for
    the sinks also those "next in norm", and random ones of "like place", as many of them on things as of the sinks.
    Random ones are drawn `draws` times. Where a picture has too few, all are taken.

    Args:
        norms: [images, patches], in the tower.
        patches: bool [images, patches] of each group; "sinks" is one.
        things: bool [images, patches], what lies on things; if it is not known, no token is of like place.
    """
    members = {name: lifted(layouts, masks) for name, masks in patches.items()}
    real = lifted(layouts, torch.ones_like(norms))  # all but newline tokens
    on = torch.zeros_like(real) if things is None else lifted(layouts, things)
    of_tokens = lifted(layouts, norms, "max").nan_to_num(0.0)
    places = [] if things is None else [on, real & ~on]
    controls = {
        ("sinks", "like place"): _drawn(members["sinks"], places, draws, seed),
        ("sinks", "next in norm"): sinks.next_in_norm(of_tokens, members["sinks"])[None],
    }
    controls |= {(name, "random"): _drawn(mask, [real], draws, seed) for name, mask in members.items()}
    return MatchedGroups(members, controls, of_tokens, on)


def _drawn(mask: torch.Tensor, places: Sequence[torch.Tensor], draws: int, seed: int) -> torch.Tensor:
    """In each place as many random tokens outside a mask as it has inside: bool [draws, images, visual tokens]."""
    drawn = torch.zeros(draws, *mask.shape, dtype=torch.bool)
    for place in places:
        for draw in range(draws):
            drawn[draw] |= sinks.random_like(mask & place, seed + draw, among=place & ~mask)
    return drawn


def against_controls(
    values: Mapping[str, torch.Tensor], groups: Mapping[str, MatchedGroups], said: pd.DataFrame
) -> pd.DataFrame:
    """The mean over a group's tokens, beside that over its controls'.

    Args:
        values: of each model [questions, visual tokens], in the order of its rows of `said`.
        groups: of each model.
        said: a row a model and question: `model`, and `image`, the index of its picture.

    Returns:
        `said` for each group and control, with `group`, `control`, `inside` and `outside` (mean over draws); NaN where
        a picture has no such tokens.
    """
    rows = []
    for name, of in groups.items():
        asked = said[said.model == name]
        image = torch.tensor(asked.image.to_numpy())
        for (group, control), drawn in of.controls.items():
            inside = mean(values[name], of.members[group][image]).numpy()
            outside = np.mean([mean(values[name], mask[image]).numpy() for mask in drawn], axis=0)
            rows.append(asked.assign(group=group, control=control, inside=inside, outside=outside))
    return pd.concat(rows, ignore_index=True)


def shares(values: Mapping[str, torch.Tensor], groups: Mapping[str, MatchedGroups], said: pd.DataFrame) -> pd.DataFrame:
    """How much of a question's values lies in a group, in %.

    Args:
        values, groups, said: as in `against_controls`, values without sign.

    Returns:
        `said` for each group, with `group` and `value`; NaN for a group that none of the model's pictures has.
    """
    rows = []
    for name, of in groups.items():
        asked = said[said.model == name]
        image = torch.tensor(asked.image.to_numpy())
        for group, mask in of.members.items():
            inside = 100 * (values[name] * mask[image]).sum(1) / values[name].sum(1)
            rows.append(asked.assign(group=group, value=inside.numpy() if mask.any() else np.nan))
    return pd.concat(rows, ignore_index=True)


def ratios_between(seen: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """How many times the ratio of `chapter.ratios` in global questions is that in local ones.

    Both are taken over the images that have all four means.

    Args:
        seen: of `against_controls`, with `type`.
        by: as in `chapter.ratios`.

    Returns:
        As `chapter.ratios`; NaN and `n` 0 where no image has both.
    """
    wanted = [(side, kind) for kind in ("global", "local") for side in ("inside", "outside")]
    rows = []
    for cell, of in seen.groupby(list(by), sort=False):
        means = of.groupby(["image", "type"])[["inside", "outside"]].mean().unstack().reindex(columns=wanted).dropna()
        found = stats.ratio_of_ratios_interval(*means.to_numpy().T)
        rows.append((*cell, *found))
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n"])


def whole_groups(
    explained: Mapping[str, Explained],
    groups: Mapping[str, MatchedGroups],
    said: pd.DataFrame,
    parts: Sequence[str],
    *,
    samples: int,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """What groups are worth to log p(answer) as a whole, in nats: replaced alone, and as Shapley values.

    Args:
        explained, groups: of each model; rows of `explained` as those of `said`.
        said: as in `against_controls`.
        parts: names of groups. A token is in the first that it fits, and in "rest" if it fits none.

    Returns:
        `said` for each group and method ("ablation", "shapley"), with `group`, `method`, `tokens` (how many) and
        `value`; NaN for a group that none of the model's pictures has.
    """
    rows = []
    for name, of in explained.items():
        asked = said[said.model == name]
        member = groups[name].split(parts)[torch.tensor(asked.image.to_numpy())]
        found = {
            "ablation": group_ablation(of.f, of.baseline, member, batch_size=batch_size),
            "shapley": shapley(of.f, of.baseline, member, samples=samples, seed=seed, batch_size=batch_size),
        }
        for index, part in enumerate([*parts, "rest"]):
            tokens = (member == index).sum(1).numpy()
            for method, worth in found.items():
                value = worth[:, index].numpy() if tokens.any() else np.nan
                rows.append(asked.assign(group=part, method=method, tokens=tokens, value=value))
    return pd.concat(rows, ignore_index=True)


# ------------------------------------------------------------------------------------------------- areas of a picture
def ninths(height: int, width: int) -> torch.Tensor:
    """Nine areas, a third of the height and width each, row by row from 0: long [height, width]."""
    return 3 * (torch.arange(height) * 3 // height)[:, None] + torch.arange(width) * 3 // width


def ninths_of_tokens(layout: ImageLayout) -> torch.Tensor:
    """In which of `ninths` each visual token lies, by its last patch: long [visual tokens]; 0 without patches."""
    return layout.lift(ninths(*layout.grid).flatten().repeat(layout.tiles), "max").nan_to_num(0.0).long()


def on_patches(layout: ImageLayout, of_tokens: torch.Tensor) -> torch.Tensor:
    """Values of visual tokens on the patches of a picture's first tile: [visual tokens] -> [rows, columns]."""
    rows, columns = layout.grid
    return layout.lower(of_tokens)[: rows * columns].view(rows, columns)


def as_image(picture: Any) -> Image.Image:
    """A picture, as `pictures.opened` takes it, to be looked at."""
    shown = opened(picture)
    return shown if isinstance(shown, Image.Image) else Image.fromarray(np.asarray(shown).transpose(1, 2, 0))


def blurred(picture: Any) -> Image.Image:
    """A picture without anything much smaller than a quarter of its height."""
    shown = as_image(picture)
    return shown.filter(ImageFilter.GaussianBlur(shown.height / 8))


# ------------------------------------------------------------------------------------------------- methods compared
def rank_correlations(scores: Mapping[str, Mapping[str, torch.Tensor]], said: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of every two methods within a picture.

    Args:
        scores: of each model and method [questions, tokens or areas], in the order of the model's rows of `said`.
        said: as in `against_controls`.

    Returns:
        `said` for each pair, with `first`, `second` (the earlier in the order of `scores`) and `value`, from -1 to 1.
    """
    rows = []
    for name, of in scores.items():
        for index, first in enumerate(of):
            for second in list(of)[:index]:
                alike = scipy.stats.spearmanrho(of[first].numpy(), of[second].numpy(), axis=1).statistic
                rows.append(said[said.model == name].assign(first=first, second=second, value=alike))
    return pd.concat(rows, ignore_index=True)


def curves(
    explained: Mapping[str, Explained],
    scores: Mapping[str, Mapping[str, torch.Tensor]],
    said: pd.DataFrame,
    at: Sequence[float],
    *,
    seed: int,
    batch_size: int = 64,
) -> pd.DataFrame:
    """log p(answer) when the tokens of highest score are `perturbed` by the baseline, or all tokens but these.

    Args:
        explained: of each model; rows as those of `said`.
        scores: of each model and order of tokens, [questions, visual tokens]; a random order joins them.
        said: as in `against_controls`.
        at: shares of the tokens, from 0 to 1; of those between, one token at least.

    Returns:
        `said` for each order, way and share, with `order`, `kept` (bool), `share`, `value` and `random`, the value of
        the random order.
    """
    rows = []
    for name, of in explained.items():
        asked, size = said[said.model == name], of.by_token.shape
        orders = {**scores[name], "random": torch.rand(size, generator=torch.Generator().manual_seed(seed))}
        counts = [max(1, round(share * size[1])) for share in at[1:-1]]
        for kept in (False, True):
            ends = [of.logp - of.gain, of.logp] if kept else [of.logp, of.logp - of.gain]
            found = {}
            for order, score in orders.items():
                between = perturbed(of.f, score, of.baseline, counts, keep=kept, batch_size=batch_size)
                found[order] = torch.cat([ends[0][:, None], between, ends[1][:, None]], dim=1).numpy()
            for order, curve in found.items():
                for share, value, random in zip(at, curve.T, found["random"].T, strict=True):
                    rows.append(asked.assign(order=order, kept=kept, share=share, value=value, random=random))
    return pd.concat(rows, ignore_index=True)


def advantage(seen: pd.DataFrame) -> pd.DataFrame:
    """How much better than a random order: the mean distance between the curves over all shares, in nats.

    Args:
        seen: of `curves`, with `question`.

    Returns:
        A row a question, order and way: `model`, `image`, `question`, `order`, `way` ("deletion", "insertion") and
        `value`, above 0 where the order finds what matters.
    """
    own = seen[seen.order != "random"]
    apart = (own.value - own.random) * np.where(own.kept, 1, -1)
    own = own.assign(apart=apart, way=np.where(own.kept, "insertion", "deletion"))
    by = own.groupby(["model", "image", "question", "order", "way"], sort=False)[["apart", "share"]]
    return by.apply(lambda of: np.trapezoid(of.apart, of.share)).reset_index(name="value")
