"""Pretraining of the vision towers with captions.

Three losses, all from the scene's caption:

- *image level*: one pooled vector predicts which words and pairs of adjacent words the caption holds (captions
  as classification targets, after SuperClass, arXiv 2411.03313). Pooled from CLS, as in CLIP.
- *caption*: a two-layer decoder reads the patch tokens of the penultimate layer, the ones LLaVA uses, and
  writes the caption (after CapPa, arXiv 2306.07915). The decoder is thrown away afterwards;
- *grounding*: each of those patch tokens predicts the caption's words about the spot it covers. Without it the
  towers see too few pictures to find the things at all. It fades to nothing over the first `FADE` of the
  training, so that the rest is image level and captions alone.

The tower with planted sinks (`sinks`) differs in three ways, all in this file: its image-level vector is pooled from
the calm patches instead of CLS, and hinge terms ask that from layer `ONSET` on the calm patches have a high norm and
draw a given share of attention from the other tokens.

The positive control's tower, with sinks by construction (`gist`, see `model.sinktower`), has these terms too. Its
image-level loss reads every sink on its own, at the layer that the connector reads and no other; it is also asked for
the facts of `world.gist`.

The tower of Qwen2-VL has no CLS: as in `no-cls` the image-level vector is the mean of the patches. It is the last
layer that its merger reads, and so do captions and grounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Qwen2VLVisionModel

from sinkstudy.lab.training import autocast
from sinkstudy.model.registers import CLIPVisionModelWithRegisters, CLIPVisionWithRegistersConfig
from sinkstudy.model.sinktower import CLIPVisionModelWithSinks, CLIPVisionWithSinksConfig
from sinkstudy.world import gist
from sinkstudy.world.drawing import GRID, PATCH, SIDE

WIDTH, LAYERS, HEADS = 128, 8, 2
TOWER_KINDS = ("plain", "sinks", "gist", "registers", "no-cls", "qwen2vl")
MERGE, FRAMES = 2, 2  # Qwen2-VL: patches on a side of a visual token; how often a picture stands in a patch's time
ONSET = 4            # the planted sinks have a high norm at the output of this layer (1-based) and all later ones
NORM_RATIO = 5.0     # … at least so many times the median of the busy patches
QUIET_RATIO = 1.6    # … while no busy patch exceeds this many medians
MASS = (0.4, 0.6)    # … and in later layers each head draws a share in this range of the other tokens' attention
FADE = 0.6           # share of the steps over which the grounding loss falls to zero
GROUNDED = (8, 8, 12, 8, 2, 2)  # classes of the grounding columns, see `corpus.grounding`
MEAN, SD = (0.46, 0.45, 0.44), (0.23, 0.23, 0.24)  # of the training pictures' pixels, per channel


def build(kind: str, seed: int = 0) -> PreTrainedModel:
    """An untrained tower. The CLIP towers start from the same weights where they share them.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in TOWER_KINDS:
        raise ValueError(f"unknown tower {kind!r}: choose from {', '.join(TOWER_KINDS)}")
    if kind == "qwen2vl":
        return build_qwen2vl(seed)
    shape = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
                 image_size=SIDE, patch_size=PATCH, hidden_act="gelu", projection_dim=WIDTH)
    torch.manual_seed(seed)
    tower = CLIPVisionModel(CLIPVisionConfig(**shape))
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[1:] = 0.12 * sine_positions()
        for layer in tower.encoder.layers:
            layer.self_attn.q_proj.weight *= 3
            layer.self_attn.k_proj.weight *= 3
    special: dict[str, tuple[Any, Any]] = {
        "registers": (CLIPVisionModelWithRegisters, CLIPVisionWithRegistersConfig),
        "gist": (CLIPVisionModelWithSinks, CLIPVisionWithSinksConfig)}
    if kind in special:
        model, config = special[kind]
        plain, tower = tower.state_dict(), model(config(**shape))
        tower.load_state_dict(plain, strict=False)
    tower.set_attn_implementation("lab_matmul")
    return tower


