"""Options that bring a prompt and its images."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.errors import PromptError, UsageError
from vlm_cli.prompt import Interleaved, Medium, interleave

__all__ = ["PromptOptions"]


@dataclass(frozen=True)
class PromptOptions:
    """A prompt and its images, wherever they come from."""

    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="Text with <image:FILE> or <image> placeholders; - reads stdin.",
            show_default=False,
        ),
    ] = None
    prompt_option: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt, as an option.")] = None
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", "-f", help="Read the prompt from a file; its paths start there.")
    ] = None
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", help="File for the next bare <image>; path, -, data: or URL. Repeatable."),
    ] = None
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch http(s):// images.")] = False
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens", help="Read special tokens that the prompt spells, as <|endofchunk|>, as tokens."
        ),
    ] = False

    @property
    def given(self) -> list[str]:
        """Where a prompt and its images were given."""
        places = {
            "PROMPT": self.prompt,
            "--prompt": self.prompt_option,
            "--prompt-file": self.prompt_file,
            "--image": self.image or None,
        }
        return [place for place, x in places.items() if x is not None]

    def interleave(self) -> Interleaved:
        """The prompt's parts.

        Raises:
            UsageError: if there is no prompt, or more than one.
            PromptError: if placeholders and files do not match.
        """
        images = list(self.image or ())
        if self.prompt_file is not None:
            # Relative paths in the file start at its folder, those on the command line here.
            images = [str(Path(x).absolute()) if Path(x).exists() else x for x in images]
        found = interleave(self._text(images), images)
        if found.images_prepended:
            console.notify("Note: the prompt has no <image> placeholder, so the images come first.")
        return found

    def load(self, parts: Interleaved) -> list[Any]:
        """The images, in order."""
        from vlm_cli.media import MediaLoader, short_name

        folder = None if self.prompt_file is None else self.prompt_file.absolute().parent
        loader = MediaLoader(base_dir=folder, allow_urls=self.allow_urls)
        images = [loader.load(part.source) for part in parts.parts if isinstance(part, Medium)]
        for image in images:
            console.notify(f"Image {short_name(image.source)} ({image.width}x{image.height})")
        return images

    def _text(self, images: list[str]) -> str:
        given = [x for x in (self.prompt, self.prompt_option, self.prompt_file) if x is not None]
        if len(given) > 1:
            raise UsageError("the prompt is given more than once. Choose one of PROMPT, --prompt and --prompt-file.")
        if self.prompt_file is not None:
            try:
                return self.prompt_file.read_text(encoding="utf-8").removesuffix("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise PromptError(f"cannot read the prompt file {str(self.prompt_file)!r}: {error}.") from None
        text = self.prompt if self.prompt is not None else self.prompt_option
        if text is not None and text != "-":
            return text
        if "-" in images:
            raise UsageError("stdin can be the prompt or an image, not both. Give one of them as a file.")
        if text is None and (sys.stdin is None or sys.stdin.isatty()):
            raise UsageError('no prompt is given: vlm generate "<image:photo.jpg>A photo of"')
        try:
            return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise PromptError(f"the prompt on stdin is not UTF-8 text: {error}.") from None
