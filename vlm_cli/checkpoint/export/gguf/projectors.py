"""How llama.cpp brings the features of patches to the language model, and which vision tokenizers it can hold so.

A projector type of llama.cpp stands for a graph, for how it resizes pictures, and for texts around them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from vlm_cli.checkpoint.export.gguf.towers import Tower
from vlm_cli.composition import UNTILED, LinearOptions, MLPOptions
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.vlm import VLM

__all__ = ["PROJECTORS", "Projector", "find_projector"]


@dataclass(frozen=True, kw_only=True)
class Projector:
    """A projector type.

    Attributes:
        summary: what it holds.
        problems: says why it cannot hold a model of this configuration and tower; an empty list if it can.
        weights: returns the tensors of the vision tokenizer under llama.cpp's names.
        describe: writes keys of its own.
    """

    summary: str
    problems: Callable[[VLMConfig, Tower], list[str]]
    weights: Callable[[VLM], dict[str, Tensor]]
    describe: Callable[[gguf.GGUFWriter, VLMConfig, Tower], None] = lambda writer, config, tower: None


# -- mlp ---------------------------------------------------------------------------------------------------------------

#: Settings that may have any value. `frames` is for videos, which llama.cpp's graph does not read.
_FREE = ("bias", "dim_out", "frames", "scale", "dim_hidden")

_CLASS_TOKEN = (
    "the vision encoder has a class token, which llama.cpp puts behind the patches and then takes for one of them, in "
    "place of the first patch (all versions from May 2025 to October 2026 do). It would have to be a tower without "
    "one, as SigLIP's."
)


def _mlp_problems(config: VLMConfig, tower: Tower) -> list[str]:
    parts, problems = config.composition, []
    options = parts.vision_tokenizer.options
    if parts.vision_tokenizer.type not in ("linear", "mlp"):
        return [f"vision_tokenizer is {parts.vision_tokenizer.type}; it would have to be linear or mlp."]
    kind = MLPOptions if parts.vision_tokenizer.type == "mlp" else LinearOptions
    for field in fields(kind):
        value = getattr(options, field.name)
        if field.name == "activation":
            if value not in ("gelu", "gelu_tanh"):
                problems.append(f"vision_tokenizer.activation is {value}; it would have to be gelu or gelu_tanh.")
        elif field.name not in _FREE and value != field.default:
            problems.append(f"vision_tokenizer.{field.name} is {value!r}; it would have to be {field.default!r}.")
    if parts.tiling != UNTILED:
        kind_of_tiling = "none with picture_text" if parts.tiling.type == "none" else parts.tiling.type
        problems.append(f"tiling is {kind_of_tiling}; it would have to be none, without texts.")
    if (mask := parts.fusion.options.mask) != "causal":
        problems.append(f"fusion.mask is {mask}; it would have to be causal.")
    return problems + ([_CLASS_TOKEN] if tower.has_class else [])


def _mlp_weights(model: VLM) -> dict[str, Tensor]:
    tokenizer: Any = model.vision_tokenizer
    maps = [m for m in tokenizer.proj.modules() if isinstance(m, nn.Linear)]
    scale = float(tokenizer.options.scale)
    pairs = [
        (m.weight.detach(), m.bias.detach() if m.bias is not None else m.weight.new_zeros(len(m.weight))) for m in maps
    ]
    if len(pairs) == 1:
        pairs = _split_identity(*pairs[0])
    (first, first_bias), (last, last_bias) = pairs
    return {
        "mm.0.weight": first,
        "mm.0.bias": first_bias.detach(),
        "mm.2.weight": last * scale,
        "mm.2.bias": last_bias.detach() * scale,
    }


def _split_identity(weight: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Write a linear map as two with a GELU between, for which llama.cpp has a graph: GELU(x) - GELU(-x) is x."""
    weight, bias = weight.detach(), bias.detach()
    one = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return [
        (torch.cat([weight, -weight]), torch.cat([bias, -bias])),
        (torch.cat([one, -one], dim=1), torch.zeros_like(bias)),
    ]


def _describe_mlp(writer: gguf.GGUFWriter, config: VLMConfig, tower: Tower) -> None:
    writer.add_array("clip.vision.feature_layer", list(tower.layers))


#: Name in llama.cpp -> what it holds.
PROJECTORS: dict[str, Projector] = {
    "mlp": Projector(
        summary="linear or mlp of each patch, of towers without a class token (LLaVA with SigLIP)",
        problems=_mlp_problems,
        weights=_mlp_weights,
        describe=_describe_mlp,
    ),
}


def find_projector(config: VLMConfig, tower: Tower) -> tuple[str | None, dict[str, list[str]]]:
    """Return the projector type that holds a model, or None, and what stands in the way of each other type."""
    problems: dict[str, list[str]] = {}
    for name, projector in PROJECTORS.items():
        if not (found := projector.problems(config, tower)):
            return name, problems
        problems[name] = found
    return None, problems
