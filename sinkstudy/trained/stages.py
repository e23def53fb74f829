"""DIYSink's training on a model of one's own, stage by stage (2510.08510): the command `sinkstudy diysink`.

First each connector alone on captions, with only its own tokens shown, while tower and decoder stay as they are; then
connectors and decoder together on conversations; then, if wanted, a soft router (`routers.ReW`). Gates and their
control (`gates`) have one stage, on conversations. Each stage writes the folder of a method (`loop.Method.save`).
"""

import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, LoraModel

from sinkstudy import devices, digests, paths, sinks
from sinkstudy.model import loading
from sinkstudy.model.lvlm import LVLM
from sinkstudy.paths import atomic, check_writable
from sinkstudy.trained import conversations, loop
from sinkstudy.trained.connectors import DIYSink, OneConnector, Show, matched_width
from sinkstudy.trained.gates import Gates, LoRA, n_parameters
from sinkstudy.trained.loop import Method
from sinkstudy.trained.routers import ReW

# the stages before "tune": what the decoder sees, and whose weights are trained
PRETRAIN: dict[str, dict[str, tuple[Show, str]]] = {
    "two-connectors": {"pretrain-sinks": ("sinks", "sink."), "pretrain-others": ("others", "connector.")},
    "one-connector": {"pretrain": ("both", "connector.")},
}
PRETRAIN |= dict.fromkeys(("random-split", "in-place"), PRETRAIN["two-connectors"])
PRETRAIN |= {"matched-width": PRETRAIN["one-connector"]}
# nothing but their own parameters is trained: a router of two trained connectors, gates of the model, their control
ALONE = ("soft-router", "gates", "adapters")
PRETRAIN |= {method: {} for method in ALONE}


@dataclass(frozen=True)
class Job:
    """One stage: a method on a model, and data.

    Attributes:
        model: as `loading.load` takes it.
        method: a name of `PRETRAIN`; "matched-width" is one connector with as many parameters as two have, and
            "random-split" two connectors between which random tokens are divided, and "in-place" two whose tokens stay
            in their places; for those of `ALONE` see `ReW`, `Gates` and `LoRA`.
        stage: one of the method's, or "tune".
        data, images: see `conversations.read`.
        connectors: for "tune", the folders of the stages before it; for "soft-router" that of the trained DIYSink.
        encoder: of the questions, for "soft-router", see `ReW`.
        criterion, threshold: what a sink is, see `DIYSink`.
        decoder: whether "tune" trains the decoder.
        lora: rank of low-rank updates of the decoder's linear layers (LoRA, 2106.09685), which are trained in place of
            its weights and added to them at the end; as in LLaVA, their scale is 2 and their dropout 0.05.
        longest: see `conversations.Collate`.

    Raises:
        ValueError: options that do not go together.
    """

    model: str
    method: str
    stage: str
    data: Path
    images: Path
    connectors: tuple[Path, ...] = ()
    criterion: str = "above_median"
    threshold: float = 3.0
    decoder: bool = True
    lora: int | None = None
    longest: int = 2048
    revision: str | None = None
    encoder: str = "own"

    def __post_init__(self) -> None:
        if self.method not in PRETRAIN:
            raise ValueError(f"unknown method {self.method!r}: choose from {', '.join(PRETRAIN)}")
        stages = [*PRETRAIN[self.method], "tune"]
        if self.stage not in stages:
            raise ValueError(f"{self.method} has no stage {self.stage!r}: choose from {', '.join(stages)}")
        if self.stage != "tune" and (self.connectors or self.lora or not self.decoder):
            raise ValueError(f"{self.stage} trains one new connector alone: connectors and the decoder are for tune")
        sinks.rule(self.criterion, self.threshold)  # which refuses an unknown criterion
        if not math.isfinite(self.threshold) or self.criterion == "percentile" and not 0 <= self.threshold < 100:
            bound = ", of a percentile from 0 to below 100" if self.criterion == "percentile" else ""
            raise ValueError(f"threshold is {self.threshold}, but has to be a finite number{bound}")
        if self.longest < 1 or self.lora is not None and self.lora < 1:
            raise ValueError(f"longest is {self.longest} and lora {self.lora}, but they have to be 1 at least")
        if self.lora and not self.decoder:
            raise ValueError("the decoder is either frozen or trained by LoRA")
        if self.method in ALONE and (self.lora or not self.decoder):
            raise ValueError(f"{self.method} never trains the decoder's weights: leave out --lora and --freeze-decoder")
        if self.method in ALONE and len(self.connectors) != (self.method == "soft-router"):
            wanted = "the folder of one trained DIYSink" if self.method == "soft-router" else "none"
            raise ValueError(f"{self.method} takes connectors: {wanted} (--connectors)")


