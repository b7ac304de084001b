"""`vlm inspect`: show a model's parts, or how a prompt lies in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.inspect_weights import print_weights
from vlm_cli.cli.loading import notify_of_random_tower
from vlm_cli.cli.options import (
    BackboneOptions,
    ComposeOptions,
    ExactOption,
    JsonOption,
    MaxTilesOption,
    ModelArgument,
    VerifyOption,
    flatten_options,
)
from vlm_cli.errors import PromptError, UsageError
from vlm_cli.models import resolve
from vlm_cli.printable import count_of
from vlm_cli.registry import ENCODER_TYPES
from vlm_cli.report.tables import human_count
from vlm_cli.writing.choice import TemplateChoice

if TYPE_CHECKING:
    from vlm_cli.report.description import ModelDescription, TokenDescription
    from vlm_cli.report.layout import PromptLayout, Span
    from vlm_cli.report.parameters import ParameterRow

__all__ = ["inspect", "print_layout"]


@flatten_options
def inspect(
    model: ModelArgument = None,
    compose: ComposeOptions = ComposeOptions(),
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="Show which positions this prompt takes, and which media each sees."
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            metavar="NAME",
            help="Show NAME for the next bare <image> of --prompt. A file is opened only if the model cuts images into "
            "tiles: its header tells how many. Repeatable.",
        ),
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(
            "--video",
            metavar="FILE",
            help="Show the clip FILE for the next bare <video> of --prompt; its header tells the frames. Repeatable.",
        ),
    ] = None,
    special_tokens: Annotated[
        bool,
        typer.Option("--special-tokens", help="Read words of --prompt such as <|endofchunk|> as special tokens."),
    ] = False,
    chat_template: Annotated[
        str,
        typer.Option(
            "--chat-template",
            metavar="all|none|FILE",
            help="Write --prompt as a user's turn in the tokenizer's chat template (all), or in that of FILE.",
        ),
    ] = "auto",
    max_tiles: MaxTilesOption = None,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights",
            help="Read the weights of a built model one by one, and show for each part and layer: its norm and dtype; "
            "rows that are dead (all zero) or exploding (not finite, or with a norm above --exploding times the median "
            "row's); and how far training moved it from where it began, if that is on this machine.",
        ),
    ] = False,
    exploding: Annotated[
        float | None,
        typer.Option(
            metavar="TIMES", min=1.0, help="With --weights: the multiple above which a row explodes. The default is 10."
        ),
    ] = None,
    places: BackboneOptions = BackboneOptions(),
    exact: ExactOption = False,
    verify: VerifyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show a model's parts, shapes, tokens and gates. Of the weights, vlm reads only the gates, without --weights.

    Example: vlm inspect my-flamingo --prompt "<image:a.jpg>A cat.<image:b.jpg>A"
    """
    from vlm_cli.prompt import interleave

    parts = None if prompt is None else interleave(prompt, image or (), video or ())
    if (image or video) and prompt is None:
        raise PromptError(f"{'--image' if image else '--video'} needs --prompt, whose placeholders it fills.")
    if max_tiles is not None and prompt is None:
        raise PromptError("--max-tiles needs --prompt, whose images it limits.")
    _check_weights(weights, prompt, exploding, places)
    choice = TemplateChoice.parse(chat_template)
    chosen = resolve(model, compose.request)
    if weights and not isinstance(chosen, str):
        raise UsageError("--weights needs a built model, and a composition has no weights. Build it first: vlm build")
    from vlm_cli.models import load_meta_model, read_gate_values, read_processor_of
    from vlm_cli.quiet import silence_libraries
    from vlm_cli.report.description import describe
    from vlm_cli.report.layout import lay_out

    revision = compose.revision
    silence_libraries()
    vlm, dtype, processor = load_meta_model(
        chosen, trust_remote_code=compose.trust_remote_code, revision=revision, verify=verify
    )
    notify_of_random_tower(chosen)
    if weights and isinstance(chosen, str):
        from vlm_cli.checkpoint.stored import StoredModel

        stored = StoredModel.open(
            chosen, vlm, revision=revision, trust_remote_code=compose.trust_remote_code, backbones=places.backbones
        )
        print_weights(stored, exploding or 10.0, as_json, trust_remote_code=compose.trust_remote_code)
        return
    if processor is None and (parts is not None or isinstance(chosen, str)):
        processor = read_processor_of(chosen, revision, trust_remote_code=compose.trust_remote_code)
    if parts is not None:
        from vlm_cli.writing.writer import PromptWriter

        assert processor is not None
        if max_tiles is not None:
            processor.image_processor.limit_tiles(max_tiles)
        writer = PromptWriter(processor, choice, parse_special_tokens=special_tokens)
        print_layout(lay_out(vlm, processor, parts.parts, writer), as_json)
        return
    gates = read_gate_values(chosen, vlm, revision)
    report = describe(vlm, None if processor is None else processor.tokenizer, dtype=dtype, gate_values=gates)
    if as_json:
        console.print_json(report.to_dict())
    else:
        _print(report, exact)


