"""`Announcement`: what stands in the place of `<image>` where a composition announces views in the text.

With the texts `<img>{views}</img>` and `<row_{row}_col_{column}>{image}` of a tiling, a picture of 1 x 2 tiles with two
vision tokens each (I) becomes, among the text and before cross-attention,

    language stream     <img> <row_1_col_1> I I <row_1_col_2> I I </img>
    cross-attention     <img> <row_1_col_1> I <row_1_col_2> </img>

B batch, T_txt tokens of the prompt, T_img media per row, n vision tokens per medium.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from vlm_cli.errors import CompositionError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.fusion.expansion import ExpandedPrompt, insert_media_ids
from vlm_cli.printable import count_of
from vlm_cli.tiling import MediumSize
from vlm_cli.tiling.texts import list_shapes, list_texts, render

__all__ = ["Announcement", "make_announcement"]


class Announcement:
    """Knows for each size of a medium the ids that stand in the place of its `<image>`.

    Args:
        options: settings of the composition's tiling, which hold the texts.
        texts: the ids of each text that can stand around or between views.
        media_token_id: id of `<image>`.
        count_tokens: counts the vision tokens of a medium.
        splices_media: whether a medium takes a position for each vision token, or one.
    """

    def __init__(
        self,
        options: Any,
        texts: Mapping[str, Sequence[int]],
        media_token_id: int,
        count_tokens: Callable[[MediumSize], int],
        *,
        splices_media: bool,
    ) -> None:
        self.options, self.texts, self.media_token_id = options, texts, media_token_id
        self.count_tokens, self.splices_media = count_tokens, splices_media
        self.ids = lru_cache(maxsize=4096)(self._ids)

    def _ids(self, size: MediumSize) -> tuple[int, ...]:
        """Return the ids that stand in the place of the `<image>` of a medium of this size."""
        runs = render(self.options, size)
        tokens = self.count_tokens(size)
        num_runs = sum(isinstance(run, int) for run in runs)
        ids: list[int] = []
        is_shown = False
        for run in runs:
            if isinstance(run, str):
                ids += self.texts[run]
                continue
            # A single run holds all tokens, also where the vision tokenizer does not give as many for each view.
            num = tokens if num_runs == 1 else tokens * run // size.num_frames
            ids += [self.media_token_id] * (num if self.splices_media else not is_shown)
            is_shown = True
        return tuple(ids)

    def expand(
        self,
        lang_x: Tensor,
        attention_mask: Tensor | None,
        media_mask: Tensor,
        vision_grid: Tensor | None,
        pad_id: int,
    ) -> ExpandedPrompt:
        """Replace each `<image>` of a prompt by the ids of its medium.

        Args:
            lang_x: int[B, T_txt].
            attention_mask: int[B, T_txt], or with a cache int[B, cached positions + T_txt]; None for all ones.
            media_mask: bool[B, T_img, n], true for vision tokens that are not padding.
            vision_grid: int[B, T_img, 4], see `VLM.encode_vision`; None for media without tiles.
            pad_id: id for the positions before a row.

        Raises:
            ValueError: if a medium has other vision tokens than `vision_grid` says.
        """
        counts = media_mask.sum(-1).tolist()  # [B][T_img]
        grids = [[(0, 0, 0, 0)] * len(row) for row in counts] if vision_grid is None else vision_grid.tolist()
        sizes = [
            self._find_size(b, count, grid)
            for b, (row, row_grids) in enumerate(zip(counts, grids, strict=True))
            for count, grid in zip(row, row_grids, strict=True)
            if count
        ]
        is_media = lang_x == self.media_token_id
        return insert_media_ids(lang_x, attention_mask, is_media, [self.ids(size) for size in sizes], pad_id)

    def _find_size(self, row: int, count: int, grid: Sequence[int]) -> MediumSize:
        """Find the size of a medium of so many vision tokens.

        Raises:
            ValueError: if no medium with these tiles has so many.
        """
        rows, columns, height, width = grid
        one, two = self.count_tokens(MediumSize(1)), self.count_tokens(MediumSize(2))
        if rows:
            num_views = rows * columns + (self.options.thumbnail != "none")
        else:
            num_views = 1 if one == two else 1 + (count - one) // (two - one)
        size = MediumSize(num_views, rows, columns, height, width)
        if self.count_tokens(size) != count:
            tiles = f"{rows} x {columns} tiles" if rows else "no tiles"
            raise ValueError(
                f"row {row} has a medium of {count} vision tokens, but vision_grid says that it has {tiles}, which are "
                f"{self.count_tokens(size)}. Give the vision_grid that the processor returned with the pixels."
            )
        return size


def make_announcement(
    config: VLMConfig, tile: tuple[int, int], count_tokens: Callable[[MediumSize], int], *, splices_media: bool
) -> Announcement | None:
    """Make what announces the views of a model; None if its tiling has no text.

    Args:
        config: of the model.
        tile: size of what the vision encoder reads, (width, height) in pixels.
        count_tokens: counts the vision tokens of a medium.
        splices_media: whether a medium takes a position for each vision token, or one.

    Raises:
        CompositionError: if the configuration lacks the tokens of a text, or if the vision tokenizer reads all views
            together and the texts stand between them.
    """
    tiling = config.composition.tiling
    texts = list_texts(tiling, tile)
    if not texts:
        return None
    known = config.tiling_texts or {}
    if missing := [text for text in texts if text not in known]:
        raise CompositionError(
            f"the configuration has no tokens for {missing[0]!r}, a text of its tiling: tiling_texts lists "
            f"{count_of(len(known), 'text')}, and the tiling has {len(texts)}. Build the model again."
        )
    most = max(list_shapes(tiling, tile), key=lambda size: size.num_frames)
    num_runs = sum(isinstance(run, int) for run in render(tiling.options, most))
    if num_runs > 1 and count_tokens(MediumSize(2)) != 2 * count_tokens(MediumSize(1)):
        raise CompositionError(
            "tiling.tile_text stands between the views of a picture, and the vision tokenizer reads all views "
            "together. Set vision_tokenizer.frames to apart (perceiver, qformer) or concatenate (linear, mlp), or give "
            "picture_text alone."
        )
    return Announcement(tiling.options, known, config.media_token_id, count_tokens, splices_media=splices_media)
