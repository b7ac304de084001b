"""Names that only look like those of files: every file and directory that a user names is found, with a note."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, disk
from vlm_cli.checkpoint.parts.language_models import find_language_model
from vlm_cli.checkpoint.parts.openclip import find_openclip_tower
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.weights import open_weights
from vlm_cli.composition import LanguageModelOptions, VisionEncoderOptions
from vlm_cli.composition.files import read_file
from vlm_cli.data.inputs import base_folder, read_bytes, read_lines
from vlm_cli.errors import VLMError, VLMWarning
from vlm_cli.lookalike import find_lookalike, find_named
from vlm_cli.models import resolve

STORED, TYPED = "cafe\u0301\u202f1", "caf\u00e9 1"


def test_one_file_that_looks_the_same_is_taken(tmp_path: Path) -> None:
    (tmp_path / STORED).touch()
    with pytest.warns(VLMWarning, match=r"so vlm takes '.*/cafe\\u0301\\u202f1', whose name looks the same"):
        assert find_named(tmp_path / TYPED) == tmp_path / STORED
    (tmp_path / "cafe\u0301 1").touch()
    assert find_lookalike(tmp_path / TYPED) is None  # two look the same
    (tmp_path / TYPED).touch()
    assert find_named(tmp_path / TYPED) == tmp_path / TYPED


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every name has look-alike characters."""
    folder = tmp_path_factory.mktemp("named")
    shutil.copytree(ROOT / "vlm_cli/demo", folder / f"{STORED}-vlm")
    disk.language_model(folder / f"{STORED}-lm")
    disk.tower(folder / f"{STORED}-tower")
    shutil.copy(folder / f"{STORED}-tower/open_clip_model.safetensors", folder / f"{STORED}.safetensors")
    (folder / f"{STORED}.yaml").write_text("family: llava\n")
    (folder / f"{STORED}.json").write_text(json.dumps({"model_cfg": disk.TOWER}))
    (folder / f"{STORED}.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    return folder


@pytest.mark.parametrize(
    "read",
    [
        lambda x: list(read_lines(Path(f"{x}.jsonl"))),
        lambda x: read_bytes(Path(f"{x}.jsonl")),
        lambda x: read_file(Path(f"{x}.yaml")),
        lambda x: resolve(f"{x}-vlm"),
        lambda x: find_language_model(LanguageModelOptions(name=f"{x}-lm")),
        lambda x: find_openclip_tower(VisionEncoderOptions(name=f"local-dir:{x}-tower")),
        lambda x: find_openclip_tower(VisionEncoderOptions(name=f"{x}.json")),
        lambda x: find_openclip_tower(VisionEncoderOptions(name="ViT-B-32", pretrained=f"{x}.safetensors")),
        lambda x: PublishedCheckpoint.open(f"{x}.safetensors"),
        lambda x: open_weights(Path(f"{x}.safetensors")),
    ],
)
def test_inputs_are_found_under_names_that_look_the_same(named: Path, read: Callable[[str], Any]) -> None:
    with pytest.warns(VLMWarning, match="whose name looks the same"):
        read(str(named / TYPED))
    with pytest.raises((VLMError, OSError)):
        read(str(named / "caf\u00ea 1"))


def test_relative_paths_start_at_the_folder_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / STORED).mkdir()
    (tmp_path / STORED / "a.jsonl").touch()
    assert base_folder(tmp_path / TYPED / "a.jsonl") == tmp_path / STORED


def test_commands_print_a_note(vlm: Any, named: Path) -> None:
    result = vlm("count-params", named / f"{TYPED}-vlm")
    assert result.exit_code == 0 and result.stderr.startswith("Note: ") and "looks the same" in result.stderr
