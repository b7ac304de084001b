"""How likely a model finds given texts behind prompts: log-probabilities of their tokens.

B rows of a batch, T tokens of a prompt and its continuation, c tokens of a continuation, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from vlm_cli.errors import VLMError, is_out_of_memory
from vlm_cli.generation.batch_media import BatchMedia
from vlm_cli.generation.batch_size import BatchSize
from vlm_cli.generation.images import ImageCache, Preprocessor, with_images
from vlm_cli.generation.rows import Row
from vlm_cli.media.notes import NoteTally
from vlm_cli.modeling.batching import pad_left
from vlm_cli.prompt import Text, TokenBreak

if TYPE_CHECKING:
    from vlm_cli.generation.plan import GenerationPlan
    from vlm_cli.media import MediaLoader

__all__ = ["Likelihood", "LikelihoodScorer"]

_CACHED_FRAMES = 256  # images, or frames of clips, that may be shown again


@dataclass(frozen=True)
class Likelihood:
    """Of a text behind a prompt.

    Attributes:
        log_probability: natural logarithm, of all tokens together.
        num_tokens: of the text.
        is_greedy: whether each token is the likeliest one behind those before it.
    """

    log_probability: float
    num_tokens: int
    is_greedy: bool


@dataclass(eq=False)
class _Task:
    """A prompt, a continuation, and later its likelihood."""

    row: Row
    tokens: list[int]
    found: Likelihood | None = None


class LikelihoodScorer:
    """Rates texts that may follow prompts, several at once; each image passes the vision encoder once.

    Args:
        plan: of the model; its writer has written the prompts.
        size: how many continuations are rated at once.
        notes: counts what becomes of the images.
    """

    def __init__(self, plan: GenerationPlan, size: BatchSize, notes: NoteTally | None = None) -> None:
        self.plan, self.size, self.notes = plan, size, notes or NoteTally()
        self.media = BatchMedia(plan.model)

    def score(
        self,
        rows: Sequence[Row],
        continuations: Sequence[Sequence[str]],
        loader: MediaLoader,
        report: Callable[[int], None] = lambda done: None,
    ) -> list[list[Likelihood]]:
        """Return the likelihood of each continuation of each row.

        A row whose picture cannot be read, or that leaves no room, gets an `error` and an empty list.

        Args:
            rows: encoded; they keep no image.
            continuations: texts for each row, none empty.
            loader: finds images.
            report: receives the number of rows that are done.
        """
        copies = [replace(row, images=[]) for row in rows]
        preprocessor = Preprocessor(self.plan.processor.image_processor, loader)
        results: list[list[_Task]] = []
        waiting: list[_Task] = []
        with closing(with_images(iter(copies), ImageCache(_CACHED_FRAMES), preprocessor, 0, self.notes)) as ready:
            for row, copy, texts in zip(rows, ready, continuations, strict=True):
                results.append([] if copy.error else self._tasks(copy, texts))
                row.error = copy.error
                waiting += results[-1]
                if copy.error:
                    copy.images = []
                if len(waiting) >= self.size.rows:
                    self._rate(waiting)
                    waiting = []
                    report(len(results))
        self._rate(waiting)
        report(len(results))
        return [[task.found for task in tasks if task.found is not None] for tasks in results]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text behind a prompt, as if a special token stood before it."""
        special = self.plan.writer.parse_special_tokens
        return self.plan.processor.encode(
            [TokenBreak(), Text(text)], parse_special_tokens=special, add_special_tokens=False
        )

    def _tasks(self, row: Row, texts: Sequence[str]) -> list[_Task]:
        """Return a task for each continuation; none, and an error of the row, if one leaves no room."""
        tasks = [_Task(row, self.encode(text)) for text in texts]
        longest = max(len(task.tokens) for task in tasks)
        if problem := self.plan.budget.problem(len(row.ids) + longest, row.media):
            row.error = VLMError(f"with the longest of its choices, {problem}")
            return []
        return tasks

    def _rate(self, tasks: Sequence[_Task]) -> None:
        """Rate continuations, as many at once as memory allows."""
        ordered = sorted(tasks, key=lambda task: len(task.row.ids) + len(task.tokens))
        step = self.size.rows
        for start in range(0, len(ordered), step):
            self._rate_together(ordered[start : start + step])
        for task in tasks:
            task.row.images = []  # vision tokens of all rows would fill the memory

    def _rate_together(self, tasks: Sequence[_Task]) -> None:
        try:
            self._forward(tasks)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(tasks) == 1:
                raise
        # The `except` block is over, so Python has dropped the tensors that its traceback held.
        self.size.halve(len(tasks))
        half = (len(tasks) + 1) // 2
        self._rate_together(tasks[:half])
        self._rate_together(tasks[half:])

    @torch.inference_mode()
    def _forward(self, tasks: Sequence[_Task]) -> None:
        model = self.plan.model
        ids, mask = pad_left([task.row.ids + task.tokens for task in tasks], self.plan.processor.tokenizer.pad_token_id)
        prefix = mask.bool()
        for b, task in enumerate(tasks):
            prefix[b, ids.shape[1] - len(task.tokens) :] = False
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "prefix_mask": prefix}
        inputs |= self.media.arguments([task.row for task in tasks])
        inputs.pop("media_keys", None)  # which only a prompt cache reads
        logits = model(**{name: x.to(model.device) for name, x in inputs.items()}, use_cache=False).logits  # [B, T, V]
        for b, task in enumerate(tasks):
            c = len(task.tokens)
            rated = logits[b, -c - 1 : -1].float().log_softmax(-1).cpu()  # [c, V]
            tokens = torch.tensor(task.tokens)
            total = rated.gather(1, tokens[:, None]).sum().item()
            task.found = Likelihood(total, c, bool((rated.argmax(-1) == tokens).all()))
