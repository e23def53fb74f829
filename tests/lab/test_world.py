"""The lab world: the same everywhere, splits that share no scene, pictures that show what the facts say."""

import hashlib
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from sinkstudy.world import drawing, questions
from sinkstudy.world.drawing import CHUNK, GRID, PATCH, SIDE, Scenes, render


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return render("val", 0, 2 * CHUNK)


def same(a: Scenes, b: Scenes, *, but: tuple[str, ...] = ()) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Scenes) if f.name not in but)


def pixels(patches: torch.Tensor) -> torch.Tensor:
    """bool [n, 12, 12] → bool [n, 96, 96]."""
    return patches.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)


def patchwise(images: torch.Tensor) -> torch.Tensor:
    """[n, 3, 96, 96] → [n, 12, 12, 3, 64]: the pixels of each patch."""
    return images.unflatten(2, (GRID, PATCH)).unflatten(4, (GRID, PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(4)


def seen(colour, light: int) -> torch.Tensor:
    """What a paint looks like under a light: [.., 3] → [.., 3]."""
    lit = torch.as_tensor(colour) * torch.tensor(drawing._LIGHT[light]) // 64
    return lit.clamp(0, 255)


# ------------------------------------------------------------------------------------------ determinism
def test_two_calls_give_the_same_bytes(scenes):
    assert same(render("val", 0, CHUNK), scenes[:CHUNK])


@pytest.mark.parametrize("start, n", [(7, 1), (CHUNK - 3, 7)])
def test_any_range_is_a_slice_of_a_larger_one(scenes, start, n):
    part = render("val", start, n)
    assert part.index.tolist() == list(range(start, start + n))
    assert same(part, scenes[start:start + n])


def test_facts_do_not_depend_on_drawing(scenes):
    facts = render("val", 0, 2 * CHUNK, pictures=False)
    assert facts.images is facts.thing_share is facts.part_map is None
    assert same(facts, scenes, but=("images", "thing_share", "part_map"))


def test_things_are_half_hidden(scenes):
    """The scenes of the split, ground and facts alike; of each thing a part is left, on one side of its centre."""
    hidden = render("val hidden", 0, 2 * CHUNK)
    assert same(hidden, scenes, but=("images", "thing_share"))
    assert (hidden.thing_share <= scenes.thing_share).all()
    differ = (hidden.images != scenes.images).any(1)
    assert not differ[pixels(scenes.thing_share == 0)].any()
    drawn = [of.thing_share.sum((1, 2)) for of in (hidden, scenes)]
    assert ((drawn[0] > 0) & (drawn[0] < 0.65 * drawn[1])).all()
    assert 0.25 < (drawn[0].sum() / drawn[1].sum()).item() < 0.45
    thing = scenes.kind >= 0
    there = differ.float()
    for row, i in thing.nonzero()[:200].tolist():
        y, x = scenes.centre[row, i].tolist()
        reach = drawing.RADIUS[scenes.size[row, i]]
        assert there[row, y - reach:y + reach + 1, x - reach:x + reach + 1].any()  # each has lost something
    assert same(render("val hidden", CHUNK - 3, 7), hidden[CHUNK - 3:CHUNK + 4])


def test_the_splits_are_different_streams():
    assert len({render(split, 0, 8).images.numpy().tobytes() for split in drawing.SPLITS}) == 3


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_processors_draw_the_same_scenes(scenes, capability):
    """With the instruction sets of older processors, and one thread."""
    code = ("import hashlib, torch; from sinkstudy.world.drawing import render; torch.set_num_threads(1);"
            "s = render('val', 0, 512); print(hashlib.sha256(s.images.numpy().tobytes() +"
            " s.calm.numpy().tobytes() + s.kind.numpy().tobytes()).hexdigest())")
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
                         capture_output=True, text=True, check=True)
    here = hashlib.sha256(b"".join(t.numpy().tobytes() for t in (scenes.images, scenes.calm, scenes.kind)))
    assert ran.stdout.strip() == here.hexdigest()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="unknown split 'dev': choose from train, val, test"):
        render("dev", 0, 1)
    for start, n in [(-1, 1), (0, 0)]:
        with pytest.raises(ValueError, match="start must be"):
            render("val", start, n)


