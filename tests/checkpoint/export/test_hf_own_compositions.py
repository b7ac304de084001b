"""Compositions of our own, written as the classes of Transformers that have tokens around a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GotOcr2ImageProcessor,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.support import disk, tiny
from tests.support.disk import run
from vlm_cli.checkpoint.export.hf import agreement, idefics3, write
from vlm_cli.modeling.towers import build_tower

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_SQUARE = {"height": 32, "width": 32}
_FENCE = "<fake_token_around_image>"
_WHOLE = f"{_FENCE}<global-img>{{image}}{_FENCE}"
_SPLIT = {
    "type": "split",
    "tile_text": f"{_FENCE}<row_{{row}}_col_{{column}}>{{image}}",
    "row_end_text": "\n",
    "thumbnail_text": f"\n{_WHOLE}",
    "whole_text": _WHOLE,
}
PE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 384, "timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map"},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
_PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]

#: Class -> vision encoder, type of the language model, special tokens of its tokenizer, vision tokenizer, mask, tiling.
CASES: dict[str, tuple[str, str, list[str], dict[str, Any], str, dict[str, Any]]] = {
    "InternVL": (
        "internvit",
        "qwen2",
        ["<img>", "</img>"],
        {"type": "mlp", "pixel_shuffle": 2, "norm": "layer"},
        "causal",
        {"type": "grid", "picture_text": "<img>{views}</img>"},
    ),
    "InternVL of one view": (
        "internvit",
        "qwen2",
        ["<img>", "</img>"],
        {"type": "mlp", "pixel_shuffle": 2, "norm": "layer"},
        "causal",
        {"type": "none", "picture_text": "<img>{views}</img>"},
    ),
    "Cohere2Vision": (
        "siglip",
        "mistral",
        ["<begin>", "<end>", "<break>"],
        {"type": "mlp", "pixel_shuffle": 2, "activation": "swiglu", "dim_hidden": 24},
        "causal",
        {
            "type": "grid",
            "choose": "scale",
            "picture_text": "<begin>{views}<end>",
            "tile_text": "{image}<break>",
            "thumbnail_text": "{image}<break>",
        },
    ),
    "DeepseekVL": ("siglip", "gpt2", [], {"type": "mlp"}, "causal", {"type": "none"}),
    "PerceptionLM": ("pe", "llama", [], {"type": "mlp"}, "causal", {"type": "none"}),
    "Idefics3": (
        "siglip",
        "llama",
        [_FENCE, "<global-img>", *_PLACES],
        {"type": "linear", "bias": False, "pixel_shuffle": 2},
        "causal",
        _SPLIT,
    ),
    "PaliGemma": (
        "siglip",
        "gemma",
        ["<bos>"],
        {"type": "linear"},
        "prefix",
        {"type": "none", "picture_text": "{views}<bos>"},
    ),
    "Gemma3": (
        "siglip",
        "gemma3_text",
        ["<start_of_image>", "<end_of_image>"],
        {"type": "linear", "bias": False, "pool": 2, "norm": "gemma", "norm_eps": 1e-6},
        "image",
        {"type": "none", "picture_text": "\n\n<start_of_image>{views}<end_of_image>\n\n"},
    ),
}


def write_encoder(folder: Path, name: str) -> str:
    """Write a tiny vision encoder, and return how `vlm build` names it."""
    if name == "pe":  # its pictures are stretched, as those of the published models
        (folder / "openclip").mkdir(parents=True)
        state = {f"visual.{key}": x for key, x in tiny.stir(build_tower(PE), 0.05, seed=3).state_dict().items()}
        save_file(state, folder / "openclip" / "open_clip_model.safetensors")
        config = {"model_cfg": PE, "preprocess_cfg": {"size": 384, "resize_mode": "squash"}}
        (folder / "openclip" / "open_clip_config.json").write_text(json.dumps(config))
        return f"local-dir:{folder / 'openclip'}"
    if name == "internvit":
        config = InternVLVisionConfig(**_SIZES, image_size=[32, 32], patch_size=[8, 8])
        model, images = InternVLVisionModel(config), GotOcr2ImageProcessor(size=_SQUARE)
    else:
        config = SiglipVisionConfig(**_SIZES, image_size=32, patch_size=8, vision_use_head=False)
        model, images = SiglipVisionModel(config), SiglipImageProcessor(size=_SQUARE)
    tiny.stir(model, seed=3).save_pretrained(folder)
    images.save_pretrained(folder)
    return f"hf:{folder}"


def write_language_model(folder: Path, model_type: str, tokens: list[str]) -> Path:
    """A language model whose tokenizer has more special tokens, and whose tables have rows for them."""
    disk.language_model(folder, model_type)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(x, special=True) for x in tokens], special_tokens=True)
    if "<bos>" in tokens:
        tokenizer.bos_token = "<bos>"
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    tiny.stir(model, seed=4).save_pretrained(folder)
    return folder


@pytest.mark.matrix
def test_single_pixels_of_torchvision_may_differ(tmp_path: Path, monkeypatch: Any) -> None:
    """Of a thin picture that grows eight times, torchvision rounds one number in a million by 7 levels."""
    sizes = {**_SIZES, "num_hidden_layers": 3}
    tower = tiny.stir(CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=336, patch_size=112)), seed=3)
    tower.save_pretrained(tmp_path / "encoder")
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336).save_pretrained(tmp_path / "encoder")
    parts = ["--language-model", str(disk.language_model(tmp_path / "lm")), "--dtype", "float32"]
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    named = {"type": "anyres", "pinpoints": pinpoints}
    settings = ["--set", f"tiling={json.dumps(named)}", "--set", "vision_encoder.layer=-2", "--vision-tokenizer", "mlp"]
    encoder = ["--family", "llava", "--vision-encoder", f"hf:{tmp_path / 'encoder'}"]
    assert run("build", tmp_path / "model", *encoder, *parts, *settings).exit_code == 0
    result = run("export", tmp_path / "model", tmp_path / "out", "--format", "hf", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["largest_pixel_levels"] > agreement.PIXEL_LEVELS
    monkeypatch.setattr(agreement, "OUTLIERS", 0)
    result = run("export", tmp_path / "model", tmp_path / "other", "--format", "hf")
    assert result.exit_code == 1 and "the two backends of the exported image processor differ" in result.stderr


@pytest.mark.matrix
@pytest.mark.parametrize("name", CASES)
def test_a_class_with_tokens_around_a_picture(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    encoder, model_type, tokens, tokenizer, mask, tiling = CASES[name]
    named = {"vision_tokenizer": tokenizer, "fusion.mask": mask, "tiling": tiling}
    settings = [word for key, x in named.items() for word in ("--set", f"{key}={json.dumps(x)}")]
    parts = [write_encoder(tmp_path / "encoder", encoder), "--language-model"]
    parts += [str(write_language_model(tmp_path / "lm", model_type, tokens)), "--dtype", "float32"]
    result = run("build", tmp_path / "model", "--family", "llava", "--vision-encoder", *parts, *settings)
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(idefics3, "find_spec", lambda name: None)
    result = run("export", tmp_path / "model", tmp_path / "out", "--format", "hf", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["class"] == f"{name.split()[0]}ForConditionalGeneration" and report["largest_difference"] <= 1e-4
    assert ["pip install num2words" in x for x in report["notes"]] == ([True] if name == "Idefics3" else [])

    def spoiled(cls: Any, *args: Any, **keywords: Any) -> Any:
        found = real(cls, *args, **keywords)
        if isinstance(found, torch.nn.Module):
            names = ("multi_modal_projector", "connector", "aligner")
            for x in next(x for x in map(dict(found.model.named_children()).get, names) if x).parameters():
                x.data.add_(1)
        return found

    real = write.load_pretrained
    monkeypatch.setattr(write, "load_pretrained", spoiled)
    result = run("export", tmp_path / "model", tmp_path / "other", "--format", "hf")
    assert result.exit_code == 1 and not (tmp_path / "other").exists()
