"""How many rows a model answers at once."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["BatchSize", "RowCost", "available_memory", "is_out_of_memory"]

START = 4  # rows at first
MAX_ROWS = 256  # rows at once
MANY_LAYERS = 32  # where a configuration does not say
MIN_SPEEDUP = 1.1  # times as many rows per second are worth twice the rows


class BatchSize:
    """Rows at once: twice as many as long as that is faster, and half as many where memory does not suffice.

    Args:
        fixed: a number that the user chose; None finds one.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.rows = START if fixed is None else fixed
        self._grows = fixed is None
        self._before = 0.0  # rows per second with half as many
        self._timed: list[float] = []  # seconds of each full batch of this size

    def record(self, rows: int, seconds: float) -> None:
        """Learn from a batch how long it took; one that took too long gets a second chance."""
        if not self._grows or rows < self.rows:
            return
        self._timed.append(seconds)
        rate = self.rows / min(self._timed)
        if rate >= MIN_SPEEDUP * self._before:
            self._grows = 2 * self.rows <= MAX_ROWS
            self.rows, self._before, self._timed = min(2 * self.rows, MAX_ROWS), rate, []
        elif len(self._timed) == 2:
            self.rows, self._grows = self.rows // 2, False

    def halve(self, rows: int) -> None:
        """So many rows were too many."""
        self.rows, self._grows = max(1, min(self.rows, rows // 2)), False


class RowCost:
    """Bytes that a row takes while it is answered, roughly and rather too many.

    Args:
        model: the VLM.
        sequences: beams or answers of each row.
    """

    def __init__(self, model: Any, sequences: int = 1) -> None:
        text = model.config.get_text_config(decoder=True)
        heads = getattr(text, "num_attention_heads", None) or 1
        shared = (getattr(text, "num_key_value_heads", None) or heads) / heads
        width = text.hidden_size * model.dtype.itemsize  # bytes
        layers = getattr(text, "num_hidden_layers", None) or MANY_LAYERS
        # Keys and values of all layers, and what one layer holds while the prompt is read.
        self._per_position = sequences * (2 * layers * shared + 16) * width
        # Logits and their sorted copies.
        self._per_row = sequences * 16 * text.vocab_size
        self._copies = 1 + 2 * sequences * len(model.block_layers)

    def __call__(self, positions: int, media_bytes: int) -> float:
        """
        Args:
            positions: of prompt and answer.
            media_bytes: of the row's vision tokens.
        """
        return positions * self._per_position + self._per_row + media_bytes * self._copies


def available_memory(device: torch.device) -> int:
    """Bytes that are free, or that torch holds for itself."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    import psutil

    return psutil.virtual_memory().available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer rows may succeed; the CPU and MPS have no class of error for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "out of memory" in text)
