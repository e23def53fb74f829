"""The lab world: rendered scenes whose every fact is known.

A scene is 96 × 96 pixels, 12 × 12 patches of 8 × 8. Its facts:

- *scene*: which clutter mark is scattered over the whole picture (a global fact with redundant evidence);
- *light*: one multiplier per colour channel for the whole picture;
- *parts*: 2-4 regions, each with a texture and a colour of its own; the largest is the *main* part;
- *things*: 1-4 shapes of different kind, each with a colour, a size, a cell of a 3 × 3 grid and perhaps a mark;
  a kind has its own outline and its own fine weave;
- *calm patches*: 3-5 patches that hold nothing but one flat colour (no texture, clutter, grain or thing).
  They are the low-information patches of the world; no question asks about them.

A *simple* scene (splits "train simple", …) has one ground in place of 2-4 parts, and one or two things; all else is the
same. The *hidden* scenes ("test hidden", …) are those of their split, but of each thing only 40 % of the width is
drawn, from a side at random.

Everything else in the picture is busy: texture, clutter and grain lie in every patch that is not calm.
All randomness comes from the split's name and the scene's index, all arithmetic on pixels is in integers,
so that a scene is the same on every machine. A scene belongs to a split by the hash of its facts as drawn (slot by
slot), so no two splits share one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

SIDE, PATCH, GRID = 96, 8, 12
CHUNK = 256  # scenes that share one random generator
MAX_PARTS, MAX_THINGS = 4, 4

SCENES = ("forest", "desert", "city", "beach", "meadow", "cave")
LIGHTS = ("bright", "dim", "warm", "cold")
TEXTURES = ("striped", "barred", "slanted", "checked", "dotted", "waved", "bricked", "netted")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
KINDS = ("ball", "ring", "box", "tent", "gem", "star", "cross", "moon", "heart", "stick", "frame", "hourglass")
SIZES = ("small", "large")
CELLS = tuple(f"{r} {c}" for r in ("top", "middle", "bottom") for c in ("left", "center", "right"))
RADIUS = (7, 11)  # pixels, by size

# Share of the hash space that belongs to each split: [low, high) of 100.
SPLITS = {"train": (0, 80), "val": (80, 90), "test": (90, 100)}
SIMPLE, HIDDEN = " simple", " hidden"

_MUTED = ((150, 84, 78), (160, 118, 72), (158, 150, 84), (92, 140, 86), (84, 146, 146), (84, 100, 160),
          (128, 92, 150), (164, 164, 164))
_VIVID = ((235, 30, 30), (250, 140, 10), (250, 235, 30), (20, 190, 40), (20, 220, 230), (30, 60, 245),
          (170, 30, 220), (250, 250, 250))
_LIGHT = ((72, 72, 72), (36, 36, 36), (74, 58, 40), (42, 58, 76))  # of 64, per channel
# How often each kind is among a scene's things: a popular third, a middle third, a rare third; then the kinds
# that a scene favours. POPE's popular and adversarial negatives need both.
_POPULARITY = (6, 6, 6, 6, 3, 3, 3, 3, 1.5, 1.5, 1.5, 1.5)
_FAVOUR = 5.0


@dataclass
class Scenes:
    """A batch of n scenes: their facts, and their pictures once rendered.

    Index tensors hold positions in the module's tuples (`SCENES`, `TEXTURES`, …); unused slots of parts and
    things hold -1.
    """

    index: torch.Tensor        # [n] scene number within the split
    scene: torch.Tensor        # [n]
    light: torch.Tensor        # [n]
    seeds: torch.Tensor        # [n, parts, 2] Voronoi seeds of the parts (y, x), pixels
    texture: torch.Tensor      # [n, parts]
    colour: torch.Tensor       # [n, parts]
    area: torch.Tensor         # [n, parts] share of the picture, counted on a 24 × 24 raster
    kind: torch.Tensor         # [n, things]
    thing_colour: torch.Tensor  # [n, things]
    size: torch.Tensor         # [n, things]
    cell: torch.Tensor         # [n, things] 0-8, row-major
    centre: torch.Tensor       # [n, things, 2] (y, x), pixels
    mark: torch.Tensor         # [n, things] bool
    under: torch.Tensor        # [n, things] the part at the thing's centre
    calm: torch.Tensor         # [n, 12, 12] bool
    # what is drawn; None where `render` gave the facts alone
    images: torch.Tensor = None       # type: ignore[assignment]  # [n, 3, 96, 96] uint8
    thing_share: torch.Tensor = None  # type: ignore[assignment]  # [n, 12, 12] share of the patch that things cover
    part_map: torch.Tensor = None     # type: ignore[assignment]  # [n, 96, 96] uint8, the part at each pixel

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows) -> Scenes:
        return Scenes(*(None if (v := getattr(self, f.name)) is None else v[rows] for f in fields(self)))

    @staticmethod
    def cat(batches: list[Scenes]) -> Scenes:
        columns = ([getattr(b, f.name) for b in batches] for f in fields(Scenes))
        return Scenes(*(None if c[0] is None else torch.cat(c) for c in columns))


def render(split: str, start: int, n: int, *, pictures: bool = True) -> Scenes:
    """Scenes `start` … `start + n - 1` of a split.

    Args:
        split: "train", "val" or "test", alone or with " simple" or " hidden" behind it.
        pictures: also draw `images`, `thing_share` and `part_map`; the facts alone are much faster.

    Raises:
        ValueError: unknown split, or a negative start or number.
    """
    hidden, simple = split.endswith(HIDDEN), split.endswith(SIMPLE)
    name = split.removesuffix(HIDDEN).removesuffix(SIMPLE)
    if name not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if start < 0 or n < 1:
        raise ValueError(f"start must be ≥ 0 and n ≥ 1, got start={start}, n={n}")
    out = []
    for chunk in range(start // CHUNK, (start + n - 1) // CHUNK + 1):
        number = list(SPLITS).index(name) + len(SPLITS) * simple
        generator = torch.Generator().manual_seed(1_000_003 * (1 + number) + chunk)
        scenes = _facts(name, chunk * CHUNK, generator, simple)
        if pictures:
            _draw(scenes, generator, hidden)
        low, high = max(start - chunk * CHUNK, 0), min(start + n - chunk * CHUNK, CHUNK)
        out.append(scenes[low:high])
    return Scenes.cat(out)


# ------------------------------------------------------------------------------------------------- facts
def _facts(split: str, first: int, g: torch.Generator, simple: bool) -> Scenes:
    kept: list[Scenes] = []
    low, high = SPLITS[split]
    while sum(map(len, kept)) < CHUNK:
        batch = _propose(CHUNK, g, simple)
        bucket = signature(batch) % 100
        large_parts = (batch.area.masked_fill(batch.texture < 0, 1.0) >= 0.12).all(-1)
        kept.append(batch[(bucket >= low) & (bucket < high) & large_parts])
    scenes = Scenes.cat(kept)[:CHUNK]
    scenes.index = torch.arange(first, first + CHUNK)
    return scenes


def _pick(n: int, k: int, weights: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """k different choices for each of n rows, with probabilities ∝ weights: [n, k] (Efraimidis & Spirakis)."""
    keys = -torch.log(torch.rand(n, weights.shape[-1], generator=g).clamp_min(1e-12)) / weights
    return keys.argsort(dim=-1)[:, :k]


def _propose(n: int, g: torch.Generator, simple: bool) -> Scenes:
    def draw(high, *shape):
        return torch.randint(0, high, shape or (n,), generator=g)

    scene = draw(len(SCENES))
    parts = torch.ones(n, dtype=torch.long) if simple else 2 + draw(3)
    beyond = torch.arange(MAX_PARTS) >= parts[:, None]
    uniform = torch.ones(n, len(TEXTURES))
    texture = _pick(n, MAX_PARTS, uniform, g).masked_fill(beyond, -1)
    colour = _pick(n, MAX_PARTS, uniform, g).masked_fill(beyond, -1)
    # Seeds lie in different cells of a 3 × 3 grid, so that no part is a sliver too often.
    cells = _pick(n, MAX_PARTS, torch.ones(n, 9), g)
    seeds = torch.stack([cells // 3, cells % 3], -1) * 32 + 4 + draw(24, n, MAX_PARTS, 2)
    ticks = torch.arange(2, SIDE, 4)
    owner = _owner(seeds, beyond, ticks).flatten(1)
    area = torch.stack([(owner == i).float().mean(1) for i in range(MAX_PARTS)], 1)

    number = 1 + draw(2 if simple else MAX_THINGS)
    absent = torch.arange(MAX_THINGS) >= number[:, None]
    favourites = torch.tensor([[_FAVOUR if k % len(SCENES) == s else 1.0 for k in range(len(KINDS))]
                               for s in range(len(SCENES))])
    kind = _pick(n, MAX_THINGS, favourites[scene] * torch.tensor(_POPULARITY), g)
    cell = _pick(n, MAX_THINGS, torch.ones(n, 9), g)
    centre = torch.stack([cell // 3, cell % 3], -1) * 32 + 16
    to_seed = (centre[:, :, None] - seeds[:, None]).square().sum(-1).masked_fill(beyond[:, None], 1 << 30)
    size = draw(2, n, MAX_THINGS)
    calm = _calm(centre, size, absent, 3 + draw(3), g)
    return Scenes(
        index=torch.zeros(n, dtype=torch.long), scene=scene, light=draw(len(LIGHTS)), seeds=seeds,
        texture=texture, colour=colour, area=area, kind=kind.masked_fill(absent, -1),
        thing_colour=draw(len(COLOURS), n, MAX_THINGS).masked_fill(absent, -1),
        size=size.masked_fill(absent, -1), cell=cell.masked_fill(absent, -1), centre=centre,
        mark=draw(2, n, MAX_THINGS).bool() & ~absent, under=to_seed.argmin(-1).masked_fill(absent, -1), calm=calm)


def _calm(centre, size, absent, number, g) -> torch.Tensor:
    """`number` patches a scene, at random among those that no thing comes near: [n, 12, 12] bool."""
    n = len(centre)
    near = _near(centre, torch.tensor(RADIUS)[size] + 3 + PATCH // 2)
    free = ~(near & ~absent[..., None, None]).any(1)
    keys = torch.rand(n, GRID * GRID, generator=g).masked_fill(~free.flatten(1), 2.0)
    rank = keys.argsort(-1).argsort(-1)
    return (rank < number[:, None]).view(n, GRID, GRID)


def _near(centre: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """The patches whose centre is within reach [n, things] of a thing's, both ways: [n, things, 12, 12] bool."""
    middle = torch.arange(GRID) * PATCH + PATCH // 2
    rows, columns = ((middle - centre[..., i, None]).abs() <= reach[..., None] for i in (0, 1))
    return rows[..., None] & columns[..., None, :]


