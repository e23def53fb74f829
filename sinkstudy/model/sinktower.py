"""A CLIP vision tower that has sinks by construction, the tower of the positive control.

What is said of sinks (2510.08510, 2309.16588) is built in here as a fact about who can see what:

- a *sink* is a flat patch: one whose pixels do not vary. The rule is the model's own, from the picture alone;
- an ordinary patch sees its window of `window` × `window` patches and, from layer `sink_layer` on, the sinks. But what
  a sink shows to whoever attends to it is a learned vector, the same in every picture: attention is drawn, nothing is
  told;
- a sink sees everything from `sink_layer` on, and so does CLS in every layer. Nobody but CLS and sinks sees CLS.

So what needs more than one window to be known can be in CLS and in sinks, and in no other patch, however it is trained.
How many sinks a picture has is the one thing about the whole picture that every patch can know.

Importing this module makes the two classes known to `AutoConfig` and `AutoModel`.
"""

from collections.abc import Callable

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention, eager_attention_forward


@strict
class CLIPVisionWithSinksConfig(CLIPVisionConfig):
    """`CLIPVisionConfig` plus what makes a sink and who sees it.

    `window` divides the number of patches on a side; `sink_layer` counts layers from 0; `flat` is the largest range of
    pixel values, in any channel as the processor gives them, within a patch that is a sink.
    """

    model_type = "clip_vision_model_with_sinks"

    window: int = 4
    sink_layer: int = 2
    flat: float = 1e-3


class SinkAttention(CLIPAttention):
    """CLIP's attention in which keys and values of a sink come from `shown`, one vector for every sink and picture."""

    def __init__(self, config: CLIPVisionWithSinksConfig, layer: int):
        super().__init__(config)
        self.with_sinks = layer >= config.sink_layer
        self.shown = nn.Parameter(torch.randn(config.hidden_size)) if self.with_sinks else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        sinks: torch.Tensor,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [batch, 1 + patches, width], sinks bool [batch, patches]; `attention_mask` is not used.

        Tokens that somebody adds behind the patches, such as a test-time register, are sinks too: they see everything,
        and what they hand on is `shown`.
        """
        read, added = hidden_states, hidden_states.shape[1] - 1 - sinks.shape[1]
        if self.with_sinks:
            behind_cls = nn.functional.pad(nn.functional.pad(sinks, (1, 0)), (0, added), value=True)[..., None]
            read = torch.where(behind_cls, self.shown.to(read.dtype), read)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(x).view(heads).transpose(1, 2)
            for project, x in ((self.q_proj, hidden_states), (self.k_proj, read), (self.v_proj, read))
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        hidden = ~visible(sinks, self.config.window, self.with_sinks, added)[:, None]
        mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, torch.finfo(query.dtype).min)
        out, weights = attend(self, query, key, value, mask, scaling=self.scale, dropout=0.0, **kwargs)
        return self.out_proj(out.reshape(hidden_states.shape).contiguous()), weights


def visible(sinks: torch.Tensor, window: int, with_sinks: bool, added: int = 0) -> torch.Tensor:
    """Which token sees which: sinks bool [batch, patches] of a square grid -> bool [batch, tokens, tokens (whom)].

    Tokens: CLS, patches, and what was `added` behind them. `with_sinks`: whether sinks see everything and are seen;
    otherwise they are patches like others, and added tokens see everything and are seen by CLS alone.
    """
    side = round(sinks.shape[1] ** 0.5)
    place = torch.arange(side, device=sinks.device) // window
    block = (place[:, None] * side + place).flatten()  # [patches], which window
    seen = (block[:, None] == block).expand(len(sinks), -1, -1)
    if with_sinks:
        seen = seen | sinks[:, None, :]
    seen = nn.functional.pad(seen, (1, 0, 1, 0))
    seen[:, 0] = True  # CLS
    if with_sinks:
        seen[:, 1:] |= sinks[:, :, None]
    if added:
        seen = nn.functional.pad(seen, (0, added), value=with_sinks)
        seen = nn.functional.pad(seen, (0, 0, 0, added), value=True)
        seen[:, 0] = True
    return seen


class CLIPVisionModelWithSinks(CLIPVisionModel):
    """`CLIPVisionModel` with `SinkAttention` in every layer. What it returns has the parent's shapes.

    Raises:
        ValueError: if windows do not divide the grid of patches.
    """

    config: CLIPVisionWithSinksConfig

    def __init__(self, config: CLIPVisionWithSinksConfig):
        if (config.image_size // config.patch_size) % config.window:
            raise ValueError(f"{config.image_size // config.patch_size} patches on a side are no multiple of "
                             f"the window's {config.window}")
        super().__init__(config)
        for i, layer in enumerate(self.encoder.layers):
            layer.self_attn = SinkAttention(config, i)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SinkAttention) and module.shown is not None:
            init.normal_(module.shown)  # as large as what a layer norm lets through

    def sinks(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Flat patches: pixel_values [batch, channels, height, width] -> bool [batch, patches], row by row."""
        p = self.config.patch_size
        patches = pixel_values.unfold(2, p, p).unfold(3, p, p).flatten(4)  # [batch, channels, rows, columns, pixels]
        return ((patches.amax(-1) - patches.amin(-1)) <= self.config.flat).all(1).flatten(1)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling | tuple:
        return super().forward(pixel_values, sinks=self.sinks(pixel_values), **kwargs)


AutoConfig.register(CLIPVisionWithSinksConfig.model_type, CLIPVisionWithSinksConfig, exist_ok=True)
AutoModel.register(CLIPVisionWithSinksConfig, CLIPVisionModelWithSinks, exist_ok=True)
