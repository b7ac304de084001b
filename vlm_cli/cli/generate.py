"""`vlm generate`: the answer to one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.batch_job import answer_file
from vlm_cli.cli.batch_options import BatchJob, BatchOptions
from vlm_cli.cli.chat import talk
from vlm_cli.cli.chat_session import ChatRequest
from vlm_cli.cli.command import option
from vlm_cli.cli.loading import LoadedModel, ModelOption, ModelRequest, QuantizeOption
from vlm_cli.cli.options import HIDDEN, RUN, PlacementOptions, PrintOptions, SourceOptions, flatten_options
from vlm_cli.cli.prompts import (
    PromptOptions,
    ReadingOptions,
    check_piped_picture,
    load_images,
    tell_images,
)
from vlm_cli.cli.sampling import SamplingOptions, SearchOptions
from vlm_cli.errors import UsageError
from vlm_cli.models import DEMO
from vlm_cli.printable import count_of
from vlm_cli.prompt import Interleaved, format
from vlm_cli.writing.choice import TemplateChoice

if TYPE_CHECKING:
    from vlm_cli.generation.single import Generation
    from vlm_cli.media import LoadedClip, LoadedImage, MediaLoader

__all__ = ["generate"]

ALIASES = "Other commands"  # heading in --help


@dataclass(frozen=True)
class AliasOptions:
    """Older spellings of `vlm batch` and `vlm chat`."""

    batch: Annotated[
        str | None,
        option(
            ALIASES,
            "Same as `vlm batch FILE`; takes the options --output, --batch-size, --workers and --overwrite of "
            "that command.",
            metavar="FILE",
        ),
    ] = None
    chat: Annotated[bool, option(ALIASES, "Same as `vlm chat`.", "--chat")] = False

    def check(self, batching: BatchOptions, for_chat: list[str], for_batch: list[str]) -> None:
        """Refuse flags that the other command does not have.

        Args:
            batching: options of `vlm batch`.
            for_chat: flags that the user gave and `vlm chat` does not have.
            for_batch: flags that the user gave and `vlm batch` does not have.

        Raises:
            UsageError: naming the first of them.
        """
        if self.batch is not None and self.chat:
            raise UsageError("--batch answers the prompts of a file, and --chat holds one conversation. Choose one.")
        if self.batch is None and batching.given:
            raise UsageError(
                f"{batching.given[0]} is an option of `vlm batch FILE`, which answers a file of prompts; the answer to "
                f"one prompt goes to stdout. Run `vlm batch FILE`, or leave out {batching.given[0]}."
            )
        flag, clashing = ("--batch", for_batch) if self.batch is not None else ("--chat", for_chat)
        if clashing and (self.batch is not None or self.chat):
            command = flag.removeprefix("--")
            raise UsageError(f"{clashing[0]} is no option of `vlm {command}`. Leave out {clashing[0]} or {flag}.")


@dataclass(frozen=True)
class PromptJob:
    """One prompt, and how it is to be answered."""

    words: Interleaved
    images: list[LoadedImage | LoadedClip]
    reading: ReadingOptions
    choice: TemplateChoice
    sampling: SamplingOptions
    search: SearchOptions
    compile: bool
    streams: bool


@flatten_options
def generate(
    prompts: PromptOptions = PromptOptions(),
    reading: ReadingOptions = ReadingOptions(),
    model: ModelOption = DEMO.name,
    devices: PlacementOptions = PlacementOptions(),
    quantize: QuantizeOption = None,
    compile: Annotated[
        bool,
        option(
            RUN,
            "Compile the step that writes a token. This takes about a minute, and pays off for answers of "
            "thousands of tokens.",
            "--compile",
        ),
    ] = False,
    source: SourceOptions = SourceOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    search: SearchOptions = SearchOptions(),
    printing: PrintOptions = PrintOptions(),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the tokens and positions of the prompt, and write no answer.")
    ] = False,
    aliases: AliasOptions = AliasOptions(),
    batching: Annotated[BatchOptions, HIDDEN] = BatchOptions(),
) -> None:
    """Answer one prompt of text, images and clips. Only the new text goes to stdout.

    `vlm batch FILE` answers the prompts of a file; `vlm chat` holds a conversation.

    Example: vlm generate --model my-flamingo "<image:cat.jpg>A photo of"
    """
    single = {"--dry-run": dry_run, "--compile": compile}
    several = {"--num-beams": search.num_beams > 1, "--num-return-sequences": search.num_return_sequences > 1}
    aliases.check(
        batching,
        for_chat=_typed(single | several),
        for_batch=[*prompts.given, *_typed(single | {"--no-stream": printing.no_stream})],
    )
    sampling.keywords(search)  # refuses what contradicts itself
    request = partial(ModelRequest.of, model, devices, source, quantize=quantize, max_tiles=reading.max_tiles)
    if aliases.batch is not None:
        batching.check(aliases.batch)
        job = BatchJob(request(), aliases.batch, batching, reading, reading.choice, sampling, search)
        answer_file(job, as_json=printing.as_json, stats=printing.stats)
    elif aliases.chat:
        chat = ChatRequest(prompts, reading, sampling, printing, source.allow_hosts, reading.choice)
        chat.check()
        talk(chat, request())
    else:
        choice = reading.choice
        words = prompts.interleave()
        check_piped_picture(words)
        wanted = request(compile=compile)
        loader = reading.loader(prompts.folder, source.allow_hosts)
        images = load_images(words, loader)
        if dry_run:
            _show_layout(wanted, words, images, loader, printing.as_json, reading, choice)
            return
        # Beams and several answers are known only at the end.
        streams = printing.streams and search == SearchOptions()
        asked = PromptJob(words, images, reading, choice, sampling, search, compile, streams)
        _answer_prompt(wanted, asked, printing)


def _typed(flags: dict[str, bool]) -> list[str]:
    return [flag for flag, is_given in flags.items() if is_given]


def _show_layout(
    request: ModelRequest,
    words: Interleaved,
    images: list[LoadedImage | LoadedClip],
    loader: MediaLoader,
    as_json: bool,
    reading: ReadingOptions,
    choice: TemplateChoice,
) -> None:
    """Print the tokens and positions of a prompt; no weights are loaded."""
    from vlm_cli.cli.inspect import print_layout
    from vlm_cli.models import load_meta_model, read_processor_of
    from vlm_cli.quiet import silence_libraries
    from vlm_cli.report.layout import lay_out
    from vlm_cli.writing.writer import PromptWriter

    silence_libraries()
    directory, source = request.directory, request.source
    model, _, _ = load_meta_model(
        directory, trust_remote_code=source.trust_remote_code, revision=source.revision
    )  # fmt: skip
    processor = read_processor_of(directory, source.revision, trust_remote_code=source.trust_remote_code)
    request.limit_tiles(processor)
    tell_images(images, processor)
    writer = PromptWriter(processor, choice, system=reading.system, parse_special_tokens=reading.special_tokens)
    print_layout(lay_out(model, processor, words.parts, writer, loader), as_json)


def _answer_prompt(request: ModelRequest, job: PromptJob, printing: PrintOptions) -> None:
    """Answer a prompt, and print the answer."""
    loaded = request.load()
    check_piped_picture(job.words)  # a slow program may have written it only now
    tell_images(job.images, loaded.processor)
    request.warn_of_photographs(job.images)
    found = _generate(loaded, job)
    if printing.as_json:
        prompt = {"model": request.name, "prompt": format(job.words.parts)}
        console.print_json(prompt | _to_dict(found, job.images, job.sampling.seed, loaded.seconds))
    else:
        console.print_answer("" if job.streams else "\n".join(answer.text for answer in found.answers))
    job.sampling.tell_cut(found.answers)
    if printing.stats:
        console.notify(_statistics(found, loaded))


def _generate(loaded: LoadedModel, job: PromptJob) -> Generation:
    from vlm_cli.generation.plan import GenerationPlan
    from vlm_cli.generation.single import generate_once
    from vlm_cli.generation.text_stream import TextStream

    sampling = job.sampling
    writer = loaded.writer(job.choice, special_tokens=job.reading.special_tokens, system=job.reading.system)
    plan = GenerationPlan(loaded.model, loaded.processor, sampling.keywords(job.search), sampling.stop or (), writer)
    return generate_once(
        plan,
        job.words.parts,
        job.images,
        seed=sampling.seed,
        compile=job.compile,
        streamer=TextStream(plan.decode, console.write_answer, plan.stops) if job.streams else None,
        notify=console.note,
    )


def _to_dict(
    found: Generation, images: list[LoadedImage | LoadedClip], seed: int | None, load_seconds: float
) -> dict[str, Any]:
    sequences = [answer.to_dict() for answer in found.answers]
    return {
        **sequences[0],
        "sequences": sequences,
        "prompt_tokens": found.prompt_tokens,
        "prompt_positions": found.prompt_positions,
        "images": [_medium_to_dict(x) for x in images],
        "seed": seed,
        "load_seconds": round(load_seconds, 3),
        "compile_seconds": round(found.compile_seconds, 3),
        "seconds": round(found.seconds, 3),
    }


def _medium_to_dict(medium: LoadedImage | LoadedClip) -> dict[str, Any]:
    from vlm_cli.media import LoadedClip

    size = {"source": medium.source, "width": medium.width, "height": medium.height}
    if not isinstance(medium, LoadedClip):
        return size
    return size | {"frames": list(medium.chosen.indices), "seconds": medium.chosen.seconds}


def _statistics(found: Generation, loaded: LoadedModel) -> str:
    compiled = f"compilation {found.compile_seconds:.2f} s, " if found.compile_seconds else ""
    return (
        f"{count_of(found.prompt_tokens, 'prompt token')} ({count_of(found.prompt_positions, 'position')}), "
        f"{count_of(found.new_tokens, 'new token')} in "
        f"{found.seconds:.2f} s ({found.new_tokens / found.seconds:.1f} tokens/s), load {loaded.seconds:.2f} s, "
        f"{compiled}peak memory {console.human_bytes(console.peak_memory(loaded.model.device))}"
    )
