"""Does the positive control hold what it must? Gates on its tower, fixed before it was trained.

An instrument is gated before it judges anything. The tower with sinks by construction has to hold the gist
(`world.gist`) in its sinks and nowhere else, local facts as well as the natural tower, and its sinks have to be found
by their norm and to draw attention. What a token holds is what a linear probe (`probing.Ridge`) reads from it: fitted
on scenes of the validation split, judged on test scenes, on as many scenes of each class, so that chance is 1 /
classes. The margin of a fact is (accuracy - chance) / (1 - chance); that of several is their mean.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
from transformers import AutoModel, PreTrainedModel

from sinkstudy import sinks, stats
from sinkstudy.analyses.probing import Ridge
from sinkstudy.answers.evaluate import Intervention
from sinkstudy.effects import ablation
from sinkstudy.lab.corpus import grounding
from sinkstudy.lab.tower import LAYERS, ONSET, attentions, normalise, states
from sinkstudy.model import loading
from sinkstudy.model.lvlm import LVLM
from sinkstudy.model.sinktower import CLIPVisionModelWithSinks
from sinkstudy.paths import DATA, POSITIVE_CONTROL
from sinkstudy.world import gist
from sinkstudy.world import questions as q
from sinkstudy.world.drawing import GRID, Scenes, render

USED = 256  # pictures about which a language model is asked
BATCH = 32   # questions at once
QUESTION_FAMILIES = {  # of questions (`world.questions`): what no patch shows alone, and what one place shows
    "gist": ("things", "parts", "sum", "compare"),
    "local": ("existence", "colour", "place", "size", "mark"),
}
READ = LAYERS - 1  # of `states`: the residual stream that the connector reads
FIT, JUDGE = 3072, 2048  # scenes
LOCAL = ("texture", "colour", "kind", "thing colour", "size", "mark")  # columns of `corpus.grounding`
GATE_THRESHOLDS = {"mean_sd": 3.0, "above_median": 3.0, "norm_drop": 1.5}  # those of the chapters
BOUNDS = {  # by gate: (which side, bound)
    "gist of a sink, of that of the natural CLS": ("at least", 0.9),
    "gist of a random ordinary patch, of that of a sink": ("at most", 0.25),
    "gist of an ordinary patch that shows no thing, of that of a sink": ("at most", 0.25),
    "gist of the mean of ordinary patches, minus that of a local tower": ("at most", 0.0),
    "local facts of ordinary patches, of those of the natural tower": ("at least", 0.9),
    "least precision of a norm criterion": ("at least", 0.9),
    "least recall of a norm criterion": ("at least", 0.9),
    "least attention on sinks, any head behind the onset": ("at least", 0.3),
}


USE_BOUNDS = {  # of the language model behind the tower, in points
    "gist questions answered rightly, minus those of the natural model": ("at least", -3.0),
    "gist questions lost without the sinks, minus those without as many random tokens": ("at least", 15.0),
}


@dataclass(frozen=True)
class Readings:
    """Vectors of a tower at the layer that the connector reads, one a scene: float [scenes, width] each."""

    vectors: dict[str, torch.Tensor]  # "cls", "last cls", "sink", "ordinary", "empty", "mean", and each of `LOCAL`
    labels: dict[str, torch.Tensor]   # of the patch chosen for each of `LOCAL`, long [scenes], -1 where there is none
    norms: torch.Tensor               # [scenes, patches]
    attention: torch.Tensor           # [scenes, layers behind the onset, heads], ordinary patches' share on the sinks


@torch.no_grad()
def tower_readings(tower: PreTrainedModel, scenes: Scenes, *, hide_sinks: bool) -> Readings:
    """What the tower says of rendered scenes.

    `hide_sinks`: the picture's flat patches are patches like others, so that the tower with sinks becomes one that sees
    windows only, with the same weights.
    """
    generator = torch.Generator().manual_seed(0)
    calm, thing = scenes.calm.flatten(1), scenes.thing_share.flatten(1)
    words = grounding(scenes).flatten(1, 2).long()  # [n, patches, 6]
    chosen = {"sink": calm, "ordinary": ~calm, "empty": ~calm & (thing == 0)}
    chosen |= {name: words[..., i] >= 0 for i, name in enumerate(LOCAL)}
    places = {name: sinks.one_of(mask, generator) for name, mask in chosen.items()}
    found: dict[str, list] = {}
    norms, attention = [], []
    own = getattr(tower, "sinks", None)
    if hide_sinks:
        tower.sinks = lambda pixels: torch.zeros(len(pixels), GRID * GRID, dtype=torch.bool)
    for layer in attentions(tower)[ONSET:]:
        layer.keep_weights = True
    try:
        for rows in torch.arange(len(scenes)).split(64):
            hidden = states(tower, normalise(scenes.images[rows]))
            patches, here = hidden[READ][:, -GRID * GRID:].float(), torch.arange(len(rows))
            ordinary = (~calm[rows]).float()
            vectors = {"cls": hidden[READ][:, 0], "last cls": hidden[-1][:, 0],
                       "mean": (ordinary[:, None] @ patches)[:, 0] / ordinary.sum(1, keepdim=True)}
            vectors |= {name: patches[here, place[rows]] for name, place in places.items()}
            for name, of in vectors.items():
                found.setdefault(name, []).append(of.float())
            norms.append(patches.norm(dim=-1))
            shares = []
            for layer in attentions(tower)[ONSET:]:
                weights = layer.weights[:, :, -GRID * GRID:, -GRID * GRID:].float()  # [n, heads, patches, patches]
                on_sinks = (weights * calm[rows][:, None, None]).sum(-1)
                shares.append((on_sinks * ordinary[:, None]).sum(-1) / ordinary.sum(1)[:, None])
            attention.append(torch.stack(shares, 1))
    finally:
        for layer in attentions(tower)[ONSET:]:
            layer.keep_weights, layer.weights = False, None
        if hide_sinks:
            tower.sinks = own
    labels = {name: words[torch.arange(len(words)), places[name].clamp_min(0), i].where(places[name] >= 0, -1)
              for i, name in enumerate(LOCAL)}
    return Readings({k: torch.cat(v) for k, v in found.items()}, labels, torch.cat(norms), torch.cat(attention))


def _balanced(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows in which every class is as frequent as the rarest; labels long [n], those below 0 do not count."""
    classes = labels[labels >= 0].unique()
    rows = [(labels == c).nonzero()[:, 0] for c in classes]
    least = min(map(len, rows))
    return torch.cat([of[torch.randperm(len(of), generator=generator)[:least]] for of in rows])