# --------------------------------------------------------------------------------------------- splits
@pytest.fixture(scope="module")
def facts_of() -> dict[str, Scenes]:
    return {split: render(split, 0, 4096, pictures=False) for split in drawing.SPLITS}


def test_signatures_lie_in_the_range_of_their_split(facts_of):
    """By construction: the ranges are disjoint, and cover everything."""
    ranges = sorted(drawing.SPLITS.values())
    assert [ranges[0][0], *(high for _, high in ranges)] == [0, *(low for low, _ in ranges[1:]), 100]
    for split, facts in facts_of.items():
        bucket = drawing.signature(facts) % 100
        low, high = drawing.SPLITS[split]
        assert ((bucket >= low) & (bucket < high)).all()
        assert bucket.unique().numel() == high - low


def test_no_signature_is_in_two_splits(facts_of):
    signatures = {split: set(drawing.signature(facts).tolist()) for split, facts in facts_of.items()}
    assert all(len(s) > 4090 for s in signatures.values())
    assert not signatures["train"] & signatures["val"]
    assert not signatures["train"] & signatures["test"]
    assert not signatures["val"] & signatures["test"]


def test_no_scene_in_words_is_in_two_splits(facts_of):
    """The signature knows the order in which parts and things were drawn; the words do not."""
    said = {split: {repr(f) for f in questions.facts(facts)} for split, facts in facts_of.items()}
    assert not said["train"] & said["val"] and not said["train"] & said["test"] and not said["val"] & said["test"]


def test_the_signature_hears_every_fact(facts_of):
    s = facts_of["val"][:64]
    before = drawing.signature(s)
    for name in ("scene", "light", "texture", "colour", "kind", "thing_colour", "size", "cell", "mark"):
        changed = render("val", 0, 64, pictures=False)
        values = getattr(changed, name)
        if name == "mark":
            values[:, 0] ^= True
        elif values.dim() == 1:
            values += 1
        else:
            values[:, 0] += 1
        assert (drawing.signature(changed) != before).all(), name


# -------------------------------------------------------------------------------------- calm and busy
def test_three_to_five_calm_patches(scenes):
    number = scenes.calm.flatten(1).sum(1)
    assert set(number.tolist()) == {3, 4, 5}
    # they may lie anywhere: every patch is calm in some scene
    assert scenes.calm.any(0).all()


def test_calm_patches_are_flat_and_all_others_are_not(scenes):
    values = patchwise(scenes.images).float()
    variance = values.var(-1).sum(-1)  # [n, 12, 12]
    assert (variance[scenes.calm] == 0).all()
    partly_open = scenes.thing_share < 1
    assert (variance[~scenes.calm & partly_open] > 0).all()
    assert (variance[~scenes.calm] > 0).all()  # under a thing, its weave is left
    # and by far: the least busy patch still has visible contrast
    assert variance[~scenes.calm & partly_open].min().sqrt() > 2


def test_no_thing_lies_on_a_calm_patch_or_next_to_its_pixels(scenes):
    assert (scenes.thing_share[scenes.calm] == 0).all()
    middle = torch.arange(GRID) * PATCH + PATCH / 2
    for i in range(drawing.MAX_THINGS):
        there = scenes.kind[:, i] >= 0
        away = torch.maximum((middle[:, None] - scenes.centre[:, i, 0, None, None]).abs(),
                             (middle[None] - scenes.centre[:, i, 1, None, None]).abs())
        assert away[there & scenes.calm.any((1, 2))][scenes.calm[there]].min() > drawing.RADIUS[0] + PATCH / 2