def _check_weights(weights: bool, prompt: str | None, exploding: float | None, places: BackboneOptions) -> None:
    """Refuse options that have no effect with --weights, or without it.

    Raises:
        UsageError: for such an option.
    """
    if weights and prompt is not None:
        raise UsageError("--weights and --prompt exclude each other. Choose one.")
    if not weights and (exploding is not None or places.backbone or places.allow_host):
        named = "--exploding" if exploding is not None else "--backbone" if places.backbone else "--allow-host"
        raise UsageError(f"{named} has no effect without --weights. Leave it out, or add --weights.")


def print_layout(layout: PromptLayout, as_json: bool) -> None:
    """Print the spans of a prompt as a table or as JSON."""
    if as_json:
        console.print_json(layout.to_dict())
        return
    rows = [
        [
            _content(span),
            str(span.tokens),
            str(span.positions),
            f"{span.start}-{span.end - 1}",
            ", ".join(map(str, span.sees)) or "none",
        ]
        for span in layout.spans
    ]
    console.print_table(("Span", "Tokens", "Positions", "Where", "Sees media"), rows)
    left = "" if layout.left is None else f", {layout.left} of {layout.context} left"
    console.print_line(
        f"{count_of(len(layout.ids), 'token')} at {count_of(layout.positions, 'position')} of the language model{left}"
    )


def _content(span: Span) -> str:
    """Write what a span holds, on one line."""
    from vlm_cli.media import short_name

    if span.kind == "text":
        return repr(span.content)[1:-1]
    if span.tiles is not None:
        rows, columns = span.tiles
        size = f"{columns}x{rows} tiles, {count_of(span.vision_tokens or 0, 'vision token')}"
        return f"<image:{short_name(span.content)}> ({size})"
    if span.frames is None:
        return f"<image:{short_name(span.content)}>"
    return f"<video:{short_name(span.content)}> ({count_of(span.frames, 'frame')})"


def _print(report: ModelDescription, exact: bool) -> None:
    """Print the whole description, each section below its title."""
    for title, rows in (
        ("Parts", _part_rows(report, short=console.shortens_numbers(exact))),
        ("Shapes", [[name, f"({', '.join(map(str, shape))})"] for name, shape in report.shapes.items()]),
        ("Tokens", [*_token_rows(report.tokens), ["positions per image", _positions(report), ""]]),
        *_preprocessing_sections(report.vision_encoder.preprocessing),
        ("Gates (tanh; 0 is closed)", [[k, f"{v:+.4f}", _bar(v)] for k, v in report.gates.items()]),
    ):
        if rows:
            console.print_section(title, rows)