def settings(
    method: str, stage: str, *, batch_size: int, accumulate: int | None, lr: float | None, epochs: float | None,
    **more: Any,
) -> loop.Settings:  # fmt: skip
    """The papers' for a stage: no weight decay, 3 % warm-up, then a cosine.

    Args:
        batch_size: samples that a process sees at once.
        accumulate: such batches in a step; by default as many as make 256 samples of captions, 128 of conversations
            (TinyLLaVA's) or 20 for the soft router, in all processes together.
        lr: by default 1e-3 for captions, 2e-5 for conversations, 1e-2 for the soft router, 1e-3 for gates and
            adapters (ours; their paper's is not known).
        epochs: by default 1; 10 for the soft router, 2 for gates and adapters.
    """
    samples, rate, passes = (256, 1e-3, 1.0) if stage != "tune" else (128, 2e-5, 1.0)
    if method in ALONE:
        samples, rate, passes = (20, 1e-2, 10) if method == "soft-router" else (128, 1e-3, 2)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but has to be 1 at least")
    if accumulate is None:
        accumulate = math.ceil(samples / batch_size / _processes())
    rate, passes = rate if lr is None else lr, passes if epochs is None else epochs
    return loop.Settings(batch_size=batch_size, accumulate=accumulate, lr=rate, epochs=passes, **more)


def run(job: Job, how: loop.Settings, out: Path, *, device: str, dtype: str, outside: bool = False) -> None:
    """Train a stage and write its method to the folder `out`; what was finished with these settings is left as it is.

    `outside`: see `conversations.read`.

    Raises:
        ValueError: anything wrong with model, data, folders or options, before the model is loaded where possible.
    """
    out = Path(out)
    devices.check(device, dtype)
    before = check(job, out)
    samples = conversations.read(job.data, job.images, outside=outside)
    shown = [conversations.sample_key(sample, job.images) for sample in samples]
    known = _plain(job) | {"images": digests.of_values(shown), "settings": how.that_matter(_processes())}
    work = out.with_name(out.name + ".training")  # what is there while it is trained
    main_process = int(os.environ.get("RANK", 0)) == 0
    if _trained(out) == known:
        if main_process:
            _leave(work, out)
            print(f"{out}: finished earlier with these settings", file=sys.stderr)
        return
    lvlm = loading.load(job.model, device=device, dtype=dtype, revision=job.revision)
    samples = conversations.fitting(lvlm, samples)
    method, lora = prepared(lvlm, job, how.seed, before)
    keys = [conversations.sample_key(sample, job.images) for sample in samples]
    about = {name: value for name, value in known.items() if name not in ("data", "images")}  # the keys say more
    log = loop.fit(method, samples, work, how, conversations.Collate(lvlm, job.longest), about=about, keys=keys)
    if lora is not None:
        lora.merge_and_unload()
    if main_process:
        method.save(out, training=known)
        _leave(work, out)
        print(f"{out}: {len(log)} steps, last loss {log.loss.iloc[-1]:.4g}", file=sys.stderr)


