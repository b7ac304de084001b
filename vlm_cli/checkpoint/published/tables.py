"""Vocabulary tables: a checkpoint's embedding and output head, and the rows in them that belong to added tokens.

A VLM keeps the language model's tables as they were, and the rows of added tokens apart, in `added_tokens.embedding`
and `added_tokens.head`. Published checkpoints mostly keep both in one table:

    checkpoint                          VLM
    embed_tokens.weight [vocabulary + added, d]
        rows 0 … vocabulary - 1    ->   lang_model.….embed_tokens.weight
        the rows after them        ->   added_tokens.embedding.weight, and added_tokens.head.weight if tables are tied
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.shapes import find_shape
from vlm_cli.checkpoint.published.targets import Target
from vlm_cli.modeling.config import VLMConfig

__all__ = ["Table", "added_targets", "known_and_new_targets", "scale_rows", "table_targets", "tables_filled"]

Table = Literal["embedding", "head"]


def tables_filled(
    checkpoint: PublishedCheckpoint, config: VLMConfig, *, embedding: str, head: str
) -> Mapping[Table, tuple[Table, ...]]:
    """Decide which tables of `added_tokens` each table of a checkpoint fills.

    A table fills its own kind. Tied tables are one tensor under two names, and a file may keep either: if the
    language model ties its tables and the checkpoint lacks one of them, the other fills both.

    Args:
        checkpoint: its names are searched.
        config: of the VLM; its language model's `tie_word_embeddings` counts.
        embedding: pattern of the embedding's name in the checkpoint.
        head: pattern of the output head's name in the checkpoint.
    """
    is_tied = getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False)

    def fills_both(other: str) -> bool:
        return is_tied and find_shape(checkpoint, other) is None

    return {
        "embedding": ("embedding", "head") if fills_both(head) else ("embedding",),
        "head": ("embedding", "head") if fills_both(embedding) else ("head",),
    }


def added_targets(
    tables: Sequence[Table],
    *,
    source_rows: slice | None = None,
    target_rows: slice | None = None,
    scale: float = 1.0,
) -> list[Target]:
    """Fill rows of added tokens in each of these tables from rows of one tensor.

    Args:
        tables: of `added_tokens`, as `tables_filled` gives them.
        source_rows: of the tensor; None for all.
        target_rows: of the added tokens; None for all.
        scale: of the embedding that the tensor was a table of; the rows that enter the language model have it inside.
    """
    return [
        Target(
            f"added_tokens.{table}.weight",
            target_rows=target_rows,
            source_rows=source_rows,
            **(_scaling(scale) if table == "embedding" and scale != 1 else {}),
        )
        for table in tables
    ]


def scale_rows(rows: Tensor, scale: float) -> Tensor:
    """Multiply rows of a table, and round once."""
    return (rows.float() * scale).to(rows.dtype)


def _scaling(scale: float) -> dict[str, Callable[[Tensor], Tensor]]:
    return {"transform": lambda rows: scale_rows(rows, scale), "restore": lambda rows: scale_rows(rows, 1 / scale)}


def table_targets(
    target: str,
    tables: Sequence[Table],
    *,
    base: slice | None = None,
    added: slice | None = None,
    scale: float = 1.0,
) -> list[Target]:
    """Fill a language model's table, and the tables of added tokens, from one table of a checkpoint.

    Args:
        target: name of the language model's table in `VLM.state_dict()`.
        tables: of `added_tokens`, as `tables_filled` gives them.
        base: rows of the language model, the same in both; None for all.
        added: rows of added tokens in the checkpoint's table; None for all.
        scale: by which the language model's embedding multiplies its rows.
    """
    return [
        Target(target, target_rows=base, source_rows=base),
        *added_targets(tables, source_rows=added, scale=scale),
    ]


def known_and_new_targets(tables: Sequence[Table], rows: slice, *, num_known: int, num_added: int) -> list[Target]:
    """Fill the first added tokens from their rows; each later token starts at the mean of the language model's rows.

    Args:
        tables: of `added_tokens`.
        rows: of the known added tokens in the checkpoint's table; the language model's rows are those before.
        num_known: added tokens that have a row in the checkpoint.
        num_added: all added tokens.
    """
    mean = _repeat_mean(rows.start, num_added - num_known)
    return [
        target
        for table in tables
        for target in (
            Target(f"added_tokens.{table}.weight", target_rows=slice(num_known), source_rows=rows),
            Target(f"added_tokens.{table}.weight", target_rows=slice(num_known, None), transform=mean),
        )
    ]


def _repeat_mean(num_rows: int, num_copies: int) -> Callable[[Tensor], Tensor]:
    """Make a function that turns a table into copies of the mean of its first rows."""

    def repeat_mean(table: Tensor) -> Tensor:
        mean = table[:num_rows].mean(0, keepdim=True, dtype=torch.float32)  # [1, d]
        return mean.to(table.dtype).expand(num_copies, -1)  # [num_copies, d]

    return repeat_mean
