"""The documentation agrees with the code, and the code with the shape that the documentation draws."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import pkgutil
import re
import runpy
from pathlib import Path

import pytest
import yaml

import vlm_cli
from tests.support import ROOT
from tests.support.markdown import blocks, table
from vlm_cli import composition
from vlm_cli.registry import FUSIONS, TILINGS, VISION_TOKENIZERS

COMPOSITION = (ROOT / "docs" / "composition.md").read_text(encoding="utf-8")
SOURCES = sorted((ROOT / "vlm_cli").rglob("*.py"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]


def test_help_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "generate_help.py"))
    told = page["PAGE"].read_text(encoding="utf-8")
    assert told == page["generate"](), "run `python docs/generate_help.py`"


def test_python_page_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "generate_python.py"))
    told = page["PAGE"].read_text(encoding="utf-8")
    assert told == page["generate"](), "run `python docs/generate_python.py`"
    assert all(f"\n## {name}\n" in told for name in vlm_cli.__all__ if not name.startswith("_"))


@pytest.mark.matrix
def test_table_of_exports_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "generate_exports.py"))
    told = page["PAGE"].read_text(encoding="utf-8")
    assert told == page["insert"](told, page["generate"]()), "run `python docs/generate_exports.py`"


# -- settings --------------------------------------------------------------------------------------------------------


def settings(title: str) -> dict[str, str]:
    """Names and defaults in the table under a title of composition.md."""
    section = COMPOSITION.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (?:`(.+?)`)? ?\|", section, re.MULTILINE))


def sections() -> dict[str, type]:
    """The dataclass that each section describes."""
    parts = {f"vision_tokenizer: {name}": VISION_TOKENIZERS[name] for name in VISION_TOKENIZERS}
    parts |= {f"fusion: {name}": FUSIONS[name] for name in FUSIONS}
    parts |= {f"tiling: {name}": TILINGS[name] for name in TILINGS}
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
            default = default.type if isinstance(default, composition.Choice) else default
            assert yaml.safe_load(told[f.name]) == default, f.name


def test_families() -> None:
    rows = {name: cells for name, *cells in table(COMPOSITION, "family")}
    assert list(rows) == list(composition.FAMILIES)
    for name, (tokenizer, fusion, trains, decay, encoder, language_model) in rows.items():
        preset = composition.FAMILIES[name]
        assert (tokenizer, fusion) == (preset["vision_tokenizer"]["type"], preset["fusion"]["type"])
        assert encoder == "{name}:{pretrained}".format(**preset["vision_encoder"])
        assert language_model == preset["language_model"]["name"]
        only = ", fusion only" if preset.get("weight_decay_on") == ["fusion"] else ""
        assert decay == f"{preset['weight_decay']:g}{only}"
        parts = {"tokenizer": "vision_tokenizer", "fusion": "fusion", "added tokens": "added_tokens"}
        all_but = set(composition.PARTS) - {"vision_encoder"}
        told = all_but if trains == "all but the vision encoder" else {parts[x] for x in trains.split(", ")}
        assert told == set(preset["trainable"])


def test_composition_files_in_docs(tmp_path: Path) -> None:
    for number, block in enumerate(blocks(COMPOSITION, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        read = composition.Composition.compose(None, composition.read_file(path))
        assert (read.vision_tokenizer.type, read.fusion.type) == ("perceiver", "cross-attention")


# -- code and names ------------------------------------------------------------------------------------------------


#: Modules that another package imports, and that import it.
PARTS_OF_OTHERS = {"vlm_cli.evaluation.harness": "lmms_eval"}


def modules() -> list[str]:
    found = pkgutil.walk_packages(vlm_cli.__path__, "vlm_cli.")
    without = {name for name, package in PARTS_OF_OTHERS.items() if importlib.util.find_spec(package) is None}
    return ["vlm_cli", *(m.name for m in found if not m.name.endswith("__main__") and m.name not in without)]


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
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        target = "".join(target)
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_every_drawing_is_shown() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for drawing in (ROOT / "docs" / "images").iterdir():
        assert f"images/{drawing.name}" in pages, drawing.name
