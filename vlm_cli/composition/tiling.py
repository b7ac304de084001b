"""Settings of a tiling: how the image processor cuts a picture into views, and the text that announces each view.

A view is what the vision encoder reads at once: one tile of the picture, or the whole picture made small. Plain data:
nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Literal

from vlm_cli.composition.options import MEDIA_TOKEN
from vlm_cli.errors import CompositionError
from vlm_cli.schema import show

__all__ = ["TILE_LIMIT", "AnyresOptions", "GridOptions", "SplitOptions", "TilingOptions", "limit_tiles"]

#: The most tiles that one picture may be cut into. More are a mistake, or an attempt to fill the memory.
TILE_LIMIT = 1_024
_MOST_PIXELS = 65_536  # of a side of a tile or of a whole canvas
_MOST_PINPOINTS = 1_000
_MOST_CHARACTERS = 200  # of a template

#: Setting -> what its text may name in braces. What stands in `_ONCE` must be named exactly once.
_NAMES = {
    "picture_text": ("views",),
    "clip_text": ("views", "frames", "frames_in_words", "seconds", "duration", "times"),
    "frame_text": ("number", "time", "seconds", "image"),
    "between_frames_text": (),
    "whole_text": ("image",),
    "thumbnail_text": ("image",),
    "tile_text": ("row", "column", "number", "image"),
    "row_end_text": ("row",),
    "between_tiles_text": (),
    "between_rows_text": (),
}
_ONCE = ("views", "image")
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class TilingOptions:
    """Settings of every tiling, and all that the tiling `none` has: each picture is one view."""

    picture_text: str = "{views}"  # text around a picture's views, such as "<img>{views}</img>" (InternVL)
    #: Text around a clip; it may name {frames}, their number, {times}, their seconds, and {seconds}, the clip's length.
    clip_text: str = "{views}"
    #: Text around each frame of a clip, which is then a medium of its own, such as "Frame{number}: {image}" (InternVL).
    frame_text: str | None = None
    between_frames_text: str = ""  # between two such frames

    def __post_init__(self) -> None:
        problems = [*self._find_text_problems(), *self._find_problems()]
        if problems:
            raise CompositionError(problems)

    def _find_problems(self) -> list[str]:
        """Find what is wrong with settings beside the texts."""
        if self.between_frames_text and self.frame_text is None:
            return ['between_frames_text needs frame_text, which makes a medium of each frame: frame_text: "{image}".']
        return []

    def _find_text_problems(self) -> list[str]:
        """Find templates that are too long, hold the media token, or name something that they may not."""
        problems = []
        for name in (f.name for f in fields(self) if f.name in _NAMES):
            value, known = getattr(self, name), _NAMES[name]
            if value is None:
                continue
            found = _PLACE.findall(value)
            braces = ", ".join(f"{{{x}}}" for x in known) or "none"
            if len(value) > _MOST_CHARACTERS:
                problems.append(f"{name} must be at most {_MOST_CHARACTERS} characters long, got {len(value):,}.")
            if MEDIA_TOKEN in value:
                problems.append(f"{name} must not hold {MEDIA_TOKEN}, got {show(value)}. Known: {braces}.")
            if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                problems.append(f"{name} holds bytes that are not UTF-8 text.")
            problems += [
                f"{name} names {{{x[:60]}}}, got {show(value)}. Known: {braces}." for x in found if x not in known
            ]
            problems += [
                f"{name} must hold {{{x}}} once, got {show(value)}."
                for x in _ONCE
                if x in known and found.count(x) != 1
            ]
        return problems


@dataclass(frozen=True, kw_only=True)
class _TileOptions(TilingOptions):
    """Settings of every tiling that cuts a picture into tiles."""

    tile_size: int | None = None  # pixels of a tile's side; None: the size that the vision encoder reads
    max_tiles: int | None = None  # the most tiles of a picture, its thumbnail left out; None: no limit of its own

    def _find_problems(self) -> list[str]:
        return [*super()._find_problems(), *_find_size_problems(self, tile_size=_MOST_PIXELS, max_tiles=TILE_LIMIT)]


@dataclass(frozen=True, kw_only=True)
class _AnnouncedOptions(_TileOptions):
    """Settings of every tiling that may announce each view by a text. Rows, columns and tiles count from 1."""

    thumbnail: Literal["first", "last", "none"] = "last"  # the whole picture, beside more than one tile
    tile_text: str = (
        "{image}"  # a tile; it may name {row}, {column} and {number}, as in "<row_{row}_col_{column}>{image}"
    )
    row_end_text: str = ""  # after each row of tiles; it may name {row}
    between_tiles_text: str = ""  # between two tiles of a row (Ovis2)
    between_rows_text: str = ""  # between two rows of tiles (Ovis2)
    thumbnail_text: str = "{image}"  # the whole picture beside tiles
    whole_text: str | None = None  # a picture that is one view; None: `thumbnail_text`


@dataclass(frozen=True, kw_only=True)
class GridOptions(_AnnouncedOptions):
    """Cut a picture into a grid of tiles that suits its shape (InternVL, Aya Vision) or its size (Cohere2 Vision)."""

    # the grid of the nearest shape; of the least enlarged picture; the smallest that covers the picture (Ovis2); the
    # one on which the picture is largest (Perception-LM)
    choose: Literal["shape", "scale", "cover", "largest"] = "shape"
    fit: Literal["squash", "corner"] = "squash"  # to the canvas, or kept in shape at its top left, with bars (Mllama)
    min_tiles: int = 1
    max_tiles: int | None = 12  # the most tiles of a picture, its thumbnail left out; None: 1,024
    thumbnail_always: bool = False  # the whole picture stands beside a single tile too (Perception-LM)

    def _find_problems(self) -> list[str]:
        problems = [*super()._find_problems(), *_find_size_problems(self, min_tiles=TILE_LIMIT)]
        if not problems and self.min_tiles > (self.max_tiles or TILE_LIMIT):
            problems.append(f"min_tiles must be at most max_tiles ({self.max_tiles}), got {self.min_tiles}.")
        return problems


@dataclass(frozen=True, kw_only=True)
class AnyresOptions(_TileOptions):
    """Fit a picture into one of several canvases, with bars, and cut that into tiles (LLaVA-NeXT)."""

    pinpoints: tuple[tuple[int, ...], ...] = ()  # [height, width] of each canvas, in pixels
    thumbnail: Literal["first", "last"] = "first"  # the whole picture, which always stands beside the tiles
    unpad: bool = True  # vision tokens of the bars are left out
    newline: bool = True  # a learned vision token ends each row of the tiles' vision tokens
    shrink_beyond: int | None = None  # tiles' worth of vision tokens, beyond which they shrink (LLaVA-OneVision: 9)
    clip_pool: int = 1  # of a clip's frames, merge neighbours p×p into one
    clip_pool_by: Literal["average", "bilinear"] = "average"  # bilinear rounds sides up: LLaVA-OneVision
    clip_pool_at: Literal["before", "after"] = "before"  # patches before the vision tokenizer, or its tokens
    clip_newline: bool = True  # a newline ends a clip, if rows have newlines
    clip_crop: bool = False  # of a clip's frames, only the middle square is seen; false: they are squashed
    bands: bool = False  # the vision tokenizer reads whole rows of the canvas instead of tiles (xGen-MM)

    def __post_init__(self) -> None:
        # A file has lists; frozen settings have tuples, which can be compared and hashed.
        object.__setattr__(self, "pinpoints", tuple(tuple(x) for x in self.pinpoints))
        super().__post_init__()

    def _find_problems(self) -> list[str]:
        problems = [*super()._find_problems(), *_find_size_problems(self, shrink_beyond=TILE_LIMIT, clip_pool=64)]
        if not 1 <= len(self.pinpoints) <= _MOST_PINPOINTS:
            problems.append(f"pinpoints must hold 1 to {_MOST_PINPOINTS:,} sizes, got {len(self.pinpoints):,}.")
        if self.bands and (self.newline or self.shrink_beyond is not None or self.clip_pool > 1):
            problems.append(
                "bands needs newline: false, shrink_beyond: null and clip_pool: 1, since no vision token has a place."
            )
        wrong = [x for x in self.pinpoints if len(x) != 2 or not all(1 <= side <= _MOST_PIXELS for side in x)]
        problems += [
            f"pinpoints must hold [height, width] of 1 to {_MOST_PIXELS:,} pixels each, got {show(x)}."
            for x in wrong[:3]
        ]
        return problems


@dataclass(frozen=True, kw_only=True)
class SplitOptions(_AnnouncedOptions):
    """Resize a picture to whole tiles, keeping its shape as far as that goes (Idefics3, SmolVLM, nanoVLM)."""

    longest_edge: int | None = None  # pixels of the longer side; None: four tiles
    enlarge: bool = True  # a smaller picture gets the longest edge too
    rules: Literal["idefics3", "nanovlm"] = "idefics3"  # two resizes, or one; nanoVLM's thumbnail is not rounded

    def _find_problems(self) -> list[str]:
        return [*super()._find_problems(), *_find_size_problems(self, longest_edge=_MOST_PIXELS)]


def limit_tiles(options: TilingOptions, max_tiles: int) -> TilingOptions:
    """Return the settings with another most number of tiles.

    Raises:
        CompositionError: if pictures are not cut into tiles, or the number does not fit.
    """
    if not isinstance(options, _TileOptions):
        raise CompositionError(
            "the model reads each picture as one view (its tiling is none), so the number of tiles cannot be limited. "
            "Leave out --max-tiles."
        )
    if isinstance(options, GridOptions):
        return replace(options, max_tiles=max_tiles, min_tiles=min(options.min_tiles, max(1, max_tiles)))
    return replace(options, max_tiles=max_tiles)


def _find_size_problems(options: TilingOptions, **most: int) -> list[str]:
    """Find the settings that are neither None nor a number from 1 to the given one."""
    given = {name: getattr(options, name) for name in most}
    return [
        f"{name} must be from 1 to {most[name]:,}, got {show(x)}."
        for name, x in given.items()
        if x is not None and not 1 <= x <= most[name]
    ]
