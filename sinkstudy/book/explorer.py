"""What the explorer shows of each picture, patch by patch: measured once, then packed into a script for the page."""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from sinkstudy import sinks
from sinkstudy.analyses import attribution
from sinkstudy.answers.evaluate import first_tokens
from sinkstudy.effects import ablation
from sinkstudy.model import capture
from sinkstudy.model.layout import ImageLayout
from sinkstudy.model.lvlm import LVLM
from sinkstudy.world import drawing
from sinkstudy.world import questions as lab

SinkRule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # norms, attention received in units of uniform -> bool
MAPS = ("tower_norm", "tower_attention", "decoder_norm", "decoder_attention", "attribution")


def sink_rules(criterion: str, threshold: float) -> dict[str, tuple[SinkRule, str]]:
    """Rules for a sink at the connector's input, each with its words; the first is that of the run."""

    def on_norms(criterion: str, threshold: float) -> tuple[SinkRule, str]:
        judge = sinks.rule(criterion, threshold)
        return lambda norms, received: judge(norms), sinks.in_words(criterion, threshold)

    others = {"mean_sd": 3.0, "percentile": 98.0, "norm_drop": 1.5, "absolute": 100.0}
    return {
        "run": on_norms(criterion, threshold),
        **{name: on_norms(name, value) for name, value in others.items()},
        "attention": (lambda norms, received: sinks.attended(received, 1.0), "attention received above 5 × uniform"),
    }


# ------------------------------------------------------------------------------------------------- measured
@dataclass(frozen=True)
class Outcome:
    """A model's answers to the questions of a picture without a group of patches."""

    tokens: int  # visual tokens that were replaced
    p: torch.Tensor  # [questions], probability that the true answer's first token comes first
    word: torch.Tensor  # [questions], the likeliest first token
    p_word: torch.Tensor  # [questions], its probability
    random: torch.Tensor | None  # [draws, questions], `p` without as many random visual tokens


@dataclass(frozen=True)
class Explored:
    """All that is known of a picture in a model; maps are of patches, row by row."""

    layout: ImageLayout
    uniform: torch.Tensor  # [layers], share of a query's attention that a patch would get if all that it sees got alike
    maps: dict[str, torch.Tensor]  # of `MAPS`, [layers or questions (, layers), patches]
    rules: torch.Tensor  # bool [rules, patches]
    groups: dict[str, torch.Tensor]  # bool [patches]
    outcomes: dict[str | None, Outcome]  # without each group that is not empty; None: without nothing
    top: Any  # the five likeliest first words, values and indices [questions, 5]


def mean_tokens(lvlm: LVLM, pictures: Sequence[Any]) -> dict[int, torch.Tensor]:
    """The mean over all visual tokens of all pictures, where a connector puts them out: layer -> [width]."""
    tokens = ablation.read_tokens(lvlm, {str(i): picture for i, picture in enumerate(pictures)}, "output", 1)
    return {layer: mean.float() for layer, mean in tokens.mean().items()}


