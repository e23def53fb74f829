"""LSG, layer-wise sink gating (2604.03316, "When Sinks Help or Hurt"), and LoRA with as many parameters, its control.

A gate reads what the prompt's last token is after a layer of the decoder, and weighs the keys of the image's sinks
against those of its other visual tokens in the next layer. Nothing else of the model is trained.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import BatchFeature

from sinkstudy import sinks
from sinkstudy.answers.evaluate import Prefixes
from sinkstudy.effects import moving
from sinkstudy.model.lvlm import LVLM
from sinkstudy.trained.loop import Method

HIDDEN = 64  # neurons of a gate


class Gates(Method):
    """Layer-wise sink gating.

    The gate of layer l is LayerNorm, two linear layers with 64 neurons between them, and softmax, on the hidden state
    of the prompt's last token after layer l: (rho_sinks, rho_others), with sum 1. In layer l + 1 the keys of the
    visual tokens are multiplied by the rho of their group, before they enter the cache; those of text stay. A gate
    begins at (0.5, 0.5) for every input. All this is from a secondary account of the paper. GELU between the linear
    layers is our choice; the paper's is not known to us.

    The paper's beginning halves the keys of all visual tokens, so it is not the untouched model. With `normalised`
    keys are multiplied by 2 rho, and it is.

    In training the prompt ends in front of a row's first label: only there can a gate read the question and not the
    answer. So of a conversation of several turns it reads the first question, and later answers are learned with the
    weights that this one gave, although at its turn a gate would read all that was said. Data with one turn in a row
    has no such difference.

    Args:
        layers: those after which a gate reads, from 0, negative ones from the end; by default all but the last, behind
            which there are no keys.
        criterion, threshold: what a sink is, see `sinks.rule`; judged on the norms of the patches as the
            connector reads them.
        normalised: whether the gates begin at the untouched model.
        seed: of the gates' first weights.

    Raises:
        ValueError: an unknown criterion, or layers that are not there, occur twice, or have none behind them.
    """

    kind = "lsg"
    asks = True

    def __init__(
        self,
        lvlm: LVLM,
        *,
        layers: Sequence[int] | None = None,
        criterion: str = "above_median",
        threshold: float = 3.0,
        normalised: bool = False,
        seed: int = 0,
    ) -> None:
        blocks = lvlm.decoder_layers
        n = len(blocks)
        layers = range(n - 1) if layers is None else layers
        if wrong := [layer for layer in layers if not -n <= layer < n or layer % n == n - 1]:
            raise ValueError(f"a gate stands behind layer 0 to {n - 2} of the decoder's {n}, not behind {wrong[0]}")
        layers = sorted(layer % n for layer in layers)
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"one gate or more, each behind a layer of its own, not {layers}")
        super().__init__(
            lvlm, layers=layers, criterion=criterion, threshold=threshold, normalised=normalised, seed=seed
        )
        self.rule = sinks.rule(criterion, threshold)
        torch.manual_seed(seed)
        width = lvlm.model.config.get_text_config().hidden_size
        self.gates = nn.ModuleDict()  # in float32 whatever the model's dtype is, for small steps to count
        for layer in layers:
            gate = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2), nn.Softmax(-1)
            )
            nn.init.zeros_(gate[3].weight)
            nn.init.zeros_(gate[3].bias)
            self.gates[str(layer)] = gate.to(next(blocks[layer + 1].parameters()).device)

    @contextmanager
    def around(self, inputs: Prefixes, labels: torch.Tensor | None = None) -> Iterator[None]:
        """As `Method.around`, with whole prompts; or with `labels` [rows, tokens], ≥ 0 in answers, prompts and answers.

        Raises:
            ValueError: labels that begin before the image ends.
        """
        ends = prompt_ends(inputs, labels)
        for layout in self.lvlm.layout(inputs):
            if ends[layout.row] < layout.visual[-1]:
                raise ValueError(f"row {layout.row}: labels begin before the image ends; mask them there with -100")
        scale = 2.0 if self.settings["normalised"] else 1.0

        def by(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            last = hidden[torch.arange(len(ends)), ends]  # [rows, width]
            return scale * self.gates[str(layer - 1)](last.float())

        with moving.scaled_keys(self.lvlm, inputs, self.rule, by, [layer + 1 for layer in self.settings["layers"]]):
            yield

    def forward(self, inputs: Prefixes, labels: torch.Tensor) -> torch.Tensor:
        """As `Method.forward`; raises ValueError too as `refuse_checkpointing`."""
        self.refuse_checkpointing()
        with self.around(inputs, labels):
            return self.model(**inputs, labels=labels).loss

    @torch.no_grad()
    def weights(self, inputs: Prefixes) -> torch.Tensor:
        """What the gates give for prompts: float [rows, gates, 2], rho of the sinks and of the others."""
        seen: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for gate in self.gates.values():
                hooks.enter_context(gate.register_forward_hook(lambda module, args, rho: seen.append(rho.cpu())))
            hooks.enter_context(self.around(inputs))
            self.model(**inputs, logits_to_keep=1)
        return torch.stack(seen, 1)


def prompt_ends(inputs: BatchFeature, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Where each row's prompt ends: long [rows], on the CPU.

    The last token that is no padding; where a row has labels ≥ 0, the token in front of the first of them.
    """
    last = inputs["attention_mask"].cumsum(1).argmax(1)
    if labels is not None:
        answered = labels >= 0
        last = torch.where(answered.any(1), answered.long().argmax(1) - 1, last)
    return last.cpu()


