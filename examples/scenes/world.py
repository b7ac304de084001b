"""What a scene is, and how one is drawn from a seed.

Coordinates are pixels of a 64×64 picture, x to the right, y down. Only `random.Random` decides, seeded with text, so a
seed means the same scenes on every platform.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal, TypeAlias

__all__ = [
    "COLORS",
    "HELD_OUT_COUNTS",
    "HELD_OUT_PAIRS",
    "SHAPES",
    "SIZES",
    "SIZE_OF_PICTURE",
    "Scene",
    "Split",
    "Thing",
    "held_out",
    "sample_scene",
    "stream",
]

Split: TypeAlias = Literal["train", "held-out"]
Color: TypeAlias = tuple[int, int, int]

SIZE_OF_PICTURE = 64  # pixels
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS: dict[str, Color] = {
    "red": (218, 38, 40),
    "orange": (244, 136, 24),
    "yellow": (238, 218, 44),
    "green": (44, 166, 66),
    "cyan": (52, 206, 216),
    "blue": (44, 78, 214),
    "purple": (132, 52, 178),
    "pink": (242, 126, 184),
}
SIZES = {"large": (9.4, 11.4), "small": (5.4, 6.6)}  # radius of the circle around a thing

#: Never drawn and never named in training: 4 of the 48 pairs.
HELD_OUT_PAIRS = frozenset({("red", "star"), ("green", "square"), ("cyan", "heart"), ("purple", "triangle")})
#: No training scene has exactly so many of these.
HELD_OUT_COUNTS = frozenset({("circle", 3), ("cross", 2), ("blue", 2), ("yellow", 3)})

#: How often a scene has 1, 2 and 3 things.
NUM_THINGS = {1: 0.22, 2: 0.36, 3: 0.42}
REPEAT = 0.25  # chance that a thing takes the shape of an earlier one, and as much that it takes its colour

EDGE = 1.5  # pixels between a thing and the frame
GAP = 2.0  # pixels between the circles around two things
AXIS_RATIO = 1.6  # of two things: distance along one axis over that along the other, so that "above" is clear
COLUMN_GAP = 9.0  # of three things: pixels from one to the next along x, so that their order is clear

ROTATION = 0.12  # radians, to either side
COLOR_JITTER = 14  # levels of 255, to either side
NOISE = (0, 8)  # levels of 255, to either side of each pixel
BACKGROUND = (20, 235)  # levels of 255
TINT = 12  # levels of 255 by which a background is off grey


@dataclass(frozen=True)
class Thing:
    """One shape.

    Attributes:
        shape: one of `SHAPES`.
        color: name in `COLORS`.
        size: name in `SIZES`.
        x: of the centre, in pixels; so is `y`.
        radius: of the circle around it, in pixels.
        angle: radians by which it is turned.
        rgb: its colour as drawn.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: Color


@dataclass(frozen=True)
class Background:
    """A gradient from one colour to another along `angle`, and noise of up to `noise` levels from `seed`."""

    colors: tuple[Color, Color]
    angle: float
    noise: int
    seed: int


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows; the same scene is always drawn alike."""

    things: tuple[Thing, ...]
    background: Background


@dataclass(frozen=True)
class _Kind:
    """What a thing is, before it has a place."""

    shape: str
    color: str
    size: str


def stream(*names: object) -> Random:
    """Random numbers of their own for each sequence of names.

    >>> stream("train", 0, 1).random() == stream("train", 0, 1).random() != stream("train", 0, 2).random()
    True
    """
    return Random("/".join(map(str, names)))


def held_out(things: Sequence[Thing | _Kind]) -> list[str]:
    """The combinations among these things that training never shows: "red star", "3 circle"."""
    pairs = {(t.color, t.shape) for t in things} & HELD_OUT_PAIRS
    counts = Counter(t.shape for t in things) + Counter(t.color for t in things)
    return sorted(" ".join(pair) for pair in pairs) + sorted(
        f"{number} {name}" for name, number in HELD_OUT_COUNTS if counts[name] == number
    )


def sample_scene(rng: Random, split: Split = "train", num_things: int | None = None) -> Scene:
    """Draw a scene without any combination that is held out, or with at least one."""
    number = num_things or rng.choices(list(NUM_THINGS), list(NUM_THINGS.values()))[0]
    while True:
        kinds = _sample_kinds(rng, number)
        if bool(held_out(kinds)) != (split == "held-out"):
            continue
        radii = [rng.uniform(*SIZES[kind.size]) for kind in kinds]
        if places := _sample_places(rng, radii):
            things = [_make_thing(rng, *x) for x in zip(kinds, places, radii, strict=True)]
            return Scene(tuple(things), _sample_background(rng))


def _sample_kinds(rng: Random, number: int) -> list[_Kind]:
    kinds: list[_Kind] = []
    for _ in range(number):
        shape, color, size = rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(list(SIZES))
        if kinds and rng.random() < REPEAT:
            shape = rng.choice(kinds).shape
        if kinds and rng.random() < REPEAT:
            color = rng.choice(kinds).color
        kinds.append(_Kind(shape, color, size))
    return kinds


def _sample_places(rng: Random, radii: Sequence[float], tries: int = 100) -> list[tuple[float, float]] | None:
    """Centres inside the frame, apart from each other, in an order that can be told; None if none was found."""
    for _ in range(tries):
        places = [
            (rng.uniform(r + EDGE, SIZE_OF_PICTURE - r - EDGE), rng.uniform(r + EDGE, SIZE_OF_PICTURE - r - EDGE))
            for r in radii
        ]
        if _are_apart(places, radii) and _have_order(places):
            return places
    return None


def _are_apart(places: Sequence[tuple[float, float]], radii: Sequence[float]) -> bool:
    return all(
        math.dist(places[i], places[j]) >= radii[i] + radii[j] + GAP for i in range(len(places)) for j in range(i)
    )


def _have_order(places: Sequence[tuple[float, float]]) -> bool:
    if len(places) == 2:
        dx, dy = (abs(a - b) for a, b in zip(*places, strict=True))
        return max(dx, dy) >= AXIS_RATIO * min(dx, dy)
    columns = sorted(x for x, _ in places)
    return all(b - a >= COLUMN_GAP for a, b in pairwise(columns))


def _make_thing(rng: Random, kind: _Kind, place: tuple[float, float], radius: float) -> Thing:
    red, green, blue = (
        min(255, max(0, level + rng.randint(-COLOR_JITTER, COLOR_JITTER))) for level in COLORS[kind.color]
    )
    angle = rng.uniform(-ROTATION, ROTATION)
    return Thing(kind.shape, kind.color, kind.size, *place, radius, angle, (red, green, blue))


def _sample_background(rng: Random) -> Background:
    def color() -> Color:
        level = rng.randint(*BACKGROUND)
        red, green, blue = (level + rng.randint(-TINT, TINT) for _ in range(3))
        return red, green, blue

    return Background((color(), color()), rng.uniform(0, 2 * math.pi), rng.randint(*NOISE), rng.getrandbits(32))
