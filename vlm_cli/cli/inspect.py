"""`vlm inspect`."""

from typing import Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.options import ComposeOptions, JsonOption, ModelArgument, flatten_options
from vlm_cli.errors import PromptError
from vlm_cli.models import resolve

__all__ = ["inspect", "print_layout"]


@flatten_options
def inspect(
    model: ModelArgument = None,
    compose: ComposeOptions = ComposeOptions(),
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Show how this prompt lies in the model.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="Name for the next bare <image>; it is not opened.")
    ] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Read special tokens that the prompt spells as tokens.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a model's parts, the shapes along the data flow, its tokens, preprocessing and gates.

    Example: vlm inspect my-flamingo --prompt "<image:a.jpg>A cat.<image:b.jpg>A"
    """
    from vlm_cli.prompt import interleave

    parts = None if prompt is None else interleave(prompt, image or ())
    if image and prompt is None:
        raise PromptError("--image needs --prompt, whose placeholders it fills.")
    chosen = resolve(model, compose.request)
    from vlm_cli.models import load_meta_model, read_gate_values, read_processor_of
    from vlm_cli.quiet import silence_libraries
    from vlm_cli.report.description import describe
    from vlm_cli.report.layout import lay_out

    revision = compose.revision
    silence_libraries()
    vlm, dtype, processor = load_meta_model(chosen, trust_remote_code=compose.trust_remote_code, revision=revision)
    if processor is None and (parts is not None or isinstance(chosen, str)):
        processor = read_processor_of(chosen, revision)
    if parts is not None:
        assert processor is not None
        print_layout(lay_out(vlm, processor, parts.parts, parse_special_tokens=special_tokens), as_json)
        return
    gates = read_gate_values(chosen, vlm, revision)
    report = describe(vlm, processor and processor.tokenizer, dtype=dtype, gate_values=gates)
    if as_json:
        console.print_json(report)
    else:
        _print(report)


def print_layout(layout: Any, as_json: bool) -> None:
    """Spans of a prompt, as a table or JSON."""
    if as_json:
        console.print_json(layout.to_dict())
        return
    from vlm_cli.media import short_name

    rows = [
        [
            f"<image:{short_name(span.content)}>" if span.kind == "medium" else repr(span.content)[1:-1],
            str(span.tokens),
            str(span.positions),
            f"{span.start}-{span.end - 1}",
            ", ".join(map(str, span.sees)) or "none",
        ]
        for span in layout.spans
    ]
    console.print_table(("Span", "Tokens", "Positions", "Where", "Sees media"), rows)
    left = "" if layout.left is None else f", {layout.left} of {layout.context} left"
    print(f"{len(layout.ids)} tokens at {layout.positions} positions of the language model{left}")


def _print(report: dict[str, Any]) -> None:
    for title, rows in (
        ("Parts", _parts(report)),
        ("Shapes", [[name, f"({', '.join(map(str, shape))})"] for name, shape in report["shapes"].items()]),
        ("Tokens", _tokens(report)),
        ("Preprocessing", [[k, str(v)] for k, v in report["vision_encoder"]["preprocessing"].items()]),
        ("Gates (tanh; 0 is closed)", [[k, f"{v:+.4f}"] for k, v in report["gates"].items()]),
    ):
        if rows:
            print(title)
            width = max(len(row[0]) for row in rows)
            for name, *cells in rows:
                print(f"  {name:<{width}}  {'  '.join(cells)}")
            print()


def _parts(report: dict[str, Any]) -> list[list[str]]:
    counts = {row["name"]: row for row in report["parts"]}
    encoder, tokenizer, fusion, lm = (
        report[x] for x in ("vision_encoder", "vision_tokenizer", "fusion", "language_model")
    )
    sizes = ", ".join(f"{k}={v}" for k, v in tokenizer.items() if k != "type" and v is not None)
    fused = ", ".join(f"{k}={v}" for k, v in fusion.items() if k not in ("type", "before_layers"))
    blocks = f"; before layers {', '.join(map(str, fusion['before_layers']))}" if "before_layers" in fusion else ""
    described = {
        "vision_encoder": f"{encoder['name']} ({encoder['class']}, weights {encoder['pretrained'] or 'unnamed'}), "
        f"layer {encoder['layer']}",
        "vision_tokenizer": f"{tokenizer['type']} ({sizes})" if sizes else tokenizer["type"],
        "fusion": f"{fusion['type']}{f' ({fused})' if fused else ''}{blocks}",
        "added_tokens": ", ".join(report["tokens"]["added"]),
        "language_model": f"{lm['name']} ({lm['class']}), {lm['layers']} layers of {lm['layer_channels']} channels, "
        f"context {lm['context'] or 'unlimited'}",
    }
    rows = [
        [
            name,
            f"{counts[name]['parameters']:>15,}",
            "trains" if counts[name]["trainable"] else "frozen" if counts[name]["parameters"] else "-     ",
            console.human_bytes(counts[name]["bytes"]).rjust(9),
            text,
        ]
        for name, text in described.items()
    ]
    total = console.human_bytes(report["bytes"]).rjust(9)
    return [*rows, ["total", f"{report['parameters']:>15,}", "      ", total, f"{report['class']}, {report['dtype']}"]]


def _tokens(report: dict[str, Any]) -> list[list[str]]:
    tokens = report["tokens"]
    rows = [[name, str(i), "added"] for name, i in tokens["added"].items()]
    rows += [[name, str(i), ""] for name, i in tokens.get("special", {}).items() if name not in tokens["added"]]
    marks = {tokens["media"]: "media", tokens["pad"]: "pad", **dict.fromkeys(tokens["stop"] or [], "stop")}
    return [[name, i, f"{mark} {marks.get(int(i), '')}".strip()] for name, i, mark in rows] + [
        ["positions per image", str(report["positions_per_image"]), ""]
    ]
