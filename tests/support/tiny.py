"""The smallest parts of each kind, and models and prompts made of them.

Language models have `VOCABULARY` tokens, two layers and weights large enough for every token to matter; towers read
images of 32 pixels. All of it is deterministic.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import timm.models
import torch
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support import seed_torch
from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN, Composition
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.towers import build_tower, find_tower_shape, truncate_layers
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.modeling.vlm import VLM
from vlm_cli.tiling.texts import list_texts

Module = TypeVar("Module", bound=nn.Module)

VOCABULARY = 80  # tokens
PAD = 0
STOP, IMAGE = VOCABULARY, VOCABULARY + 1  # ids of the added tokens
SIZE = 32  # pixels


def register(name: str, model: type[nn.Module], **sizes: Any) -> str:
    """Give timm, and so OpenCLIP, a small model of a family that has none."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return timm.models.build_model_with_cfg(model, name, pretrained, **sizes, **kwargs)

    entry.__name__, entry.__module__ = name, __name__
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)  # it would tell us that there are no weights
    timm.models.register_model(entry)
    return name


_EVA = register(
    "tiny_eva",
    Eva,
    img_size=SIZE,
    patch_size=16,
    embed_dim=32,
    depth=2,
    num_heads=2,
    mlp_ratio=2,
    qkv_fused=False,
    swiglu_mlp=True,
    scale_mlp=True,
    use_rot_pos_emb=True,
    ref_feat_shape=(2, 2),
)
_SWIN = register(
    "tiny_swin", SwinTransformer, img_size=SIZE, window_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 2)
)
_FASTVIT = register(
    "tiny_fastvit",
    FastVit,
    layers=(1, 1),
    embed_dims=(16, 32),
    mlp_ratios=(2, 2),
    token_mixers=("repmixer", "repmixer"),
    downsamples=(False, True),
    se_downsamples=(False, False),
    pos_embs=(None, None),
)


def _timm(name: str, pool: str, proj: str = "linear", size: int = SIZE) -> dict[str, Any]:
    return {"image_size": size, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}


_VIT = {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}

#: OpenCLIP configurations of image towers.
VISION: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 24, "vision_cfg": _VIT},
    "resnet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    },
    "siglip": {"embed_dim": 64, "vision_cfg": _timm("test_vit", "map", "none")},
    "convnext": {"embed_dim": 24, "vision_cfg": _timm("test_convnext", "avg", size=64)},
    "eva02": {"embed_dim": 24, "vision_cfg": _timm(_EVA, "token")},
    "swin": {"embed_dim": 24, "vision_cfg": _timm(_SWIN, "avg")},
    "fastvit": {"embed_dim": 24, "vision_cfg": _timm(_FASTVIT, "avg")},
    "coca": {
        "embed_dim": 24,
        "vision_cfg": _VIT | {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    },
}

TOKENIZERS: dict[str, dict[str, Any]] = {
    "perceiver": {"type": "perceiver", "depth": 2, "num_heads": 2, "head_dim": 8, "num_latents": 3, "ff_mult": 2},
    "qformer": {
        "type": "qformer",
        "num_queries": 3,
        "depth": 2,
        "dim": 16,
        "num_heads": 2,
        "dim_ff": 24,
        "dropout": 0.0,
    },
    "linear": {"type": "linear"},
    "mlp": {"type": "mlp"},
}

FUSIONS: dict[str, dict[str, Any]] = {
    "cross-attention": {"type": "cross-attention", "num_heads": 2, "head_dim": 8, "ff_mult": 2},
    "language-stream": {"type": "language-stream"},
    "llama-cross-attention": {
        "type": "llama-cross-attention",
        "num_heads": 2,
        "head_dim": 8,
        "dim_ff": 24,
        "qk_norm": True,
        "gate": "vector",
    },
}

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_NEOX = {key: x for key, x in _LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
_OPT = _NEOX | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0}
_SSM = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "expand": 2}
_GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

#: Configurations of causal language models; `model_type` is the part before a dash.
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128} | _GPT2_DROPOUT,
    "opt": _OPT,
    "opt-projected": _OPT | {"word_embed_proj_dim": 16},
    "gpt_neox": _NEOX,
    "llama": _LLAMA | {"tie_word_embeddings": False},
    "llama-tied": _LLAMA | {"tie_word_embeddings": True},
    "mistral": _LLAMA | {"sliding_window": 5},
    "qwen3": _LLAMA,
    "gemma2": _LLAMA | {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": _LLAMA | {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2},
    "mamba": _SSM,
    "mamba2": _SSM | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
    "jamba": _NEOX
    | {
        "num_key_value_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "falcon_h1": _LLAMA
    | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4},
    "zamba2": _NEOX
    | {
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "chunk_size": 4,
        "adapter_rank": 4,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"],
    },
}


