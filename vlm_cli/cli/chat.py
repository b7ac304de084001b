"""`vlm chat`: turns from a terminal or a pipe, and an answer to each."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_cli.cli import console
from vlm_cli.cli.completion import complete_models
from vlm_cli.cli.loading import ModelRequest, QuantizeOption, keep_collecting
from vlm_cli.cli.options import DeviceOptions, PrintOptions, SourceOptions, flatten_options
from vlm_cli.cli.prompts import ReadingOptions, TurnOptions, load_images, prepended_note, tell_images
from vlm_cli.cli.sampling import SamplingOptions
from vlm_cli.cli.terminal import is_terminal, write
from vlm_cli.data.inputs import read_stdin_lines
from vlm_cli.errors import ContextError, PromptError, UsageError, VLMError
from vlm_cli.interrupt import deferred_signals, raising_signals
from vlm_cli.models import DEMO
from vlm_cli.printable import count_of
from vlm_cli.prompt import Interleaved, Medium, interleave
from vlm_cli.text import decode_text
from vlm_cli.writing.choice import AUTO, TemplateChoice

if TYPE_CHECKING:
    from vlm_cli.cli.loading import LoadedModel
    from vlm_cli.generation.chat import Chat
    from vlm_cli.media import LoadedClip, LoadedImage

__all__ = ["ChatRequest", "chat", "talk"]


@flatten_options
def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Directory that `vlm build` wrote, or hub id.", autocompletion=complete_models
        ),
    ] = DEMO.name,
    turn: TurnOptions = TurnOptions(),
    reading: ReadingOptions = ReadingOptions(),
    devices: DeviceOptions = DeviceOptions(),
    quantize: QuantizeOption = None,
    source: SourceOptions = SourceOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    printing: PrintOptions = PrintOptions(),
) -> None:
    """Hold a conversation about images with a model.

    On a terminal, type a turn and press Enter; <image:FILE> in a turn shows an image, <video:FILE> a clip. Ctrl-C ends
    an answer or clears the line, Ctrl-D ends the chat. In a pipe, each line of stdin is a turn. --prompt,
    --prompt-file, --image and --video bring the first turn.

    The model sees the whole conversation, and computes only what is new in each turn. The tokenizer's chat template
    formats the turns. Without a template, each answer follows its
    turn directly, and the next turn starts on a new line. With --json, each answer is one line of JSON.

    Example: vlm chat my-flamingo --image cat.jpg
    """
    request = ChatRequest(turn, reading, sampling, printing, source.allow_hosts, reading.choice)
    request.check()
    talk(request, ModelRequest.of(model, devices, source, quantize=quantize, max_tiles=reading.max_tiles))


@dataclass(frozen=True)
class ChatRequest:
    """What a user wants of a chat.

    Attributes:
        first: the first turn, and its images.
        reading: how turns are read.
        sampling: how answers are made.
        printing: how answers are printed.
        allow_hosts: hosts of images that may have an internal address.
        choice: which chat template writes the turns.
    """

    first: TurnOptions
    reading: ReadingOptions
    sampling: SamplingOptions
    printing: PrintOptions
    allow_hosts: tuple[str, ...] = ()
    choice: TemplateChoice = AUTO

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            UsageError: naming the flags.
        """
        if self.first.takes_stdin:
            raise UsageError("a chat reads its turns from stdin, the first one too. Leave out the prompt -.")
        self.sampling.keywords()


@dataclass(frozen=True)
class Turn:
    """What the user says: text, images and clips, in reading order."""

    words: Interleaved
    images: list[LoadedImage | LoadedClip]


def talk(request: ChatRequest, wanted: ModelRequest) -> None:
    """Answer turns until the user has no more.

    Raises:
        ContextError: if the conversation has outgrown the context.
        VLMError: for a turn in a pipe that cannot be answered. On a terminal the user is told, and the turn forgotten.
    """
    first = _first_turn(request)  # read before the model is
    loaded = wanted.load()
    keep_collecting()
    session = ChatSession(request, wanted, _start(request, loaded), is_typed=is_terminal(sys.stdin))
    if session.is_typed:
        console.note("Type a turn and press Enter; <image:FILE> in it shows an image. Ctrl-D ends the chat.")
    if first is not None:
        session.answer(first)
    for text in _typed_turns() if session.is_typed else _piped_turns():
        try:
            session.answer(session.read(text))
        except VLMError as error:
            if not session.is_typed or isinstance(error, ContextError):
                raise
            console.error(str(error))
    if not session.chat.turns and not session.is_typed:
        raise UsageError('no turn is given: printf "%s\\n" "<image:a.jpg>A photo of" "It is" | vlm chat')


def _first_turn(request: ChatRequest) -> Turn | None:
    """Read the prompt of the command line; None if the user gave none."""
    if not request.first.has_prompt:
        return None
    return _turn(request.first.interleave(), request, request.first.folder)


