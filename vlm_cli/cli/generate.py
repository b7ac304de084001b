"""`vlm generate`."""

import time
from typing import Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.batch import BatchOptions, BatchRun, files_digest
from vlm_cli.cli.chat import ChatRun, check_chat
from vlm_cli.cli.options import DeviceOptions, JsonOption, SamplingOptions, SourceOptions, SpeedOptions, flatten_options
from vlm_cli.cli.prompts import PromptOptions
from vlm_cli.models import DEMO, resolve_built_model
from vlm_cli.prompt import Interleaved, format

__all__ = ["generate"]


@flatten_options
def generate(
    prompts: PromptOptions = PromptOptions(),
    batching: BatchOptions = BatchOptions(),
    model: Annotated[
        str, typer.Option("--model", "-m", help="Directory that `vlm build` wrote, or hub id.")
    ] = DEMO.name,
    sampling: SamplingOptions = SamplingOptions(),
    devices: DeviceOptions = DeviceOptions(),
    speed: SpeedOptions = SpeedOptions(),
    source: SourceOptions = SourceOptions(),
    as_json: JsonOption = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the answer when it is complete.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Tokens, seconds and memory on stderr.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the prompt's tokens and generate nothing.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Go on with turns that are typed, or lines of stdin.")] = False,
) -> None:
    """Continue a prompt of text and images; only new text goes to stdout.

    With --batch, each line of a file is a prompt, such as {"prompt": "<image:cat.jpg>A photo of", "id": 7}, and its
    answer is the same line of OUTPUT, with "text" or "error" added.

    With --chat, each line of stdin is a turn of one conversation, answered in sight of all before it; with --json each
    answer is a line too. What was read is not read again. The tokenizer's chat template writes the turns; without one,
    an answer stands right behind its turn, and the next turn on a new line. Ctrl-C ends an answer, Ctrl-D the chat.

    Example: vlm generate --model my-flamingo "<image:cat.jpg>A photo of"
    """
    speed.check()
    # Batches have many shapes, each of which would be compiled for itself.
    given = {"--dry-run": dry_run, "--no-stream": no_stream, "--compile": speed.compile, "--chat": chat}
    if batching.wanted([*prompts.given, *(flag for flag, is_given in given.items() if is_given)]):
        _answer_batch(batching, prompts, model, sampling, devices, speed, source, as_json, stats)
        return
    if chat:
        check_chat(prompts, sampling, {"--dry-run": dry_run, "--compile": speed.compile})
        built = resolve_built_model(model, source.revision)
        run_chat = ChatRun(prompts, sampling, lambda: _load(model, built, devices, speed, source, has_images=True))
        run_chat.talk(stream=not (no_stream or as_json), as_json=as_json, stats=stats)
        return
    parts = prompts.interleave()
    sampling.keywords()  # refuses what contradicts itself
    built = resolve_built_model(model, source.revision)
    images = prompts.load(parts)
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    if dry_run:
        _show_layout(built, source, parts, prompts.special_tokens, as_json)
        return
    vlm, processor, seconds = _load(model, built, devices, speed, source, has_images=bool(images))
    run = Run(vlm, processor, sampling, seconds)
    run.generate(parts, images, prompts.special_tokens, compile=speed.compile, stream=not (no_stream or as_json))
    if as_json:
        console.print_json({"model": model, "prompt": format(parts.parts), **run.to_dict(images)})
    elif not run.streamed:
        print("\n".join(sequence["text"] for sequence in run.sequences), flush=True)
    if stats:
        console.notify(run.statistics())


def _load(
    name: str, built: str, devices: DeviceOptions, speed: SpeedOptions, source: SourceOptions, *, has_images: bool
) -> tuple[Any, Any, float]:
    """The model, its processor, and the seconds that loading took."""
    from vlm_cli.checkpoint.directory import load

    device, dtype = devices.resolve()
    started = time.monotonic()
    vlm, processor = load(built, dtype=dtype, device=device, trust_remote_code=source.trust_remote_code, **source.hub)
    speed.apply(vlm)
    how = [str(vlm.dtype).removeprefix("torch."), *([speed.quantize] if speed.quantize else [])]
    console.notify(f"Model {name} on {device}, {', '.join(how)}")
    if built == str(DEMO) and has_images:
        console.notify("Note: demo knows drawn scenes only; about a photograph it is confident and wrong.")
    return vlm, processor, time.monotonic() - started