def _owner(seeds: torch.Tensor, beyond: torch.Tensor, ticks: torch.Tensor) -> torch.Tensor:
    """The part whose seed is nearest, at each point of a square raster: [n, ticks, ticks] uint8.

    Compares slot by slot: torch's argmin over a short axis takes four times as long on a CPU.
    """
    far = torch.tensor(1 << 20, dtype=torch.int32)
    square = (ticks.int() - seeds.int()[..., None]).square()  # [n, parts, 2, ticks]
    best = owner = None
    for i in range(MAX_PARTS):
        distance = square[:, i, 0, :, None] + square[:, i, 1, None, :] + far * beyond[:, i, None, None]
        if best is None:
            best, owner = distance, torch.zeros_like(distance, dtype=torch.uint8)
        else:
            nearer = distance < best
            owner.masked_fill_(nearer, i)
            best = torch.minimum(best, distance)
    return owner


def patch_contents(s: Scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """What lies at the centre of each patch: the part, [n, 12, 12], and the thing there or -1, [n, 12, 12]."""
    middle = torch.arange(GRID) * PATCH + PATCH // 2
    part = _owner(s.seeds, s.texture < 0, middle).long()
    there = _near(s.centre, torch.tensor(RADIUS)[s.size.clamp_min(0)]) & (s.kind >= 0)[..., None, None]
    return part, torch.where(there, torch.arange(MAX_THINGS)[:, None, None], -1).amax(1)


def signature(s: Scenes) -> torch.Tensor:
    """A hash of a scene's discrete facts, [n] ≥ 0; equal facts give equal hashes."""
    columns = [s.scene, s.light, *s.texture.T, *s.colour.T, *s.kind.T, *s.thing_colour.T, *s.size.T, *s.cell.T,
               *s.mark.long().T]
    h = torch.zeros_like(s.scene)
    for column in columns:  # a linear congruential mix in 40 bits: no overflow of int64
        h = ((h ^ (column + 2)) * 6_364_137 + 1_442_695) % (1 << 40)
    return h >> 7


# ----------------------------------------------------------------------------------------------- drawing
def _draw(s: Scenes, g: torch.Generator, hidden: bool) -> None:
    n = len(s)
    y, x = torch.arange(SIDE)[:, None], torch.arange(SIDE)[None]
    s.part_map = _owner(s.seeds, s.texture < 0, torch.arange(SIDE))  # [n, 96, 96]
    owner = s.part_map.long()
    flat = owner.flatten(1)

    # Textures shift by half a patch at most, clutter freely: four phases are few enough for a small tower.
    offset = torch.randint(0, 64, (n, 4), generator=g)
    offset[:, :2] &= ~3
    oy, ox, cy, cx = (offset[:, i, None, None] for i in range(4))
    where = (((y + oy) & 63) * 64 + ((x + ox) & 63)).flatten(1)
    shade = _TEXTURE.view(-1)[s.texture.clamp_min(0).gather(1, flat) * 4096 + where]
    clutter = _CLUTTER.view(-1)[(s.scene[:, None, None] * 4096 + ((y + cy) & 63) * 64 + ((x + cx) & 63)).flatten(1)]
    grain = torch.randint(-9, 10, (n, SIDE * SIDE), generator=g, dtype=torch.int16)
    busy = shade + clutter + grain
    calm = s.calm.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2).flatten(1)
    # A calm patch is one flat colour, also where the border of two parts would cross it.
    centre_owner = owner[:, PATCH // 2::PATCH, PATCH // 2::PATCH].repeat_interleave(PATCH, 1) \
        .repeat_interleave(PATCH, 2).flatten(1)
    flat = torch.where(calm, centre_owner, flat)
    base = torch.tensor(_MUTED, dtype=torch.int16)[s.colour.clamp_min(0)]  # [n, parts, 3]
    pixels = base.gather(1, flat[..., None].expand(-1, -1, 3)) + busy.masked_fill(calm, 0)[..., None]

    covered = torch.zeros(n, SIDE * SIDE, dtype=torch.bool)
    edge = _SPRITE.shape[-1]
    window = torch.arange(edge) - edge // 2
    for i in range(MAX_THINGS):
        rows = (s.kind[:, i] >= 0).nonzero()[:, 0]
        at = s.centre[rows, i]
        spot = ((at[:, 0, None, None] + window[:, None]) * SIDE + at[:, 1, None, None] + window).flatten(1)
        sprite = _SPRITE[s.kind[rows, i], s.size[rows, i], s.mark[rows, i].long()].flatten(1)
        if hidden:  # what lies more than a fifth of the radius to one side of the centre is seen
            way = 2 * torch.randint(0, 8, (len(rows), 2, 1, 1), generator=g) - 7
            along = (window[:, None] * way[:, 0] + window * way[:, 1]).flatten(1)
            fifth = (way.square().sum(1) * torch.tensor(RADIUS)[s.size[rows, i], None, None].square()).flatten(1)
            sprite = sprite * (25 * along * along.abs() < -fifth)
        hit, pixel = (sprite > 0).nonzero(as_tuple=True)
        # by sprite value: fill, outline, mark, weave
        paint = torch.stack([torch.tensor(_VIVID, dtype=torch.int16)[s.thing_colour[rows, i]],
                             torch.full((len(rows), 3), 12, dtype=torch.int16),
                             torch.full((len(rows), 3), 255, dtype=torch.int16),
                             torch.tensor(_VIVID, dtype=torch.int16)[s.thing_colour[rows, i]] * 3 // 8], 1)
        pixels[rows[hit], spot[hit, pixel]] = paint[hit, sprite[hit, pixel].long() - 1]
        covered[rows[hit], spot[hit, pixel]] = True

    pixels = (pixels * torch.tensor(_LIGHT, dtype=torch.int16)[s.light][:, None] // 64).clamp_(0, 255)
    s.images = pixels.to(torch.uint8).view(n, SIDE, SIDE, 3).permute(0, 3, 1, 2).contiguous()
    s.thing_share = covered.view(n, GRID, PATCH, GRID, PATCH).float().mean((2, 4))


def _textures() -> torch.Tensor:
    """[textures, 64, 64] int16: what a texture adds to its part's colour; every one tiles."""
    y, x = torch.arange(64)[:, None].expand(64, 64), torch.arange(64)[None].expand(64, 64)
    wave = torch.tensor([round(2.5 * math.sin(2 * math.pi * i / 16)) for i in range(64)])
    masks = {
        "striped": y % 8 < 4,
        "barred": x % 8 < 4,
        "slanted": (x + y) % 8 < 4,
        "checked": (x // 4 + y // 4) % 2 == 0,
        "dotted": ((x % 8 - 3).square() + (y % 8 - 3).square()) <= 5,
        "waved": (y + wave[x]) % 8 < 3,
        "bricked": (y % 8 < 2) | ((x + 8 * ((y // 8) % 2)) % 16 < 2),
        "netted": ((x + y) % 16 < 2) | ((x - y) % 16 < 2),
    }
    return torch.stack([torch.where(masks[t], 40, -30) for t in TEXTURES]).to(torch.int16)


def _clutters() -> torch.Tensor:
    """[scenes, 64, 64] int16: about one small mark in each 8 × 8 patch, its shape and tone set by the scene."""
    glyphs = ("#...#\n.#.#.\n..#..", "##\n##", "####\n#..#\n#..#\n####", "..#..\n.#.#.\n#...#", "#\n#\n#\n#\n#",
              "#..#\n.##.\n.##.\n#..#")
    tones = (48, -48, -48, 48, 48, -48)
    g = torch.Generator().manual_seed(7)
    out = torch.zeros(len(SCENES), 64, 64, dtype=torch.int16)
    for s, (glyph, tone) in enumerate(zip(glyphs, tones, strict=True)):
        shape = torch.tensor([[c == "#" for c in row] for row in glyph.split("\n")])
        for cy in range(8):
            for cx in range(8):
                jy, jx = torch.randint(0, 8, (2,), generator=g).tolist()
                for dy, dx in shape.nonzero().tolist():
                    out[s, (cy * 8 + jy + dy) % 64, (cx * 8 + jx + dx) % 64] = tone
    return out


def _sprites() -> torch.Tensor:
    """[kinds, sizes, marked, 27, 27] uint8: 0 nothing, 1 fill, 2 outline, 3 mark, 4 weave."""
    edge = 27
    g = torch.Generator().manual_seed(3)
    out = torch.zeros(len(KINDS), 2, 2, edge, edge, dtype=torch.uint8)
    at = torch.arange(edge) - edge // 2
    for i, kind in enumerate(KINDS):
        # a 4 × 4 pattern of five dark pixels, repeated; the sprite's centre lies on a corner of the patch grid
        pattern = (torch.rand(16, generator=g).argsort().argsort() < 5).view(4, 4)
        weave = pattern.repeat(8, 8)[:edge, :edge].roll((edge // 2 % 4, edge // 2 % 4), (0, 1))
        for j, radius in enumerate(RADIUS):
            v, u = torch.meshgrid(at / radius, at / radius, indexing="ij")
            inside = _inside(kind, u, v)
            grown = torch.nn.functional.max_pool2d(inside[None, None].float(), 3, 1, 1)[0, 0] > 0
            sprite = torch.where(inside, torch.where(weave, 4, 1), torch.where(grown, 2, 0)).to(torch.uint8)
            out[i, j, :] = sprite
            c, d = edge // 2, round(0.75 * radius)
            out[i, j, 1, c - d - 2:c - d + 2, c + d - 2:c + d + 2] = 2
            out[i, j, 1, c - d - 1:c - d + 1, c + d - 1:c + d + 1] = 3
    return out


def _inside(kind: str, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    r2, au, av = u * u + v * v, u.abs(), v.abs()
    square = (au <= 0.86) & (av <= 0.86)
    lobes = ((au - 0.48).square() + (v + 0.35).square()) <= 0.27
    return {
        "ball": r2 <= 1,
        "ring": (r2 <= 1) & (r2 >= 0.3),
        "box": square,
        "tent": (v <= 0.85) & (v >= -0.95) & (au <= (v + 0.95) / 1.8),
        "gem": au + av <= 1.05,
        "star": r2.sqrt() <= 0.7 + 0.35 * torch.cos(5 * torch.atan2(u, -v)),
        "cross": ((au <= 0.33) & (av <= 1)) | ((av <= 0.33) & (au <= 1)),
        "moon": (r2 <= 1) & ((u - 0.55).square() + v.square() > 0.75),
        "heart": lobes | ((v >= -0.35) & (v <= 0.95) & (au <= 0.98 * (0.95 - v) / 1.3)),
        "stick": (au <= 0.3) & (av <= 1.05),
        "frame": square & ~((au <= 0.4) & (av <= 0.4)),
        "hourglass": (av <= 0.95) & (au <= 0.12 + 0.8 * av),
    }[kind]


_TEXTURE, _CLUTTER, _SPRITE = _textures(), _clutters(), _sprites()
