"""Whether a device is there, and computes in a number format."""

import re

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """A number format by its name. Raises ValueError for one that is not of `DTYPES`."""
    if isinstance(name, torch.dtype) and name in DTYPES.values():
        return name
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def fast_bfloat16(device: str | torch.device) -> bool:
    """Whether a GPU, or a processor, multiplies bfloat16 by itself; without that it is slower than float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(device).type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def check(device: str, dtype: str | torch.dtype | None = None) -> None:
    """Make sure that a device is there and, if one is given, computes in a dtype.

    Args:
        device: cpu, cuda, cuda:1, ..., or mps; "auto" is the first GPU, or the CPU.

    Raises:
        ValueError: it is not, or does not.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", device, re.ASCII):
        raise ValueError(f"unknown device {device[:80]!r}: cpu, cuda, cuda:1, ..., mps or auto")
    kind, _, index = device.partition(":")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not there: this machine has no Apple GPU that torch can use")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not there: torch finds no CUDA GPU on this machine")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not there: this machine has {torch.cuda.device_count()} GPU(s)")
    if dtype is None:
        return
    dtype = dtype_of(dtype)
    try:
        one = torch.ones(1, 1, device=device, dtype=dtype)
        one @ one
        lacks = dtype == torch.bfloat16 and one.is_cuda and not fast_bfloat16(device)
    except (RuntimeError, TypeError):  # TypeError on an older Apple GPU
        lacks = True
    if lacks:
        name = str(dtype).removeprefix("torch.")
        others = "float16 or float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
        raise ValueError(f"device {device!r} does not compute in {name}: take another dtype ({others})")
