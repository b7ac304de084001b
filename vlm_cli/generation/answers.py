"""Answer many rows: rows of similar length together, and each image through the vision encoder once.

B rows of a batch, T_txt tokens, T_img media per row, F frames, C H W pixels, n vision tokens of d channels.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from vlm_cli.errors import VLMError, is_out_of_memory
from vlm_cli.generation.batch_media import BatchMedia, count_token_bytes
from vlm_cli.generation.batch_size import BatchSize
from vlm_cli.generation.choosing import RowChooser
from vlm_cli.generation.images import ImageCache, Preprocessor, with_images
from vlm_cli.generation.plan import GenerationPlan, ignore_message
from vlm_cli.generation.rows import Row
from vlm_cli.generation.slot_choice import find_setting_problem, find_slot_problem, make_chooser, make_step
from vlm_cli.generation.slot_queue import SlotQueue
from vlm_cli.generation.slots import Slots
from vlm_cli.media import MediaLoader
from vlm_cli.media.notes import NoteTally
from vlm_cli.modeling.batching import pad_left
from vlm_cli.modeling.prompt_cache import PromptCache
from vlm_cli.printable import count_of
from vlm_cli.tiling import MediumSize

if TYPE_CHECKING:
    pass

__all__ = ["Counts", "RowAnswerer"]

LOOKAHEAD_BATCHES = 8  # batches of rows among which the engine looks for rows of similar length
#: Arguments of `VLM.generate` that read a prompt and say what its first token may be.
FIRST_TOKEN = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
#: The same for a model that is to have a static cache: slots have it, not the prompts.
FIRST_TOKEN_ALONE = FIRST_TOKEN | {"cache_implementation": "dynamic", "disable_compile": True}
CACHE_BYTES = 2**30  # bytes of images, or of their vision tokens, that wait for the model or may be shown again

AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass
class Counts:
    """What the engine has done.

    Attributes:
        rows: that the model answered.
        new_tokens: of all answers.
        images: that rows show.
        encoded: images that passed the vision encoder; fewer, because rows show some images again.
        reused: positions that rows share with others and the model computed once.
        decoded: positions that the model computed for new tokens, those of rows that were over included.
        seconds: that the model took.
        waited: seconds in which the model waited for rows and their images.
    """

    rows: int = 0
    new_tokens: int = 0
    images: int = 0
    encoded: int = 0
    reused: int = 0
    decoded: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class RowAnswerer:
    """The engine that answers many rows at once, and returns them in their order.

    A row that ends makes room for another (`SlotQueue`). Where the language model, the fusion or the settings do not
    allow that, rows are answered in batches, each of which takes as long as its longest answer.

    But for rounding, the answer to a row does not depend on the other rows of its batch.

    Args:
        plan: how the model answers.
        size: how many rows are answered at once.
        seed: of samples; without a seed, every run gives other samples.
        notify: receives what the user should know.

    Attributes:
        counts: what was done so far.
        picture_notes: what became of the pictures so far.
        max_images: images, or frames of clips, that waiting rows may hold together, roughly.
    """

    def __init__(
        self,
        plan: GenerationPlan,
        size: BatchSize,
        *,
        seed: int | None = None,
        notify: Callable[[str], None] = ignore_message,
    ) -> None:
        self.plan, self.model, self.seed, self.notify = plan, plan.model, seed, notify
        self.counts = Counts()
        self.picture_notes = NoteTally()
        keywords = plan.keywords
        self.num_answers: int = keywords["num_return_sequences"]
        sequences = max(keywords["num_beams"], self.num_answers)
        # A repetition penalty reads padding too, which may be a token that counts.
        self.chooser = RowChooser(plan, sequences=sequences, pads=keywords["repetition_penalty"] == 1)
        self.size = BatchSize(1) if self.chooser.most == 1 else size
        self.media = BatchMedia(self.model)
        # For what rows begin with in common, such as the examples of few-shot prompts.
        has_own = self.model.generation_config.cache_implementation is not None  # Transformers makes these caches alone
        shares = self.media.encodes_apart and sequences == 1 and self.chooser.most != 1 and not has_own
        self.prompt_cache = PromptCache() if shares else None
        self.queue = self._make_queue()
        channels, height, width = plan.processor.image_processor.frame_shape
        image_bytes = max(4 * channels * height * width, count_token_bytes(self.model, MediumSize()))
        self.max_images = max(1, CACHE_BYTES // image_bytes)

    def answer(self, rows: Iterator[AnyRow], loader: MediaLoader, *, workers: int = 0) -> Generator[AnyRow]:
        """Yield each row when the row and all before it are done; a few batches of rows wait at any time.

        Args:
            rows: encoded, with room reserved; those with an error pass through.
            loader: finds images.
            workers: processes that decode images ahead of the model; 0 decodes in this process.
        """
        preprocessor = Preprocessor(self.plan.processor.image_processor, loader)
        waiting: deque[AnyRow] = deque()
        with closing(
            with_images(rows, ImageCache(self.max_images), preprocessor, workers, self.picture_notes)
        ) as ready:
            while True:
                self._fill(waiting, ready)
                if not waiting:
                    return
                if self.queue is not None:
                    self._go_on(self.queue)
                elif not waiting[0].is_done:
                    # Where the context ends an answer, rows of one length end together.
                    equal = [row for row in waiting if not row.is_done and row.room == waiting[0].room]
                    self._answer(self.chooser.choose(equal, self.size.rows))
                while waiting and waiting[0].is_done:
                    done = waiting.popleft()
                    done.images = []  # whoever keeps the row keeps no vision tokens; the cache has those of late
                    yield done

    def _make_queue(self) -> SlotQueue | None:
        """Make the queue for slots; None where rows are answered in batches."""
        if (problem := find_setting_problem(self.plan) or find_slot_problem(self.model)) is not None:
            if self.size.rows > 1:
                self.notify(f"Note: {problem}, so each batch of rows takes as long as its longest answer.")
            return None
        choose, make = make_chooser(self.plan, self.seed), partial(make_step, self.model)
        slots = Slots(self.model, make, choose, lambda row, ids, newest: self.plan.is_over(row.ids, ids, newest))
        return SlotQueue(slots, self.size, self.chooser)

    @torch.inference_mode()
    def _go_on(self, queue: SlotQueue) -> None:
        """Let rows that wait take free slots, or write the next tokens of those that have one."""
        started, rows = time.monotonic(), queue.choose()
        told = FIRST_TOKEN if self.model.generation_config.cache_implementation is None else FIRST_TOKEN_ALONE
        try:
            over = queue.seat(rows, self._run(rows, **told)) if rows else queue.write()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self.counts.seconds += time.monotonic() - started
            if over is None:
                self._answer(rows)
            for seat in over or ():
                self._note_answers(seat.row, [seat.tokens])
            self.counts.decoded += queue.take_decoded()
            return
        # The `except` block is over, so Python has dropped the error and the tensors that its traceback held.
        self._free_cached()
        number = queue.retreat(rows)
        if number == 1:
            self._refuse([*rows, *queue.waiting][0])
        else:
            self._tell_less(number)

    def _fill(self, waiting: deque[AnyRow], rows: Iterator[AnyRow]) -> None:
        started = time.monotonic()
        images = sum(size.num_frames for row in waiting for size in row.media)
        while len(waiting) < LOOKAHEAD_BATCHES * self.size.rows and (not waiting or images < self.max_images):
            row = next(rows, None)
            if row is None:
                break
            waiting.append(row)
            if self.queue is not None:
                self.queue.add(row)
            images += sum(size.num_frames for size in row.media)
        self.counts.waited += time.monotonic() - started

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
        # The `except` block is over, so Python has dropped the error and the tensors that its traceback held.
        self._free_cached()
        if len(rows) == 1:
            self._refuse(rows[0])
            return
        self.size.halve(len(rows))
        self._tell_less(len(rows))
        half = (len(rows) + 1) // 2
        self._answer(rows[:half])
        self._answer(rows[half:])

    def _free_cached(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _refuse(self, row: Row) -> None:
        sizes = ((row.positions, "position"), (len(row.images), "image"), (row.room, "new token"))
        needed = ", ".join(count_of(number, noun) for number, noun in sizes)
        row.error = VLMError(f"memory does not suffice for this row alone ({needed}).")

    def _tell_less(self, rows: int) -> None:
        self.notify(f"Note: memory does not suffice for {rows} rows at once; continuing with {self.size.rows}.")

    def _run(self, rows: Sequence[Row], **keywords: Any) -> Any:
        """Call `VLM.generate` for rows, with more keywords than those of the plan."""
        ids, mask = pad_left([row.ids for row in rows], self.plan.processor.tokenizer.pad_token_id)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **self.media.arguments(rows)}
        output = self.model.generate(**inputs, **self.plan.keywords | keywords, prompt_cache=self.prompt_cache)
        if self.prompt_cache is not None:
            self.counts.reused += len(rows) * self.prompt_cache.reused
        self.counts.images += sum(len(row.images) for row in rows)
        self.counts.encoded = self.media.encoded
        return output

    @torch.inference_mode()
    def _generate(self, rows: Sequence[Row]) -> None:
        if self.seed is not None:
            from transformers import set_seed

            set_seed((self.seed + rows[0].line) % 2**32)  # the same in a run that resumes here
        length = max(len(row.ids) for row in rows)
        output = self._run(rows, max_new_tokens=rows[0].room, stopping_criteria=self.plan.stopping_criteria())
        new = output[:, length:].tolist()
        self.counts.decoded += output[:, length:].numel()
        for b, row in enumerate(rows):
            self._note_answers(row, new[b * self.num_answers : (b + 1) * self.num_answers])

    def _note_answers(self, row: Row, answers: Sequence[Sequence[int]]) -> None:
        """Read the answers of a row from what the model wrote."""
        row.answers = [self.plan.read(row.ids, ids, row.room) for ids in answers]
        self.counts.rows += 1
        self.counts.new_tokens += sum(answer.new_tokens for answer in row.answers)