def check(job: Job, out: Path) -> dict[str, Path]:
    """Make sure, without loading it, that a model is known and that the folders fit.

    Returns:
        For "tune" the folder of each stage before it, in their order; else nothing.
    """
    loading.find(job.model)
    if out.exists() and not (out / "method.json").exists():
        raise ValueError(f"{out} is there and is no method: choose another folder")
    check_writable(out.parent)
    if job.stage != "tune" or job.method in ALONE:
        return {}
    wanted, found = PRETRAIN[job.method], {}
    for folder in job.connectors:
        if (trained := _trained(folder)) is None:
            raise ValueError(f"{folder} does not hold a stage of this training")
        for name in ("model", "revision", "method", "criterion", "threshold"):
            if trained[name] != getattr(job, name):
                raise ValueError(f"{folder} was trained with {name} {trained[name]!r}, not {getattr(job, name)!r}")
        found[trained["stage"]] = folder
    if lacking := [stage for stage in wanted if stage not in found]:
        raise ValueError(f"tune begins with the connectors of {', '.join(lacking)}: give their folders (--connectors)")
    return {stage: found[stage] for stage in wanted}


def prepared(lvlm: LVLM, job: Job, seed: int, before: Mapping[str, Path]) -> tuple[Method, LoraModel | None]:
    """The method as a stage finds it, with gradients for what it trains; peft's `LoraModel` if asked for."""
    if job.method in ALONE:
        method = _alone(lvlm, job, seed)
        method.train_only()
        return method, None
    common: dict[str, Any] = {"seed": seed, "decoder": job.stage == "tune" and job.decoder}
    if "pretrain-sinks" in PRETRAIN[job.method]:
        common |= {"split": "random" if job.method == "random-split" else "sinks", "front": job.method != "in-place"}
        method = DIYSink(lvlm, criterion=job.criterion, threshold=job.threshold, **common)
    else:
        width = matched_width(lvlm.connector) if job.method == "matched-width" else None
        method = OneConnector(lvlm, width=width, **common)
    own = method.changed()
    for stage, folder in before.items():
        start = PRETRAIN[job.method][stage][1]
        loop.put(own, {name: of for name, of in loop.kept(folder).items() if name.startswith(start)})
    prefix: str | tuple[str, ...] = ("connector.", "sink.") if job.lora else ""
    if job.stage != "tune":
        method.show, prefix = PRETRAIN[job.method][job.stage]
    method.train_only(prefix)
    if not job.lora:
        return method, None
    how = LoraConfig(r=job.lora, lora_alpha=2 * job.lora, lora_dropout=0.05, target_modules="all-linear")
    return method, LoraModel(lvlm.decoder, how, "default")


def _alone(lvlm: LVLM, job: Job, seed: int) -> Method:
    if job.method == "soft-router":
        return ReW(lvlm, diysink=job.connectors[0], encoder=job.encoder, seed=seed)
    gates = Gates(lvlm, criterion=job.criterion, threshold=job.threshold, seed=seed)
    return gates if job.method == "gates" else LoRA(lvlm, parameters=n_parameters(gates), seed=seed)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _plain(job: Job) -> dict[str, Any]:
    """A job as plain values, its files by their content; `run` puts the samples in place of the pictures' folder."""
    values = asdict(job) | {"data": digests.sha256(job.data)}
    values |= {"connectors": [digests.sha256(Path(folder) / "weights.safetensors") for folder in job.connectors]}
    folder = paths.model_folder(job.model)  # None: its revision has to tell
    return values | {"weights": [] if folder is None else [*map(digests.sha256, sorted(folder.glob("*.safetensors")))]}


def _trained(folder: Path) -> dict[str, Any] | None:
    """How a folder's method was trained; None if there is none."""
    return Method.described(folder).get("training") if (Path(folder) / "method.json").exists() else None


def _leave(work: Path, out: Path) -> None:
    """Put the loss curve into the method's folder and remove what was there for the training."""
    if (work / "training.csv").exists():
        with atomic(out / "training.csv") as temporary:
            shutil.copyfile(work / "training.csv", temporary)
    shutil.rmtree(work, ignore_errors=True)
