"""What counts as a sink: criteria that turn norms, attention or hidden states into masks of tokens.

Every criterion is a pure function of tensors whose last axis is tokens (here: the patches of one image), and
judges each image by itself unless it says otherwise. Leading axes, [images] or [images, layers], are free. A
token is a sink where its mask is True. There is no single right criterion: absolute thresholds mean nothing
across widths, relative ones find a tail in everything. So the study runs several and reports how far they
agree (`jaccard`, `pairwise_jaccard`).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import pandas as pd
import torch

# --- norms: float [.., tokens] -> bool [.., tokens] ---


def absolute(norms: torch.Tensor, tau: float = 100.0) -> torch.Tensor:
    """norm >= tau, the paper's ViT sink (2510.08510). Its 100 is for CLIP-ViT-L/14-336 in LLaVA-1.5-7B."""
    return norms >= tau


def mean_sd(norms: torch.Tensor, k: float = 3.0) -> torch.Tensor:
    """norm > mean + k sd over the image's tokens (population sd).

    Of n tokens, m equal outliers are at most sqrt((n - m) / m) sd above the mean: with 144 patches and k = 3
    the criterion goes blind when more than 14 patches stand out alike.
    """
    return norms > norms.mean(-1, keepdim=True) + k * norms.std(-1, keepdim=True, correction=0)


def percentile(norms: torch.Tensor, q: float = 98.0) -> torch.Tensor:
    """norm > the q-th percentile of the image's norms.

    It marks the same number of tokens in every image whatever they are (two or three of 144 with q = 98): it says
    *which* tokens would be sinks, not whether there are any.
    """
    return norms > torch.quantile(norms, q / 100, dim=-1, keepdim=True)


def top_k(norms: torch.Tensor, k: int) -> torch.Tensor:
    """The k tokens of the highest norms of each image, all where it has fewer; of equal ones, k in all.

    Raises:
        ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"k is 1 at least, not {k}")
    best = norms.topk(min(k, norms.shape[-1]), dim=-1).indices
    return torch.zeros_like(norms, dtype=torch.bool).scatter_(-1, best, True)


def above_median(norms: torch.Tensor, ratio: float = 3.0) -> torch.Tensor:
    """norm >= ratio x the median norm of the image's tokens."""
    return norms >= ratio * norms.quantile(0.5, dim=-1, keepdim=True)


def norm_drop(norms: torch.Tensor, min_ratio: float = 1.5, top: float = 0.25) -> torch.Tensor:
    """The tokens above the largest drop in the sorted norms, if the drop is large enough.

    Sort an image's norms downwards, n_1 >= n_2 >= ..; among the first `top` of them take the i with the
    largest n_i / n_(i+1); tokens 1..i are sinks if that ratio is at least `min_ratio`, otherwise there are
    none. This is our rule: the paper names an adaptive "norm drop" criterion, but its details are not public.
    """
    ordered, order = norms.sort(dim=-1, descending=True)
    n_candidates = max(1, int(top * norms.shape[-1]))
    ratios = ordered[..., :n_candidates] / ordered[..., 1 : n_candidates + 1]  # [.., candidates]
    largest, last = ratios.max(dim=-1, keepdim=True)
    rank = order.argsort(dim=-1)
    return (rank <= last) & (largest >= min_ratio)


NORM_CRITERIA: dict[str, Callable[..., torch.Tensor]] = {  # by name; each takes (norms, threshold)
    "absolute": absolute,
    "mean_sd": mean_sd,
    "percentile": percentile,
    "above_median": above_median,
    "norm_drop": norm_drop,
}


_IN_WORDS = {
    "absolute": "norm at least {:g}",
    "mean_sd": "norm more than {:g} standard deviations above the picture's mean",
    "percentile": "norm above the picture's percentile {:g}",
    "above_median": "norm at least {:g} times the picture's median",
    "norm_drop": "norms above the largest drop in the picture, if that is to 1 / {:g} at least",
}


def in_words(criterion: str, threshold: float) -> str:
    """A rule as a sentence names it, "norm at least 3 times the picture's median"."""
    return _IN_WORDS[criterion].format(threshold)


