"""`Workload`: a prompt by its sizes alone, which costs can be counted for."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_cli.errors import PromptError, UsageError
from vlm_cli.modeling.budget import ContextBudget
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of
from vlm_cli.tiling import MediumSize, plan
from vlm_cli.tiling.texts import list_shapes

__all__ = ["Workload", "measure_medium"]


@dataclass(frozen=True)
class Workload:
    """Pictures, and a text after them.

    Attributes:
        pictures: number of media, which stand before the text.
        text: tokens of the text, at least one.
        size: (width, height) of each picture in pixels, which decides how it is cut into tiles; None for a picture of
            one view.
        tiles: number of tiles of each picture, instead of `size`; None for what `size` says.
        frames: of each medium; more than one makes clips of them.
        rows: equal prompts in a batch.
    """

    pictures: int = 1
    text: int = 64
    size: tuple[int, int] | None = None
    tiles: int | None = None
    frames: int = 1
    rows: int = 1

    def __post_init__(self) -> None:
        for name, least in (("pictures", 0), ("text", 1), ("frames", 1), ("rows", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.size is not None and min(self.size) < 1:
            raise UsageError(f"a picture has at least 1x1 pixels, got {self.size[0]}x{self.size[1]}.")
        if sum((self.size is not None, self.tiles is not None, self.frames > 1)) > 1:
            raise UsageError(
                "size, tiles and frames exclude each other: a clip is not cut into tiles. Give one of them."
            )

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, one for each medium among them."""
        return self.pictures + self.text


def measure_medium(model: VLM, workload: Workload) -> MediumSize:
    """Say how many views each medium of a workload has.

    Args:
        model: on any device; shapes are enough.
        workload: the prompt.

    Raises:
        UsageError: if the model cuts no picture into so many tiles.
        PromptError: if the vision tokenizer cannot take so many media or frames.
        MediaError: if a picture is too thin to be cut.
    """
    tiling, tile = model.config.composition.tiling, model.vision_encoder.image_size[::-1]
    size = MediumSize(workload.frames)
    if workload.tiles is not None:
        shapes = {shape.rows * shape.columns or 1: shape for shape in list_shapes(tiling, tile)[::-1]}
        if workload.tiles not in shapes:
            known = ", ".join(map(str, sorted(shapes)))
            raise UsageError(
                f"the composition cuts no picture into {count_of(workload.tiles, 'tile')}. It can be {known}. Choose "
                "one of these, or another tiling: --set tiling.type=grid."
            )
        size = shapes[workload.tiles]
    elif workload.size is not None:
        size = plan(tiling, tile, *workload.size).size
    if workload.pictures:
        problem = ContextBudget.of(model).media_problem([size] * workload.pictures)
        if problem:
            raise PromptError(f"the prompt {problem}")
    return size
