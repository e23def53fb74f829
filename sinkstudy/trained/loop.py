"""Methods that are trained: what they have in common, how they are kept, and the loop that trains them.

A method changes a vision-language model and has parameters of its own; it may train parts of the model too. It is used
like those of `effects.moving`: `around` is a context in which the model computes with it. What was trained is kept as a
folder with `method.json` and `weights.safetensors`, without the model's untouched weights.

`descend` is the loop of all trainings, those of the lab's models too (`lab.training`). `fit` trains any module that
computes its own loss on a data set: on a CPU, on one GPU, or on several with `accelerate launch`.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce, send_to_device
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import set_seed

from sinkstudy import devices, digests
from sinkstudy.answers.evaluate import Intervention, Prefixes
from sinkstudy.model.identity import Identity
from sinkstudy.model.lvlm import LVLM
from sinkstudy.paths import atomic
from sinkstudy.progress import Progress


class Method(nn.Module):
    """A trained change of a vision-language model.

    A subclass has a `kind`, keeps in `settings` the plain values that its constructor takes by name, behind the model,
    and says in `around` what it does. What training may change is what `changed` finds: a stage asks for gradients
    of what it trains (`requires_grad`), and whatever a stage may have changed is kept.
    """

    kind: ClassVar[str] = ""
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

    def refuse_checkpointing(self) -> None:
        """Raise a ValueError if the decoder checkpoints its gradients.

        The backward pass would compute layers anew when the context of `around` has ended, so without the method.
        """
        if torch.is_grad_enabled() and self.lvlm.decoder.is_activation_checkpointing:
            raise ValueError(f"{self.kind} does not go with gradient checkpointing: "
                             "call activation_checkpointing_disable() of the model")  # fmt: skip

    def changed(self) -> dict[str, nn.Parameter]:
        """What training may change, by its name in this module; no tensor twice."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("model.")}

    def train_only(self, start: str | tuple[str, ...] = "") -> None:
        """Ask for gradients of what `changed` finds, by names with that `start`, and of nothing else."""
        self.requires_grad_(False)
        for name, parameter in self.changed().items():
            parameter.requires_grad_(name.startswith(start))

    def identity(self) -> dict[str, Any]:
        """What the method does, as plain values, see `identity.Identity`."""
        return {"kind": self.kind, **self.settings, "weights": Identity()(self.changed())}

    def intervention(self, name: str, **more: Any) -> Intervention:
        """The method for `evaluate`; `more` plain values that change what it does."""
        parameters = self.identity() | more
        return Intervention(name, lambda lvlm, inputs: self.around(inputs), parameters, "tower", self.asks)

    def save(self, folder: Path, *, eight_bits: bool = False, **more: Any) -> None:
        """Write the method to a folder, all at once; `more` plain values to remember, such as how it was trained.

        `eight_bits`, and what is raised, are as in `write_weights`.
        """
        known = {"kind": self.kind, "base": self.lvlm.name, "revision": self.lvlm.revision, "settings": self.settings}
        with atomic(folder) as temporary:
            temporary.mkdir()
            write_weights(self.changed(), temporary, eight_bits=eight_bits)
            (temporary / "method.json").write_text(json.dumps(known | more, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def described(cls, folder: str | Path) -> dict[str, Any]:
        """What `save` wrote about a method of this kind, here of any: kind, base, revision, settings, and more.

        Raises:
            ValueError: the folder holds no method, or one of another kind.
        """
        try:
            known = json.loads((Path(folder) / "method.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            raise ValueError(f"{folder} is no folder of a trained method: it has no readable method.json") from None
        if known["kind"] != (cls.kind or known["kind"]):
            raise ValueError(f"{folder} holds a method of the kind {known['kind']!r}, not {cls.kind!r}")
        return known

    @classmethod
    def open(cls, lvlm: LVLM, folder: str | Path) -> Self:
        """The method of a folder that `save` wrote, on a model.

        Raises:
            ValueError: the folder holds no method, or one of another kind, or its weights do not fit the model.
        """
        method = cls(lvlm, **cls.described(folder)["settings"])
        method.read(folder)
        return method

    def read(self, folder: str | Path) -> None:
        """Take the weights of a folder that `save` wrote.

        Raises:
            ValueError: they are not those of such a method on such a model.
        """
        found, own = kept(folder), self.changed()
        if found.keys() != own.keys() or any(found[k].shape != own[k].shape for k in own):
            raise ValueError(f"{folder} does not hold the weights of {self.kind} on {self.lvlm.name}")
        put(own, found)


SCALE = ":scale"  # behind a matrix's name


def rounded(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in eight bits: whole numbers from -127 to 127, and what one of them is worth in each row.

    Args:
        matrix: float [rows, ..]; a row is what belongs to one output.

    Returns:
        int8 [rows, ..] and bfloat16 [rows]. Their product is off by half a scale at most, and by as much as bfloat16
        rounds (1 in 512) for the largest of a row.
    """
    flat = matrix.float().flatten(1)
    scale = (flat.abs().amax(1) / 127).bfloat16()
    whole = (flat / scale.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
    return whole.to(torch.int8).view(matrix.shape), scale


def write_weights(weights: Mapping[str, torch.Tensor], folder: Path, *, eight_bits: bool = False) -> None:
    """Write `weights.safetensors` to a folder that is there, for `kept` to read.

    Args:
        eight_bits: whether matrices are kept as `rounded` gives them, in half the space; else all in bfloat16.

    Raises:
        FloatingPointError: a weight that is NaN or infinite; nothing is written.
    """
    check_weights(weights)
    found = {}
    for name, tensor in weights.items():
        if eight_bits and tensor.ndim > 1:
            found[name], found[name + SCALE] = rounded(tensor.detach().cpu())
        else:
            found[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    save_file(found, folder / "weights.safetensors")


def kept(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights that `write_weights` wrote to a folder, by their names there; those in eight bits as float32."""
    found = load_file(Path(folder) / "weights.safetensors")
    scales = {name.removesuffix(SCALE): found.pop(name) for name in list(found) if name.endswith(SCALE)}
    for name, scale in scales.items():
        found[name] = (found[name].flatten(1).float() * scale.float()[:, None]).view(found[name].shape)
    try:
        check_weights(found)
    except FloatingPointError as problem:
        raise ValueError(f"{folder}: {problem}") from None
    return found


def check_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Raises FloatingPointError, with its name, for a weight that is NaN or infinite."""
    for name, values in weights.items():
        if not values.isfinite().all():
            raise FloatingPointError(
                f"the weights {name} are no longer finite: train with a smaller learning rate, or in float32"
            )


# ------------------------------------------------------------------------------------------------- training
@dataclass(frozen=True)
class Settings:
    """How `fit` trains: AdamW, a linear warm-up, then a cosine to zero.

    Attributes:
        steps: of the optimizer; None: as many as `epochs` passes over the data need, rounded up.
        batch_size: samples that one process sees at once.
        accumulate: such batches of each process in a step of the optimizer.
        warmup: share of the steps.
        weight_decay: of the weights with two or more dimensions.
        clip: the largest norm of the gradient.
        bf16: whether matrix products are in bfloat16 where the hardware has it. What is trained is float32 meanwhile.
        checkpoint_steps: steps between two checkpoints.
        workers: processes that read and prepare samples beside the training.

    Raises:
        ValueError: a number out of its range.
    """

    steps: int | None = None
    epochs: float = 1
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.03
    clip: float = 1.0
    seed: int = 0
    bf16: bool = True
    checkpoint_steps: int = 100
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "batch_size", "accumulate", "lr", "clip", "checkpoint_steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, but has to be finite and above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, but has to be finite and 0 at least")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, but has to be 0 at least and below 2^31")
        if not 0 <= self.workers <= 256:
            raise ValueError(f"workers is {self.workers}, but has to be from 0 to 256")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is {self.warmup}, but is a share of the steps, from 0 to 1")

    def that_matter(self, processes: int) -> dict[str, Any]:
        """What the weights depend on: how a step's samples are divided is of no matter, only their number is."""
        without = ("batch_size", "accumulate", "checkpoint_steps", "workers")
        per_step = self.batch_size * self.accumulate * processes
        return {k: v for k, v in asdict(self).items() if k not in without} | {"samples per step": per_step}


def fit(
    module: nn.Module,
    dataset: Sequence,
    folder: str | Path,
    settings: Settings,
    collate: Callable[[list, list[int]], dict[str, Any]] | None = None,
    *,
    optimizers: Callable[[list[tuple[str, nn.Parameter]]], list[Optimizer]] | None = None,
    about: Mapping[str, Any] | None = None,
    keys: Sequence[str] | None = None,
    watch: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Train the parameters of a module that ask for gradients.

    A killed training goes on from its last checkpoint when it is called again, and ends with the weights that it would
    have had. A finished one is not repeated: its weights are read. Both hold for the same settings only; with others,
    it is trained anew, and what differs is said. Samples with `keys` may change as long as no step so far has used one
    that did. With several processes (`accelerate launch`), each calls this function; a step then sees as many
    times more samples.

    Args:
        module: `module(**batch)` is the loss, a scalar. If the batch has `labels`, the loss is taken as a mean over
            those that are not -100, and batches and processes that share a step are weighted by their number.
        dataset: `dataset[i]` for i below `len(dataset)`. Each epoch goes through it in an order of its own, which
            follows from the seed.
        folder: see `descend`.
        collate: (samples, places) -> batch. The place of a sample counts the samples drawn before it in the whole
            training, in all processes, so what a module draws at random can follow from it: it is place //
            len(dataset) epochs and place // (samples of a step) steps after the start. By default torch's collate of
            the samples.
        optimizers: makes the optimizers of named parameters, each with its own learning rate; `lr` and `weight_decay`
            of the settings are not used then.
        about: further plain values that the weights depend on, such as where the module and the data came from.
        keys: what each sample is, as text. The order of samples then follows from these texts, so that taking one out
            leaves that of the others as it was.
        watch: see `descend`.

    Returns:
        A row for each step: `step` (from 1), `loss` (of the step, before its update), `gradient` (its norm before
        clipping) and `lr`.

    Raises:
        ValueError: no data, or no parameter that asks for gradients; a GPU that is not this process's own.
        FloatingPointError: the loss is not finite.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trained or not len(dataset):
        raise ValueError("no parameter asks for gradients" if not trained else "there are no samples to train on")
    device = next(iter(trained.values())).device
    of = PartialState(cpu=device.type == "cpu")
    if device.type == "cuda" and device.index != of.local_process_index:
        own = f"cuda:{of.local_process_index}"
        raise ValueError(f"this process trains on {own}, not on {device}: choose by CUDA_VISIBLE_DEVICES")
    size, accumulate, world = settings.batch_size, settings.accumulate, of.num_processes
    per_step = size * accumulate * world
    steps = settings.steps or math.ceil(settings.epochs * len(dataset) / per_step)
    known = settings.that_matter(world) | {"samples": len(dataset), "about": dict(about or {})}
    del known["epochs"]  # the number of steps says it
    if keys is not None:
        known["data"] = digests.of_values(sorted(keys))
    draws = _Draws(dataset, settings.seed, keys)
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=half or settings.bf16 and devices.fast_bfloat16(device)
    )
    batches: Iterator | None = None

    def gradients(step: int) -> dict[str, float]:
        """Of all batches of a step, in all processes; the loss is the step's."""
        nonlocal batches
        if batches is None:
            numbers = range(step * accumulate * world + of.process_index, steps * accumulate * world, world)
            places = (range(number * size, (number + 1) * size) for number in numbers)
            batches = iter(DataLoader(draws, batch_sampler=places, num_workers=settings.workers,
                                      collate_fn=partial(_collated, collate), generator=torch.Generator()))  # fmt: skip
        own = [send_to_device(next(batches), device) for _ in range(accumulate)]
        weights = [b["labels"].ne(-100).sum() if "labels" in b else torch.tensor(1, device=device) for b in own]
        total, loss = reduce(torch.stack(weights).sum(), "sum"), torch.zeros((), device=device)
        for batch, weight in zip(own, weights, strict=True):
            with autocast:
                of_batch = module(**batch)
            of_batch = of_batch * weight * world / total  # the mean over processes is then that over all labels
            of_batch.backward()
            loss += of_batch.detach()
        if world > 1:
            for p in trained.values():
                p.grad = reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
        return {"loss": reduce(loss, "mean").item()}

    warm = math.ceil(settings.warmup * steps)

    def rate(step: int) -> float:
        return step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    modes = {part: part.training for part in module.modules()}
    module.train()
    set_seed(settings.seed)
    torch.empty((), dtype=torch.int64).random_()  # passed over, as ever since, so that dropout draws what it drew
    try:
        return descend(
            folder,
            trained,
            gradients,
            steps=steps,
            optimizers=optimizers or (lambda named: [adamw(named, settings.lr, settings.weight_decay)]),
            rate=rate,
            clip=settings.clip,
            checkpoint_steps=settings.checkpoint_steps,
            known=known,
            used=lambda step: draws.used(step, per_step),
            watch=watch,
        )
    finally:
        for part, mode in modes.items():
            part.training = mode


def descend(
    folder: str | Path,
    parameters: Mapping[str, nn.Parameter],
    gradients: Callable[[int], Mapping[str, float]],
    *,
    steps: int,
    optimizers: Callable[[list[tuple[str, nn.Parameter]]], list[Optimizer]],
    rate: Callable[[int], float],
    clip: float,
    checkpoint_steps: int,
    known: Mapping[str, Any],
    used: Callable[[int], list[str]] = lambda steps: [],
    watch: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """The loop of every training: seeded by its caller, resumable to the byte, and never repeated once it has ended.

    Args:
        folder: gets `training.csv` and `trained.safetensors`, and `checkpoint.pt` meanwhile. What is there of a
            training with other settings is replaced, and what differs is said on stderr.
        parameters: what is trained, by name; in float32 meanwhile, for steps are too small for half precision.
        gradients: step (from 0) -> what is logged of it, `loss` among it. Leaves the gradients in `parameters`, in all
            processes the same. May depend on the step and on torch's random state, on nothing else that went before.
        optimizers: see `fit`.
        rate: step -> the learning rate, as a share of each optimizer's own.
        known: plain values that the weights depend on.
        used: number of steps -> for each of them, a digest of the samples that it uses.
        watch: called with the number of steps done: at 0 and after each step.

    Returns, raises: as `fit`; what else was logged stands in further columns.
    """
    folder, main = Path(folder), PartialState().is_main_process
    mark, curve, part = (folder / name for name in ("trained.safetensors", "training.csv", "checkpoint.pt"))
    shapes = str([(name, list(p.shape)) for name, p in parameters.items()])
    known = dict(known) | {"steps": steps, "parameters": hashlib.sha256(shapes.encode()).hexdigest()}
    known = json.loads(json.dumps(known))
    found = _metadata(mark)
    begun = torch.load(part, map_location="cpu", weights_only=True) if part.exists() else None
    PartialState().wait_for_everyone()  # all have looked before one changes anything

    def say(text: str) -> None:
        if main:
            print(f"{folder}: {text}", file=sys.stderr)

    if found == known:
        put(parameters, load_file(mark))
        say("trained earlier with these settings, read")
        if main:
            part.unlink(missing_ok=True)
        return pd.read_csv(curve)
    if found is not None:
        say(f"was trained with {_differences(found, known)}: is trained anew")
    if begun is not None and (why := _why_anew(begun, known, used)):
        say(f"was begun with {why}: is trained anew")
        begun = None
    elif begun is not None and begun["known"] != known:
        say("the data changed, and no step so far has used what did: goes on")

    dtypes = {name: p.dtype for name, p in parameters.items()}
    for p in parameters.values():
        p.data = p.data.float()
    steppers, first, rows = optimizers(list(parameters.items())), 0, []
    if begun is not None:
        put(parameters, begun["weights"])
        for optimizer, state in zip(steppers, begun["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, rows = begun["step"], begun["log"]
        _set_random(begun["random"][PartialState().process_index])
    elif watch is not None:
        watch(0)
    bar = Progress(f"{folder.name}: step", steps, initial=first, disable=not main)
    try:
        for step in range(first, steps):
            values = dict(gradients(step))
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"{folder.name}: the loss at step {step + 1} is {values['loss']}: train with a smaller learning "
                    "rate, or in float32"
                )
            norm = nn.utils.clip_grad_norm_(parameters.values(), clip)
            for optimizer in steppers:
                for group in optimizer.param_groups:
                    group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate(step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            of_step = {"step": step + 1, "loss": values.pop("loss"), "gradient": norm.item()}
            rows.append(of_step | {"lr": steppers[0].param_groups[0]["lr"]} | values)
            if watch is not None:
                watch(step + 1)
            bar.set_postfix(loss=f"{of_step['loss']:.4g}", refresh=False)
            bar.update()
            if (step + 1) % checkpoint_steps == 0 and step + 1 < steps:
                random = gather_object([_random()])  # of all processes
                check_weights(parameters)  # a checkpoint from which nothing could go on takes no good one's place
                if main:
                    states = [optimizer.state_dict() for optimizer in steppers]
                    with atomic(part) as temporary:
                        torch.save({"known": known, "step": step + 1, "log": rows, "weights": _weights(parameters),
                                    "optimizers": states, "random": random, "used": used(step + 1)},
                                   temporary)  # fmt: skip
        if main:
            mark.unlink(missing_ok=True)  # of other settings; it must not stand beside the new curve
            with atomic(curve) as temporary:
                pd.DataFrame(rows).to_csv(temporary, index=False)
            with atomic(mark) as temporary:
                save_file(_weights(parameters), temporary, {"settings": json.dumps(known)})
            part.unlink(missing_ok=True)
        PartialState().wait_for_everyone()
    finally:
        bar.close()
        for name, p in parameters.items():
            p.data, p.grad = p.data.to(dtypes[name]), None
    return pd.read_csv(curve)


def adamw(named: Sequence[tuple[str, nn.Parameter]], lr: float, weight_decay: float, **more: Any) -> Optimizer:
    """AdamW that decays the weights with two or more dimensions; `more` as torch takes it."""
    groups = [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True, **more)


def _random() -> list[torch.Tensor]:
    """This process's random state of torch."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _set_random(states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


class _Draws(Dataset):
    """The draws of a training: (sample, place), epoch after epoch."""

    def __init__(self, dataset: Sequence, seed: int, keys: Sequence[str] | None = None) -> None:
        self.dataset, self.seed = dataset, seed
        # conversations are long, digests short
        self.keys = None if keys is None else [digests.of_values([key]) for key in keys]
        self.steps: list[str] = []  # what `used` knows already
        self.epoch, self.order = -1, np.empty(0, int)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        return self.dataset[self._index(place)], place

    def _index(self, place: int) -> int:
        epoch, at = divmod(place, len(self.dataset))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self._shuffled(epoch)
        return int(self.order[at])

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The order of an epoch. With keys it is that of their digests, so that each has its place by itself."""
        if self.keys is None:
            return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        drawn = [hashlib.sha256(f"{self.seed} {epoch} {key}".encode()).digest() for key in self.keys]
        return np.array(sorted(range(len(drawn)), key=drawn.__getitem__))

    def used(self, steps: int, per_step: int) -> list[str]:
        """For each of the first steps, a digest of the samples that it uses; without keys, nothing is known of them."""
        if self.keys is None:
            return []
        for step in range(len(self.steps), steps):
            places = range(step * per_step, (step + 1) * per_step)
            self.steps.append(digests.of_values([self.keys[self._index(place)] for place in places]))
        return self.steps[:steps]


def _collated(
    collate: Callable[[list, list[int]], dict[str, Any]] | None, draws: list[tuple[Any, int]]
) -> dict[str, Any]:
    """A batch of `_Draws`; a function of the module, so that other processes can get it too."""
    samples, places = map(list, zip(*draws, strict=True))
    return default_collate(samples) if collate is None else collate(samples, places)


def _weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in parameters.items()}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two trainings differ in; numbers are shown."""

    def shown(key: str) -> str:
        numbers = isinstance(before.get(key), (int, float)) and isinstance(now[key], (int, float))
        return f"{key}: {before[key]}, now {now[key]}" if numbers else key

    differ = [key for key in now if before.get(key) != now[key]]
    after = ""
    if "steps" in differ and "samples" in differ:
        after = f"; with --steps {before['steps']} the learning rates would be those of before"
    return f"other settings ({', '.join(map(shown, differ))}{after})"


def _why_anew(begun: Mapping[str, Any], known: Mapping[str, Any], used: Callable[[int], list[str]]) -> str:
    """Why a training cannot go on from its checkpoint; empty if it can: at most, data changed that no step used."""
    before = begun["known"]
    of_data = {"samples", "data"} if "data" in known else set()
    if before.keys() != known.keys() or any(before[k] != known[k] for k in known.keys() - of_data):
        return _differences(before, known)
    for step, (then, now) in enumerate(zip(begun["used"], used(begun["step"]), strict=True), start=1):
        if then != now:
            return f"other samples in step {step} of the {begun['step']} that were done"
    return ""


def _metadata(file: Path) -> dict[str, Any] | None:
    """The settings of a finished training; None if there is none."""
    if not file.exists():
        return None
    with safe_open(file, "pt") as weights:
        return json.loads(weights.metadata()["settings"])


def put(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, torch.Tensor]) -> None:
    """Give parameters the weights of their names."""
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
