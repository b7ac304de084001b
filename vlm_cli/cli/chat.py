"""`vlm generate --chat`: turns from a terminal or a pipe, and an answer to each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

from vlm_cli.cli import console
from vlm_cli.cli.loading import keep_collecting
from vlm_cli.cli.options import SamplingOptions
from vlm_cli.cli.prompts import PromptOptions
from vlm_cli.errors import ContextError, PromptError, UsageError, VLMError
from vlm_cli.interrupt import deferred_interrupt
from vlm_cli.prompt import Interleaved, Medium, interleave

__all__ = ["ChatRun", "check_chat"]


def check_chat(prompts: PromptOptions, sampling: SamplingOptions, given: Mapping[str, bool]) -> None:
    """
    Args:
        prompts: the user's.
        sampling: the user's.
        given: whether flags were given that mean a single prompt.

    Raises:
        UsageError: for flags that do not go with a conversation.
    """
    if "-" in (prompts.prompt, prompts.prompt_option):
        raise UsageError("stdin brings the turns of a chat, the first one too. Leave out the prompt - or --chat.")
    sampling.keywords()
    given = {
        **given,
        "--num-beams": sampling.num_beams > 1,
        "--num-return-sequences": sampling.num_return_sequences > 1,
    }
    reasons = {
        "--dry-run": "shows the layout of one prompt",
        "--compile": "is for one long answer",
    }
    if flag := next((flag for flag, is_given in given.items() if is_given), None):
        reason = reasons.get(flag, "gives several answers at once, and a chat goes on with one")
        raise UsageError(f"{flag} {reason}. Leave out {flag} or --chat.")


@dataclass
class ChatRun:
    """One conversation on a terminal or in a pipe.

    Args:
        prompts: the user's; the first turn and its images.
        sampling: the user's.
        load: makes the model, its processor, and the seconds that this took.
    """

    prompts: PromptOptions
    sampling: SamplingOptions
    load: Callable[[], tuple[Any, Any, float]]

    def talk(self, *, stream: bool, as_json: bool, stats: bool) -> None:
        """Answer turns until there are no more.

        Args:
            stream: show an answer as it is written.
            as_json: print one JSON object for each turn.
            stats: tell what each turn cost.

        Raises:
            ContextError: if the conversation has outgrown the context.
            VLMError: for a turn in a pipe that cannot be answered; on a terminal it is told, and forgotten.
        """
        self.stream, self.as_json, self.stats = stream, as_json, stats
        first, self.images = self._given_turn(), tuple(self.prompts.image or ())
        self.chat = self._start()
        self.typed = is_terminal(sys.stdin)
        if first is not None:
            self._answer(*first)
        for text in _typed_turns() if self.typed else _piped_turns():
            try:
                self._answer(*self._read(text))
            except VLMError as error:
                if not self.typed or isinstance(error, ContextError):
                    raise
                console.error(str(error))
        if not self.chat.turns and not self.typed:
            raise UsageError('no turn is given: printf "%s\\n" "<image:a.jpg>A photo of" "It is" | vlm generate --chat')

    def _given_turn(self) -> tuple[Interleaved, list[Any]] | None:
        """The prompt of the command line, read before the model is."""
        if self.prompts.prompt is self.prompts.prompt_option is self.prompts.prompt_file is None:
            return None
        found = self.prompts.interleave()
        return found, self._load(found, self.prompts)

    def _read(self, text: str) -> tuple[Interleaved, list[Any]]:
        """A turn; the first takes the images of the command line."""
        images = () if self.chat.turns else self.images
        found = interleave(text, images)
        if found.images_prepended:
            console.notify("Note: the turn has no <image> placeholder, so the images come first.")
        return found, self._load(found, replace(self.prompts, prompt_file=None))

    def _load(self, found: Interleaved, prompts: PromptOptions) -> list[Any]:
        if Medium("-") in found.parts:
            raise PromptError("stdin brings the turns of a chat, and cannot be an image. Give it as a file.")
        return [image.image for image in prompts.load(found)]

    def _start(self) -> Any:
        from vlm_cli.quiet import silence_libraries

        silence_libraries()
        model, processor, _ = self.load()
        keep_collecting()
        from transformers import set_seed

        from vlm_cli.generation.chat import Chat
        from vlm_cli.generation.decoder import Decoder

        if self.sampling.seed is not None:
            set_seed(self.sampling.seed)
        decoder = Decoder(model, processor, self.sampling.keywords(), self.sampling.stop or ())
        return Chat(decoder, parse_special_tokens=self.prompts.special_tokens)

    def _answer(self, turn: Interleaved, images: list[Any]) -> None:
        from vlm_cli.cli.stream import TextStream

        decoder = self.chat.decoder
        streamer = TextStream(decoder.decode, _write, decoder.stops) if self.stream else None
        with deferred_interrupt() if self.typed else nullcontext(lambda: False) as is_interrupted:
            found = self.chat.answer(
                turn.parts, images, streamer=streamer, notify=console.notify, is_interrupted=is_interrupted
            )
        if self.as_json:
            console.print_json(found, indent=None)
        else:
            print("" if self.stream else found["text"], flush=True)
        if self.stats:
            console.notify(
                f"{found['prompt_positions']} positions, {found['reused_positions']} of them read before, "
                f"{found['new_tokens']} new tokens in {found['seconds']:.2f} s, "
                f"peak memory {console.human_bytes(console.peak_memory(decoder.model.device))}"
            )


def is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def _typed_turns() -> Iterator[str]:
    """Lines that are typed, until Ctrl-D; those without text are skipped."""
    with suppress(ImportError):  # arrows and history, where there are any
        import readline  # noqa: F401
    while True:
        # `input` would write its prompt among the answers if these go to a file.
        if not is_terminal(sys.stdout):
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            text = input("> " if is_terminal(sys.stdout) else "")
        except EOFError:
            console.notify("")
            return
        if text.strip():
            yield text


def _piped_turns() -> Iterator[str]:
    """Lines of stdin; those without text are skipped.

    Raises:
        PromptError: for one that is no text.
    """
    for number, raw in enumerate(sys.stdin.buffer if sys.stdin is not None else (), start=1):
        try:
            text = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise PromptError(f"line {number} of stdin is not UTF-8 text: {error}.") from None
        if text.strip():
            yield text


def _write(text: str) -> None:
    print(text, end="", flush=True)
