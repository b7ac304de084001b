"""What a projector type of llama.cpp can hold: a graph, how it resizes pictures, and texts around them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import gguf
from torch import Tensor

from vlm_cli.checkpoint.export.gguf.towers import Tower
from vlm_cli.composition import Composition
from vlm_cli.modeling.config import VLMConfig

__all__ = ["Projector", "Settings"]

#: Name of a setting -> its possible values; None for any. A setting that is left out has its default.
Settings = Mapping[str, Collection[Any] | None]

#: Settings that may have any value. Those of frames and clips are for videos, which these graphs do not read.
_FREE = ("dim_out", "frames", "scale", "clip_text", "frame_text", "between_frames_text")


@dataclass(frozen=True, kw_only=True)
class Projector:
    """A projector type.

    Attributes:
        summary: what it holds.
        tiling: how pictures are cut, and which settings of that may have which values; None for any.
        tokenizers: type of vision tokenizer -> settings that may have other values than their default, and which.
        mask: what positions of a picture see.
        problem: says what else stands in the way of a model whose tokenizer and tiling it holds; None if nothing does.
        norm_eps_of_tower: whether the tokenizer's norm has the eps of the tower's norms.
        weights: returns the tensors of the vision tokenizer under llama.cpp's names; its outputs are multiplied by a
            factor.
        describe: writes keys of its own.
        class_token_last: whether the class token stands behind the patches.
        bars: colour of the bars with which llama.cpp makes a picture square.
        filter: by which it resizes pictures.
        pictures: what it makes of pictures of other sizes; None: it is the bars and the filter that differ.
        same_size: width and height of a picture that it shows as the model does.
        splits_linear: whether a single linear map is written as two with a GELU between.
    """

    summary: str
    tiling: tuple[str, Settings]
    tokenizers: Mapping[str, Settings]
    mask: str = "causal"
    problem: Callable[[VLMConfig, Tower], str | None]
    norm_eps_of_tower: bool = False
    weights: Callable[[Any, float], dict[str, Tensor]]
    describe: Callable[[gguf.GGUFWriter, Composition, Tower], None]
    class_token_last: bool = False
    bars: tuple[int, int, int] = (0, 0, 0)
    filter: str = "bicubic"
    pictures: str | None = None
    same_size: Callable[[VLMConfig, int], tuple[int, int]] = lambda config, side: (side, side)
    splits_linear: bool = False

    def picture_note(self, preprocess: Any, side: int, width: int) -> str | None:
        """Say which pictures llama.cpp resizes in another way than the model; None if there are none.

        Args:
            preprocess: OpenCLIP's settings of the model's preprocessing.
            side: pixels that the vision encoder reads.
            width: of a picture of `same_size`.
        """
        if self.pictures is not None:
            return f"llama.cpp {self.pictures.format(side=side, width=width)}"
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
            problems += _find_problems("vision_tokenizer", parts.vision_tokenizer.options, self.tokenizers[kind])
            options: Any = parts.vision_tokenizer.options
            if self.norm_eps_of_tower and options.norm_eps != tower.eps:
                problems.append(
                    f"vision_tokenizer.norm_eps is {options.norm_eps}; it would have to be the tower's, {tower.eps}."
                )
        cut, allowed = self.tiling
        if parts.tiling.type != cut:
            problems.append(f"tiling is {parts.tiling.type}; it would have to be {cut}.")
        else:
            problems += _find_problems("tiling", parts.tiling.options, allowed)
        if (mask := getattr(parts.fusion.options, "mask", self.mask)) != self.mask:
            problems.append(f"fusion.mask is {mask}; it would have to be {self.mask}.")
        if (problem := self.problem(config, tower)) is not None:
            problems.append(problem)
        return problems


def _find_problems(section: str, options: Any, allowed: Settings) -> list[str]:
    """Say which settings a projector cannot hold: those with a value that is not allowed."""
    problems = []
    for field in fields(options):
        value, name = getattr(options, field.name), f"{section}.{field.name}"
        known = allowed.get(field.name, (field.default,))
        if field.name not in _FREE and known is not None and value not in known:
            wanted = f"{min(known)} or more" if isinstance(known, range) else " or ".join(map(repr, known))
            problems.append(f"{name} is {value!r}; it would have to be {wanted}.")
    return problems
