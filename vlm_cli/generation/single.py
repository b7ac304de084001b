"""One prompt, and the answers to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import BatchFeature

from vlm_cli.generation.plan import Answer, GenerationPlan, ignore_message
from vlm_cli.modeling.batching import pad_left, stack_pixels
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.clip_text import add_clip_texts, chosen_of, split_clips

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from vlm_cli.media import LoadedClip, LoadedImage

__all__ = ["Generation", "generate_once"]


@dataclass(frozen=True)
class Generation:
    """The answers to one prompt, and what they cost.

    Attributes:
        answers: one, or as many as the plan asks for.
        prompt_tokens: tokens of the prompt, with one for each image.
        prompt_positions: positions that the prompt takes in the language model.
        seconds: of the answers.
        compile_seconds: of the compilation before them; 0 without one.
    """

    answers: list[Answer]
    prompt_tokens: int
    prompt_positions: int
    seconds: float
    compile_seconds: float = 0.0

    @property
    def new_tokens(self) -> int:
        return sum(answer.new_tokens for answer in self.answers)


@torch.inference_mode()
def generate_once(
    plan: GenerationPlan,
    parts: Sequence[Text | Medium],
    media: Sequence[LoadedImage | LoadedClip],
    *,
    seed: int | None = None,
    compile: bool = False,
    streamer: BaseStreamer | None = None,
    notify: Callable[[str], None] = ignore_message,
) -> Generation:
    """Answer one prompt.

    Args:
        plan: how the model answers.
        parts: the prompt, in reading order.
        media: the images and clips of the prompt.
        seed: of the random numbers; None leaves them as they are.
        compile: compile first what the model was prepared for; see `modeling.acceleration`.
        streamer: receives tokens as the model writes them.
        notify: receives what the user should know.

    Raises:
        PromptError: if the prompt alone has too many positions or images for the model.
    """
    parts = add_clip_texts(parts, plan.processor, chosen_of(media))
    pixels = [plan.processor.image_processor.read(medium) for medium in split_clips(media, plan.processor)]
    sizes = [medium.size for medium in pixels]
    plan.budget.check_media(sizes)
    ids, mask = pad_left([plan.writer.encode(parts)], 0)
    inputs = BatchFeature({"input_ids": ids, "attention_mask": mask})
    if media:
        inputs.update(stack_pixels([pixels]))
    num_tokens = ids.shape[1]
    positions = plan.budget.positions(num_tokens, sizes)
    room = plan.room(positions, notify, sizes)
    keywords = plan.keywords | {"max_new_tokens": room}
    compile_seconds = 0.0
    if compile:
        from vlm_cli.modeling.acceleration import compile_for

        notify("Compiling the step that writes a token …")
        compile_seconds = compile_for(plan.model, **inputs, **keywords)
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    started = time.monotonic()
    output = plan.model.generate(
        **inputs, **keywords, streamer=streamer, stopping_criteria=plan.stopping_criteria()
    )  # fmt: skip
    seconds = time.monotonic() - started
    answers = [plan.read(row[:num_tokens], row[num_tokens:], room) for row in output.tolist()]
    return Generation(answers, num_tokens, positions, seconds, compile_seconds)
