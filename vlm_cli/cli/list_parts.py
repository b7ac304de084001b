"""`vlm list`: name the parts that a composition can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.completion import offer
from vlm_cli.cli.options import JsonOption
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.composition import FAMILIES, VisionEncoderOptions
from vlm_cli.errors import UnknownNameError, first_line
from vlm_cli.registry import FUSIONS, VISION_ENCODERS, VISION_TOKENIZERS, suggest
from vlm_cli.report.language_models import suitable_language_models, unsuitable_language_models
from vlm_cli.report.other_encoders import find_other_encoders

if TYPE_CHECKING:
    from vlm_cli.report.encoders import EncoderFacts

__all__ = ["list_parts"]

KINDS = ("families", "vision-encoders", "vision-tokenizers", "fusions", "language-models")
LONG = ("vision-encoders", "language-models")


def list_parts(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help=f"List only this kind: {', '.join(KINDS)}.",
            autocompletion=offer(lambda: KINDS),
        ),
    ] = None,
    word: Annotated[str, typer.Argument(metavar="WORD", help="List only names that contain WORD.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List the parts that a composition can hold.

    For each vision encoder, the list shows the image size, the patches and channels of a frame, the number of
    parameters, and the tags of pretrained weights. If the installed OpenCLIP has encoders that vlm does not know, the
    first run measures them. With WORD, the list also has the types of Transformers (hf:) and the models of timm (timm:)
    that contain it.

    Example: vlm list vision-encoders siglip
    """
    if kind is not None and kind not in KINDS:
        raise UnknownNameError(f"unknown kind {kind!r}.{suggest(kind, KINDS)} Known: {', '.join(KINDS)}.")
    kinds = (kind,) if kind else KINDS
    found = {k: {n: s for n, s in _entries(k).items() if _contains(n, word)} for k in kinds}
    if kind is None:
        _print_all(found, as_json)
        return
    entries = found[kind]
    others = find_other_encoders(word) if kind == "vision-encoders" else {}
    is_explained = kind == "language-models" and _explain_unsuitable(word, quiet=as_json)
    if not entries and not others and not is_explained:
        console.notify(f"No {kind} have {word!r} in their names.")
    facts = _describe(kind, entries)
    facts |= {name: {"summary": x.summary, "pretrained": x.pretrained} for name, x in others.items()}
    if as_json:
        console.print_json(facts)
    elif kind == "vision-encoders" and facts:
        if ours := {name: x for name, x in facts.items() if name not in others}:
            _print_encoders(ours)
        _print_others(others)
    elif entries:
        console.print_table((kind, "class" if kind == "language-models" else ""), list(entries.items()))


def _contains(name: str, word: str) -> bool:
    return word.lower() in name.lower()


def _print_all(found: dict[str, dict[str, str]], as_json: bool) -> None:
    """Print the names of every kind, and of a long kind only how many there are."""
    if as_json:
        console.print_json({kind: _describe(kind, entries) for kind, entries in found.items()})
        return
    for kind, entries in found.items():
        if kind in LONG:
            console.print_line(f"{kind}: {len(entries)}; `vlm list {kind}` lists them.")
        else:
            console.print_table((kind, ""), list(entries.items()))


def _entries(kind: str) -> dict[str, str]:
    """Return the names of one kind, and a few words about each."""
    if kind == "vision-encoders":
        from vlm_cli.checkpoint.parts.vision_encoders import list_towers

        return list_towers()
    if kind == "language-models":
        return suitable_language_models()
    if kind == "families":
        return {
            name: f"{x['vision_tokenizer']['type']} + {x['fusion']['type']}; trains {', '.join(x['trainable'])}"
            for name, x in FAMILIES.items()
        }
    registry = VISION_TOKENIZERS if kind == "vision-tokenizers" else FUSIONS
    return registry.summaries()


