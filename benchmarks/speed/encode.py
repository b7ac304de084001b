"""How fast images become features, and images that repeat become vision tokens.

python -m benchmarks.speed.encode
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.measure import Run, Subject, compare, seconds
from benchmarks.speed.models import Models, Prompt
from benchmarks.speed.question import Question, Settings, run
from benchmarks.speed.results import Report

OURS = "ours, vision encoder"


def measure(report: Report, models: Models, settings: Settings) -> None:
    size = models.size.name
    model = models.ours("llava").model
    tower, clip = models.tower(), models.clip()
    for images in (1, 2) if size == "tiny" else (1, 8, 32):
        vision_x = models.placed(Prompt(images).pixels(models.image_size))
        flat = vision_x.flatten(0, 2)

        peers = [
            Subject("OpenCLIP tower", partial(timed, tower, flat)),
            Subject("HF CLIPVisionModel", partial(timed, clip, flat)),
            Subject("reference", partial(_reference, models, vision_x)),
        ]
        ours = Subject(OURS, partial(timed, model.vision_encoder, vision_x))
        outcomes = compare(ours, peers, settings.pairs if images <= 8 else settings.few, warm_up=images == 1)
        report.add(size, f"{images} image{'s' * (images > 1)}", OURS, outcomes)
    repeated(report, models, settings, model)


def _reference(models: Models, vision_x: Tensor) -> Run:
    return timed(models.peer("llava", "reference").model._encode_vision_x, vision_x)


def repeated(report: Report, models: Models, settings: Settings, model: Any) -> None:
    """Of the images of a prompt, as many differ as a quarter."""
    images = 4 if models.size.name == "tiny" else 32
    different = models.placed(Prompt(images).pixels(models.image_size))
    some = different[:, : images // 4]
    same = some.repeat(1, 4, 1, 1, 1, 1)
    ours = Subject("ours, encode_vision", partial(timed, model.encode_vision, same))
    peers = [
        Subject(f"ours, {images} that differ", partial(timed, model.encode_vision, different)),
        Subject(f"ours, {images // 4} alone", partial(timed, model.encode_vision, some)),
    ]
    case = f"{images} images of which {images // 4} differ"
    report.add(models.size.name, case, ours.name, compare(ours, peers, settings.few, warm_up=False))


def timed(function: Callable[[Tensor], Any], pixels: Tensor) -> Run:
    return seconds(torch.inference_mode()(lambda: function(pixels)))


QUESTION = Question(
    name="encode",
    asks="How fast are images encoded, next to OpenCLIP's own tower, Transformers' CLIP and the reference?",
    measure=measure,
)

if __name__ == "__main__":
    run(QUESTION)
