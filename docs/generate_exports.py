"""Write the table of docs/deployment.md: which format holds which composition, or what stands in the way.

Each row is a composition of small parts, judged as `vlm export` judges a model before it reads weights.

Example: python docs/generate_exports.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vlm_cli.checkpoint.export.formats import FORMATS
from vlm_cli.checkpoint.export.hf.classes import CLASSES
from vlm_cli.checkpoint.export.hf.write import judge_classes
from vlm_cli.composition import MEDIA_TOKEN, Composition
from vlm_cli.errors import UsageError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.towers import find_tower_shape
from vlm_cli.tiling.texts import list_texts

PAGE = Path(__file__).with_name("deployment.md")
BEGIN, END = "<!-- begin of the table of docs/generate_exports.py -->", "<!-- end of the table -->"

SIDE = 32  # pixels
VOCABULARY = 64  # tokens
_TOKEN = re.compile(r"<[^>]*>|\n+")  # of the texts around views
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
_PIXELS = {"size": SIDE, "resize_mode": "squash"}
TOWERS: dict[str, dict[str, Any]] = {
    "CLIP": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "preprocess": {"size": SIDE},
    },
    "CLIP by squash": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "preprocess": _PIXELS,
    },
    "SigLIP": {"type": "hf", "config": {"model_type": "siglip_vision_model", **_SIZES, "vision_use_head": False}},
    "SigLIP by Lanczos": {
        "type": "hf",
        "config": {"model_type": "siglip_vision_model", **_SIZES, "vision_use_head": False},
        "preprocess": {**_PIXELS, "interpolation": "lanczos"},
    },
    "SigLIP of 16x16 patches": {
        "type": "hf",
        "config": {"model_type": "siglip_vision_model", **_SIZES, "vision_use_head": False, "patch_size": 2},
    },
    "InternViT": {"type": "hf", "config": {"model_type": "internvl_vision", **_SIZES}},
    "AIMv2": {"type": "hf", "config": {"model_type": "aimv2_vision_model", **_SIZES, "use_head": False}},
    "FastViT": {"type": "timm", "name": "fastvit_t8", "vision_cfg": {"image_size": 256}, "preprocess": {"size": 256}},
    "PE": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 384, "timm_model_name": "vit_pe_core_small_patch16_384", "timm_pool": "map"},
        "preprocess": {"size": 384, "resize_mode": "squash"},
    },
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"model_type": "llama"},
    "Phi": {"model_type": "phi"},
    "GPT-2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
    "Gemma": {"model_type": "gemma", "head_dim": 16},
    "Gemma 3": {"model_type": "gemma3_text", "head_dim": 16},
}
_FENCE = "<fake_token_around_image>"
_WHOLE = f"{_FENCE}<global-img>{{image}}{_FENCE}"
_SPLIT = {
    "type": "split",
    "tile_text": f"{_FENCE}<row_{{row}}_col_{{column}}>{{image}}",
    "row_end_text": "\n",
    "thumbnail_text": f"\n{_WHOLE}",
    "whole_text": _WHOLE,
}
_OVIS2 = {
    **{"type": "grid", "choose": "cover", "max_tiles": 12, "thumbnail": "first", "thumbnail_text": "{image}<IMG_GRID>"},
    **{"picture_text": "<IMG_START>{views}<IMG_END>", "between_tiles_text": "<IMG_COL>"},
    "between_rows_text": "<IMG_ROW>",
}
_WORDS = {"bias": False, "hidden_norm": "layer", "activation": "softmax", "dim_hidden": 48}
_HEADS = {"num_heads": 2, "head_dim": 16, "dim_ff": 64, "norm_eps": 1e-6}
_ANYRES = {"type": "anyres", "pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]}
_LAYER = {"layer": -2}
_GEMMA_3 = {"type": "linear", "bias": False, "pool": 2, "norm": "gemma", "norm_eps": 1e-6}

#: A composition in words -> vision encoder, language model, and settings over those of the family llava.
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "CLIP, layer -2; `mlp`": ("CLIP", "Llama", {"vision_encoder": _LAYER, "vision_tokenizer": "mlp"}),
    "CLIP, layer -1 with its norm; `mlp`": ("CLIP", "Llama", {"vision_tokenizer": "mlp"}),
    "SigLIP, layer -1 without its norm; `mlp`": (
        "SigLIP",
        "Llama",
        {"vision_encoder": {"norm": False}, "vision_tokenizer": "mlp"},
    ),
    "SigLIP, layer -1 with its norm; `mlp`": ("SigLIP", "Llama", {"vision_tokenizer": "mlp"}),
    "SigLIP, layer -2; `linear`": ("SigLIP", "Llama", {"vision_encoder": _LAYER, "vision_tokenizer": "linear"}),
    "SigLIP, layer -2; `mlp` with `pixel_shuffle`": (
        "SigLIP",
        "Llama",
        {"vision_encoder": _LAYER, "vision_tokenizer": {"type": "mlp", "pixel_shuffle": 2}},
    ),
    "PE; `mlp`": ("PE", "Llama", {"vision_tokenizer": "mlp"}),
    "PE, layer -2; `mlp`": ("PE", "Llama", {"vision_encoder": _LAYER, "vision_tokenizer": "mlp"}),
    "FastViT of timm; `mlp`": ("FastViT", "Llama", {"vision_tokenizer": "mlp"}),
    "CLIP, layer -2; `mlp`; GPT-2": ("CLIP", "GPT-2", {"vision_encoder": _LAYER, "vision_tokenizer": "mlp"}),
    "CLIP, layer -2; `mlp`; Phi": ("CLIP", "Phi", {"vision_encoder": _LAYER, "vision_tokenizer": "mlp"}),
    "InternViT; `mlp` with `pixel_shuffle` and norm": (
        "InternViT",
        "Llama",
        {
            "vision_tokenizer": {"type": "mlp", "pixel_shuffle": 2, "norm": "layer"},
            "tiling": {"type": "none", "picture_text": "<img>{views}</img>"},
        },
    ),
    "CLIP, layer -2; `mlp`; `anyres`": (
        "CLIP",
        "Llama",
        {"vision_encoder": _LAYER, "vision_tokenizer": "mlp", "tiling": _ANYRES},
    ),
    "SigLIP, layer -1 without its norm; `mlp`; `anyres` that shrinks": (
        "SigLIP",
        "Llama",
        {"vision_encoder": {"norm": False}, "vision_tokenizer": "mlp", "tiling": {**_ANYRES, "shrink_beyond": 9}},
    ),
    "InternViT; `mlp` with `pixel_shuffle` and norm; `grid`": (
        "InternViT",
        "Llama",
        {
            "vision_tokenizer": {"type": "mlp", "pixel_shuffle": 2, "norm": "layer"},
            "tiling": {"type": "grid", "picture_text": "<img>{views}</img>"},
        },
    ),
    "SigLIP, 16x16 patches; `mlp` with `pixel_shuffle`; LFM2-VL's `picture_text`": (
        "SigLIP of 16x16 patches",
        "Llama",
        {
            "vision_tokenizer": {"type": "mlp", "pixel_shuffle": 2},
            "tiling": {"type": "none", "picture_text": "<|image_start|>{views}<|image_end|>"},
        },
    ),
    "SigLIP; `linear` with `pixel_shuffle`; `split` with SmolVLM's texts": (
        "SigLIP by Lanczos",
        "Llama",
        {"vision_tokenizer": {"type": "linear", "bias": False, "pixel_shuffle": 2}, "tiling": _SPLIT},
    ),
    "SigLIP; `linear`; mask `prefix`; Gemma": (
        "SigLIP",
        "Gemma",
        {
            "vision_tokenizer": "linear",
            "fusion": {"type": "language-stream", "mask": "prefix"},
            "tiling": {"type": "none", "picture_text": "{views}<bos>"},
        },
    ),
    "SigLIP; `linear` with `pool` and norm; mask `image`; Gemma 3": (
        "SigLIP",
        "Gemma 3",
        {
            "vision_tokenizer": _GEMMA_3,
            "fusion": {"type": "language-stream", "mask": "image"},
            "tiling": {"type": "none", "picture_text": "\n\n<start_of_image>{views}<end_of_image>\n\n"},
        },
    ),
    "AIMv2; `mlp` with `pixel_shuffle`, `hidden_norm` and `softmax`; `grid` with Ovis2's texts": (
        "AIMv2",
        "Llama",
        {"vision_tokenizer": {"type": "mlp", "pixel_shuffle": 2, **_WORDS}, "tiling": _OVIS2},
    ),
    "CLIP, layer -1 without its norm; `perceiver` with `relu`; `llama-cross-attention`; IDEFICS's tokens": (
        "CLIP by squash",
        "Llama",
        {
            "vision_encoder": {"class_token": True, "norm": False},
            "vision_tokenizer": {"type": "perceiver", "activation": "relu", "max_num_media": None},
            "fusion": {"type": "llama-cross-attention", "first": 0, "every": 1, **_HEADS},
            "added_tokens": ["<fake_token_around_image>", MEDIA_TOKEN],
        },
    ),
    "CLIP; `qformer` (BLIP-2)": ("CLIP", "Llama", {"vision_tokenizer": "qformer"}),
    "CLIP; `perceiver`; `cross-attention` (Flamingo)": (
        "CLIP",
        "Llama",
        {"vision_tokenizer": "perceiver", "fusion": "cross-attention"},
    ),
}


def make_config(tower: str, language_model: str, settings: dict[str, Any]) -> VLMConfig:
    """Make the configuration of a composition of small parts."""
    named = {"vision_encoder": {"name": tower}, "language_model": {"name": language_model}}
    parts = Composition.compose(None, {"family": "llava", **named}, settings)
    vision = {"vision_cfg": {"image_size": SIDE}, "preprocess": _PIXELS, **TOWERS[tower]}
    given = dict(LANGUAGE_MODELS[language_model])
    sizes = {key: x for key, x in _SIZES.items() if key not in ("image_size", "patch_size")}
    kind = given.pop("model_type")
    text = AutoConfig.for_model(kind, **({} if kind == "gpt2" else sizes), vocab_size=VOCABULARY, **_NO_TOKENS, **given)
    num_patches, dim = find_tower_shape(vision, **parts.vision_encoder.feature_arguments)
    return VLMConfig(
        text_config=text,
        vision_config={**vision, "num_patches": num_patches, "dim": dim},
        composition=parts,
        added_tokens=list(parts.added_tokens),
        first_added_id=VOCABULARY,
        media_token_id=VOCABULARY + parts.added_tokens.index(MEDIA_TOKEN),
        pad_token_id=0,
        tiling_texts={x: [0] * len(_TOKEN.findall(x)) for x in list_texts(parts.tiling, (SIDE, SIDE))} or None,
    )


def judge_hf(config: VLMConfig) -> str:
    """Name the class of Transformers that holds a composition, or the nearest one and what stands in the way."""
    word, fit = judge_classes(config)[0]
    name = CLASSES[word].model.removesuffix("ForConditionalGeneration").removesuffix("ForVisionText2Text")
    return f"**{name}**" if not fit.problems else f"{name}: {' '.join(fit.problems)}"


def judge(name: str, config: VLMConfig) -> str:
    """Say whether a format holds a composition, or what stands in the way."""
    try:
        FORMATS[name].check(config)
    except UsageError as error:
        lines = str(error).splitlines()
        return " ".join(x.removeprefix("  - ") for x in lines if x.startswith("  - ")) or lines[0]
    return "**yes**"


def escape(text: str) -> str:
    """Make a text one cell of a table."""
    return text.replace("\n", "\\n").replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def generate() -> str:
    """The table."""
    rows = ["| composition | `hf` | `gguf` | `torch-export`, `vision-onnx` |", "|---|---|---|---|"]
    for words, parts in ROWS.items():
        config = make_config(*parts)
        cells = judge_hf(config), judge("gguf", config), judge("torch-export", config)
        rows.append(f"| {words} | {' | '.join(escape(x) for x in cells)} |")
    return "\n".join(rows)


def insert(page: str, table: str) -> str:
    """Put the table into the page, between its two marks."""
    before, rest = page.split(f"{BEGIN}\n")
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), generate()), encoding="utf-8")
    print(f"Wrote {PAGE}.")
