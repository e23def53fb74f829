"""One pass of a model: what it says, and what its decoder is called with."""

from collections.abc import Mapping
from typing import Any

import torch

from sinkstudy.model.lvlm import LVLM


@torch.no_grad()
def logits(lvlm: LVLM, inputs: Mapping[str, Any]) -> torch.Tensor:
    """[batch, tokens, vocabulary]."""
    return lvlm.model(**inputs).logits


def decoder_arguments(lvlm: LVLM, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs_embeds` [batch, tokens, width], positions and mask, by name."""
    seen: dict[str, Any] = {}
    with lvlm.decoder.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True):
        logits(lvlm, inputs)
    return seen


def real(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Tokens that are no padding, bool [batch, tokens]: what padding says is nobody's business."""
    return inputs["attention_mask"].bool()
