"""How many rows a model answers at once, and how much memory that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vlm_cli.modeling.vlm import VLM

__all__ = ["BatchSize", "RowCost", "available_memory"]

START_ROWS = 4  # rows of the first batch
STEPS_EACH = 2  # tokens of each row that are timed before the number of rows doubles
STEPS_UNTIL_RETRY = 64  # tokens of each row before a number that seemed too slow is tried again
MAX_TRIALS = 3  # times that a number of rows may seem too slow before it is given up
MAX_ROWS = 256  # rows of the largest batch
ASSUMED_LAYERS = 32  # layers of a language model whose configuration does not give their number
MIN_SPEEDUP = 1.1  # factor in rows per second that makes twice the rows worthwhile


class BatchSize:
    """The number of rows of a batch: it doubles while that is faster, and halves where memory does not suffice.

    Args:
        fixed: the number that the user chose; None finds the fastest one.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.rows = START_ROWS if fixed is None else fixed
        self._grows = fixed is None
        self._before = 0.0  # rows per second with half as many
        self._timed: list[float] = []  # seconds of each full batch of this size
        self._steps: list[float] = []  # seconds of the steps since the number of rows was judged
        self._best: dict[int, float] = {}  # seconds of the fastest step of each number of rows
        self._wanted_steps = STEPS_EACH  # before the next judgement
        self._doubts = 0  # judgements in a row that found this number too slow
        self._trials = 0

    def record(self, rows: int, seconds: float) -> None:
        """Learn from the time of a batch whether more rows are faster.

        Smaller batches tell nothing. A size that seems too slow gets a second batch, because a single one may have
        been slow by accident.
        """
        if not self._grows or rows < self.rows:
            return
        self._timed.append(seconds)
        rate = self.rows / min(self._timed)
        if rate >= MIN_SPEEDUP * self._before:
            self._grows = 2 * self.rows <= MAX_ROWS
            self.rows, self._before, self._timed = min(2 * self.rows, MAX_ROWS), rate, []
        elif len(self._timed) == 2:
            self.rows, self._grows = self.rows // 2, False

    def record_step(self, rows: int, seconds: float) -> None:
        """Learn from the time in which each of so many rows got a token.

        The fastest step of each number of rows counts, since others may have been slow by accident; a number that seems
        too slow is tried again later. No step is made for the sake of its time.
        """
        if not self._grows or rows < self.rows:
            return
        self._steps.append(seconds)
        if len(self._steps) < self._wanted_steps:
            return
        best = self._best[self.rows] = min(*self._steps, self._best.get(self.rows, seconds))
        self._steps = []
        half = self._best.get(self.rows // 2)
        if half is None or best * MIN_SPEEDUP <= 2 * half:
            self._grows = 2 * self.rows <= MAX_ROWS
            self.rows, self._wanted_steps, self._doubts = min(2 * self.rows, MAX_ROWS), STEPS_EACH, 0
            return
        self._doubts += 1
        if self._doubts > 1:
            self._trials += 1
            self.rows, self._wanted_steps, self._doubts = self.rows // 2, STEPS_UNTIL_RETRY, 0
            self._grows = self._trials < MAX_TRIALS

    def halve(self, rows: int) -> None:
        """Use at most half of so many rows from now on, because memory did not suffice for them."""
        self.rows, self._grows = max(1, min(self.rows, rows // 2)), False


class RowCost:
    """An estimate of the bytes that a row takes while the model answers it; rather too high than too low.

    Args:
        model: the VLM.
        sequences: beams, or answers, of each row.
    """

    def __init__(self, model: VLM, sequences: int = 1) -> None:
        text = model.config.get_text_config(decoder=True)
        heads = getattr(text, "num_attention_heads", None) or 1
        shared = (getattr(text, "num_key_value_heads", None) or heads) / heads
        width = text.hidden_size * model.dtype.itemsize  # bytes
        layers = getattr(text, "num_hidden_layers", None) or ASSUMED_LAYERS
        # Keys and values of all layers, and the activations of one layer during prefill.
        self._per_position: float = sequences * (2 * layers * shared + 16) * width
        # Logits, and the sorted copies that sampling makes.
        self._per_row: int = sequences * 16 * text.vocab_size
        self._copies: int = 1 + 2 * sequences * len(model.block_layers)

    def __call__(self, positions: int, media_bytes: int) -> float:
        """Return the bytes of one row.

        Args:
            positions: of prompt and answer.
            media_bytes: bytes of the row's vision tokens.
        """
        return positions * self._per_position + self._per_row + media_bytes * self._copies


def available_memory(device: torch.device) -> int:
    """Return the bytes that are free, those included that torch has reserved and does not use."""
    if device.type == "cuda":
        unused: int = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return unused + int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