@torch.no_grad()
def answering(lvlm: LVLM, picture: Any, questions: Sequence[str], masks: Sequence[torch.Tensor],
              means: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of the answers' first token while patches have the mean token: float [rows, vocabulary].

    Args:
        masks: of each question, the patches that are replaced at the connector's output, bool [patches].
    """
    inputs = lvlm.inputs([picture] * len(questions), list(questions))
    sizes = [int(layout.lift(mask, "any").sum()) for layout, mask in zip(lvlm.layout(inputs), masks, strict=True)]
    new = [{layer: mean.expand(size, -1) for layer, mean in means.items()} for size in sizes]
    with ablation.replaced(lvlm, inputs, masks, new):
        return lvlm.model(**inputs, logits_to_keep=1).logits[:, -1].float().log_softmax(-1).cpu()


def without(lvlm: LVLM, picture: Any, asked: pd.DataFrame, groups: Mapping[str, torch.Tensor], layout: ImageLayout,
            means: Mapping[int, torch.Tensor], *, draws: int, seed: int, batch_size: int,
            ) -> tuple[dict[str | None, Outcome], Any]:
    """What taking groups of patches away, and as many random ones, does to the answers.

    Args:
        asked: the picture's questions, `question` and `answer`; where no answer is known, the model's own counts. One
            that begins with no token that the tokenizer knows has probability 0.
        groups: bool [patches].

    Returns:
        The outcomes of `Explored`, and its `top`.
    """
    holding = layout.lift(torch.ones(len(layout.vision)), "any")  # visual tokens without newlines
    gone: dict[str | None, list[torch.Tensor]] = {None: [torch.zeros_like(holding)]}  # a group, then random ones
    for group, mask in groups.items():
        if (tokens := layout.lift(mask, "any")).any():
            random = [sinks.random_like(tokens, seed + draw, among=holding) for draw in range(1, draws + 1)]
            gone[group] = [tokens, *random]
    sizes = [len(of) for of in gone.values()]
    rows = [(text, layout.lower(tokens)) for of in gone.values() for tokens in of for text in asked.question]
    logp = torch.cat([
        answering(lvlm, picture, *zip(*rows[start : start + batch_size], strict=True), means)
        for start in range(0, len(rows), batch_size)
    ]).unflatten(0, (sum(sizes), len(asked)))  # [variants, questions, vocabulary]
    own = logp[0].argmax(-1).tolist()
    ids = [first_tokens(lvlm, [truth]).get(truth, []) if truth else [word]
           for truth, word in zip(asked.answer, own, strict=True)]
    p = torch.stack([logp[:, q, of].exp().sum(-1) for q, of in enumerate(ids)], 1)  # [variants, questions]
    p_word, word = logp.exp().max(-1)
    said = zip(gone.items(), *(of.split(sizes) for of in (p, word, p_word)), strict=True)
    outcomes = {group: Outcome(int(tokens[0].sum()), of[0], likeliest[0], its[0], of[1:] if group else None)
                for (group, tokens), of, likeliest, its in said}
    return outcomes, logp[0].exp().topk(5)


def explore(lvlm: LVLM, picture: Any, asked: pd.DataFrame, marks: Sequence[SinkRule], known: Mapping[str, torch.Tensor],
            means: Mapping[int, torch.Tensor], *, draws: int, seed: int, batch_size: int) -> Explored:
    """Follow a picture with each of its questions through a model.

    Args:
        asked: its questions, `question` and `answer`.
        marks: rules for a sink; the first one's sinks, and the third one's patches, are taken away too.
        known: facts of a lab scene, bool [patches], whose patches are taken away.
        draws, seed: of random groups beside each that is taken away.
    """
    texts = asked.question.tolist()
    trace = capture.trace(lvlm, [picture] * len(texts), texts, batch_size=batch_size)
    layout, at = trace.layouts[0], lvlm.feature_layer
    norms, received = trace.vision_norms[0], trace.vision_received[0].mean(1)  # [vision layers, patches]
    relative = capture.trace_tower(lvlm, [picture], 1)[1][0].mean(1)  # the same in units of uniform attention
    uniform = (received / relative).nanmean(1)
    found = torch.zeros(len(marks), len(layout.read), dtype=torch.bool)  # [rules, patches]
    found[:, layout.read] = torch.stack([rule(norms[at, layout.read], relative[at, layout.read]) for rule in marks])
    groups = {"sinks": found[0], "top_2_percent": found[2], **known}
    outcomes, top = without(lvlm, picture, asked, groups, layout, means, draws=draws, seed=seed, batch_size=batch_size)
    words = [truth or _word(lvlm, own) for truth, own in zip(asked.answer, outcomes[None].word, strict=True)]
    maps = {
        "tower_norm": norms, "tower_attention": 100 * received,
        "decoder_norm": layout.lower(torch.cat([trace.projected_norms[:1], trace.decoder_norms[0]])),
        "decoder_attention": 100 * layout.lower(trace.last_attention.mean(2)),  # [questions, layers, patches]
        "attribution": slopes(lvlm, picture, texts, words, batch_size),
    }
    return Explored(layout, uniform, maps, found, groups, outcomes, top)


def slopes(lvlm: LVLM, picture: Any, questions: Sequence[str], answers: Sequence[str], batch_size: int) -> torch.Tensor:
    """Gradient × activation of the log-probability of an answer's first token, in nats: float [questions, patches]."""
    encode = lvlm.processor.tokenizer.encode
    begins = [_word(lvlm, encode(f" {answer}", add_special_tokens=False)[0]) for answer in answers]
    f = attribution.answer_log_prob(lvlm, [picture] * len(questions), list(questions), begins, batch_size)
    found = attribution.gradient_x_activation(f, batch_size=batch_size)  # [questions, visual tokens]
    return torch.stack([layout.lower(row) for row, layout in zip(found, f.layouts, strict=True)])


def _word(lvlm: LVLM, token: Any) -> str:
    return lvlm.processor.tokenizer.decode([int(token)]).strip()


# ------------------------------------------------------------------------------------------------- packed
def packed(values: torch.Tensor) -> dict[str, Any]:
    """Numbers as 16-bit integers, little-endian in base64, with the `low` and `step` that bring them back.

    65535 stands for NaN; what comes back is at most half a step, 1/131068 of the range, away.
    """
    of = values.double().numpy()
    low, high = np.nanmin(of), np.nanmax(of)
    step = (high - low) / 65534 or 1.0
    codes = np.where(np.isfinite(of), np.round((of - low) / step), 65535).astype("<u2")
    return {"low": float(f"{low:.9g}"), "step": float(f"{step:.9g}"), "codes": _base64(codes.tobytes())}


def bits(masks: torch.Tensor) -> str:
    """Masks, at most eight, [masks, patches] as one byte a patch, in base64: mask m sets the bit 2^m."""
    return _base64(np.packbits(masks.numpy(), axis=0, bitorder="little").tobytes())


def png(lvlm: LVLM, picture: Any) -> str:
    """What the model sees of a picture (the first tile, if it sees several), as a PNG of 256 colours in base64."""
    pixels = lvlm.inputs([picture], [""])["pixel_values"].float().cpu()
    if pixels.ndim >= 4:
        tile = pixels.flatten(0, -4)[0]  # [3, height, width]
        how = lvlm.processor.image_processor
        mean, sd = (torch.tensor(values)[:, None, None] for values in (how.image_mean, how.image_std))
        image = Image.fromarray((255 * (tile * sd + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
    else:  # a packed tower sees the whole picture
        image = attribution.as_image(picture).copy()
        image.thumbnail((448, 448))
    with io.BytesIO() as file:
        image.quantize(256).save(file, "PNG", optimize=True)
        return _base64(file.getvalue())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def patch_words(scenes: drawing.Scenes, i: int) -> list[str]:
    """What lies on each patch of a lab scene, in words."""
    facts, share = scenes[i : i + 1], scenes.thing_share[i].flatten().tolist()
    part = drawing.patch_contents(facts)[0].flatten().tolist()
    centres = facts.centre[0, facts.kind[0] >= 0].float()  # [things, 2]
    middle = (torch.cartesian_prod(torch.arange(drawing.GRID), torch.arange(drawing.GRID)) + 0.5) * drawing.PATCH
    nearest = torch.cdist(middle, centres).argmin(1).tolist()
    calm, texts = scenes.calm[i].flatten().tolist(), []
    for patch, (p, t) in enumerate(zip(part, nearest, strict=True)):
        ground = f"{drawing.TEXTURES[facts.texture[0, p]]} {drawing.COLOURS[facts.colour[0, p]]} part"
        words = (drawing.SIZES[facts.size[0, t]], drawing.COLOURS[facts.thing_colour[0, t]],
                 drawing.KINDS[facts.kind[0, t]])
        thing = " ".join(words) + (" with a mark" if facts.mark[0, t] else "")
        on_it = f"{thing}, {share[patch]:.0%} of the patch" if share[patch] else ground
        texts.append(f"calm: one flat colour, on the {ground}" if calm[patch] else on_it)
    return texts


def about(scenes: drawing.Scenes, i: int) -> str:
    """A lab scene in a few words."""
    f = lab.facts(scenes)[i]
    things = lab.NUMBERS[len(f.things)] + (" things" if len(f.things) > 1 else " thing")
    return f"a {f.light} {f.scene}, {lab.NUMBERS[len(f.parts)]} parts, {things}"


def packed_answers(lvlm: LVLM, seen: Explored, q: int) -> dict[str, Any]:
    """What a model answers to question q of a picture, as it is and without each group of patches."""
    top = [[_word(lvlm, token) or "(blank)", round(p.item(), 4)]
           for p, token in zip(seen.top.values[q], seen.top.indices[q], strict=True)]
    gone = {
        group: {"tokens": o.tokens, "p": round(o.p[q].item(), 4), "word": _word(lvlm, o.word[q]) or "(blank)",
                "p_word": round(o.p_word[q].item(), 4), "random": round(o.random[:, q].mean().item(), 4)}
        for group, o in seen.outcomes.items() if group
    }
    return {"top": top, "p": round(seen.outcomes[None].p[q].item(), 4), "without": gone}


def script(run: str, lvlms: Mapping[str, LVLM], pictures: Sequence[Any], asked: Sequence[pd.DataFrame],
           seen: Mapping[str, Sequence[Explored]], scenes: drawing.Scenes | None, known: Mapping[str, torch.Tensor],
           texts: Sequence[str], draws: int) -> str:
    """The JavaScript from which the page draws.

    Args:
        asked: of each picture, its questions.
        seen: of each model, what was seen of each picture.
        scenes, known: facts of lab scenes, bool [pictures, patches] each; None and nothing for other pictures.
        texts: the words of the rules.
    """
    idle = {name: sum(int((one.rules[0] & ~one.groups.get("things", torch.zeros_like(one.rules[0]))).sum())
                      for one in of) for name, of in seen.items()}  # sinks that lie on no thing
    shown = {
        "run": run, "rules": list(texts), "draws": draws, "opens": list(idle).index(max(idle, key=idle.get)),
        "pictures": [
            {"png": png(lvlms[run], picture), "about": about(scenes, i) if scenes is not None else f"picture {i + 1}",
             "grid": list(seen[run][i].layout.grid), "contents": patch_words(scenes, i) if scenes is not None else None,
             "groups": {group: bits(mask[i][None]) for group, mask in known.items()},
             "questions": [{"type": q.type, "text": q.question, "answer": q.answer} for q in asked[i].itertuples()]}
            for i, picture in enumerate(pictures)
        ],
        "models": [_model(name, lvlm, seen[name]) for name, lvlm in lvlms.items()],
    }
    return "window.sinkstudyExplorer = " + json.dumps(shown, ensure_ascii=True, separators=(",", ":")) + ";\n"


def _model(name: str, lvlm: LVLM, seen: Sequence[Explored]) -> dict[str, Any]:
    of_pictures = []
    for one in seen:
        patches = one.layout.grid[0] * one.layout.grid[1]
        maps = {key: packed(one.maps[key][..., :patches]) for key in MAPS}
        said = [packed_answers(lvlm, one, q) for q in range(len(one.outcomes[None].p))]
        of_pictures.append(maps | {"rules": bits(one.rules), "answers": said})
    return {"name": name, "merge": lvlm.merge, "uniform": [float(f"{100 * of:.6g}") for of in seen[0].uniform],
            "tower_layers": len(lvlm.vision_layers), "decoder_layers": len(lvlm.decoder_layers),
            "feature_layer": lvlm.feature_layer, "pictures": of_pictures}
