"""Imports point one way: from the upper layers of the package to the lower ones, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.support import ROOT

SOURCES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "vlm_cli").rglob("*.py"))}

#: The package's modules and folders, from the lowest layer to the highest. A module imports from its own folder and
#: from lower layers; names that share a layer do not import each other. docs/architecture.md draws the same order.
LAYERS = (
    ("printable",),
    ("auto_classes", "errors", "interrupt", "quiet", "text", "version"),
    ("hub_ids", "locks", "lookalike", "network", "offline", "plain_data", "renames", "schema"),
    ("shim", "timm_sizes"),
    ("files", "media", "prompt", "registry", "resume", "trust"),
    ("composition", "data", "flags", "manifest"),
    ("tiling",),
    ("preprocessing", "templates"),
    ("modeling",),
    ("decoding", "tokenizer"),
    ("image_processor",),
    ("chat_inputs",),
    ("processor",),
    ("writing",),
    ("report",),
    ("costs",),
    ("checkpoint",),
    ("models",),
    ("doctor", "generation", "training"),
    ("differences", "evaluation", "publishing", "serving", "tracing"),
    ("sweeps",),
    ("cli",),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
#: The package's face, which imports names on first use, and `python -m vlm_cli`.
FACES = ("vlm_cli/__init__.py", "vlm_cli/__main__.py")

#: What the paths on the left may not import although it is lower, or another project's.
FORBIDDEN = {f"vlm_cli/{name}": ["rich", "typer"] for name in LEVELS if name != "cli"}
FORBIDDEN["vlm_cli/modeling"] += [f"vlm_cli.{name}" for name in ("data", "files", "media", "prompt")]
FORBIDDEN["vlm_cli/modeling"] += ["safetensors", "yaml"]
FORBIDDEN["vlm_cli/evaluation"] += ["vlm_cli.training"]

#: What is imported before a command runs, and what it may not import outside of functions: `vlm --help` must be quick.
LIGHT = ("composition", "data", "errors", "files", "flags", "media/loader", "models", "prompt", "registry", "resume")
LIGHT += ("hub_ids", "locks", "lookalike", "manifest", "plain_data", "renames", "schema", "tiling")
LIGHT += ("serving/limits", "training/listener", "training/settings", "training/job")
HEAVY = ("torch", "transformers", "open_clip", "timm", "vlm_cli.modeling", "vlm_cli.processor")


# -- layers ------------------------------------------------------------------------------------------------------------


def imported(tree: ast.AST, *, at_load: bool = False) -> Iterator[str]:
    """Yield the names that a module imports, each also with its module.

    Args:
        tree: the module.
        at_load: leave out what functions import, and what only type checkers read.
    """
    for node in ast.iter_child_nodes(tree):
        if at_load and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_load and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            yield from imported(node, at_load=at_load)


def is_within(name: str, package: str, separator: str = ".") -> bool:
    return name == package or name.startswith(f"{package}{separator}")


def is_at(path: str, place: str) -> bool:
    """Say whether a path is the file or lies in the folder that `place` names without its suffix."""
    return is_within(path.removesuffix(".py"), place, "/")


def layer_of(name: str) -> str | None:
    """The layer's name in the dotted name of an import; None if it is not of this package."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "vlm_cli" and rest else None


def violations(path: str, source: str) -> list[str]:
    """The imports that a module at `path` may not have."""
    tree = ast.parse(source)
    names = list(imported(tree))
    found = [name for place, rules in FORBIDDEN.items() if is_at(path, place) for name in names if _is_any(name, rules)]
    if path not in FACES:
        own = Path(path).with_suffix("").parts[1]
        for name in names:
            other = layer_of(name)
            if other in LEVELS and other != own and LEVELS[other] >= LEVELS[own]:
                found.append(name)
    if any(is_at(path, f"vlm_cli/{place}") for place in LIGHT):
        found += [name for name in imported(tree, at_load=True) if _is_any(name, HEAVY)]
    return found


def _is_any(name: str, packages: Iterable[str]) -> bool:
    return any(is_within(name, package) for package in packages)


def test_each_module_has_a_layer() -> None:
    assert {Path(path).with_suffix("").parts[1] for path in SOURCES if path not in FACES} - {"demo"} <= set(LEVELS)


