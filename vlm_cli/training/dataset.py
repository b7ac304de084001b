"""From a file of records to batches: all texts become tokens before the first step, and images are decoded when needed.

B batch, T_txt tokens, T_img media per row, F frames, C H W pixels, N records, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vlm_cli.data.records import PLAIN_READING, Problem, Reading, describe_problems, raise_problems, read_records
from vlm_cli.errors import DataError, MediaError, PromptError, VLMError
from vlm_cli.media import MediaLoader
from vlm_cli.media.notes import NoteTally
from vlm_cli.modeling.batching import pad_left, stack_pixels
from vlm_cli.modeling.learned import IGNORED, find_learned
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of
from vlm_cli.processor import OpenCLIPImageProcessor, VLMProcessor
from vlm_cli.prompt import Medium
from vlm_cli.training.features import FeatureCache
from vlm_cli.training.preparing import RecordPreparer
from vlm_cli.writing.writer import PromptWriter

__all__ = ["Collator", "RecordDataset", "check_batch", "load_dataset"]


@dataclass
class RecordDataset(Dataset[dict[str, Any]]):
    """N sequences of records, as tokens and sources of images.

    An item has `index`, `ids`, `labels` and `pixels`, or `features` instead of pixels.

    One array holds the tokens of all records, so that worker processes share it; those of record i are
    `ids[ends[i] : ends[i + 1]]`.

    Attributes:
        name: name of the file, for messages.
        notes: what the user should know about the records.
        images: turns images and clips into pixels.
        loader: loads images.
        preprocessing: what happens to each image, in words.
        sha256: hash of the file.
        split_lines: lines in which a token over the border of prompt and completion was split.
        ids: int[tokens] the tokens of all records.
        is_target: bool[tokens] whether the model learns the token.
        ends: int[N + 1] where each record ends, after a 0.
        sources: for each record, its images and clips.
        frames: int[N], how many images and frames each record has.
        positions: int[N], how many positions of the language model each record takes.
        names: for each record, its id.
        lines: for each record, the number of its line.
        features: where the features of images and clips are; None to read their pixels.
    """

    name: str
    images: OpenCLIPImageProcessor
    loader: MediaLoader
    preprocessing: str = ""
    sha256: str = ""
    notes: list[str] = field(default_factory=list)
    split_lines: list[int] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    is_target: np.ndarray = field(default_factory=lambda: np.empty(0, np.bool_))
    ends: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    sources: list[tuple[Medium, ...]] = field(default_factory=list)
    frames: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    names: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    features: FeatureCache | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, Any]:
        span = slice(self.ends[index], self.ends[index + 1])
        ids = torch.from_numpy(self.ids[span].astype(np.int64))
        labels = ids.masked_fill(torch.from_numpy(~self.is_target[span]), IGNORED)
        item = {"index": int(index), "ids": ids, "labels": labels}
        if self.features is not None:
            kept = [self.features.find(medium) for medium in self.sources[index]]
            if all(medium is not None for medium in kept):
                return item | {"features": kept}
        try:
            media = [self.loader.load_medium(x.source, x.kind) for x in self.sources[index]]
            if self.features is not None:
                raise MediaError(f"its features are no longer in {str(self.features.folder)!r}. Repeat the command.")
        except (MediaError, PromptError) as error:
            # The item carries the message, because an error in a worker process reaches the user as a traceback.
            return item | {"error": f"line {self.lines[index]} of {self.name!r}: {error}"}
        notes = [(medium.source, medium.notes) for medium in media if medium.notes]
        return item | {"pixels": [self.images.read(medium) for medium in media], "notes": notes}

    @property
    def num_records(self) -> int:
        """Number of records in a pass."""
        return len(self)

    @property
    def lengths(self) -> np.ndarray:
        """int[N]: number of tokens of each record."""
        return np.diff(self.ends)

    @property
    def num_images(self) -> np.ndarray:
        """int[N]: number of images of each record, each frame of a clip counted as one."""
        return self.frames

    def identity(self) -> str:
        """Return what differs between other records; checkpoints store it."""
        return f"{len(self)} records ({self.sha256[:12]})"

    def describe_whole(self) -> str:
        """Say how many records there are."""
        return count_of(len(self), "record")

    def count_images(self, indices: Sequence[int]) -> int:
        """Count the images of records, each frame of a clip as one."""
        return int(self.frames[indices].sum())

    def describe(self, indices: Sequence[int], most: int = 8) -> str:
        """Name records for a message: `'a' (line 3), 'b' (line 7)`."""

        def name(i: int) -> str:
            line = f"line {self.lines[i]}"
            return line if self.names[i] == line else f"{self.names[i]!r} ({line})"

        shown = [name(i) for i in indices[:most]]
        return ", ".join(shown) + (f" and {len(indices) - most} more" if len(indices) > most else "")


def load_dataset(
    path: Path,
    model: VLM,
    processor: VLMProcessor,
    reading: Reading = PLAIN_READING,
    writer: PromptWriter | None = None,
    *,
    skips: bool = False,
) -> RecordDataset:
    """Read a file of records, check each record, and encode its text.

    Args:
        path: the file.
        model: the model that learns them.
        processor: of the model.
        reading: what the user says of its rows and pictures.
        writer: turns prompts into tokens; None for prompts as they stand.
        skips: leave out the rows that cannot be used, and name them in `notes`, as long as others are left.

    Raises:
        DataError: listing every row that cannot be used.
    """
    records = read_records(path, reading)
    preparer = RecordPreparer(model, processor, writer)
    images = processor.image_processor
    dataset = RecordDataset(
        path.name,
        images,
        records.loader(),
        images.preprocessing.describe(),
        sha256=records.sha256,
        notes=records.notes,
    )
    ids: list[np.ndarray] = []
    is_target: list[np.ndarray] = []
    frames: list[int] = []
    positions: list[int] = []
    problems: list[Problem] = []
    for record in records.good:
        try:
            sequences = preparer.prepare(record, dataset.loader)
        except VLMError as error:
            problems.append(Problem.of(record, str(error)))
            continue
        for sequence in sequences:
            ids.append(sequence.ids)
            is_target.append(sequence.is_target)
            dataset.sources.append(sequence.media)
            frames.append(sequence.num_frames)
            positions.append(sequence.positions)
            dataset.names.append(record.id)
            dataset.lines.append(record.line)
        if sequences[-1].was_split:
            dataset.split_lines.append(record.line)
    if skips and ids and (bad := [*records.problems, *problems]):
        total = len(records.good) + len(records.problems)
        dataset.notes.append(f"Skipped: {describe_problems(bad, total, records.origin)}")
    else:
        raise_problems(records, problems)
    dataset.notes += preparer.notes
    dataset.frames, dataset.positions = np.array(frames), np.array(positions)
    dataset.ids, dataset.is_target = np.concatenate(ids), np.concatenate(is_target)
    dataset.ends = np.concatenate([[0], np.cumsum([len(x) for x in ids])])
    return dataset


class Collator:
    """Join the items of a `RecordDataset` to a batch, padded at the left as the processor pads prompts.

    Args:
        pad_id: the token of the padding.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int[B, T_txt]; `segments`, int[B, T_txt], of packed records;
            `logits_at`, int[N], where the model learns; if a record has an image, `pixel_values`
            float[B, T_img, F, C, H, W] or `vision_features` float[B, T_img, F, v, d], and `vision_mask`
            bool[B, T_img, F]; if one has tiles, `vision_grid` int[B, T_img, 4]; `records`, the indices of the records;
            and `notes`, what became of images when they were decoded.
            If an image is damaged, the batch is `error` alone: the message.
        """
        for item in items:
            if "error" in item:
                return {"error": item["error"]}
        input_ids, attention_mask = pad_left([item["ids"] for item in items], self.pad_id)
        labels, _ = pad_left([item["labels"] for item in items], IGNORED)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "logits_at": find_learned(labels),
            "records": [record for item in items for record in _records_of(item)],
            "notes": [note for item in items for note in item.get("notes", ())],
        }
        if "segments" in items[0]:
            batch["segments"], _ = pad_left([item["segments"] for item in items], 0)
        for name, of_items in (("pixel_values", "pixels"), ("vision_features", "features")):
            if any(item.get(of_items) for item in items):
                batch |= stack_pixels([item[of_items] for item in items], name)
        return batch


def _records_of(item: dict[str, Any]) -> list[int]:
    """Return the indices of an item's records; an item of packed records has several."""
    index = item["index"]
    return index if isinstance(index, list) else [index]


def check_batch(batch: dict[str, Any], notes: NoteTally) -> dict[str, Any]:
    """Return a batch without its notes, which are counted.

    Raises:
        DataError: if an image of the batch could not be decoded.
    """
    if "error" in batch:
        raise DataError(batch["error"])
    for source, of_source in batch.pop("notes", ()):
        notes.add(source, of_source)
    return batch
