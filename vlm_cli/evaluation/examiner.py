"""`HeldOutExaminer`: the first records of a file, put to a model that trains, as `vlm eval` puts them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_cli.data.problems import Problem
from vlm_cli.data.records import Reading, raise_problems, read_records
from vlm_cli.errors import DataError, MediaError, PromptError
from vlm_cli.evaluation.answers import make_sample
from vlm_cli.evaluation.items import MAX_NEW_TOKENS, Item, encode_items, find_problem, make_items
from vlm_cli.evaluation.metrics.exact import Exact
from vlm_cli.evaluation.run import answer_items
from vlm_cli.generation.answers import RowAnswerer
from vlm_cli.generation.batch_size import BatchSize
from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.media import MediaLoader
from vlm_cli.prompt import Medium, Text
from vlm_cli.report.examination import Examination, ExaminedAnswer, Question
from vlm_cli.report.web_page import data_uri

if TYPE_CHECKING:
    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.processor import VLMProcessor
    from vlm_cli.writing.writer import PromptWriter

__all__ = ["HeldOutExaminer"]

MOST_SHOWN = 24  # questions on the page
MOST_FRAMES = 4  # of a clip, or pictures of a question, on the page
MAX_PIXELS = 192  # of the longer side of a picture on the page
MOST_BYTES = 2_000_000  # of all pictures on the page
GREEDY: dict[str, Any] = {
    "max_new_tokens": MAX_NEW_TOKENS,
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
}
GREEDY |= {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None}


class HeldOutExaminer:
    """Asks the first records of a file; of several turns, for each answer behind the turns before it.

    Args:
        path: the file.
        limit: number of records.
        reading: how records are read.
        batch_size: questions that are answered at once.
    """

    def __init__(
        self,
        path: Path,
        limit: int,
        reading: Reading,
        *,
        batch_size: int = 32,
    ) -> None:
        self.path, self.limit, self.batch_size = path, limit, batch_size
        self.reading = reading

    def begin(self, model: VLM, processor: VLMProcessor, writer: PromptWriter) -> Sequence[Question]:
        """Read and check the questions, and return those that a page shows.

        Raises:
            DataError: if a record has no single answer, or the model has no room for it.
        """
        self.records = read_records(self.path, self.reading)
        self.asked = self.records.good[: self.limit]
        found = [(x, find_problem(x)) for x in self.asked]
        raise_problems(self.records, [Problem.of(x, problem) for x, problem in found if problem])
        self.plan = GenerationPlan(model, processor, GREEDY, writer=writer)
        return _questions(self._items()[:MOST_SHOWN], self.records.loader())

    def examine(self) -> Examination:
        """Put the questions to the model as it is now."""
        self.plan.model.eval()
        items = self._items()
        answerer = RowAnswerer(self.plan, BatchSize(self.batch_size))
        try:
            answer_items(answerer, items, self.records.loader(), name=str(self.path))
        except DataError as error:
            raise DataError(f"{error} They were asked for --eval-answers.") from None
        return Examination([_answer(item) for item in items])

    def _items(self) -> list[Item]:
        """Return the questions as rows, which have no answers yet."""
        items = [item for record in self.asked for item in make_items(record)]
        encode_items(items, self.records, self.plan)
        return items


def _answer(item: Item) -> ExaminedAnswer:
    text = "" if item.answers is None else item.answers[0].text
    is_right = item.answers is not None and Exact().score(make_sample(item, text)) == 1
    return ExaminedAnswer(item.id, text, is_right)


def _questions(items: Sequence[Item], loader: MediaLoader) -> list[Question]:
    """Return what a page shows of questions: their texts and, while there is room, their pictures."""
    found, size = [], 0
    for item in items:
        media = [part for part in item.asked if isinstance(part, Medium)]
        pictures = _pictures(media, loader) if size < MOST_BYTES else ()
        size += sum(map(len, pictures))
        found.append(Question(item.id, _texts(item.asked), item.expected, pictures))
    return found


def _texts(parts: Sequence[Text | Medium]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


def _pictures(media: Sequence[Medium], loader: MediaLoader) -> tuple[str, ...]:
    uris: list[str] = []
    for medium in media[:MOST_FRAMES]:
        try:
            frames = loader.load_medium(medium.source, medium.kind).frames
        except (MediaError, PromptError):  # the question has no answer then, and says so
            continue
        step = -(-len(frames) // MOST_FRAMES)
        uris += [data_uri(frame.copy(), MAX_PIXELS, quality=85) for frame in frames[::step]]
    return tuple(uris[:MOST_FRAMES])