def _preprocessing_sections(settings: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Return a section of the settings; of several encoders, one for each."""
    several = settings.get("encoders", [settings])
    titles = [f"Preprocessing {i}" for i in range(1, len(several) + 1)] if len(several) > 1 else ["Preprocessing"]
    return [(title, [[k, str(v)] for k, v in x.items()]) for title, x in zip(titles, several, strict=True)]


def _positions(report: ModelDescription) -> str:
    """Write the positions of one image: a number, or the least and the most."""
    least, most = report.positions_per_image, report.most_positions_per_image
    return str(least) if least == most else f"{least} to {most}"


def _bar(value: float, width: int = 10) -> str:
    """Draw a number between -1 and 1 as a bar to the left or to the right of 0.

    >>> _bar(0.5, 4), _bar(-1, 4), _bar(0, 4)
    ('    │██', '████│', '    │')
    """
    filled = "█" * round(abs(value) * width)
    return f"{filled:>{width}}│" if value < 0 else f"{'':{width}}│{filled}"


def _part_rows(report: ModelDescription, *, short: bool) -> list[list[str]]:
    def write(number: int) -> str:
        return human_count(number).rjust(8) if short else f"{number:>15,}"

    def cells(row: ParameterRow) -> list[str]:
        state = "trains" if row.trainable else "frozen" if row.parameters else "-     "
        return [write(row.parameters), state, console.human_bytes(row.bytes).rjust(9)]

    counts = {row.name: row for row in report.parts}
    texts = {name: f"{text}{_adapter_text(counts[name])}" for name, text in _part_texts(report).items()}
    rows = [[name, *cells(counts[name]), text] for name, text in texts.items()]
    size = console.human_bytes(report.bytes).rjust(9)
    return [*rows, ["total", write(report.parameters), "      ", size, f"{report.class_name}, {report.dtype}"]]


def _adapter_text(row: ParameterRow) -> str:
    """Say how many of a part's parameters an adapter holds."""
    return f"; {row.adapter:,} in an adapter" if row.adapter else ""


def _part_texts(report: ModelDescription) -> dict[str, str]:
    """Return part -> its name, class and options."""
    encoder, tokenizer, fusion, lm = (
        report.vision_encoder,
        report.vision_tokenizer,
        report.fusion,
        report.language_model,
    )
    sizes = ", ".join(f"{k}={v}" for k, v in tokenizer.items() if k != "type" and v is not None)
    options = ", ".join(f"{k}={v}" for k, v in fusion.items() if k != "type")
    blocks = f"; before layers {', '.join(map(str, report.before_layers))}" if report.before_layers else ""
    layers = f"layer {encoder.layer}" if " + " not in encoder.name else "each its own layer"
    if isinstance(encoder.layer, tuple):
        layers = f"layers {', '.join(map(str, encoder.layer))}"
    # The name of an encoder of Transformers or timm names its weights too.
    weights = "" if encoder.name.partition(":")[0] in ENCODER_TYPES else f", weights {encoder.pretrained or 'unnamed'}"
    return {
        "vision_encoder": f"{encoder.name} ({encoder.class_name}{weights}), {layers}",
        "vision_tokenizer": f"{tokenizer['type']} ({sizes})" if sizes else tokenizer["type"],
        "fusion": f"{fusion['type']}{f' ({options})' if options else ''}{blocks}",
        "added_tokens": ", ".join(report.tokens.added),
        "language_model": f"{lm.name} ({lm.class_name}), {lm.layers} layers of {lm.layer_channels} channels, "
        f"context {lm.context or 'unlimited'}",
    }


def _token_rows(tokens: TokenDescription) -> list[list[str]]:
    """Return a row for each token: its text, its id, and its role."""
    rows = [(name, i, "added") for name, i in tokens.added.items()]
    rows += [(name, i, "") for name, i in (tokens.special or {}).items() if name not in tokens.added]
    roles: dict[int | None, str] = {
        tokens.media: "media",
        tokens.pad: "pad",
        **dict.fromkeys(tokens.stop or [], "stop"),
    }
    return [[name, str(i), f"{origin} {roles.get(i, '')}".strip()] for name, i, origin in rows]
