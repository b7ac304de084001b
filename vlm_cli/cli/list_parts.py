"""`vlm list`."""

import ast
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.options import JsonOption
from vlm_cli.composition import FAMILIES, UNSUITABLE_LANGUAGE_MODELS, VisionEncoderOptions
from vlm_cli.errors import UnknownNameError, first_line
from vlm_cli.registry import FUSIONS, VISION_ENCODERS, VISION_TOKENIZERS, suggest

__all__ = ["language_models", "list_parts"]

KINDS = ("families", "vision-encoders", "vision-tokenizers", "fusions", "language-models")
LONG = ("vision-encoders", "language-models")


def list_parts(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help=f"{', '.join(KINDS)}.")] = None,
    word: Annotated[str, typer.Argument(metavar="WORD", help="Only names that contain it.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List the parts that can be composed.

    Of each vision encoder it tells the image size, the patches and channels of a frame, the parameters and the
    pretrained tags. These are measured once, which takes up to a minute for all of them.

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
    told = kind == "language-models" and _tell_unsuitable(word, quiet=as_json)
    if not entries and not told:
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
    """Names of every kind; what is long only as a number, and nothing is measured."""
    if as_json:
        console.print_json(found)
        return
    for kind, entries in found.items():
        if kind in LONG:
            print(f"{kind}: {len(entries)}; `vlm list {kind}` lists them.")
        else:
            console.print_table((kind, ""), list(entries.items()))


def _entries(kind: str) -> dict[str, str]:
    """Names of a kind, and a word on each."""
    if kind == "vision-encoders":
        from vlm_cli.checkpoint.parts.openclip import list_towers

        return list_towers()
    if kind == "language-models":
        return language_models()
    if kind == "families":
        return {
            name: f"{x['vision_tokenizer']['type']} + {x['fusion']['type']}; trains {', '.join(x['trainable'])}"
            for name, x in FAMILIES.items()
        }
    registry = VISION_TOKENIZERS if kind == "vision-tokenizers" else FUSIONS
    return registry.summaries()


# -- vision encoders -------------------------------------------------------------------------------------------------


def _facts(entries: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What is known of each encoder, and where it comes from."""
    from vlm_cli.report.encoders import encoder_facts

    ours = encoder_facts([name for name in entries if name not in VISION_ENCODERS], _config, _track)
    found: dict[str, dict[str, Any]] = {}
    for name, source in entries.items():
        facts = asdict(ours[name]) if name in ours else _outside_facts(name)
        found[name] = {"source": source, **facts}
    return found


def _config(name: str) -> dict[str, Any]:
    from vlm_cli.checkpoint.parts.openclip import find_tower

    return find_tower(VisionEncoderOptions(name=name)).config


def _outside_facts(name: str) -> dict[str, Any]:
    """Facts of another package's encoder; measured each time, as its version does not tell when it changes."""
    from vlm_cli.checkpoint.parts.openclip import find_tower
    from vlm_cli.report.encoders import measure

    try:
        options = VISION_ENCODERS[name].options_class()(name=name)
        return asdict(measure(find_tower(options).config))
    except Exception as error:  # whatever that package raises; the other encoders are to be listed all the same
        problem = f"{type(error).__name__}: {first_line(error)}"
        console.notify(f"Cannot measure the vision encoder {name!r}. {problem}")
        return {"problem": problem}


def _track(names: Sequence[str]) -> Iterable[str]:
    """Show on stderr how far the measuring is."""
    what = f"Measuring {len(names)} vision encoder{'s' * (len(names) > 1)}, once"
    if not sys.stderr.isatty():
        console.notify(f"{what} for these versions of OpenCLIP and timm …")
        return names
    return _progress(names, what)


def _progress(names: Sequence[str], what: str) -> Iterator[str]:
    from rich.console import Console
    from rich.progress import track

    yield from track(names, what, console=Console(file=sys.stderr), transient=True)


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


def language_models() -> dict[str, str]:
    """Model types of Transformers that are causal, and their classes."""
    return {name: x for name, x in _causal_types().items() if name not in UNSUITABLE_LANGUAGE_MODELS}


def _tell_unsuitable(word: str, quiet: bool) -> bool:
    """Say on stderr why some types of AutoModelForCausalLM are not listed; of those with `word` in their names, if any.

    Args:
        quiet: whether to leave out how many there are.

    Returns:
        Whether a reason was told.
    """
    unsuitable = [name for name in _causal_types() if name in UNSUITABLE_LANGUAGE_MODELS]
    by_reason: dict[str, list[str]] = {}
    for name in unsuitable if word else ():
        if _contains(name, word):
            by_reason.setdefault(UNSUITABLE_LANGUAGE_MODELS[name], []).append(name)
    for reason, names in by_reason.items():
        console.notify(f"Not suitable: {', '.join(names)} ({reason}).")
    if not word and not quiet:
        console.notify(
            f"{len(unsuitable)} further types of AutoModelForCausalLM cannot be the language model of a VLM; "
            "`vlm list language-models TYPE` says why."
        )
    return bool(by_reason)


def _causal_types() -> dict[str, str]:
    """Types of AutoModelForCausalLM and their classes; read from Transformers' source, without importing it."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    source = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES":
            assert isinstance(node.value, ast.Call)
            return dict(sorted(ast.literal_eval(node.value.args[0])))
    return {}
