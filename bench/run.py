"""Measures what the study promises about speed: `make bench`, or `python bench/run.py world capture`.

A case is a function that prints a line for each thing it measures. What it needs and is not there yet, it says.
Give the machine nothing else to do, or the figures mean little; where that cannot be had, OMP_NUM_THREADS=1 measures
the processor's time instead of the clock's, which other work disturbs less.
"""

import copy
import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from sinkstudy.paths import lab_models

THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))
clock = time.process_time if THREADS == 1 else time.perf_counter


def best(action: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    action()
    seconds = []
    for _ in range(times):
        started = clock()
        action()
        seconds.append(clock() - started)
    return min(seconds)


def world() -> None:
    """Rendering of scenes, images and facts, against the bar of 1,000 images a second."""
    from sinkstudy.world.drawing import render

    n = 2048
    rate = n / best(lambda: render("train", 0, n))
    print(f"world: {rate:,.0f} images/s rendered (bar 1,000: {'met' if rate >= 1000 else 'missed'})")


@torch.no_grad()
def capture() -> None:
    """Attention of the last token, all layers, on one batch: beside SDPA against eager attention with full maps."""
    if "lab-llava" not in lab_models():
        print("capture: not measured, data/models/lab-llava is not there")
        return
    from sinkstudy.model.capture import attention_rows
    from sinkstudy.model.loading import load
    from sinkstudy.world.drawing import render

    lvlm = load("lab-llava")
    images = render("test", 0, 16).images
    inputs = lvlm.inputs(list(images), ["how many things"] * len(images))

    def rows() -> None:
        with attention_rows(lvlm, "decoder"):
            lvlm.model(**inputs, logits_to_keep=1)

    plain = best(lambda: lvlm.model(**inputs, logits_to_keep=1))
    chosen = best(rows)
    lvlm.model.set_attn_implementation("eager")
    full = best(lambda: lvlm.model(**inputs, logits_to_keep=1, output_attentions=True))
    print(f"capture: forward pass {plain:.3f} s, with rows {chosen:.3f} s, eager, full maps {full:.3f} s; 16 images")


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
    return LVLM(model.eval().requires_grad_(False), processor, "random LLaVA", None, SPECS["llava"])


POPE = "Is there a {} in the image? Answer the question using a single word or phrase."
KINDS = "dog cat car person bench bottle cup chair table bird horse boat".split()


def noise_images(n: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (n, 3, 336, 336), dtype=np.uint8))


def verdict(value: float, bar: float, most: bool = True) -> str:
    """A measured ratio beside its bar: `most` if it may not exceed it."""
    met = value <= bar if most else value >= bar
    return f"{value:.2f}x (bar {'<=' if most else '>='} {bar:.2f}: {'met' if met else 'MISSED'})"


@torch.no_grad()
def evaluate() -> None:
    """POPE-shaped work, six questions an image: against one `generate` for each question, same answers."""
    import pandas as pd

    from sinkstudy.answers.evaluate import NONE, Intervention
    from sinkstudy.answers.evaluate import evaluate as answer

    lvlm = random_llava()
    pictures = {f"image {i}": image for i, image in enumerate(noise_images(2))}
    table = pd.DataFrame(
        [
            {"id": f"{name}, {kind}", "image_id": name, "question": POPE.format(kind), "answer": "yes", "image": image}
            for i, (name, image) in enumerate(pictures.items())
            for kind in KINDS[6 * i : 6 * i + 6]
        ]
    )

    def scaled(factor: float) -> Intervention:
        return Intervention(
            f"x {factor}", lambda lvlm, inputs: lvlm.editing(after=lambda tokens, layer: tokens * factor)
        )

    eight = [NONE, *(scaled(0.25 * k) for k in range(7))]

    def one_by_one(interventions: Sequence[Intervention]) -> list[str]:
        said = []
        for how in interventions:
            for row in table.itertuples():
                inputs = lvlm.inputs([row.image], [row.question])
                with how.around(lvlm, inputs):
                    out = lvlm.model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
                said += lvlm.processor.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in said]

    def shared(interventions: Sequence[Intervention]) -> list[str]:
        return list(answer(lvlm, table, interventions, max_new_tokens=4, batch_size=6, cache=None).prediction)

    for interventions, bar, times in (([NONE], 3, 3), (eight, 4, 1)):
        said: dict[str, list[str]] = {}
        ways = [
            lambda: said.update(slow=one_by_one(interventions)),
            lambda: said.update(fast=shared(interventions)),
        ]
        slow, fast = rounds(ways, times)
        same = said["slow"] == said["fast"]
        n = len(table) * len(interventions)
        print(
            f"evaluate: {len(interventions)} interventions, {n / fast:.1f} against {n / slow:.1f} questions/s,"
            f" {verdict(slow / fast, bar, most=False)}, answers {'identical' if same else 'DIFFERENT'}"
        )


@torch.no_grad()
def trace() -> None:
    """What a trace costs beside the plain pass that it watches, and beside the usual ways to see as much."""
    from sinkstudy.model import capture

    lvlm = random_llava()
    images, questions = noise_images(2), [POPE.format(kind) for kind in KINDS[:2]]
    config = copy.deepcopy(lvlm.model.config)  # or both models would be eager
    eager = type(lvlm.model)._from_config(config, attn_implementation="eager").eval()
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
    for way in ways.values():
        peak_memory(way)  # warm, the profiler too
    seconds = dict(zip(ways, rounds(list(ways.values()), 3)))
    memory = {name: peak_memory(way) for name, way in ways.items()}
    print("trace: 2 images; memory is beside the weights")
    for name in ways:
        print(f"trace: {name}: {seconds[name]:.2f} s, peak {memory[name] / 2**20:.0f} MiB")
    (plain_s, ours_s, _, maps_s), (plain_m, ours_m, _, maps_m) = seconds.values(), memory.values()
    print(f"trace: time, of the plain pass's {verdict(ours_s / plain_s, 1.1)}")
    print(f"trace: memory, of the plain pass's {verdict(ours_m / plain_m, 1.1)}")
    print(f"trace: faster than eager {verdict(maps_s / ours_s, 1.6, most=False)}; plain {maps_s / plain_s:.2f}x")
    print(f"trace: memory, of eager's {verdict(ours_m / maps_m, 0.5)}")


def rounds(actions: Sequence[Callable[[], object]], times: int) -> list[float]:
    """Seconds of the fastest call of each action; they take turns, so that all meet the same disturbances."""
    seconds = [[] for _ in actions]
    for _ in range(times):
        for action, own in zip(actions, seconds):
            started = clock()
            action()
            own.append(clock() - started)
    return [min(own) for own in seconds]


def peak_memory(action: Callable[[], object]) -> int:
    """Most bytes of tensors on the CPU that an action holds at once, beside those that were there before."""
    gc.collect()  # or what an earlier action left in a cycle is freed meanwhile, and counted
    gc.disable()  # and when it runs is chance
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    gc.enable()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())


CASES = {"world": world, "capture": capture, "evaluate": evaluate, "trace": trace}

if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    chosen_cases = sys.argv[1:] or list(CASES)
    if unknown := [name for name in chosen_cases if name not in CASES]:
        sys.exit(f"unknown case {unknown[0]}: choose from {', '.join(CASES)}")
    print(f"{THREADS} threads, torch {torch.__version__}")
    for case in chosen_cases:
        CASES[case]()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
