"""`vlm batch --engine ray`: processes on one machine or many, each with the model, answer pieces of the input.

Ray Data hands pieces to actors, starts a new actor for one that dies, and gives its piece to another. What is answered
stands in files (`batch_parts.py`), so that neither a killed actor nor a killed run loses or repeats a row.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.batch_options import BatchJob, RayOptions
from vlm_cli.cli.batch_parts import Parts, Piece, cut
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.data.formats.requests import begins_with_request
from vlm_cli.data.sources import open_source
from vlm_cli.errors import DataError, UsageError, VLMError, first_line
from vlm_cli.printable import count_of

if TYPE_CHECKING:
    from vlm_cli.cli.batch_answering import PromptRun
    from vlm_cli.data.sources import Source

__all__ = ["PieceAnswerer", "answer_by_ray"]


class PieceAnswerer:
    """One actor: a model and the input, opened once.

    Args:
        job: what the user wants.
        parts: where answers go.
    """

    def __init__(self, job: BatchJob, parts: Parts) -> None:
        from vlm_cli.cli.batch_answering import PromptRun
        from vlm_cli.cli.loading import keep_collecting
        from vlm_cli.quiet import silence_libraries

        silence_libraries()
        console.be_quiet()
        self.parts = parts
        self.source: Source = open_source(job.name)
        self.run: PromptRun = PromptRun(job, job.request.load(), self.source, lambda message: None)
        keep_collecting()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer pieces, and return for each what was done."""
        found: dict[str, list[int]] = {"rows": [], "failed": [], "new_tokens": []}
        for fields in zip(*(batch[name] for name in ("shard", "first", "begin", "count")), strict=True):
            shard, first, begin, count = (int(x) for x in fields)
            piece = Piece(shard, first, begin if begin >= 0 else None, count)
            before, failed = self.run.counts.new_tokens, 0
            with closing(self.run.answer(piece.rows(self.source))) as answered:
                answers = []
                for row in answered:
                    answers.append(row.to_dict())
                    failed += row.error is not None
            if len(answers) != count:
                raise DataError(f"{self.source.quoted} has fewer rows than when the run began. Start the run again.")
            self.parts.write(piece, iter(answers))
            for name, x in zip(found, (count, failed, self.run.counts.new_tokens - before), strict=True):
                found[name].append(x)
        return found


def answer_by_ray(job: BatchJob, options: RayOptions, *, as_json: bool) -> None:
    """Answer every row of a source by a pool of actors, or go on where an earlier run ended.

    Raises:
        VLMError: if the input or the output cannot be used, or Ray is missing. The answers that exist are kept.
        Exit: with code 1 if a row could not be answered.
    """
    _check_ray()
    run = _Run.open(job, options)
    if run.earlier:
        console.note(f"Resuming after {count_of(run.earlier, 'row')}, answered in {run.parts.store.name}.")
    started = time.monotonic()
    new_tokens, failed = run.answer(_start_ray()) if run.left else (0, 0)
    failed += run.count_failed_earlier()
    seconds = time.monotonic() - started
    console.note(
        f"{count_of(run.rows, 'row')}, {failed:,} failed, {count_of(new_tokens, 'new token')} in {seconds:.1f} s with "
        f"{count_of(options.actors, 'actor')}"
    )
    console.notify(f"Wrote {count_of(len(run.pieces), 'file')} to {run.parts.store.name}")
    if as_json:
        files = {"model": job.request.name, "batch": job.name, "output": run.parts.store.name}
        told = {"rows": run.rows, "failed": failed, "earlier": run.earlier, "new_tokens": new_tokens}
        more = {"files": len(run.pieces), "actors": options.actors, "seconds": round(seconds, 3)}
        console.print_json({**files, **told, **more})
    if failed:
        console.notify(f'{failed:,} of {count_of(run.rows, "row")} could not be answered; they have an "error".')
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Run:
    """A run over a source.

    Attributes:
        parts: its output.
        pieces: of the whole input.
        left: those without a part.
    """

    job: BatchJob
    options: RayOptions
    parts: Parts
    pieces: list[Piece]
    left: list[Piece]

    @classmethod
    def open(cls, job: BatchJob, options: RayOptions) -> _Run:
        """Cut the input into pieces, and find those that an earlier run answered.

        Raises:
            VLMError: if the input or the output cannot be used.
        """
        source = open_source(job.name)
        if job.rows.format is None and begins_with_request(source.all_rows())[0]:
            raise UsageError(
                f"{job.name!r} holds requests of OpenAI's protocol, which --engine ray does not answer. Leave it out."
            )
        pieces = list(cut(source, options.part_rows))
        if not pieces:
            raise DataError(f"{job.name!r} holds no rows.")
        settings = {**job.settings(), "the input": source.digest(), "--part-rows": options.part_rows}
        assert job.options.output is not None
        parts = Parts.open(
            str(job.options.output),
            {**settings, "--part-format": options.part_format},
            as_parquet=options.part_format == "parquet",
            overwrite=job.options.overwrite,
        )
        return cls(job, options, parts, pieces, parts.missing(pieces))

    @property
    def rows(self) -> int:
        """Rows of the input."""
        return sum(piece.count for piece in self.pieces)

    @property
    def earlier(self) -> int:
        """Rows that an earlier run answered."""
        return self.rows - sum(piece.count for piece in self.left)

    def answer(self, ray_data: Any) -> tuple[int, int]:
        """Let actors answer the pieces that are left, and count the tokens that they wrote and the rows that failed."""
        items = [{**asdict(piece), "begin": -1 if piece.begin is None else piece.begin} for piece in self.left]
        actors = min(self.options.actors, len(items))
        job = replace(self.job, options=replace(self.job.options, workers=self.job.options.workers or 0))
        answered = ray_data.from_items(items, override_num_blocks=len(items)).map_batches(
            PieceAnswerer,
            batch_size=1,
            fn_constructor_args=(job, self.parts),
            compute=ray_data.ActorPoolStrategy(size=actors),
            num_cpus=self.options.actor_cpus,
            num_gpus=self.options.actor_gpus,
        )
        console.note(f"{count_of(actors, 'actor')} for {count_of(len(items), 'piece')}")
        tokens, failed, done = 0, 0, self.earlier
        with ProgressLine(self.rows, noun="rows", done_before=done, has_summary=False) as progress:
            try:
                for found in answered.iter_rows():
                    tokens, failed = tokens + int(found["new_tokens"]), failed + int(found["failed"])
                    done += int(found["rows"])
                    progress.show(done)
            except Exception as error:
                cause = getattr(error, "cause", None) or error.__cause__ or error  # Ray wraps what an actor raised
                reason = str(cause) if isinstance(cause, VLMError) else first_line(cause)
                raise DataError(
                    f"the actors stopped: {reason} {self.parts.store.name} keeps what is answered."
                ) from None
        return tokens, failed

    def count_failed_earlier(self) -> int:
        """Count the rows that an earlier run could not answer."""
        left = set(self.left)
        return sum(self.parts.count_failed(piece) for piece in self.pieces if piece not in left)


def _check_ray() -> None:
    """Check that Ray is there, without importing it.

    Raises:
        UsageError: if it is not installed.
    """
    if find_spec("ray") is None or find_spec("ray.data") is None:
        raise UsageError("--engine ray needs the package ray, which is missing: pip install 'vlm-cli[ray]'")


def _start_ray() -> Any:
    """Start Ray, or join the cluster that RAY_ADDRESS names, and return `ray.data`."""
    import ray
    import ray.data

    logging.getLogger("ray").setLevel(logging.ERROR)
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray.data
