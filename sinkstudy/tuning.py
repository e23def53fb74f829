"""Methods that are trained: what they have in common, how they are kept, and how they are trained.

A method changes a vision-language model and has parameters of its own; it may train parts of the model too. It is used
like those of `routing`: `around` is a context in which the model computes with it. What was trained is kept as a folder
with `method.json` and `weights.safetensors`, without the model's untouched weights.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sinkstudy import sinks
from sinkstudy.evaluate import Intervention, Prefixes
from sinkstudy.models import LVLM
from sinkstudy.paths import atomic


class Method(nn.Module):
    """A trained change of a vision-language model.

    A subclass has a `kind`, keeps in `settings` the plain values that its constructor takes by name, behind the model,
    and says in `around` what it does. Its parameters are what `trained` finds: a stage of training asks for gradients
    of what it trains (`requires_grad`), and whatever a stage may have changed is kept.
    """

    kind: ClassVar[str]
    asks: ClassVar[bool] = False  # whether what is done to an image depends on the question, see `Intervention`

    def __init__(self, lvlm: LVLM, **settings: Any) -> None:
        super().__init__()
        self.lvlm, self.model, self.settings = lvlm, lvlm.model, settings

    def around(self, inputs: Prefixes) -> AbstractContextManager:
        """A context in which `self.lvlm` reads `inputs`, and goes on from them, with the method."""
        raise NotImplementedError

    def forward(self, inputs: Prefixes, labels: torch.Tensor) -> torch.Tensor:
        """The loss of the language model: mean cross-entropy (nats) of the tokens of `labels` [batch, tokens] ≥ 0."""
        with self.around(inputs):
            return self.model(**inputs, labels=labels).loss

    def changed(self) -> dict[str, nn.Parameter]:
        """What training may change, by its name in this module; no tensor twice."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("model.")}

    def intervention(self, name: str, **more: Any) -> Intervention:
        """The method for `evaluate`; `more` plain values that change what it does."""
        parameters = {"kind": self.kind, **self.settings, **more, "weights": digest(self.changed())}
        return Intervention(name, lambda lvlm, inputs: self.around(inputs), parameters, "tower", self.asks)

    def save(self, folder: Path, **more: Any) -> None:
        """Write the method to a folder, all at once; `more` plain values to remember, such as how it was trained."""
        known = {"kind": self.kind, "base": self.lvlm.name, "revision": self.lvlm.revision, "settings": self.settings}
        with atomic(folder) as temporary:
            temporary.mkdir()
            weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in self.changed().items()}
            save_file(weights, temporary / "weights.safetensors")
            (temporary / "method.json").write_text(json.dumps(known | more, indent=1) + "\n", encoding="utf-8")

    def read(self, folder: Path) -> None:
        """Take the weights of a folder that `save` wrote.

        Raises:
            ValueError: they are not those of such a method on such a model.
        """
        found, own = load_file(Path(folder) / "weights.safetensors"), self.changed()
        if found.keys() != own.keys() or any(found[k].shape != own[k].shape for k in own):
            raise ValueError(f"{folder} does not hold the weights of {self.kind} on {self.lvlm.name}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(found[name])


def digest(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors."""
    sha256 = hashlib.sha256()
    for name, tensor in weights.items():
        sha256.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def sink_rule(criterion: str, threshold: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a sink is: norms, float [.., patches] -> bool [.., patches].

    Args:
        criterion: a name of `sinks.NORM_CRITERIA`.
        threshold: the criterion's.

    Raises:
        ValueError: an unknown criterion.
    """
    if criterion not in sinks.NORM_CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; known: {', '.join(sinks.NORM_CRITERIA)}")
    return lambda norms: sinks.NORM_CRITERIA[criterion](norms, threshold)
