"""`ContextBudget`: how many positions of the language model a prompt takes, and how many are left for an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_cli.errors import PromptError
from vlm_cli.modeling.language_model import context_length
from vlm_cli.printable import count_of
from vlm_cli.tiling.texts import list_shapes

if TYPE_CHECKING:
    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.tiling import MediumSize

__all__ = ["ContextBudget"]


@dataclass(frozen=True)
class ContextBudget:
    """Count the positions of prompts for one model.

    A prompt's tokens take one position each, except `<image>`: it takes as many as the fusion gives its medium. In the
    language stream, with a linear tokenizer over 4 patches, `a <image> b` with a clip of 2 frames is 3 tokens and takes
    1 + 8 + 1 = 10 positions. Cross-attention leaves each `<image>` at one position.

    Attributes:
        model: on any device; shapes are enough.
        context: positions that the language model can read; None if its configuration sets no limit.
        max_num_media: media that the vision tokenizer takes in one prompt; None if it sets no limit.
        max_num_frames: frames that it takes of one medium; None if it sets no limit.
    """

    model: VLM
    context: int | None
    max_num_media: int | None
    max_num_frames: int | None = None

    @classmethod
    def of(cls, model: VLM) -> ContextBudget:
        """Read the limits of a model from its configuration."""
        options = model.config.composition.vision_tokenizer.options
        media, frames = (getattr(options, name, None) for name in ("max_num_media", "max_num_frames"))
        return cls(model, context_length(model.config), media, frames)

    def positions(self, num_tokens: int, media: Iterable[MediumSize]) -> int:
        """Count the positions of a prompt.

        Args:
            num_tokens: tokens of the prompt, with one `<image>` for each medium.
            media: the size of each medium.
        """
        return num_tokens + sum(self.model.positions_of(medium) - 1 for medium in media)

    def positions_together(self, rows: Sequence[tuple[int, int]]) -> int:
        """Count the positions of each row of a batch, after padding.

        The batch is padded to one number of tokens before each `<image>` is repeated, and to one number of positions
        after that.

        Args:
            rows: tokens and positions of each row alone.
        """
        return max(tokens for tokens, _ in rows) + max(positions - tokens for tokens, positions in rows)

    def left(self, positions: int) -> int | None:
        """Count the positions after a prompt of so many; negative if the prompt is too long, None without a limit."""
        return None if self.context is None else self.context - positions

    def room(self, positions: int, wanted: int, media: Sequence[MediumSize] = ()) -> int:
        """Return how many of `wanted` new tokens fit after a prompt of so many positions.

        Args:
            positions: of the prompt.
            wanted: new tokens.
            media: the size of each medium of the prompt, for the message.

        Raises:
            PromptError: if none fits.
        """
        left = self.left(positions)
        if left is None:
            return wanted
        if left < 1:
            raise PromptError(
                f"the prompt takes {positions} positions, but the language model has {self.context}. Shorten it, or "
                f"use fewer images; `vlm inspect --prompt` shows what each costs.{self.tiles_hint(positions, media)}"
            )
        return min(left, wanted)

    def media_problem(self, media: Sequence[MediumSize]) -> str | None:
        """Say why the vision tokenizer cannot take these media in one prompt; None if it can."""
        if self.max_num_media is not None and len(media) > self.max_num_media:
            return (
                f"has {count_of(len(media), 'image')}, but the vision tokenizer was made for at most "
                f"{self.max_num_media}."
            )
        return self.frames_problem(media)

    def frames_problem(self, media: Sequence[MediumSize]) -> str | None:
        """Say why the vision tokenizer cannot take so many frames of one medium; None if it can."""
        most = max((size.num_frames for size in media), default=0)
        if self.max_num_frames is not None and most > self.max_num_frames:
            if any(size.rows and size.num_frames == most for size in media):
                return (
                    f"has a picture of {most} views, but the vision tokenizer was made for at most "
                    f"{self.max_num_frames}. Allow fewer tiles with --max-tiles."
                )
            return (
                f"has a medium of {most} frames, but the vision tokenizer was made for at most {self.max_num_frames}. "
                f"Write <video:FILE?frames={self.max_num_frames}>."
            )
        return None

    def check_media(self, media: Sequence[MediumSize]) -> None:
        """Refuse a prompt with more media, or more frames of one, than the vision tokenizer takes.

        Raises:
            PromptError: with both numbers.
        """
        if problem := self.media_problem(media):
            raise PromptError(f"the prompt {problem}")

    def problem(self, num_tokens: int, media: Sequence[MediumSize]) -> str | None:
        """Say why the model cannot read a row; None if it can.

        Args:
            num_tokens: tokens of the row, with one `<image>` for each medium.
            media: the size of each medium.
        """
        if problem := self.media_problem(media):
            return problem
        positions = self.positions(num_tokens, media)
        left = self.left(positions)
        if left is None or left >= 0:
            return None
        of_media = positions - num_tokens + len(media)
        return (
            f"takes {positions} positions ({of_media} of them for {count_of(len(media), 'image')}), but the language "
            f"model has {self.context}. Shorten it.{self.tiles_hint(positions, media)}"
        )

    def tiles_hint(self, positions: int, media: Sequence[MediumSize]) -> str:
        """Say how many tiles of each picture would fit, after a space; "" if no tiles are to blame, or none fits.

        Args:
            positions: of the prompt, too many.
            media: the size of each medium.
        """
        count, tiling = self.model.positions_of, self.model.config.composition.tiling
        tiled = [size for size in media if size.rows]
        if not tiled or self.context is None:
            return ""
        others = positions - sum(count(size) for size in tiled)
        shapes = list_shapes(tiling, self.model.vision_encoder.image_size[::-1])
        numbers = sorted({size.rows * size.columns for size in shapes if size.rows})
        fitting = [
            most
            for most in numbers
            if others + len(tiled) * max(count(size) for size in shapes if size.rows * size.columns <= most)
            < self.context
        ]
        return (
            f" {count_of(fitting[-1], 'tile')} of each picture would fit: --max-tiles {fitting[-1]}." if fitting else ""
        )
