"""Trained methods against each other: arms, routers and seeds on the same questions, and whether training was fair.

An *arm* is one way to train, such as one connector or two, with a folder for each seed: `<model>/<arm>-<seed>`.
`Exam` asks an arm the benchmarks' questions, `hard_routers` looks up what each router would have answered, `accuracy`
and `comparisons` make estimates of the answers, one long table with a row an answer: `model`, `arm`, `seed`,
`benchmark`, `id`, `image_id`, `picture`, `type`, `intervention`, `right` (100 or 0) and `logp` (nats).

The pair of connectors answers three times: "two both", "two sinks" and "two others" say which of its blocks it sees.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from sinkstudy import benchmarks, stats
from sinkstudy.answers import study
from sinkstudy.answers.evaluate import NONE, Intervention, Prefixes
from sinkstudy.model import loading
from sinkstudy.model.lvlm import LVLM
from sinkstudy.trained import loop, routers
from sinkstudy.trained.connectors import DIYSink
from sinkstudy.trained.kinds import load_method

Arms = Mapping[str, Sequence[Path]]  # of one model: by arm, a folder a seed

ARM_LABELS = {  # name of the folder -> what tables call it
    "one": "one connector",
    "matched": "one connector, as many parameters",
    "two": "two connectors",
    "random": "two connectors, random split",
    "kept": "two connectors, in place",
    "normed": "one connector, normalised",
    "others": "trained without sinks",
    "sinks": "trained on sinks alone",
    "rew": "soft router",
    "gates": "gates",
    "adapters": "adapters",
}
# Trained on the same questions with all tokens in sight: their losses compare. Arms that never see a part of the
# picture end higher because of that, however long they are trained.
CONNECTORS = ("one", "matched", "two", "random", "kept", "normed")
LABELS = {
    "base": "lab model as it is",
    "two both": "two connectors",
    "two sinks": "two connectors, sinks only",
    "two others": "two connectors, no sinks",
    **{arm: label for arm, label in ARM_LABELS.items() if arm != "two"},
}
ON_TWO = ("two both", "two sinks", "two others", "rew", "true router", "two-axis router", "wrong router",
          "random router", "CoT router")
MEASURES = ("right", "logp")
QUESTION_TYPES = ("global", "local", "mixed")
SLACK = 1.05  # an arm that ends with more than so many times the loss of one connector is under-trained
STEPS = 1300  # of questions, in the lab's own schedule; an arm that had fewer is under-trained
UNDER_TRAINED = "under-trained, no verdict"


class Comparison(NamedTuple):
    """Two arms of answers, the second taken from the first; `figure` is where it is shown."""

    key: str
    first: str
    second: str
    figure: str


COMPARISONS = (
    Comparison("two_minus_one", "two both", "one", "arms"),
    Comparison("two_minus_matched", "two both", "matched", "arms"),
    Comparison("two_minus_random", "two both", "random", "arms"),
    Comparison("two_minus_kept", "two both", "kept", "arms"),
    Comparison("random_minus_one", "random", "one", "arms"),
    Comparison("kept_minus_one", "kept", "one", "arms"),
    Comparison("matched_minus_one", "matched", "one", "arms"),
    Comparison("soft_router_minus_one", "rew", "one", "arms"),
    Comparison("cot_router_minus_one", "CoT router", "one", "arms"),
    Comparison("normed_minus_one", "normed", "one", "arms"),
    Comparison("trained_on_sinks_minus_one", "sinks", "one", "arms"),
    Comparison("trained_without_sinks_minus_one", "others", "one", "arms"),
    Comparison("true_router_minus_both", "true router", "two both", "routers"),
    Comparison("two_axis_router_minus_both", "two-axis router", "two both", "routers"),
    Comparison("wrong_router_minus_both", "wrong router", "two both", "routers"),
    Comparison("random_router_minus_both", "random router", "two both", "routers"),
    Comparison("cot_router_minus_both", "CoT router", "two both", "routers"),
    Comparison("soft_router_minus_both", "rew", "two both", "routers"),
    Comparison("sinks_only_minus_both", "two sinks", "two both", "routers"),
    Comparison("no_sinks_minus_both", "two others", "two both", "routers"),
    Comparison("gates_minus_base", "gates", "base", "gates"),
    Comparison("adapters_minus_base", "adapters", "base", "gates"),
    Comparison("gates_minus_adapters", "gates", "adapters", "gates"),
)
CONTROL_COMPARISONS = ("random_minus_one", "kept_minus_one", "matched_minus_one", "random_router_minus_both",
                       "sinks_only_minus_both", "no_sinks_minus_both", "trained_on_sinks_minus_one",
                       "trained_without_sinks_minus_one")  # no methods of their own


# ------------------------------------------------------------------------------------------------- what was trained
def folders(methods: Path) -> dict[str, list[Path]]:
    """The folders of one model's trained methods, by arm in the order of `ARM_LABELS`, a folder a seed, in their order.
    """
    found: dict[str, list[Path]] = {}
    for folder in sorted(methods.glob("*-*"), key=lambda folder: (len(folder.name), folder.name)):
        arm, _, number = folder.name.rpartition("-")
        if arm in ARM_LABELS and number.isdigit():
            found.setdefault(arm, []).append(folder)
    return {arm: found[arm] for arm in ARM_LABELS if arm in found}


def losses(models: Mapping[str, Arms]) -> pd.DataFrame:
    """Loss (nats) of every step of the last stage: a row a step, `model`, `arm`, `seed`, `step`, `loss`."""
    found = []
    for model, arms in models.items():
        for arm, seed, folder in _each(arms):
            log = pd.read_csv(folder / "training.csv")
            last = log[log.stage == "tune"] if "stage" in log else log
            found.append(last[["step", "loss"]].assign(model=model, arm=arm, seed=seed))
    return _table(found, ["model", "arm", "seed", "step", "loss"])


def trained(models: Mapping[str, Arms]) -> pd.DataFrame:
    """What the folders hold, a row an arm and seed.

    Returns:
        `model`, `arm`, `seed`, `loss` (nats, mean of the last twenty steps), `steps` (of all stages), `short` (whether
        the lab trained it with fewer questions than its own schedule has) and `parameters` (numbers that were trained).
    """
    rows = []
    known = {(model, arm, seed): folder for model, arms in models.items() for arm, seed, folder in _each(arms)}
    for (model, arm, seed), of in losses(models).groupby(["model", "arm", "seed"], sort=False):
        folder = known[model, arm, seed]
        steps = loop.Method.described(folder).get("steps")  # by stage, of the lab's connectors
        rows.append({"model": model, "arm": arm, "seed": seed, "loss": of.loss.tail(20).mean(),
                     "steps": len(pd.read_csv(folder / "training.csv")),
                     "short": isinstance(steps, dict) and steps["tune"] < STEPS,
                     "parameters": sum(weight.numel() for weight in loop.kept(folder).values())})
    return pd.DataFrame(rows, columns=["model", "arm", "seed", "loss", "steps", "short", "parameters"])


def against_one(ended: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Loss at the end (rows of `trained`) of each arm of `CONNECTORS`, mean of its seeds, over that of "one".

    By model and arm; nothing of a model without a single connector. Arms that see other questions have no ratio.
    """
    mean = ended.groupby(["model", "arm"], sort=False).loss.mean()
    found: dict[str, dict[str, float]] = {model: {} for model in ended.model.unique()}
    for (model, arm), loss in mean.items():
        if arm in CONNECTORS and (model, "one") in mean:
            found[model][arm] = float(loss / mean[model, "one"])
    return found


