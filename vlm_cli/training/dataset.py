"""From sources of records to batches: texts become tokens before the first step, and images are decoded when needed.

B batch, T_txt tokens, T_img media per row, F frames, C H W pixels, N records, V vocabulary.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vlm_cli.data.mixture import Mixture
from vlm_cli.data.problems import Problem, describe_problems
from vlm_cli.data.records import PLAIN_READING, Reading, Records, raise_problems, read_records
from vlm_cli.data.repeated import RepeatedIds
from vlm_cli.errors import DataError, MediaError, VLMError
from vlm_cli.image_processor import OpenCLIPImageProcessor
from vlm_cli.media import MediaLoader
from vlm_cli.media.notes import NoteTally
from vlm_cli.modeling.batching import pad_left, stack_pixels
from vlm_cli.modeling.learned import IGNORED, find_learned
from vlm_cli.modeling.media_layout import MediaLayout
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Medium
from vlm_cli.training.data_settings import TooLong
from vlm_cli.training.features import FeatureCache
from vlm_cli.training.order import Shares
from vlm_cli.training.preparing import LearnedSequence, RecordPreparer
from vlm_cli.writing.writer import PromptWriter

__all__ = ["Collator", "RecordDataset", "check_batch", "load_dataset"]


@dataclass
class RecordDataset(Dataset[dict[str, Any]]):
    """N sequences of records, as tokens and sources of images.

    An item has `index`, `ids`, `labels` and `pixels`, or `features` instead of pixels.

    One array holds the tokens of all records, so that worker processes share it; those of record i are
    `ids[ends[i] : ends[i + 1]]`.

    Attributes:
        images: turns images and clips into pixels.
        loaders: for each source, what loads its images.
        names: for each source, its name.
        counts: for each source, the number of its sequences; they stand one source after the other.
        weights: for each source, its share of what is drawn; None to draw each sequence once in a pass.
        seed: of the order; None for that of the run.
        preprocessing: what happens to each image, in words.
        sha256: hash of the sources.
        notes: what the user should know about the records.
        split: places of the records in which a token over the border of prompt and completion was split.
        ids: int[tokens] the tokens of all records.
        is_target: bool[tokens] whether the model learns the token.
        ends: int[N + 1] where each record ends, after a 0.
        media: for each record, its images and clips.
        frames: int[N], how many images and frames each record has.
        positions: int[N], how many positions of the language model each record takes.
        record_ids: for each record, its id.
        rows: for each record, its row.
        features: for each source, where the features of images and clips are; None to read their pixels.
    """

    images: OpenCLIPImageProcessor
    loaders: list[MediaLoader] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    weights: tuple[float, ...] | None = None
    seed: int | None = None
    preprocessing: str = ""
    sha256: str = ""
    notes: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    is_target: np.ndarray = field(default_factory=lambda: np.empty(0, np.bool_))
    ends: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    media: list[tuple[Medium, ...]] = field(default_factory=list)
    frames: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    record_ids: list[str] = field(default_factory=list)
    rows: list[tuple[str, int, str]] = field(default_factory=list)
    features: list[FeatureCache] | None = None

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> dict[str, Any]:
        span = slice(self.ends[index], self.ends[index + 1])
        ids = torch.from_numpy(self.ids[span].astype(np.int64))
        labels = ids.masked_fill(torch.from_numpy(~self.is_target[span]), IGNORED)
        item = {"index": int(index), "ids": ids, "labels": labels}
        source = self._source_of(index)
        if self.features is not None:
            kept = [self.features[source].find(medium) for medium in self.media[index]]
            if all(medium is not None for medium in kept):
                return item | {"features": kept}
        try:
            media = [self.loaders[source].load_medium(x.source, x.kind) for x in self.media[index]]
            if self.features is not None:
                folder = self.features[source].folder
                raise MediaError(f"its features are no longer in {str(folder)!r}. Repeat the command.")
        except VLMError as error:
            # The item carries the message, because an error in a worker process reaches the user as a traceback.
            return item | {"error": f"{self.place(index)}: {error}"}
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

    def mixture_identity(self) -> dict[str, Any]:
        """Return what differs between other orders of the same records; checkpoints store it."""
        weights = None if self.weights is None else dict(zip(self.names, self.weights, strict=True))
        return {"weights of the sources": weights, "seed of the mixture": self.seed}

    def describe_whole(self) -> str:
        """Say how many records there are."""
        return count_of(len(self), "record")

    def count_images(self, indices: Sequence[int]) -> int:
        """Count the images of records, each frame of a clip as one."""
        return int(self.frames[indices].sum())

    def media_of(self, source: int) -> Iterator[Medium]:
        """Yield the images and clips of a source."""
        first = sum(self.counts[:source])
        return (medium for media in self.media[first : first + self.counts[source]] for medium in media)

    @property
    def shares(self) -> Shares | None:
        """How often each source is drawn; None to draw each record once in a pass."""
        return None if self.weights is None else Shares(self.counts, self.weights)

    def place(self, index: int) -> str:
        """Say where a record stands: `line 3 of 'a.jsonl'`, and in which of several sources."""
        unit, number, shard = self.rows[index]
        source = self.names[self._source_of(index)]
        if len(self.names) == 1 or Path(source).name == shard:
            return f"{unit} {number} of {(shard if len(self.names) == 1 else source)!r}"
        return f"{unit} {number} of {shard!r} of {source!r}"

    def describe(self, indices: Sequence[int], most: int = 8) -> str:
        """Name records for a message: `'a' (line 3), 'b' (line 7)`, with the source if there are several files."""
        is_one_file = len(self.names) == 1 and len({shard for _, _, shard in self.rows}) == 1

        def name(i: int) -> str:
            unit, number, _ = self.rows[i]
            place = f"{unit} {number}" if is_one_file else self.place(i)
            return place if self.record_ids[i] == f"{unit} {number}" else f"{self.record_ids[i]!r} ({place})"

        shown = [name(i) for i in indices[:most]]
        return ", ".join(shown) + (f" and {len(indices) - most} more" if len(indices) > most else "")

    def _source_of(self, index: int) -> int:
        return bisect.bisect_right(self._firsts(), index) - 1

    def _firsts(self) -> list[int]:
        return list(accumulate(self.counts[:-1], initial=0))


def load_dataset(
    data: Path | Mixture,
    model: VLM,
    processor: VLMProcessor,
    reading: Reading = PLAIN_READING,
    writer: PromptWriter | None = None,
    too_long: TooLong = "error",
    *,
    skips: bool = False,
) -> RecordDataset:
    """Read the sources of records, check each record, and encode its text.

    Args:
        data: the sources, or the only one.
        model: the model that learns them.
        processor: of the model.
        reading: what the user says of the rows and pictures of sources that say nothing of it themselves.
        writer: turns prompts into tokens; None for prompts as they stand.
        too_long: see `RecordPreparer`.
        skips: leave out the rows that cannot be used, and name them in `notes`, as long as others are left.

    Raises:
        DataError: listing every row of a source that cannot be used.
    """
    mixture = data if isinstance(data, Mixture) else Mixture.of([data])
    images = processor.image_processor
    dataset = RecordDataset(
        images, weights=mixture.weights, seed=mixture.seed, preprocessing=images.preprocessing.describe()
    )
    preparer = RecordPreparer(model, processor, writer, too_long)
    columns = _Columns()
    repeated = RepeatedIds()
    digests = []
    for origin, ingredient in zip(mixture.open(), mixture.ingredients, strict=True):
        records = read_records(origin, ingredient.refine(reading))
        _add(dataset, records, preparer, columns, repeated, skips=skips)
        digests.append(records.sha256)
    dataset.sha256 = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    dataset.notes += [*preparer.notes, *repeated.notes]
    columns.finish(dataset)
    return dataset


@dataclass
class _Columns:
    """What becomes arrays of a `RecordDataset`, record by record."""

    ids: list[np.ndarray] = field(default_factory=list)
    is_target: list[np.ndarray] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, sequence: LearnedSequence) -> None:
        self.ids.append(sequence.ids)
        self.is_target.append(sequence.is_target)
        self.frames.append(sequence.num_frames)
        self.positions.append(sequence.positions)

    def finish(self, dataset: RecordDataset) -> None:
        dataset.frames, dataset.positions = np.array(self.frames), np.array(self.positions)
        dataset.ids, dataset.is_target = np.concatenate(self.ids), np.concatenate(self.is_target)
        dataset.ends = np.concatenate([[0], np.cumsum([len(x) for x in self.ids])])


def _add(
    dataset: RecordDataset,
    records: Records,
    preparer: RecordPreparer,
    columns: _Columns,
    repeated: RepeatedIds,
    *,
    skips: bool,
) -> None:
    """Add the records of a source to a data set.

    Raises:
        DataError: listing every row that cannot be used, or if none is left.
    """
    loader, problems, before = records.loader(), list[Problem](), len(dataset.media)
    for record in records.good:
        try:
            sequences = preparer.prepare(record, loader)
        except VLMError as error:
            problems.append(Problem.of(record, str(error)))
            continue
        repeated.add(record)
        for sequence in sequences:
            columns.add(sequence)
            dataset.media.append(sequence.media)
            dataset.record_ids.append(record.id)
            dataset.rows.append((record.unit, record.line, record.shard))
        if sequences and sequences[-1].was_split:
            dataset.split.append(record.place)
    is_left = len(dataset.media) > before
    if skips and is_left and (bad := [*records.problems, *problems]):
        total = len(records.good) + len(records.problems)
        dataset.notes.append(f"Skipped: {describe_problems(bad, total, records.origin)}")
    else:
        raise_problems(records, problems)
    if not is_left:
        raise DataError(f"no record of {records.origin.quoted} is left: all are longer than the model's context.")
    dataset.loaders.append(loader)
    dataset.names.append(records.origin.name)
    dataset.counts.append(len(dataset.media) - before)
    dataset.notes += records.notes


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
            float[B, T_img, F, C, H, W] or `vision_features` float[B, T_img, F, v, d], `vision_mask` bool[B, T_img, F]
            and `media_layout`; if one has tiles, `vision_grid` int[B, T_img, 4]; `records`, the indices of the records;
            and `notes`, what became of images when they were decoded.
            If an image is damaged, the batch is `error` alone: the message.
        """
        for item in items:
            if "error" in item:
                return {"error": item["error"]}
        input_ids, attention_mask = pad_left([item["ids"] for item in items], self.pad_id)
        labels, _ = pad_left([item["labels"] for item in items], IGNORED)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "logits_at": find_learned(labels),
            "records": [record for item in items for record in _records_of(item)],
            "num_tokens": sum(len(item["ids"]) for item in items),
            "notes": [note for item in items for note in item.get("notes", ())],
        }
        if "segments" in items[0]:
            batch["segments"], _ = pad_left([item["segments"] for item in items], 0)
        for name, of_items in (("pixel_values", "pixels"), ("vision_features", "features")):
            if any(item.get(of_items) for item in items):
                batch |= stack_pixels([item[of_items] for item in items], name)
                batch["media_layout"] = MediaLayout.of(batch[name], batch["vision_mask"])
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