def probe(fit: torch.Tensor, fit_labels: torch.Tensor, judge: torch.Tensor, judge_labels: torch.Tensor, *,
          shuffled: bool = False) -> tuple[float, float]:
    """Margin of one fact, and its variance: vectors [n, width] and labels long [n] of two sets of scenes.

    With `shuffled`, the labels that are fitted belong to other scenes: the margin should then be 0.
    """
    generator = torch.Generator().manual_seed(0)
    rows, held_out = _balanced(fit_labels, generator), _balanced(judge_labels, generator)
    known = fit_labels[rows]
    if shuffled:
        known = known[torch.randperm(len(known), generator=generator)]
    right = Ridge(fit[rows]).classify(known, judge[held_out]) == judge_labels[held_out]
    chance = 1 / len(known.unique())
    accuracy = right.double().mean().item()
    return (accuracy - chance) / (1 - chance), accuracy * (1 - accuracy) / len(right) / (1 - chance) ** 2


def margins(fit: Readings, judge: Readings, tokens: list[str], facts: tuple[dict, dict], *, shuffled: bool = False,
            ) -> pd.DataFrame:
    """Margins of each fact from each kind of token; facts: the labels of the two sets of scenes, by fact."""
    rows = []
    for token, fact in product(tokens, facts[0]):
        margin, variance = probe(fit.vectors[token], facts[0][fact], judge.vectors[token], facts[1][fact],
                                 shuffled=shuffled)
        rows.append({"token": token, "fact": fact, "margin": margin, "variance": variance})
    return pd.DataFrame(rows)


