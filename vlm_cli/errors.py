"""The errors that a user can meet, as a tree.

    VLMError
    ├── UsageError               exit code 2: the request itself is wrong
    │   ├── UnknownNameError         no such encoder, tokenizer, fusion, family or language model
    │   ├── CompositionError         parts that do not fit together; lists every problem at once
    │   ├── PromptError              a placeholder that cannot be read, or without its file
    │   └── OutputExistsError        the output directory is already there
    ├── MediaError               exit code 1: a picture that cannot be read
    ├── LanguageModelError       exit code 1: a language model that cannot be used or found
    │   ├── ChatTemplateError        a chat template that cannot write a conversation
    │   │   └── EndlessTemplateError     a chat template that does not end
    │   └── LanguageModelLimit       an input that Transformers itself handles wrongly; also a ValueError
    ├── ContextError             exit code 1: a conversation longer than the language model's context
    ├── VisionEncoderError       exit code 1: a vision encoder that cannot be used or found
    ├── PluginError              exit code 1: a part of another package that is broken
    ├── CheckpointError          exit code 1: weights or a directory that cannot be read or written
    │   └── UntrustedCodeError       files that want to run code without the flag; also a LanguageModelError
    ├── DataError                exit code 1: records that cannot be used; lists every bad line
    └── TrainingError            exit code 1: a training run that cannot continue

A message says what was given, what is possible, and what to do next. The command line prints it
without a traceback and exits with `exit_code`.

A message may quote files and folders of this machine, which helps the person who runs `vlm`. Batch
rows, pages and answers of a server are for other people; they hold `public` instead.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any, ClassVar

__all__ = [
    "ChatTemplateError",
    "CheckpointError",
    "CompositionError",
    "ContextError",
    "DataError",
    "EndlessTemplateError",
    "LanguageModelError",
    "LanguageModelLimit",
    "MediaError",
    "OutputExistsError",
    "PluginError",
    "PromptError",
    "TrainingError",
    "UnknownNameError",
    "UntrustedCodeError",
    "UsageError",
    "VLMError",
    "VLMWarning",
    "VisionEncoderError",
    "explain_reading",
    "first_line",
    "is_out_of_memory",
]


class VLMWarning(UserWarning):
    """Something that a user should know although nothing failed. Commands print it as a line that begins with Note."""


class VLMError(Exception):
    """An error that a user can meet and mend. Each message says what was given, what is possible, and what to type.

    Args:
        message: for the person who runs `vlm`.
        public: the message for other people, without the content of files and folders. None takes `public_default`.

    Attributes:
        exit_code: of a command that ends with this error.
        public_default: the public message of a kind of error whose messages quote files; None if they quote only what
            the request itself says, so that everybody may read them.
    """

    exit_code = 1
    public_default: ClassVar[str | None] = None

    def __init__(self, message: str = "", *, public: str | None = None) -> None:
        super().__init__(message)
        self.public = next(text for text in (public, self.public_default, message) if text is not None)


class UsageError(VLMError):
    """The request itself is wrong: flags, names or settings."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that no registry knows."""


class CompositionError(UsageError):
    """A composition with problems; the message lists all of them.

    Attributes:
        problems: one sentence per problem.
        readable: part -> settings, of the parts that could be read.
    """

    public_default = "the composition is not valid."

    def __init__(self, problems: str | Sequence[str], readable: Mapping[str, Any] | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.readable = dict(readable or {})
        lines = self.problems
        super().__init__(
            lines[0]
            if len(lines) == 1
            else f"the composition has {len(lines)} problems:\n" + "\n".join(f"  - {p}" for p in lines)
        )


class PromptError(UsageError):
    """A prompt with a placeholder that cannot be read, or that has no file."""


class OutputExistsError(UsageError):
    """The output exists and may not be replaced."""

    public_default = "the output exists and may not be replaced."


class MediaError(VLMError):
    """An image or video that cannot be read. Give `public` wherever the message quotes more than the source's name."""


class LanguageModelError(VLMError):
    """A language model that cannot be found, read or used."""

    public_default: ClassVar[str | None] = "the language model cannot be used for this request."


class LanguageModelLimit(LanguageModelError, ValueError):
    """An input for which Transformers' own code of a language model gives wrong results."""

    public_default = None


class ChatTemplateError(LanguageModelError):
    """A chat template that cannot write a conversation. The message quotes that and what the template says."""

    public_default = None


class EndlessTemplateError(ChatTemplateError):
    """A chat template that takes longer than it may: there is no use in trying it on another message."""


class ContextError(VLMError):
    """A conversation that is longer than the language model's context."""


class VisionEncoderError(VLMError):
    """A vision encoder that cannot be found, read or used."""

    public_default = "the vision encoder cannot be used."


class PluginError(VLMError):
    """A part of an installed package that cannot be loaded, or lacks a method or setting that it must have."""

    public_default = "a part of an installed package cannot be used."


class CheckpointError(VLMError):
    """A directory or weight file that cannot be read or written."""

    public_default: ClassVar[str | None] = "a file of the model cannot be read or written."


class UntrustedCodeError(CheckpointError, LanguageModelError):
    """Files of a model want to run code that came with them, and the user did not allow it."""

    public_default = "the code of a model may not run."


class DataError(VLMError):
    """A file of records that training or evaluation cannot use; the message lists every bad line."""

    public_default = "the records cannot be used."


class TrainingError(VLMError):
    """A training run that cannot continue."""

    public_default = "the training run cannot continue."


#: Errors of Python that speak of a program's variables, and not of a user's files.
_OF_PROGRAMS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    RecursionError,
    TypeError,
)
_OF_PROGRAMS_TOO = re.compile(
    r"values? to unpack|invalid literal for|could not convert|integer string conversion|is not a valid|"
    r"must be (real|str|int|bool|float|a (list|dict|tuple|str|string|number))|expected (str|int|float|bool|list|dict)"
)


def explain_reading(error: BaseException) -> str:
    """Say in words why files of a model cannot be used, when another library's code failed on what they hold.

    >>> explain_reading(ValueError("no such thing"))
    'no such thing'
    >>> explain_reading(TypeError("object of type 'NoneType' has no len()"))
    'a value in its files is missing, or is of a kind that does not belong there'
    """
    if isinstance(error, struct.error):
        return "a file is damaged, or was cut short"
    if isinstance(error, _OF_PROGRAMS) or _OF_PROGRAMS_TOO.search(str(error)):
        return "a value in its files is missing, or is of a kind that does not belong there"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error of another library, at most 300 characters long.

    >>> first_line(ValueError("no such thing.\\nTry another."))
    'no such thing'
    """
    text = str(error).strip()
    lines = text.splitlines() or [type(error).__name__]
    return shorten(lines[0], 300, placeholder=" …").rstrip(".:")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory did not suffice; on the CPU and on MPS only torch's text says so."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # this module imports no torch
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "out of memory" in text)
