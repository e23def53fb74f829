"""Measures what the study promises about speed: `make bench`, or `python bench/run.py trace evaluate`.

A case is a function that prints its measurements. Ways to do the same take turns, and a ratio is the median over the
turns, so that other work disturbs all of them alike. With OMP_NUM_THREADS=1 the CPU's seconds are the processor's, not
the clock's. With a GPU the cases that have a model run there too, in bfloat16, after all have run on the CPU; bars are
those of the device.

Beside a time stands what share of it the arithmetic alone would take: products of matrices that the work needs, counted
by torch, at the rate of one large product measured in the same turns.
"""

import copy
import gc
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))
clock = time.process_time if THREADS == 1 and not GPU else time.perf_counter


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call, to the end of what it has a GPU do."""
    started = clock()
    action()
    if GPU:
        torch.cuda.synchronize()
    return clock() - started


def rounds(actions: Mapping[str, Callable[[], object]], times: int) -> dict[str, np.ndarray]:
    """Seconds [times] of each action; they take turns."""
    seconds = [[timed(action) for action in actions.values()] for _ in range(times)]
    return dict(zip(actions, np.array(seconds).T))


def of_children() -> float:
    """Seconds of a processor that processes started from here, and ended, have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ratio(over: np.ndarray, under: np.ndarray) -> float:
    return float(np.median(over / under))


