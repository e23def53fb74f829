"""The alignment stage of lab models, followed: connectors at some of its steps, and the decoder that they feed.

Tower and decoder are frozen in that stage and the decoder has read text alone, so whatever changes in the decoder's
hidden states is the connector's doing. `sinkstudy lab alignment` makes what is kept.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sinkstudy.model.lvlm import LVLM
from sinkstudy.paths import ALIGNMENT, atomic, slug
from sinkstudy.trained.loop import kept, write_weights

StateDict = Mapping[str, torch.Tensor]


def write(
    folder: Path, connectors: Mapping[int, StateDict], decoder: StateDict, log: pd.DataFrame, **about: Any
) -> None:
    """Keep a model's connectors by step in a folder, and the decoder beside it if none is there.

    Args:
        log: the loss curve, `training.csv`.
        about: plain values that say how it was trained, `stage.json`.
    """
    beside = folder.parent / "decoder"
    if not beside.exists():
        with atomic(beside) as temporary:
            temporary.mkdir()
            write_weights(decoder, temporary, eight_bits=True)
    named = {f"{step}.{name}": tensor for step, of in connectors.items() for name, tensor in of.items()}
    with atomic(folder) as temporary:
        temporary.mkdir()
        write_weights(named, temporary, eight_bits=True)
        log.to_csv(temporary / "training.csv", index=False, float_format="%.5g")
        (temporary / "stage.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def kept_models(folder: Path = ALIGNMENT) -> list[str]:
    """Names of the models whose alignment stage is kept."""
    return sorted(file.parent.name for file in folder.glob("*/training.csv"))


def steps(name: str, folder: Path = ALIGNMENT) -> list[int]:
    """The steps at which a model's connector is kept, from 0 on; none where the stage was not followed."""
    if slug(name) not in kept_models(folder):
        return []
    return sorted({int(key.split(".", 1)[0]) for key in kept(folder / slug(name))})


@contextmanager
def at(lvlm: LVLM, step: int, folder: Path = ALIGNMENT) -> Iterator[None]:
    """A context in which a model is what it was after `step` steps of its alignment stage.

    Raises:
        ValueError: no connector of that step is kept for the model, or the weights do not fit it.
    """
    own, start = slug(lvlm.name), f"{step}."
    weights_of_all = kept(folder / own) if own in kept_models(folder) else {}
    then = {name.removeprefix(start): of for name, of in weights_of_all.items() if name.startswith(start)}
    if not then:
        raise ValueError(f"{folder} keeps no connector of {lvlm.name} at step {step}: sinkstudy lab alignment makes it")
    parts = ((lvlm.connector, then), (lvlm.decoder, kept(folder / "decoder")))
    now = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module, _ in parts]
    try:
        for module, weights in parts:
            try:
                module.load_state_dict(weights)
            except RuntimeError as problem:
                raise ValueError(f"{folder} does not hold weights of {lvlm.name}: {problem}") from None
        yield
    finally:
        for (module, _), weights in zip(parts, now, strict=True):
            module.load_state_dict(weights)