def test_a_calm_patch_shows_its_part_and_the_light(scenes):
    """Flat paint of the part at the patch's centre, times the light: reads colour, light, part and calm at once."""
    for i in range(0, len(scenes), 3):
        for row, column in scenes.calm[i].nonzero().tolist():
            y, x = row * PATCH + PATCH // 2, column * PATCH + PATCH // 2
            part = nearest(scenes.seeds[i], scenes.texture[i], y, x)
            paint = seen(drawing._MUTED[scenes.colour[i, part]], int(scenes.light[i]))
            assert scenes.images[i, :, y, x].tolist() == paint.tolist()


# ------------------------------------------------------------------------------------------ the parts
def nearest(seeds: torch.Tensor, texture: torch.Tensor, y: int, x: int) -> int:
    """By brute force: the first of the parts that are there whose seed is nearest."""
    best, owner = float("inf"), -1
    for i, ((sy, sx), t) in enumerate(zip(seeds.tolist(), texture.tolist(), strict=True)):
        distance = (y - sy) ** 2 + (x - sx) ** 2
        if t >= 0 and distance < best:
            best, owner = distance, i
    return owner


def test_part_map_is_the_nearest_seed(scenes):
    for i in (0, 5, CHUNK + 1):
        wanted = [[nearest(scenes.seeds[i], scenes.texture[i], y, x) for x in range(SIDE)] for y in range(SIDE)]
        assert scenes.part_map[i].tolist() == wanted


def test_areas_are_those_of_the_picture(scenes):
    real = torch.stack([(scenes.part_map == i).float().mean((1, 2)) for i in range(drawing.MAX_PARTS)], 1)
    assert (real - scenes.area).abs().max() < 0.03  # counted on every fourth pixel
    there = scenes.texture >= 0
    assert (scenes.area[there] >= 0.12).all() and (real[there] > 0.09).all() and (real[~there] == 0).all()
    torch.testing.assert_close(scenes.area.sum(1), torch.ones(len(scenes)))


def test_the_main_part_is_the_largest_in_the_picture(scenes):
    for i, f in enumerate(questions.facts(scenes)):
        if f.has_main:
            real = sorted(((int((scenes.part_map[i] == p).sum()), drawing.TEXTURES[t])
                           for p, t in enumerate(scenes.texture[i].tolist()) if t >= 0), reverse=True)
            assert real[0][1] == f.parts[0][0]
            assert real[0][0] > 1.1 * real[1][0]


def test_what_is_drawn_from(scenes):
    n_parts, n_things = (scenes.texture >= 0).sum(1), (scenes.kind >= 0).sum(1)
    assert set(n_parts.tolist()) == {2, 3, 4} and set(n_things.tolist()) == {1, 2, 3, 4}
    for columns in (scenes.texture, scenes.colour, scenes.kind, scenes.cell):
        for row in columns.tolist():  # no texture, ground colour, kind or cell twice in a scene
            there = [v for v in row if v >= 0]
            assert len(set(there)) == len(there)
    for columns, names in ((scenes.scene, drawing.SCENES), (scenes.light, drawing.LIGHTS),
                           (scenes.cell, drawing.CELLS), (scenes.texture, drawing.TEXTURES),
                           (scenes.kind, drawing.KINDS), (scenes.size, drawing.SIZES),
                           (scenes.colour, drawing.COLOURS), (scenes.thing_colour, drawing.COLOURS)):
        assert set(columns[columns >= 0].tolist()) == set(range(len(names)))