def flops(action: Callable[[], object]) -> int:
    """Floating-point operations of an action's products of matrices, those of attention included."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        action()
    return counter.get_total_flops()


class Product:
    """One large product of matrices, whose rate stands for what the device can do."""

    def __init__(self) -> None:
        n = 8192 if GPU else 1024
        self.matrix = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
        self.flops = 2 * n**3

    def __call__(self) -> None:
        self.matrix @ self.matrix

    def share(self, needed: float, seconds: np.ndarray, of_product: np.ndarray) -> str:
        """How much of the seconds the operations that are needed would take at this rate, in the same turns."""
        return f"{100 * ratio(of_product * needed / self.flops, seconds):.0f} % of it arithmetic"


def world() -> None:
    """Rendering of scenes, images and facts, against the bar of 1,000 images a second."""
    from sinkstudy.world.drawing import render

    n = 2048
    rate = n / np.median(rounds({"": lambda: render("train", 0, n)}, 3)[""])
    print(f"world: {rate:,.0f} images/s rendered (bar 1,000: {'met' if rate >= 1000 else 'missed'})")


def plan() -> None:
    """What a hundred models of fourteen chapters take to plan: Snakemake's dry run, start included, in seconds.

    Beside it what Snakemake takes for a rule of as many jobs that follow from nothing, and what fingerprints take.
    """
    import json

    from sinkstudy.book import engine

    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, dict] = {}
        for i in range(100):
            model = Path(folder) / f"model-{i}"
            model.mkdir()
            (model / "config.json").write_text(str(i))
            runs[model.name] = {notebook: {"model": str(model)} for notebook in engine.notebooks()}
        given = Path(folder) / "plan.json"
        given.write_text(json.dumps({"runs": runs}))
        stamps = [f"{run}/{notebook}" for run, notebooks in runs.items() for notebook in notebooks]
        one = 'rule one:\n    output: touch("{run}/{notebook}")\n    shell: "true"\n'
        Path(folder, "Snakefile").write_text(f"rule all:\n    input: {stamps}\n{one}")
        used = []
        for root, options in ((engine.ROOT, ["--configfile", str(given)]), (folder, [])):
            before = of_children()
            command = [sys.executable, "-m", "snakemake", *options, "-n", "--quiet", "all"]
            subprocess.run(command, cwd=root, check=True, capture_output=True)
            used.append(of_children() - before)
        started = clock()
        for of_run in runs.values():
            for notebook, values in of_run.items():
                engine.fingerprint(notebook, values)
        ours = clock() - started
    print(f"plan: {len(stamps):,} notebooks: {used[0]:.1f} s of a processor, Snakemake's start included; "
          f"a plain Snakefile of as many jobs {used[1]:.1f} s; fingerprints {ours:.1f} s")


def random_llava():
    """A LLaVA with random weights and real proportions: 576 visual tokens in a prompt of some 600, small for a CPU."""
    import transformers as hf
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    from sinkstudy.model.lvlm import LVLM
    from sinkstudy.model.specs import SPECS

    words = "<pad> <s> </s> <unk> <image> USER: ASSISTANT: yes no".split() + POPE.split() + KINDS
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        hf.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, **special, extra_special_tokens={"image_token": "<image>"}
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="<s> USER: {% for c in messages[0]['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }} {% endfor %}ASSISTANT:",
    )
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=6,
            image_size=336,
            patch_size=14,
        ),
        text_config=hf.LlamaConfig(
            vocab_size=32_000,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
        ),
        image_token_index=4,
    )
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model = model.to(DEVICE, DTYPE).eval().requires_grad_(False)
    return LVLM(model, processor, "random LLaVA", None, SPECS["llava"])


POPE = "Is there a {} in the image? Answer the question using a single word or phrase."
KINDS = "dog cat car person bench bottle cup chair table bird horse boat".split()


def noise_images(n: int) -> list[Image.Image]:
    """Pictures of the size of the public benchmarks', so that their processing is a part of the time."""
    noise = np.random.default_rng(0).integers(0, 256, (n, 480, 640, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def verdict(value: float, bar: float, most: bool = True) -> str:
    """A measured ratio beside its bar: `most` if it may not exceed it."""
    met = value <= bar if most else value >= bar
    return f"{value:.2f}x (bar {'<=' if most else '>='} {bar:.2f}: {'met' if met else 'MISSED'})"


@torch.no_grad()
def evaluate() -> None:
    """POPE-shaped work, 16 pictures with six questions each (on a CPU 4), and chapter 10's methods on some of it."""
    from sinkstudy.answers.evaluate import NONE
    from sinkstudy.effects import methods

    lvlm = random_llava()
    pictures = {f"image {i}": image for i, image in enumerate(noise_images(16 if GPU else 4))}
    bars = (3, 5) if GPU else (3, 1.5)
    shared_out("untouched", lvlm, pictures, [NONE], KINDS[:6], bars, rounds_of=16 if GPU else 2)
    some = pictures if GPU else {"image 0": pictures["image 0"]}
    case = methods.Case(lvlm, {"POPE": some}, batch_size=16)
    # a decoder of random weights lights no dimension that VAR could act on
    names = [name for name in methods.METHODS if name != "var"]
    ten = [NONE, *(methods.applied(case, "POPE", name, methods.option(name)) for name in names)]
    shared_out("chapter 10", lvlm, some, ten, KINDS[: 6 if GPU else 2], (4, 1.5), rounds_of=len(some))


def shared_out(
    what: str, lvlm, pictures: dict, interventions: Sequence, kinds: Sequence[str], bars: tuple, rounds_of: int
) -> None:
    """`answers.evaluate` against one `generate` a question, and against `generate` in batches; the same answers.

    `rounds_of` pictures make a turn. The arithmetic that is needed: the tower once for each picture and each
    intervention on it, prefixes once for each intervention that changes them, each question and its answer's tokens.
    """
    import pandas as pd

    from sinkstudy.answers import evaluate as module
    from sinkstudy.answers.evaluate import Prefixes

    new = 4

    def table(names: Sequence[str]) -> pd.DataFrame:
        return pd.DataFrame(
            [{"id": f"{name}, {kind}", "image_id": name, "question": POPE.format(kind), "answer": "yes"}
             for name in names for kind in kinds]
        )  # fmt: skip

    def generated(names: Sequence[str], batch_size: int) -> list[str]:
        said, asked = [], table(names)
        for how in interventions:
            for start in range(0, len(asked), batch_size):
                rows = asked.iloc[start : start + batch_size]
                images, texts = list(rows.image_id), list(rows.question)
                inputs = Prefixes(lvlm.inputs([pictures[name] for name in images], texts), images, texts)
                with how.around(lvlm, inputs):
                    out = lvlm.generate(inputs, new).sequences
                said += lvlm.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in said]

    def shared(names: Sequence[str], ahead: Callable = module.ahead) -> list[str]:
        module.ahead = ahead
        how = dict(max_new_tokens=new, batch_size=len(kinds) * min(len(names), 16), cache=None, images=pictures)
        return list(module.evaluate(lvlm, table(names), interventions, **how).prediction)

    def prepare(names: Sequence[str]) -> None:
        """What a turn's inputs take: the pictures once, every question's tokens, the way to the device."""
        images = [pictures[name] for name in names]
        with module._images_once(lvlm.processor):
            for kind in kinds:
                batch = lvlm.prepared(images, [POPE.format(kind)] * len(images))
        lvlm.moved(batch)

    first = next(iter(pictures.values()))
    prompt, prefix = (lvlm.inputs([first], [POPE.format(kinds[0])]) for _ in range(2))
    end = int((prompt["input_ids"][0] == lvlm.image_token_id).nonzero()[-1]) + 1
    prefix.update({key: prefix[key][:, :end] for key in ("input_ids", "attention_mask")})
    tower = flops(lambda: lvlm.see(prompt))
    before, whole = (flops(lambda: lvlm.model(**of, logits_to_keep=1)) - tower for of in (prefix, prompt))
    token = (whole - before) / (prompt["input_ids"].shape[1] - end)  # of a question or an answer, about
    towers = 1 + sum(how.keeps == "nothing" for how in interventions)
    prefixes = 1 + sum(how.keeps != "prefix" for how in interventions)
    questions = len(kinds) * len(interventions) * (whole - before + (new - 1) * token)
    needed = rounds_of * (towers * tower + prefixes * before + questions)

    product, own = Product(), module.ahead
    names, said = list(pictures), {"one by one": [], "batched": [], "shared": []}
    turn: list[str] = []
    ways = {
        "one by one": lambda: said["one by one"].extend(generated(turn, 1)),
        "batched": lambda: said["batched"].extend(generated(turn, len(kinds))),
        "shared": lambda: said["shared"].extend(shared(turn)),
        "not ahead": lambda: shared(turn, iter),
        "inputs": lambda: prepare(turn),
        "product": product,
    }
    turns = [names[start : start + rounds_of] for start in range(0, len(names), rounds_of)]
    turns = turns * (3 if GPU else 1)
    parts = []
    for turn[:] in turns:
        parts.append(rounds(ways, 1))
    seconds = {way: np.concatenate([part[way] for part in parts]) for way in ways}
    module.ahead = own
    n = rounds_of * len(kinds) * len(interventions)
    print(f"evaluate, {what}: {len(names)} pictures x {len(kinds)} questions x {len(interventions)} interventions")
    for way in said:
        print(f"evaluate, {what}: {way}: {np.median(n / seconds[way]):.1f} questions/s, "
              f"{product.share(needed, seconds[way], seconds['product'])}")
    for way, bar in zip(("one by one", "batched"), bars):
        same = sum(a == b for a, b in zip(said[way], said["shared"], strict=True)) / len(said[way])
        print(f"evaluate, {what}: of {way} {verdict(ratio(seconds[way], seconds['shared']), bar, most=False)}, "
              f"{100 * same:.0f} % of answers identical")
    inputs = 100 * ratio(seconds["inputs"], seconds["shared"])
    ahead = verdict(ratio(seconds["shared"], seconds["not ahead"]), 1.05)
    print(f"evaluate, {what}: inputs take {inputs:.1f} % of shared; made ahead, the run takes of in turn {ahead}")


@torch.no_grad()
def trace() -> None:
    """What a trace costs beside the plain pass that it watches, and beside the usual ways to see as much."""
    from sinkstudy.model import capture

    lvlm = random_llava()
    n = 16 if GPU else 2
    images, questions = noise_images(n), [POPE.format(KINDS[i % len(KINDS)]) for i in range(n)]
    config = copy.deepcopy(lvlm.model.config)  # or both models would be eager
    eager = type(lvlm.model)._from_config(config, attn_implementation="eager").to(DEVICE, DTYPE).eval()
    eager.load_state_dict(lvlm.model.state_dict())

    def plain() -> None:
        lvlm.model(**lvlm.inputs(images, questions), logits_to_keep=1)

    def ours() -> None:
        capture.trace(lvlm, images, questions)

    def maps() -> object:
        return eager(
            **lvlm.inputs(images, questions), logits_to_keep=1, output_attentions=True, output_hidden_states=True
        )

    def hooks() -> None:
        kept: list[torch.Tensor] = []
        layers = [*lvlm.vision_layers, *lvlm.decoder_layers]
        handles = [layer.register_forward_hook(lambda module, args, out: kept.append(out)) for layer in layers]
        plain()
        for handle in handles:
            handle.remove()

    ways = {"plain SDPA": plain, "our trace": ours, "hooks that keep hidden states": hooks, "eager with maps": maps}
    peak_memory(plain)  # warm, the profiler too
    product = Product()
    *seconds, of_product = rounds({**ways, "product": product}, 4).values()
    memory = [peak_memory(way) for way in ways.values()]
    needed = flops(plain)
    print(f"trace: {n} images; memory is beside the weights")
    for name, own, peak in zip(ways, seconds, memory):
        print(f"trace: {name}: {np.median(own):.2f} s, {product.share(needed, own, of_product)}, "
              f"peak {peak / 2**20:.0f} MiB")
    (plain_s, ours_s, _, maps_s), (plain_m, ours_m, _, maps_m) = seconds, memory
    print(f"trace: time, of the plain pass's {verdict(ratio(ours_s, plain_s), 1.05)}")
    print(f"trace: memory, of the plain pass's {verdict(ours_m / plain_m, 1.1)}")
    print(f"trace: faster than eager {verdict(ratio(maps_s, ours_s), 1.2 if GPU else 1.6, most=False)}; "
          f"plain {ratio(maps_s, plain_s):.2f}x")
    print(f"trace: memory, of eager's {verdict(ours_m / maps_m, 0.5)}")


def peak_memory(action: Callable[[], object]) -> int:
    """Most bytes of tensors that an action holds at once, beside those that were there before."""
    gc.collect()  # or what an earlier action left in a cycle is freed meanwhile, and counted
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    gc.disable()  # and when it runs is chance
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    gc.enable()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())


