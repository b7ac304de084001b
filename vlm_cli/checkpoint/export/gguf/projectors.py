"""How llama.cpp brings the features of patches to the language model, and which vision tokenizers it can hold so.

A projector type of llama.cpp stands for a graph, for how it resizes pictures, and for texts around them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from vlm_cli.checkpoint.export.gguf.towers import Tower
from vlm_cli.composition import LinearOptions, MLPOptions
from vlm_cli.modeling.config import VLMConfig

__all__ = ["PROJECTORS", "Projector", "find_projector"]

#: Settings of a tokenizer that may have any value. `frames` is for videos, which these graphs do not read.
_FREE = ("dim_out", "frames", "scale")
_GELU = ("gelu", "gelu_tanh")


@dataclass(frozen=True, kw_only=True)
class Projector:
    """A projector type.

    Attributes:
        summary: what it holds.
        picture_text: the text around a picture; llama.cpp writes it by itself.
        tokenizers: type of vision tokenizer -> settings that may have other values than their default, and which.
        mask: what positions of a picture see.
        tower_problem: says why it cannot hold a tower; None if it can.
        norm_eps_of_tower: whether the tokenizer's norm has the eps of the tower's norms.
        weights: returns the tensors of the vision tokenizer under llama.cpp's names; its outputs are multiplied by a
            factor.
        describe: writes keys of its own.
        class_token_last: whether the class token stands behind the patches.
        bars: colour of the bars with which llama.cpp makes a picture square.
        filter: by which it resizes pictures.
        shows_twice: whether it shows a larger picture whole, and once more as its only tile.
    """

    summary: str
    picture_text: str = "{views}"
    tokenizers: Mapping[str, Mapping[str, Collection[Any] | None]]
    mask: str = "causal"
    tower_problem: Callable[[Tower], str | None]
    norm_eps_of_tower: bool = False
    weights: Callable[[Any, float], dict[str, Tensor]]
    describe: Callable[[gguf.GGUFWriter, Any, Tower], None]
    class_token_last: bool = False
    bars: tuple[int, int, int] = (0, 0, 0)
    filter: str = "bicubic"
    shows_twice: bool = False

    def picture_note(self, preprocess: Any, side: int) -> str | None:
        """Say which pictures llama.cpp resizes in another way than the model; None if there are none.

        Args:
            preprocess: OpenCLIP's settings of the model's preprocessing.
            side: pixels that the vision encoder reads.
        """
        if self.shows_twice:
            return (
                f"llama.cpp shows a picture twice if it is wider or higher than {side} pixels, and the model was made "
                f"for one view. Make pictures {side}x{side} before you send them."
            )
        fill, mode = preprocess.fill_color, preprocess.resize_mode
        same_bars = mode == "longest" and (fill if isinstance(fill, (list, tuple)) else (fill,) * 3) == self.bars
        if same_bars and preprocess.interpolation == self.filter:
            return None
        return (
            f"llama.cpp resizes pictures by {self.filter} and makes them square with bars of colour "
            f"{', '.join(map(str, self.bars))}; the model was made for {mode or 'shortest'} by "
            f"{preprocess.interpolation}. For equal answers, make pictures {side}x{side} before you send them."
        )

    def problems(self, config: VLMConfig, tower: Tower) -> list[str]:
        """Say why it cannot hold a model of this configuration and tower; an empty list if it can."""
        parts, problems = config.composition, []
        kind = parts.vision_tokenizer.type
        if kind not in self.tokenizers:
            problems.append(f"vision_tokenizer is {kind}; it would have to be {' or '.join(self.tokenizers)}.")
        else:
            problems += _tokenizer_problems(kind, parts.vision_tokenizer.options, self.tokenizers[kind])
            eps = getattr(parts.vision_tokenizer.options, "norm_eps", None)
            if self.norm_eps_of_tower and eps != tower.eps:
                problems.append(f"vision_tokenizer.norm_eps is {eps}; it would have to be the tower's, {tower.eps}.")
        if parts.tiling.type != "none":
            problems.append(f"tiling is {parts.tiling.type}; it would have to be none.")
        elif (text := parts.tiling.options.picture_text) != self.picture_text:
            problems.append(f"tiling.picture_text is {text!r}; it would have to be {self.picture_text!r}.")
        if (mask := getattr(parts.fusion.options, "mask", self.mask)) != self.mask:
            problems.append(f"fusion.mask is {mask}; it would have to be {self.mask}.")
        if (problem := self.tower_problem(tower)) is not None:
            problems.append(problem)
        return problems


def _tokenizer_problems(kind: str, options: Any, allowed: Mapping[str, Collection[Any] | None]) -> list[str]:
    """Say which settings of a tokenizer a projector cannot hold."""
    problems = []
    for field in fields(MLPOptions if kind == "mlp" else LinearOptions):
        value, name = getattr(options, field.name), f"vision_tokenizer.{field.name}"
        known = allowed.get(field.name, (field.default,))
        if field.name not in _FREE and known is not None and value not in known:
            wanted = f"{min(known)} or more" if isinstance(known, range) else " or ".join(map(repr, known))
            problems.append(f"{name} is {value!r}; it would have to be {wanted}.")
    return problems


# -- what projectors share ---------------------------------------------------------------------------------------------

_CLASS_TOKEN = (
    "the vision encoder has a class token, which llama.cpp puts behind the patches and then takes for one of them, in "
    "place of the first patch (all versions from May 2025 to October 2026 do). It would have to be a tower without "
    "one, as SigLIP's."
)


def _no_class_token(tower: Tower) -> str | None:
    return _CLASS_TOKEN if tower.has_class else None


def _one_layer_without_class(tower: Tower) -> str | None:
    return _no_class_token(tower) or _one_layer(tower)


def _one_layer(tower: Tower) -> str | None:
    return "vision_encoder.layer names several layers; it would have to be one." if len(tower.layers) > 1 else None


def _class_token(tower: Tower) -> str | None:
    if not tower.has_class:
        return "the vision encoder has no class token; it would have to be a tower with one, as CLIP's."
    return _one_layer(tower)


def _maps(tokenizer: Any, factor: float) -> list[tuple[Tensor, Tensor]]:
    """Return the weights and biases of the linear maps, the last of them times the tokenizer's scale and a factor."""
    found = []
    for linear in (m for m in tokenizer.proj.modules() if isinstance(m, nn.Linear)):
        weight = linear.weight.detach()
        found.append((weight, weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()))
    scale = factor * float(tokenizer.options.scale)
    return [*found[:-1], (found[-1][0] * scale, found[-1][1] * scale)]


