"""One training-free method on one benchmark, beside the untouched model: `sinkstudy route`.

`METHODS` is the table of the methods that can be named. What they act on is found from the pictures alone: no answer
is looked at.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch

from sinkstudy import benchmarks, paths, sinks, stats
from sinkstudy.answers import study
from sinkstudy.answers.evaluate import ANSWERS, NONE, Intervention
from sinkstudy.benchmarks import harness
from sinkstudy.effects import ablation, moving, neurons
from sinkstudy.effects.ablation import Masks
from sinkstudy.model import capture
from sinkstudy.model.lvlm import LVLM

# of `effect`; chapter 10 has the same, as a test holds, for papermill wants plain values in a notebook
DEFAULTS: dict[str, Any] = {
    "criterion": "above_median",
    "threshold": 3.0,
    "max_new_tokens": 16,
    "batch_size": 64,
    "seed": 0,
}
LOOKED_AT = 64  # pictures at most by which neurons are found; a quarter of them for the decoder's dimensions


# ------------------------------------------------------------------------------------------------- what is acted on
@torch.no_grad()
def norms(lvlm: LVLM, pictures: Mapping[Hashable, Any], batch_size: int = 16) -> dict[Hashable, torch.Tensor]:
    """Norms of each picture's patches where the connector reads them: float32 [patches], on the CPU.

    Args:
        pictures: by any key; of any sizes, as for `LVLM.inputs` or in a parquet file.

    Raises:
        ValueError: norms that are not finite, with the picture's key.
    """
    keys, of, read = list(pictures), {}, []

    def keep(patches: torch.Tensor, layer: int) -> torch.Tensor:
        if layer == lvlm.feature_layer:
            read[:] = [capture.token_norms(patches).cpu()]
        return patches

    with lvlm.editing(before=keep):
        for at, inputs in lvlm.batches([pictures[key] for key in keys], batch_size=batch_size):
            batch = keys[at]
            lvlm.see(inputs)
            of |= {key: read[0][layout.connector] for key, layout in zip(batch, lvlm.layout(inputs), strict=True)}
            for key in batch:
                if not of[key].isfinite().all():
                    raise capture.not_finite(lvlm, "at the connector's input", repr(key))
    return of


class Groups(NamedTuple):
    """Patches of each picture, bool [patches] by the picture's key."""

    name: Literal["sinks", "top 2 %"]  # what stands for sinks
    sinks: dict[Any, torch.Tensor]
    random: dict[Any, torch.Tensor]  # as many others


def groups(
    of: Mapping[Hashable, torch.Tensor], criterion: str = "above_median", threshold: float = 3.0, seed: int = 0
) -> Groups:
    """The sinks among patches of these norms, and as many random others.

    Where there are fewer than one in two pictures, the 2 % of highest norm of each picture stand for them.

    Args:
        of: norms, float [patches] of each picture.
        criterion, threshold: what a sink is, see `sinks.rule`.
        seed: of the draw.

    Raises:
        ValueError: an unknown criterion.
    """
    rule = sinks.rule(criterion, threshold)
    found = {key: rule(n) for key, n in of.items()}
    enough = sum(int(mask.sum()) for mask in found.values()) >= 0.5 * len(found)
    chosen = found if enough else {key: sinks.percentile(n, 98) for key, n in of.items()}
    random = {key: sinks.random_like(mask, seed=seed + i) for i, (key, mask) in enumerate(chosen.items())}
    return Groups("sinks" if enough else "top 2 %", chosen, random)


@torch.no_grad()
def sink_dimensions(lvlm: LVLM, pictures: Sequence[Any]) -> list[int]:
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


def register_neurons(
    lvlm: LVLM, pictures: Mapping[Any, Any], masks: Masks, k: int, batch_size: int
) -> dict[int, list[int]]:
    """`neurons.register_neurons` of the first `LOOKED_AT` pictures that have as many patches as the very first."""
    n = len(next(iter(masks.values())))
    keys = [key for key, mask in masks.items() if len(mask) == n][:LOOKED_AT]
    shown = [pictures[key] for key in keys]
    found = neurons.register_neurons(lvlm, shown, torch.stack([masks[key] for key in keys]), k, batch_size)
    return {layer: of.tolist() for layer, of in found.items()}


# ------------------------------------------------------------------------------------------------- the methods
@dataclass(frozen=True)
class Case:
    """What a method can need."""

    lvlm: LVLM
    pictures: Mapping[Any, Any]
    norms: Mapping[Any, torch.Tensor]
    sinks: Masks
    random: Masks
    batch_size: int


class TrainingFree(NamedTuple):
    words: str
    make: Callable[[Case, Any], Intervention]  # with the option's value
    option: Literal["", "weight", "k"] = ""
    default: float | None = None  # of the option
    check: Callable[[LVLM], None] | None = None  # raises ValueError for a model that cannot; needs no weights


def _front(case: Case, _: None) -> Intervention:
    return moving.intervention("front", moving.reordered, case.sinks)


def _front_renumber(case: Case, _: None) -> Intervention:
    return moving.intervention("front-renumber", moving.reordered, case.sinks, ids="renumber")


def _end(case: Case, _: None) -> Intervention:
    return moving.intervention("end", moving.reordered, case.sinks, to="end")


def _random_front(case: Case, _: None) -> Intervention:
    return moving.intervention("random-front", moving.reordered, case.random)


def _sinks_only(case: Case, _: None) -> Intervention:
    return ablation.hide("sinks-only", case.sinks, others=True)


def _others_only(case: Case, _: None) -> Intervention:
    return ablation.hide("others-only", case.sinks)


