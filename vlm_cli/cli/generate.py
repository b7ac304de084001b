"""`vlm generate`."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.options import DEMO, DeviceOptions, JsonOption, SamplingOptions, SourceOptions, built_model, expand
from vlm_cli.errors import PromptError, UsageError
from vlm_cli.prompt import Interleaved, Medium, format, interleave

__all__ = ["PromptOptions", "generate"]


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
            console.note("Note: the prompt has no <image> placeholder, so the images come first.")
        return found

    def load(self, parts: Interleaved) -> list[Any]:
        """The images, in order."""
        from vlm_cli.media import MediaLoader, short_name

        folder = None if self.prompt_file is None else self.prompt_file.absolute().parent
        loader = MediaLoader(base_dir=folder, allow_urls=self.allow_urls)
        images = [loader.load(part.source) for part in parts.parts if isinstance(part, Medium)]
        for image in images:
            console.note(f"Image {short_name(image.source)} ({image.width}x{image.height})")
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


@expand
def generate(
    prompts: PromptOptions = PromptOptions(),
    model: Annotated[
        str, typer.Option("--model", "-m", help="Directory that `vlm build` wrote, or hub id.")
    ] = DEMO.name,
    sampling: SamplingOptions = SamplingOptions(),
    devices: DeviceOptions = DeviceOptions(),
    source: SourceOptions = SourceOptions(),
    as_json: JsonOption = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the answer when it is complete.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Tokens, seconds and memory on stderr.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the prompt's tokens and generate nothing.")] = False,
) -> None:
    """Continue a prompt of text and images; only new text goes to stdout.

    Example: vlm generate --model my-flamingo "<image:cat.jpg>A photo of"
    """
    parts = prompts.interleave()
    keywords = sampling.keywords()
    built = built_model(model, source.revision)
    images = prompts.load(parts)
    from vlm_cli.cli.models import hush

    hush()
    if dry_run:
        _show_layout(built, source, parts, prompts.special_tokens, as_json)
        return
    from vlm_cli.checkpoint.directory import load

    device, dtype = devices.resolve()
    started = time.monotonic()
    vlm, processor = load(built, dtype=dtype, device=device, trust_remote_code=source.trust_remote_code, **source.hub)
    console.note(f"Model {model} on {device}, {str(vlm.dtype).removeprefix('torch.')}")
    if built == str(DEMO) and images:
        console.note("Note: demo knows drawn scenes only; about a photograph it is confident and wrong.")
    run = Run(vlm, processor, sampling, time.monotonic() - started)
    run.generate(parts, images, keywords, prompts.special_tokens, stream=not (no_stream or as_json))
    if as_json:
        console.print_json({"model": model, "prompt": format(parts.parts), **run.to_dict(images)})
    elif not run.streamed:
        print("\n".join(sequence["text"] for sequence in run.sequences), flush=True)
    if stats:
        console.note(run.statistics())


def _show_layout(model: str, source: SourceOptions, parts: Interleaved, special: bool, as_json: bool) -> None:
    from vlm_cli.cli.inspect import print_layout
    from vlm_cli.cli.models import on_meta, processor_of
    from vlm_cli.report.layout import lay_out

    vlm, _, _ = on_meta(model, trust_remote_code=source.trust_remote_code, revision=source.revision)
    processor = processor_of(model, source.revision)
    print_layout(lay_out(vlm, processor, parts.parts, parse_special_tokens=special), as_json)


class Run:
    """One generation and what is said of it.

    Args:
        model: the VLM.
        processor: its processor.
        sampling: the user's options.
        load_seconds: what loading took.
    """

    def __init__(self, model: Any, processor: Any, sampling: SamplingOptions, load_seconds: float) -> None:
        self.model, self.processor = model, processor
        self.stops = list(sampling.stop or ())
        self.sampling = sampling
        self.load_seconds = load_seconds
        self.sequences: list[dict[str, Any]] = []

    def generate(
        self, parts: Interleaved, images: list[Any], keywords: dict[str, Any], special: bool, *, stream: bool
    ) -> None:
        import torch
        from transformers import set_seed

        from vlm_cli.cli.stream import TextStream

        inputs = self.processor(
            images=[[image.image for image in images]], text=[parts.parts], parse_special_tokens=special
        ).to(self.model.device)
        self.prompt_tokens = inputs["input_ids"].shape[1]
        self.positions = self._positions(inputs["input_ids"])
        keywords = self._within_context(keywords)
        self.max_new_tokens = keywords["max_new_tokens"]
        if self.sampling.seed is not None:
            set_seed(self.sampling.seed)
        # Beams and several answers are known only at the end.
        self.streamed = stream and keywords["num_beams"] == keywords["num_return_sequences"] == 1
        streamer = TextStream(self._decode, _write, self.stops) if self.streamed else None
        if self.stops:
            keywords |= {"stop_strings": self.stops, "tokenizer": self.processor.tokenizer}
        started = time.monotonic()
        with torch.inference_mode():
            output = self.model.generate(**inputs, **keywords, streamer=streamer)
        self.seconds = time.monotonic() - started
        self.sequences = [self._sequence(row) for row in output[:, self.prompt_tokens :].tolist()]
        if self.streamed:
            print(flush=True)

    def _decode(self, ids: list[int]) -> str:
        # Clean-up would take back spaces that were written already.
        return self.processor.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _positions(self, ids: Any) -> int:
        media = int((ids == self.model.config.media_token_id).sum())
        return ids.shape[1] + media * (self.model.positions_per_medium() - 1)

    def _within_context(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """Fewer new tokens where the context ends sooner.

        Raises:
            PromptError: if the prompt alone is too long.
        """
        from vlm_cli.modeling.language_model import context_length

        context = context_length(self.model.config)
        if context is None:
            return keywords
        left = context - self.positions
        if left < 1:
            raise PromptError(
                f"the prompt takes {self.positions} positions, but the language model has {context}. Shorten it, or "
                "use fewer images; `vlm inspect --prompt` shows what each costs."
            )
        if left < keywords["max_new_tokens"]:
            console.note(f"Note: the context of {context} positions leaves room for {left} new tokens.")
            return {**keywords, "max_new_tokens": left}
        return keywords

    def _sequence(self, ids: list[int]) -> dict[str, Any]:
        from vlm_cli.cli.stream import cut_at_stop

        ends = self.model.generation_config.eos_token_id or []
        ends = ends if isinstance(ends, list) else [ends]
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        length = len(ids) if end is None else end + 1
        if end is None and self.stops:
            # Answers that a stop string ended sooner than others are padded.
            while length and ids[length - 1] == self.model.config.pad_token_id:
                length -= 1
        whole = self._decode(ids[:length])
        text = cut_at_stop(whole, self.stops)
        cut = text != whole or (end is None and length < self.max_new_tokens)
        reason = "stop_string" if cut else "stop_token" if end is not None else "length"
        return {"text": text, "new_tokens": length, "finish_reason": reason}

    def to_dict(self, images: list[Any]) -> dict[str, Any]:
        return {
            **self.sequences[0],
            "sequences": self.sequences,
            "prompt_tokens": self.prompt_tokens,
            "prompt_positions": self.positions,
            "images": [{"source": x.source, "width": x.width, "height": x.height} for x in images],
            "seed": self.sampling.seed,
            "load_seconds": round(self.load_seconds, 3),
            "seconds": round(self.seconds, 3),
        }

    def statistics(self) -> str:
        new = sum(sequence["new_tokens"] for sequence in self.sequences)
        return (
            f"{self.prompt_tokens} prompt tokens ({self.positions} positions), {new} new tokens in "
            f"{self.seconds:.2f} s ({new / self.seconds:.1f} tokens/s), load {self.load_seconds:.2f} s, "
            f"peak memory {console.human_bytes(_peak_memory(self.model.device))}"
        )


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _peak_memory(device: Any) -> int:
    """Bytes: of the process, and of the accelerator if there is one."""
    import resource

    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