def under_trained(ended: pd.DataFrame) -> dict[str, set[str]]:
    """The arms of each model on which no verdict rests: short ones, and those above `SLACK` (`against_one`).

    An arm whose loss has nothing to be compared with is taken as trained.
    """
    above = {model: {arm for arm, ratio in of.items() if ratio > SLACK} for model, of in against_one(ended).items()}
    short = ended[ended.short.astype(bool)]
    return {model: of | set(short.arm[short.model == model]) for model, of in above.items()}


def unfair(comparison: Comparison, weak: Collection[str]) -> bool:
    """Is one of the two arms among the `weak` ones? Routers, the soft one too, answer with the pair of connectors."""
    return any(("two" if arm in ON_TWO else arm) in weak for arm in (comparison.first, comparison.second))


def _seed(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _each(arms: Arms) -> Iterator[tuple[str, int, Path]]:
    """(arm, seed, folder) of each."""
    return ((arm, _seed(folder), folder) for arm in ARM_LABELS for folder in arms.get(arm, []))


def _table(parts: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """The parts below each other; the columns are there even where no part is."""
    return (pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()).reindex(columns=columns)


def methods(arms: Arms, arm: str, seeds: int | None = None, **where: Any) -> Iterator[tuple[int, Any]]:
    """Load the trained methods of an arm one by one, (seed, method), `seeds` of them at most.

    `where` is as `load_method` takes it.
    """
    return ((_seed(folder), load_method(folder, **where)) for folder in arms.get(arm, [])[:seeds])


def of_each(
    models: Mapping[str, Arms],
    arm: str,
    measure: Callable[[Any], pd.DataFrame],
    columns: Sequence[str],
    *,
    seeds: int | None = None,
    **where: Any,
) -> pd.DataFrame:
    """What `measure` says of every trained method (see `methods`) of an arm, with its `model` and `seed`.

    The columns are there even where no method is.
    """
    found = [measure(method).assign(model=model, seed=seed) for model, arms in models.items()
             for seed, method in methods(arms, arm, seeds, **where)]
    return _table(found, ["model", "seed", *columns])


# ------------------------------------------------------------------------------------------------- asking
ANSWER_COLUMNS = ["benchmark", "id", "image_id", "picture", "category", "type", "simple", "intervention", "right",
                  "logp"]


@dataclass(frozen=True)
class Exam:
    """The questions that all arms answer, and how they are asked."""

    tables: Mapping[str, pd.DataFrame]  # by benchmark, as `study.benchmark` gives them
    pictures: Mapping[str, Mapping[str, Any]]  # by benchmark and image_id
    public: bool  # whether the data are public ones, asked in the words of the model's family
    max_new_tokens: int = 16
    batch_size: int = 64

    def answers(
        self, lvlm: LVLM, interventions: Sequence[Intervention], among: Sequence[str] = (), **more: Any
    ) -> pd.DataFrame:
        """A row an answer, with the columns of this module but `model`, `arm` and `seed`; without `among`, to all.

        `more` is for `study.answers`.
        """
        parts = [
            study.answers(lvlm, name, self.tables[name], self.pictures[name], interventions, public=self.public,
                          max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, **more)
            for name in among or self.tables
        ]
        return pd.concat([of.reindex(columns=ANSWER_COLUMNS) for of in parts], ignore_index=True)

    def of_arm(self, arm: str, method: Any) -> pd.DataFrame:
        """`answers` of a trained method, with `arm`: of the pair of connectors once for each choice of blocks."""
        if arm != "two":
            show = {"show": method.show} if isinstance(method, DIYSink) else {}
            return self.answers(method.lvlm, [method.intervention("method", **show)]).assign(arm=arm)
        said = self.answers(method.lvlm, [method.intervention(block, show=block) for block in routers.ROUTES])
        return said.assign(arm="two " + said.intervention)

    def prompts(self, lvlm: LVLM, benchmark: str) -> list[str]:
        """The questions of a benchmark, in the words in which the model is asked."""
        return list(benchmarks.prompts(self.tables[benchmark], benchmark, study.prompt_family(lvlm, self.public)))

    def asked_itself(self, pair: Any) -> pd.DataFrame:
        """What `routers.cot` returns where the pair of connectors judges, by benchmark and id.

        Options are left out of a question of the lab that is asked about.

        Raises:
            ValueError: the model's tokenizer lacks the words.
        """
        wording = routers.GENERAL if self.public else routers.LAB
        how = pair.intervention("both", show="both")
        found = {}
        for name, table in self.tables.items():
            if not self.public:
                table = table.assign(question=table.question.str.partition(" options :")[0])
            found[name] = routers.cot(pair.lvlm, table, how, wording=wording, images=self.pictures[name],
                                      batch_size=self.batch_size)
        return pd.concat(found, names=["benchmark", "id"])

    def soft_weights(self, router: Any) -> pd.DataFrame:
        """Weights of the blocks by a soft router: a row a question, `benchmark`, `id`, `type`, `sinks`, `others`."""
        parts = []
        for name, table in self.tables.items():
            with torch.no_grad():
                given = router.weights(self.prompts(router.lvlm, name)).cpu().numpy()  # [questions, 2]
            parts.append(pd.DataFrame({"benchmark": name, "id": table.id, "type": table.get("type"),
                                       "sinks": given[:, 0], "others": given[:, 1]}))
        return pd.concat(parts, ignore_index=True)

    def gate_factors(self, gates: Any, benchmark: str) -> pd.DataFrame:
        """Factor of the keys of sinks in each gated layer, 1 for untouched: a row for each of 96 questions and layer.

        Columns are `layer` (from 1), `type` ("all" where it is not known) and `sinks`.
        """
        table = self.tables[benchmark].head(96)
        texts, rows = self.prompts(gates.lvlm, benchmark)[: len(table)], []
        for start in range(0, len(table), self.batch_size):
            part, asked = table.iloc[start : start + self.batch_size], texts[start : start + self.batch_size]
            images = list(part.image_id)
            inputs = gates.lvlm.inputs([self.pictures[benchmark][i] for i in images], asked)
            rho = gates.weights(Prefixes(inputs, images, asked))  # [questions, layers, 2]
            for layer, of in zip(gates.settings["layers"], rho.transpose(0, 1), strict=True):
                types = part["type"].fillna("all") if "type" in part else "all"
                rows.append(pd.DataFrame({"layer": layer + 1, "type": types, "sinks": 2 * of[:, 0].double().numpy()}))
        return pd.concat(rows, ignore_index=True)

    def dose(self, pair: Any, benchmark: str, weights: Sequence[float], seed: int = 0) -> pd.DataFrame:
        """What a fixed weight of one block of a pair of connectors changes, the other block having 1.

        Returns:
            `block` ("sinks" or "others"), `weight`, `measure`, and the paired difference to weights of 1 with its 95 %
            bootstrap interval over pictures, in points or nats.
        """
        how = {(block, weight): pair.intervention(f"{block} {weight}", weights=(weight, 1.0) if block == "sinks"
                                                  else (1.0, weight)) for block in ("sinks", "others")
               for weight in weights}
        said = self.answers(pair.lvlm, [pair.intervention("both"), *how.values()], [benchmark])
        before = said[said.intervention == "both"].set_index("id")
        rows = []
        for (block, weight), intervention in how.items():
            after = said[said.intervention == intervention.name].set_index("id")
            for measure in MEASURES:
                change = after.assign(**{measure: after[measure] - before[measure].reindex(after.index)})
                found = study.mean_of_benchmarks(change, measure, seed)
                rows.append({"block": block, "weight": weight, "measure": measure, **found._asdict()})
        return pd.DataFrame(rows)

    def cost(self, method: Any, blocks: Sequence[str | None], benchmark: str, passes: int) -> dict[str, float]:
        """What a question costs: passes of the decoder, visual tokens read in them, and milliseconds in this run.

        `blocks`: a pass of the answers each: the block that a pair of connectors shows, None for other methods.
        """
        lvlm, table = method.lvlm, self.tables[benchmark].head(48)
        some = replace(self, tables={benchmark: table})
        started = time.perf_counter()
        for block in blocks:
            how = method.intervention(block, show=block) if block else method.intervention("method")
            some.answers(lvlm, [how], cache=None)  # none that are kept
        spent = time.perf_counter() - started
        picture = self.pictures[benchmark][table.image_id.iloc[0]]
        tokens = len(lvlm.layout(lvlm.inputs([picture], [""]))[0].visual)
        return {"passes": passes, "visual tokens": passes * tokens, "ms a question": 1000 * spent / len(table)}


def answers_of_arms(
    exam: Exam, models: Mapping[str, Arms], bases: Mapping[str, str], *, revision: str | None = None, **where: Any
) -> pd.DataFrame:
    """What every model answers as it is, arm "base", and with each of its trained methods: a row an answer.

    `models` are the folders of methods and `bases` what `loading.load` takes, both by the model's name.
    """
    found = []
    for model, arms in models.items():
        lvlm = loading.load(bases[model], revision=revision, **where)
        found.append(exam.answers(lvlm, [NONE]).assign(model=model, arm="base", seed=0))
        for arm, seed, folder in _each(arms):
            found.append(exam.of_arm(arm, load_method(folder, **where)).assign(model=model, seed=seed))
    return _table(found, [*ANSWER_COLUMNS, "model", "arm", "seed"])


# ------------------------------------------------------------------------------------------------- routers
def hard_routes(pair: pd.DataFrame, asked: pd.DataFrame | None = None, seed: int = 0) -> dict[str, pd.Series]:
    """What each hard router decides about the questions of one pair of connectors, by benchmark and id.

    Args:
        pair: answers of one model and seed, with `type` and `simple`; no router knows a type that is not there.
        asked: what `Exam.asked_itself` gave, if the CoT router was run.
        seed: of the random router.
    """
    known = pair[pair.arm == "two both"].set_index(["benchmark", "id"]).dropna(subset=["type"])
    routes = {} if asked is None else {"CoT router": asked.route}
    if len(known):
        truth = routers.by_type(known.type)
        routes |= {"true router": truth, "wrong router": routers.opposite(truth),
                   "random router": routers.dealt_at_random(truth, seed)}
        if known.simple.notna().all():
            routes["two-axis router"] = routers.by_both_axes(known.type, known.simple.astype(bool))
    return routes


def hard_routers(said: pd.DataFrame, asked: Mapping[tuple[str, int], pd.DataFrame], seed: int = 0) -> pd.DataFrame:
    """What every hard router answers with each pair of connectors: rows like those of `said`, with the router as `arm`.

    `asked` is what `judgements` gave; the random router's seed is `seed` and the number of the pair.
    """
    pairs = said[said.arm.isin(["two both", "two sinks", "two others"])]
    found = []
    for (model, number), pair in pairs.groupby(["model", "seed"], sort=False):
        for router, route in hard_routes(pair, asked.get((model, number)), seed + number).items():
            for benchmark, of in pair.groupby("benchmark", sort=False):
                if benchmark in route.index.get_level_values(0):
                    found.append(routers.routed(of, route.loc[benchmark]).assign(arm=router))
    return pd.concat(found, ignore_index=True) if found else said.head(0)


def agreements(said: pd.DataFrame, asked: Mapping[tuple[str, int], pd.DataFrame]) -> pd.DataFrame:
    """How often the model's own judgement is right, a row a model and seed.

    Returns:
        `complexity` and `question` (shares): of the questions, those whose picture it judges rightly as simple or not;
        of the global and local ones, those that it judges rightly as holistic or not. `agreement` (share) and `kappa`
        of the CoT router with the two-axis one; and how many questions it sends where.
    """
    rows = []
    for (model, seed), own in asked.items():
        pair = said[(said.model == model) & (said.seed == seed) & (said.arm == "two both")]
        known = pair.set_index(["benchmark", "id"])
        routes = hard_routes(pair, own)
        if "two-axis router" in routes:
            fits = routers.agreement(own.route, routes["two-axis router"])
            one_sided = known.type[known.type != "mixed"]
            simple, whole = known.simple.astype(bool), one_sided == "global"
            rows.append({"model": model, "seed": seed,
                         "complexity": ((own.simple > 0).loc[simple.index] == simple).mean(),
                         "question": ((own.holistic > 0).loc[whole.index] == whole).mean(),
                         "agreement": fits.accuracy, "kappa": fits.kappa,
                         **{f"to {way}": int(fits.table[way].sum()) for way in routers.ROUTES}})
    to = [f"to {way}" for way in routers.ROUTES]
    return pd.DataFrame(rows, columns=["model", "seed", "complexity", "question", "agreement", "kappa", *to])


def judgements(exam: Exam, models: Mapping[str, Arms], **where: Any) -> dict[tuple[str, int], pd.DataFrame]:
    """What every pair of connectors judges about the questions, by model and seed, see `Exam.asked_itself`.

    Of a model that lacks the words there is nothing, and why is printed.
    """
    found = {}
    for model, arms in models.items():
        for number, pair in methods(arms, "two", **where):
            try:
                found[model, number] = exam.asked_itself(pair)
            except ValueError as error:
                print(f"CoT router not run: {error}")
    return found


def with_reported(
    said: pd.DataFrame, exam: Exam, models: Mapping[str, Arms], bases: Mapping[str, str], seed: int = 0, **where: Any
) -> pd.DataFrame:
    """`said`, and answers to the other benchmarks of an exam, of the arms that the paper's tables have.

    Arguments are as `answers_of_arms` returns and takes them; `seed` is of the routers.
    """
    rest = replace(exam, tables={name: of for name, of in exam.tables.items() if name not in set(said.benchmark)})
    if not rest.tables or not models:
        return said
    few = {model: {arm: arms[arm] for arm in ("one", "two", "rew") if arm in arms} for model, arms in models.items()}
    more = answers_of_arms(rest, few, bases, **where)
    routed = hard_routers(more, judgements(rest, few, **{key: where[key] for key in where if key != "revision"}), seed)
    return pd.concat([said, more, routed], ignore_index=True)


# ------------------------------------------------------------------------------------------------- estimates
def by_seed(said: pd.DataFrame, arm: str, measure: str) -> pd.DataFrame:
    """One model's answers of an arm, a row a question and a column a seed."""
    of = said[said.arm == arm]
    return of.pivot(index=["benchmark", "id", "picture", "type"], columns="seed", values=measure)


def difference(said: pd.DataFrame, first: str, second: str, measure: str) -> pd.DataFrame:
    """First minus second on each question of one model: a row a question and a column a seed.

    Every seed is set against itself; the model as it is, "base", has none and is set against each. Empty if one is
    missing.
    """
    a, b = by_seed(said, first, measure), by_seed(said, second, measure)
    if a.empty or b.empty:
        return a.iloc[:0, :0]
    if second == "base":
        return a.sub(b.mean(axis=1), axis=0)
    return (a - b)[[seed for seed in a if seed in b]]


def subsets(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Rows all together ("mean", each benchmark counting alike), of each benchmark, and of each type of question."""
    of_benchmarks = {name: rows[rows.benchmark == name] for name in names}
    return {"mean": rows, **of_benchmarks, **{kind: rows[rows.type == kind] for kind in QUESTION_TYPES}}


def accuracy(said: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Mean of every arm in every benchmark, and over benchmarks ("mean"), which count alike.

    Returns:
        `model`, `arm`, `benchmark`, `measure`, `value` (%, or nats), `low`, `high`, `n` (pictures), `df`. Intervals are
        those of `study.mean_of_seeds`; of the model as it is, trained once, a bootstrap over pictures without `df`.
    """
    rows = []
    names = [*said.benchmark.unique(), "mean"]
    for (model, arm), of in said.groupby(["model", "arm"], sort=False):
        for measure in MEASURES:
            seeds = by_seed(of, arm, measure)
            apart = subsets(seeds.reset_index(), names[:-1])
            for name in names:
                if arm == "base":
                    once = apart[name].rename(columns={0: measure})
                    found, df = study.mean_of_benchmarks(once, measure, seed), np.nan
                else:
                    found, df = study.mean_of_seeds(apart[name], list(seeds), measure)
                if measure == "right":  # a share, however wide Student's interval is
                    low, high = np.clip([found.low, found.high], 0, 100)
                    found = found._replace(low=float(low), high=float(high))
                of_cell = {"model": model, "arm": arm, "benchmark": name, "measure": measure}
                rows.append({**of_cell, **found._asdict(), "df": df})
    return pd.DataFrame(rows, columns=["model", "arm", "benchmark", "measure", "value", "low", "high", "n", "df"])


WHAT = ["model", "key", "figure", "method", "way", "benchmark", "measure"]  # columns that name a comparison


def comparisons(said: pd.DataFrame, weak: Mapping[str, Collection[str]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Paired differences between arms, of all benchmarks, of each, and of each type of question.

    Args:
        said: a row an answer, with those of the routers.
        weak: by model, the arms of `under_trained`.

    Returns:
        The estimates: `WHAT`, `value` (points, or nats), `low`, `high`, `n` (pictures), `df`, by `study.mean_of_seeds`,
        and the `verdict`: "better", "worse", "no clear difference", or, whatever the numbers, `UNDER_TRAINED`. And each
        seed by itself: `WHAT`, `seed`, `value`, benchmarks counting alike.
    """
    rows, seeds = [], []
    names = list(said.benchmark.unique())
    for (model, of), comparison in product(said.groupby("model", sort=False), COMPARISONS):
        no_verdict = unfair(comparison, weak.get(model, ()))
        apart = {measure: difference(of, comparison.first, comparison.second, measure) for measure in MEASURES}
        for part, measure in product(["mean", *names, *QUESTION_TYPES], MEASURES):
            change = apart[measure]
            there = subsets(change.reset_index(), names)[part] if len(change) else change
            found, df = study.mean_of_seeds(there, list(change), measure)
            if np.isfinite(found.value):
                what = _named(model, comparison) | {"benchmark": part, "measure": measure}
                rows.append({**what, **found._asdict(), "df": df, "verdict": verdict(found, no_verdict)})
                each = there.groupby("benchmark")[list(change)].mean().mean()
                seeds += [{**what, "seed": seed, "value": value} for seed, value in each.items()]
    return (pd.DataFrame(rows, columns=[*WHAT, "value", "low", "high", "n", "df", "verdict"]),
            pd.DataFrame(seeds, columns=[*WHAT, "seed", "value"]))


def reported_comparisons(said: pd.DataFrame, weak: Mapping[str, Collection[str]], among: Sequence[Comparison]
                ) -> pd.DataFrame:
    """Arms against each other in the columns of the paper's tables; arguments as in `comparisons`, with `category`.

    Returns:
        `model`, `key`, `method`, `column` of `study.REPORTED`, `before`, the mean of the second arm, `score`, of the
        first; their paired difference `value`, `low`, `high`, `n` (pictures), `df`, by `study.mean_of_seeds`; and the
        `verdict`. In % and points, "MME all" in its own points.
    """
    rows = study.reported(said, ["model", "arm", "seed"]).assign(type="all")
    found = []
    for (model, column), of in rows.groupby(["model", "column"], sort=False):
        scale = of.scale.iloc[0]
        for comparison in among:
            change = difference(of, comparison.first, comparison.second, "right")
            if change.size:
                mean, df = study.mean_of_seeds(change.reset_index(), list(change), "right")
                before, score = (by_seed(of, arm, "right")[list(change)].groupby("benchmark").mean().mean().mean()
                                 for arm in (comparison.second, comparison.first))
                found.append({**_named(model, comparison), "column": column, "before": scale * before,
                              "score": scale * score, **study.scaled(mean, scale)._asdict(), "df": df,
                              "verdict": verdict(mean, unfair(comparison, weak.get(model, ())))})
    columns = ["model", "key", "method", "column", "before", "score", "value", "low", "high", "n", "df", "verdict"]
    return pd.DataFrame(found, columns=columns)


def _named(model: str, comparison: Comparison) -> dict[str, str]:
    first, second = (LABELS.get(arm, arm) for arm in (comparison.first, comparison.second))
    return {"model": model, "key": comparison.key, "figure": comparison.figure, "method": first,
            "way": f"against {second}"}


def metric_of(row: Any) -> str:
    """How a metric's name begins, of a row with `model`, `key`, `verdict`: no claim reads those without a verdict."""
    return f"{row.model}.{'under_trained.' * (row.verdict == UNDER_TRAINED)}{row.key}"


def verdict(found: stats.Interval, no_verdict: bool = False) -> str:
    """What an interval of a difference says, if training was fair."""
    if no_verdict:
        return UNDER_TRAINED
    return "better" if found.low > 0 else "worse" if found.high < 0 else "no clear difference"


# ------------------------------------------------------------------------------------------------- figure
def forest_plot(rows: pd.DataFrame, seeds: pd.DataFrame, colours: Mapping[str, str]) -> mpl.figure.Figure:
    """A panel a model, a row a comparison: its estimate with interval, hollow where an arm is under-trained.

    Args:
        rows: estimates of `comparisons`, one for each model and key.
        seeds: the seeds of the same, which become ticks.
        colours: by model.
    """
    models, keys = list(dict.fromkeys(rows.model)), list(dict.fromkeys(rows.key))
    labels = {row.key: f"{row.method} −\n{row.way.removeprefix('against ')}" for row in rows.itertuples()}
    ink, size = plt.rcParams["text.color"], (3 + 2.2 * max(1, len(models)), 1.3 + 0.5 * max(1, len(keys)))
    fig, axes = plt.subplots(1, max(1, len(models)), figsize=size, sharey=True, sharex=True, squeeze=False)
    for ax, model in zip(axes[0], models, strict=False):
        for row in rows[rows.model == model].itertuples():
            at, colour = keys.index(row.key), colours[model]
            each = seeds[(seeds.model == model) & (seeds.key == row.key)].value
            ax.errorbar(row.value, at, xerr=[[row.value - row.low], [row.high - row.value]], fmt="o", ms=6, lw=1.4,
                        color=colour, mfc="none" if row.verdict == UNDER_TRAINED else colour)
            ax.plot(each, np.full(len(each), at + 0.25), "|", ms=7, color=ink)
        ax.axvline(0, ls=":", color=ink)
        ax.set(title=model, xlabel="right answers, points", ylim=(len(keys) - 0.5, -0.5))
    axes[0, 0].set_yticks(range(len(keys)), [labels[key] for key in keys])
    handles = [mpl.lines.Line2D([], [], ls="", marker=marker, color=ink, mfc=fill, label=label) for marker, fill, label
               in (("o", ink, "mean of the seeds"), ("o", "none", UNDER_TRAINED), ("|", ink, "one seed"))]
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig
