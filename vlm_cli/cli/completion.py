"""What the Tab key offers for a value: names of parts, models in the folder, formats. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vlm_cli.composition import FAMILIES, PARTS, LanguageModelOptions
from vlm_cli.modeling.quantizations import QUANTIZATIONS
from vlm_cli.models import DEMO
from vlm_cli.plain_data import read_json
from vlm_cli.registry import FUSIONS, VISION_ENCODERS, VISION_TOKENIZERS

__all__ = [
    "complete_devices",
    "complete_dtypes",
    "complete_encoders",
    "complete_families",
    "complete_fusions",
    "complete_language_models",
    "complete_models",
    "complete_parts",
    "complete_quantizations",
    "complete_settings",
    "complete_subjects",
    "complete_tokenizers",
    "mend_scripts",
    "offer",
]

Completer = Callable[[str], list[Any]]


def offer(names: Callable[[], Iterable[str] | Mapping[str, str]]) -> Completer:
    """Make a function that offers the names that begin with what is typed, with their summaries if there are any."""

    def complete(incomplete: str) -> list[Any]:
        found = names()
        matching = [name for name in found if name.startswith(incomplete)]
        return [(name, found[name]) for name in matching] if isinstance(found, Mapping) else matching

    return complete


complete_families = offer(lambda: list(FAMILIES))
complete_tokenizers = offer(VISION_TOKENIZERS.summaries)
complete_fusions = offer(FUSIONS.summaries)
complete_quantizations = offer(lambda: list(QUANTIZATIONS))
complete_dtypes = offer(lambda: ["auto", "float32", "bfloat16", "float16"])
complete_devices = offer(lambda: ["auto", "cpu", "cuda", "mps"])


def complete_encoders(incomplete: str) -> list[str]:
    """Offer names of vision encoders; behind a name and a colon, the tags of its weights.

    `hf:` offers directories, and `timm:` its models; behind a model and a dot, the tags of its weights.
    """
    from vlm_cli.checkpoint.parts.openclip import openclip_files
    from vlm_cli.report.encoders import known_facts

    name, colon, rest = incomplete.partition(":")
    if colon and name == "hf":
        return [f"hf:{folder}" for folder in _folders(rest, lambda config: config not in (None, "vlm"))]
    if colon and name == "timm":
        return _complete_timm(incomplete)
    facts = known_facts(openclip_files())
    if colon:
        tags = facts[name].pretrained if name in facts else ()
        return [found for tag in tags if (found := f"{name}:{tag}").startswith(incomplete)]
    return [name for name in (*openclip_files(), *VISION_ENCODERS, "hf:", "timm:") if name.startswith(incomplete)]


def _complete_timm(incomplete: str) -> list[str]:
    """Offer models of timm, or behind a model and a dot, the tags of its weights."""
    from vlm_cli.report.other_encoders import find_other_encoders

    found = find_other_encoders(incomplete.partition(".")[0])
    tagged = [f"{name}.{tag}" for name, x in found.items() for tag in x.pretrained]
    return [name for name in (tagged if "." in incomplete else found) if name.startswith(incomplete)]


def complete_models(incomplete: str) -> list[str]:
    """Offer models that vlm wrote, in the folder of what is typed, and the demo."""
    demo = [DEMO.name] if DEMO.name.startswith(incomplete) else []
    return [*_folders(incomplete, lambda config: config == "vlm"), *demo]


def complete_subjects(incomplete: str) -> list[str]:
    """Offer models, families and composition files, for commands that need no weights."""
    return [*complete_models(incomplete), *complete_families(incomplete), *_paths(incomplete, "*.yaml")]


def complete_language_models(incomplete: str) -> list[str]:
    """Offer directories of other models, and GGUF files."""
    return [*_folders(incomplete, lambda config: config not in (None, "vlm")), *_paths(incomplete, "*.gguf")]


def complete_parts(incomplete: str) -> list[str]:
    """Offer one more part for a list that is separated by commas."""
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    return [f"{before}{comma}{part}" for part in PARTS if part.startswith(last) and part not in given]


def complete_settings(incomplete: str) -> list[str]:
    """Offer settings of all parts, as `vision_tokenizer.num_latents=`."""
    classes = [("language_model", LanguageModelOptions)]
    for part, registry in (("vision_tokenizer", VISION_TOKENIZERS), ("fusion", FUSIONS)):
        classes += [(part, registry[name].options_class()) for name in registry]
    names = dict.fromkeys(f"{part}.{field.name}=" for part, options in classes for field in fields(options))
    return [name for name in names if name.startswith(incomplete)]


def _paths(incomplete: str, pattern: str) -> Iterator[str]:
    """Yield the paths that match a pattern in the folder of what is typed, spelled as it is."""
    folder = incomplete[: incomplete.rfind("/") + 1]
    try:
        names = sorted(path.name for path in Path(os.path.expanduser(folder or ".")).glob(pattern))
    except OSError:
        return
    yield from (found for name in names if (found := f"{folder}{name}").startswith(incomplete))


def _folders(incomplete: str, is_wanted: Callable[[str | None], bool]) -> Iterator[str]:
    """Yield the folders whose config.json has a wanted `model_type`."""
    for name in _paths(incomplete, "*"):
        config = Path(os.path.expanduser(name)) / "config.json"
        try:
            data = read_json(config) if config.is_file() else None  # a pipe would hold the shell
        except (OSError, ValueError):
            continue
        if isinstance(data, dict) and is_wanted(data.get("model_type")):
            yield name


# -- scripts of shells ------------------------------------------------------------------------------------------------

#: Without this, bash splits `ViT-B-32:openai` into three words.
_BASH = "COMP_WORDBREAKS=${COMP_WORDBREAKS//:}"

#: zsh reads the file of a completion at the first Tab and calls it; Typer's file only defines a function then.
_ZSH_BEFORE = "compdef %(complete_func)s %(prog_name)s"
_ZSH_AFTER = """\
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  %(complete_func)s "$@"
else
  compdef %(complete_func)s %(prog_name)s
fi"""


def mend_scripts() -> None:
    """Mend the scripts that `--install-completion` and `--show-completion` write."""
    from typer import _completion_shared

    scripts = _completion_shared._completion_scripts
    scripts["zsh"] = scripts["zsh"].replace(f"\n{_ZSH_BEFORE}", f"\n{_ZSH_AFTER}")
    scripts["bash"] = f"{scripts['bash'].rstrip()}\n{_BASH}\n"
