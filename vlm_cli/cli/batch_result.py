"""What a run over a file of prompts has done, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_cli.cli import console
from vlm_cli.printable import count_of

if TYPE_CHECKING:
    from vlm_cli.generation.answers import Counts

__all__ = ["BatchResult"]


@dataclass(frozen=True)
class BatchResult:
    """What a run over a file has done.

    Attributes:
        rows: that are answered, including those of an earlier run.
        failed: those of them with an error.
        earlier: rows that an earlier run answered.
        counts: what this run did; None if no row was left.
        batch_size: rows at once at the end.
        load_seconds, seconds: of this run, loading the model and answering.
        peak_memory: bytes.
    """

    rows: int
    failed: int
    earlier: int
    counts: Counts | None = None
    batch_size: int = 0
    load_seconds: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers; rates and images are those of this run alone."""
        from vlm_cli.generation.answers import Counts

        counts, seconds = self.counts or Counts(), self.seconds or 1.0
        return {
            "rows": self.rows,
            "failed": self.failed,
            "earlier": self.earlier,
            "new_tokens": counts.new_tokens,
            "images": counts.images,
            "images_encoded": counts.encoded,
            "positions_reused": counts.reused,
            "positions_decoded": counts.decoded,
            "batch_size": self.batch_size,
            "load_seconds": round(self.load_seconds, 3),
            "seconds": round(self.seconds, 3),
            **self._shares(counts, seconds),
            "rows_per_second": round((self.rows - self.earlier) / seconds, 2),
            "tokens_per_second": round(counts.new_tokens / seconds, 2),
        }

    @staticmethod
    def _shares(counts: Counts, seconds: float) -> dict[str, float]:
        """Return the shares of the time without the model; none for requests, whose engine is in another thread."""
        if not counts.seconds:
            return {}
        outside = max(0.0, seconds - counts.seconds - counts.waited)
        return {"waiting_share": round(counts.waited / seconds, 4), "outside_share": round(outside / seconds, 4)}

    def summary(self) -> str:
        data = self.to_dict()
        earlier = f" ({self.earlier:,} of them earlier)" if self.earlier else ""
        return (
            f"{count_of(self.rows, 'row')}{earlier}, {self.failed:,} failed, {data['rows_per_second']:.1f} rows/s, "
            f"{data['tokens_per_second']:.1f} tokens/s, {count_of(data['images_encoded'], 'image')} encoded of "
            f"{data['images']:,} used"
        )

    def statistics(self) -> str:
        if self.counts is None:
            return "no row was left to answer"
        data = self.to_dict()
        shares = (
            f"{self.counts.seconds:.2f} s in the model, {data['waiting_share']:.1%} of the time waiting for rows and "
            f"pictures, {data['outside_share']:.1%} outside, {count_of(self.counts.decoded, 'position')} decoded, "
            if "waiting_share" in data
            else ""
        )
        return (
            f"{count_of(self.counts.new_tokens, 'new token')} in {self.seconds:.2f} s, "
            f"{data['tokens_per_second']:.1f} tokens/s, {shares}"
            f"{count_of(self.batch_size, 'row')} at once in the end, "
            f"load {self.load_seconds:.2f} s, peak memory {console.human_bytes(self.peak_memory)}"
        )
