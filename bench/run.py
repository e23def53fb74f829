"""Measures what the study promises about speed: `make bench`, or `python bench/run.py world capture`.

A case is a function that prints a line for each thing it measures. What it needs and is not there yet, it says.
Give the machine nothing else to do, or the figures mean little.
"""

import resource
import sys
import time
from collections.abc import Callable

import torch

from sinkstudy.paths import lab_models

THREADS = 2


def best(action: Callable[[], object], times: int = 3) -> float:
    """Wall seconds of the fastest of several calls, after one that is not counted."""
    action()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def world() -> None:
    """Rendering of scenes, images and facts, against the bar of 1,000 images a second."""
    from sinkstudy.lab.world import render

    n = 2048
    rate = n / best(lambda: render("train", 0, n))
    print(f"world: {rate:,.0f} images/s rendered (bar 1,000: {'met' if rate >= 1000 else 'missed'})")


@torch.no_grad()
def capture() -> None:
    """Attention of the last token, all layers, on one batch: beside SDPA against eager attention with full maps."""
    if "lab-llava" not in lab_models():
        print("capture: not measured, data/models/lab-llava is not there")
        return
    from sinkstudy.capture import attention_rows
    from sinkstudy.lab.world import render
    from sinkstudy.models import load

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


CASES = {"world": world, "capture": capture}

if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    chosen_cases = sys.argv[1:] or list(CASES)
    if unknown := [name for name in chosen_cases if name not in CASES]:
        sys.exit(f"unknown case {unknown[0]}: choose from {', '.join(CASES)}")
    print(f"{THREADS} threads, torch {torch.__version__}")
    for case in chosen_cases:
        CASES[case]()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
