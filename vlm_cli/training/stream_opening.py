"""Open the records of a job as a stream, after a check of all of them if the user asks for one."""

from __future__ import annotations

from vlm_cli.data.problems import Problem, describe_problems
from vlm_cli.errors import DataError, UsageError, VLMError
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of
from vlm_cli.processor import VLMProcessor
from vlm_cli.training.dataset import Collator
from vlm_cli.training.job import Job
from vlm_cli.training.listener import Listener
from vlm_cli.training.preparing import RecordPreparer
from vlm_cli.training.processes import Processes
from vlm_cli.training.row_reader import RowReader
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.streaming import StreamedRecords, StreamPlan
from vlm_cli.writing.writer import PromptWriter

__all__ = ["check_streamable", "open_stream"]

SHUFFLE_BUFFER = 1_000  # rows, unless the user says otherwise


def check_streamable(job: Job) -> None:
    """Check that the records of a job can be read as a stream, before anything is loaded.

    Raises:
        UsageError: if they can be read only once, or their pictures are to be read before the first step.
    """
    mixture = job.mixture
    if mixture.pipes:
        raise UsageError(
            f"--streaming reads data in several passes, and again after --resume, but {str(mixture.pipes[0])!r} is a "
            "pipe, which can be read once. Give a file, or leave --streaming out."
        )
    if job.cache_features is not None:
        raise UsageError("--cache-features reads all pictures before the first step, and --streaming none. Give one.")


def open_stream(
    job: Job,
    settings: TrainingSettings,
    model: VLM,
    processor: VLMProcessor,
    writer: PromptWriter,
    *,
    processes: Processes,
    listener: Listener,
) -> StreamedRecords:
    """Open the records of a job.

    Args:
        job: names the records.
        settings: how they are learned.
        model: that learns them.
        processor: of the model.
        writer: turns prompts into tokens.
        processes: among which the rows are dealt.
        listener: hears what the check found.

    Raises:
        DataError: if a source cannot be read or, with `settings.check`, lists the rows that cannot be used.
    """
    mixture = job.mixture
    sources, preparer = list(mixture.open()), RecordPreparer(model, processor, writer, settings.too_long)
    readings = [ingredient.refine(job.reading) for ingredient in mixture.ingredients]
    reader = RowReader(sources, readings, preparer)
    num_good = None
    if settings.check:
        num_good = sum(_check_source(reader, index, settings, listener) for index in range(len(sources)))
    plan = StreamPlan(
        sources=sources,
        weights=mixture.weights,
        buffer=settings.shuffle_buffer or SHUFFLE_BUFFER,
        seed=settings.seed if mixture.seed is None else mixture.seed,
        batch_size=settings.batch_size,
        pack=settings.pack,
        skips=settings.bad_rows == "skip",
        rank=processes.rank,
        num_processes=processes.count,
        num_records=num_good,
    )
    return StreamedRecords(plan, reader, Collator(model.config.pad_token_id or 0))


def _check_source(reader: RowReader, index: int, settings: TrainingSettings, listener: Listener) -> int:
    """Read all rows of a source without decoding an image, and return the number of those that can be used.

    Raises:
        DataError: listing the others, unless they may be skipped.
    """
    source = reader.sources[index]
    listener.step(f"checking {source.quoted}")
    problems: list[Problem] = []
    total = 0
    for row in source.all_rows():
        total += 1
        try:
            reader.prepare(row, index)
        except VLMError as error:
            problems.append(Problem.of(row, str(error)))
    listener.step("")
    if not problems:
        listener.notify(f"Checked {count_of(total, 'row')} of {source.quoted}: all can be used.")
        return total
    found = describe_problems(problems, total, source)
    if settings.bad_rows == "error" or len(problems) == total:
        raise DataError(found)
    listener.notify(f"{found}\nThe run will skip them.")
    return total - len(problems)