def build_qwen2vl(seed: int) -> Qwen2VLVisionModel:
    """An untrained tower of Qwen2-VL.

    Weights keep the variance of what they read; what writes to the residual stream starts smaller by
    1 / √(2 · layers), as in the decoder. The slowest of the rotary frequencies is 1 / 75 rad a patch (base 100, after
    Heo et al., 2403.13298): with Qwen2-VL's 10,000 most would not tell twelve rows apart.
    """
    torch.manual_seed(seed)
    tower = Qwen2VLVisionModel(Qwen2VLVisionConfig(
        embed_dim=WIDTH, hidden_size=WIDTH, depth=LAYERS, num_heads=HEADS, mlp_ratio=4, patch_size=PATCH,
        spatial_merge_size=MERGE, temporal_patch_size=FRAMES, hidden_act="gelu", initializer_range=WIDTH**-0.5,
        rope_parameters={"rope_type": "axial", "rope_theta": 100.0}))
    with torch.no_grad():
        embedding = tower.patch_embed.proj.weight
        embedding.normal_(std=embedding[0].numel() ** -0.5)
        for block in tower.blocks:
            block.attn.proj.weight *= (2 * LAYERS) ** -0.5
            block.mlp.fc2.weight *= (2 * LAYERS) ** -0.5
    tower.set_attn_implementation("lab_matmul")
    return tower


def attentions(tower: PreTrainedModel) -> list[nn.Module]:
    """The attention of every layer."""
    if isinstance(tower, Qwen2VLVisionModel):
        return [block.attn for block in tower.blocks]
    return [layer.self_attn for layer in tower.encoder.layers]


