"""The projector types of llama.cpp that hold a vision tokenizer of vlm, and how their tensors are written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from vlm_cli.checkpoint.export.gguf.projector import Projector, Settings
from vlm_cli.checkpoint.export.gguf.towers import Tower
from vlm_cli.composition import Composition
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.tiling.split import longest_edge

__all__ = ["PROJECTORS", "find_projector"]

_GELU = ("gelu", "gelu_tanh")

# -- what projectors share ---------------------------------------------------------------------------------------------

_CLASS_TOKEN = (
    "the vision encoder has a class token, which llama.cpp puts behind the patches and then takes for one of them, in "
    "place of the first patch (all versions from May 2025 to October 2026 do). It would have to be a tower without "
    "one, as SigLIP's."
)


def _no_class_token(config: VLMConfig, tower: Tower) -> str | None:
    return _CLASS_TOKEN if tower.has_class else None


def _one_layer_without_class(config: VLMConfig, tower: Tower) -> str | None:
    return _no_class_token(config, tower) or _one_layer(tower)


def _one_layer(tower: Tower) -> str | None:
    return "vision_encoder.layer names several layers; it would have to be one." if len(tower.layers) > 1 else None


def _class_token(config: VLMConfig, tower: Tower) -> str | None:
    if not tower.has_class:
        return "the vision encoder has no class token; it would have to be a tower with one, as CLIP's."
    return _one_layer(tower)


def _around(picture_text: str = "{views}") -> tuple[str, Settings]:
    """Return the tiling `none` with a text around a picture, which llama.cpp writes by itself."""
    return "none", {"picture_text": (picture_text,)}


def _options(parts: Composition) -> Any:
    return parts.vision_tokenizer.options


def _maps(tokenizer: Any, factor: float) -> list[tuple[Tensor, Tensor]]:
    """Return the weights and biases of the linear maps, the last of them times the tokenizer's scale and a factor."""
    found = []
    for linear in (m for m in tokenizer.proj.modules() if isinstance(m, nn.Linear)):
        weight = linear.weight.detach()
        found.append((weight, weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()))
    scale = factor * float(tokenizer.options.scale)
    return [*found[:-1], (found[-1][0] * scale, found[-1][1] * scale)]


def _two_maps(tokenizer: Any, factor: float) -> list[tuple[Tensor, Tensor]]:
    maps = _maps(tokenizer, factor)
    return maps if len(maps) == 2 else _split_identity(*maps[0])