def batches(pictures: int = 64) -> None:
    """Questions that go through the positive control at once under one method: 10, the chapters' 64, 256.

    If larger batches win nothing, neither would one that several interventions share.
    """
    import pandas as pd

    from sinkstudy.answers.evaluate import Intervention
    from sinkstudy.answers.evaluate import evaluate as answered
    from sinkstudy.effects import moving
    from sinkstudy.model import loading
    from sinkstudy.world.drawing import render

    lvlm = loading.load("lab-llava-gist", device=DEVICE, dtype=str(DTYPE).removeprefix("torch."))
    images = {str(i): picture for i, picture in enumerate(render("test", 0, pictures).images)}
    asked = ["what is the scene ?", "how many things are there ?", "how many parts are there ?", "what is the light ?",
             "is there a star ?", "is there a heart ?"]
    table = pd.DataFrame([{"id": f"{image} {text}", "image_id": image, "question": text, "answer": "yes"}
                          for image in images for text in asked])
    front = Intervention("front", lambda lvlm, inputs: moving.reordered(lvlm, inputs, lambda n: n >= 3 * n.median()))

    def by(size: int) -> Callable[[], object]:
        return lambda: answered(lvlm, table, [front], images=images, max_new_tokens=4, batch_size=size, cache=None)

    seconds = rounds({size: by(size) for size in (10, 64, 256)}, 4)
    of = {size: ratio(taken, seconds[64]) for size, taken in seconds.items()}
    print(f"batches: {len(table)} questions of {pictures} pictures: {np.median(seconds[64]):.2f} s by 64; by 10, "
          f"{of[10]:.2f} times that; by 256, {of[256]:.2f}")


