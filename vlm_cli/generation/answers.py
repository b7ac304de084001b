"""Rows to answers, many at a time: rows of like length together, each image through the vision encoder once.

B rows of a batch, T_txt tokens, T_img media per row, C H W pixels, n vision tokens of d channels.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_cli.generation.batch_size import BatchSize, RowCost, available_memory, is_out_of_memory
from vlm_cli.generation.decoder import Decoder
from vlm_cli.generation.encoded_image import EncodedImage
from vlm_cli.generation.rows import Row
from vlm_cli.modeling.batching import pad_left, stack_media
from vlm_cli.modeling.language_model import NO_LEFT_PADDING
from vlm_cli.modeling.prompt_cache import PromptCache

__all__ = ["Counts", "RowAnswerer", "token_bytes"]

#: Types whose rows Transformers itself cannot generate together.
ONE_AT_A_TIME = {
    "rwkv": "the state of one row is carried over to others",
    "xlstm": "its state has one row",
}
LOOKAHEAD_BATCHES = 8  # batches that are looked at for rows of like length
ENCODE_BATCH = 16  # images that the vision encoder reads at once


@dataclass
class Counts:
    """What was done; `images` were shown, and `encoded` of them passed the vision encoder."""

    rows: int = 0
    new_tokens: int = 0
    images: int = 0
    encoded: int = 0
    reused: int = 0  # positions that rows share with others, read once
    seconds: float = 0.0  # of the model


class RowAnswerer:
    """Answers rows, and hands them on in their order.

    Args:
        decoder: of the model.
        size: rows at once.
        seed: of samples; None draws others each time.
        max_images: that waiting rows may hold together, about.
        notify: is told what the user should know.
    """

    def __init__(
        self,
        decoder: Decoder,
        size: BatchSize,
        *,
        seed: int | None = None,
        max_images: int = 1000,
        notify: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.decoder, self.model, self.seed = decoder, decoder.model, seed
        kind = self.model.lang_model.config.model_type
        self.size = BatchSize(1) if kind in ONE_AT_A_TIME else size
        self.max_images, self.notify = max_images, notify
        self.counts = Counts()
        keywords = decoder.keywords
        self.sequences: int = keywords["num_return_sequences"]
        self.cost = RowCost(self.model, max(keywords["num_beams"], self.sequences))
        self.apart: bool = getattr(self.model.vision_tokenizer, "encodes_media_independently", False)
        # The penalty reads padding too, which may be a token that counts.
        self.pads = kind not in NO_LEFT_PADDING and keywords["repetition_penalty"] == 1
        # What rows begin with alike, such as the shots of few-shot prompts.
        one_each = keywords["num_beams"] == self.sequences == 1 and kind not in ONE_AT_A_TIME
        self.prompt_cache = PromptCache() if self.apart and one_each else None

    def answer(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Each row, when it and all before it are done; a few batches of them wait at any time."""
        waiting: deque[Row] = deque()
        while True:
            self._fill(waiting, rows)
            if not waiting:
                return
            if not waiting[0].is_done:
                self._answer(self._choose([row for row in waiting if not row.is_done]))
            while waiting and waiting[0].is_done:
                yield waiting.popleft()

    def _fill(self, waiting: deque[Row], rows: Iterator[Row]) -> None:
        images = sum(len(row.images) for row in waiting)
        while len(waiting) < LOOKAHEAD_BATCHES * self.size.rows and (not waiting or images < self.max_images):
            row = next(rows, None)
            if row is None:
                return
            waiting.append(row)
            images += len(row.images)

    def _choose(self, rows: Sequence[Row]) -> list[Row]:
        """The first row, so that none waits for long, and those that are nearest to it in length."""
        first = rows[0]

        def distance(row: Row) -> int:
            more, first_more = row.positions - len(row.ids), first.positions - len(first.ids)  # for media
            return abs(len(row.ids) - len(first.ids)) + abs(more - first_more)

        # Where the context ends an answer, rows of one length end together.
        fitting = [row for row in rows if row.room == first.room and (self.pads or not distance(row))]
        chosen = sorted(fitting, key=distance)[: self.size.rows]
        memory = available_memory(self.model.device) / 2
        while len(chosen) > 1 and not self._fits(chosen, memory):
            chosen.pop()
        return chosen

    def _fits(self, rows: Sequence[Row], memory: float) -> bool:
        """Whether rows, padded to each other, stay within so many bytes and the context."""
        budget, media = self.decoder.budget, max(len(row.images) for row in rows)
        positions = budget.positions_together([(len(row.ids), row.positions) for row in rows]) + rows[0].room
        left = budget.left(positions)
        if left is not None and left < 0:
            return False
        return len(rows) * self.cost(positions, media * token_bytes(self.model)) <= memory

    def _answer(self, rows: Sequence[Row]) -> None:
        """Answer rows together or, where memory does not suffice, in halves."""
        started = time.monotonic()
        try:
            self._generate(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            seconds = time.monotonic() - started
            self.counts.seconds += seconds
            self.size.record(len(rows), seconds)
            return
        # Here the error is gone, and with it the tensors that its traceback held.
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(rows) == 1:
            row = rows[0]
            row.fail(
                f"memory does not suffice for this row alone ({row.positions} positions, {len(row.images)} images, "
                f"{row.room} new tokens)."
            )
            return
        self.size.halve(len(rows))
        self.notify(f"Note: memory does not suffice for {len(rows)} rows at once; going on with {self.size.rows}.")
        half = (len(rows) + 1) // 2
        self._answer(rows[:half])
        self._answer(rows[half:])

    @torch.inference_mode()
    def _generate(self, rows: Sequence[Row]) -> None:
        length = max(len(row.ids) for row in rows)
        ids, mask = pad_left([row.ids for row in rows], self.decoder.processor.tokenizer.pad_token_id)
        inputs = {"input_ids": ids, "attention_mask": mask, **self._media(rows)}
        if self.seed is not None:
            from transformers import set_seed

            set_seed((self.seed + rows[0].line.number) % 2**32)  # whatever was answered before
        output = self.model.generate(
            **{name: x.to(self.model.device) for name, x in inputs.items()},
            **self.decoder.keywords | {"max_new_tokens": rows[0].room},
            prompt_cache=self.prompt_cache,
        )
        if self.prompt_cache is not None:
            self.counts.reused += len(rows) * self.prompt_cache.reused
        new = output[:, length:].tolist()
        for b, row in enumerate(rows):
            own = new[b * self.sequences : (b + 1) * self.sequences]
            row.sequences = [self.decoder.read(x, row.room) for x in own]
            self.counts.new_tokens += sum(x["new_tokens"] for x in row.sequences)
            self.counts.images += len(row.images)
        self.counts.rows += len(rows)

    def _media(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Arguments of `generate`: vision tokens where they are the same in every row, else pixels."""
        images = [[slot.image for slot in row.images if slot.image is not None] for row in rows]
        distinct = list(dict.fromkeys(image for row in images for image in row))
        if not distinct:
            return {}
        if not self.apart:
            self.counts.encoded += len(distinct)
            pixels, mask = stack_media([[x.pixels[None] for x in row if x.pixels is not None] for row in images])
            return {"pixel_values": pixels, "vision_mask": mask}
        self._encode([image for image in distinct if image.tokens is None])
        tokens, mask = stack_media(
            [[image.tokens for image in row] for row in images], [[image.mask for image in row] for row in images]
        )
        return {"vision_tokens": tokens, "media_mask": mask}

    def _encode(self, images: Sequence[EncodedImage]) -> None:
        """Make vision tokens of pixels, which are then let go; they wait where the memory is larger."""
        for i in range(0, len(images), ENCODE_BATCH):
            some = images[i : i + ENCODE_BATCH]
            pixels = torch.stack([p.pixels for p in some if p.pixels is not None])[:, None, None]  # [k, 1, 1, C, H, W]
            tokens, mask = self.model.encode_vision(pixels.to(self.model.device))
            for image, x, m in zip(some, tokens.cpu(), mask.cpu(), strict=True):
                image.tokens, image.mask, image.pixels = x[0].clone(), m[0].clone(), None
            self.counts.encoded += len(some)


def token_bytes(model: Any) -> int:
    """Bytes of the vision tokens of one image."""
    return model.vision_tokenizer.num_tokens(1) * model.vision_tokenizer.dim_out * model.dtype.itemsize
