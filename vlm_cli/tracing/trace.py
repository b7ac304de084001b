"""`Trace`: what a model saw while it answered one prompt, as plain data.

All boxes and sizes are in pixels of a picture as it was given, x to the right, y down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlm_cli.report.layout import PromptLayout

__all__ = [
    "MEASURES",
    "Alternative",
    "Gate",
    "HeatMap",
    "LayerShares",
    "Measure",
    "Trace",
    "TracedPicture",
    "View",
    "Word",
    "WordToken",
]

Measure: TypeAlias = Literal["attention", "occlusion"]
MEASURES: tuple[Measure, ...] = ("attention", "occlusion")

#: The least value that gets the full colour: of a share, and of a fall of a log-probability (5 %).
_LEAST: dict[Measure, float] = {"attention": 1e-6, "occlusion": 0.05}
_DIGITS = 4  # significant ones of a number in JSON


@dataclass(frozen=True)
class Alternative:
    """A token that the model could have written instead.

    Attributes:
        text: that the token adds to the answer.
        probability: from 0 to 1.
    """

    text: str
    probability: float


@dataclass(frozen=True)
class WordToken:
    """One token of an answer.

    Attributes:
        id: in the tokenizer.
        text: that the token adds to the answer.
        log_probability: natural logarithm, behind the prompt and the answer before it.
        alternatives: the likeliest tokens here, the written one among them if it is one of these; likeliest first.
    """

    id: int
    text: str
    log_probability: float
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True)
class Word:
    """One word of an answer, with the space before it.

    Attributes:
        text: of the word.
        tokens: of which it is made.
    """

    text: str
    tokens: tuple[WordToken, ...]

    @property
    def log_probability(self) -> float:
        """Natural logarithm, of all tokens together."""
        return sum(token.log_probability for token in self.tokens)

    @property
    def probability(self) -> float:
        """From 0 to 1."""
        return math.exp(self.log_probability)

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """The likeliest tokens where the word begins. Of a longer word, such a token is only the beginning."""
        return self.tokens[0].alternatives


@dataclass(frozen=True)
class View:
    """What the vision encoder reads at once: a whole picture, a tile of it, or a frame.

    Attributes:
        kind: "whole" for the only view of a picture or a frame, and for the thumbnail beside tiles; else "tile".
        box: (left, top, right, bottom) in the picture. It reaches beyond the picture where the view has bars, and does
            not cover all of it where the preprocessing crops.
        rows: rows of patches; 1 if the encoder's features are no grid.
        columns: columns of patches; 1 as for `rows`.
    """

    kind: Literal["whole", "tile"]
    box: tuple[float, float, float, float]
    rows: int
    columns: int


@dataclass(frozen=True)
class TracedPicture:
    """A picture of the prompt, or one frame of a clip.

    Attributes:
        name: short name of its source.
        medium: number of its `<image>` or `<video>` in the prompt, from 1; frames of one clip share it.
        frame: number of the frame among those that were read, from 1; None for a picture.
        seconds: of the frame in its clip; None for a picture, or if the clip tells no times.
        width: in pixels.
        height: in pixels.
        views: in the order in which the vision encoder reads them.
        image: the picture, upright RGB; of a large photograph, at a smaller size than `width` and `height`.
    """

    name: str
    medium: int
    frame: int | None
    seconds: float | None
    width: int
    height: int
    views: tuple[View, ...]
    image: Image = field(repr=False, compare=False)


@dataclass(frozen=True)
class HeatMap:
    """Where in a picture one word comes from, by one measure.

    Attention: the part of the word's attention that reaches each cell, from 0 to 1. All cells of all pictures, their
    bars, and the text have 1 together. Occlusion: by how much the word's log-probability falls if a part of the picture
    with the cell is blanked, on average over such parts of 2×2 cells; negative where it rises.

    Attributes:
        word: number of the word in the answer, from 0.
        picture: number of the picture in `Trace.pictures`, from 0.
        measure: "attention" or "occlusion".
        whole: the part of the attention that goes to the whole picture, or the fall if all of it is blanked.
        views: the same of each view of the picture.
        values: of the cells, row after row from the top. The cells divide the picture evenly.
    """

    word: int
    picture: int
    measure: Measure
    whole: float
    views: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    @property
    def rows(self) -> int:
        """Rows of cells."""
        return len(self.values)

    @property
    def columns(self) -> int:
        """Columns of cells."""
        return len(self.values[0])

    @property
    def peak(self) -> tuple[int, int]:
        """Row and column of the largest value; the first one of several."""
        return max(
            ((r, c) for r in range(self.rows) for c in range(self.columns)), key=lambda at: self.values[at[0]][at[1]]
        )


@dataclass(frozen=True)
class LayerShares:
    """To what the words of an answer attend at one layer, or at a gated block before it.

    Attributes:
        layer: number of the decoder layer, from 0.
        kind: "layer" for the language model's own attention, "block" for a gated block before the layer.
        text: for each word, the part of its attention that goes to text, or to what is learned and shows nothing: the
            newlines between rows of tiles. In a block, there is no text.
        pictures: for each word, the part that goes to each picture; with `text`, they sum to 1.
    """

    layer: int
    kind: Literal["layer", "block"]
    text: tuple[float, ...]
    pictures: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Gate:
    """How far a gate of the fusion is open.

    Attributes:
        layer: number of the decoder layer before which the block runs, from 0; 0 for a gate of no block.
        name: of the gate in its block, such as "attn_gate".
        opening: mean of |tanh(gate)| over the gate's channels, from 0 (closed) to 1.
    """

    layer: int
    name: str
    opening: float


@dataclass(frozen=True)
class Trace:
    """What a model saw while it answered one prompt.

    Attributes:
        model: name of the model, as the user typed it.
        prompt: as `vlm_cli.prompt.format` writes it.
        answer: what the model wrote, without the token that stopped it.
        words: of the answer, in order.
        pictures: of the prompt, in order.
        maps: for each measure that was taken, word and picture.
        layout: which positions each text and each picture of the prompt takes.
        layers: to what the words attend, by layer; of a layer with a block, the block first.
        gates: of the fusion, by layer.
        notes: what could not be measured with this model, and why; each is a sentence.
    """

    model: str
    prompt: str
    answer: str
    words: tuple[Word, ...]
    pictures: tuple[TracedPicture, ...]
    maps: tuple[HeatMap, ...]
    layout: PromptLayout
    layers: tuple[LayerShares, ...] = ()
    gates: tuple[Gate, ...] = ()
    notes: tuple[str, ...] = ()

    def map(self, word: int, picture: int, measure: Measure) -> HeatMap | None:
        """Return the map of a word over a picture; None if it was not measured."""
        return self._by_place.get((word, picture, measure))

    def scale(self, word: int, measure: Measure) -> float:
        """Return the value that gets the full colour where the maps of a word are shown, the same for all pictures.

        It is the largest size of a value in them, or a size below which differences mean nothing.
        """
        maps = (self.map(word, picture, measure) for picture in range(len(self.pictures)))
        sizes = [abs(x) for found in maps if found is not None for row in found.values for x in row]
        return max([_LEAST[measure], *sizes])

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The measures that were taken."""
        taken = {found.measure for found in self.maps}
        return tuple(measure for measure in MEASURES if measure in taken)

    @cached_property
    def _by_place(self) -> dict[tuple[int, int, Measure], HeatMap]:
        return {(found.word, found.picture, found.measure): found for found in self.maps}

    def as_json(self) -> dict[str, Any]:
        """Return everything but the pixels of the pictures; numbers have four significant digits."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            "answer": self.answer,
            "words": [_word_to_dict(word) for word in self.words],
            "pictures": [_picture_to_dict(picture) for picture in self.pictures],
            "maps": [_rounded(asdict(found) | {"peak": found.peak}) for found in self.maps],
            "layout": self.layout.to_dict(),
            "layers": [_rounded(asdict(layer)) for layer in self.layers],
            "gates": [_rounded(asdict(gate)) for gate in self.gates],
            "notes": list(self.notes),
        }


def _word_to_dict(word: Word) -> dict[str, Any]:
    return _rounded(
        {
            "text": word.text,
            "probability": word.probability,
            "log_probability": word.log_probability,
            "alternatives": [asdict(x) for x in word.alternatives],
            "tokens": [asdict(token) for token in word.tokens],
        }
    )


def _picture_to_dict(picture: TracedPicture) -> dict[str, Any]:
    facts = {name: x for name, x in vars(picture).items() if name not in ("image", "views")}
    return _rounded(facts | {"views": [asdict(view) for view in picture.views]})


def _rounded(value: Any) -> Any:
    """Round each float in plain data, and make lists of tuples."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    return [_rounded(x) for x in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
