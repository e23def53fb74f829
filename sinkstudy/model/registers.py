"""A CLIP vision tower with register tokens, the tower of `lab-llava-registers`.

Registers (Darcet et al., "Vision Transformers Need Registers", 2309.16588) are learned tokens that the
encoder may write to and that nobody reads: they give global content a place other than the patches.
Here they stand directly after CLS, carry no position, and are taken out of everything the model returns,
so that LLaVA's `hidden_states[-2][:, 1:]` still gives the patches and nothing but the patches.

`loading` makes it known to `AutoConfig` and `AutoModel`.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.utils import can_return_tuple


@strict
class CLIPVisionWithRegistersConfig(CLIPVisionConfig):
    """`CLIPVisionConfig` plus `num_register_tokens`; with 0 the model is the plain CLIP tower."""

    model_type = "clip_vision_model_with_registers"

    num_register_tokens: int = 4


class CLIPVisionEmbeddingsWithRegisters(CLIPVisionEmbeddings):
    """Patch, CLS and position embeddings of CLIP with the registers put between CLS and the patches."""

    def __init__(self, config: CLIPVisionWithRegistersConfig):
        super().__init__(config)
        self.register_tokens = nn.Parameter(torch.randn(config.num_register_tokens, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        x = super().forward(pixel_values, interpolate_pos_encoding)  # [batch, 1 + patches, width]
        registers = self.register_tokens.to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)  # [batch, 1 + registers + patches, width]


class CLIPVisionModelWithRegisters(CLIPVisionModel):
    """`CLIPVisionModel` whose encoder layers see [CLS, registers, patches].

    `last_hidden_state` and `hidden_states` come back as [batch, 1 + patches, width]; a selection of layers
    (`output_hidden_states=-2` or a list) leaves None for the others. `attentions`, [batch, heads, 1 + registers +
    patches, same], and forward hooks on `encoder.layers` have the registers too.
    """

    config: CLIPVisionWithRegistersConfig

    def __init__(self, config: CLIPVisionWithRegistersConfig):
        super().__init__(config)
        self.embeddings = CLIPVisionEmbeddingsWithRegisters(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CLIPVisionEmbeddingsWithRegisters):
            # as the parent initialises CLS: random directions, so that the registers can differ
            init.normal_(module.register_tokens, std=module.embed_dim**-0.5 * self.config.initializer_factor)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling | tuple:
        output = super().forward(pixel_values, return_dict=True, **kwargs)
        output.last_hidden_state = self._without_registers(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(
                None if hidden is None else self._without_registers(hidden) for hidden in output.hidden_states
            )
        return output

    def _without_registers(self, hidden: torch.Tensor) -> torch.Tensor:
        n = self.config.num_register_tokens
        return torch.cat([hidden[:, :1], hidden[:, 1 + n :]], dim=1)  # [batch, 1 + patches, width]
