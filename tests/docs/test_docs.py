"""The documentation agrees with the code, and the code with the shape that the documentation draws."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import vlm_cli
from tests.support import ROOT
from tests.support.markdown import blocks
from vlm_cli import composition
from vlm_cli.registry import FUSIONS, VISION_TOKENIZERS

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
COMPOSITION = (ROOT / "docs" / "composition.md").read_text(encoding="utf-8")
SOURCES = sorted((ROOT / "vlm_cli").rglob("*.py"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]


def test_help_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "generate_help.py"))
    told = page["PAGE"].read_text(encoding="utf-8")
    assert told == page["generate"](), "run `python docs/generate_help.py`"


# -- settings --------------------------------------------------------------------------------------------------------


def settings(title: str) -> dict[str, str]:
    """Names and defaults in the table under a title of composition.md."""
    section = COMPOSITION.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (?:`(.+?)`)? ?\|", section, re.MULTILINE))


def sections() -> dict[str, type]:
    """The dataclass that each section describes."""
    parts = {f"vision_tokenizer: {name}": VISION_TOKENIZERS[name] for name in VISION_TOKENIZERS}
    parts |= {f"fusion: {name}": FUSIONS[name] for name in FUSIONS}
    ours = {title: part.options_class() for title, part in parts.items() if part.target.startswith("vlm_cli.")}
    return {
        "Top level": composition.Composition,
        "vision_encoder": composition.VisionEncoderOptions,
        "language_model": composition.LanguageModelOptions,
        **ours,
    }


@pytest.mark.parametrize("title", sections())
def test_settings_are_documented(title: str) -> None:
    assert f"\n## {title}\n" in COMPOSITION
    fields = dataclasses.fields(sections()[title])
    told = settings(title)
    assert list(told) == [f.name for f in fields]
    for f in fields:
        if told[f.name] or f.default not in ("", dataclasses.MISSING):
            default = list(f.default) if isinstance(f.default, tuple) else f.default
            assert yaml.safe_load(told[f.name]) == default, f.name


def test_names_are_documented() -> None:
    for name in composition.FAMILIES:
        assert f"`{name}`" in COMPOSITION and f"| {name} |" in ARCHITECTURE


def test_weight_decay_in_architecture() -> None:
    table = ARCHITECTURE.partition("| family | trains | weight decay |\n")[2].partition("\n\n")[0]
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ")[2].strip("| ") for row in table.splitlines()[1:]}
    assert {name: float(told.split()[0]) for name, told in rows.items()} == {
        name: preset["weight_decay"] for name, preset in composition.FAMILIES.items()
    }


def test_composition_files_in_docs(tmp_path: Path) -> None:
    for number, block in enumerate(blocks(COMPOSITION, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        read = composition.Composition.compose(None, composition.read_file(path))
        assert (read.vision_tokenizer.type, read.fusion.type) == ("perceiver", "cross-attention")


# -- code in the documentation ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of "How to add", as if they were installed: each block whose first line names its file."""
    folder = tmp_path_factory.mktemp("packages")
    for block in blocks(ARCHITECTURE, "python"):
        if found := re.match(r"# (\w+/\w+\.py)\n", block):
            file = folder / found[1]
            file.parent.mkdir(exist_ok=True)
            file.write_text(block, encoding="utf-8")
    for number, block in enumerate(blocks(ARCHITECTURE, "toml")):
        info = folder / f"package{number}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: package{number}\nVersion: 1\n")
        [(group, name, target)] = re.findall(r'\[project\.entry-points\."(.+)"\]\n(.+) = "(.+)"', block)
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    return folder


