"""A model in each form that a directory can have, made once, not to be changed."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import pytest
import torch

import vlm_cli
from tests.support import disk, seed_torch
from tests.support.disk import run
from vlm_cli.checkpoint.saving import save, save_adapted
from vlm_cli.composition.adapters import AdapterSettings
from vlm_cli.modeling.adapters import adapter_parameters, add_adapter


@torch.no_grad()
def stir(parameters, scale: float = 0.1) -> None:
    """Change parameters, as training would."""
    seed_torch(7)
    for x in parameters:
        x.add_(torch.randn_like(x), alpha=scale)


def write_adapted(base: Path, out: Path, settings: AdapterSettings) -> Path:
    """Write what a run with an adapter of the language model writes over `base`."""
    model, processor = vlm_cli.load(str(base))
    add_adapter(model.lang_model, "language_model", settings)
    model.config.adapters = ["language_model"]
    stir(x for _, x in adapter_parameters(model))
    stir(model.vision_tokenizer.parameters())
    save_adapted(model, processor, out, str(base))
    return out


class Made:
    """The directories; an adapter is made when a test asks for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        named = f"local-dir:{disk.tower(path / 'tower')}", str(disk.language_model(path / "lm"))
        self.full = disk.write(path / "full", disk.composition(*named, "perceiver", "cross-attention"))
        self.llava = disk.write(
            path / "llava", disk.composition(*named, "mlp", "language-stream"), dtype=torch.bfloat16
        )
        assert run("export", self.full, path / "delta", "--format", "delta").exit_code == 0
        self.delta, self.trained = path / "delta", path / "trained"
        model, processor = vlm_cli.load(str(self.full))
        stir(x for part in (model.lang_model, model.fusion) for x in part.parameters())
        self.trained.mkdir()
        save(model, processor, self.trained)
        (self.trained / "training_args.json").write_text(json.dumps({"job": {"model": str(self.full)}}))

    def get(self, form: str) -> Path:
        return getattr(self, form)

    @cached_property
    def lora(self) -> Path:
        return write_adapted(self.full, self.path / "lora", AdapterSettings(r=2))

    @cached_property
    def dora(self) -> Path:
        return write_adapted(self.delta, self.path / "dora", AdapterSettings(r=2, dora=True, rslora=True))


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Made:
    """`full` and its delta; `trained`, with the record of a run; adapters over both; bfloat16 of other parts."""
    return Made(tmp_path_factory.mktemp("models"))