def _turn(words: Interleaved, request: ChatRequest, folder: Path | None) -> Turn:
    """Load the images of a turn.

    Raises:
        PromptError: if one of them is stdin.
        MediaError: if one of them cannot be read.
    """
    if any(isinstance(part, Medium) and part.is_stdin for part in words.parts):
        raise PromptError("stdin brings the turns of a chat, and cannot be an image. Give it as a file.")
    return Turn(words, load_images(words, request.reading.loader(folder, request.allow_hosts)))


def _start(request: ChatRequest, loaded: LoadedModel) -> Chat:
    from transformers import set_seed

    from vlm_cli.generation.chat import Chat
    from vlm_cli.generation.plan import GenerationPlan

    if request.sampling.seed is not None:
        set_seed(request.sampling.seed)
    reading = request.reading
    writer = loaded.writer(request.choice, special_tokens=reading.special_tokens, system=reading.system, tells=False)
    plan = GenerationPlan(
        loaded.model, loaded.processor, request.sampling.keywords(), request.sampling.stop or (), writer
    )
    if writer.format is not None:
        console.note("Template: the tokenizer's chat template")
    return Chat(plan)


@dataclass(frozen=True)
class ChatSession:
    """A conversation, and where its answers go.

    Attributes:
        request: what the user wants.
        wanted: the model that the user asked for.
        chat: the conversation.
        is_typed: whether the user types the turns on a terminal.
    """

    request: ChatRequest
    wanted: ModelRequest
    chat: Chat
    is_typed: bool

    def read(self, text: str) -> Turn:
        """Read a turn; the first one takes the images of the command line."""
        first = self.request.first
        files = ((), ()) if self.chat.turns else (tuple(first.image or ()), tuple(first.video or ()))
        words = interleave(text, *files)
        if words.images_prepended:
            console.note(prepended_note("turn", *files))
        return _turn(words, self.request, None)

    def answer(self, turn: Turn) -> None:
        """Answer a turn, and print the answer.

        Raises:
            VLMError: if the turn cannot be answered. The conversation stays as it was.
        """
        from vlm_cli.generation.text_stream import TextStream

        plan, printing = self.chat.plan, self.request.printing
        tell_images(turn.images, plan.processor)
        self.wanted.warn_of_photographs(turn.images)
        streamer = TextStream(plan.decode, console.write_answer, plan.stops) if printing.streams else None
        # On a terminal, Ctrl-C ends the answer; in a pipe, it ends the command, as SIGTERM always does.
        ends_answer = deferred_signals(numbers=(signal.SIGINT,)) if self.is_typed else nullcontext(lambda: False)
        with ends_answer as is_interrupted:
            found = self.chat.answer(
                turn.words.parts,
                turn.images,
                streamer=streamer,
                notify=console.note,
                is_interrupted=is_interrupted,
            )
        if printing.as_json:
            console.print_json(found.to_dict(), indent=None)
        else:
            console.print_answer("" if printing.streams else found.answer.text)
        self.request.sampling.tell_cut([found.answer])
        if printing.stats:
            console.notify(
                f"{count_of(found.prompt_positions, 'position')}, {found.reused_positions:,} of them read before, "
                f"{count_of(found.answer.new_tokens, 'new token')} in {found.seconds:.2f} s, "
                f"peak memory {console.human_bytes(console.peak_memory(plan.model.device))}"
            )


#: Python's `input`. `main` takes that name away from libraries, which could ask for what only a user may answer.
_read_line = input


def _typed_turns() -> Iterator[str]:
    """Yield lines that the user types, until Ctrl-D; skip those without text.

    Ctrl-C clears the line. A second one, with no line between the two, ends the chat.
    """
    with suppress(ImportError):  # gives arrow keys and a history, on systems that have it
        import readline  # noqa: F401
    has_cleared = False  # whether Ctrl-C was the last key
    while True:
        # `input` writes its prompt to stdout, among the answers if these go to a file.
        if not is_terminal(sys.stdout):
            write("> ", end="", to_stderr=True)
        try:
            with raising_signals():
                text = _read_line("> " if is_terminal(sys.stdout) else "")
        except EOFError:
            console.notify("")
            return
        except KeyboardInterrupt as error:
            if has_cleared or getattr(error, "number", signal.SIGINT) != signal.SIGINT:
                raise
            has_cleared = True
            console.notify("")
            console.notify("Ctrl-D ends the chat, and so does a second Ctrl-C.")
            continue
        has_cleared = False
        if text.strip():
            yield text


def _piped_turns() -> Iterator[str]:
    """Yield lines of stdin; skip those without text.

    Raises:
        PromptError: for a line that is no UTF-8 text.
    """
    for number, raw in enumerate(read_stdin_lines(), start=1):
        try:
            text = decode_text(raw).rstrip("\n")
        except ValueError as error:
            raise PromptError(f"line {number} of stdin is {error}.") from None
        if text.strip():
            yield text
