"""The kinds of trained methods, and how the folder of one is opened."""

from pathlib import Path

import torch

from sinkstudy.model import loading
from sinkstudy.trained.connectors import DIYSink, OneConnector
from sinkstudy.trained.gates import Gates, LoRA
from sinkstudy.trained.loop import Method
from sinkstudy.trained.routers import ReW

KINDS: dict[str, type[Method]] = {method.kind: method for method in (OneConnector, DIYSink, ReW, Gates, LoRA)}


def load_method(folder: str | Path, *, device: str = "cpu", dtype: str | torch.dtype = "float32") -> Method:
    """Load a method that `Method.save` wrote, with the model that it was trained on; see `loading.load`.

    Raises:
        ValueError: no such folder, an unknown kind, weights of another model, or as `loading.load`.
    """
    known = Method.described(folder)
    if known["kind"] not in KINDS:
        raise ValueError(f"{folder} holds a method of unknown kind {known['kind']!r}; known: {', '.join(KINDS)}")
    lvlm = loading.load(known["base"], device=device, dtype=dtype, revision=known["revision"])
    return KINDS[known["kind"]].open(lvlm, folder).eval().requires_grad_(False)
