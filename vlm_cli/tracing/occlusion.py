"""Occlusion: by how much each token of an answer becomes less likely when a part of a picture is blanked.

The answer stays as it is (teacher forcing). What is blanked has the mean colour of the preprocessing, which is zero in
the pixels that the vision encoder reads. Source: Visualizing and Understanding Convolutional Networks
(https://arxiv.org/abs/1311.2901, section 4.2). As there, a square that is larger than its step slides over the picture:
of 2×2 cells, from cell to cell. A single cell often hides too little of a thing to matter.

N rows, of which the first shows the picture as it is; A tokens of the answer, L positions of the language model, T_img
media, n vision tokens per medium, F views of a medium, C H W pixels, d channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_cli.errors import is_out_of_memory
from vlm_cli.media import LoadedClip
from vlm_cli.modeling.batching import stack_media
from vlm_cli.modeling.conditioning import count_media
from vlm_cli.modeling.language_model import NO_CHUNKED_PREFILL
from vlm_cli.modeling.prompt_cache import MIN_SHARED_POSITIONS, is_plain
from vlm_cli.preprocessing import three
from vlm_cli.tracing.geometry import divide

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlm_cli.processor import VLMProcessor
    from vlm_cli.tracing.media import TracedMedia

__all__ = ["Falls", "Occlusion", "list_windows", "log_probabilities"]

_MOST_ROWS = 16
_MOST_POSITIONS = 8192  # of all rows of a batch


@dataclass(frozen=True)
class Falls:
    """By how much the log-probabilities of an answer's tokens fall, for one picture.

    Attributes:
        whole: float[A], if the picture is blanked.
        views: float[A, views of the picture], if one view is blanked, and the others are not.
        cells: float[A, rows, columns], for each cell the mean over the windows that blank it, in all views.
    """

    whole: Tensor
    views: Tensor
    cells: Tensor


class Occlusion:
    """Blanks parts of the pictures of one prompt.

    Args:
        media: of the prompt.
        processor: of the model.
        prompt: tokens of the prompt, with one `<image>` for each medium.
        answer: tokens of the answer, A of them.
        cells: along a picture's longer side.
    """

    def __init__(
        self,
        media: TracedMedia,
        processor: VLMProcessor,
        prompt: Sequence[int],
        answer: Sequence[int],
        cells: int,
    ) -> None:
        self.media, self.model, self.processor = media, media.model, processor
        self.prompt, self.answer, self.cells = prompt, answer, cells
        self.most_rows = _MOST_ROWS
        self._prefix: tuple[int, int, Any] | None = None  # medium, positions and cache of what stands before it

    @property
    def total(self) -> int:
        """How many times a part of a picture is blanked."""
        return sum(self._count_parts(picture) for picture in range(len(self.media.pictures)))

    def _count_parts(self, picture: int) -> int:
        views = len(self.media.pictures[picture].views)
        return 1 + (views if views > 1 else 0) + len(list_windows(*self._divide(picture)))

    def _divide(self, picture: int) -> tuple[int, int]:
        found = self.media.pictures[picture]
        return divide(found.width, found.height, self.cells)

    def measure(self, report: Callable[[int], None] = lambda done: None) -> list[Falls]:
        """Blank all parts of all pictures, one after the other.

        Args:
            report: receives the number of parts that are done.
        """
        found, done = [], 0
        for picture in range(len(self.media.pictures)):
            falls = []
            parts = self._blank_parts(picture)
            while chunk := list(islice(parts, self._rows - 1)):
                falls.append(self._fall(self._medium_of(picture), chunk))
                done += len(chunk)
                report(done)
            found.append(self._read(picture, torch.cat(falls)))
        return found

    def _read(self, picture: int, falls: Tensor) -> Falls:
        """Name the falls, float[parts, A]."""
        rows, columns = self._divide(picture)
        windows = list_windows(rows, columns)
        views, of_windows = falls[1 : -len(windows)], falls[-len(windows) :]
        cells = torch.zeros(falls.shape[1], rows, columns)
        times = torch.zeros(rows, columns)  # that each cell was blanked
        for (down, across), fall in zip(windows, of_windows, strict=True):
            cells[:, down, across] += fall[:, None, None]
            times[down, across] += 1
        return Falls(falls[0], (views if len(views) else falls[:1]).T, cells / times)

    # -- pixels -------------------------------------------------------------------------------------------------------

    def _medium_of(self, picture: int) -> int:
        return self.media.pictures[picture].medium - 1

    def _blank_parts(self, picture: int) -> Iterator[Tensor]:
        """Yield the views of a picture's medium, float[F, C, H, W]: all of it blanked, then each view, each window."""
        medium = self._medium_of(picture)
        views = self.media.pixels[medium].views
        own = [i for i, shown in enumerate(self.media.views_of(medium)) if shown == picture]
        for blanked in [own, *([[i] for i in own] if len(own) > 1 else [])]:
            changed = views.clone()
            changed[blanked] = 0
            yield changed
        for image in self._blank_windows(picture):
            yield self._read_image(medium, own, image)

    def _read_image(self, medium: int, own: Sequence[int], image: Image) -> Tensor:
        images, loaded = self.processor.image_processor, self.media.loaded[medium]
        if not isinstance(loaded, LoadedClip):
            return images.cut(image, loaded.width, loaded.height)
        changed = self.media.pixels[medium].views.clone()
        changed[list(own)] = images.read_frames([image])
        return changed

    def _blank_windows(self, picture: int) -> Iterator[Image]:
        found = self.media.pictures[picture]
        rows, columns = self._divide(picture)
        color = tuple(round(255 * x) for x in three(self.processor.image_processor.preprocessing.config.mean))
        width, height = found.image.size  # of a large photograph, which may have been read at a smaller size
        for down, across in list_windows(rows, columns):
            left, right = width * across.start / columns, width * across.stop / columns
            top, bottom = height * down.start / rows, height * down.stop / rows
            image = found.image.copy()
            image.paste(color, (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
            yield image

    # -- log-probabilities --------------------------------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        """Rows of a batch, at least two: the picture as it is, and with a part blanked."""
        return max(2, min(self.most_rows, _MOST_POSITIONS // self._ids.shape[1]))

    @cached_property
    def _ids(self) -> Tensor:
        """int[1, L], the prompt and the answer over the positions of the language model."""
        lang_x = torch.tensor([[*self.prompt, *self.answer]], device=self.model.device)
        media = self.media
        with self.model.conditioned(lang_x, media.tokens, None, media.mask, media.grid) as inputs:
            return inputs["input_ids"]

    def _fall(self, medium: int, parts: Sequence[Tensor]) -> Tensor:
        """Return by how much the log-probabilities of the tokens fall: float[parts, A]."""
        try:
            found = self._score(medium, [self.media.pixels[medium].views, *parts])
            return found[:1] - found[1:]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(parts) == 1:
                raise
        # The `except` block is over, so Python has dropped the tensors that its traceback held.
        self.most_rows = (len(parts) + 1) // 2 + 1
        half = len(parts) // 2
        return torch.cat([self._fall(medium, parts[:half]), self._fall(medium, parts[half:])])

    def _score(self, medium: int, shown: Sequence[Tensor]) -> Tensor:
        """Return the log-probabilities of the answer's tokens, float[N, A], for other views of one medium."""
        model, num, answer = self.model, len(shown), len(self.answer)
        tokens, mask = self._encode(medium, shown), self.media.mask.expand(num, -1, -1)
        start, cache = self._read_prefix(medium)
        ids, counts = self._ids, count_media(self._ids, model.config.media_token_id)
        options: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(num)
            options = {"use_cache": True, "past_key_values": cache}
        if model.sees_ahead == "prompt":
            in_prompt = torch.arange(ids.shape[1], device=ids.device) < ids.shape[1] - answer
            options["prefix_mask"] = in_prompt.expand(num, -1)
        logits = model(
            lang_x=ids[:, start:].expand(num, -1),
            media=model.project_media(tokens, mask),
            media_mask=mask,
            media_counts=counts[:, start:].expand(num, -1),
            logits_to_keep=answer + 1,
            **options,
        ).logits
        return log_probabilities(model, logits, self.answer)[1]

    def _encode(self, medium: int, shown: Sequence[Tensor]) -> Tensor:
        """Return the vision tokens of all media of N rows, which differ in one medium: float[N, T_img, n, d]."""
        media, model, num = self.media, self.model, len(shown)
        if model.encodes_media_independently:
            grid = None if media.grid is None else media.grid[:, medium : medium + 1].expand(num, -1, -1)
            found, _ = model.encode_vision(torch.stack(list(shown))[:, None].to(model.device), None, grid)
            tokens = media.tokens.expand(num, -1, -1, -1).clone()
            tokens[:, medium, : found.shape[2]] = found[:, 0, : tokens.shape[2]]
            return tokens
        rows = [[x.views if t != medium else own for t, x in enumerate(media.pixels)] for own in shown]
        views, mask = stack_media(rows)
        grid = None if media.grid is None else media.grid.expand(num, -1, -1)
        return model.encode_vision(views.to(model.device), mask.to(model.device), grid)[0]

    def _read_prefix(self, medium: int) -> tuple[int, Any]:
        """Let the language model read what stands before a medium, once: the number of positions, and their cache.

        0 and None where that would give another result, or saves too little.
        """
        if self._prefix is None or self._prefix[0] != medium:
            self._prefix = (medium, *self._make_prefix(medium))
        return self._prefix[1:]

    def _make_prefix(self, medium: int) -> tuple[int, Any]:
        model, media, ids = self.model, self.media, self._ids
        counts = count_media(ids, model.config.media_token_id)
        before = int(media.mask[0, :medium].sum()) if model.splices_media else medium
        start = int((counts[0] <= before).sum())
        sees_on = model.sees_ahead == "prompt" or model.reads_before_media
        kind = model.lang_model.config.model_type
        if start < MIN_SHARED_POSITIONS or sees_on or kind in NO_CHUNKED_PREFILL:
            return 0, None
        output = model(
            lang_x=ids[:, :start],
            media=model.project_media(media.tokens, media.mask),
            media_mask=media.mask,
            media_counts=counts[:, :start],
            use_cache=True,
        )
        cache = model.lm_interface.cache_in(output)
        return (start, cache) if is_plain(cache) else (0, None)


def list_windows(rows: int, columns: int) -> list[tuple[slice, slice]]:
    """List the places of a window of 2×2 cells that slides over a grid, and beyond its edges by one cell.

    >>> [(x.start, x.stop) for x, _ in list_windows(3, 1)]
    [(0, 1), (0, 2), (1, 3), (2, 3)]
    """

    def places(cells: int) -> list[slice]:
        ends = dict.fromkeys((max(0, i), min(cells, i + 2)) for i in range(-1, cells))
        return [slice(*end) for end in ends]

    return [(down, across) for down in places(rows) for across in places(columns)]


def log_probabilities(model: Any, logits: Tensor, answer: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Turn logits of the language model into log-probabilities; `<image>`, which is never written, has none.

    Args:
        model: the VLM.
        logits: float[N, *, V], the last A + 1 of which are those before the tokens of the answer and after it.
        answer: its A tokens.

    Returns:
        float[N, A, V] of all tokens, and float[N, A] of those of the answer, in float32 on the CPU.
    """
    kept = logits[:, -len(answer) - 1 : -1].float()
    kept[..., model.config.media_token_id] = -math.inf
    found = kept.log_softmax(-1).cpu()
    ids = torch.tensor(answer).expand(len(found), -1)[..., None]
    return found, found.gather(-1, ids)[..., 0]
