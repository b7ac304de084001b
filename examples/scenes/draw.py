"""Scenes to pixels, and to what each patch of the pixels shows.

H W pixels, v patches in reading order, k things.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from examples.scenes.world import COLORS, SHAPES, SIZE_OF_PICTURE, SIZES, Background, Scene, Thing

__all__ = ["IGNORE", "PATCH", "PatchLabels", "coverage", "draw", "label_patches", "paint"]

PATCH = 8  # pixels
IGNORE = -100  # label of what is not there, as in torch's cross entropy
COVERED = 0.12  # share of a patch that a thing covers at least, to be what the patch shows
SUPERSAMPLING = 4  # drawn pixels for each pixel, along an axis
_ROWS, _COLUMNS = np.mgrid[0:SIZE_OF_PICTURE, 0:SIZE_OF_PICTURE].astype(np.float32)


@dataclass(frozen=True)
class PatchLabels:
    """What each patch shows; shape, colour and size are `IGNORE` where nothing is.

    Attributes:
        shape: int[v] index in `SHAPES`; so are `color` in `COLORS`, where it has a name there, and `size` in `SIZES`.
        thing: bool[v], whether anything is there.
        offset: float[v, 2] from the patch's centre to the thing's, in patches.
        centre: float[v, 2] of the thing, from the picture's centre, in units of 12 pixels.
    """

    shape: np.ndarray
    color: np.ndarray
    size: np.ndarray
    thing: np.ndarray
    offset: np.ndarray
    centre: np.ndarray


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene."""
    return Image.fromarray(paint(scene))


def paint(scene: Scene, covered: np.ndarray | None = None) -> np.ndarray:
    """uint8[H, W, 3] of a scene; `covered` is its `coverage`, if that is known."""
    covered = coverage(scene) if covered is None else covered
    canvas = _gradient(scene.background)
    for thing, share in zip(scene.things, covered, strict=True):
        canvas += share[..., None] * (np.array(thing.rgb, np.float32) - canvas)
    canvas += _noise(scene.background)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def coverage(scene: Scene) -> np.ndarray:
    """float[k, H, W], the share of each pixel that a thing covers."""
    covered = np.zeros((len(scene.things), SIZE_OF_PICTURE, SIZE_OF_PICTURE), np.float32)
    for share, thing in zip(covered, scene.things, strict=True):
        left, top = math.floor(thing.x - thing.radius), math.floor(thing.y - thing.radius)
        mask = np.asarray(_mask(thing, left, top), np.float32) / 255
        share[top : top + len(mask), left : left + len(mask)] = mask
    return covered


def _mask(thing: Thing, left: int, top: int) -> Image.Image:
    """A thing in white on a square that starts at pixel (left, top), anti-aliased."""
    side = math.ceil(2 * thing.radius) + 1
    mask = Image.new("L", (SUPERSAMPLING * side, SUPERSAMPLING * side))
    sin, cos = math.sin(thing.angle) * thing.radius, math.cos(thing.angle) * thing.radius
    # Pillow names a pixel by its middle, we by its upper left corner.
    points = [
        (
            SUPERSAMPLING * (thing.x - left + cos * x - sin * y) - 0.5,
            SUPERSAMPLING * (thing.y - top + sin * x + cos * y) - 0.5,
        )
        for x, y in outline(thing.shape)
    ]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask.reduce(SUPERSAMPLING)


@cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape inside the unit circle, y down."""
    if shape == "square":
        return _ring(4, 1.0, start=math.pi / 4)
    if shape == "triangle":
        return _ring(3, 1.0)
    if shape == "star":
        outer, inner = _ring(5, 1.0), _ring(5, 0.45, start=math.pi / 5)
        return tuple(corner for pair in zip(outer, inner, strict=True) for corner in pair)
    if shape == "cross":
        arm, reach = 0.31, 0.95
        corners = ((arm, -reach), (arm, -arm), (reach, -arm))
        # Three corners of the upper right quarter, turned by quarters.
        return tuple(_turn(x, y, quarter * math.pi / 2) for quarter in range(4) for x, y in corners)
    if shape == "heart":
        # https://mathworld.wolfram.com/HeartCurve.html
        curve = [(i * math.tau / 40) for i in range(40)]
        return tuple(
            (
                16 * math.sin(t) ** 3 / 17.6,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 1.5) / 17.6,
            )
            for t in curve
        )
    return _ring(36, 0.88)  # smaller, as it fills its circle best


def _ring(number: int, radius: float, start: float = 0.0) -> tuple[tuple[float, float], ...]:
    """Points on a circle, the first one straight up if `start` is 0."""
    return tuple(_turn(0.0, -radius, start + i * math.tau / number) for i in range(number))


def _turn(x: float, y: float, angle: float) -> tuple[float, float]:
    return math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y


def _gradient(background: Background) -> np.ndarray:
    """float[H, W, 3]."""
    along = math.cos(background.angle) * _COLUMNS + math.sin(background.angle) * _ROWS
    along = (along - along.min()) / (along.max() - along.min())
    first, last = np.array(background.colors, np.float32)
    return first + along[..., None] * (last - first)


def _noise(background: Background) -> np.ndarray:
    """int[H, W, 3], evenly from -noise to noise."""
    levels = 2 * background.noise + 1
    noise = np.frombuffer(Random(background.seed).randbytes(3 * SIZE_OF_PICTURE**2), np.uint8)
    return ((noise.astype(np.int32) * levels) // 256 - background.noise).reshape(SIZE_OF_PICTURE, SIZE_OF_PICTURE, 3)


def label_patches(scene: Scene, covered: np.ndarray) -> PatchLabels:
    """What each patch shows: the thing that covers most of it, if that is enough to see.

    Args:
        scene: the scene.
        covered: float[k, H, W], its `coverage`.
    """
    side = SIZE_OF_PICTURE // PATCH
    share = covered.reshape(-1, side, PATCH, side, PATCH).mean((2, 4)).reshape(-1, side * side)  # [k, v]
    owner, thing = share.argmax(0), share.max(0) >= COVERED  # [v]
    colors = list(COLORS)
    names = np.array(
        [
            (
                SHAPES.index(t.shape),
                colors.index(t.color) if t.color in COLORS else IGNORE,
                list(SIZES).index(t.size),
            )
            for t in scene.things
        ]
    )
    shape, color, size = np.where(thing, names[owner].T, IGNORE)
    middle = np.array([(t.x, t.y) for t in scene.things], np.float32)[owner]  # [v, 2]
    row, column = np.divmod(np.arange(side * side), side)
    patch = PATCH * (np.stack([column, row], 1) + 0.5)
    offset, centre = (middle - patch) / PATCH, (middle - SIZE_OF_PICTURE / 2) / 12
    return PatchLabels(shape, color, size, thing, offset.astype(np.float32), centre.astype(np.float32))
