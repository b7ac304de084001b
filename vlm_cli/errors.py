"""What can go wrong for a user, as a tree.

    VLMError
    ├── UsageError               exit code 2: the request itself is wrong
    │   ├── UnknownNameError         no such encoder, tokenizer, fusion, family or language model
    │   ├── CompositionError         parts that do not fit together; lists every problem at once
    │   ├── PromptError              a placeholder that cannot be read, or without its file
    │   └── OutputExistsError        the output directory is already there
    ├── MediaError               exit code 1: a picture that cannot be read
    ├── LanguageModelError       exit code 1: a language model that cannot be used or found
    ├── VisionEncoderError       exit code 1: a vision encoder that cannot be used or found
    └── CheckpointError          exit code 1: weights or a directory that cannot be read or written

A message says what was given, what is possible, and what to do next. The command line prints it
without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten

__all__ = [
    "CheckpointError",
    "CompositionError",
    "LanguageModelError",
    "MediaError",
    "OutputExistsError",
    "PromptError",
    "UnknownNameError",
    "UsageError",
    "VLMError",
    "VisionEncoderError",
    "first_line",
]


class VLMError(Exception):
    """Anything that a user can meet and mend."""

    exit_code = 1


class UsageError(VLMError):
    """The request is wrong, whatever the files hold."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that no registry knows."""


class CompositionError(UsageError):
    """A composition whose parts do not fit; `problems` has one sentence for each misfit."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        lines = self.problems
        super().__init__(
            lines[0]
            if len(lines) == 1
            else f"the composition has {len(lines)} problems:\n" + "\n".join(f"  - {p}" for p in lines)
        )


class PromptError(UsageError):
    """A prompt whose placeholders cannot be matched with files."""


class OutputExistsError(UsageError):
    """The output directory exists and may not be replaced."""


class MediaError(VLMError):
    """An image that cannot be read."""


class LanguageModelError(VLMError):
    """A language model that cannot be found, read or used."""


class VisionEncoderError(VLMError):
    """A vision encoder that cannot be found, read or used."""


class CheckpointError(VLMError):
    """A directory or weight file that cannot be read or written."""


def first_line(error: BaseException) -> str:
    """What another library says went wrong, at a length that can be read."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(lines[0], 300, placeholder=" …").rstrip(".")
