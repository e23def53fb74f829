"""What an answer depends on, as digests: the model, and what an intervention does to it.

An answer that was kept may be used again only where all is the same that it depends on. Nobody has to say what that is,
so nobody can forget to: a model is its weights and settings, and an intervention is the code of its function and
whatever that reaches: what it closes over, its defaults, what it reads of its notebook or module, a method's weights.
"""

import dis
import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from sinkstudy import digests
from sinkstudy.model.lvlm import LVLM
from sinkstudy.paths import PACKAGE

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, PurePath, torch.dtype, torch.device)
_NAMED = (GetSetDescriptorType, MethodDescriptorType, WrapperDescriptorType)  # of C, without state
_INSTALLED = Path(sysconfig.get_path("purelib"))


class Unknown(ValueError):
    """What a value is cannot be told."""


class _Python:
    """An object without state outside its attributes is as large as one of this class."""


class Identity:
    """SHA-256 of what a value is, the same in every process, as hexadecimal text.

    Known are plain values, tensors, arrays, pictures and collections; functions and classes; models; what has a method
    `identity`, by the value that it gives; and other objects of Python by their attributes. Functions, classes and
    modules of this package and of installed ones are known by name, because `model_digest` has the package's code and
    the versions; others by their code.

    Raises:
        Unknown: a value whose state is hidden, such as a file, a generator of random numbers or an iterator.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, str]] = {}  # by id, with the value itself, so that no other gets its id

    def __call__(self, value: Any) -> str:
        if id(value) not in self.known:
            self.known[id(value)] = value, "itself"  # where it reaches itself
            try:
                parts = self._parts(value)
                told = parts if isinstance(parts, bytes) else "".join(map(self, parts)).encode()
            except BaseException:
                del self.known[id(value)]
                raise
            kind = f"{type(value).__module__}.{type(value).__qualname__}:"
            self.known[id(value)] = value, hashlib.sha256(kind.encode() + told).hexdigest()
        return self.known[id(value)][1]

    def _parts(self, value: Any) -> bytes | list:
        """A value as bytes, or as the values that it consists of."""
        match value:
            case _ if isinstance(value, (*_PLAIN, *_NAMED)):
                return repr(value).encode()
            case torch.Tensor() if not value.is_meta:
                flat = value.detach().cpu().contiguous().flatten()
                return f"{value.dtype} {list(value.shape)} ".encode() + flat.view(torch.uint8).numpy().tobytes()
            case np.ndarray() | np.generic() if value.dtype != object:
                return f"{value.dtype} {value.shape} ".encode() + value.tobytes()
            case Image.Image():
                return f"{value.mode} {value.size} ".encode() + value.tobytes()
            case LVLM():
                return model_digest(value).encode()
            case Mapping():
                return [part for item in value.items() for part in item]
            case set() | frozenset():
                return sorted(map(self, value))
            case list() | tuple():
                return list(value)
            case CodeType():
                return [value.co_code, value.co_exceptiontable, value.co_names, value.co_consts]
            case FunctionType() | type() if _installed(value.__module__) and "<" not in value.__qualname__:
                return f"{value.__module__}.{value.__qualname__}".encode()
            case FunctionType():
                return self._function(value)
            case MethodType():
                return [value.__func__, value.__self__]
            case BuiltinFunctionType():
                return [value.__qualname__, value.__self__]
            case partial():
                return [value.func, value.args, value.keywords]
            case staticmethod() | classmethod():
                return [value.__func__]
            case property():
                return [value.fget, value.fset]
            case ModuleType():
                own = not _installed(value.__name__) and getattr(value, "__file__", None)
                return Path(value.__file__).read_bytes() if own else value.__name__.encode()
            case type():
                own = {k: v for k, v in vars(value).items() if not k.startswith("__") or isinstance(v, FunctionType)}
                return [value.__qualname__, value.__bases__, own]
        if callable(identity := getattr(type(value), "identity", None)):
            return [identity(value)]
        if hasattr(value, "__dict__") and type(value).__basicsize__ <= _Python.__basicsize__:
            return [type(value), vars(value)]
        raise Unknown(f"what a {type(value).__module__}.{type(value).__qualname__} holds cannot be told")

    def _function(self, value: FunctionType) -> list:
        reads = {name: value.__globals__[name] for name in sorted(set(_globals(value.__code__)))
                 if name in value.__globals__}  # fmt: skip
        try:
            closed_over = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:
            raise Unknown(f"{value.__qualname__} closes over a name that has no value yet") from None
        return [value.__code__, value.__defaults__, value.__kwdefaults__, closed_over, reads]


def _globals(code: CodeType) -> Iterator[str]:
    """The global names that a function's code reads, and that of the functions inside it."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals(inner)


def _installed(module: str | None) -> bool:
    """Is a module of this package, of an installed one, or of Python itself?"""
    root = (module or "__main__").partition(".")[0]
    if root == "__main__":  # which a kernel of Jupyter has from an installed file
        return False
    file = getattr(sys.modules.get(root), "__file__", None)
    return root == "sinkstudy" or root in sys.stdlib_module_names or (
        file is not None and Path(file).is_relative_to(_INSTALLED)
    )


def model_digest(lvlm: LVLM) -> str:
    """What answers depend on beside pictures, prompts and interventions.

    The weights are those in memory, so that a model changed after loading has answers of its own; about a second for
    each 1.5 GB. Hooks that somebody has put on the model are not seen.
    """
    weights = hashlib.sha256()
    for name, tensor in [*lvlm.model.named_parameters(), *lvlm.model.named_buffers()]:
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:  # accelerate keeps what does not fit elsewhere; then the revision has to tell
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    code = [file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))]
    settings = [
        lvlm.revision,
        lvlm.device.type,
        [part.config._attn_implementation for part in (lvlm.vision, lvlm.decoder)],
        {k: v for k, v in lvlm.model.config.to_dict().items() if k != "_name_or_path"},
        lvlm.ends,
        lvlm.processor.image_processor.to_dict(),
        lvlm.processor.tokenizer.backend_tokenizer.to_str(),
    ]
    versions = [torch.__version__, transformers.__version__]
    return digests.of_values([weights.hexdigest(), settings, code, versions])