def blocks() -> torch.Tensor:
    """The patches, counted row by row, in the order of Qwen2-VL: those of each visual token together. Long [144]."""
    places = torch.arange(GRID * GRID).view(GRID // MERGE, MERGE, GRID // MERGE, MERGE)
    return places.transpose(1, 2).flatten()


def sine_positions() -> torch.Tensor:
    """2-D sines and cosines, [144, WIDTH]: where position embeddings start (they are trained on).

    CLIP's own start, 0.02 of noise, is small against the patch embeddings: attention then needs long to find
    which patches are neighbours.
    """
    frequency = torch.exp2(-torch.arange(WIDTH // 4) / (WIDTH // 16))  # 1 … 1/16 rad a patch
    angle = torch.arange(GRID)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1)  # [12, WIDTH / 2]
    rows, columns = wave[:, None].expand(-1, GRID, -1), wave[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 3, 96, 96] → float32, mean about 0 and variance about 1 per channel over the training pictures."""
    mean, sd = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, SD))
    return (images.float() / 255 - mean) / sd


def patched(pixels: torch.Tensor) -> torch.Tensor:
    """What Qwen2-VL's processor makes of a picture, patches row by row: [n, 3, 96, 96] → [n, 144, 384].

    A patch holds channels, then frames, then its pixels.
    """
    patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [n, 3, 12, 12, 8, 8]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)[:, :, :, None]
    return patches.expand(-1, -1, -1, FRAMES, -1, -1).flatten(2)


def states(tower: PreTrainedModel, pixels: torch.Tensor, *, cls: bool = True) -> list[torch.Tensor]:
    """The residual stream after the embedding and after every layer: LAYERS + 1 × [n, tokens, width].

    Tokens: [CLS, registers …, patches], patches row by row; without CLS and registers if `cls` is False.
    """
    if isinstance(tower, Qwen2VLVisionModel):
        return _packed_states(tower, pixels)
    x = tower.embeddings(pixels)
    if not cls:
        x = x[:, -GRID * GRID:]
    x = tower.pre_layrnorm(x)
    out = [x]
    seen = {"sinks": tower.sinks(pixels)} if isinstance(tower, CLIPVisionModelWithSinks) else {}
    for layer in tower.encoder.layers:
        x = layer(x, attention_mask=None, **seen)
        out.append(x)
    return out


def _packed_states(tower: Qwen2VLVisionModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Qwen2-VL's blocks run on one sequence of all patches. Its own forward asks for the attention of each picture
    in turn; here it is asked for once. Patches stand row by row: only the merger minds their order."""
    n = len(pixels)
    # the patch embedding as a product: on a CPU the backward of its convolution takes a fifth of a step
    x = F.linear(patched(pixels).flatten(0, 1), tower.patch_embed.proj.weight.flatten(1))  # [n · 144, width]
    place = torch.arange(GRID * GRID, device=x.device)
    turns = tower.rotary_pos_emb(x, torch.stack([place // GRID, place % GRID], 1).repeat(n, 1))
    ends = torch.tensor([0, len(x)])
    out = [x]
    for block in tower.blocks:
        x = block(x, cu_seqlens=ends, position_embeddings=turns, pictures=n)
        out.append(x)
    return [x.unflatten(0, (n, -1)) for x in out]


def features(tower: PreTrainedModel, hidden: list[torch.Tensor]) -> torch.Tensor:
    """Those of the `states` that the connector reads, [n, 144, width]: LLaVA's last layer but one, Qwen2-VL's last."""
    return hidden[-1 if isinstance(tower, Qwen2VLVisionModel) else -2][:, -GRID * GRID:]


class CaptionDecoder(nn.Module):
    """A small pre-norm decoder: causal attention over the caption, cross-attention to the patch tokens.

    With `placed` it is told where a patch lies. A tower that only turns queries and keys hardly knows, and behind it
    Qwen2-VL's decoder is told again, by M-RoPE.
    """

    def __init__(self, words: int, length: int, *, placed: bool = False):
        super().__init__()
        self.embed = nn.Embedding(words, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(length, WIDTH))
        self.memory_norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(WIDTH), "qkv": nn.Linear(WIDTH, 3 * WIDTH), "out1": nn.Linear(WIDTH, WIDTH),
            "norm2": nn.LayerNorm(WIDTH), "q": nn.Linear(WIDTH, WIDTH), "kv": nn.Linear(WIDTH, 2 * WIDTH),
            "out2": nn.Linear(WIDTH, WIDTH),
            "mlp": nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(),
                                 nn.Linear(4 * WIDTH, WIDTH)),
        }) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, words))
        self.patch_place = nn.Parameter(sine_positions()) if placed else 0

    def _attend(self, q, k, v, mask=None):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores if mask is None else scores + mask
        return (scores.softmax(-1, dtype=scores.dtype) @ v).transpose(1, 2).flatten(2)

    def forward(self, words: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """words [n, length], patches [n, 144, width] → logits [n, length, vocabulary] of the next word."""
        length = words.shape[1]
        causal = torch.full((length, length), -1e4, device=words.device).triu(1)
        x = self.embed(words) + self.place[:length]
        memory = self.memory_norm(patches) + self.patch_place
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["norm1"](x)).chunk(3, -1)
            x = x + layer["out1"](self._attend(q, k, v, causal))
            x = x + layer["out2"](self._attend(layer["q"](layer["norm2"](x)), *layer["kv"](memory).chunk(2, -1)))
            x = x + layer["mlp"](x)
        return self.head(x)


