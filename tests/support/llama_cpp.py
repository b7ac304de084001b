"""Tiny models that llama.cpp can hold, with pictures that matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from tests.support import disk, tiny
from vlm_cli.checkpoint.create import create, plan
from vlm_cli.composition import Composition
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor


def _siglip(name: str, patch_size: int) -> dict[str, Any]:
    """Return OpenCLIP's configuration of a SigLIP tower of 32 pixels."""
    sizes = {"img_size": 32, "patch_size": patch_size, "embed_dim": 48, "depth": 3, "num_heads": 3}
    timm = tiny.register(name, VisionTransformer, class_token=False, **sizes)
    cfg = {"image_size": 32, "timm_model_name": timm, "timm_pool": "map", "timm_proj": "none"}
    return {"embed_dim": 48, "vision_cfg": cfg}


SIGLIP = _siglip("tiny_siglip", 8)
SIGLIP_OF_MANY_PATCHES = _siglip("tiny_siglip_of_many_patches", 2)


def make(
    folder: Path,
    tokenizer: tiny.Settings = "mlp",
    *,
    model_type: str = "llama",
    tower: dict[str, Any] = SIGLIP,
    encoder: dict[str, Any] | None = None,
    mask: str = "causal",
    **settings: Any,
) -> tuple[VLM, VLMProcessor]:
    """A model of random weights, and its processor; `encoder` and `settings` change the composition."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (lm := folder / model_type).is_dir():
        disk.language_model(lm, model_type)
    (folder / "tower.json").write_text(json.dumps(tower))
    parts = Composition.compose(
        None,
        {
            "vision_encoder": {"name": str(folder / "tower.json"), **(encoder or {})},
            "vision_tokenizer": tiny.TOKENIZERS[tokenizer] if isinstance(tokenizer, str) else tokenizer,
            "fusion": {"type": "language-stream", "mask": mask},
            "language_model": {"name": str(lm)},
        },
        settings,
    )
    blueprint = plan(parts)
    model = tiny.open_gates(create(blueprint, random_weights=True))
    tiny.stir(model.vision_encoder, 0.2, seed=3)
    tiny.stir(model.lang_model, 0.2, seed=4)
    return model.eval(), blueprint.processor