def rule(criterion: str, threshold: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a sink is: norms, float [.., patches] -> bool [.., patches].

    Args:
        criterion: a name of `NORM_CRITERIA`.
        threshold: the criterion's.

    Raises:
        ValueError: an unknown criterion; of what is returned, norms that are not finite.
    """
    if criterion not in NORM_CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; known: {', '.join(NORM_CRITERIA)}")

    def judge(norms: torch.Tensor) -> torch.Tensor:
        if not norms.isfinite().all():
            raise ValueError("which patches are sinks cannot be told from norms that are NaN or infinite")
        return NORM_CRITERIA[criterion](norms, threshold)

    return judge


def max_median_ratio(norms: torch.Tensor) -> torch.Tensor:
    """Largest norm over median norm of each image: [.., tokens] -> float [..]."""
    return norms.amax(-1) / norms.quantile(0.5, dim=-1)


def norm_summary(norms: torch.Tensor) -> dict[str, float]:
    """The shape of the norm distribution of one layer, [images, tokens], in five numbers.

    `median` and `p99` (99th percentile) over all tokens of all images; `max_over_median`, `share_above_3sd`
    (see `mean_sd`) and `kurtosis` (excess: 0 for a normal distribution) per image, then averaged over images.
    """
    z = (norms - norms.mean(-1, keepdim=True)) / norms.std(-1, keepdim=True, correction=0)
    return {
        "median": norms.flatten().quantile(0.5).item(),
        "p99": norms.flatten().quantile(0.99).item(),
        "max_over_median": max_median_ratio(norms).mean().item(),
        "share_above_3sd": mean_sd(norms).float().mean().item(),
        "kurtosis": (z.pow(4).mean(-1) - 3).mean().item(),
    }


# --- attention received, as `capture.attention_received` gives it ---


def attended(received: torch.Tensor, uniform: float | torch.Tensor, factor: float = 5.0) -> torch.Tensor:
    """attention received > factor x what uniform attention would give.

    `received` is float [.., tokens], averaged over heads or for one head. `uniform` is 1 / (number of keys)
    in a vision tower (patches, CLS and registers together), or `causal_uniform` at the tokens' positions in a
    decoder. The factor is our choice; for comparison, the paper reports that ViT sinks get about 7 times the
    decoder attention of other visual tokens.
    """
    return received > factor * uniform


def causal_uniform(n: int) -> torch.Tensor:
    """Attention received under uniform causal attention, float [n]: u_k = mean over i >= k of 1 / (i + 1)."""
    rows = 1 / torch.arange(1, n + 1, dtype=torch.float64)  # query i spreads over i + 1 keys
    return (rows.flip(0).cumsum(0).flip(0) / torch.arange(n, 0, -1)).float()


def sink_epsilon(received: torch.Tensor, epsilon: float = 0.3) -> torch.Tensor:
    """Sink_k^epsilon: the share of layers and heads in which token k receives more than epsilon.

    [.., layers, heads, tokens] -> float [.., tokens], from 0 to 1. `received` is alpha_k, the mean of A[i, k]
    over queries i >= k. Gu et al., "When Attention Sink Emerges in Language Models" (2410.10781), eq. for
    Sink_k^epsilon with epsilon = 0.3.
    """
    return (received > epsilon).float().mean(dim=(-3, -2))


# --- hidden states: float [.., tokens, width] ---


def rms_normalised(hidden: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) in float32: RMSNorm without its weight. No entry exceeds sqrt(width)."""
    x = hidden.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def dimension_profile(hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean `|RMSNorm(x)|` of a group of tokens in each dimension: [.., tokens, width] -> float [width].

    `mask`, bool [.., tokens], chooses the group; all tokens by default. NaN if the group is empty.
    """
    magnitudes = rms_normalised(hidden).abs()
    return (magnitudes.flatten(0, -2) if mask is None else magnitudes[mask]).mean(0)


def sink_dimensions(profile: torch.Tensor, factor: float = 5.0) -> list[int]:
    """The dimensions in which a group's profile is at least factor x its median over dimensions.

    `profile` is float [width], of `dimension_profile`. Strongest first; empty if none stands out. The paper
    and Kang et al. (2503.03321) give the dimensions of Llama-2-7B by hand, {1415, 2533}; this finds them from
    data, per model.
    """
    order = profile.argsort(descending=True)
    return [d for d in order.tolist() if profile[d] >= factor * profile.quantile(0.5)]


def phi(hidden: torch.Tensor, dimensions: Sequence[int]) -> torch.Tensor:
    """max over the sink dimensions of `|RMSNorm(x)[d]|`: [.., tokens, width] -> float [.., tokens].

    Kang et al., "See What You Are Told" (VAR, 2503.03321). Zero if there are no sink dimensions.
    """
    if len(dimensions) == 0:
        return torch.zeros(hidden.shape[:-1], device=hidden.device)
    return rms_normalised(hidden)[..., list(dimensions)].abs().amax(-1)


def llm_sinks(hidden: torch.Tensor, dimensions: Sequence[int], tau: float = 20.0) -> torch.Tensor:
    """phi >= tau, the LLM sink of the paper (tau = 20 for width 4096): -> bool [.., tokens].

    Raises:
        ValueError: if tau > sqrt(width), which phi cannot reach.
    """
    width = hidden.shape[-1]
    if tau > width**0.5:
        raise ValueError(f"phi is at most sqrt({width}) = {width**0.5:.1f}; tau = {tau} would find nothing")
    return phi(hidden, dimensions) >= tau


# --- from masks to numbers ---


def share(mask: torch.Tensor) -> torch.Tensor:
    """Share of the tokens that are sinks, from 0 to 1: bool [.., tokens] -> float [..]."""
    return mask.float().mean(-1)


def kinds(vit: torch.Tensor, llm: torch.Tensor) -> dict[str, torch.Tensor]:
    """Split visual tokens by where they are sinks, in the tower (`vit`) and in the decoder (`llm`).

    Both bool [.., tokens]. `propagated`: in both. `emerged`: in the decoder only. `stopped`: in the tower
    only. `ordinary`: in neither. The four masks share no token and cover all.
    """
    return {"propagated": vit & llm, "emerged": ~vit & llm, "stopped": vit & ~llm, "ordinary": ~vit & ~llm}


def one_of(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One true place of each row, at random: bool [n, places] -> long [n], -1 where there is none."""
    chosen = torch.rand(mask.shape, generator=generator).masked_fill(~mask, -1).argmax(1)
    return chosen.where(mask.any(1), -1)


def random_like(mask: torch.Tensor, seed: int, among: torch.Tensor | None = None) -> torch.Tensor:
    """As many tokens of each image as are in `mask`, drawn at random from those outside it.

    `mask`, `among` and the result are bool [.., tokens]; `among` narrows what is drawn from. Where an image has too
    few such tokens, all of them are taken.
    """
    allowed = ~mask if among is None else among & ~mask
    order = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~allowed, 2.0)
    return (order.argsort(-1).argsort(-1) < mask.sum(-1, keepdim=True)) & allowed


def next_in_norm(norms: torch.Tensor, mask: torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
    """As many tokens of each image as are in `mask`: those of the highest norms outside it.

    `norms` float, `mask`, `among` and the result bool [.., tokens]; `among` narrows what is taken from. The nearest
    that there is to a control of equal norm: where sinks stand apart from all others, no token has theirs.
    """
    allowed = ~mask if among is None else among & ~mask
    rank = norms.masked_fill(~allowed, -1.0).argsort(-1, descending=True).argsort(-1)
    return (rank < mask.sum(-1, keepdim=True)) & allowed


def jaccard(a: torch.Tensor, b: torch.Tensor, empty: float = 1.0) -> torch.Tensor:
    """`|a and b| / |a or b|` of each image: two bool [.., tokens] -> float [..].

    Where both sets are empty the value is `empty`: 1 by default, as two criteria that both find nothing
    agree; NaN leaves such images out of a nanmean.
    """
    union = (a | b).sum(-1)
    return torch.where(union > 0, (a & b).sum(-1) / union.clamp(min=1), empty)


def pairwise_jaccard(masks: Mapping[str, torch.Tensor], empty: float = 1.0) -> pd.DataFrame:
    """How far criteria agree: one row for each image and each pair of criteria.

    `masks` has a bool [images, tokens] for each criterion. Columns: `image` (index), `first`, `second`
    (names, every pair once, in the order of `masks`), `jaccard` (see there for `empty`), `both_empty` (bool).

    Raises:
        ValueError: if there are fewer than two criteria.
    """
    if len(masks) < 2:
        raise ValueError(f"agreement needs two criteria, got {list(masks)}")
    tables = [
        pd.DataFrame(
            {
                "image": range(len(masks[first])),
                "first": first,
                "second": second,
                "jaccard": jaccard(masks[first], masks[second], empty).cpu().numpy(),
                "both_empty": ~(masks[first] | masks[second]).any(-1).cpu().numpy(),
            }
        )
        for first, second in combinations(masks, 2)
    ]
    return pd.concat(tables, ignore_index=True)
