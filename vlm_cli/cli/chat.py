"""`vlm chat`: turns from a terminal or a pipe, and an answer to each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_cli.cli import console
from vlm_cli.cli.chat_commands import COMMANDS, ChatEnd, is_command, run_command, unescape
from vlm_cli.cli.chat_completion import complete_line
from vlm_cli.cli.chat_session import ChatRequest, ChatSession
from vlm_cli.cli.completion import complete_models
from vlm_cli.cli.history import History
from vlm_cli.cli.line_editor import LineEditor
from vlm_cli.cli.loading import ModelRequest, QuantizeOption, keep_collecting
from vlm_cli.cli.options import PlacementOptions, PrintOptions, SourceOptions, flatten_options
from vlm_cli.cli.prompts import ReadingOptions, TurnOptions
from vlm_cli.cli.sampling import SamplingOptions
from vlm_cli.cli.terminal import is_terminal
from vlm_cli.data.inputs import read_stdin_lines
from vlm_cli.errors import ContextError, PromptError, UsageError, VLMError
from vlm_cli.models import DEMO
from vlm_cli.text import decode_text

if TYPE_CHECKING:
    from vlm_cli.cli.loading import LoadedModel
    from vlm_cli.generation.chat import Chat

__all__ = ["chat", "talk"]


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
    devices: PlacementOptions = PlacementOptions(),
    quantize: QuantizeOption = None,
    source: SourceOptions = SourceOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    printing: PrintOptions = PrintOptions(),
    no_history: Annotated[
        bool,
        typer.Option(
            "--no-history",
            help="Neither read nor keep the lines that you type. VLM_HISTORY= in the environment does the same for all "
            "chats, and VLM_HISTORY=FILE names another file than ~/.local/state/vlm/chat_history.",
        ),
    ] = False,
) -> None:
    """Hold a conversation about images with a model.

    On a terminal, type a turn and press Enter; <image:FILE> in a turn shows an image, <video:FILE> a clip. /image FILE
    shows an image in the next turn, /save and /load keep a conversation as JSON messages, and /help lists all commands
    and keys. Ctrl-C ends an answer or clears the line, Ctrl-D ends the chat. In a pipe, each line of stdin is a turn,
    whatever it begins with. --prompt, --prompt-file, --image and --video bring the first turn.

    The model sees the whole conversation, and computes only what is new in each turn. The tokenizer's chat template
    formats the turns. Without a template, each answer follows its
    turn directly, and the next turn starts on a new line. With --json, each answer is one line of JSON.

    Example: vlm chat my-flamingo --image cat.jpg
    """
    request = ChatRequest(turn, reading, sampling, printing, source.allow_hosts, reading.choice, not no_history)
    request.check()
    talk(request, ModelRequest.of(model, devices, source, quantize=quantize, max_tiles=reading.max_tiles))


def talk(request: ChatRequest, wanted: ModelRequest) -> None:
    """Answer turns until the user has no more.

    Raises:
        VLMError: for a turn in a pipe that cannot be answered. On a terminal the user is told, and the turn forgotten.
    """
    first = request.first_turn()  # read before the model is
    loaded = wanted.load()
    keep_collecting()
    session = ChatSession(request, wanted, _start(request, loaded), is_typed=is_terminal(sys.stdin))
    if session.is_typed:
        console.note("Type a turn and press Enter; /help lists the commands. Ctrl-D ends the chat.")
    if first is not None:
        session.answer(first)
    if session.is_typed:
        _answer_typed(session)
        return
    for text in _piped_turns():
        session.answer(session.read(text))
    if not session.chat.turns:
        raise UsageError('no turn is given: printf "%s\\n" "<image:a.jpg>A photo of" "It is" | vlm chat')


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


def _answer_typed(session: ChatSession) -> None:
    """Do what the user types; an error is told, and the chat goes on."""
    takes = {name: command.takes for name, command in COMMANDS.items()}
    history = History.of_user() if session.request.keeps_history else None
    for entry in LineEditor(lambda line: complete_line(line, takes), history).entries():
        try:
            if not entry.is_block and is_command(entry.text):
                run_command(session, entry.text)
            else:
                session.answer(session.read(entry.text if entry.is_block else unescape(entry.text)))
        except ChatEnd:
            return
        except VLMError as error:
            console.error(str(error))
            if isinstance(error, ContextError):
                console.notify("/save FILE keeps the conversation, and /clear begins another one.")


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