def read(residual: torch.Tensor, open_: torch.Tensor, templates: torch.Tensor) -> int:
    """Which 64 × 64 tile fits a picture best in any phase: residual, open_ [96, 96], templates [k, 64, 64]."""
    def fold(values):
        out = torch.zeros(64, 64)
        at = torch.arange(SIDE) % 64
        return out.index_put_((at[:, None].expand(SIDE, SIDE), at[None].expand(SIDE, SIDE)), values, accumulate=True)

    templates = templates.float()
    spectrum = torch.fft.fft2(templates).conj()
    inner = torch.fft.ifft2(torch.fft.fft2(fold(residual * open_)) * spectrum).real          # Σ r·t per phase
    power = torch.fft.ifft2(torch.fft.fft2(fold(open_.float())) * torch.fft.fft2(templates.square()).conj()).real
    total = torch.fft.ifft2(torch.fft.fft2(fold(open_.float())) * spectrum).real
    spread = (power - total.square() / open_.sum()).clamp_min(1e-3).sqrt()
    return int((inner / spread).flatten(1).max(1).values.argmax())  # the residual has mean zero on open_


def test_textures_and_scene_are_in_the_picture(scenes):
    """Reads both by matching tiles; what is read must be what the facts say."""
    right, asked, scene_right, n = 0, 0, 0, 48
    for i in range(n):
        light = torch.tensor(drawing._LIGHT[scenes.light[i]])
        busy = ~pixels(scenes.calm[i:i + 1])[0] & ~pixels(scenes.thing_share[i:i + 1] > 0)[0]
        plain = (scenes.images[i].float() * 64 / light[:, None, None]).mean(0)
        residual = torch.zeros(SIDE, SIDE)
        for part, texture in enumerate(scenes.texture[i].tolist()):
            region = busy & (scenes.part_map[i] == part)
            if texture < 0 or region.sum() < 400:
                continue
            residual[region] = plain[region] - plain[region].mean()
            right += read(residual, region, drawing._TEXTURE) == texture
            asked += 1
        open_ = busy & (residual != 0)
        residual -= residual[open_].mean()
        scene_right += read(residual, open_, drawing._CLUTTER) == scenes.scene[i]
    assert asked > 2 * n
    assert right / asked > 0.97 and scene_right / n > 0.95, (right / asked, scene_right / n)


# ----------------------------------------------------------------------------------------- the things
def things(scenes: Scenes):
    for i, t in (scenes.kind >= 0).nonzero().tolist():
        y, x = scenes.centre[i, t].tolist()
        yield i, t, scenes.images[i, :, y - 13:y + 14, x - 13:x + 14].permute(1, 2, 0).long()  # [27, 27, 3]


def is_paint(window: torch.Tensor, paint: torch.Tensor) -> torch.Tensor:
    return (window == paint).all(-1)


def test_a_thing_has_its_colour(scenes):
    for i, t, window in things(scenes):
        light = int(scenes.light[i])
        counts = [int(is_paint(window, seen(v, light)).sum()) for v in drawing._VIVID]
        assert max(range(len(counts)), key=counts.__getitem__) == scenes.thing_colour[i, t]
        assert max(counts) >= 25


