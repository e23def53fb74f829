"""Methods that are trained: what they have in common, how they are kept, and how they are trained.

A method changes a vision-language model and has parameters of its own; it may train parts of the model too. It is used
like those of `effects.moving`: `around` is a context in which the model computes with it. What was trained is kept as a
folder with `method.json` and `weights.safetensors`, without the model's untouched weights.

`fit` trains any module that computes its own loss, with the `Trainer` of transformers: on a CPU, on one GPU, or on
several with `accelerate launch`.
"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, SequentialSampler, default_collate
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

from sinkstudy import digests
from sinkstudy.answers.evaluate import Intervention, Prefixes
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

    def identity(self) -> dict[str, Any]:
        """What the method does, as plain values, see `identity.Identity`."""
        return {"kind": self.kind, **self.settings, "weights": digest_of_weights(self.changed())}

    def intervention(self, name: str, **more: Any) -> Intervention:
        """The method for `evaluate`; `more` plain values that change what it does."""
        parameters = self.identity() | more
        return Intervention(name, lambda lvlm, inputs: self.around(inputs), parameters, "tower", self.asks)

    def save(self, folder: Path, *, eight_bits: bool = False, **more: Any) -> None:
        """Write the method to a folder, all at once; `more` plain values to remember, such as how it was trained.

        Args:
            eight_bits: whether matrices are kept as `rounded` gives them, in half the space; else all in bfloat16.

        Raises:
            FloatingPointError: a weight that is NaN or infinite; nothing is written.
        """
        known = {"kind": self.kind, "base": self.lvlm.name, "revision": self.lvlm.revision, "settings": self.settings}
        check_weights(self.changed())
        weights = {}
        for name, parameter in self.changed().items():
            if eight_bits and parameter.ndim > 1:
                weights[name], weights[name + SCALE] = rounded(parameter.detach().cpu())
            else:
                weights[name] = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        with atomic(folder) as temporary:
            temporary.mkdir()
            save_file(weights, temporary / "weights.safetensors")
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
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(found[name])


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


def kept(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights that `Method.save` wrote to a folder, by their names there; those in eight bits as float32."""
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