# -- mlp ---------------------------------------------------------------------------------------------------------------


def _mlp_weights(tokenizer: Any, factor: float) -> dict[str, Tensor]:
    maps = _maps(tokenizer, factor)
    (first, first_bias), (last, last_bias) = maps if len(maps) == 2 else _split_identity(*maps[0])
    return {"mm.0.weight": first, "mm.0.bias": first_bias, "mm.2.weight": last, "mm.2.bias": last_bias}


def _split_identity(weight: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Write a linear map as two with a GELU between, for which llama.cpp has a graph: GELU(x) - GELU(-x) is x."""
    one = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return [
        (torch.cat([weight, -weight]), torch.cat([bias, -bias])),
        (torch.cat([one, -one], dim=1), torch.zeros_like(bias)),
    ]


def _describe_mlp(writer: gguf.GGUFWriter, options: Any, tower: Tower) -> None:
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


def _describe_internvl(writer: gguf.GGUFWriter, options: Any, tower: Tower) -> None:
    writer.add_vision_projector_scale_factor(options.pixel_shuffle)
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


def _describe_gemma3(writer: gguf.GGUFWriter, options: Any, tower: Tower) -> None:
    writer.add_vision_projector_scale_factor(options.pool)


_ANY = None
_TWO_MAPS: Mapping[str, Collection[Any] | None] = {"bias": (True, False), "activation": _GELU, "dim_hidden": _ANY}

#: Name in llama.cpp -> what it holds.
PROJECTORS: dict[str, Projector] = {
    "mlp": Projector(
        summary="linear or mlp of each patch, of towers without a class token (LLaVA with SigLIP)",
        tokenizers={"linear": {"bias": (True, False)}, "mlp": _TWO_MAPS},
        tower_problem=_no_class_token,
        weights=_mlp_weights,
        describe=_describe_mlp,
        bars=(122, 116, 104),
    ),
    "internvl": Projector(
        summary="a norm and mlp of pixel-shuffled patches, of towers with a class token (InternVL, one tile)",
        picture_text="<img>{views}</img>",
        tokenizers={"mlp": {**_TWO_MAPS, "norm": ("layer",), "pixel_shuffle": range(1, 65)}},
        tower_problem=_class_token,
        weights=_internvl_weights,
        describe=_describe_internvl,
        class_token_last=True,
        shows_twice=True,
    ),
    "gemma3": Projector(
        summary="a norm and linear of pooled patches that see each other, of towers without a class token (Gemma 3)",
        picture_text="<start_of_image>{views}<end_of_image>",
        tokenizers={
            "linear": {"bias": (False,), "pool": range(1, 1025), "norm": ("gemma", "rms"), "norm_eps": _ANY},
        },
        mask="image",
        tower_problem=_one_layer_without_class,
        norm_eps_of_tower=True,
        weights=_gemma3_weights,
        describe=_describe_gemma3,
        filter="bilinear",
    ),
}


def find_projector(config: VLMConfig, tower: Tower) -> tuple[str, list[str]]:
    """Return the projector type that holds a model, or the nearest one, and what stands in its way."""
    found = {name: projector.problems(config, tower) for name, projector in PROJECTORS.items()}
    name = min(found, key=lambda kind: len(found[kind]))
    return name, found[name]