def _describe(kind: str, entries: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return an object for each name: a summary in words, and the facts of a vision encoder."""
    return _facts(entries) if kind == "vision-encoders" else {name: {"summary": x} for name, x in entries.items()}


# -- vision encoders -------------------------------------------------------------------------------------------------


def _facts(entries: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return a summary and the facts of each encoder, or a summary and the problem of one that cannot be measured."""
    from vlm_cli.checkpoint.parts.openclip import openclip_files
    from vlm_cli.report.encoders import encoder_facts

    problems: dict[str, dict[str, Any]] = {}

    def on_problem(name: str, error: Exception) -> None:
        problems[name] = {"problem": f"{type(error).__name__}: {first_line(error)}"}
        console.notify(f"Cannot measure the vision encoder {name!r}. {problems[name]['problem']}")

    ours = [name for name in entries if name not in VISION_ENCODERS]
    facts = encoder_facts(ours, openclip_files(), _config, _track, on_problem)
    for name in entries.keys() & set(VISION_ENCODERS):
        try:
            facts[name] = _measure_outside(name)
        except Exception as error:  # the package may raise anything; the list goes on with the other encoders
            on_problem(name, error)
    return {
        name: {"summary": summary, **(asdict(facts[name]) if name in facts else problems[name])}
        for name, summary in entries.items()
    }


def _config(name: str) -> dict[str, Any]:
    from vlm_cli.checkpoint.parts.vision_encoders import find_tower

    return find_tower(VisionEncoderOptions(name=name)).config


def _measure_outside(name: str) -> EncoderFacts:
    """Measure another package's encoder; each time, since we cannot tell when that package changes it."""
    from vlm_cli.checkpoint.parts.vision_encoders import find_tower
    from vlm_cli.report.encoders import measure_encoder

    return measure_encoder(find_tower(VISION_ENCODERS[name].options_class()(name=name)).config)


def _track(names: Sequence[str]) -> Iterator[str]:
    """Show the progress of measuring on stderr."""
    count = f"{len(names)} vision encoder{'s' * (len(names) > 1)}"
    console.notify(f"Measuring {count}, once for these versions of OpenCLIP and timm …")
    with ProgressLine(len(names), noun="encoders", has_summary=False) as progress:
        for done, name in enumerate(names):
            progress.show(done)
            yield name


def _print_encoders(facts: dict[str, dict[str, Any]]) -> None:
    columns = ["vision encoder", "pixels", "v patches", "d channels", "M parameters", "pretrained"]
    rows = [[name, *_cells(x)] for name, x in facts.items()]
    outside = [x["summary"] if name in VISION_ENCODERS else "" for name, x in facts.items()]
    if any(outside):
        columns.append("")
        rows = [[*row, source] for row, source in zip(rows, outside, strict=True)]
    console.print_table(columns, rows, optional=("v patches", "pixels", "d channels", "M parameters"))


def _print_others(others: Mapping[str, Any]) -> None:
    """Print the encoders of Transformers and timm, one a line: a name with its tag of weights may be typed as it is."""
    for name, x in others.items():
        for full in [f"{name}.{tag}" for tag in x.pretrained] or [name]:
            console.print_line(full)
    if any(name.startswith("hf:") for name in others):
        console.notify("hf:TYPE stands for each model of that type: give hf:ORG/NAME or hf:DIRECTORY.")


def _cells(facts: dict[str, Any]) -> list[str]:
    if "problem" in facts:
        return [""] * 5
    height, width = facts["image_size"]
    size = str(height) if height == width else f"{height} × {width}"
    millions = f"{facts['parameters'] / 1e6:.1f}"
    return [size, str(facts["patches"]), str(facts["channels"]), millions, ", ".join(facts["pretrained"])]


# -- language models -------------------------------------------------------------------------------------------------


def _explain_unsuitable(word: str, quiet: bool) -> bool:
    """Print on stderr why some types of AutoModelForCausalLM are not in the list.

    Args:
        word: only types with this word in their names; "" prints how many types are left out.
        quiet: whether to leave out that number.

    Returns:
        Whether it printed a reason.
    """
    unsuitable = unsuitable_language_models()
    by_reason: dict[str, list[str]] = {}
    for name, reason in unsuitable.items() if word else ():
        if _contains(name, word):
            by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        console.notify(f"Not suitable: {', '.join(names)} ({reason}).")
    if not word and not quiet:
        console.notify(
            f"{len(unsuitable)} further types of AutoModelForCausalLM cannot be the language model of a VLM; "
            "`vlm list language-models TYPE` says why."
        )
    return bool(by_reason)
