"""A shelf of odd pictures: each is decoded as a person sees it, everywhere alike, or refused by name."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from sinkstudy.answers import study
from sinkstudy.answers.evaluate import evaluate
from sinkstudy.benchmarks.parquet import Picture
from sinkstudy.model import loading

RNG = np.random.default_rng(0)
SCENE = Image.fromarray(RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8))  # upright, 4 wide and 6 high


def file(image: Image.Image, kind: str = "PNG", **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    """The scene stored turned, with the EXIF entry that says how; what undoes each is written out in the standard."""
    undone = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
              4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
              7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]
    stored = SCENE if undone is None else SCENE.transpose(undone)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file(stored, exif=exif)


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(values[..., None], 3, 2).astype(np.uint8))


RAMP = np.linspace(0, 65535, 24).reshape(6, 4).round().astype(np.uint16)
ALPHA = Image.fromarray(np.dstack([np.zeros((6, 4, 3)), np.tile([0, 0, 255, 128], (6, 1))]).astype(np.uint8), "RGBA")
PALETTE = SCENE.quantize(8)
SEE_THROUGH = PALETTE.copy()
SEE_THROUGH.info["transparency"] = 0
SHELF = {  # name -> (content, what a person sees)
    **{f"exif-{i}": (turned(i), SCENE) for i in range(1, 9)},
    "rgba": (file(ALPHA), Image.fromarray(convert_to_rgb(ALPHA, return_numpy=True))),
    "black text on nothing": (
        file(Image.fromarray(np.dstack([np.zeros((6, 4, 3)), np.zeros((6, 4))]).astype(np.uint8), "RGBA")),
        Image.new("RGB", (4, 6), "white")),
    "grey with alpha": (
        file(ALPHA.convert("LA")), Image.fromarray(convert_to_rgb(ALPHA.convert("LA"), return_numpy=True))),
    "palette": (file(PALETTE), PALETTE.convert("RGB")),
    "palette with transparency": (
        file(SEE_THROUGH, transparency=0), Image.fromarray(convert_to_rgb(SEE_THROUGH, return_numpy=True))),
    "16-bit grey": (file(Image.fromarray(RAMP)), grey((RAMP / 257).round())),
    "16-bit grey tiff": (file(Image.fromarray(RAMP), "TIFF"), grey((RAMP / 257).round())),
    "16-bit grey pgm": (b"P5 4 6 65535\n" + RAMP.astype(">u2").tobytes(), grey((RAMP / 257).round())),
    "12-bit grey pgm": (
        b"P5 4 6 4095\n" + (RAMP // 16).astype(">u2").tobytes(), grey((RAMP // 16 / 4095 * 255).round())),
    "16-bit grey with a clear value": (
        file(Image.fromarray(RAMP), transparency=0), grey(np.where(RAMP == 0, 255, (RAMP / 257).round()))),
    "one bit": (file(SCENE.convert("1")), SCENE.convert("1").convert("RGB")),
    "grey": (file(SCENE.convert("L")), SCENE.convert("L").convert("RGB")),
    "cmyk": (file(SCENE.convert("CMYK"), "TIFF"), SCENE.convert("CMYK").convert("RGB")),
    "animated": (file(SCENE.convert("RGB"), "PNG", save_all=True, append_images=[Image.new("RGB", (4, 6))]), SCENE),
    "one pixel": (file(Image.new("RGB", (1, 1), "red")), Image.new("RGB", (1, 1), "red")),
    "very wide": (file(Image.new("RGB", (5000, 2), "blue")), Image.new("RGB", (5000, 2), "blue")),
    "bmp": (file(SCENE, "BMP"), SCENE),
    "webp": (file(SCENE, "WEBP", lossless=True), SCENE),
}


def in_folder(content: bytes, folder: Path):
    (folder / "odd.PNG").write_bytes(content)
    return study.pictures(str(folder), 5)[0][0].open()


def in_parquet(content: bytes, folder: Path):
    pq.write_table(pa.table({"image": [{"bytes": content, "path": "a.png"}]}), folder / "a.parquet")
    return Picture(folder / "a.parquet", "image", 0).open()


def in_answers(content: bytes, folder: Path):
    """What the model is given: a stand-in for the processor keeps it."""
    (folder / "odd.png").write_bytes(content)
    from sinkstudy.answers.evaluate import opened

    return opened(folder / "odd.png", "'odd'")


def in_training(content: bytes, folder: Path):
    (folder / "odd.png").write_bytes(content)
    turns = [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]
    (folder / "data.json").write_text(json.dumps([{"id": "0", "image": "odd.png", "conversations": turns}]))
    from sinkstudy.pictures import decode
    from sinkstudy.trained import conversations

    return decode(conversations.read(folder / "data.json", folder)[0].image, "odd.png")


WAYS = [in_folder, in_parquet, in_answers, in_training]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SHELF)
def test_a_picture_is_what_a_person_sees(way, name, tmp_path):
    content, seen = SHELF[name]
    found = way(content, tmp_path)
    assert found.mode == "RGB" and found.size == seen.size
    assert np.abs(np.asarray(found, int) - np.asarray(seen, int)).max() <= 1


FLOATS = file(Image.fromarray(RNG.random((6, 4)).astype(np.float32)), "TIFF")
WIDE = file(Image.fromarray(RNG.integers(0, 256, (6, 4)).astype(np.int32)), "TIFF")
LAB = file(Image.merge("LAB", SCENE.split()), "TIFF")
BAD = {"32 bits": WIDE, "Lab": LAB,
       "truncated": file(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))[:4000], "empty": b"",
       "text": b"this is no picture", "html": b"<html>404</html>", "floats": FLOATS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_seen_is_refused_by_name(way, name, tmp_path):
    with pytest.raises(ValueError, match="odd|row 0") as problem:
        way(BAD[name], tmp_path)
    assert "\n" not in str(problem.value)


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for way in WAYS:
        with pytest.raises(ValueError, match="decompression bomb"):
            way(file(SCENE), tmp_path)


# ------------------------------------------------------------------------------------------------- folders
def test_a_folder_is_judged_before_anything_is_decoded(tmp_path):
    with pytest.raises(ValueError, match="holds no picture"):
        study.pictures(str(tmp_path), 5)
    with pytest.raises(ValueError, match="there is no folder"):
        study.pictures(str(tmp_path / "nowhere"), 5)
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(ValueError, match="picture b.png cannot be read"):
        study.pictures(str(tmp_path), 5)


def test_what_is_no_picture_is_passed_over_and_said(tmp_path, capsys):
    for name in ("b.JPG", "a.png", "c.tif", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(file(SCENE))
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "d.png").write_bytes(file(SCENE))
    found, _ = study.pictures(str(tmp_path), 5)
    assert [picture.path.name for picture in found] == ["a.png", "b.JPG", "c.tif"]
    assert "1 files that are no pictures passed over" in capsys.readouterr().err


def test_pictures_are_decoded_when_they_are_needed(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(file(SCENE))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded too early"))
    found, _ = study.pictures(str(tmp_path), 2)
    assert len(found) == 2


def test_a_turned_picture_is_answered_as_the_upright_one(tmp_path, folder):
    """To the end: the same answers and log-probabilities, whichever way the file is stored."""
    lvlm = loading.load(folder)
    big = SCENE.resize((40, 60), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6
    big.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    big.save(tmp_path / "upright.png")
    table = pd.DataFrame({"id": [0, 1], "image_id": ["turned", "upright"], "question": "how many",
                          "image": [tmp_path / "turned.png", tmp_path / "upright.png"], "answer": "yes"})
    said = evaluate(lvlm, table, max_new_tokens=3, cache=None)
    assert said.prediction[0] == said.prediction[1] and said.logp_yes[0] == pytest.approx(said.logp_yes[1], abs=1e-5)
