"""`vlm list`."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vlm_cli.cli import console
from vlm_cli.cli.options import JsonOption
from vlm_cli.composition import FAMILIES
from vlm_cli.errors import UnknownNameError
from vlm_cli.registry import FUSIONS, VISION_TOKENIZERS, suggest

__all__ = ["language_models", "list_parts"]

KINDS = ("families", "vision-encoders", "vision-tokenizers", "fusions", "language-models")


def list_parts(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help=f"{', '.join(KINDS)}.")] = None,
    word: Annotated[str, typer.Argument(metavar="WORD", help="Only names that contain it.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List the parts that can be composed.

    Example: vlm list vision-encoders siglip
    """
    if kind is not None and kind not in KINDS:
        raise UnknownNameError(f"unknown kind {kind!r}.{suggest(kind, KINDS)} Known: {', '.join(KINDS)}.")
    kinds = (kind,) if kind else KINDS
    found = {k: {n: s for n, s in _entries(k).items() if word.lower() in n.lower()} for k in kinds}
    if as_json:
        console.print_json(found[kind] if kind else found)
        return
    for k, entries in found.items():
        if kind is None and k in ("vision-encoders", "language-models"):
            print(f"{k}: {len(entries)}; `vlm list {k}` lists them.")
        elif not entries:
            console.note(f"No {k} have {word!r} in their names.")
        elif k in ("vision-encoders", "language-models"):
            print("\n".join(entries))
        else:
            console.print_table((k, ""), list(entries.items()))


def _entries(kind: str) -> dict[str, str]:
    """Names of a kind, and a word on each."""
    if kind == "vision-encoders":
        from vlm_cli.checkpoint.openclip import list_towers

        return dict.fromkeys(list_towers(), "OpenCLIP")
    if kind == "language-models":
        return language_models()
    if kind == "families":
        return {
            name: f"{x['vision_tokenizer']['type']} + {x['fusion']['type']}; trains {', '.join(x['trainable'])}"
            for name, x in FAMILIES.items()
        }
    registry = VISION_TOKENIZERS if kind == "vision-tokenizers" else FUSIONS
    return {name: registry[name].summary for name in registry}


def language_models() -> dict[str, str]:
    """Model types of Transformers that are causal, and their classes; read from its source, without importing it."""
    from vlm_cli.composition import UNSUITABLE_LANGUAGE_MODELS

    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    source = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES":
            assert isinstance(node.value, ast.Call)
            pairs = dict(ast.literal_eval(node.value.args[0]))
            return {name: pairs[name] for name in sorted(pairs) if name not in UNSUITABLE_LANGUAGE_MODELS}
    return {}