def run_python(code: str, path: Path, *arguments: str) -> str:
    """What a fresh interpreter prints, where it finds what lies in `path`."""
    found = os.pathsep.join([str(path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=path, env={**os.environ, "PYTHONPATH": found}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_outside_parts_compose_and_run(packages: Path) -> None:
    runpy.run_path(str(ROOT / "examples" / "tiny_language_model.py"))["make"](packages / "tiny-lm")
    session = "".join(blocks(ARCHITECTURE, "pycon"))
    assert session.count(">>>") > 10
    code = """
import doctest, sys
test = doctest.DocTestParser().get_doctest(sys.argv[1], {}, "architecture.md", None, 0)
runner = doctest.DocTestRunner()
runner.run(test)
sys.exit(runner.failures)
"""
    run_python(code, packages, session)


def test_outside_parts_are_listed_without_torch(packages: Path) -> None:
    code = """
import sys
from vlm_cli.cli.app import app
from typer.testing import CliRunner
print(CliRunner().invoke(app, ["list"]).output)
assert "torch" not in sys.modules
"""
    printed = run_python(code, packages)
    assert "averages of neighbouring patches" in printed and "one token per medium" in printed


def test_python_in_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(composition.FAMILIES, "llava-1.5", {})  # removed after the test
    ran = [block for block in blocks(ARCHITECTURE, "python") if not block.startswith("# ")]
    for block in ran:
        exec(compile(block, "architecture.md", "exec"), {})
    assert len(ran) == 1 and composition.FAMILIES["llava-1.5"]


def modules() -> list[str]:
    found = pkgutil.walk_packages(vlm_cli.__path__, "vlm_cli.")
    return ["vlm_cli", *(m.name for m in found if not m.name.endswith("__main__"))]


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if ">>> " in path.read_text(encoding="utf-8")], ids=lambda path: path.stem
)
def test_doctests(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert not doctest.testmod(importlib.import_module(name)).failed


def test_exports_exist() -> None:
    for name in modules():
        module = importlib.import_module(name)
        for exported in getattr(module, "__all__", ()):
            assert hasattr(module, exported), f"{name}.{exported}"
    assert set(vlm_cli.__all__) == set(dir(vlm_cli))


# -- links -----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of the titles of a page."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_every_drawing_is_shown() -> None:
    for drawing in (ROOT / "docs" / "images").iterdir():
        assert f"](images/{drawing.name})" in ARCHITECTURE


# -- imports and names -----------------------------------------------------------------------------------------------

_UPPER = ("vlm_cli.cli", "vlm_cli.generation", "vlm_cli.training", "vlm_cli.evaluation", "typer", "rich")
_MIDDLE = (*_UPPER, "vlm_cli.report", "vlm_cli.checkpoint")

#: What each part of the package may not import, not even inside a function; with `!`, what it may all the same.
FORBIDDEN = {
    "vlm_cli/errors.py": ("vlm_cli",),
    "vlm_cli/prompt.py": ("vlm_cli", "!vlm_cli.errors"),
    "vlm_cli/media": ("vlm_cli", "!vlm_cli.errors", "!vlm_cli.media"),
    "vlm_cli/registry.py": ("vlm_cli", "!vlm_cli.errors"),
    "vlm_cli/flags.py": ("vlm_cli", "!vlm_cli.registry"),
    "vlm_cli/resume.py": ("vlm_cli",),
    "vlm_cli/composition": ("vlm_cli", "!vlm_cli.composition", "!vlm_cli.errors", "!vlm_cli.registry"),
    "vlm_cli/modeling": (*_MIDDLE, "vlm_cli.processor", "vlm_cli.prompt", "vlm_cli.media", "safetensors", "yaml"),
    "vlm_cli/processor.py": _MIDDLE,
    "vlm_cli/checkpoint": (*_UPPER, "vlm_cli.models"),
    "vlm_cli/models.py": _UPPER,
    "vlm_cli/report": (*_UPPER, "vlm_cli.checkpoint", "vlm_cli.models"),
    "vlm_cli/data": ("vlm_cli", *(f"!vlm_cli.{x}" for x in ("data", "media", "prompt", "registry", "errors"))),
    "vlm_cli/training": ("vlm_cli.cli", "vlm_cli.generation", "vlm_cli.evaluation", "typer", "rich"),
    "vlm_cli/evaluation": ("vlm_cli.cli", "vlm_cli.training", "typer", "rich"),
    "vlm_cli/generation": ("vlm_cli.cli", "vlm_cli.training", "vlm_cli.evaluation", "typer", "rich"),
}

#: What is imported before a command runs.
LIGHT = (
    "vlm_cli/errors.py",
    "vlm_cli/prompt.py",
    "vlm_cli/media/loader.py",
    "vlm_cli/registry.py",
    "vlm_cli/flags.py",
    "vlm_cli/training/settings.py",
    "vlm_cli/models.py",
    "vlm_cli/composition",
)
HEAVY = ("torch", "transformers", "open_clip", "timm", "vlm_cli.modeling", "vlm_cli.processor")


def imported(tree: ast.AST, *, at_load: bool = False) -> Iterator[str]:
    """Modules that a module imports; `at_load` leaves out those that its functions import.

    What only type checkers read does not count.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_load and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            yield from imported(node, at_load=at_load)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(path: str, source: str) -> list[str]:
    """Imports that a module at `path` may not have."""
    tree = ast.parse(source)
    found = []
    for place, rules in FORBIDDEN.items():
        if path == place or path.startswith(f"{place}/"):
            allowed = [rule[1:] for rule in rules if rule.startswith("!")]
            wrong = [rule for rule in rules if not rule.startswith("!")]
            for name in imported(tree):
                is_bad = any(is_within(name, rule) for rule in wrong)
                if is_bad and name != "vlm_cli" and not any(is_within(name, rule) for rule in allowed):
                    found.append(name)
    if any(path == place or path.startswith(f"{place}/") for place in LIGHT):
        found += [name for name in imported(tree, at_load=True) if any(is_within(name, x) for x in HEAVY)]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    assert not violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vlm_cli/modeling/vlm.py", "def f():\n    from vlm_cli.processor import VLMProcessor"),
        ("vlm_cli/modeling/vlm.py", "from vlm_cli import checkpoint"),
        ("vlm_cli/modeling/fusion/new.py", "import rich.table"),
        ("vlm_cli/composition/composition.py", "from torch import nn"),
        ("vlm_cli/prompt.py", "if True:\n    import transformers"),
        ("vlm_cli/registry.py", "from vlm_cli.composition import PARTS"),
        ("vlm_cli/report/layout.py", "from vlm_cli.cli import console"),
        ("vlm_cli/generation/answers.py", "from vlm_cli.evaluation.items import Item"),
        ("vlm_cli/evaluation/run.py", "def f():\n    from vlm_cli.training.dataset import Encoder"),
        ("vlm_cli/data/records.py", "def f():\n    from vlm_cli.training import dataset"),
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
    ],
)
def test_a_right_import_is_not(path: str, source: str) -> None:
    assert not violations(path, source)


def test_files_have_names_of_their_own() -> None:
    folders = [ROOT / name for name in ("vlm_cli", "tests", "examples", "benchmarks", "docs")]
    files: list[Any] = [path for folder in folders for path in folder.rglob("*.py")]
    nameless = {"util", "utils", "helper", "helpers", "common", "misc"}
    assert not [path for path in files if nameless & {part.removesuffix(".py") for part in path.parts[-2:]}]