def test_imports_point_one_way() -> None:
    found = {path: violations(path, file.read_text(encoding="utf-8")) for path, file in SOURCES.items()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vlm_cli/modeling/vlm.py", "def f():\n    from vlm_cli.processor import VLMProcessor"),
        ("vlm_cli/modeling/vlm.py", "if TYPE_CHECKING:\n    from vlm_cli.processor import VLMProcessor"),
        ("vlm_cli/modeling/vlm.py", "from vlm_cli import checkpoint"),
        ("vlm_cli/modeling/vlm.py", "from vlm_cli.prompt import Text"),
        ("vlm_cli/modeling/fusion/new.py", "import rich.table"),
        ("vlm_cli/composition/composition.py", "from torch import nn"),
        ("vlm_cli/prompt.py", "import vlm_cli.media"),
        ("vlm_cli/registry.py", "from vlm_cli.composition import PARTS"),
        ("vlm_cli/report/layout.py", "from vlm_cli.cli import console"),
        ("vlm_cli/data/records.py", "def f():\n    from vlm_cli.training import dataset"),
        ("vlm_cli/training/run.py", "from vlm_cli.generation.rows import Row"),
        ("vlm_cli/generation/rows.py", "from vlm_cli.evaluation import items"),
        ("vlm_cli/generation/answers.py", "from vlm_cli.evaluation.items import Item"),
        ("vlm_cli/evaluation/run.py", "def f():\n    from vlm_cli.training.dataset import Encoder"),
        ("vlm_cli/models.py", "import torch"),
    ],
)
def test_a_wrong_import_is_noticed(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vlm_cli/composition/composition.py", "def f():\n    import torch"),
        ("vlm_cli/composition/composition.py", "if TYPE_CHECKING:\n    import torch"),
        ("vlm_cli/registry.py", "from vlm_cli.errors import UnknownNameError"),
        ("vlm_cli/modeling/vlm.py", "from vlm_cli.composition import PARTS"),
        ("vlm_cli/evaluation/items.py", "from vlm_cli.generation.rows import Row"),
    ],
)
def test_a_right_import_is_not(path: str, source: str) -> None:
    assert not violations(path, source)


# -- circles -----------------------------------------------------------------------------------------------------------


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Which modules each module imports, anywhere in it; what only type checkers read counts too.

    Args:
        sources: the text of each module by its path. The package's face imports everything, and is left out.
    """
    names = {_module(path): path for path in sources if path not in FACES}
    edges = {}
    for module, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(sources[path])):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in names else str(node.module) for name in inside}
        edges[module] = (found & set(names)) - {module}
    return edges


def _module(path: str) -> str:
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, directly or through others.

    Two modules are in one group if each reaches the other.
    """
    reached = {module: _reach(module, edges) for module in edges}
    groups = {frozenset(x for x in reached[module] if module in reached[x]) for module in edges}
    return sorted(sorted(group) for group in groups if group)


def _reach(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    """The modules at the end of one or more imports from `start`."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = edges[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_no_circle() -> None:
    found = circles(graph({path: file.read_text(encoding="utf-8") for path, file in SOURCES.items()}))
    assert found == []


@pytest.mark.parametrize(
    "back",
    [
        "from vlm_cli.modeling import vlm",
        "def f():\n    from vlm_cli.modeling.vlm import VLM",
        "if TYPE_CHECKING:\n    from vlm_cli.modeling.vlm import VLM",
        "import vlm_cli.modeling.vlm",
    ],
)
def test_a_circle_is_noticed(back: str) -> None:
    sources = {
        "vlm_cli/__init__.py": "from vlm_cli.modeling.vlm import VLM",
        "vlm_cli/modeling/vlm.py": "from vlm_cli.modeling.generation import GenerationMixin",
        "vlm_cli/modeling/generation.py": "from vlm_cli.modeling.prompt_cache import PromptCache",
        "vlm_cli/modeling/prompt_cache.py": back,
    }
    modules = [f"vlm_cli.modeling.{name}" for name in ("generation", "prompt_cache", "vlm")]
    assert circles(graph(sources)) == [modules]
    assert not circles(graph({**sources, "vlm_cli/modeling/prompt_cache.py": ""}))


def test_files_have_names_of_their_own() -> None:
    folders = [ROOT / name for name in ("vlm_cli", "tests", "examples", "benchmarks", "docs")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    nameless = {"util", "utils", "helper", "helpers", "common", "misc"}
    assert not [path for path in files if nameless & {part.removesuffix(".py") for part in path.parts[-2:]}]
