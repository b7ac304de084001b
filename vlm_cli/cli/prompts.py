"""Options that bring a prompt, its images and its clips."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_cli.cli import console
from vlm_cli.cli.command import option
from vlm_cli.cli.completion import offer
from vlm_cli.cli.options import MaxPixelsOption, MaxTilesOption, MediaRootOption
from vlm_cli.cli.standard_streams import find_piped_picture
from vlm_cli.data.inputs import base_folder, is_stdin, read_bytes
from vlm_cli.errors import PromptError, UsageError
from vlm_cli.media import is_uri
from vlm_cli.prompt import Interleaved, Medium, interleave
from vlm_cli.text import clean_text, decode_text
from vlm_cli.writing.choice import TemplateChoice

if TYPE_CHECKING:
    from vlm_cli.media import LoadedClip, LoadedImage, MediaLoader
    from vlm_cli.processor import VLMProcessor

__all__ = [
    "ChatTemplateOption",
    "PromptOptions",
    "ReadingOptions",
    "SpecialTokensOption",
    "SystemOption",
    "TurnOptions",
    "absolute_source",
    "check_piped_picture",
    "load_images",
    "prepended_note",
    "tell_images",
]

PROMPT = "Prompt"  # heading of these options in --help
_MEDIA_OPTIONS = {"--image", "--video"}  # that bring files, and no text

ChatTemplateOption = Annotated[
    str,
    option(
        PROMPT,
        "Which prompts become a user's turn in the tokenizer's chat template: all; none; or (auto) rows of messages, "
        "the turns of `vlm chat`, and prompts with --system. A FILE holds another template, for all prompts.",
        "--chat-template",
        metavar="auto|all|none|FILE",
        autocompletion=offer(lambda: ("auto", "all", "none")),
    ),
]
SystemOption = Annotated[
    str | None,
    option(
        PROMPT,
        "Tell the model TEXT before the first turn, where the chat template writes the system's words.",
        "--system",
        metavar="TEXT",
    ),
]
SpecialTokensOption = Annotated[
    bool,
    option(
        PROMPT,
        "Read the spelling of a special token in a prompt, such as <|endofchunk|>, as that token; without "
        "this option it is plain text.",
        "--special-tokens",
    ),
]


@dataclass(frozen=True)
class ReadingOptions:
    """How prompts are read, wherever they come from."""

    allow_urls: Annotated[
        bool,
        option(PROMPT, "Download images and clips whose source is an http(s):// URL.", "--allow-urls"),
    ] = False
    media_root: MediaRootOption = None
    max_pixels: MaxPixelsOption = None
    max_tiles: MaxTilesOption = None
    special_tokens: SpecialTokensOption = False
    chat_template: ChatTemplateOption = "auto"
    system: SystemOption = None

    @property
    def choice(self) -> TemplateChoice:
        """Which prompts a chat template writes.

        Raises:
            UsageError: if --chat-template is no choice and no file.
        """
        return TemplateChoice.parse(self.chat_template)

    def loader(
        self, folder: Path | None, allow_hosts: tuple[str, ...], inside: Callable[[str], bytes] | None = None
    ) -> MediaLoader:
        """Make the loader of the images.

        Args:
            folder: where relative paths start; None for the current folder.
            allow_hosts: hosts that may have an internal address.
            inside: returns the bytes of an image in a shard.
        """
        from vlm_cli.media import MediaLoader

        return MediaLoader(
            folder,
            allow_urls=self.allow_urls,
            allow_hosts=allow_hosts,
            media_root=self.media_root,
            max_pixels=self.max_pixels,
            inside=inside,
        )


@dataclass(frozen=True)
class TurnOptions:
    """A prompt, as an option or in a file, its images and its clips."""

    prompt_option: Annotated[
        str | None,
        option(PROMPT, "Text of the prompt.", "--prompt", "-p", metavar="TEXT"),
    ] = None
    prompt_file: Annotated[
        Path | None,
        option(PROMPT, "Read the prompt from FILE; image paths in it start at the "
            "folder of FILE.", "--prompt-file", "-f", metavar="FILE"),
    ] = None  # fmt: skip
    image: Annotated[
        list[str] | None,
        option(
            PROMPT,
            "Image for the next <image> in the prompt: a path, - for stdin, a data: URI or a URL. Repeat the "
            "option for several images.",
            "--image",
            "-i",
            metavar="FILE",
        ),
    ] = None
    video: Annotated[
        list[str] | None,
        option(
            PROMPT,
            "Clip for the next <video> in the prompt: a video file, an animated GIF, WebP or PNG, a folder of frames, "
            "- for stdin, or a URL. Settings may follow a ?, as in a.mp4?frames=8 or a.mp4?fps=1&start=30&end=60. "
            "Repeat the option for several clips.",
            "--video",
            metavar="FILE",
        ),
    ] = None

    @property
    def texts(self) -> dict[str, str | None]:
        """Each option that can bring a text, and what the user gave."""
        return {"--prompt": self.prompt_option}

    @property
    def given(self) -> list[str]:
        """The options by which the user gave a prompt, images or clips."""
        files = {"--prompt-file": self.prompt_file, "--image": self.image or None, "--video": self.video or None}
        return [name for name, x in {**self.texts, **files}.items() if x is not None]

    @property
    def has_prompt(self) -> bool:
        return bool(set(self.given) - _MEDIA_OPTIONS)

    @property
    def folder(self) -> Path | None:
        """Where relative image paths in the prompt start; None for the current folder."""
        return None if self.prompt_file is None else base_folder(self.prompt_file)

    @property
    def takes_stdin(self) -> bool:
        """Whether the user says that stdin brings the prompt."""
        return "-" in self.texts.values() or (self.prompt_file is not None and is_stdin(self.prompt_file))

    def interleave(self) -> Interleaved:
        """Read the prompt, and split it into texts, images and clips.

        Raises:
            UsageError: if the user gave no prompt, or more than one.
            PromptError: if placeholders and files do not match.
        """
        images, videos = list(self.image or ()), list(self.video or ())
        if self.prompt_file is not None:
            # Relative paths in the file start at its folder; those on the command line start at the current folder.
            images, videos = ([absolute_source(x) for x in given] for given in (images, videos))
        found = interleave(self._text([*images, *videos]), images, videos)
        if found.images_prepended:
            console.note(prepended_note("prompt", images, videos))
        return found

    def _text(self, files: list[str]) -> str:
        if len(set(self.given) - _MEDIA_OPTIONS) > 1:
            names = [*self.texts, "--prompt-file"]
            choices = f"{', '.join(names[:-1])} and {names[-1]}"
            raise UsageError(f"the prompt is given more than once. Choose one of {choices}.")
        text = next((x for x in self.texts.values() if x is not None), None)
        if text is not None and text != "-":
            return clean_text(text.removesuffix("\r"))  # "$(cat FILE)" drops only the line feed at the end
        path = Path("-") if self.prompt_file is None else self.prompt_file
        if is_stdin(path) and any(file == "-" or file.startswith("-?") for file in files):
            raise UsageError("stdin can be the prompt or an image, not both. Give one of them as a file.")
        if is_stdin(path) and (sys.stdin is None or (not self.takes_stdin and sys.stdin.isatty())):
            raise UsageError('no prompt is given: vlm generate "<image:photo.jpg>A photo of"')
        try:
            return decode_text(read_bytes(path)).removesuffix("\n")
        except OSError as error:
            raise PromptError(f"cannot read the prompt file {str(path)!r}: {error.strerror}.") from None
        except ValueError as error:
            where = "the prompt on stdin is" if is_stdin(path) else f"cannot read the prompt file {str(path)!r}: it is"
            raise PromptError(f"{where} {error}.") from None


def check_piped_picture(words: Interleaved) -> None:
    """Refuse a picture on stdin that the prompt does not show.

    Raises:
        UsageError: naming the format of the picture.
    """
    takes_stdin = any(isinstance(part, Medium) and part.is_stdin for part in words.parts)
    if not takes_stdin and (found := find_piped_picture()) is not None:
        raise UsageError(
            f"stdin holds a picture ({found}), and the prompt does not show it. Add --image -, or write <image:-> "
            "where it belongs."
        )


@dataclass(frozen=True)
class PromptOptions(TurnOptions):
    """A prompt, as an argument, as an option, in a file or on stdin, its images and its clips."""

    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help='Text of the prompt; <image:FILE> in it shows an image, as in "<image:cat.jpg>A photo of", and '
            "<video:FILE> a clip. Give - to read the prompt from stdin.",
            show_default=False,
        ),
    ] = None

    @property
    def texts(self) -> dict[str, str | None]:
        return {"PROMPT": self.prompt, **super().texts}


def load_images(parts: Interleaved, loader: MediaLoader) -> list[LoadedImage | LoadedClip]:
    """Load the images and clips of a prompt, in reading order, and tell the user of pictures that it only names.

    Raises:
        PromptError: for a prompt that is nothing but the name of a picture file, or a clip's settings.
        MediaError: for an image or a clip that cannot be read.
    """
    from vlm_cli.data.meant import find_mentions, mention_note

    for name in find_mentions(parts.parts, loader):
        console.note(mention_note(name))
    media = [part for part in parts.parts if isinstance(part, Medium)]
    return [loader.load_medium(medium.source, medium.kind) for medium in media]


def tell_images(media: Sequence[LoadedImage | LoadedClip], processor: VLMProcessor) -> None:
    """Tell on stderr what becomes of each image: its sizes, what the model does not see of it, and how it was decoded.

    One line for each: `Image cat.gif (500x375 → 224x224, centre crop, 25 % unseen, first frame of an animation)`. Of a
    clip, it also says which frames are read.
    """
    from vlm_cli.media import LoadedClip, short_name

    for medium in media:
        is_clip = isinstance(medium, LoadedClip)
        words = processor.image_processor.describe_image(medium.width, medium.height, cuts=not is_clip)
        size = words or f"{medium.width}x{medium.height}"
        title, frames = ("Clip", [medium.chosen.describe()]) if isinstance(medium, LoadedClip) else ("Image", [])
        console.note(f"{title} {short_name(medium.source)} ({', '.join([size, *frames, *medium.notes])})")


def prepended_note(what: str, images: Sequence[str], videos: Sequence[str]) -> str:
    """Return the note that files come first, since the text has no placeholder for them."""
    files = "images" if not videos else "images and then the clips" if images else "clips"
    return f"Note: the {what} has no <{'image' if images else 'video'}> placeholder, so the {files} come first."


def absolute_source(source: str, find: Callable[[str], Path] = Path) -> str:
    """Let a path start at the root, if it leads to a file; other sources stay as they are.

    Args:
        source: of an image or a clip; settings may follow a `?`.
        find: returns where a path leads.
    """
    if is_uri(source):
        return source
    path = source.rpartition("?")[0] or source
    return next((str(find(x).absolute()) + source[len(x) :] for x in (source, path) if os.path.exists(find(x))), source)
