"""The training-free methods, one table: `sinkstudy route` and the chapter on them take theirs from `METHODS`.

What a method acts on is found from the pictures alone: no answer is looked at. Its control does the same to as many
random others. What helps with any tokens is no use of sinks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import pandas as pd
import torch

from sinkstudy import benchmarks, paths, sinks, stats
from sinkstudy.answers import study
from sinkstudy.answers.evaluate import ANSWERS, NONE, Intervention
from sinkstudy.benchmarks import harness
from sinkstudy.effects import ablation, moving, neurons
from sinkstudy.effects.ablation import Masks
from sinkstudy.model import capture
from sinkstudy.model.groups import of_patches
from sinkstudy.model.lvlm import LVLM

# of `effect`; chapter 10 has the same, as a test holds, for papermill wants plain values in a notebook
DEFAULTS: dict[str, Any] = {"criterion": "above_median", "threshold": 3.0, "max_new_tokens": 16, "batch_size": 64,
                            "seed": 0}
LOOKED_AT = 64  # pictures at most by which neurons are found; a quarter of them for the decoder's dimensions

T = TypeVar("T")
Way = tuple[str, float | None]  # a method of `METHODS`, and the value of its option


# ------------------------------------------------------------------------------------------------- what is acted on
class Targets(NamedTuple):
    """Patches of each picture, bool [patches] by the picture's key."""

    name: Literal["sinks", "top 2 %"]  # what stands for sinks
    sinks: dict[Any, torch.Tensor]
    random: dict[Any, torch.Tensor]  # as many others


def targets(
    of: Mapping[tuple[str, str], tuple[torch.Tensor, torch.Tensor]],
    criterion: str = "above_median",
    threshold: float = 3.0,
    seed: int = 0,
) -> Targets:
    """The sinks among the patches of pictures, and as many random others; only patches that the decoder gets.

    Where there are fewer than one in two pictures, the 2 % of highest norm of each picture stand for them.

    Args:
        of: norms, float [patches], and which the decoder gets, bool [patches], of each picture.
        criterion, threshold: what a sink is, see `sinks.rule`.

    Raises:
        ValueError: an unknown criterion.
    """
    rule = sinks.rule(criterion, threshold)
    found = {key: of_patches(n, rule, read=read) for key, (n, read) in of.items()}
    enough = sum(int(masks["sinks"].sum()) for masks in found.values()) >= 0.5 * len(found)
    name: Literal["sinks", "top 2 %"] = "sinks" if enough else "top 2 %"
    chosen = {key: masks[name] for key, masks in found.items()}
    random = {key: sinks.random_like(mask, seed + i, of[key][1]) for i, (key, mask) in enumerate(chosen.items())}
    return Targets(name, chosen, random)


@torch.no_grad()
def decoder_sink_dimensions(lvlm: LVLM, pictures: Sequence[Any]) -> list[int]:
    """The decoder's sink dimensions: lit at the first token behind the middle layer, see `sinks.sink_dimensions`."""
    middle = len(lvlm.decoder_layers) // 2

    def first_token(hidden: torch.Tensor, layer: int) -> torch.Tensor:
        return sinks.dimension_profile(hidden[:, :1])

    with capture.hidden_states(lvlm, "decoder", first_token, [middle]) as seen:
        inputs = lvlm.inputs(pictures, [""] * len(pictures))
        lvlm.model(**inputs, logits_to_keep=1)
    return sinks.sink_dimensions(seen[middle][0].cpu())


def tau(lvlm: LVLM) -> float:
    """VAR's threshold of phi, 20 at width 4,096, scaled with the root of the width."""
    return 0.3125 * lvlm.model.config.get_text_config().hidden_size ** 0.5


