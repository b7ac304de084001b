"""Records as tensors: tokenised once before the first step, images decoded as they are needed.

B batch, T_txt tokens, T_img media per row, C H W pixels, N records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm_cli.composition import END_OF_CHUNK
from vlm_cli.data.records import Problem, Record, Segment, raise_problems, read_records
from vlm_cli.errors import DataError, LanguageModelError, MediaError
from vlm_cli.media import MediaLoader
from vlm_cli.modeling.batching import pad_left, stack_media
from vlm_cli.modeling.budget import ContextBudget, MediumSize
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.prompt import Medium, Slot, Text

__all__ = ["IGNORED", "Collator", "Encoder", "RecordDataset", "end_token_id", "load_dataset"]

IGNORED = -100  # label of a token that is not learned

_Parts = Sequence[Text | Medium]


def end_token_id(model: Any, processor: Any) -> int:
    """The token that ends what is learned: `<|endofchunk|>` if the composition has it, else the end of a text.

    Raises:
        LanguageModelError: if there is none.
    """
    if END_OF_CHUNK in model.config.composition.added_tokens:
        return processor.tokenizer.convert_tokens_to_ids(END_OF_CHUNK)
    found = stop_token_ids(processor.tokenizer, model.config)
    if not found:
        raise LanguageModelError(
            f"the model has no token that ends an answer: neither {END_OF_CHUNK} nor an end-of-text token. Build it "
            f"again with --set 'added_tokens=[{END_OF_CHUNK!r}, <image>]'."
        )
    return found[0]


class Encoder:
    """Tokens of records, the same that `vlm generate` feeds for the same text.

    With `I` for the media token and `E` for the end token:

        prompt "<image:a.png>Q: How many? A:", completion " Two."

        ids        I   Q  :  How many ?  A  :   Two  .   E
        learned    no  no no no  no   no no no  yes  yes yes

    Args:
        processor: of the model.
        end_id: token that ends what is learned.
    """

    def __init__(self, processor: Any, end_id: int) -> None:
        self.processor, self.end_id = processor, end_id
        self._media_id = processor.media_token_id
        # Questions repeat.
        self._encode_cached = lru_cache(maxsize=2**16)(self._encode)

    def encode(self, record: Record) -> tuple[list[int], list[bool], bool]:
        """
        Returns:
            Ids, whether each is learned, and whether a completion was cut from a token that it shares with its prompt.
        """
        ids: list[int] = []
        learned: list[bool] = []
        shared = False
        pairs = zip(record.segments[::2], record.segments[1::2], strict=True)
        for number, (context, target) in enumerate(pairs):
            before, after, cut = self._pair(context, target, continues=number > 0)
            ids += [*before, *after, self.end_id]
            learned += [False] * len(before) + [token != self._media_id for token in after] + [True]
            shared |= cut
        return ids, learned, shared

    def _pair(self, context: Segment, target: Segment, *, continues: bool) -> tuple[list[int], list[int], bool]:
        before = self._tokens(context.parts, continues)
        both = self._tokens([*context.parts, *target.parts], continues)
        if both[: len(before)] == before:
            return before, both[len(before) :], False
        # A token would reach over the border. At inference the prompt ends there, so that it must end there here.
        return before, self._tokens(target.parts, True), True

    def _tokens(self, parts: _Parts, continues: bool) -> list[int]:
        """Tokens of a prompt's beginning, or of what follows a special token."""
        key = tuple(part.text if isinstance(part, Text) else None for part in parts)
        return self._encode_cached(key, continues)

    def _encode(self, texts: tuple[str | None, ...], continues: bool) -> list[int]:
        """The same for texts, with None for each medium."""
        parts = [Slot() if text is None else Text(text) for text in texts]
        if not continues:
            return self.processor.encode(parts)
        ids = self.processor.encode([Slot(), *parts])
        return ids[ids.index(self._media_id) + 1 :]