def local_margins(fit: Readings, judge: Readings) -> pd.DataFrame:
    """Margins of each of `LOCAL` from the patches that show it."""
    parts = [margins(fit, judge, [fact], ({fact: fit.labels[fact]}, {fact: judge.labels[fact]})) for fact in LOCAL]
    return pd.concat(parts).assign(token="patch")


def overall(table: pd.DataFrame) -> float:
    """Mean margin: each fact of `gist.CLASSES` or `LOCAL` counts once, and the twelve kinds together once."""
    group = table.fact.where(~table.fact.isin(gist.KINDS_THERE), "kinds there")
    return float(table.groupby(group).margin.mean().mean())


def gates(natural: PreTrainedModel, control: CLIPVisionModelWithSinks, *, fit: int = FIT, judge: int = JUDGE,
          ) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The gates of the control's tower beside the natural one, and the margins behind them.

    Returns:
        A row a gate: `gate`, `value`, `side`, `bound`, `holds`; and a row a tower, token and fact: `tower`, `token`,
        `fact`, `margin`, `variance`, with rows of shuffled labels as `token` "sink, shuffled labels".
    """
    scenes = render("val", 0, fit), render("test", 0, judge)
    facts = gist.fact_classes(scenes[0]), gist.fact_classes(scenes[1])
    towers = {"natural": (natural, False), "control": (control, False), "local": (control, True)}
    seen = {name: (tower_readings(tower, scenes[0], hide_sinks=hide), tower_readings(tower, scenes[1], hide_sinks=hide))
            for name, (tower, hide) in towers.items()}
    wanted = {"natural": ["cls", "last cls", "sink", "ordinary", "empty", "mean"],
              "control": ["cls", "sink", "ordinary", "empty", "mean"], "local": ["mean"]}
    parts = [margins(*seen[of], tokens, facts).assign(tower=of) for of, tokens in wanted.items()]
    parts += [local_margins(*seen[of]).assign(tower=of) for of in ("natural", "control")]
    parts.append(margins(*seen["control"], ["sink"], facts, shuffled=True).assign(
        tower="control", token="sink, shuffled labels"))
    table = pd.concat(parts, ignore_index=True)
    of = {key: overall(part) for key, part in table.groupby(["tower", "token"])}
    cls = max(of["natural", "cls"], of["natural", "last cls"])
    truth, norms = scenes[1].calm.flatten(1), seen["control"][1].norms
    marked = [sinks.NORM_CRITERIA[name](norms, tau) for name, tau in GATE_THRESHOLDS.items()]
    precision = min(((m & truth).sum() / m.sum().clamp_min(1)).item() for m in marked)
    recall = min(((m & truth).sum() / truth.sum()).item() for m in marked)
    sink = of["control", "sink"]
    values = [sink / cls, of["control", "ordinary"] / sink, of["control", "empty"] / sink,
              of["control", "mean"] - of["local", "mean"], of["control", "patch"] / of["natural", "patch"],
              precision, recall, seen["control"][1].attention.mean(0).min().item()]
    return _judged(BOUNDS, values), table


def _judged(bounds: dict[str, tuple[str, float]], values: list[float]) -> pd.DataFrame:
    rows = []
    for (gate, (side, bound)), value in zip(bounds.items(), values, strict=True):
        holds = bool(np.isfinite(value) and (value >= bound if side == "at least" else value <= bound))
        rows.append({"gate": gate, "value": value, "side": side, "bound": bound, "holds": holds})
    return pd.DataFrame(rows)


def questions_by_family(scenes: Scenes, seed: int) -> pd.DataFrame:
    """A question of each of `QUESTION_FAMILIES` about every scene that admits it: a row a question.

    Returns:
        `id`, `image_id`, `question`, `answer`, `family` and `about`, the key of `QUESTION_FAMILIES`.
    """
    rng, rows = random.Random(seed), []
    for i, facts in enumerate(q.facts(scenes)):
        for about, families in QUESTION_FAMILIES.items():
            found = (q.ask(facts, family, rng) for family in families)
            rows += [{"image_id": str(i), "question": one.text, "answer": one.answer, "family": one.family,
                      "about": about} for one in found if one]
    return pd.DataFrame(rows).drop_duplicates(["image_id", "question"]).rename_axis("id").reset_index()


def calm_and_random(scenes: Scenes) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The calm patches of each scene, and as many random others: bool [patches] by `image_id`."""
    calm = {str(i): mask for i, mask in enumerate(scenes.calm.flatten(1))}
    return calm, {i: sinks.random_like(mask[None], int(i))[0] for i, mask in calm.items()}


