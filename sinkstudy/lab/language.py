"""The lab's decoder and connector behind a frozen tower: captions, then instruction tuning.

The decoder's text pretraining stands here too (see `train.TEXT`).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sinkstudy.lab import tower as tower_module
from sinkstudy.lab.corpus import CAPTION, SLOTS, Codec, Corpus, slot_positions
from sinkstudy.lab.families import LLAVA, Llava, family
from sinkstudy.lab.training import autocast, compiled

QUESTIONS = tuple(SLOTS.values())
# What the mean loss of each kind of answer counts for: a region's description has 15 words, other answers one.
LOSS_WEIGHTS = {"short": 2.0, "region": 1.0, "options": 2.0}
DEPTH = 4


def build_decoder(words: int, kind: Llava = LLAVA, seed: int = 2) -> PreTrainedModel:
    """An untrained decoder of the family. What writes to the residual stream starts small, by 1 / √(2 · layers) as in
    GPT-2: without that, six layers learned to read pictures many times more slowly than two."""
    torch.manual_seed(seed)
    config, model = kind.decoder
    decoder = model(config(
        vocab_size=words, hidden_size=128, num_hidden_layers=DEPTH, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=352, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.09,
        pad_token_id=0, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for layer in decoder.model.layers:
            layer.self_attn.o_proj.weight *= (2 * DEPTH) ** -0.5
            layer.mlp.down_proj.weight *= (2 * DEPTH) ** -0.5
    decoder.set_attn_implementation("lab_matmul")
    return decoder


def assemble(tower, decoder: PreTrainedModel, codec: Codec, pixels: torch.Tensor, seed: int = 3) -> PreTrainedModel:
    """Tower + fresh two-layer connector + decoder as one model of their family.

    The connector starts at the scale of its data (after Mishkin & Matas, 1511.06422): patch tokens of `pixels`
    [n, 3, 96, 96] give its first layer pre-activations of mean 0 and variance 1, and its output the norm of the
    decoder's word embeddings. One mean and one scale for all directions, taken over the lower nine tenths of the
    norms, so that what is large in the tower stays large behind the connector (Qwen2-VL's begins with a LayerNorm).
    """
    torch.manual_seed(seed)
    kind = family(tower.config)
    model = kind.model(kind.config(tower.config, decoder.config, codec))
    model.model.get_submodule(kind.tower).load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    model.set_attn_implementation("lab_matmul")
    with torch.no_grad():
        patches = tower_module.features(tower, tower_module.states(tower, pixels)).to(model.device)
    start_connector(model, model.model.get_submodule(kind.connector), patches)
    return model


@torch.no_grad()
def start_connector(model: PreTrainedModel, connector: nn.Module, patches: torch.Tensor) -> None:
    """Give a connector of the model random weights at the scale of `patches` [n, 144, width], see `assemble`."""
    kind = family(model.config)
    mlp = kind.mlp(connector)
    first, second = (module for module in mlp.modules() if isinstance(module, nn.Linear))
    tokens = kind.read(connector, patches).flatten(0, 1)  # [n · visual tokens, width]
    norms = tokens.norm(dim=-1)
    ordinary = tokens[norms <= norms.quantile(0.9)]
    mean = ordinary.mean(0)
    scale = (ordinary - mean).square().mean().sqrt()
    first.weight.normal_(std=first.in_features**-0.5).div_(scale)
    first.bias.copy_(-first.weight @ mean)
    second.weight.normal_(std=second.in_features**-0.5)
    words = model.get_input_embeddings().weight.norm(dim=-1).median()
    second.weight.mul_(words / mlp(ordinary).norm(dim=-1).median())


def next_word_loss(hidden: torch.Tensor, embedding: torch.Tensor, labels: torch.Tensor) -> tuple:
    """Mean cross-entropy and accuracy of the next word where labels ≥ 0; logits only there.

    hidden [n, tokens, width], labels [n, tokens] (-100: no loss; label t is predicted from hidden t - 1).
    """
    at = labels[:, 1:] >= 0
    logits = F.linear(hidden[:, :-1][at].float(), embedding.float())
    target = labels[:, 1:][at]
    return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean().item()


def answers_loss(hidden: torch.Tensor, embedding: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """The kinds of answers in `SLOTS`, weighted by `LOSS_WEIGHTS`; hidden [n, slots' words, width], labels likewise."""
    loss, right, at = 0.0, {}, 0
    for kind, (number, length) in SLOTS.items():
        part = slice(at, at + number * length)
        of_kind, right[f"{kind} words"] = next_word_loss(hidden[:, part], embedding, labels[:, part])
        loss, at = loss + LOSS_WEIGHTS[kind] * of_kind, part.stop
    return loss, right


def text_loss(decoder: PreTrainedModel, run, corpus: Corpus, rows: torch.Tensor, seed: int,
              ) -> tuple[torch.Tensor, dict]:
    """A caption, then slots with questions about it, then a fact of the world.

    The loss is on the caption's and the fact's words and on the answers. `run` is `decoder.model`, compiled.
    """
    caption = corpus.caption[rows]
    n, width = caption.shape  # one width for all batches, so that the decoder is compiled once
    length = (caption >= 0).sum(1)
    # `user :` goes between <s> and the caption, `</s>` is not used here: left-pad so that the slots follow directly
    prefix = torch.zeros(n, width + 1, dtype=torch.long)
    user = torch.tensor(corpus.codec.encode("user :"))
    for i, (words, k) in enumerate(zip(caption, length.tolist(), strict=True)):
        said = torch.cat([words[:1], user, words[1:k - 1]])
        prefix[i, -len(said):] = said
    facts = F.pad(corpus.fact[rows], (1, 0), value=corpus.codec.ids["."])
    questions, answers = corpus.slots(rows, seed)
    ids = torch.cat([prefix, questions, facts], 1)
    slots = (width + 1, (*QUESTIONS, (1, facts.shape[1])))
    pad = prefix == 0
    positions = (slot_positions(*slots)[None] - pad.sum(1, keepdim=True)).clamp_min(0)
    read = torch.where(prefix <= corpus.codec.ids["<s>"], -100, prefix)  # <s> follows the padding: nothing to learn
    tensors = (ids, positions, pad, read, facts, answers)
    ids, positions, pad, read, facts, answers = (t.to(decoder.device) for t in tensors)
    with autocast():
        hidden = run(input_ids=ids, position_ids=positions, use_cache=False, slots=slots, pad=pad,
                     attention_mask=torch.zeros(1, 1, 1, 1))[0]  # unused: the slots decide
    words = decoder.lm_head.weight
    at = (width + 1, -facts.shape[1])
    reading, accuracy = next_word_loss(hidden[:, :at[0]], words, read)
    knowing, known = next_word_loss(hidden[:, at[1]:], words, facts)
    answering, right = answers_loss(hidden[:, at[0]:at[1]], words, answers)
    return reading + knowing + answering, {"caption words": accuracy, "fact words": known, **right}


class ImageStage:
    """Captions (`caption`) and instruction tuning (`questions`) of an assembled model with a frozen tower.

    Instruction tuning asks the questions of `SLOTS` about each picture and for its caption, all behind one image
    prefix.
    """

    def __init__(self, model: PreTrainedModel, corpus: Corpus, pictures, target: str):
        self.model, self.corpus, self.pictures, self.target = model, corpus, pictures, target
        self.family = kind = family(model.config)
        self.head, self.tail = (torch.tensor(ids, dtype=torch.long) for ids in kind.prefix(Codec(kind.special)))
        visual = torch.full((kind.visual,), model.config.image_token_id)
        prefix = kind.positions(model, torch.cat([self.head, visual, self.tail]))  # [.., 1, tokens]
        groups = ((1, CAPTION + 1), *(QUESTIONS if target == "questions" else ()))
        self.slots = (prefix.shape[-1], groups)
        # every slot continues the prefix; behind a picture of M-RoPE that is at its largest position + 1
        behind = slot_positions(0, groups) + prefix.max() + 1
        self.positions = torch.cat([prefix, behind.expand(*prefix.shape[:-1], -1)], -1)
        self.run = compiled(model.model.language_model.forward)
        self.say = torch.tensor(corpus.codec.encode("assistant :"))

    def visual(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the decoder reads, [n, visual tokens, width], and which of it nobody sees, bool [n, visual tokens]."""
        connector = self.model.model.get_submodule(self.family.connector)
        return self.family.mlp(connector)(self.family.read(connector, patches)), None

    def loss(self, rows: torch.Tensor, seed: int) -> tuple[torch.Tensor, dict]:
        """On the pictures `rows`, with questions drawn by `seed`."""
        n, corpus, model = len(rows), self.corpus, self.model.model
        caption = corpus.caption[rows][:, 1:]  # without <s>
        ids = torch.cat([self.say.expand(n, -1), caption.clamp_min(0)], 1)
        labels = F.pad(caption.masked_fill(caption < 0, -100), (len(self.say), 0), value=-100)
        if self.target == "questions":
            questions, answers = corpus.slots(rows, seed)
            ids = torch.cat([ids, questions], 1)
        words = model.get_input_embeddings()
        device = self.model.device
        pixels = tower_module.normalise(torch.from_numpy(self.pictures[rows.numpy()]).to(device))
        head, ids = self.head.expand(n, -1).to(device), torch.cat([self.tail.expand(n, -1), ids], 1).to(device)
        labels, positions = labels.to(device), self.positions.to(device)
        tower = model.get_submodule(self.family.tower)
        with autocast():
            with torch.no_grad():
                patches = tower_module.features(tower, tower_module.states(tower, pixels))
            visual, unseen = self.visual(patches)
            if unseen is not None:  # the whole prefix: tokens of `head`, of the picture, of `tail`
                unseen = F.pad(unseen, (head.shape[1], self.slots[0] - head.shape[1] - unseen.shape[1]))
            embeds = torch.cat([words(head), visual.to(words.weight.dtype), words(ids)], 1)
            hidden = self.run(
                inputs_embeds=embeds, position_ids=positions.expand(*positions.shape[:-2], n, -1), use_cache=False,
                slots=self.slots, pad=unseen, attention_mask=torch.zeros(1, 1, 1, 1))[0]  # unused: the slots decide
        hidden = hidden[:, self.slots[0]:]
        end = labels.shape[1]
        loss, accuracy = next_word_loss(hidden[:, :end], self.model.lm_head.weight, labels)
        values = {"caption words": accuracy}
        if self.target == "questions":
            asked, right = answers_loss(hidden[:, end:], self.model.lm_head.weight, answers.to(device))
            loss, values = loss + asked, values | right
        return loss, values
