"""`ChatSession`: a conversation with a model, the pictures that wait for its next turn, and where its answers go."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_cli.cli import console
from vlm_cli.cli.loading import ModelRequest
from vlm_cli.cli.options import PrintOptions
from vlm_cli.cli.prompts import (
    ReadingOptions,
    TurnOptions,
    absolute_source,
    load_images,
    prepended_note,
    tell_images,
)
from vlm_cli.cli.sampling import SamplingOptions
from vlm_cli.data.inputs import base_folder
from vlm_cli.errors import PromptError, UsageError
from vlm_cli.interrupt import deferred_signals
from vlm_cli.printable import count_of
from vlm_cli.prompt import KINDS, Interleaved, Kind, Medium, Text, interleave
from vlm_cli.writing.choice import AUTO, TemplateChoice

if TYPE_CHECKING:
    from vlm_cli.generation.chat import Chat
    from vlm_cli.media import LoadedClip, LoadedImage, MediaLoader
    from vlm_cli.writing.turns import Exchange

__all__ = ["ChatRequest", "ChatSession", "Turn"]


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
        keeps_history: whether the lines that the user types are kept for the next chat.
    """

    first: TurnOptions
    reading: ReadingOptions
    sampling: SamplingOptions
    printing: PrintOptions
    allow_hosts: tuple[str, ...] = ()
    choice: TemplateChoice = AUTO
    keeps_history: bool = True

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            UsageError: naming the flags.
        """
        if self.first.takes_stdin:
            raise UsageError("a chat reads its turns from stdin, the first one too. Leave out the prompt -.")
        self.sampling.keywords()

    def loader(self, folder: Path | None = None) -> MediaLoader:
        """Make the loader of images whose relative paths start at a folder, or at the current one."""
        return self.reading.loader(folder, self.allow_hosts)

    def first_turn(self) -> Turn | None:
        """Read the prompt of the command line; None if the user gave none."""
        if not self.first.has_prompt:
            return None
        return Turn.load(self.first.interleave(), self.loader(self.first.folder))


@dataclass(frozen=True)
class Turn:
    """What the user says.

    Attributes:
        words: text, images and clips, in reading order.
        images: the images and clips.
        kept: the words, with whole paths, which mean the same wherever they are saved.
    """

    words: Interleaved
    images: list[LoadedImage | LoadedClip]
    kept: tuple[Text | Medium, ...]

    @classmethod
    def load(cls, words: Interleaved, loader: MediaLoader) -> Turn:
        """Load the images and clips of a turn.

        Raises:
            PromptError: if one of them is stdin.
            MediaError: if one of them cannot be read.
        """
        refuse_stdin(words.parts)
        return cls(words, load_images(words, loader), with_whole_paths(words.parts, loader))


def refuse_stdin(parts: Sequence[Text | Medium]) -> None:
    """Refuse a picture that stdin brings.

    Raises:
        PromptError: if there is one.
    """
    if any(isinstance(part, Medium) and part.is_stdin for part in parts):
        raise PromptError("stdin brings the turns of a chat, and cannot be an image. Give it as a file.")


def with_whole_paths(parts: Sequence[Text | Medium], loader: MediaLoader) -> tuple[Text | Medium, ...]:
    """Return the parts of a turn with paths that start at the root."""
    return tuple(
        Medium(absolute_source(part.source, loader.find), part.kind) if isinstance(part, Medium) else part
        for part in parts
    )


class ChatSession:
    """A conversation. What fails leaves it as it was.

    Args:
        request: what the user wants.
        wanted: the model that the user asked for.
        chat: the conversation, as the model reads it.
        is_typed: whether the user types the turns on a terminal.

    Attributes:
        waiting: images and clips that the next turn shows.
        exchanges: what was said, as the user sees it.
        system: what the model is told before the first turn; None for nothing.
    """

    def __init__(self, request: ChatRequest, wanted: ModelRequest, chat: Chat, *, is_typed: bool) -> None:
        self.request, self.wanted, self.chat, self.is_typed = request, wanted, chat, is_typed
        first = request.first
        given = {} if first.has_prompt else {"image": first.image, "video": first.video}
        self.waiting = [Medium(source, kind) for kind in KINDS for source in given.get(kind) or ()]
        self.exchanges: list[Exchange] = []
        self.system = chat.plan.writer.system
        self._told = set[Medium]()  # of those that wait, the ones of which the user has been told
        self._saved = set[Path]()  # files that this session wrote, and may write anew

    # -- turns ---------------------------------------------------------------------------------------------------------

    def read(self, text: str) -> Turn:
        """Read a turn, which shows what waits for it."""
        images, videos = ([x.source for x in self.waiting if x.kind == kind] for kind in KINDS)
        words = interleave(text, images, videos, given_with="/image" if self._told else "--image")
        if words.images_prepended and not self._told:
            console.note(prepended_note("turn", images, videos))
        return Turn.load(words, self.request.loader())

    def answer(self, turn: Turn) -> None:
        """Answer a turn, and print the answer.

        Raises:
            VLMError: if the turn cannot be answered.
        """
        from vlm_cli.generation.text_stream import TextStream
        from vlm_cli.writing.turns import Exchange

        plan, printing = self.chat.plan, self.request.printing
        told = {medium.source for medium in self._told}
        tell_images([image for image in turn.images if image.source not in told], plan.processor)
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
        self.exchanges.append(Exchange(turn.kept, found.answer.text))
        self._drop_waiting()
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

    def show(self, source: str, kind: Kind) -> None:
        """Add an image or a clip to the next turn, and tell what it is and what it costs.

        Raises:
            PromptError, MediaError: if it cannot be read.
        """
        from vlm_cli.templates.clip_text import split_clips

        medium = Medium(source, kind)
        refuse_stdin([medium])
        plan = self.chat.plan
        loaded = self.request.loader().load_medium(source, kind)
        sizes = [plan.processor.image_processor.read(x).size for x in split_clips([loaded], plan.processor)]
        tell_images([loaded], plan.processor)
        self.waiting.append(medium)
        self._told.add(medium)
        cost = count_of(plan.budget.positions(len(sizes), sizes), "position")
        waiting = "" if len(self.waiting) == 1 else f", the last of {len(self.waiting)}"
        console.note(f"Your next turn shows it{waiting}; it takes {cost} of the context.")

    # -- the whole conversation ----------------------------------------------------------------------------------------

    def begin(self, system: str | None) -> None:
        """Forget turns and pictures, and begin with this system text, or with none.

        Raises:
            UsageError: if the model has no place for the text.
        """
        if system is not None:
            self._check_system("/system")
        self.chat.begin(system)
        self.system = system
        self.exchanges.clear()
        self._drop_waiting()

    def save(self, path: Path) -> None:
        """Write the conversation as a file of messages.

        Raises:
            UsageError: if nothing was said, or the file exists and is not of this session.
            CheckpointError: if it cannot be written.
        """
        from vlm_cli.generation.saved_chat import SavedChat, save_chat

        if not self.exchanges:
            raise UsageError("no turn has been answered, so there is nothing to save. Type a turn first.")
        save_chat(path, SavedChat(tuple(self.exchanges), self.system), overwrite=path.absolute() in self._saved)
        self._saved.add(path.absolute())

    def load(self, path: Path) -> None:
        """Go on with the conversation of a file of messages, in the place of this one.

        Raises:
            DataError: if the file holds none.
            MediaError: if a picture of it cannot be read.
            VLMError: if the model cannot read it.
        """
        from vlm_cli.generation.saved_chat import read_chat
        from vlm_cli.writing.turns import Exchange

        found = read_chat(path)
        refuse_stdin(found.media)
        if found.system is not None:
            self._check_system("the system text of that file")
        loader = self.request.loader(base_folder(path))
        media = [loader.load_medium(x.source, x.kind) for x in found.media]
        self.chat.resume(found.turns, media, found.system)
        self.system = found.system
        self.exchanges = [Exchange(with_whole_paths(turn.asks, loader), turn.answer) for turn in found.turns]
        self._drop_waiting()

    def _check_system(self, given: str) -> None:
        from vlm_cli.writing.writer import check_system

        check_system(self.chat.plan.processor, self.request.choice, given)

    def _drop_waiting(self) -> None:
        self.waiting.clear()
        self._told.clear()