def _keep_top_k(case: Case, k: int | None) -> Intervention:
    kept = {key: sinks.top_k(n, k or max(1, len(n) // 4)) for key, n in case.norms.items()}
    return ablation.hide("keep-top-k", kept, others=True)


def _features(case: Case, weight: float) -> Intervention:
    return moving.intervention("features", moving.reweighted, case.sinks, chosen_by=weight)


def _keys(case: Case, weight: float) -> Intervention:
    return moving.intervention("keys", moving.gated, case.sinks, chosen_by=weight)


def _var(case: Case, _: None) -> Intervention:
    lit = sink_dimensions(case.lvlm, list(case.pictures.values())[: min(LOOKED_AT // 4, case.batch_size)])
    if not lit:
        raise ValueError(f"{case.lvlm.name}: VAR has nothing to move, the first token lights no dimension")
    return moving.intervention("var", moving.redistributed, dimensions=lit, tau=tau(case.lvlm))


def _register(case: Case, k: int) -> Intervention:
    found = register_neurons(case.lvlm, case.pictures, case.sinks, k, case.batch_size)
    return moving.intervention("test-time-registers", moving.registered, neurons=found)


def _register_passed(case: Case, k: int) -> Intervention:
    found = register_neurons(case.lvlm, case.pictures, case.sinks, k, case.batch_size)
    first = {key: sinks.top_k(n, 1) for key, n in case.norms.items()}
    return moving.intervention("test-time-registers-passed", moving.registered, first, neurons=found)


_takes = neurons.check_takes_register
METHODS = {
    "front": TrainingFree("sinks to the front of the visual tokens, position ids travel", _front),
    "front-renumber": TrainingFree("the same, position ids renumbered", _front_renumber),
    "end": TrainingFree("sinks to the end of the visual tokens, position ids travel", _end),
    "random-front": TrainingFree("control: as many random others to the front", _random_front),
    "sinks-only": TrainingFree("no later token sees a visual token but sinks", _sinks_only),
    "others-only": TrainingFree("no later token sees a sink", _others_only),
    "keep-top-k": TrainingFree("only the k patches of highest norm, a quarter by default", _keep_top_k, "k"),
    "features": TrainingFree("projected features of sinks times a weight", _features, "weight", 0.5),
    "keys": TrainingFree("keys of sinks times a weight, in all decoder layers", _keys, "weight", 0.0),
    "var": TrainingFree("attention of the decoder's sinks to other visual tokens", _var),
    "test-time-registers": TrainingFree("k register neurons write to an added token", _register, "k", 10, _takes),
    "test-time-registers-passed": TrainingFree(
        "the same, and the token takes the place of the patch of highest norm", _register_passed, "k", 10, _takes
    ),
}


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
    criterion: str = DEFAULTS["criterion"],
    threshold: float = DEFAULTS["threshold"],
    max_new_tokens: int = DEFAULTS["max_new_tokens"],
    batch_size: int = DEFAULTS["batch_size"],
    seed: int = DEFAULTS["seed"],
    cache: str | Path | None = ANSWERS,
    harnesses: Path | None = None,
) -> pd.DataFrame:
    """What a method does to the answers to a benchmark.

    Args:
        method: of `METHODS`, with the `value` that `option` gives.
        benchmark: its name, with `table` and `pictures` as `study.benchmark` gives them.
        public: whether these are public data, asked in the words of the model's family.
        criterion, threshold: of sinks, see `groups`.
        max_new_tokens, batch_size, cache: as in `evaluate`.
        seed: of random groups and of the bootstrap.
        harnesses: a folder for the answers in the form of other harnesses, see `benchmarks.harness`; None for none.

    Returns:
        Three rows a measure, `what` being baseline, method and difference, with `value`, `low` and `high`: mean over
        questions and its 95 % bootstrap interval over `pictures`, paired for the difference. Measures: `right`, answers
        right by the benchmark's official rule, in %; and, where first tokens tell the possible answers apart, `logp`,
        the log-probability of the right one's first token, in nats.

    Raises:
        ValueError: as `evaluate`, or for a model that the method cannot work on.
    """
    of = norms(lvlm, pictures, batch_size)
    group, own, random = groups(of, criterion, threshold, seed)
    how = METHODS[method].make(Case(lvlm, pictures, of, own, random, batch_size), value)
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "cache": cache}
    said = study.answers(lvlm, benchmark, table, pictures, [NONE, how], public=public, **settings)
    answers = {name: part.reset_index(drop=True) for name, part in said.groupby("intervention")}
    if harnesses is not None:
        for name, part in answers.items():
            whose = paths.slug(lvlm.name) + ("" if name == NONE.name else f"--{name}")
            harness.write(part.assign(question=table.question), benchmark, part.question.tolist(), whose, harnesses)
    before, after = answers[NONE.name], answers[how.name]
    interval = {"clusters": before.image_id, "method": "percentile", "missing": "drop", "seed": seed}
    rows = []
    for measure, unit in (("right", "%"), ("logp", "nats")):
        found = {
            "baseline": stats.mean_interval(before[measure], **interval),
            "method": stats.mean_interval(after[measure], **interval),
            "difference": stats.difference_interval(after[measure], before[measure], **interval),
        }
        for what, (mean, low, high, n) in found.items():
            rows.append({"measure": measure, "unit": unit, "what": what, "value": mean, "low": low, "high": high,
                         "pictures": n})
    used = METHODS[method].option
    notes = {"benchmark": benchmark, "data": "public" if public else "lab", "method": method, "option": used,
             "option_value": value, "group": group}
    out = pd.DataFrame([{**notes, **row, "questions": len(table), "seed": seed} for row in rows])
    return out[out.pictures > 0].reset_index(drop=True)