def digest_of_weights(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors."""
    sha256 = hashlib.sha256()
    for name, tensor in weights.items():
        sha256.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


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
        folder: gets `training.csv` and `trained.safetensors`, and `checkpoints` meanwhile.
        collate: (samples, places) -> batch. The place of a sample counts the samples drawn before it in the whole
            training, in all processes, so what a module draws at random can follow from it: it is place //
            len(dataset) epochs and place // (samples of a step) steps after the start. By default torch's collate of
            the samples.
        optimizers: makes the optimizers of named parameters, each with its own learning rate; `lr` and `weight_decay`
            of the settings are not used then.
        about: further plain values that the weights depend on, such as where the module and the data came from.
        keys: what each sample is, as text. The order of samples then follows from these texts, so that taking one out
            leaves that of the others as it was.

    Returns:
        A row for each step: `step` (from 1), `loss` (of the step, before its update), `gradient` (its norm before
        clipping) and `lr`.

    Raises:
        ValueError: no data, or no parameter that asks for gradients; a GPU that is not this process's own.
        FloatingPointError: the loss is not finite.
    """
    folder, trained = Path(folder), {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trained or not len(dataset):
        raise ValueError("no parameter asks for gradients" if not trained else "there are no samples to train on")
    device = next(iter(trained.values())).device
    arguments = TrainingArguments(
        output_dir=folder / "checkpoints",
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        max_grad_norm=settings.clip,
        seed=settings.seed,
        save_steps=settings.checkpoint_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=False,  # which takes a batch for a plain dictionary
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=device.type == "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are several processes, never nn.DataParallel
    if device.type == "cuda" and device != arguments.device:
        raise ValueError(f"this process trains on {arguments.device}, not on {device}: choose by CUDA_VISIBLE_DEVICES")
    processes = arguments.distributed_state
    per_step = settings.batch_size * settings.accumulate * processes.num_processes
    arguments.max_steps = steps = settings.steps or math.ceil(settings.epochs * len(dataset) / per_step)

    known = settings.that_matter(processes.num_processes) | {"steps": steps}
    known |= {"samples": len(dataset), "about": dict(about or {})}
    draws = _Draws(dataset, settings.seed, steps * per_step, keys)
    if keys is not None:
        known["data"] = digests.of_values(sorted(keys))
    del known["epochs"]  # the number of steps says it
    known["parameters"] = hashlib.sha256(str([(k, list(p.shape)) for k, p in trained.items()]).encode()).hexdigest()
    known = json.loads(json.dumps(known))
    mark, curve, checkpoints = folder / "trained.safetensors", folder / "training.csv", Path(arguments.output_dir)
    found = _metadata(mark)
    begun = checkpoints / "settings.json"
    begun_with = json.loads(begun.read_text()) if begun.exists() else None
    processes.wait_for_everyone()  # all have looked before one changes anything
    if found == known:
        _take(trained, mark)
        if processes.is_main_process:
            shutil.rmtree(checkpoints, ignore_errors=True)
            print(f"{folder}: trained earlier with these settings, read", file=sys.stderr)
        return pd.read_csv(curve)
    if processes.is_main_process:
        for path in checkpoints.glob("checkpoint-*"):
            if _used(path) is None:
                shutil.rmtree(path)
        if found is not None:
            print(f"{folder}: was trained with {_differences(found, known)}: is trained anew", file=sys.stderr)
        if begun_with not in (None, known):
            why = _differences(begun_with, known)
            if set(begun_with) == set(known) and all(begun_with[k] == known[k] for k in known.keys() - {*_OF_DATA}):
                why = _changed_before(checkpoints, draws, per_step)
            if why:
                print(f"{folder}: was begun with {why}: is trained anew", file=sys.stderr)
                shutil.rmtree(checkpoints, ignore_errors=True)
            else:
                print(f"{folder}: the data changed, and no step so far has used what did: goes on", file=sys.stderr)
        with atomic(begun) as temporary:
            temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    processes.wait_for_everyone()

    modes = {part: part.training for part in module.modules()}
    dtypes = {name: p.dtype for name, p in trained.items()}
    for p in trained.values():  # steps are too small for half precision
        p.data = p.data.float()
    try:
        made = (optimizers or _adamw(settings))(list(trained.items()))
        optimizer = made[0] if len(made) == 1 else Together(made)
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(settings.warmup * steps), steps)
        trainer = _Trainer(
            module,
            arguments,
            train_dataset=draws,
            data_collator=_Collate(collate),
            optimizers=(optimizer, schedule),
            callbacks=[_Progress(folder.name)],
        )
        trainer.remove_callback(PrinterCallback)
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
        bf16 = half or (settings.bf16 and _has_bf16(device))
        trainer.used = lambda step: draws.used(step, per_step)
        trainer.trained, trainer.autocast = trained, torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        whole = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
        if processes.is_main_process:
            rows = [row for row in trainer.state.log_history if "loss" in row]
            names = {"step": "step", "loss": "loss", "grad_norm": "gradient", "learning_rate": "lr"}
            mark.unlink(missing_ok=True)  # of other settings; it must not stand beside the new curve
            with atomic(curve) as temporary:
                pd.DataFrame(rows)[list(names)].rename(columns=names).to_csv(temporary, index=False)
            with atomic(mark) as temporary:
                save_file(_weights(trained), temporary, {"settings": json.dumps(known)})
            shutil.rmtree(checkpoints)
        processes.wait_for_everyone()
    finally:
        for name, p in trained.items():
            p.data, p.grad = p.data.to(dtypes[name]), None
        for part, mode in modes.items():
            part.training = mode
    return pd.read_csv(curve)


class Together(Optimizer):
    """Several optimizers as one."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([group for optimizer in self.optimizers for group in optimizer.param_groups], {})

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


_WHOLE = "whole.json"  # in a checkpoint that all processes have written: what each step so far has used
_OF_DATA = ("samples", "data")  # settings that follow from the samples


class _Trainer(Trainer):
    """Keeps what is trained and nothing else, and takes samples in the order in which they are drawn."""

    trained: dict[str, nn.Parameter]
    autocast: AbstractContextManager
    used: Callable[[int], list[str]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that labels are counted: over all batches and processes of a step

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs  # on the device already; Trainer would make new `Prefixes`, without their names

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        with self.autocast:
            loss = model(**inputs)
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss at step {self.state.global_step + 1} is {loss.item()}: train with a smaller learning rate, "
                "or in float32"
            )
        if num_items_in_batch is None:
            return loss
        return loss * inputs["labels"].ne(-100).sum() * self.args.world_size / num_items_in_batch  # DDP takes the mean

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            check_weights(self.trained)  # a checkpoint from which nothing could go on takes no good one's place
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(_weights(self.trained), Path(output_dir) / "trained.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _take(self.trained, Path(resume_from_checkpoint) / "trained.safetensors")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            with atomic(written / _WHOLE) as temporary:
                temporary.write_text(json.dumps(self.used(self.state.global_step)), encoding="utf-8")
            for path in written.parent.glob("checkpoint-*"):
                if path != written:
                    shutil.rmtree(path)


class _Progress(TrainerCallback):
    """How far the training is, with its loss."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        silent = not state.is_world_process_zero
        self.bar = Progress(f"{self.name}: step", state.max_steps, initial=state.global_step, disable=silent)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)
            self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class _Draws(Dataset):
    """All draws of a training: (sample, place), epoch after epoch."""

    def __init__(self, dataset: Sequence, seed: int, length: int, keys: Sequence[str] | None = None) -> None:
        self.dataset, self.seed, self.length = dataset, seed, length
        # conversations are long, digests short
        self.keys = None if keys is None else [digests.of_values([key]) for key in keys]
        self.steps: list[str] = []  # what `used` knows already
        self.epoch, self.order = -1, np.empty(0, int)

    def __len__(self) -> int:
        return self.length

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


class _Collate:
    """A collate function for `_Draws`, as a class so that other processes can get it too."""

    def __init__(self, collate: Callable[[list, list[int]], dict[str, Any]] | None) -> None:
        self.collate = collate

    def __call__(self, draws: list[tuple[Any, int]]) -> dict[str, Any]:
        samples, places = map(list, zip(*draws, strict=True))
        return default_collate(samples) if self.collate is None else self.collate(samples, places)


def _adamw(settings: Settings) -> Callable[[list[tuple[str, nn.Parameter]]], list[Optimizer]]:
    def make(named: Iterable[tuple[str, nn.Parameter]]) -> list[Optimizer]:
        parts = {settings.weight_decay: [p for _, p in named if p.dim() >= 2]}
        parts[0.0] = parts.get(0.0, []) + [p for _, p in named if p.dim() < 2]
        groups = [{"params": parameters, "weight_decay": decay} for decay, parameters in parts.items() if parameters]
        return [torch.optim.AdamW(groups, lr=settings.lr, fused=True)]

    return make


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in parameters.items()}


def _used(checkpoint: Path) -> list[str] | None:
    """What each step up to a checkpoint has used; None if the checkpoint is not whole."""
    try:
        return json.loads((checkpoint / _WHOLE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


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


def _changed_before(checkpoints: Path, draws: _Draws, per_step: int) -> str:
    """Why a training cannot go on with data that changed; empty if it can, for no step so far used what did."""
    for path in checkpoints.glob("checkpoint-*"):
        used = _used(path) or []
        now = draws.used(len(used), per_step)
        for step, (before, after) in enumerate(zip(used, now, strict=True), start=1):
            if before != after:
                return f"other samples in step {step} of the {len(used)} that were done"
    return ""


def _metadata(file: Path) -> dict[str, Any] | None:
    """The settings of a finished training; None if there is none."""
    if not file.exists():
        return None
    with safe_open(file, "pt") as weights:
        return json.loads(weights.metadata()["settings"])


def _take(parameters: Mapping[str, nn.Parameter], file: Path) -> None:
    with torch.no_grad():
        for name, tensor in load_file(file).items():
            parameters[name].copy_(tensor)