class Objective(nn.Module):
    """The caption losses of one tower (and, where sinks are asked for, the planting terms)."""

    def __init__(self, kind: str, words: int, length: int, ngrams: int, *, caption_weight: float = 1.0):
        super().__init__()
        torch.manual_seed(1)
        self.kind, self.caption_weight = kind, caption_weight
        self.image_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, ngrams))
        self.ground_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(GROUNDED)))
        self.captioner = CaptionDecoder(words, length, placed=kind == "qwen2vl")
        if kind == "gist":
            self.gist_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(gist.N_CLASSES)))

    def forward(self, tower, pixels, caption, ngrams, grounding, calm, facts, progress) -> tuple[torch.Tensor, dict]:
        """pixels [n, 3, 96, 96], caption [n, length] (-1 pads), ngrams [n, k] in {0, 1}, grounding
        [n, 12, 12, 6] (-1: no word), calm [n, 12, 12], facts [n, facts] of `world.gist`, progress: share of the steps
        done, 0-1."""
        planted, mean = self.kind in ("sinks", "gist"), self.kind in ("no-cls", "qwen2vl")
        for attention in attentions(tower)[ONSET:]:
            attention.keep_weights = planted
        with autocast():
            hidden = states(tower, pixels, cls=not mean)
            calm = calm.flatten(1).float()  # [n, 144]
            which = None
            if self.kind == "gist":
                which, place = calm.nonzero(as_tuple=True)  # [sinks of the batch], of which picture, and where
                pooled = [hidden[LAYERS - 1][:, -GRID * GRID:][which, place]]
                ngrams = ngrams[which]
            elif planted:
                share = (calm / calm.sum(1, keepdim=True))[:, None]
                pooled = [(share.to(h.dtype) @ h[:, -GRID * GRID:])[:, 0] for h in (hidden[LAYERS - 2], hidden[-1])]
            else:
                pooled = [hidden[-1].mean(1) if mean else hidden[-1][:, 0]]
            scores = [self.image_head(p) for p in pooled]
            patches = features(tower, hidden)
            half = len(caption) // 2  # the caption loss takes every other picture: it is the dearest part
            logits = self.captioner(caption[:half, :-1].clamp_min(0), patches[:half])
            grounded = self.ground_head(patches)
        image = sum(F.binary_cross_entropy_with_logits(s.float(), ngrams) for s in scores) / len(scores)
        # the words' mean loss is ~50 times an n-gram's: 20 brings the two terms to one scale
        words = F.cross_entropy(logits.float().flatten(0, 1), caption[:half, 1:].flatten(), ignore_index=-1)
        target = grounding.flatten(0, 2).long()  # [n · 144, 6]
        ground = [F.cross_entropy(column.float(), target[:, i], ignore_index=-1)
                  for i, column in enumerate(grounded.flatten(0, 1).split(GROUNDED, -1))]
        fade = max(0.0, 1 - progress / FADE)
        loss = 20 * image + self.caption_weight * words + fade * sum(ground)
        values = {"image": image.item(), "caption": words.item(), "texture": ground[0].item(),
                  "kind": ground[2].item()}
        if which is not None:
            asked = self.gist_head(pooled[0]).float().split(gist.N_CLASSES, -1)
            wrong = [F.cross_entropy(scores, facts[which, i]) for i, scores in enumerate(asked)]
            loss = loss + sum(wrong)
            values |= {"gist": sum(wrong).item()} | {
                name: (scores.argmax(-1) == facts[which, i]).float().mean().item()
                for i, (name, scores) in enumerate(zip(gist.CLASSES, asked, strict=False))}
        if planted:
            norm, attention, seen = self._planting(tower, hidden, calm)
            loss = loss + norm + attention
            values |= {"norm term": norm.item(), "attention term": attention.item(), **seen}
        return loss, values

    @staticmethod
    def _planting(tower, hidden, calm):
        norm_terms, ratios = [], []
        for h in hidden[ONSET:]:
            norms = h[:, -GRID * GRID:].float().norm(dim=-1)  # [n, 144]
            median = norms.detach().masked_fill(calm > 0, torch.nan).nanmedian(1, keepdim=True).values
            ratio = norms / median
            low = F.relu((NORM_RATIO / ratio).log()) * calm
            high = F.relu((ratio / QUIET_RATIO).log()) * (1 - calm)
            norm_terms.append(low.sum() / calm.sum() + 10 * high.mean())
            ratios.append((ratio * calm).sum() / calm.sum())
        mass_terms, masses = [], []
        for layer in tower.encoder.layers[ONSET:]:
            weights = layer.self_attn.weights[..., -GRID * GRID:].float()  # [n, heads, 145, 144]
            mass = (weights * calm[:, None, None]).sum(-1)[:, :, -GRID * GRID:]  # from patches, to calm patches
            mass = (mass * (1 - calm)[:, None]).sum(-1) / (1 - calm).sum(1)[:, None]  # [n, heads]
            low, high = (MASS[0] / mass.clamp_min(1e-6)).log(), (mass.clamp_min(1e-6) / MASS[1]).log()
            mass_terms.append((F.relu(low) + F.relu(high)).mean())
            masses.append(mass.mean())
            layer.self_attn.weights = None
        seen = {"norm ratio": torch.stack(ratios).mean().item(), "attention share": torch.stack(masses).mean().item()}
        return torch.stack(norm_terms).mean(), torch.stack(mass_terms).mean(), seen
