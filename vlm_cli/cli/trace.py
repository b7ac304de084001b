"""`vlm trace`: answer a prompt, and show what the model saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_cli.cli import console
from vlm_cli.cli.command import option
from vlm_cli.cli.loading import ModelOption, ModelRequest, QuantizeOption
from vlm_cli.cli.options import OUTPUT, JsonOption, PlacementOptions, QuietOption, SourceOptions, flatten_options
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.cli.prompts import (
    PromptOptions,
    ReadingOptions,
    TurnOptions,
    check_piped_picture,
    load_images,
    tell_images,
)
from vlm_cli.cli.sampling import SamplingOptions
from vlm_cli.errors import UsageError
from vlm_cli.files import check_file, replacing_files
from vlm_cli.models import DEMO

if TYPE_CHECKING:
    from vlm_cli.media import LoadedClip, LoadedImage
    from vlm_cli.prompt import Interleaved
    from vlm_cli.tracing.trace import Measure, Trace, Word

__all__ = ["trace"]

TRACE = "Trace"  # heading of these options in --help

_MOST_ALTERNATIVES = 100
_MOST_CELLS = 64


@dataclass(frozen=True)
class TraceSettings:
    """What is traced."""

    answer: Annotated[
        str | None,
        option(TRACE, "Trace TEXT as the answer, such as ' red', in the place of the model's own.", metavar="TEXT"),
    ] = None
    top: Annotated[
        int,
        option(
            TRACE, "Show the N likeliest tokens at each place.", min=1, max=_MOST_ALTERNATIVES, metavar="N"
        ),
    ] = 5  # fmt: skip
    grid: Annotated[
        int,
        option(
            TRACE,
            "Blank parts of a grid of N cells along a picture's longer side. Each picture takes about N² runs of the "
            "model.",
            min=1,
            max=_MOST_CELLS,
            metavar="N",
        ),
    ] = 8
    no_occlusion: Annotated[
        bool,
        option(TRACE, "Blank nothing: attention alone, which takes one run of the model.", "--no-occlusion"),
    ] = False

    def check(self) -> None:
        """Refuse settings that have no effect.

        Raises:
            UsageError: naming them.
        """
        if self.answer == "":
            raise UsageError("--answer needs a text, got ''.")


@dataclass(frozen=True)
class TraceFiles:
    """The files that show a trace."""

    html: Annotated[
        Path | None,
        option(
            OUTPUT,
            "Write the web page FILE, which needs no other file: point at a word of the answer to see its heat maps, "
            "its next-best words, and to what each layer attends.",
            metavar="FILE",
        ),
    ] = None
    png: Annotated[
        Path | None,
        option(OUTPUT, "Draw the heat map of each word over each picture, as the PNG FILE.", metavar="FILE"),
    ] = None
    overwrite: Annotated[bool, option(OUTPUT, "Replace files that exist.", "--overwrite")] = False

    @property
    def makers(self) -> Mapping[Path, Callable[[Trace], bytes]]:
        """What makes each file that the user wants."""
        makers = {self.html: _make_page, self.png: _draw}
        return {path: make for path, make in makers.items() if path is not None}

    def check(self) -> None:
        """Refuse a file that may not be written, before a model is loaded.

        Raises:
            UsageError: if both have one name, or one is standard output or has another ending.
            OutputExistsError: if one exists and --overwrite is not given.
        """
        if self.html is not None and self.html == self.png:
            raise UsageError(f"--html and --png both name {str(self.png)!r}. Give each a file of its own.")
        for path in self.makers:
            if str(path) == "-":
                raise UsageError("- means standard output, which gets the answer. Give --html and --png a file's name.")
            check_file(path, overwrite=self.overwrite)
        for flag, wanted, ending in (("--html", self.html, ".html"), ("--png", self.png, ".png")):
            if wanted is not None and wanted.suffix.lower() not in ("", ending):
                raise UsageError(f"{flag} writes no {wanted.suffix}. Give a name that ends in {ending}.")

    def write(self, found: Trace) -> None:
        """Write the files, all of them or none.

        Raises:
            CheckpointError: if the disk is full.
        """
        contents = [make(found) for make in self.makers.values()]
        with replacing_files(list(self.makers), overwrite=self.overwrite) as files:
            for file, content in zip(files, contents, strict=True):
                file.buffer.write(content)
        for path in self.makers:
            console.note(f"Wrote {path}")


def _make_page(found: Trace) -> bytes:
    from vlm_cli.tracing.page import make_page

    return make_page(found)


def _draw(found: Trace) -> bytes:
    from vlm_cli.tracing.png import draw_trace

    return draw_trace(found)


@flatten_options
def trace(
    first: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Directory that `vlm build` wrote, or hub id, as --model.", show_default=False
        ),
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help='Text of the prompt; <image:FILE> in it shows an image, as in "<image:cat.jpg>A photo of", and '
            "<video:FILE> a clip. Give - to read the prompt from stdin.",
            show_default=False,
        ),
    ] = None,
    turn: TurnOptions = TurnOptions(),
    reading: ReadingOptions = ReadingOptions(),
    model: ModelOption = DEMO.name,
    devices: PlacementOptions = PlacementOptions(),
    quantize: QuantizeOption = None,
    source: SourceOptions = SourceOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    settings: TraceSettings = TraceSettings(),
    files: TraceFiles = TraceFiles(),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer a prompt, and show what the model saw: each word's probability, and where in the pictures it comes from.

    Two measures say where: attention, followed through the language model and the vision tokenizer back to the
    pictures, and occlusion, which blanks one part of a picture after the other and looks how much less likely each
    word becomes.

    Example: vlm trace --html seen.html "<image:photo.jpg>Describe the image."
    """
    settings.check()
    sampling.keywords()  # refuses what contradicts itself
    files.check()
    name, prompts = _read_arguments(first, second, model, turn)
    request = ModelRequest.of(name, devices, source, quantize=quantize, max_tiles=reading.max_tiles)
    words = prompts.interleave()
    check_piped_picture(words)
    loader = reading.loader(prompts.folder, source.allow_hosts)
    media = load_images(words, loader)
    if not media and second is None and first is not None and (first == DEMO.name or Path(first).is_dir()):
        raise UsageError(
            f"{first!r} was read as the prompt, and the prompt shows no picture. Write one after the model: vlm trace "
            f'{first} "<image:photo.jpg>A photo of"'
        )
    found = _trace(request, words, media, reading, sampling, settings)
    files.write(found)
    if as_json:
        console.print_json(found.as_json(), indent=None)
        return
    console.print_answer(found.answer)
    _print_words(found)
    for note in found.notes:
        console.note(f"Note: {note}")


