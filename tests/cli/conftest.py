"""The command line in this process, and the smallest parts and models to try it on; made once, not to be changed."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support import ROOT
from tests.support.disk import TOWER
from tests.support.screens import Screens, Terminal
from vlm_cli import VLM
from vlm_cli.checkpoint import directory
from vlm_cli.cli import chat as chat_module
from vlm_cli.manifest import sign

SMALL_PERCEIVER = ("depth=1", "num_heads=2", "head_dim=8", "num_latents=6", "ff_mult=2")
SMALL_CROSS_ATTENTION = ("num_heads=2", "head_dim=8", "ff_mult=2")


@pytest.fixture(scope="module")
def loaded_once() -> Iterator[None]:
    """Commands of a module share what they load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "load", functools.cache(directory.load))
        yield


@dataclass(frozen=True)
class Parts:
    """What is composed: an OpenCLIP configuration, a language model, and sizes that keep the rest small."""

    folder: Path
    tower: Path
    language_model: Path

    @property
    def named(self) -> list[str]:
        return ["--vision-encoder", str(self.tower), "--language-model", str(self.language_model)]

    @property
    def flamingo(self) -> list[str]:
        sizes = [f"vision_tokenizer.{x}" for x in SMALL_PERCEIVER] + [f"fusion.{x}" for x in SMALL_CROSS_ATTENTION]
        return ["--family", "flamingo", *self.named, *(x for size in sizes for x in ("--set", size))]

    @property
    def kosmos(self) -> list[str]:
        sizes = [f"vision_tokenizer.{x}" for x in SMALL_PERCEIVER]
        return ["--family", "kosmos", *self.named, *(x for size in sizes for x in ("--set", size))]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For a process of its own: one thread, no network, and this working tree."""
    home = tmp_path_factory.mktemp("home")
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(home), "HF_HOME": str(home / "hf")}
    return {**os.environ, **own, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def example() -> ModuleType:
    """`examples/tiny_language_model.py`."""
    spec = importlib.util.spec_from_file_location("tiny_language_model", ROOT / "examples/tiny_language_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory, example: ModuleType) -> Parts:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "tower.json").write_text(json.dumps(TOWER))
    return Parts(folder, folder / "tower.json", example.make(folder / "lm"))


@pytest.fixture
def language_model(parts: Parts, tmp_path: Path) -> Path:
    """A copy of the language model, to be spoilt."""
    return Path(shutil.copytree(parts.language_model, tmp_path / "own-lm"))


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "photo.png"
    # Pillow's own noise is another each time, and what a random model says of it may hold any character.
    Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3 * 40 * 30)).save(path)
    return path


@pytest.fixture(scope="session")
def flamingo(vlm: Callable[..., Any], parts: Parts) -> Path:
    return _built(vlm, parts.folder / "flamingo", parts.flamingo)


@pytest.fixture(scope="session")
def kosmos(vlm: Callable[..., Any], parts: Parts) -> Path:
    return _built(vlm, parts.folder / "kosmos", parts.kosmos)


def _built(vlm: Callable[..., Any], out: Path, flags: list[str]) -> Path:
    result = vlm("build", out, *flags, "--quiet")
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def open_gates(flamingo: Path) -> Path:
    """A flamingo whose images matter: its gates stand at 0.5 and its tokens are large."""
    out = Path(shutil.copytree(flamingo, flamingo.parent / "open-gates"))
    weights = load_file(out / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("_gate"):
            tensor.fill_(0.5)
        elif name.startswith("fusion") and tensor.ndim == 2:
            tensor *= 20
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    sign(out)
    return out


@pytest.fixture
def open_screens(monkeypatch: pytest.MonkeyPatch) -> Screens:
    """Makes terminals of stdout and stderr; a test calls it, because pytest itself replaces both before each test."""

    def run() -> tuple[Terminal, Terminal]:
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Tokens that reach `VLM.generate`, a list for each turn of a chat."""
    found: list[list[int]] = []
    original = VLM.generate

    def spy(self: VLM, *args: Any, **kwargs: Any) -> Any:
        if "prompt_cache" in kwargs:
            found.append(kwargs["lang_x"][0].tolist())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(VLM, "generate", spy)
    return found


@pytest.fixture
def typed(vlm: Callable[..., Any], open_gates: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Types lines into a chat; an exception is what a key brings."""

    def run(
        *lines: str | BaseException,
        flags: Sequence[str] = (),
        model: Path | str = open_gates,
        history: Path | str = "",
    ) -> Any:
        keys = iter(lines)

        def read(prompt: str = "") -> str:
            key = next(keys)
            if isinstance(key, str):
                return key
            raise key

        monkeypatch.setattr(chat_module, "is_terminal", lambda stream: True)
        monkeypatch.setattr("vlm_cli.cli.line_editor._read_line", read)
        monkeypatch.setenv("VLM_HISTORY", str(history))
        return vlm("chat", model, "-n", 6, *flags)

    return run
