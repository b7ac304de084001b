"""`vlm list`: name the parts that a composition can hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from vlm_cli.cli import console, terminal
from vlm_cli.cli.options import JsonOption
from vlm_cli.composition import FAMILIES, VisionEncoderOptions
from vlm_cli.errors import UnknownNameError, first_line
from vlm_cli.registry import FUSIONS, VISION_ENCODERS, VISION_TOKENIZERS, suggest
from vlm_cli.report.language_models import suitable_language_models, unsuitable_language_models

__all__ = ["list_parts"]

KINDS = ("families", "vision-encoders", "vision-tokenizers", "fusions", "language-models")
LONG = ("vision-encoders", "language-models")


def list_parts(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help=f"List only this kind: {', '.join(KINDS)}.",
        ),
    ] = None,
    word: Annotated[str, typer.Argument(metavar="WORD", help="List only names that contain WORD.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List the parts that a composition can hold.

    For each vision encoder, the list shows the image size, the patches and channels of a frame, the number of
    parameters, and the tags of pretrained weights. The first run measures them, which takes up to a minute; later runs
    are fast.

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
    is_explained = kind == "language-models" and _explain_unsuitable(word, quiet=as_json)
    if not entries and not is_explained:
        console.notify(f"No {kind} have {word!r} in their names.")
    facts = _facts(entries) if kind == "vision-encoders" else {}
    if as_json:
        console.print_json(facts or entries)
    elif facts:
        _print_encoders(facts)
    elif entries:
        console.print_table((kind, "class" if kind == "language-models" else ""), list(entries.items()))


def _contains(name: str, word: str) -> bool:
    return word.lower() in name.lower()


def _print_all(found: dict[str, dict[str, str]], as_json: bool) -> None:
    """Print the names of every kind, and of a long kind only how many there are. Nothing is measured."""
    if as_json:
        console.print_json(found)
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


# -- vision encoders -------------------------------------------------------------------------------------------------


def _facts(entries: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the facts of each encoder, and which package it comes from."""
    from vlm_cli.report.encoders import encoder_facts

    ours = encoder_facts([name for name in entries if name not in VISION_ENCODERS], _config, _track)
    found: dict[str, dict[str, Any]] = {}
    for name, source in entries.items():
        facts = asdict(ours[name]) if name in ours else _outside_facts(name)
        found[name] = {"source": source, **facts}
    return found


def _config(name: str) -> dict[str, Any]:
    from vlm_cli.checkpoint.parts.vision_encoders import find_tower

    return find_tower(VisionEncoderOptions(name=name)).config


def _outside_facts(name: str) -> dict[str, Any]:
    """Measure another package's encoder; each time, since we cannot tell when that package changes it."""
    from vlm_cli.checkpoint.parts.vision_encoders import find_tower
    from vlm_cli.report.encoders import measure_encoder

    try:
        options = VISION_ENCODERS[name].options_class()(name=name)
        return asdict(measure_encoder(find_tower(options).config))
    except Exception as error:  # the package may raise anything; the list goes on with the other encoders
        problem = f"{type(error).__name__}: {first_line(error)}"
        console.notify(f"Cannot measure the vision encoder {name!r}. {problem}")
        return {"problem": problem}


def _track(names: Sequence[str]) -> Iterable[str]:
    """Show the progress of measuring on stderr."""
    what = f"Measuring {len(names)} vision encoder{'s' * (len(names) > 1)}, once"
    if not terminal.is_terminal(sys.stderr):
        console.notify(f"{what} for these versions of OpenCLIP and timm …")
        return names
    return _progress(names, what)


def _progress(names: Sequence[str], what: str) -> Iterator[str]:
    from rich.console import Console
    from rich.progress import track

    yield from track(names, what, console=Console(file=terminal.unguarded(sys.stderr)), transient=True)


def _print_encoders(facts: dict[str, dict[str, Any]]) -> None:
    columns = ["vision encoder", "pixels", "v patches", "d channels", "M parameters", "pretrained"]
    rows = [[name, *_cells(x)] for name, x in facts.items()]
    outside = [x["source"] if name in VISION_ENCODERS else "" for name, x in facts.items()]
    if any(outside):
        columns.append("")
        rows = [[*row, source] for row, source in zip(rows, outside, strict=True)]
    console.print_table(columns, rows)


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
