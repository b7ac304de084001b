"""How the rows of a file are answered: prompts by the engine of `vlm eval`, requests by that of `vlm serve`."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from vlm_cli.cli.batch_options import BatchJob
from vlm_cli.cli.sampling import MAX_NEW_TOKENS, MAX_SEQUENCES, cut_note
from vlm_cli.errors import UsageError, VLMError
from vlm_cli.printable import count_of
from vlm_cli.serving.limits import Limits

if TYPE_CHECKING:
    from vlm_cli.cli.loading import LoadedModel
    from vlm_cli.data.sources import Row, Source
    from vlm_cli.generation.answers import Counts
    from vlm_cli.generation.rows import FileRow
    from vlm_cli.serving.request_file import AnsweredRequest

__all__ = ["PromptRun", "RequestRun", "Run", "request_defaults"]

MOST_DETAILS = 5  # rows whose errors stderr shows with what only the user may see, such as a file's first bytes
MOST_MEDIA = 1_000_000  # of a request; the context of a model takes fewer
REQUESTS_AT_ONCE = 16  # answers that are written together, unless the user gives a number


class PromptRun:
    """Prompts, by the engine that finds how many rows go together.

    Args:
        job: what the user wants.
        loaded: the model.
        source: of the rows.
        notify: receives what the user should know at once.
    """

    def __init__(self, job: BatchJob, loaded: LoadedModel, source: Source, notify: Callable[[str], None]) -> None:
        from vlm_cli.generation.answers import RowAnswerer
        from vlm_cli.generation.batch_size import BatchSize
        from vlm_cli.generation.plan import GenerationPlan
        from vlm_cli.generation.rows import RowReader

        self.job, self.notify = job, notify
        keywords, stops = job.sampling.keywords(job.search), job.sampling.stop or ()
        writer = loaded.writer(job.choice, special_tokens=job.reading.special_tokens, system=job.reading.system)
        plan = GenerationPlan(loaded.model, loaded.processor, keywords, stops, writer)
        self.loader = job.loader(source)
        self.reader = RowReader(plan, self.loader, source, job.rows.format)
        self.answerer = RowAnswerer(plan, BatchSize(job.options.rows_at_once()), seed=job.sampling.seed, notify=notify)
        self._details = 0  # messages that stderr shows in full
        self._mentions: list[tuple[str, str]] = []
        self._notes: dict[str, list[str]] = {}  # note -> places of the rows that it is about
        self._cut: list[int] = []  # tokens of the answer to each row that --max-new-tokens or the context cut
        self._is_unjudged = job.request.is_demo  # whether a picture is to show that these are photographs

    @property
    def counts(self) -> Counts:
        """What was done."""
        return self.answerer.counts

    @property
    def batch_size(self) -> int:
        """Rows at once at the end."""
        return self.answerer.size.rows

    def answer(self, rows: Iterator[Row]) -> Generator[FileRow]:
        """Yield each row when it and all before it are done."""
        read = map(self.reader.read, rows)
        workers = self.job.options.num_workers()
        with closing(self.answerer.answer(read, self.loader, workers=workers)) as answered:
            for row in answered:
                self._look_at(row)
                yield row

    def _look_at(self, row: FileRow) -> None:
        if row.error is not None and str(row.error) != row.error.public and self._details < MOST_DETAILS:
            self._details += 1
            self.notify(f"  {row.place}: {row.error}")
        self._cut += row.cut
        self._mentions += [(row.place, name) for name in row.mentions]
        for note in row.notes:
            self._notes.setdefault(note, []).append(row.place)
        if self._is_unjudged and row.sources:
            self._is_unjudged = False
            with suppress(VLMError):
                shown = self.loader.load_medium(row.sources[0].source, row.sources[0].kind)
                self.job.request.warn_of_photographs([shown])

    def notes(self) -> list[str]:
        """Return what the user should know when all rows are done."""
        from vlm_cli.data.meant import mention_notes
        from vlm_cli.data.records import format_note

        of_rows = [format_note(note, places) for note, places in self._notes.items()]
        most = self.job.sampling.max_new_tokens
        cut = [cut_note(len(self._cut), self.counts.rows, max(self._cut), most)] if self._cut else []
        return [*mention_notes(self._mentions), *of_rows, *self.answerer.picture_notes.lines(), *cut]


class RequestRun:
    """Requests of OpenAI's protocol, by the engine in which each row says how its tokens are chosen.

    Args:
        job: what the user wants.
        loaded: the model.
        source: of the rows.
        notify: receives what the user should know at once.
        first: for each id, the place of the row that has it first.
    """

    def __init__(
        self,
        job: BatchJob,
        loaded: LoadedModel,
        source: Source,
        notify: Callable[[str], None],
        first: Mapping[str, str],
    ) -> None:
        from vlm_cli.serving.engine import Engine
        from vlm_cli.serving.preparing import Preparer, make_plan
        from vlm_cli.serving.request_file import RequestAnswerer

        limits = Limits(
            images=MOST_MEDIA,
            answers=MAX_SEQUENCES,
            new_tokens=job.sampling.max_new_tokens,
            most_new_tokens=MAX_NEW_TOKENS,
            seconds=math.inf,
            messages=MOST_MEDIA,
        )
        loader = job.loader(source)
        plan = make_plan(loaded.model, loaded.processor, limits, job.choice)
        self.batch_size = job.options.rows_at_once() or REQUESTS_AT_ONCE
        engine = Engine(plan, batch_size=self.batch_size, queue=MOST_MEDIA, tell=notify)
        preparer = Preparer(plan, limits, lambda: loader, keeps_files=True)
        self.name = job.request.name
        self.answerer = RequestAnswerer(engine, preparer, self.name, request_defaults(job), first)
        self._num_cut = 0
        self._others: list[tuple[str, str]] = []  # place of a row, and the model that it names

    @property
    def counts(self) -> Counts:
        """What was done."""
        return self.answerer.counts

    def answer(self, rows: Iterator[Row]) -> Generator[AnsweredRequest]:
        """Yield each row when it and all before it are done."""
        with closing(self.answerer.answer(rows)) as answered:
            for request in answered:
                self._num_cut += request.is_cut
                if request.model not in (None, self.name):
                    self._others.append((f"{request.origin.unit} {request.origin.number}", str(request.model)))
                yield request

    def notes(self) -> list[str]:
        """Return what the user should know when all rows are done."""
        from vlm_cli.data.records import format_note

        found = []
        if self._others:
            note = f"asks for the model {self._others[0][1][:100]!r}, and {self.name} answers"
            found.append(format_note(note, [place for place, _ in self._others]))
        if self._num_cut:
            which = f"answers to {count_of(self._num_cut, 'request')} of {self.counts.rows:,} were cut"
            found.append(f"Note: {which} before a stop token; max_tokens of a request allows more.")
        return found


Run: TypeAlias = PromptRun | RequestRun


def request_defaults(job: BatchJob) -> dict[str, Any]:
    """Return the keys of OpenAI's protocol for the options that the user gave.

    Raises:
        UsageError: for an option that the protocol has no key for.
    """
    sampling, reading = job.sampling, job.reading
    unknown = {
        "--top-k": sampling.top_k is not None,
        "--repetition-penalty": sampling.repetition_penalty != 1,
        "--num-beams": job.search.num_beams != 1,
        "--special-tokens": reading.special_tokens,
        "--system": reading.system is not None,
        "--workers": bool(job.options.workers),
    }
    if given := next((flag for flag, is_given in unknown.items() if is_given), None):
        raise UsageError(
            f"{job.name!r} holds requests of OpenAI's protocol, which say themselves how they are answered. Leave out "
            f"{given}."
        )
    keys = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop": sampling.stop,
        "seed": sampling.seed,
        "n": job.search.num_return_sequences if job.search.num_return_sequences > 1 else None,
    }
    return {key: x for key, x in keys.items() if x is not None}
