"""Compare a model with its export from picture files and a message on: tokens, pixels, logits and greedy answers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm_cli.checkpoint.export.agreement import TOLERANCE, check_agreement
from vlm_cli.checkpoint.export.hf.draft import Draft
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError, VLMError
from vlm_cli.image_processor import OpenCLIPImageProcessor
from vlm_cli.media.decode import decode_image
from vlm_cli.modeling.vlm import VLM
from vlm_cli.preprocessing import CROP_DOWN
from vlm_cli.processor import VLMProcessor
from vlm_cli.templates.pictures import MESSAGE
from vlm_cli.templates.render import render_template
from vlm_cli.trust import load_image_processor

__all__ = ["SIZES", "compare_pictures"]

#: (width, height) in pixels of the pictures that are compared: wide, high, of odd sides, smaller than a view.
SIZES = ((333, 97), (50, 411), (97, 97), (21, 15))
#: Largest difference of pixels of the torchvision backend, in levels from 0 to 255: it rounds other than Pillow.
PIXEL_LEVELS = 3
#: The share of numbers that may differ by more: where a picture grows several times, single ones differ by up to 7.
OUTLIERS = 1e-3
_NEW_TOKENS = 6
#: The text beside a picture, for a class without chat templates.
_PLAIN_TEXT = "What is it?"

CROP_NOTE = (
    "Transformers' processor crops a quarter of all pictures one pixel beside where vlm crops them, and answers about "
    "them may differ: those whose longer side has 3, 7, 11, … pixels more than the encoder's size once the shorter "
    "side has that size. To be sure, crop pictures to squares first."
)


@torch.no_grad()
def compare_pictures(
    model: VLM, processor: VLMProcessor, theirs: Any, their_processor: Any, out: Path, draft: Draft
) -> dict[str, Any]:
    """Compare what messages with a picture become, in vlm and in the files of an export.

    Pixels are those of the Pillow backend of the exported processor, which resizes as vlm does. Its torchvision
    backend, which Transformers takes by default, rounds some of them by a level of 255. A class that has that backend
    alone is compared with vlm's pixels by levels, and computes its logits from vlm's.

    Args:
        model: the VLM.
        processor: its processor.
        theirs: the exported model.
        their_processor: the exported processor.
        out: the directory of the export.
        draft: settings of the class.

    Returns:
        `largest_difference` of the logits, as a fraction of the largest logit; `largest_pixel_levels` between the two
        backends, in levels of 255; and `notes` for the user.

    Raises:
        CheckpointError: naming what differs.
    """
    written, ours_text = _write_prompts(processor, their_processor, draft)
    begins = draft.plain_prompt is None  # else the prompt has its token that begins a text
    own = _crop_as_they_do(processor)
    default, pillow = their_processor.image_processor, load_image_processor(out)
    has_pillow = type(pillow) is not type(default)
    largest, levels = 0.0, 0.0
    sizes = _sizes_of(model, own)
    for width, height in sizes:
        picture, what = _make_picture(width, height), f"a picture of {width} × {height} pixels"
        ours = own(text=ours_text, images=[picture], parse_special_tokens=True, add_special_tokens=begins)
        their_processor.image_processor = default
        by_torch = their_processor(text=written, images=[picture], return_tensors="pt")
        their_processor.image_processor = pillow
        back = their_processor(text=written, images=[picture], return_tensors="pt")
        size = own.image_processor.measure(width, height)
        _check_tokens(ours["input_ids"][0], back["input_ids"][0], model.positions_of(size), model, what)
        views = ours["pixel_values"][0, 0]
        if has_pillow:
            _check_pixels(views, back, what)
        else:
            back["pixel_values"] = views.view_as(back["pixel_values"])
        levels = max(levels, _levels(own, back["pixel_values"], by_torch["pixel_values"], what))
        largest = max(largest, _compare_logits(model, theirs, ours, back))
        if model.dtype == torch.float32 and (width, height) in sizes[:2]:
            _compare_answers(model, theirs, ours, back, draft.unanswered, what)
    their_processor.image_processor = default
    is_moved = own is not processor
    return {
        "largest_difference": largest,
        "largest_pixel_levels": levels,
        "notes": [CROP_NOTE] if is_moved else [],
    }


def _write_prompts(processor: VLMProcessor, their_processor: Any, draft: Draft) -> tuple[str, str]:
    """Return a prompt with a picture as the class's processor takes it, and the same one as vlm takes it."""
    if draft.plain_prompt is not None:
        return _PLAIN_TEXT, draft.plain_prompt.replace("{text}", _PLAIN_TEXT)
    written = render_template(their_processor.chat_template, MESSAGE, processor.tokenizer.special_tokens_map)
    return written, written.replace(draft.media_token, MEDIA_TOKEN) + draft.ends_prompts_with


def _sizes_of(model: VLM, processor: VLMProcessor) -> list[tuple[int, int]]:
    """Return the sizes of pictures that the model reads: some tilings refuse thin ones."""
    found = []
    for size in SIZES:
        try:
            model.positions_of(processor.image_processor.measure(*size))
        except VLMError:
            continue
        found.append(size)
    assert found, "no size is read"
    return found