# ------------------------------------------------------------------------------------------------- the control
class LoRA(Method):
    """Low-rank adapters (Hu et al., 2106.09685) of the decoder's attention, with about as many parameters as gates.

    W x + B A x, with A [rank, in] random and B [out, rank] zero at first, so that it begins at the untouched model; and
    no further factor, as where the paper sets alpha to the first rank that is tried. The model itself is changed, and
    a model can have it once. What is trained is in float32 whatever the model's dtype is.

    Args:
        parameters: how many there shall be; `ranks` says how near it comes. That of gates: `n_parameters(gates)`.
        targets: linear layers of every attention that are adapted; those of the paper by default.
        seed: of the first A.

    Raises:
        ValueError: fewer parameters than the smallest adapter has, unknown targets, or a model that has adapters.
    """

    kind = "lora"

    def __init__(
        self, lvlm: LVLM, *, parameters: int, targets: Sequence[str] = ("q_proj", "v_proj"), seed: int = 0
    ) -> None:
        super().__init__(lvlm, parameters=parameters, targets=list(targets), seed=seed)
        if any("lora_" in name for name, _ in lvlm.decoder.named_parameters()):
            raise ValueError(f"the decoder of {lvlm.name} has adapters already: load the model again")
        wanted, _ = ranks(lvlm, parameters, targets)
        names = {module: name for name, module in lvlm.decoder.named_modules()}
        of_target = {
            names[layer.get_submodule(lvlm.spec.decoder_attention).get_submodule(target)]: rank
            for layer, rank in zip(lvlm.decoder_layers, wanted, strict=True)
            for target in targets
            if rank
        }
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=list(of_target), rank_pattern=of_target, alpha_pattern=of_target)
        inject_adapter_in_model(config, lvlm.decoder)
        for parameter in self.changed().values():
            parameter.data = parameter.data.float()

    def around(self, inputs: Prefixes) -> AbstractContextManager:
        return nullcontext()

    def changed(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.lvlm.decoder.named_parameters() if "lora_" in name}


def n_parameters(method: Method) -> int:
    """How many numbers of a method are trained."""
    return sum(p.numel() for p in method.changed().values())


def ranks(lvlm: LVLM, parameters: int, targets: Sequence[str] = ("q_proj", "v_proj")) -> tuple[list[int], int]:
    """The rank of adapters in each layer of a decoder, all of its `targets`, for a wanted number of parameters.

    The same rank everywhere, or ranks that differ by one; where there are not enough for one in every layer, some
    layers have none. Layers with the higher rank stand evenly through the decoder.

    Returns:
        The rank in each layer, 0 for none; and how many parameters that makes.

    Raises:
        ValueError: unknown targets, or fewer parameters than half of what rank 1 in one layer has.
    """
    try:
        linear = [lvlm.decoder_layers[0].get_submodule(f"{lvlm.spec.decoder_attention}.{target}") for target in targets]
    except AttributeError as error:
        raise ValueError(f"{lvlm.name}: {error}") from None
    of_rank = sum(module.in_features + module.out_features for module in linear)  # the same in every layer
    total, n = round(parameters / of_rank), len(lvlm.decoder_layers)
    if not total:
        raise ValueError(f"{lvlm.name}: the smallest adapter has {of_rank} parameters, {parameters} are too few")
    return [(layer + 1) * total // n - layer * total // n for layer in range(n)], total * of_rank
