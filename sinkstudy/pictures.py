"""The one place where pictures are decoded: upright, transparency on white, 16 bits brought to 8.

What the processors of transformers do with a decoded picture is theirs; this says what a file shows, so that the same
file is the same picture in every chapter, benchmark and training.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")  # Pillow brings these to RGB
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class File:
    """A picture in a file of its own, decoded when it is opened."""

    path: Path

    def open(self) -> Image.Image:
        """The picture in RGB. Raises ValueError, with the file's name, if it cannot be decoded."""
        return decode(self.path, self.path.name)

    def __str__(self) -> str:
        return self.path.name


def decode(source: Path | str | bytes | Image.Image, name: str) -> Image.Image:
    """A picture in RGB, 8 bits a channel, as a person sees it.

    It stands upright (EXIF orientation). What is transparent shows white, as in the pinned transformers'
    `convert_to_rgb`. Grey of 16 bits is scaled to 8, not cut off. Of an animation it is the first frame.

    Args:
        source: a path, a file's content, or a PIL image, which stays as it is.
        name: what an error calls it.

    Raises:
        ValueError: no file, no picture, one that ends too early or is too large to be decoded safely (Pillow's limit
            of 179 million pixels), or one of numbers without a known range (32 bits, floats) or in another colour space
            (Lab).
    """
    try:
        image = source
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders and EXIF reader raise many kinds
        reason = str(error).split(" <_io")[0] or type(error).__name__  # Pillow names its buffer's address
        raise ValueError(f"picture {name} cannot be read: {reason}") from None
    if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format in ("PNG", "PPM")):  # 16 bits
        grey, clear = np.asarray(upright), upright.info.get("transparency")
        upright = Image.fromarray((grey.astype(np.float64) / 257).round().astype(np.uint8))
        if clear is not None:
            upright.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    if upright.mode not in MODES:
        what = {"I": "whole numbers of 32 bits", "F": "floats"}.get(upright.mode)
        why = f"{what}, whose range is not known" if what else f"{upright.mode} colours, which are not read"
        raise ValueError(f"picture {name} holds {why}: save it as RGB, with 8 bits a channel")
    if "A" in upright.getbands() or "a" in upright.getbands() or upright.info.get("transparency") is not None:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")


def opened(picture: Any, name: str = "") -> Any:
    """A picture as `LVLM.inputs` takes it: PIL in RGB, or an array or tensor uint8 [3, height, width], as it is.

    Args:
        picture: one of these, a path, a file's content, or anything with a method `open`, such as `File` or a
            benchmark's picture.
        name: what an error calls it.

    Raises:
        ValueError: as `decode`, or an array of another type or shape.
    """
    if hasattr(picture, "dtype"):
        if picture.ndim != 3 or picture.shape[0] != 3 or str(picture.dtype).removeprefix("torch.") != "uint8":
            raise ValueError(f"picture {name} is {picture.dtype} {list(picture.shape)}, not uint8 [3, height, width]")
        return picture
    if isinstance(picture, (str, Path, bytes, Image.Image)):
        return decode(picture, name or str(picture)[:80])
    try:
        return picture.open()
    except Exception as error:
        raise ValueError(f"picture {name} cannot be read: {error}") from None


_LAST = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # what a file of the kind ends with


def check(path: Path) -> None:
    """Make sure that a file is a whole picture, from its header and its end: it is not decoded.

    Raises:
        ValueError: it is none that Pillow knows, has so many pixels that Pillow takes it for an attack, or ends early.
    """
    try:
        with Image.open(path) as image:
            last = _LAST.get(image.format, b"")
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))  # some cameras write more behind the end
            whole = last in file.read()
        if not whole:
            raise ValueError("it ends too early, the file is truncated")
    except Exception as error:
        raise ValueError(f"picture {path.name} cannot be read: {str(error).split(' <_io')[0]}") from None


def folder(path: Path, limit: int) -> tuple[list[File], int]:
    """The first pictures of a folder, by name, and the number of its other files that are none.

    A picture is a file whose name ends in one of `SUFFIXES`, in any case, and does not begin with a dot. Folders inside
    are not looked into. Each picture is checked (`check`); only opening it decodes it.

    Raises:
        ValueError: no such folder, no picture in it, or one of them is none that Pillow knows, by its name.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    there = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in there if file.suffix.lower() in SUFFIXES]
    if not files:
        raise ValueError(f"the folder {path} holds no picture ({', '.join(SUFFIXES)})")
    for file in files[:limit]:
        check(file)
    return [File(file) for file in files[:limit]], len(there) - len(files)
