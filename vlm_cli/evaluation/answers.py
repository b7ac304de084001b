"""Put items to a model, many at a time; but for rounding, what it answers to one does not depend on the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_cli.errors import DataError, MediaError
from vlm_cli.evaluation.items import Item
from vlm_cli.evaluation.scores import is_exact
from vlm_cli.media import MediaLoader
from vlm_cli.prompt import format

__all__ = ["Answer", "answer", "group"]


@dataclass(frozen=True)
class Answer:
    """What a model wrote for an item; `ended` says that a stop token ended it."""

    item: Item
    text: str
    ended: bool

    @property
    def exact(self) -> bool:
        return is_exact(self.text, self.item.expected)

    def to_dict(self) -> dict[str, Any]:
        """A line of the file of answers."""
        return {
            "id": self.item.id,
            "kind": self.item.kind,
            "prompt": format(self.item.prompt),
            "expected": self.item.expected,
            "answer": self.text,
            "exact": self.exact,
        }


def group(items: Sequence[Item], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like items: as many images, one kind, prompts of like length.

    A batch takes as long as its longest answer, and those of one kind are of like length. The most images come first:
    if memory does not suffice for them, that shows at once.

    Args:
        items: to be grouped.
        lengths: tokens of each prompt.
        batch_size: most items in a batch.
    """

    def size(index: int) -> tuple[int, str, int]:
        return len(items[index].sources), items[index].kind or "", lengths[index]

    order = sorted(range(len(items)), key=size, reverse=True)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def answer(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    batches: Sequence[Sequence[int]],
    loader: MediaLoader,
    keywords: Mapping[str, Any],
    *,
    name: str = "the records",
    report: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """What the model writes for each item, in their order.

    Args:
        model: a `VLM` in evaluation mode.
        processor: its processor.
        items: to be answered.
        batches: indices of items, each once; see `group`.
        loader: finds images.
        keywords: of `generate`.
        name: of the items' file, for messages.
        report: is told how many are done, after each batch.

    Raises:
        DataError: if an image cannot be decoded.
    """
    found: dict[int, Answer] = {}
    for batch in batches:
        chosen = [items[i] for i in batch]
        images = [_load(item, loader, name) for item in chosen]
        written = _generate(model, processor, chosen, images, keywords)
        found |= zip(batch, written, strict=True)
        report(len(found))
    return [found[i] for i in range(len(items))]


def _load(item: Item, loader: MediaLoader, name: str) -> list[Any]:
    try:
        return [loader.load(source).image for source in item.sources]
    except MediaError as error:
        raise DataError(f"line {item.line} of {name!r}: {error}") from None


def _generate(
    model: Any, processor: Any, items: Sequence[Item], images: Sequence[list[Any]], keywords: Mapping[str, Any]
) -> list[Answer]:
    import torch

    from vlm_cli.modeling.stop_tokens import stop_token_ids

    inputs = processor(images=images, text=[item.prompt for item in items]).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, **keywords)
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    stops = set(stop_token_ids(model.generation_config))
    return [_answer(item, ids, stops, processor) for item, ids in zip(items, new, strict=True)]


def _answer(item: Item, ids: list[int], stops: set[int], processor: Any) -> Answer:
    """The text before the first stop token; what follows it is padding."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    # Clean-up would take spaces that were written.
    text = processor.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(item, text, ended=end is not None)