def _answer_batch(
    batching: BatchOptions,
    prompts: PromptOptions,
    model: str,
    sampling: SamplingOptions,
    devices: DeviceOptions,
    speed: SpeedOptions,
    source: SourceOptions,
    as_json: bool,
    stats: bool,
) -> None:
    """
    Raises:
        Exit: with 1 if a row could not be answered.
    """
    sampling.keywords()
    built = resolve_built_model(model, source.revision)
    run = BatchRun(
        batching,
        sampling,
        load=lambda: _load(model, built, devices, speed, source, has_images=True),
        depends_on={
            "--model": model,
            "the model's files": files_digest(built, source.revision),
            "--dtype": devices.dtype,
            "--quantize": speed.quantize,
            "--special-tokens": prompts.special_tokens,
        },
        allow_urls=prompts.allow_urls,
        special_tokens=prompts.special_tokens,
    )
    run.answer()
    if as_json:
        console.print_json({"model": model, **run.to_dict()})
    if stats:
        console.notify(run.statistics())
    if run.failed:
        raise typer.Exit(1)


def _show_layout(model: str, source: SourceOptions, parts: Interleaved, special: bool, as_json: bool) -> None:
    from vlm_cli.cli.inspect import print_layout
    from vlm_cli.models import load_meta_model, read_processor_of
    from vlm_cli.quiet import silence_libraries
    from vlm_cli.report.layout import lay_out

    silence_libraries()
    vlm, _, _ = load_meta_model(model, trust_remote_code=source.trust_remote_code, revision=source.revision)
    processor = read_processor_of(model, source.revision)
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
        from vlm_cli.generation.decoder import Decoder

        self.model, self.processor = model, processor
        self.decoder = Decoder(model, processor, sampling.keywords(), sampling.stop or ())
        self.sampling = sampling
        self.load_seconds = load_seconds
        self.compile_seconds = 0.0
        self.sequences: list[dict[str, Any]] = []

    def generate(self, parts: Interleaved, images: list[Any], special: bool, *, compile: bool, stream: bool) -> None:
        import torch
        from transformers import set_seed

        from vlm_cli.cli.stream import TextStream
        from vlm_cli.modeling.budget import MediumSize

        self.decoder.budget.check_media(len(images))
        inputs = self.processor(
            images=[[image.image for image in images]], text=[parts.parts], parse_special_tokens=special
        ).to(self.model.device)
        self.prompt_tokens = inputs["input_ids"].shape[1]
        self.positions = self.decoder.budget.positions(self.prompt_tokens, [MediumSize() for _ in images])
        room = self.decoder.room(self.positions, console.notify)
        keywords = self.decoder.keywords | {"max_new_tokens": room}
        if compile:
            from vlm_cli.modeling.acceleration import compile_for

            console.notify("Compiling the step that writes a token …")
            with torch.inference_mode():
                self.compile_seconds = compile_for(self.model, **inputs, **keywords)
        if self.sampling.seed is not None:
            set_seed(self.sampling.seed)
        # Beams and several answers are known only at the end.
        self.streamed = stream and self.sampling.num_beams == self.sampling.num_return_sequences == 1
        streamer = TextStream(self.decoder.decode, _write, self.decoder.stops) if self.streamed else None
        started = time.monotonic()
        with torch.inference_mode():
            output = self.model.generate(**inputs, **keywords, streamer=streamer)
        self.seconds = time.monotonic() - started
        self.sequences = [self.decoder.read(row, room) for row in output[:, self.prompt_tokens :].tolist()]
        if self.streamed:
            print(flush=True)

    def to_dict(self, images: list[Any]) -> dict[str, Any]:
        return {
            **self.sequences[0],
            "sequences": self.sequences,
            "prompt_tokens": self.prompt_tokens,
            "prompt_positions": self.positions,
            "images": [{"source": x.source, "width": x.width, "height": x.height} for x in images],
            "seed": self.sampling.seed,
            "load_seconds": round(self.load_seconds, 3),
            "compile_seconds": round(self.compile_seconds, 3),
            "seconds": round(self.seconds, 3),
        }

    def statistics(self) -> str:
        new = sum(sequence["new_tokens"] for sequence in self.sequences)
        compiled = f"compilation {self.compile_seconds:.2f} s, " if self.compile_seconds else ""
        return (
            f"{self.prompt_tokens} prompt tokens ({self.positions} positions), {new} new tokens in "
            f"{self.seconds:.2f} s ({new / self.seconds:.1f} tokens/s), load {self.load_seconds:.2f} s, {compiled}"
            f"peak memory {console.human_bytes(console.peak_memory(self.model.device))}"
        )


def _write(text: str) -> None:
    print(text, end="", flush=True)