class Case:
    """A model and the pictures that it is asked about, with what methods act on there.

    Args:
        pictures: of each benchmark, by image id, as for `neurons.norms`.
        criterion, threshold: what a sink is, see `sinks.rule`.
        seed: of all that is random.

    Raises:
        ValueError: as `neurons.norms` and `targets`.
    """

    def __init__(
        self,
        lvlm: LVLM,
        pictures: Mapping[str, Mapping[str, Any]],
        *,
        criterion: str = DEFAULTS["criterion"],
        threshold: float = DEFAULTS["threshold"],
        batch_size: int = DEFAULTS["batch_size"],
        seed: int = DEFAULTS["seed"],
    ) -> None:
        self.lvlm, self.pictures, self.batch_size, self.seed = lvlm, pictures, batch_size, seed
        self._all = {(name, image): picture for name, of in pictures.items() for image, picture in of.items()}
        of = neurons.norms_and_read(lvlm, self._all, batch_size=batch_size)
        self.norms = {key: norms for key, (norms, _) in of.items()}  # by benchmark and image id, like the groups
        self.read = {key: read for key, (_, read) in of.items()}
        self.targets = targets(of, criterion, threshold, seed)

    @cached_property
    def dimensions(self) -> list[int]:
        """The decoder's sink dimensions, see `decoder_sink_dimensions`."""
        return decoder_sink_dimensions(self.lvlm, list(self._all.values())[: min(LOOKED_AT // 4, self.batch_size)])

    def neurons(self, k: int) -> dict[int, torch.Tensor]:
        """The k neurons that write the sinks' norm, by layer, see `neurons.register_scores`.

        Raises:
            ValueError: as there and `neurons.strongest`, or a tower that takes no added token.
        """
        neurons.check_takes_register(self.lvlm)
        return neurons.strongest(self._scores, k)

    @cached_property
    def _scores(self) -> torch.Tensor:
        masks = torch.stack([self.targets.sinks[key] for key in self._looked_at])
        pictures = [self._all[key] for key in self._looked_at]
        return neurons.register_scores(self.lvlm, pictures, masks, self.batch_size)

    @cached_property
    def _looked_at(self) -> list[tuple[str, str]]:
        """By which neurons are found: the first pictures that have as many patches as the very first."""
        n = len(next(iter(self.norms.values())))
        return [key for key, of in self.norms.items() if len(of) == n][:LOOKED_AT]

    def norm_left(self, k: int) -> stats.Interval:
        """Share of the sinks' norm that k register neurons leave, on the pictures by which they were found.

        Raises:
            ValueError: as `neurons`.
        """
        moved = Intervention("moved", lambda lvlm, inputs: neurons.moved_to_register(lvlm, self.neurons(k)))
        pictures = {key: self._all[key] for key in self._looked_at}
        after = neurons.norms(self.lvlm, pictures, moved, self.batch_size)
        masks = {key: mask for key in after if (mask := self.targets.sinks[key]).any()}
        means = [[of[key][mask].mean().item() for key, mask in masks.items()] for of in (after, self.norms)]
        return stats.ratio_interval(*means)


def _as_many(masks: Masks, others: Masks) -> Masks:
    """The others, once every picture has as many as are in its group."""
    for image, mask in masks.items():
        if others[image].sum() < mask.sum():
            raise ValueError(f"{int(mask.sum())} of the {len(mask)} patches of picture {image!r} are meant: there are "
                             "not as many others for a control, take a smaller k or a stricter threshold")
    return others


@dataclass(frozen=True)
class ActedOn:
    """What a method acts on in the pictures of one benchmark, or, `at_random`, what its control does."""

    case: Case
    benchmark: str
    at_random: bool = False

    def _here(self, of: Mapping[tuple[str, str], T]) -> dict[str, T]:
        return {image: x for (benchmark, image), x in of.items() if benchmark == self.benchmark}

    @property
    def tokens(self) -> Masks:
        """The sinks, or as many others.

        Raises:
            ValueError: a picture has fewer others.
        """
        own = self._here(self.case.targets.sinks)
        return _as_many(own, self._here(self.case.targets.random)) if self.at_random else own

    def highest(self, k: int | None) -> Masks:
        """The k patches of highest norm, a quarter without k; or as many others.

        Raises:
            ValueError: a picture has no more than k patches, or fewer others.
        """
        norms, read = self._here(self.case.norms), self._here(self.case.read)
        there = {image: int(mask.sum()) for image, mask in read.items()}
        if k is not None and (few := [image for image, n in there.items() if n <= k]):
            raise ValueError(f"k is {k}, and picture {few[0]!r} has no more than {there[few[0]]} patches")
        highest = {image: sinks.top_k(n.masked_fill(~read[image], -1), k or max(1, there[image] // 4))
                   for image, n in norms.items()}
        if not self.at_random:
            return highest
        return _as_many(highest, {image: sinks.random_like(mask, self.case.seed + i, read[image])
                                  for i, (image, mask) in enumerate(highest.items())})

    def neurons(self, k: int) -> dict[int, list[int]]:
        """The k neurons that write the sinks' norm, or as many others of the same layers.

        Raises:
            ValueError: as `Case.neurons`, or a layer has fewer others.
        """
        found = self.case.neurons(k)
        if self.at_random:
            reads = self.case.lvlm.vision_layers[0].get_submodule(self.case.lvlm.spec.vision_neurons)
            others = neurons.random_neurons(found, reads.in_features, self.case.seed)
            if few := [layer for layer, of in found.items() if len(others[layer]) < len(of)]:
                raise ValueError(f"k is {k}: layer {few[0]} has fewer other neurons for a control, take a smaller k")
            found = others
        return {layer: of.tolist() for layer, of in found.items()}

    def var(self) -> dict[str, Any]:
        """What VAR is told of the decoder.

        Raises:
            ValueError: the first token lights no dimension.
        """
        if not self.case.dimensions:
            raise ValueError(f"{self.case.lvlm.name}: VAR has nothing to move, the first token lights no dimension")
        return {"dimensions": self.case.dimensions, "tau": tau(self.case.lvlm)}


# ------------------------------------------------------------------------------------------------- the methods
class TrainingFree(NamedTuple):
    """A way to make a model use its sinks differently; `at_random`, the control of one."""

    words: str
    act: Callable[[ActedOn, Any], tuple]  # with the option's value: a context, the patches, further arguments
    option: Literal["", "weight", "k"] = ""
    default: float | None = None  # of the option
    check: Callable[[LVLM], object] | None = None  # raises ValueError for a model that cannot; needs no weights
    at_random: bool = False


_reordered, _hidden, _takes = moving.reordered, ablation.hidden, neurons.check_takes_register
_sees = ablation.attentions
_OF_SINKS = {
    "front": TrainingFree(
        "sinks to the front of the visual tokens, position ids travel", lambda of, _: (_reordered, of.tokens, {})),
    "front-renumber": TrainingFree(
        "the same, position ids renumbered", lambda of, _: (_reordered, of.tokens, {"ids": "renumber"})),
    "front-top-k": TrainingFree(
        "the k patches of highest norm to the front, a quarter by default, position ids travel",
        lambda of, k: (_reordered, of.highest(k), {}), "k"),
    "end": TrainingFree(
        "sinks to the end of the visual tokens, position ids travel",
        lambda of, _: (_reordered, of.tokens, {"to": "end"})),
    "end-renumber": TrainingFree(
        "the same, position ids renumbered", lambda of, _: (_reordered, of.tokens, {"to": "end", "ids": "renumber"})),
    "features": TrainingFree(
        "projected features of sinks times a weight",
        lambda of, weight: (moving.reweighted, of.tokens, {"chosen_by": weight}), "weight", 0.5),
    "keys": TrainingFree(
        "keys of sinks times a weight, in all decoder layers",
        lambda of, weight: (moving.gated, of.tokens, {"chosen_by": weight}), "weight", 0.0, moving.key_makers),
    "others-only": TrainingFree(
        "no later token sees a sink", lambda of, _: (_hidden, of.tokens, {}), check=_sees),
    "sinks-only": TrainingFree(
        "no later token sees a visual token but sinks",
        lambda of, _: (_hidden, of.tokens, {"others": True}), check=_sees),
    "keep-top-k": TrainingFree(
        "only the k patches of highest norm, a quarter by default",
        lambda of, k: (_hidden, of.highest(k), {"others": True}), "k", check=_sees),
    "test-time-registers": TrainingFree(
        "k register neurons write to an added token",
        lambda of, k: (moving.registered, None, {"neurons": of.neurons(k)}), "k", 10, _takes),
}
METHODS = _OF_SINKS | {
    "test-time-registers-passed": TrainingFree(
        "the same, and the token takes the place of the patch of highest norm",
        lambda of, k: (moving.registered, of.highest(1), {"neurons": of.neurons(k)}), "k", 10, _takes),
    "var": TrainingFree(
        "attention of the decoder's sinks to other visual tokens",
        lambda of, _: (moving.redistributed, None, of.var())),
} | {
    f"random-{name}": known._replace(words=f"control of {name}: the same with as many random others", at_random=True)
    for name, known in _OF_SINKS.items()
}
SHORT = {"front": "to the front", "front-renumber": "to the front, renumbered", "end": "to the end",
         "end-renumber": "to the end, renumbered", "others-only": "left out", "sinks-only": "only these stay",
         "keep-top-k": "only the top quarter", "test-time-registers": "register",
         "test-time-registers-passed": "register passed on", "var": "VAR"}
"""What figures and sentences call a method, where its name alone would not tell a reader."""


def short(method: str, way: str) -> str:
    """A method of a table, and its `way` there, for a reader: "keys × ½", "left out (random)"; others as they are."""
    own, (option, _, value) = method.removeprefix("random-"), way.partition(" ")
    words = SHORT.get(own, own)
    if option == "weight":
        words += f" × {value}".replace("0.5", "½")
    elif option != "k" or float(value) != METHODS[own].default:
        words += f" {way}" * bool(way)
    return words + " (random)" * (own != method)


def applied(case: Case, benchmark: str, method: str, value: float | None) -> Intervention:
    """A method on the pictures of a benchmark, by its name.

    Raises:
        ValueError: a model in which it has nothing to act on.
    """
    known = METHODS[method]
    context, masks, how = known.act(ActedOn(case, benchmark, known.at_random), value)
    return moving.intervention(f"{method}|{way(method, value)}", context, masks, **how)


def way(method: str, value: float | None) -> str:
    """How a method was used, "weight 0.5"; empty without an option, or where it has no value."""
    return "" if value is None else f"{METHODS[method].option} {value:g}"


def option(method: str, weight: float | None = None, k: int | None = None) -> float | int | None:
    """The value of a method's option, or its default.

    Raises:
        ValueError: an unknown method, an option that it does not have, or a k below 1.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    given = {"weight": weight, "k": k}
    known = METHODS[method]
    for name, value in given.items():
        if value is not None and name != known.option:
            raise ValueError(f"the method {method} takes no {name}")
    if k is not None and k < 1:
        raise ValueError(f"k is 1 at least, and {k} is not")
    value = given.get(known.option)
    return known.default if value is None else value


# ------------------------------------------------------------------------------------------------- its effect
def data(
    model_is_labs: bool, benchmark: str, data_dir: str, hub: bool, limit: int
) -> tuple[str, pd.DataFrame, dict[str, Any]]:
    """A benchmark by its name in any spelling, its questions and its pictures, see `study.benchmark`.

    Raises:
        ValueError: an unknown benchmark, public data that are not there, or a model that is not the lab's without them.
    """
    public = hub or bool(data_dir)
    if not public and not model_is_labs:
        raise ValueError("the lab's benchmarks are for lab models: --hub or --data-dir FOLDER gives public ones")
    known = {name.lower(): name for name in (benchmarks.SOURCES if public else study.LAB_BENCHMARKS)}
    if benchmark.lower() not in known:
        whose = "public" if public else "of the lab"
        raise ValueError(f"unknown benchmark {benchmark!r}; those {whose} are {', '.join(known.values())}")
    name = known[benchmark.lower()]
    found = study.benchmark(name, data_dir, hub, limit)
    if found is None:
        raise ValueError(f"no data of {name}: there is no folder {Path(data_dir) / name}, nor a file of that name")
    return name, *found


def effect(
    lvlm: LVLM,
    method: str,
    value: float | int | None,
    benchmark: str,
    table: pd.DataFrame,
    pictures: Mapping[str, Any],
    *,
    public: bool = False,
    max_new_tokens: int = DEFAULTS["max_new_tokens"],
    cache: str | Path | None = ANSWERS,
    harnesses: Path | None = None,
    **of_case: Any,
) -> pd.DataFrame:
    """What a method does to the answers to a benchmark.

    Args:
        method: of `METHODS`, with the `value` that `option` gives.
        benchmark: its name, with `table` and `pictures` as `study.benchmark` gives them.
        public: whether these are public data, asked in the words of the model's family.
        max_new_tokens, cache: as in `evaluate`.
        harnesses: a folder for the answers in the form of other harnesses, see `benchmarks.harness`; None for none.
        of_case: further arguments of `Case`; its seed is also that of the bootstrap.

    Returns:
        Three rows a measure, `what` being baseline, method and difference, with `value`, `low` and `high`: mean over
        questions and its 95 % bootstrap interval over `pictures`, paired for the difference. Measures: `right`, answers
        right by the benchmark's official rule, in %; and, where first tokens tell the possible answers apart, `logp`,
        the log-probability of the right one's first token, in nats.

    Raises:
        ValueError: as `evaluate`, or for a model that the method cannot work on.
    """
    case = Case(lvlm, {benchmark: pictures}, **of_case)
    how = applied(case, benchmark, method, value)
    said = study.answers(lvlm, benchmark, table, pictures, [NONE, how], public=public, cache=cache,
                         batch_size=case.batch_size, max_new_tokens=max_new_tokens)
    if harnesses is not None:
        for name, part in said.groupby("intervention"):
            whose = paths.slug(lvlm.name) + ("" if name == NONE.name else f"--{method}")
            asked = part.question.tolist()
            harness.write(part.assign(question=table.question.to_numpy()), benchmark, asked, whose, harnesses)
    whole = {"baseline": said[said.intervention == NONE.name], "method": said[said.intervention == how.name],
             "difference": ablation.effects(said)}
    rows = study.means(study.long(pd.concat([of.assign(what=what) for what, of in whole.items()])), ["what"], case.seed)
    rows = rows[(rows.benchmark == benchmark) & (rows.n > 0)].rename(columns={"n": "pictures"})
    notes = {"data": "public" if public else "lab", "method": method, "option": METHODS[method].option,
             "option_value": value, "group": case.targets.name, "questions": len(table), "seed": case.seed}
    return rows.assign(unit=rows.measure.map({"right": "%", "logp": "nats"}), **notes).reset_index(drop=True)


def applicable(case: Case, ways: Iterable[Way]) -> list[Way]:
    """Those methods that have something to act on in a model. Why others have not is printed."""
    found, reasons = [], []
    for method, value in ways:
        try:
            applied(case, next(iter(case.pictures)), method, value)
            found.append((method, value))
        except ValueError as reason:
            reasons.append(str(reason))
    for reason in dict.fromkeys(reasons):
        print(reason)
    return found


def answers_under(
    case: Case, tables: Mapping[str, pd.DataFrame], ways: Sequence[Way], *, public: bool, **settings: Any
) -> pd.DataFrame:
    """Answers to some benchmarks, of the untouched model and under methods.

    Args:
        tables: by benchmark, as `study.benchmark` gives them.
        ways: methods that fit.
        public, settings: as in `study.answers`; the batch size is the case's.

    Returns:
        The rows of `study.answers`, with `group`, what stands for sinks; `method`, of the untouched model "none"; and
        its `way`. A control has the method's name behind "random-".

    Raises:
        ValueError: as `evaluate`, or a method that does not fit.
    """
    found = []
    for name, table in tables.items():
        made = [NONE, *(applied(case, name, *of) for of in ways)]
        found.append(study.answers(case.lvlm, name, table, case.pictures[name], made, public=public,
                                   batch_size=case.batch_size, **settings))
    said = pd.concat(found, ignore_index=True)
    said[["method", "way"]] = (said.intervention + "|").str.split("|", expand=True)[[0, 1]]
    return said.assign(group=case.targets.name)


def changes(
    case: Case, tables: Mapping[str, pd.DataFrame], ways: Sequence[Way], *, public: bool, **settings: Any
) -> pd.DataFrame:
    """What methods change in the answers to some benchmarks: `answers_under` less those of the untouched model.

    Returns:
        The rows of `study.long`, in points and nats, with the columns of `answers_under`.

    Raises:
        ValueError: as `answers_under`.
    """
    said = answers_under(case, tables, ways, public=public, **settings)
    found = [ablation.effects(of) for _, of in said.groupby("benchmark", sort=False)]
    return study.long(pd.concat(found, ignore_index=True))


def reported_changes(said: pd.DataFrame, by: Sequence[str], method: str, against: str, seed: int = 0) -> pd.DataFrame:
    """What a method changes in the columns of the paper's tables, against another or the untouched model, "none".

    Args:
        said: as `answers_under` returns it, of one model or, with more columns, of several.
        by: columns that name a model.

    Returns:
        `by`, `column` of `study.REPORTED`, `before` and `score`, without and with the method, and their paired
        difference: `value`, `low`, `high` and `n` (pictures); of accuracies in % and points, of "MME all" in its own.
    """
    rows = study.reported(said, [*by, "method"])
    pairs = rows[rows.method == method].merge(
        rows[rows.method == against], on=[*by, "column", "benchmark", "id", "picture", "scale"],
        suffixes=("_after", "_before"))
    found = []
    for cell, of in pairs.groupby([*by, "column"], sort=False):
        scale = of.scale.iloc[0]
        before, score = scale * of.groupby("benchmark")[["right_before", "right_after"]].mean().mean()
        change = study.mean_of_benchmarks(of.assign(right=of.right_after - of.right_before), "right", seed)
        found.append((*cell, before, score, *study.scaled(change, scale)))
    return pd.DataFrame(found, columns=[*by, "column", "before", "score", "value", "low", "high", "n"])