@dataclass
class RecordDataset(Dataset):
    """N records, tokenised; an item is `index`, `ids`, `labels` and `pixels`.

    The tokens of all records stand in one array, which worker processes share.

    Attributes:
        name: of the file, for messages.
        transform: an image to float[C, H, W].
        loader: finds images.
        sha256: of the file.
        shared: lines whose completion was cut from a token that it shares with its prompt.
    """

    name: str
    transform: Any
    loader: MediaLoader
    sha256: str = ""
    shared: list[int] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # int[tokens]
    learned: np.ndarray = field(default_factory=lambda: np.empty(0, np.bool_))  # bool[tokens]
    ends: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # int[N + 1]
    sources: list[tuple[str, ...]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, Any]:
        span = slice(self.ends[index], self.ends[index + 1])
        ids = torch.from_numpy(self.ids[span].astype(np.int64))
        labels = ids.masked_fill(torch.from_numpy(~self.learned[span]), IGNORED)
        item = {"index": int(index), "ids": ids, "labels": labels}
        try:
            images = [self.loader.load(source).image for source in self.sources[index]]
        except MediaError as error:
            # Workers return it, since what they raise reaches the user as their traceback.
            return item | {"error": f"line {self.lines[index]} of {self.name!r}: {error}"}
        return item | {"pixels": torch.stack([self.transform(image) for image in images])}

    @property
    def lengths(self) -> np.ndarray:
        """int[N]: tokens of each record."""
        return np.diff(self.ends)

    @property
    def num_images(self) -> np.ndarray:
        """int[N]: images of each record."""
        return np.array([len(sources) for sources in self.sources])

    def describe(self, indices: Sequence[int], most: int = 8) -> str:
        """Records in words: `'a' (line 3), 'b' (line 7)`."""

        def name(i: int) -> str:
            line = f"line {self.lines[i]}"
            return line if self.names[i] == line else f"{self.names[i]!r} ({line})"

        shown = [name(i) for i in indices[:most]]
        return ", ".join(shown) + (f" and {len(indices) - most} more" if len(indices) > most else "")


def load_dataset(path: Path, model: Any, processor: Any) -> RecordDataset:
    """Read, check and tokenise a file of records.

    Raises:
        DataError: listing every line that cannot be used.
    """
    records = read_records(path)
    encoder = Encoder(processor, end_token_id(model, processor))
    budget = ContextBudget.of(model)
    dataset = RecordDataset(
        path.name, processor.image_processor.transform, MediaLoader(records.folder), sha256=records.sha256
    )
    ids: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    problems: list[Problem] = []
    for record in records.good:
        tokens, flags, shared = encoder.encode(record)
        if problem := budget.problem(len(tokens), [MediumSize() for _ in record.sources]):
            problems.append(Problem(record.line, problem))
            continue
        ids.append(np.array(tokens, np.int32))
        learned.append(np.array(flags, np.bool_))
        dataset.sources.append(record.sources)
        dataset.names.append(record.id)
        dataset.lines.append(record.line)
        if shared:
            dataset.shared.append(record.line)
    raise_problems(records, problems)
    dataset.ids, dataset.learned = np.concatenate(ids), np.concatenate(learned)
    dataset.ends = np.concatenate([[0], np.cumsum([len(x) for x in ids])])
    return dataset


class Collator:
    """Records to one batch, padded at the left as the processor pads prompts.

    Args:
        pad_id: token of the padding.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """
        Returns:
            `input_ids`, `attention_mask` and `labels`, int[B, T_txt]; `pixel_values` float[B, T_img, 1, C, H, W];
            `vision_mask` bool[B, T_img, 1]; and `records`, the records' indices. With a damaged image, `error` only.
        """
        for item in items:
            if "error" in item:
                return {"error": item["error"]}
        input_ids, attention_mask = pad_left([item["ids"] for item in items], self.pad_id)
        labels, _ = pad_left([item["labels"] for item in items], IGNORED)
        pixels, mask = stack_media([item["pixels"].unsqueeze(1).unbind() for item in items])  # of one frame each
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "pixel_values": pixels,
            "vision_mask": mask,
            "records": [item["index"] for item in items],
        }


def check_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """
    Raises:
        DataError: if an image of the batch could not be decoded.
    """
    if "error" in batch:
        raise DataError(batch["error"])
    return batch


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses and number of learned tokens of each row: float[B, T_txt, V], int[B, T_txt] -> [B], [B]."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    return losses.sum(-1), (labels[:, 1:] != IGNORED).sum(-1)