def chapter(limit: int = 64) -> None:
    """Chapter 10 on lab-llava from the start of its kernel, no answer kept from before: seconds."""
    from sinkstudy.paths import NOTEBOOKS, ROOT

    with tempfile.TemporaryDirectory() as folder:
        given = f"{{model: lab-llava, device: {DEVICE}, limit: {limit}}}"
        command = [sys.executable, "-m", "papermill", NOTEBOOKS / "10-training-free.ipynb", f"{folder}/page.ipynb"]
        kept = {"SINKSTUDY_RESULTS": f"{folder}/results", "SINKSTUDY_ANSWERS": f"{folder}/answers"}
        environment = os.environ | kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        before, started = of_children(), time.perf_counter()
        subprocess.run([*command, "-y", given], cwd=NOTEBOOKS, env=environment, check=True, capture_output=True)
    print(f"chapter: 10 on lab-llava, limit {limit}, float32: {time.perf_counter() - started:.0f} s, "
          f"{of_children() - before:.0f} s of a processor")


CASES = {"world": world, "plan": plan, "trace": trace, "evaluate": evaluate, "batches": batches,
         "chapter": chapter}
WITHOUT_MODEL = {"world", "plan"}

if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    chosen_cases = sys.argv[1:] or list(CASES)
    if unknown := [name for name in chosen_cases if name not in CASES]:
        sys.exit(f"unknown case {unknown[0]}: choose from {', '.join(CASES)}")
    if GPU:
        subprocess.run([sys.executable, *sys.argv], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True)
        chosen_cases = [name for name in chosen_cases if name not in WITHOUT_MODEL]
    on = torch.cuda.get_device_name() if GPU else f"{platform.processor() or platform.machine()}, {THREADS} threads"
    print(f"{on}, {DTYPE}, torch {torch.__version__}")
    for case in chosen_cases:
        CASES[case]()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
