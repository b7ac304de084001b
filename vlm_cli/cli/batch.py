"""`vlm batch`: the prompts of a file, and a file of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm_cli.cli.batch_job import answer_file
from vlm_cli.cli.batch_options import BatchJob, BatchOptions, RayOptions, RowOptions
from vlm_cli.cli.loading import ModelOption, ModelRequest, QuantizeOption
from vlm_cli.cli.options import JsonOption, PlacementOptions, QuietOption, SourceOptions, StatsOption, flatten_options
from vlm_cli.cli.prompts import ReadingOptions
from vlm_cli.cli.sampling import SamplingOptions, SearchOptions
from vlm_cli.data.inputs import is_stdin
from vlm_cli.errors import UsageError
from vlm_cli.models import DEMO

__all__ = ["batch"]


@flatten_options
def batch(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help='Prompts, such as {"prompt": "<image:cat.jpg>A photo of", "id": 7}, or rows of any format and source '
            "that `vlm train` reads, or requests of OpenAI's batch protocol; image paths start at the folder of FILE. "
            "Give - to read stdin.",
            show_default=False,
        ),
    ],
    batching: BatchOptions = BatchOptions(),
    spreading: RayOptions = RayOptions(),
    rows: RowOptions = RowOptions(),
    reading: ReadingOptions = ReadingOptions(),
    model: ModelOption = DEMO.name,
    devices: PlacementOptions = PlacementOptions(),
    quantize: QuantizeOption = None,
    source: SourceOptions = SourceOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    search: SearchOptions = SearchOptions(),
    as_json: JsonOption = False,
    stats: StatsOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer every prompt of a file.

    Each row of FILE is a prompt, or turns whose last question is answered. The output has the same rows in the same
    order, each with "text" (the answer) or "error" added; other keys stay as they are. Requests get the lines of
    OpenAI's protocol. The exit code is 1 if a row could not be answered.

    The model answers many prompts at once, encodes each image once, and reads a beginning that prompts share once.

    Example: vlm batch prompts.jsonl --output answers.jsonl --model my-flamingo
    """
    sampling.keywords(search)  # refuses what contradicts itself
    batching.check(file)
    request = ModelRequest.of(model, devices, source, quantize=quantize, max_tiles=reading.max_tiles)
    job = BatchJob(request, file, batching, reading, reading.choice, sampling, search, rows)
    if spreading.check():
        if is_stdin(Path(file)) or batching.prints:
            raise UsageError("--engine ray reads files and writes a directory. Give a FILE and --output DIR.")
        from vlm_cli.cli.batch_ray import answer_by_ray

        answer_by_ray(job, spreading, as_json=as_json)
        return
    answer_file(job, as_json=as_json, stats=stats)
