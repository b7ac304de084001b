"""Vision transformers as llama.cpp holds them: OpenCLIP's own, timm's, and CLIP and SigLIP of Transformers.

Every tower is read under the names of Transformers' CLIP, which gguf turns into llama.cpp's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from torch import Tensor, nn

from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.meta import meta_device
from vlm_cli.modeling.towers import build_tower

__all__ = ["Tower", "build_empty_tower", "find_tower_problems", "read_tower"]

_PREFIX = "vision_tower.vision_model."
_HF_TYPES = ("clip_vision_model", "siglip_vision_model")

#: Rules for the names of a state dict: a pattern, and the name in Transformers' CLIP.
_OPENCLIP = (
    (r"conv1\.(\w+)", r"embeddings.patch_embedding.\1"),
    (r"class_embedding", "embeddings.class_embedding"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"ln_pre\.(\w+)", r"pre_layrnorm.\1"),
    (r"ln_post\.(\w+)", r"post_layernorm.\1"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", r"encoder.layers.\1.qkv.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"encoder.layers.\1.mlp.fc2.\2"),
    (r"transformer\.resblocks\.(\d+)\.ls_([12])\.gamma", r"encoder.layers.\1.ls\2.weight"),
)
_TIMM = (
    (r"(?:trunk\.)?patch_embed\.proj\.(\w+)", r"embeddings.patch_embedding.\1"),
    (r"(?:trunk\.)?cls_token", "embeddings.class_embedding"),
    (r"(?:trunk\.)?pos_embed", "embeddings.position_embedding.weight"),
    (r"(?:trunk\.)?norm_pre\.(\w+)", r"pre_layrnorm.\1"),
    (r"(?:trunk\.)?norm\.(\w+)", r"post_layernorm.\1"),
    (r"(?:trunk\.)?blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layers.\1.qkv.\2"),
    (r"(?:trunk\.)?blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"(?:trunk\.)?blocks\.(\d+)\.norm([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"(?:trunk\.)?blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"encoder.layers.\1.mlp.\2.\3"),
    (r"(?:trunk\.)?blocks\.(\d+)\.ls([12])\.gamma", r"encoder.layers.\1.ls\2.weight"),
)
_TRANSFORMERS = ((r"(?:vision_model\.)?((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..*)", r"\1"),)
#: What follows the patches' last norm, and numbers that are no weights.
_UNUSED = re.compile(
    r"proj|(?:trunk\.)?(?:attn_pool|fc_norm|head)\..*|head\..*|(?:vision_model\.)?head\..*|.*position_ids"
)
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Tower:
    """A vision transformer.

    Attributes:
        width: channels.
        hidden: channels inside the feed-forward.
        heads: of the attention.
        depth: layers that are read.
        image_size: pixels of a side.
        patch_size: pixels of a patch's side.
        eps: of the norms.
        activation: `gelu`, `gelu_tanh` or `quick_gelu`.
        layers: numbers of the layers whose features are read, from 1 on.
        is_normed: whether the last of them passes through the last norm.
        has_class: whether there is a class token.
        state: tensors under the names of Transformers' CLIP.
    """

    width: int
    hidden: int
    heads: int
    depth: int
    image_size: int
    patch_size: int
    eps: float
    activation: str
    layers: tuple[int, ...]
    is_normed: bool
    has_class: bool
    state: Mapping[str, Tensor]

    def weights(self, *, class_token_last: bool = False) -> dict[str, Tensor]:
        """Return the tensors under llama.cpp's names, without layers and norms that nothing reads.

        Args:
            class_token_last: whether the class token, and so its position, comes behind the patches.
        """
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, self.depth)
        weights: dict[str, Tensor] = {}
        for name, x in self.state.items():
            layer = _LAYER.fullmatch(name)
            if (layer and int(layer[1]) >= self.depth) or (name.startswith("post_layernorm") and not self.is_normed):
                continue
            target = names.get_name(_PREFIX + name, try_suffixes=(".weight", ".bias"))
            assert target is not None, name  # the names are those of the tables above
            if target == "v.position_embd.weight" and class_token_last:
                x = x.roll(-1, dims=0)
            weights[target] = x.flatten() if target == "v.class_embd" else x
        return weights


def build_empty_tower(config: VLMConfig) -> nn.Module:
    """Build the vision encoder of a model without its weights."""
    with meta_device():
        return build_tower(config.vision_config)


def find_tower_problems(visual: Any, config: VLMConfig) -> list[str]:
    """Say why llama.cpp cannot hold a vision encoder; an empty list if it can."""
    options, kind = config.composition.vision_encoder, _kind_of(visual)
    if kind is None:
        name = getattr(getattr(visual, "config", None), "model_type", type(getattr(visual, "trunk", visual)).__name__)
        return [
            f"the vision encoder is {name}; it would have to be a plain vision transformer of OpenCLIP or timm, or "
            f"{' or '.join(_HF_TYPES)} of Transformers."
        ]
    problems = _find_foreign(visual, kind)
    size = _sizes_of(visual)
    if size[0] != size[1]:
        problems.append(f"the vision encoder reads {size[1]}x{size[0]} pixels; it would have to be a square.")
    norm = options.feature_arguments["norm"]
    if options.feature_arguments["class_token"]:
        problems.append("vision_encoder.class_token is set; the features would have to be those of patches alone.")
    if list(options.layers) != sorted(set(options.layers)):
        problems.append(f"vision_encoder.layer is {list(options.layers)}; the layers would have to ascend.")
    if norm and len(options.layers) > 1:
        problems.append("vision_encoder.norm applies the last norm to several layers; it would have to be one layer.")
    return problems


def _kind_of(visual: Any) -> str | None:
    """Recognise a vision transformer: `openclip`, `timm` or `hf`; None for others."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
    from timm.models.vision_transformer import Block
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    if getattr(getattr(visual, "config", None), "model_type", None) in _HF_TYPES:
        return "hf"
    if isinstance(visual, VisionTransformer):
        return "openclip" if type(visual.transformer.resblocks[0]) is ResidualAttentionBlock else None
    trunk = getattr(visual, "trunk", visual)
    if isinstance(trunk, TimmTransformer) and all(type(block) is Block for block in trunk.blocks):
        return "timm"
    return None


