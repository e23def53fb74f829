"""What a token tells: linear probes on its vector, and the word that the language model makes of it.

A probe is a ridge regression, solved in closed form, from the vector of one token to something known about its
picture or its patch. It is fitted on some pictures and judged on others. It shows what can be read from a token by a
linear map, not what the model reads there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import nn

from sinkstudy import stats
from sinkstudy.model.capture import hidden_states, not_finite, token_norms
from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM

PENALTIES = tuple(10.0**k for k in range(-4, 3))
"""Ridge penalties to choose from, each times the number of rows."""

LEAST = 50
"""A group of tokens that fewer pictures have is not probed."""


class Ridge:
    """Ridge regression from the same tokens to any number of targets, in float64.

    Tokens are standardised by the mean and standard deviation of those given here; the intercept is not penalised. The
    penalty is chosen from `PENALTIES` for all targets of a call together, by the exact leave-one-out error of the ridge
    solution (PRESS; Hastie, Tibshirani & Friedman 2009, section 7.10), so no rows are set apart for it.

    Args:
        tokens: [n, width], one row a token.

    Raises:
        ValueError: fewer than three rows, or values that are not finite.
    """

    def __init__(self, tokens: torch.Tensor):
        x = tokens.double()
        if len(x) < 3 or not x.isfinite().all():
            raise ValueError(f"a probe needs three rows of finite values at least, got {list(x.shape)}")
        self.mean, sd = x.mean(0), x.std(0, correction=0)
        self.scale = torch.where(sd > 1e-12 * sd.max(), sd, torch.inf)  # a dimension that does not vary says nothing
        x = (x - self.mean) / self.scale
        if x.shape[0] >= x.shape[1]:
            energy, self.axes = torch.linalg.eigh(x.T @ x)  # [d], [width, d]
        else:
            energy, left = torch.linalg.eigh(x @ x.T)
            self.axes = x.T @ left / energy.clamp(min=1e-10 * energy.max()).sqrt()
        self.energy = energy.clamp(min=0)
        self.scores = x @ self.axes  # [n, d]
        n = len(x)
        self.shrunk = torch.stack([1 / (self.energy + n * penalty) for penalty in PENALTIES])  # [penalties, d]
        # of each row on its own prediction, [penalties, n]; that of the intercept is 1 / n
        self.leverage = 1 / n + self.shrunk @ self.scores.square().T

    def predict(self, targets: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Fit `targets` [n, k], all under one penalty, and predict them for `new` tokens [m, width]: float64 [m, k]."""
        y = targets.double()
        offset = y.mean(0)
        moments = self.scores.T @ (y - offset)  # [d, k]
        errors = []  # squared, of each row when it is left out, summed
        for shrunk, leverage in zip(self.shrunk, self.leverage, strict=True):
            residual = y - offset - self.scores @ (shrunk[:, None] * moments)
            errors.append((residual / (1 - leverage).clamp(min=1e-9)[:, None]).square().sum())
        best = int(torch.stack(errors).argmin())
        weights = self.axes @ (self.shrunk[best][:, None] * moments)  # [width, k]
        return (new.double() - self.mean) / self.scale @ weights + offset

    def classify(self, labels: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The class of each new token by one ridge regression a class: labels long [n], new [m, width] -> long [m]."""
        classes = labels.unique()
        return classes[self.predict(labels[:, None] == classes, new).argmax(1)]


def explained_variance(truth: torch.Tensor, predicted: torch.Tensor) -> np.ndarray:
    """What each picture adds to the explained variance 1 − SSE / SST: two [pictures, tokens, k] -> float64 [pictures].

    SSE and SST are summed over everything, SST about the mean of `truth`; tokens of NaN are left out. The mean of the
    result is the explained variance, and its spread over pictures is that of this ratio of sums to first order
    (linearisation), so that intervals and paired differences over pictures are those of the ratio. All is NaN if the
    truth does not vary.
    """
    truth, predicted = truth.double(), predicted.double()
    sse = (truth - predicted).square().nansum((1, 2)).numpy()
    sst = (truth - truth.flatten(0, 1).nanmean(0)).square().nansum((1, 2)).numpy()
    if sst.sum() == 0:
        return np.full(len(truth), np.nan)
    unexplained = sse.sum() / sst.sum()
    return 1 - unexplained - (sse - unexplained * sst) / sst.mean()


def hit_rates(
    tokens: torch.Tensor, labels: Mapping[str, torch.Tensor], n_fit: int, n: int | None = None
) -> dict[str, np.ndarray]:
    """How often a probe on some pictures reads each label rightly from the tokens of the others.

    Args:
        tokens: [pictures, tokens, width]; a token of NaN is not there.
        labels: for each what is read, long [pictures, tokens].
        n_fit: the pictures behind so many, the first, are those to judge on.
        n: so many pictures, the first, are fitted on; all `n_fit` by default.

    Returns:
        For each label the share of its tokens that are read rightly, 0–1, float [pictures to judge on]; NaN for a
        picture without token, and for all where fewer than `LEAST` pictures have one to fit on.
    """
    n = n_fit if n is None else n
    probe = _fitted(tokens, n_fit, n) if labels else None
    if probe is None:
        return {what: np.full(len(tokens) - n_fit, np.nan) for what in labels}
    ridge, there = probe
    found = {}
    for what, of in labels.items():
        said = ridge.classify(of[:n][there[:n]], tokens[n_fit:][there[n_fit:]])
        hit = torch.full(there[n_fit:].shape, float("nan"), dtype=torch.float64)
        hit[there[n_fit:]] = (said == of[n_fit:][there[n_fit:]]).double()
        found[what] = hit.nanmean(1).numpy()
    return found


def explained(tokens: torch.Tensor, targets: torch.Tensor, n_fit: int) -> np.ndarray:
    """Explained variance of numbers read by a probe on the first pictures: as `hit_rates`, 0–1 in the mean.

    Args:
        tokens, n_fit: as in `hit_rates`.
        targets: [pictures, tokens, k].

    Returns:
        What each picture to judge on adds, see `explained_variance`; NaN as in `hit_rates`.
    """
    found = np.full(len(tokens) - n_fit, np.nan)
    if probe := _fitted(tokens, n_fit, n_fit):
        ridge, there = probe
        truth = targets[n_fit:].double().masked_fill(~there[n_fit:, :, None], float("nan"))
        said = torch.full(truth.shape, float("nan"), dtype=torch.float64)
        said[there[n_fit:]] = ridge.predict(targets[:n_fit][there[:n_fit]], tokens[n_fit:][there[n_fit:]])
        some = there[n_fit:].any(1)
        found[some] = explained_variance(truth[some], said[some])
    return found


def _fitted(tokens: torch.Tensor, n_fit: int, n: int) -> tuple[Ridge, torch.Tensor] | None:
    """A probe on the tokens of the first n pictures, and which tokens are there; None where there are too few."""
    there = tokens.isfinite().all(-1)
    enough = there[:n].any(1).sum() >= LEAST and there[n_fit:].any()
    return (Ridge(tokens[:n][there[:n]]), there) if enough else None


@dataclass(frozen=True)
class States:
    """What `states` saw of every picture, on the CPU in float32."""

    stages: dict[tuple[str, int], torch.Tensor]  # (side, layer) -> [pictures, readings, width], in order of the pass
    prefix: dict[int, torch.Tensor]  # vision layer -> [pictures, prefix tokens, width] of the first tile
    norms: list[torch.Tensor]  # [patches] of each picture, where the connector reads
    layouts: list[ImageLayout]  # of each picture within its batch


@torch.no_grad()
def states(
    lvlm: LVLM,
    pictures: Sequence[Any],
    choose: Callable[[int, ImageLayout, torch.Tensor], torch.Tensor],
    *,
    followed: int,
    batch_size: int = 32,
) -> States:
    """Vectors of chosen tokens from the first vision layer to the last decoder layer, one pass a picture.

    The prompt is empty: in a causal decoder a question, which comes later, cannot reach the visual tokens. Under a
    prefix mask it could.

    Args:
        choose: gets a picture's index, layout and norms at `feature_layer`, [patches]; returns float [readings,
            patches], in each row the weights of the patches whose vectors are averaged. One patch of weight 1 reads
            that token; a row of NaN gives NaN. In the decoder a patch stands for the visual token that it is part of.
        followed: so many readings, the first, are kept in all stages; the others at `feature_layer` only.

    Returns:
        Stages ("tower", layer), layers from 0 to `feature_layer`; ("connector", 0), the visual tokens as they enter the
        decoder; ("decoder", layer).

    Raises:
        ValueError: values that are not finite, with layer and picture.
    """
    found: dict[tuple[str, int], list] = {}
    prefix: dict[int, list] = {}
    norms, layouts = [], []
    for of, inputs in lvlm.batches(pictures, batch_size):
        layers = range(lvlm.feature_layer + 1)
        with (
            hidden_states(lvlm, "vision", lambda hidden, _: hidden.flatten(0, -2), layers) as tower,
            hidden_states(lvlm, "decoder", lambda hidden, _: hidden) as decoder,
            _entering(lvlm) as calls,
        ):
            lvlm.model(**inputs, logits_to_keep=1)
        for i, layout in enumerate(lvlm.layout(inputs)):
            patches = layout.vision.to(lvlm.device)
            for layer, (hidden,) in tower.items():
                if not hidden[patches].isfinite().all():
                    raise not_finite(lvlm, f"behind layer {layer} of the tower", of.start + i)
            norm = token_norms(tower[lvlm.feature_layer][0][patches]).cpu()
            weights = choose(of.start + i, layout, norm).to(lvlm.device)
            places = layout.positions[:, 0].clamp(min=0).to(lvlm.device)
            first = int(layout.vision[0]) - lvlm.n_prefix
            for layer, (hidden,) in tower.items():
                kept = weights if layer == lvlm.feature_layer else weights[:followed]
                found.setdefault(("tower", layer), []).append((kept @ hidden[patches].float()).cpu())
                prefix.setdefault(layer, []).append(hidden[first : first + lvlm.n_prefix].float().cpu())
            inside = {("connector", 0): calls[0]["inputs_embeds"]}
            inside |= {("decoder", layer): hidden for layer, (hidden,) in decoder.items()}
            for stage, hidden in inside.items():
                if not hidden[i, places].isfinite().all():
                    raise not_finite(lvlm, f"behind layer {stage[1]} of the {stage[0]}", of.start + i)
                found.setdefault(stage, []).append((weights[:followed] @ hidden[i, places].float()).cpu())
            norms.append(norm)
            layouts.append(layout)
    return States(
        stages={stage: torch.stack(rows) for stage, rows in found.items()},
        prefix={layer: torch.stack(rows) for layer, rows in prefix.items()},
        norms=norms,
        layouts=layouts,
    )


@contextmanager
def _entering(lvlm: LVLM) -> Iterator[list[dict]]:
    """The arguments of every call of the decoder, by name."""
    calls: list[dict] = []
    with lvlm.decoder.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True):
        yield calls


@dataclass(frozen=True)
class Words:
    """Ids of the most likely next word at each visual token of a picture, on the CPU."""

    alone: torch.Tensor  # [visual tokens], nothing else to attend to
    behind_first: torch.Tensor  # [visual tokens], attending to the first token of the prompt and itself
    lens: torch.Tensor  # [decoder layers, visual tokens], in the ordinary pass: final norm and LM head after each layer


@torch.no_grad()
def words(lvlm: LVLM, pictures: Sequence[Any], *, batch_size: int = 32) -> list[Words]:
    """The word that the language model makes of every visual token, alone and by the logit lens.

    Alone is the isolated decoding of the paper (2510.08510): all attention between the token and others is blocked,
    from the first decoder layer to the last. That is a sequence of one token, as which each is run here. It then
    attends to itself only, so its position has no effect. The second reading leaves it the first token of the prompt
    (BOS, where the prompt begins with it), on which decoders rest their attention, at the distance that it has.

    Raises:
        ValueError: if features are added behind decoder layers as well (Qwen3-VL), so that no token stands alone.
    """
    if lvlm.spec.deepstack:
        raise ValueError(f"{lvlm.name}: features are added behind decoder layers too, so no visual token stands alone")
    out = []
    for _, inputs in lvlm.batches(pictures, batch_size):
        with hidden_states(lvlm, "decoder", lambda hidden, _: hidden) as decoder, _entering(lvlm) as calls:
            lvlm.model(**inputs, logits_to_keep=1)
        embeddings, positions = calls[0]["inputs_embeds"], calls[0].get("position_ids")
        n_tokens = embeddings.shape[1]
        if positions is None:
            positions = torch.arange(n_tokens, device=lvlm.device)
        positions = positions.expand(*positions.shape[:-2], len(embeddings), n_tokens)
        for i, layout in enumerate(lvlm.layout(inputs)):
            first = int(inputs["attention_mask"][i].argmax())  # behind the padding
            visual = layout.visual.to(lvlm.device)
            pair = torch.stack([torch.full_like(visual, first), visual], 1)  # [visual tokens, 2]
            at = positions[..., i, :]  # [tokens], for M-RoPE [axes, tokens]
            lens = [lvlm.unembed(hidden[i, visual]).argmax(-1) for (hidden,) in decoder.values()]
            out.append(
                Words(
                    alone=_next_word(lvlm, embeddings[i, visual[:, None]], at[..., visual[:, None]]).cpu(),
                    behind_first=_next_word(lvlm, embeddings[i, pair], at[..., pair]).cpu(),
                    lens=torch.stack(lens).cpu(),
                )
            )
    return out


def _next_word(lvlm: LVLM, embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Most likely next token of short sequences: [sequences, tokens, width], [.., sequences, tokens] -> [sequences]."""
    n = embeddings.shape[1]
    # said outright, because models read other things out of a jump in position, or let a prompt see all of itself
    hidden = torch.full((n, n), torch.finfo(embeddings.dtype).min, dtype=embeddings.dtype, device=embeddings.device)
    mask = hidden.triu(1).expand(len(embeddings), 1, n, n)  # causal
    out = lvlm.decoder(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False)
    head: nn.Module = lvlm.model.get_output_embeddings()
    return head(out.last_hidden_state[:, -1]).argmax(-1)


def entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy of histograms in bits: [.., words] -> [..]; 0 for an empty one. Too low where there are few counts."""
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(scipy.stats.entropy(counts, base=2, axis=-1))


def entropy_difference(first: np.ndarray, others: np.ndarray, *, seed: int = 0) -> stats.Interval:
    """Entropy of a pooled histogram minus the mean entropy of others, in bits, with an interval over pictures.

    Args:
        first: [pictures, words], how often each word was said in each picture.
        others: [draws, pictures, words], the same for draws of a control, of as many words a picture: an entropy
            counted from few words is too low, alike in groups of one size.

    Returns:
        The difference; percentile bootstrap over pictures. `n` is the number of pictures in which anything was said;
        fewer than two give no estimate, and `n` 0.
    """
    said = first.sum(-1) > 0
    n = int(said.sum())
    if n < 2:
        return stats.NOTHING
    first, others = first[said].astype(float), others[:, said].astype(float)

    def difference(times: np.ndarray) -> np.ndarray:  # how often each picture was drawn, [.., pictures]
        pooled = [entropy(times @ draw) for draw in others]
        return entropy(times @ first) - np.mean(pooled, axis=0)

    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), stats.RESAMPLES)  # [resamples, pictures]
    low, high = np.quantile(difference(drawn), [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2])
    return stats.Interval(float(difference(np.ones(n))), float(low), float(high), n)