def language_model_config(name: str) -> Any:
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = {"vocab_size": VOCABULARY, "initializer_range": 0.2} | LANGUAGE_MODELS[name] | special
    return AutoConfig.for_model(name.partition("-")[0], **sizes)


@cache
@torch.inference_mode(False)  # a test in inference mode may be the first to ask
def language_model(name: str) -> PreTrainedModel:
    """The bare language model, that of every VLM built here; not to be changed.

    Frozen as in most of them: whether a weight asks for gradients decides how torch multiplies, to the last bit.
    """
    seed_torch(1)
    return AutoModelForCausalLM.from_config(language_model_config(name)).eval().requires_grad_(False)


@cache
@torch.inference_mode(False)
def tower(name: str, depth: int | None = None) -> nn.Module:
    """An OpenCLIP tower, shared by all VLMs built here; not to be changed."""
    if depth is not None:
        return truncate_layers(copy.deepcopy(tower(name)), depth)
    seed_torch(2)
    visual = build_tower(VISION[name]).eval()
    stir(visual, 0.25)  # some blocks start as the identity, and images then look alike
    return visual


@torch.no_grad()
def stir(module: Module, scale: float = 0.2, *, seed: int | None = None) -> Module:
    """Add noise to each parameter, so that every token and image matters; the module comes back in eval mode."""
    if seed is not None:
        seed_torch(seed)
    for parameter in module.parameters():
        parameter += scale * torch.randn_like(parameter)
    return module.eval()


Settings = str | dict[str, Any]  # a name of `TOKENIZERS` or `FUSIONS`, or a type and settings over its own


def _settings(known: dict[str, dict[str, Any]], chosen: Settings) -> dict[str, Any]:
    return known[chosen] if isinstance(chosen, str) else known.get(chosen["type"], {}) | chosen


def config(
    vision: str = "vit",
    tokenizer: Settings = "perceiver",
    fusion: Settings = "cross-attention",
    language_model: str = "llama",
    **overrides: Any,
) -> VLMConfig:
    """The configuration of a VLM of such parts; `overrides` are other fields of the composition.

    >>> config(fusion={"type": "cross-attention", "every": 2}).composition.fusion.options.num_heads
    2
    """
    parts = Composition.compose(
        None,
        {
            "vision_encoder": vision,
            "vision_tokenizer": _settings(TOKENIZERS, tokenizer),
            "fusion": _settings(FUSIONS, fusion),
            "language_model": language_model,
            "added_tokens": [END_OF_CHUNK, MEDIA_TOKEN],
        },
        overrides,
    )
    depth = {key: x for key, x in parts.vision_encoder.openclip_settings.items() if key == "depth"}
    num_patches, dim = _tower_shape(vision, **depth, **parts.vision_encoder.feature_arguments)
    texts = list_texts(parts.tiling, (SIZE, SIZE))
    return VLMConfig(
        text_config=language_model_config(language_model),
        vision_config=VISION[vision] | depth | {"num_patches": num_patches, "dim": dim},
        composition=parts,
        added_tokens=list(parts.added_tokens),
        first_added_id=VOCABULARY,
        media_token_id=VOCABULARY + parts.added_tokens.index(MEDIA_TOKEN),
        pad_token_id=PAD,
        tiling_texts={text: spell(text) for text in texts} or None,
    )


def spell(text: str) -> list[int]:
    """The ids of a text around views, one for each character."""
    return [1 + ord(c) % (VOCABULARY - 1) for c in text]


@cache
def _tower_shape(vision: str, depth: int | None = None, **reading: Any) -> tuple[int, int]:
    return find_tower_shape(VISION[vision] | {"depth": depth}, **reading)


def build(
    vision: str = "vit",
    tokenizer: Settings = "perceiver",
    fusion: Settings = "cross-attention",
    language_model: str = "llama",
    *,
    seed: int = 0,
    **overrides: Any,
) -> VLM:
    """A VLM in float32 and eval mode; its gates are closed and its tower is shared with others."""
    lm = copy.deepcopy(globals()["language_model"](language_model))
    seed_torch(seed)
    settings = config(vision, tokenizer, fusion, language_model, **overrides)
    options = settings.composition.vision_encoder
    encoder = VisionEncoder(tower(vision, options.openclip_settings.get("depth")), **options.feature_arguments)
    return VLM(settings, vision_encoder=encoder, lang_model=lm).eval()