def _read_arguments(first: str | None, second: str | None, model: str, turn: TurnOptions) -> tuple[str, PromptOptions]:
    """Tell the model from the prompt; a single argument is the prompt, unless an option brings that.

    Raises:
        UsageError: if the model is given twice.
    """
    is_prompt = second is None and not turn.has_prompt
    name, prompt = (None, first) if is_prompt else (first, second)
    if name is not None and model != DEMO.name:
        raise UsageError(f"the model is given twice, as {name!r} and as --model {model!r}. Leave one of them out.")
    return name or model, PromptOptions(**vars(turn), prompt=prompt)


def _trace(
    request: ModelRequest,
    words: Interleaved,
    media: list[LoadedImage | LoadedClip],
    reading: ReadingOptions,
    sampling: SamplingOptions,
    settings: TraceSettings,
) -> Trace:
    from vlm_cli.generation.plan import GenerationPlan
    from vlm_cli.tracing.run import TraceOptions, check_shows_pictures, trace_prompt

    check_shows_pictures(media)
    loaded = request.load()
    tell_images(media, loaded.processor)
    request.warn_of_photographs(media)
    writer = loaded.writer(reading.choice, special_tokens=reading.special_tokens, system=reading.system)
    plan = GenerationPlan(loaded.model, loaded.processor, sampling.keywords(), sampling.stop or (), writer)
    options = TraceOptions(
        top=settings.top,
        cells=None if settings.no_occlusion else settings.grid,
        answer=settings.answer,
        seed=sampling.seed,
    )
    with ProgressLine(None, noun="parts blanked", has_summary=False) as line:

        def report(done: int, total: int) -> None:
            line.total = total
            line.show(done)

        return trace_prompt(
            plan, words.parts, media, options, name=request.name, notify=console.note, report=report
        )  # fmt: skip


# -- the table ---------------------------------------------------------------------------------------------------------


def _print_words(found: Trace) -> None:
    """Print a table of the words, with the picture that each attends to most and the one that it misses most."""
    heads: dict[Measure, str] = {"attention": "attends to", "occlusion": "falls without"}
    columns = ["word", "probability", "instead", *(heads[measure] for measure in found.measures)]
    rows = [
        [
            _show(word.text),
            _probability(word.probability),
            _list_alternatives(word),
            *(_name_most(found, i, measure) for measure in found.measures),
        ]
        for i, word in enumerate(found.words)
    ]
    console.print_table(columns, rows, optional=["instead"])


def _list_alternatives(word: Word) -> str:
    """List the two likeliest tokens that the model did not write where the word begins."""
    written = word.tokens[0].text
    others = [x for x in word.alternatives if x.text != written][:2]
    return ", ".join(f"{_show(x.text)} {_probability(x.probability)}" for x in others)


def _show(text: str) -> str:
    """Write a word without the spaces around it; quote one that would not be seen."""
    return text.strip() or repr(text)


def _number(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # the sum makes -0.0 to 0.0


def _probability(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def _name_most(found: Trace, word: int, measure: Measure) -> str:
    """Say how much of a word's attention goes to a picture, or how far it falls without one; of several, to which."""
    maps = [x for picture in range(len(found.pictures)) if (x := found.map(word, picture, measure)) is not None]
    most = max(maps, key=lambda x: x.whole)
    value = f"{most.whole:.0%}" if measure == "attention" else _number(most.whole)
    return value if len(maps) == 1 else f"picture {most.picture + 1}: {value}"
