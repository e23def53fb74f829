"""The two architectures of the lab models: what their training must know of each besides the tower.

LLaVA is described by `Llava`; `Qwen2VL` holds what is different in Qwen2-VL (2409.12191). Everything else, the
stages, losses and settings, is the same code for both.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLTextConfig,
)

from sinkstudy.lab import tower as tower_module
from sinkstudy.lab.corpus import VISUAL, Codec, tokenizer
from sinkstudy.model.loading import without_video
from sinkstudy.world.drawing import GRID, PATCH, SIDE

CHAT = ("<s> {% for m in messages %}{% if m['role'] == 'user' %}user : {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}PICTURE {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
        "{% else %}assistant : {{ m['content'][0]['text'] }} </s> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}")


class Llava:
    """A CLIP tower, two linear layers and a Llama."""

    title = "LLaVA"
    parts = "CLIP tower; two-layer connector; Llama decoder"
    text = "text"  # name of the stage that pretrains the decoder, one for all models of the family
    decoder = (LlamaConfig, LlamaForCausalLM)
    model = LlavaForConditionalGeneration
    tower, connector = "vision_tower", "multi_modal_projector"  # in `model.model`
    special: tuple[str, ...] = ()   # tokens that only this family has, behind the vocabulary of all
    image = "<image>"               # stands once for each visual token
    picture = "<image>"             # what the chat format writes for a picture
    visual = VISUAL                 # visual tokens of a picture

    def config(self, tower: PreTrainedConfig, decoder: PreTrainedConfig, codec: Codec) -> PreTrainedConfig:
        """Of the whole model, from those of tower and decoder."""
        return LlavaConfig(vision_config=tower, text_config=decoder, image_token_id=codec.ids[self.image],
                           vision_feature_layer=-2, vision_feature_select_strategy="default",
                           image_seq_length=VISUAL, projector_hidden_act="gelu", tie_word_embeddings=True)

    def mlp(self, connector: nn.Module) -> nn.Module:
        """The two linear layers of the connector, [.., width] → [.., decoder width]."""
        return connector

    def read(self, connector: nn.Module, patches: torch.Tensor) -> torch.Tensor:
        """What `mlp` reads, [n, visual tokens, width], from patches [n, 144, width], row by row."""
        return patches

    def positions(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """Position ids of a prefix `ids` [tokens] that holds one picture: [1, tokens]."""
        return torch.arange(len(ids))[None]

    def prefix(self, codec: Codec) -> tuple[list[int], list[int]]:
        """Ids before and behind the visual tokens of a picture."""
        before, after = f"<s> user : {self.picture}".split(self.image)
        return codec.encode(before), codec.encode(after)

    def processor(self) -> ProcessorMixin:
        """Pixels as in training, the lab's words, the chat format of training."""
        images = CLIPImageProcessorPil(
            do_resize=False, do_center_crop=False, image_mean=tower_module.MEAN, image_std=tower_module.SD,
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
        return LlavaProcessor(images, tokenizer(self.special), patch_size=PATCH, num_additional_image_tokens=1,
                              vision_feature_select_strategy="default", chat_template=self.chat())

    def chat(self) -> str:
        return CHAT.replace("PICTURE", self.picture)


class Qwen2VL(Llava):
    """A tower without CLS that knows places by rotation, a merger of 2 × 2 patches, a Qwen2 with M-RoPE."""

    title = "Qwen2-VL"
    parts = ("vision tower of Qwen2-VL (no CLS, 2-D rotary positions, every picture twice in time); merger of 2 × 2 "
             "patches; Qwen2 decoder with M-RoPE")
    text = "text-qwen2"
    decoder = (Qwen2Config, Qwen2ForCausalLM)
    model = Qwen2VLForConditionalGeneration
    tower, connector = "visual", "visual.merger"
    # the processor marks its place in every prompt by the video token too, so there has to be one
    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    image = "<|image_pad|>"
    picture = "<|vision_start|> <|image_pad|> <|vision_end|>"
    visual = VISUAL // tower_module.MERGE**2

    def config(self, tower: PreTrainedConfig, decoder: PreTrainedConfig, codec: Codec) -> PreTrainedConfig:
        """Of the whole model, from those of tower and decoder.

        Time, row and column take turns in the frequencies of M-RoPE, as in Qwen3-VL. Qwen2-VL gives time the
        highest third and columns the lowest; at this width six columns would then differ by 0.02 rad.
        """
        text = {key: getattr(decoder, key) for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps",
            "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")}
        frequencies = decoder.hidden_size // decoder.num_attention_heads // 2
        rope = decoder.rope_parameters | {"mrope_section": [1] * frequencies}
        start, end, image, video = (codec.ids[token] for token in self.special)
        return Qwen2VLConfig(
            vision_config=tower.to_dict(), text_config=Qwen2VLTextConfig(**text, rope_parameters=rope).to_dict(),
            vision_start_token_id=start, vision_end_token_id=end, image_token_id=image, video_token_id=video,
            tie_word_embeddings=True)

    def mlp(self, connector: nn.Module) -> nn.Module:
        return connector.mlp

    def read(self, connector: nn.Module, patches: torch.Tensor) -> torch.Tensor:
        merged = connector.ln_q(patches[:, tower_module.blocks()])
        return merged.unflatten(1, (self.visual, -1)).flatten(2)  # [n, 36, 4 · width]

    def positions(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """Time, row and column of a prefix `ids` [tokens] that holds one picture: [3, 1, tokens]."""
        grid, kinds = torch.tensor([[1, GRID, GRID]]), (ids == model.config.image_token_id).int()
        return model.model.get_rope_index(ids[None], kinds[None], image_grid_thw=grid)[0]

    def processor(self) -> ProcessorMixin:
        images = Qwen2VLImageProcessorPil(
            do_resize=False, image_mean=tower_module.MEAN, image_std=tower_module.SD, patch_size=PATCH,
            merge_size=tower_module.MERGE, temporal_patch_size=tower_module.FRAMES,
            size={"shortest_edge": SIDE**2, "longest_edge": SIDE**2})
        return without_video("Qwen2VLProcessor")(images, tokenizer(self.special), chat_template=self.chat())


LLAVA, QWEN2VL = Llava(), Qwen2VL()


def family(config: PreTrainedConfig) -> Llava:
    """The family of a model, a tower or a decoder, by its config."""
    return QWEN2VL if config.model_type.startswith("qwen2") else LLAVA