def right_answers(lvlm: LVLM, table: pd.DataFrame, scenes: Scenes, ways: list[Intervention]) -> pd.DataFrame:
    """Rows of `questions_by_family`, with a column for "none" and for each of `ways`: answered rightly, 100 or 0."""
    pictures = {str(i): image for i, image in enumerate(scenes.images)}
    said = ablation.scored(lvlm, table, ways, images=pictures, max_new_tokens=4, batch_size=BATCH, cache=None)
    return said.pivot(index="id", columns="intervention", values="right").join(table.set_index("id"))


def use(lvlm: LVLM, *, n: int = USED) -> pd.DataFrame:
    """What a model's answers lose when its calm patches are taken away, and when as many random ones are.

    A token that is taken away is seen by no later token of the decoder, in any layer (`ablation.hide`). Each of
    `QUESTION_FAMILIES` is asked once about every test scene that admits it, open where it can be.

    Returns:
        A row for each group of families and for each family: `of`, `untouched` (% right), and the changes `without`
        the calm patches, `random` and their difference `by_sinks` with `low` and `high` (points; 95 % bootstrap
        interval over pictures), `questions`.
    """
    scenes = render("test", 0, n)
    calm, chance = calm_and_random(scenes)
    ways = [ablation.hide("calm", calm), ablation.hide("random", chance)]
    right = right_answers(lvlm, questions_by_family(scenes, 0), scenes, ways)
    found = []
    groups = {name: right.family.isin(families) for name, families in QUESTION_FAMILIES.items()}
    groups |= {family: right.family == family for families in QUESTION_FAMILIES.values() for family in families}
    for name, mask in groups.items():
        of = right[mask]
        by_sinks = stats.mean_interval((of.calm - of.random).to_numpy(), clusters=of.image_id.to_numpy())
        found.append({"of": name, "untouched": of["none"].mean(), "without": (of.calm - of["none"]).mean(),
                      "random": (of.random - of["none"]).mean(), "by_sinks": by_sinks.value, "low": by_sinks.low,
                      "high": by_sinks.high, "questions": len(of)})
    return pd.DataFrame(found)


def uses(n: int = USED) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Can a language model use such sinks? The gates of the one trained on the tower, beside natural and planted ones.

    Args:
        n: pictures about which each is asked.

    Returns:
        A row a gate, as `gates` has them; and the rows of `use` for the three models, with `model`.
    """
    names = (POSITIVE_CONTROL, "lab-llava", "lab-llava-sinks")
    table = pd.concat([use(loading.load(name), n=n).assign(model=name) for name in names])
    of = table[table["of"] == "gist"].set_index("model")
    control, natural = of.loc[POSITIVE_CONTROL], of.loc["lab-llava"]
    return _judged(USE_BOUNDS, [control.untouched - natural.untouched, -control.by_sinks]), table


def committed_gates(**scenes: int) -> pd.DataFrame:
    """`gates` of the committed tower beside that of lab-llava; `scenes`: `fit` and `judge`."""
    natural = loading.load("lab-llava").vision
    control = AutoModel.from_pretrained(DATA / "towers" / "gist", dtype=torch.float32, use_safetensors=True).eval()
    for tower in (natural, control):
        tower.set_attn_implementation("lab_matmul")
    return gates(natural, control, **scenes)[0]
