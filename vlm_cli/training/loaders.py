"""The order of the records that are in memory, and the loaders that make batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from vlm_cli.interrupt import ignore_interrupt
from vlm_cli.training.dataset import RecordDataset
from vlm_cli.training.order import StreamSampler
from vlm_cli.training.packing import PackedRecords, PackedSampler
from vlm_cli.training.settings import TrainingSettings

__all__ = ["make_loader", "order_by_size", "order_records"]


def order_records(
    data: RecordDataset, settings: TrainingSettings, num_drawn: int, *, step: int, seed: int
) -> tuple[Dataset[dict[str, Any]], Iterable[Any]]:
    """Return the rows to learn, packed or not, and the order of their indices.

    Args:
        data: the records.
        settings: of the run.
        num_drawn: number of rows in the whole run.
        step: number of rows in a step, over all processes.
        seed: of the order.
    """
    if settings.pack is not None:
        packs = PackedSampler(data.positions, num_drawn, length=settings.pack, seed=seed, shares=data.shares)
        return PackedRecords(data), packs
    sizes = np.stack([data.num_images, data.lengths], axis=1) if settings.group_by_length else None
    return data, StreamSampler(len(data), num_drawn, seed=seed, batch_size=step, shares=data.shares, sizes=sizes)


def order_by_size(data: RecordDataset) -> list[int]:
    """Order records so that those of similar sizes stand in the same batch, as a held-out loss needs no other order."""
    order: list[int] = np.lexsort([data.lengths, data.num_images]).tolist()
    return order


def make_loader(
    data: Dataset[dict[str, Any]], order: Iterable[Any], collate: Callable[..., Any], args: TrainingArguments
) -> DataLoader[dict[str, Any]]:
    """Make a loader of batches."""
    workers = args.dataloader_num_workers
    return DataLoader(
        data,
        batch_size=args.per_device_train_batch_size,
        sampler=order,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_interrupt if workers else None,
        pin_memory=args.device.type == "cuda",
    )
