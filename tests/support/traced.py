"""Pictures of noise, and tiny models in memory to trace them in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.media import ChosenFrames, LoadedClip, LoadedImage
from vlm_cli.prompt import Medium, Text
from vlm_cli.tracing.run import TraceOptions, trace_prompt
from vlm_cli.tracing.trace import Trace


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """A picture of noise, in which every part matters."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def image(width: int = 48, height: int = 32, seed: int = 0) -> LoadedImage:
    found = picture(width, height, seed)
    return LoadedImage(found, f"{seed}.png", width, height)


def clip(frames: int = 3, seed: int = 0) -> LoadedClip:
    shown = tuple(picture(seed=100 * seed + i) for i in range(1, frames + 1))
    chosen = ChosenFrames(tuple(range(frames)), tuple(0.5 * i for i in range(frames)), 2.0)
    return LoadedClip(shown, f"{seed}.mp4", *shown[0].size, chosen)


@dataclass(frozen=True)
class Subject:
    """A model with open gates, and its processor."""

    model: Any
    processor: Any

    def plan(self, **keywords: Any) -> GenerationPlan:
        return GenerationPlan(self.model, self.processor, {"max_new_tokens": 3, "do_sample": False} | keywords)

    def trace(self, *media: LoadedImage | LoadedClip, answer: str | None = " a red cat", **options: Any) -> Trace:
        """Trace a prompt that shows the media, each with a word before it."""
        parts: list[Text | Medium] = []
        for number, x in enumerate(media):
            parts += [
                Text(f"The dog number {number}: "),
                Medium(x.source, "video" if isinstance(x, LoadedClip) else "image"),
            ]
        parts.append(Text("What is it?"))
        return trace_prompt(self.plan(), parts, media, TraceOptions(answer=answer, **{"cells": 2} | options))
