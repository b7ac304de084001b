"""Models on disk as `vlm build` writes them, of pretrained parts on disk: a tower and a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from examples import tiny_language_model
from tests.support import seed_torch
from tests.support.tiny import FUSIONS, TOKENIZERS, open_gates
from vlm_cli.checkpoint.create import create, plan
from vlm_cli.checkpoint.saving import save
from vlm_cli.cli.app import app
from vlm_cli.composition import Composition
from vlm_cli.modeling.towers import build_tower

#: OpenCLIP's configuration of the vision encoder that all tests with files use.
TOWER: dict[str, Any] = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


def run(*words: Any) -> Result:
    """`vlm` in this process."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert "Traceback" not in result.output
    return result


def language_model(folder: Path, model_type: str = "llama") -> Path:
    return tiny_language_model.make(folder, model_type=model_type)


def tower(folder: Path, seed: int = 5) -> Path:
    """A folder as OpenCLIP's hub repositories are; `local-dir:` or `hf-hub:` names it."""
    folder.mkdir(parents=True)
    seed_torch(seed)
    state = {f"visual.{name}": x for name, x in build_tower(TOWER).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TOWER, "preprocess_cfg": {}}))
    return folder


def composition(tower: str, language_model: str, tokenizer: str, fusion: str, **settings: Any) -> Composition:
    encoder = {"name": tower, **settings.pop("vision_encoder", {})}
    parts = {"vision_encoder": encoder, "language_model": {"name": language_model}}
    parts |= {"vision_tokenizer": TOKENIZERS[tokenizer], "fusion": FUSIONS[fusion]}
    return Composition.compose(None, parts, settings)


def write(out: Path, parts: Composition, **keywords: Any) -> Path:
    """Build a model whose images matter, and write it."""
    blueprint = plan(parts)
    model = open_gates(create(blueprint, **keywords))
    out.mkdir()
    save(model, blueprint.processor, out)
    return out