def test_a_thing_has_its_outline(scenes):
    """The painted pixels are the same for a kind and size in every scene, and no two kinds look alike."""
    always: dict[tuple[int, int], torch.Tensor] = {}
    for i, t, window in things(scenes):
        if scenes.mark[i, t]:
            continue
        vivid, light = torch.tensor(drawing._VIVID[scenes.thing_colour[i, t]]), int(scenes.light[i])
        painted = is_paint(window, seen(vivid, light)) | is_paint(window, seen(vivid * 3 // 8, light))
        key = int(scenes.kind[i, t]), int(scenes.size[i, t])
        always[key] = painted & always.get(key, painted)
    assert len(always) == len(drawing.KINDS) * 2
    for (kind, size), mask in always.items():
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        radius = drawing.RADIUS[size]
        reach = max((rows - 13).abs().max(), (columns - 13).abs().max())
        assert 0.8 * radius <= reach <= 1.1 * radius, drawing.KINDS[kind]
        for (other, same_size), theirs in always.items():
            if size == same_size and kind != other:
                assert (mask & theirs).sum() / (mask | theirs).sum() < 0.9, (drawing.KINDS[kind], drawing.KINDS[other])


def test_a_mark_is_there_where_the_facts_have_one(scenes):
    marked = 0
    for i, t, window in things(scenes):
        light = int(scenes.light[i])
        d = round(0.75 * drawing.RADIUS[scenes.size[i, t]])
        top, left = 13 - d - 2, 13 + d - 2
        corner = window[top:top + 4, left:left + 4]
        white, black = is_paint(corner, seen((255,) * 3, light)), is_paint(corner, seen((12,) * 3, light))
        inner = torch.zeros(4, 4, dtype=torch.bool)
        inner[1:3, 1:3] = True
        assert bool(white[inner].all() and black[~inner].all()) == scenes.mark[i, t]
        marked += int(scenes.mark[i, t])
    assert 0.45 < marked / (scenes.kind >= 0).sum() < 0.55


def test_a_thing_stands_in_its_cell_on_its_part(scenes):
    for i, t, _ in things(scenes):
        y, x = scenes.centre[i, t].tolist()
        assert (y // 32) * 3 + x // 32 == scenes.cell[i, t]
        assert scenes.part_map[i, y, x] == scenes.under[i, t]


def test_thing_share_counts_things_and_nothing_else(scenes):
    """No thing, no share; where a patch is fully covered, only the thing's own paints are in it."""
    far = torch.ones(len(scenes), SIDE, SIDE, dtype=torch.bool)
    for i, t, _ in things(scenes):
        y, x = scenes.centre[i, t].tolist()
        far[i, y - 13:y + 14, x - 13:x + 14] = False
    assert (scenes.thing_share[far.unflatten(1, (GRID, PATCH)).unflatten(3, (GRID, PATCH)).all(4).all(2)] == 0).all()
    painted = torch.zeros(len(scenes), SIDE, SIDE, dtype=torch.bool)
    for i, t, window in things(scenes):
        vivid, light = torch.tensor(drawing._VIVID[scenes.thing_colour[i, t]]), int(scenes.light[i])
        y, x = scenes.centre[i, t].tolist()
        painted[i, y - 13:y + 14, x - 13:x + 14] |= (
            is_paint(window, seen(vivid, light)) | is_paint(window, seen(vivid * 3 // 8, light))
            | is_paint(window, seen((12,) * 3, light)) | is_paint(window, seen((255,) * 3, light)))
    share = painted.unflatten(1, (GRID, PATCH)).unflatten(3, (GRID, PATCH)).float().mean((2, 4))
    # clutter and texture beside a thing may by chance have a paint's very colour
    assert (share >= scenes.thing_share - 1e-6).all()
    assert (share - scenes.thing_share).max() < 0.25 and (share - scenes.thing_share).mean() < 1e-3


def test_patch_contents(scenes):
    part, thing = drawing.patch_contents(scenes)
    middle = slice(PATCH // 2, None, PATCH)
    assert torch.equal(part, scenes.part_map[:, middle, middle].long())
    assert (thing[scenes.calm] == -1).all()
    assert (scenes.thing_share[thing >= 0].mean() > 0.4) and (scenes.thing_share[thing < 0].mean() < 0.05)


def test_kinds_are_popular_or_rare_and_go_with_scenes(facts_of):
    """What POPE's popular and adversarial negatives need."""
    s = facts_of["train"]
    shown = torch.stack([(s.kind == k).any(1) for k in range(len(drawing.KINDS))], 1).float()  # [n, kinds]
    often = shown.mean(0)
    assert often[:4].min() > 1.2 * often[8:].max()
    for scene in range(len(drawing.SCENES)):
        lift = shown[s.scene == scene].mean(0) / often
        assert set(lift.topk(2).indices.tolist()) == {k for k in range(len(drawing.KINDS)) if k % 6 == scene}