def _crop_as_they_do(processor: VLMProcessor) -> VLMProcessor:
    """Return the processor, with an odd margin of a crop at the side where Transformers has it."""
    images = processor.image_processor
    given = images.preprocess_config
    crops = images.preprocessing.config.resize_mode in (None, "shortest") and not images.cuts
    if not crops or given.get("crop") == CROP_DOWN["crop"]:
        return processor
    moved = OpenCLIPImageProcessor(dict(given) | CROP_DOWN, images.tiling.to_dict())
    return VLMProcessor(moved, processor.tokenizer)


def _make_picture(width: int, height: int) -> Image.Image:
    """Return a picture from a PNG file: a gradient with noise, of which each part looks different."""
    generator = torch.Generator().manual_seed(width)
    noise = torch.randint(96, (height, width, 3), generator=generator)
    across, down = torch.linspace(0, 80, width)[None, :, None], torch.linspace(0, 79, height)[:, None, None]
    file = io.BytesIO()
    Image.fromarray((noise + across + down).to(torch.uint8).numpy()).save(file, "PNG")
    return decode_image(file.getvalue(), "a picture").image


def _check_tokens(ours: Tensor, theirs: Tensor, num: int, model: VLM, what: str) -> None:
    """Compare the tokens before and after a picture, and the number of positions in its place."""
    before, after = _around(ours, model)
    same = torch.equal(ours[:before], theirs[:before]) and torch.equal(
        ours[len(ours) - after :], theirs[len(theirs) - after :]
    )
    found = len(theirs) - before - after
    if not same or found != num:
        raise CheckpointError(
            f"the exported processor makes other tokens of a message with {what}: {found} in its place, and "
            f"{theirs.tolist()[:before]} before and {theirs.tolist()[len(theirs) - after :]} after it; vlm makes "
            f"{num}, {ours.tolist()[:before]} and {ours.tolist()[len(ours) - after :]}. Nothing was written; please "
            "report it with the composition."
        )


def _around(ours: Tensor, model: VLM) -> tuple[int, int]:
    """Return the number of tokens before and after the picture of a message."""
    place = int((ours == model.config.media_token_id).nonzero()[0])
    return place, len(ours) - place - 1


def _check_pixels(views: Tensor, theirs: Any, what: str) -> None:
    found = theirs["pixel_values"].flatten(0, -4)
    if views.shape != found.shape or not bool((views - found).abs().max() < 1e-5):
        size = "" if views.shape != found.shape else f", by up to {(views - found).abs().max():.1e}"
        raise CheckpointError(
            f"the exported processor and vlm make different pixels of {what}{size}: {list(found.shape)} and "
            f"{list(views.shape)}. Nothing was written; please report it with the composition."
        )


def _levels(processor: VLMProcessor, one: Tensor, other: Tensor, what: str) -> float:
    """Return by how many levels of 255 two backends differ.

    Raises:
        CheckpointError: if they differ by more than rounding.
    """
    std = torch.tensor(processor.image_processor.preprocessing.config.std).view(-1, 1, 1)
    distance = ((one - other) * std * 255).abs() if one.shape == other.shape else torch.tensor(torch.inf)
    levels = float(distance.max())
    if (distance > PIXEL_LEVELS).float().mean() > OUTLIERS:
        raise CheckpointError(
            f"the two backends of the exported image processor differ by {levels:.0f} levels of 255 for {what}. "
            "Nothing was written; please report it with the composition."
        )
    return levels


def _compare_logits(model: VLM, theirs: Any, ours_inputs: Any, their_inputs: Any) -> float:
    """Return the largest difference of the logits before and after the picture, as a fraction of the largest."""
    before, after = _around(ours_inputs["input_ids"][0], model)
    ours, back = model(**_of_dtype(ours_inputs, model)).logits, theirs(**_of_dtype(their_inputs, model)).logits
    size = min(model.config.first_added_id, back.shape[-1])
    pairs = [torch.cat([x[:, :before], x[:, x.shape[1] - after - 1 :]], dim=1)[..., :size] for x in (ours, back)]
    # In half precision every step rounds, and the two models take different steps.
    tolerance = TOLERANCE if model.dtype == torch.float32 else 0.05
    return check_agreement("the exported model", pairs[0].float(), pairs[1].float(), tolerance)


def _compare_answers(
    model: VLM, theirs: Any, ours_inputs: Any, their_inputs: Any, unanswered: Sequence[int], what: str
) -> None:
    first = model.config.first_added_id
    size = theirs.get_output_embeddings().weight.shape[0]
    own = list(model.config.added_ids.values())  # an answer of words; a pad token, say, is none
    settings: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "do_sample": False}
    settings["suppress_tokens"] = sorted({*own, *unanswered, *range(first, size)})
    ours = model.generate(**ours_inputs, **settings)[0, ours_inputs["input_ids"].shape[1] :]
    back = theirs.generate(**their_inputs, **settings)[0, their_inputs["input_ids"].shape[1] :]
    if not torch.equal(ours, back):
        raise CheckpointError(
            f"the exported model answers about {what} with the tokens {back.tolist()}; vlm with {ours.tolist()}. "
            "Nothing was written; please report it with the composition."
        )


def _of_dtype(inputs: Any, model: VLM) -> dict[str, Any]:
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