def _split_identity(weight: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Write a linear map as two with a GELU between, for which llama.cpp has a graph: GELU(x) - GELU(-x) is x."""
    one = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return [
        (torch.cat([weight, -weight]), torch.cat([bias, -bias])),
        (torch.cat([one, -one], dim=1), torch.zeros_like(bias)),
    ]


# -- mlp ---------------------------------------------------------------------------------------------------------------


def _mlp_weights(tokenizer: Any, factor: float) -> dict[str, Tensor]:
    (first, first_bias), (last, last_bias) = _two_maps(tokenizer, factor)
    return {"mm.0.weight": first, "mm.0.bias": first_bias, "mm.2.weight": last, "mm.2.bias": last_bias}


def _describe_mlp(writer: gguf.GGUFWriter, parts: Composition, tower: Tower) -> None:
    writer.add_array("clip.vision.feature_layer", list(tower.layers))


# -- internvl ----------------------------------------------------------------------------------------------------------


def _internvl_weights(tokenizer: Any, factor: float) -> dict[str, Tensor]:
    (first, first_bias), (last, last_bias) = _maps(tokenizer, factor)
    return {
        "mm.model.mlp.0.weight": tokenizer.norm.weight.detach(),
        "mm.model.mlp.0.bias": tokenizer.norm.bias.detach(),
        "mm.model.mlp.1.weight": first,
        "mm.model.mlp.1.bias": first_bias,
        "mm.model.mlp.3.weight": last,
        "mm.model.mlp.3.bias": last_bias,
    }


def _describe_internvl(writer: gguf.GGUFWriter, parts: Composition, tower: Tower) -> None:
    writer.add_vision_projector_scale_factor(_options(parts).pixel_shuffle)
    writer.add_vision_preproc_min_tiles(1)
    writer.add_vision_preproc_max_tiles(1)


# -- gemma3 ------------------------------------------------------------------------------------------------------------


def _gemma3_weights(tokenizer: Any, factor: float) -> dict[str, Tensor]:
    ((weight, _),) = _maps(tokenizer, factor)
    shift = 1 if tokenizer.options.norm == "gemma" else 0
    return {
        "mm.input_projection.weight": weight.T.contiguous(),
        "mm.soft_emb_norm.weight": tokenizer.norm.weight.detach() + shift,
    }


def _describe_gemma3(writer: gguf.GGUFWriter, parts: Composition, tower: Tower) -> None:
    writer.add_vision_projector_scale_factor(_options(parts).pool)


# -- idefics3 ----------------------------------------------------------------------------------------------------------

_FENCE = "<fake_token_around_image>"
_MOST_PIXELS = 4096  # of the longer side, beyond which Idefics3 makes a picture smaller before it is cut
_IDEFICS3_TILING: Settings = {
    "tile_text": (f"{_FENCE}<row_{{row}}_col_{{column}}>{{image}}",),
    "row_end_text": ("\n",),
    "thumbnail_text": (f"\n{_FENCE}<global-img>{{image}}{_FENCE}",),
    "whole_text": None,  # no picture is one view
    "longest_edge": None,
}


def _idefics3_problem(config: VLMConfig, tower: Tower) -> str | None:
    if config.composition.tiling.type == "split":
        edge, side = _idefics3_size(config, tower.image_size)[0], tower.image_size
        if edge % side or not 2 * side <= edge <= _MOST_PIXELS:
            return (
                f"tiling.longest_edge is {edge}; it would have to be a multiple of the {side} pixels of a tile, from "
                f"{2 * side} to {_MOST_PIXELS}."
            )
        if (by := config.vision_config["preprocess"].get("interpolation", "bicubic")) != "lanczos":
            return f"the vision encoder's pictures are resized by {by}; it would have to be lanczos."
        texts = config.tiling_texts or {}
        if (len(texts.get(_FENCE, ())), len(texts.get(f"\n\n{_FENCE}<global-img>", ()))) != (1, 3):
            return (
                f"the tokenizer takes {_FENCE}, <global-img> or two newlines for several tokens each; it would have to "
                "be one. Name them in added_tokens."
            )
    return _one_layer_without_class(config, tower)


def _idefics3_size(config: VLMConfig, side: int) -> tuple[int, int]:
    return longest_edge(config.composition.tiling.options, (side, side)), 2 * side


def _idefics3_weights(tokenizer: Any, factor: float) -> dict[str, Tensor]:
    ((weight, _),) = _maps(tokenizer, factor)
    return {"mm.model.fc.weight": weight}


def _describe_idefics3(writer: gguf.GGUFWriter, parts: Composition, tower: Tower) -> None:
    writer.add_vision_projector_scale_factor(_options(parts).pixel_shuffle)
    writer.add_vision_preproc_image_size(longest_edge(parts.tiling.options, (tower.image_size, tower.image_size)))


# -- lfm2 --------------------------------------------------------------------------------------------------------------

_FEWEST_ROWS, _MOST_ROWS = 8, 16  # of vision tokens: llama.cpp gives a picture 64 to 256 of them


def _lfm2_problem(config: VLMConfig, tower: Tower) -> str | None:
    factor = getattr(config.composition.vision_tokenizer.options, "pixel_shuffle", 1)
    rows = tower.image_size // tower.patch_size // factor
    if not _FEWEST_ROWS <= rows <= _MOST_ROWS:
        return (
            f"the vision tokens of a picture have {rows} rows; it would have to be {_FEWEST_ROWS} to {_MOST_ROWS}, or "
            "llama.cpp resizes it."
        )
    return _one_layer_without_class(config, tower)


def _lfm2_weights(tokenizer: Any, factor: float) -> dict[str, Tensor]:
    (first, first_bias), (last, last_bias) = _two_maps(tokenizer, factor)
    weights = {"mm.1.weight": first, "mm.1.bias": first_bias, "mm.2.weight": last, "mm.2.bias": last_bias}
    if tokenizer.options.norm is not None:
        weights |= {f"mm.input_norm.{name}": x.detach() for name, x in tokenizer.norm.named_parameters()}
    return weights


def _describe_lfm2(writer: gguf.GGUFWriter, parts: Composition, tower: Tower) -> None:
    writer.add_vision_projector_scale_factor(_options(parts).pixel_shuffle)


_ANY = None
_TWO_MAPS: Mapping[str, Collection[Any] | None] = {"bias": (True, False), "activation": _GELU, "dim_hidden": _ANY}

_SHUFFLES = range(2, 65)

#: Name in llama.cpp -> what it holds.
PROJECTORS: dict[str, Projector] = {
    "mlp": Projector(
        summary="linear or mlp of each patch, of towers without a class token (LLaVA with SigLIP)",
        tiling=_around(),
        tokenizers={"linear": {"bias": (True, False)}, "mlp": _TWO_MAPS},
        problem=_no_class_token,
        weights=_mlp_weights,
        describe=_describe_mlp,
        bars=(122, 116, 104),
        splits_linear=True,
    ),
    "internvl": Projector(
        summary="a norm and mlp of pixel-shuffled patches, of towers with a class token (InternVL, one tile)",
        tiling=_around("<img>{views}</img>"),
        tokenizers={"mlp": {**_TWO_MAPS, "norm": ("layer",), "pixel_shuffle": range(1, 65)}},
        problem=_class_token,
        weights=_internvl_weights,
        describe=_describe_internvl,
        class_token_last=True,
        pictures="shows a picture twice if it is wider or higher than {side} pixels, and the model was made for one "
        "view. Make pictures {side}x{side} before you send them.",
    ),
    "gemma3": Projector(
        summary="a norm and linear of pooled patches that see each other, of towers without a class token (Gemma 3)",
        tiling=_around("<start_of_image>{views}<end_of_image>"),
        tokenizers={
            "linear": {"bias": (False,), "pool": range(1, 1025), "norm": ("gemma", "rms"), "norm_eps": _ANY},
        },
        mask="image",
        problem=_one_layer_without_class,
        norm_eps_of_tower=True,
        weights=_gemma3_weights,
        describe=_describe_gemma3,
        filter="bilinear",
    ),
    "idefics3": Projector(
        summary="linear of pixel-shuffled patches, of towers without a class token, with tiles (Idefics3, SmolVLM)",
        tiling=("split", _IDEFICS3_TILING),
        tokenizers={"linear": {"bias": (False,), "pixel_shuffle": _SHUFFLES}},
        problem=_idefics3_problem,
        weights=_idefics3_weights,
        describe=_describe_idefics3,
        pictures="resizes a picture once, where the model was made for two steps, so that pixels differ a little. For "
        "equal answers, send pictures whose longer side has {width} pixels, and whose shorter side has a multiple of "
        "{side}.",
        same_size=_idefics3_size,
    ),
    "lfm2": Projector(
        summary="linear or mlp of pixel-shuffled patches, of towers without a class token (LFM2-VL, one tile)",
        tiling=_around("<|image_start|>{views}<|image_end|>"),
        tokenizers={
            "linear": {"bias": (True, False), "pixel_shuffle": _SHUFFLES, "norm": (None, "layer")},
            "mlp": {**_TWO_MAPS, "pixel_shuffle": _SHUFFLES, "norm": (None, "layer")},
        },
        problem=_lfm2_problem,
        weights=_lfm2_weights,
        describe=_describe_lfm2,
        pictures="keeps the shape of a picture that is not square, so that its patches lie elsewhere, and cuts one of "
        "more than 1024 pixels into tiles. Make pictures {side}x{side} before you send them.",
        splits_linear=True,
    ),
}


def find_projector(config: VLMConfig, tower: Tower) -> tuple[str, list[str]]:
    """Return the projector type that holds a model, or the nearest one, and what stands in its way."""
    found = {name: projector.problems(config, tower) for name, projector in PROJECTORS.items()}
    cut = config.composition.tiling.type
    name = min(found, key=lambda kind: (len(found[kind]), PROJECTORS[kind].tiling[0] != cut))
    return name, found[name]
