"""Scenes of one to three coloured shapes, drawn at random but reproducibly.

An arrangement cuts the unit square into disjoint cells, one per object, listed in the order in which a
caption mentions them. An object stays inside its cell, so objects never overlap and the relation between
them is always visible. Each scene has a random stream of its own, so that any scene can be made alone.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (222, 32, 36),
    "green": (34, 150, 58),
    "blue": (38, 72, 214),
    "yellow": (246, 214, 34),
    "purple": (140, 46, 168),
    "pink": (250, 138, 190),
    "cyan": (44, 200, 222),
    "black": (22, 22, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
NUM_HELD_OUT = 4
"""Combinations of colour and shape that never occur in training, of 40."""

SUPERSAMPLING = 4
"""Scenes are drawn this many times larger and averaged down: Pillow's shapes are not antialiased."""
COLOUR_JITTER = 10
ROTATION_JITTER_RAD = 0.15

Combination = tuple[str, str]
"""Colour and shape."""
Cell = tuple[float, float, float, float]
"""Left, top, right, bottom in the unit square."""
Corner = tuple[float, float]


@dataclass(frozen=True)
class Arrangement:
    """Where the objects of a scene stand, and the words of its caption."""

    caption: str
    """A template with one `{}` per object."""
    cells: tuple[Cell, ...]
    """One per object, in the order of mention."""


ARRANGEMENTS = (
    Arrangement("{}", ((0.1, 0.1, 0.9, 0.9),)),
    Arrangement("{} left of {}", ((0.03, 0.2, 0.49, 0.8), (0.51, 0.2, 0.97, 0.8))),
    Arrangement("{} above {}", ((0.2, 0.03, 0.8, 0.49), (0.2, 0.51, 0.8, 0.97))),
    Arrangement(
        "{} left of {} left of {}",
        ((0.01, 0.25, 0.33, 0.75), (0.34, 0.25, 0.66, 0.75), (0.67, 0.25, 0.99, 0.75)),
    ),
    Arrangement(
        "{} above {} above {}",
        ((0.25, 0.01, 0.75, 0.33), (0.25, 0.34, 0.75, 0.66), (0.25, 0.67, 0.75, 0.99)),
    ),
    Arrangement(
        "{} left of {} and {} below",
        ((0.04, 0.04, 0.48, 0.48), (0.52, 0.04, 0.96, 0.48), (0.25, 0.52, 0.75, 0.96)),
    ),
)
"""Pairs read from left to right and from top to bottom; a caption follows from the picture alone."""


@dataclass(frozen=True)
class SceneObject:
    """One shape: centre and radius as shares of the image's side, rotation in radians."""

    colour: str
    shape: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float
    rotation: float

    @property
    def box(self) -> Cell:
        """Left, top, right, bottom of what is drawn of it."""
        if self.shape == "circle":
            return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius
        across, down = zip(*self.corners(), strict=True)
        return min(across), min(down), max(across), max(down)

    def corners(self) -> list[Corner]:
        """Of any shape but the circle."""
        cosine, sine = self.radius * math.cos(self.rotation), self.radius * math.sin(self.rotation)
        return [
            (self.x + x * cosine - y * sine, self.y + x * sine + y * cosine) for x, y in OUTLINES[self.shape]
        ]


@dataclass(frozen=True)
class Scene:
    """What is visible, and what is said about it."""

    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int]
    caption: str


def held_out_combinations(seed: int) -> tuple[Combination, ...]:
    """The combinations that training never sees. No colour and no shape is held out twice."""
    stream = random.Random(f"{seed}:combinations")
    colours = stream.sample(list(COLOURS), NUM_HELD_OUT)
    shapes = stream.sample(SHAPES, NUM_HELD_OUT)
    return tuple(zip(colours, shapes, strict=True))


def make_scene(seed: int, split: str, index: int) -> Scene:
    """Scene number `index` of a split: `train` and `heldout` are made of seen combinations only, each
    scene of `unseen` has at least one that is held out."""
    stream = random.Random(f"{seed}:{split}:{index}")
    held_out = held_out_combinations(seed)
    seen = [pair for pair in itertools.product(COLOURS, SHAPES) if pair not in held_out]
    arrangement = stream.choice(ARRANGEMENTS)
    combinations = stream.choices(seen, k=len(arrangement.cells))
    if split == "unseen":
        combinations[stream.randrange(len(combinations))] = stream.choice(held_out)
    return Scene(
        objects=tuple(
            _place(stream, pair, cell) for pair, cell in zip(combinations, arrangement.cells, strict=True)
        ),
        background=_jitter(stream, (236, 236, 236)),
        caption=arrangement.caption.format(*(_name(pair) for pair in combinations)),
    )


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """The scene as an RGB image of `image_size` pixels per side."""
    side = image_size * SUPERSAMPLING
    image = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        if item.shape == "circle":
            left, top, right, bottom = item.box
            draw.ellipse((left * side, top * side, right * side, bottom * side), fill=item.rgb)
        else:
            draw.polygon([(x * side, y * side) for x, y in item.corners()], fill=item.rgb)
    return image.reduce(SUPERSAMPLING)


def _star(radii: Sequence[float], num_corners: int) -> list[Corner]:
    """Corners of a star around the origin, the first one at the top; one radius makes it regular."""
    return [
        (
            radii[corner % len(radii)] * math.sin(2 * math.pi * corner / num_corners),
            -radii[corner % len(radii)] * math.cos(2 * math.pi * corner / num_corners),
        )
        for corner in range(num_corners)
    ]


def _cross(arm: float) -> list[Corner]:
    """A plus sign inside the unit circle, with arms of width 2 * `arm`."""
    length = math.sqrt(1 - arm * arm)
    quarter = [(arm, -length), (arm, -arm), (length, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


OUTLINES = {
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "triangle": _star([1.0], 3),
    "star": _star([1.0, 0.42], 10),
    "cross": _cross(0.28),
}
"""Corners of each shape but the circle, in units of its radius, y downwards."""


def _place(stream: random.Random, combination: Combination, cell: Cell) -> SceneObject:
    """Puts an object of a random size at a random place of a cell, wholly inside of it."""
    colour, shape = combination
    left, top, right, bottom = cell
    radius = min(right - left, bottom - top) / 2 * stream.uniform(0.7, 0.9)
    reach = radius * 1.1  # a rotated square reaches 1.07 radii
    return SceneObject(
        colour=colour,
        shape=shape,
        rgb=_jitter(stream, COLOURS[colour]),
        x=stream.uniform(left + reach, right - reach),
        y=stream.uniform(top + reach, bottom - reach),
        radius=radius,
        rotation=stream.uniform(-ROTATION_JITTER_RAD, ROTATION_JITTER_RAD),
    )


def _jitter(stream: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (
        min(255, max(0, value + stream.randint(-COLOUR_JITTER, COLOUR_JITTER))) for value in rgb
    )
    return red, green, blue


def _name(combination: Combination) -> str:
    return f"a {combination[0]} {combination[1]}"