def _find_foreign(visual: Any, kind: str) -> list[str]:
    """Say which tensors and settings of a vision transformer llama.cpp's graph does not have."""
    problems = []
    if unknown := [name for name in visual.state_dict() if _rename(name, kind) is None and not _UNUSED.fullmatch(name)]:
        problems.append(f"the vision encoder has tensors that llama.cpp does not read: {', '.join(unknown[:3])}.")
    epsilons = {m.eps for m in visual.modules() if isinstance(m, nn.LayerNorm)}
    if len(epsilons) > 1:
        problems.append(f"the norms of the vision encoder have eps {sorted(epsilons)}; it would have to be one.")
    if _activation_of(visual, kind) is None:
        problems.append("the vision encoder's activation would have to be GELU or QuickGELU.")
    patch = next(m for m in visual.modules() if isinstance(m, nn.Conv2d))
    if patch.in_channels != 3 or patch.kernel_size != patch.stride or patch.kernel_size[0] != patch.kernel_size[1]:
        problems.append("the patches of the vision encoder would have to be squares of three colours, side by side.")
    trunk = getattr(visual, "trunk", visual)
    if kind == "timm" and trunk.cls_token is not None and getattr(trunk, "no_embed_class", False):
        problems.append("the class token of the vision encoder has no position; it would have to have one.")
    return problems


def _activation_of(visual: Any, kind: str) -> str | None:
    from open_clip.transformer import QuickGELU

    if kind == "hf":
        names = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
        return names.get(visual.config.hidden_act)
    trunk = getattr(visual, "trunk", visual)
    block = visual.transformer.resblocks[0] if kind == "openclip" else trunk.blocks[0]
    found = block.mlp.gelu if kind == "openclip" else block.mlp.act
    if isinstance(found, QuickGELU):
        return "quick_gelu"
    if isinstance(found, nn.GELU):
        return "gelu_tanh" if found.approximate == "tanh" else "gelu"
    return None


def _sizes_of(visual: Any) -> tuple[int, int]:
    size = visual.config.image_size if hasattr(visual, "config") else visual.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _rename(name: str, kind: str) -> str | None:
    for pattern, replacement in {"openclip": _OPENCLIP, "timm": _TIMM, "hf": _TRANSFORMERS}[kind]:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def read_tower(visual: Any, config: VLMConfig) -> Tower:
    """Read a vision encoder in which `find_tower_problems` finds nothing."""
    kind, options = _kind_of(visual), config.composition.vision_encoder
    assert kind is not None
    state = dict(_read_state(visual, kind))
    blocks = max(int(match[1]) for name in state if (match := _LAYER.fullmatch(name))) + 1
    layers = tuple(blocks + 1 + layer for layer in options.layers)
    patch = state["embeddings.patch_embedding.weight"]
    norm = options.feature_arguments["norm"]
    norms = next(m for m in visual.modules() if isinstance(m, nn.LayerNorm))
    return Tower(
        width=patch.shape[0],
        hidden=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        heads=_heads_of(visual, kind),
        depth=layers[-1],
        image_size=_sizes_of(visual)[0],
        patch_size=patch.shape[-1],
        eps=norms.eps,
        activation=str(_activation_of(visual, kind)),
        layers=layers,
        is_normed=(options.layers[-1] == -1 if norm is None else norm) and "post_layernorm.weight" in state,
        has_class="embeddings.class_embedding" in state,
        state=state,
    )


def _heads_of(visual: Any, kind: str) -> int:
    if kind == "hf":
        return int(visual.config.num_attention_heads)
    if kind == "openclip":
        return int(visual.transformer.resblocks[0].attn.num_heads)
    return int(getattr(visual, "trunk", visual).blocks[0].attn.num_heads)


def _read_state(visual: nn.Module, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a tower under the names of Transformers' CLIP."""
    for name, x in visual.state_dict().items():
        renamed = _rename(name, kind)
        if renamed is None:
            continue
        if match := re.fullmatch(r"(encoder\.layers\.\d+)\.qkv\.(\w+)", renamed):
            for letter, part in zip("qkv", x.chunk(3), strict=True):
                yield f"{match[1]}.self_attn.{letter}_proj.{match[2]}", part
        else:
            yield renamed, x.squeeze(0) if renamed.endswith("position_embedding.weight") and x.ndim == 3 else x