@torch.no_grad()
def open_gates(model: VLM, seed: int = 3) -> VLM:
    """Draw what is ours anew, large enough for media to matter, and open the gates."""
    seed_torch(seed)
    for part in (model.vision_tokenizer, model.fusion, model.added_tokens):
        stir(part, 0.2)
        for name, parameter in part.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.7)
    return model


@dataclass
class Row:
    """One prompt: float[1, T_img, F, C, H, W] or None, and int[1, T_txt]."""

    vision_x: Tensor | None
    lang_x: Tensor

    def inputs(self) -> dict[str, Tensor | None]:
        return {"vision_x": self.vision_x, "lang_x": self.lang_x}


def row(model: VLM, num_media: int, length: int = 7, *, frames: int = 1, seed: int = 0) -> Row:
    """A random prompt of `length` tokens, `num_media` of them `<image>`, never two on end, one `<|endofchunk|>`."""
    seed_torch(100 * seed + num_media)
    lang_x = torch.randint(1, VOCABULARY, (1, length))
    lang_x[0, -2] = STOP
    lang_x[0, 1 : 2 * num_media : 2] = IMAGE
    size = model.config.vision_config["vision_cfg"]["image_size"]
    return Row(torch.randn(1, num_media, frames, 3, size, size) if num_media else None, lang_x)


def rows(model: VLM, counts: Sequence[int] = (1, 0, 3), *, frames: int = 1) -> list[Row]:
    """Prompts of different lengths with so many media."""
    return [row(model, n, 8 + i % 3, frames=frames, seed=i) for i, n in enumerate(counts)]


def collate(rows: Sequence[Row], side: str = "left", garbage: float = 0.0) -> dict[str, Tensor | None]:
    """Pad prompts to one batch; what stands in the padding of media is `garbage` times noise."""
    length = max(r.lang_x.shape[1] for r in rows)
    lang_x = torch.full((len(rows), length), PAD)
    attention_mask = torch.zeros_like(lang_x)
    shapes = [r.vision_x.shape[1:] for r in rows if r.vision_x is not None]
    most = [max(sizes) for sizes in zip(*shapes, strict=True)]
    vision_x = garbage * torch.randn(len(rows), *most) if shapes else None
    vision_mask = torch.zeros(len(rows), *most[:2], dtype=torch.bool) if shapes else None
    for i, r in enumerate(rows):
        at = slice(length - r.lang_x.shape[1], None) if side == "left" else slice(r.lang_x.shape[1])
        lang_x[i, at], attention_mask[i, at] = r.lang_x[0], 1
        if r.vision_x is not None:
            media, frames = r.vision_x.shape[1:3]
            vision_x[i, :media, :frames], vision_mask[i, :media, :frames] = r.vision_x[0], True
    return {"vision_x": vision_x, "lang_x": lang_x, "attention_mask": attention_mask, "vision_mask": vision_mask}


def batch(model: VLM, counts: Sequence[int] = (1, 0, 3), *, side: str = "left", frames: int = 1) -> dict[str, Any]:
    return collate(rows(model, counts, frames=frames), side)


@contextmanager
def nudged(parameter: nn.Parameter | Tensor, by: float = 0.5, at: int = 0) -> Iterator[None]:
    """A parameter with one weight changed, the `at`-th of all, for as long as the block runs."""
    flat = parameter.detach().view(-1)
    before = flat[at].clone()
    flat[at] += by
    try:
        yield
    finally:
        flat[at] = before


def covering(fusions_each: int = 2) -> list[tuple[str, str, str, str]]:
    """Compositions that cover all parts: (vision, tokenizer, fusion, language model).

    The first of them have each language model once, each tokenizer with every fusion, and each encoder with several.
    With two fusions for each language model, each encoder has every fusion.
    """
    fusions = list(FUSIONS)
    parts = list(zip(itertools.cycle(VISION), itertools.cycle(TOKENIZERS), LANGUAGE_MODELS, strict=False))
    return [
        (vision, tokenizer, fusions[(turn - i) % len(fusions)], language_model)
        for turn in range(fusions_each)
        for i, (vision, tokenizer, language_model) in enumerate(parts)
    ]
