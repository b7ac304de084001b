"""Compare a model with its export to Transformers' LLaVA: from tensors on, and from a picture and a message on."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm_cli.checkpoint.export.agreement import TOLERANCE, check_agreement
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.media.decode import decode_image
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.templates.pictures import MESSAGE
from vlm_cli.templates.render import render_template

__all__ = ["compare_logits", "compare_pictures"]

#: Largest difference of pixels, in levels from 0 to 255: Transformers resizes with torchvision, OpenCLIP with Pillow.
PIXEL_LEVELS = 3
#: How much wider than high the compared pictures are, in pixels of the resized picture. Where the margin is an odd
#: number, it has two middles; Transformers starts at the lower one, OpenCLIP at the even one.
MARGINS = (0, 2, 1, 3)


@torch.no_grad()
def compare_logits(model: VLM, theirs: Any) -> float:
    """Return the largest difference of the logits of random tokens and pixels.

    Raises:
        CheckpointError: if it is too large.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(config.first_added_id, (1, 12), generator=generator)
    pixels = torch.randn(1, 3, *model.vision_encoder.image_size, generator=generator).to(model.dtype)
    image = torch.tensor([[config.media_token_id]])
    num = model.num_positions()
    ours = model(pixels[None], torch.cat([text[:, :4], image, text[:, 4:]], dim=1)).logits
    spread = torch.cat([text[:, :4], image.expand(1, num), text[:, 4:]], dim=1)
    back = theirs(input_ids=spread, pixel_values=pixels).logits
    back = torch.cat([back[:, :4], back[:, 4 + num - 1 :]], dim=1)  # an image has many positions; the last counts
    # In half precision every step rounds, and the two models take different steps.
    tolerance = TOLERANCE if model.dtype == torch.float32 else 0.05
    return check_agreement("the LLaVA directory", ours.float(), back.float(), tolerance)


@torch.no_grad()
def compare_pictures(model: VLM, processor: VLMProcessor, theirs: Any, their_processor: Any) -> dict[str, Any]:
    """Compare what a message with a picture becomes, in vlm and through the exported processor.

    Returns:
        `largest_picture_difference` of the logits, as a fraction of the largest logit, and `notes` for the user: which
        pictures are cropped elsewhere.

    Raises:
        CheckpointError: if the tokens differ, or the pixels of a picture that both crop alike.
    """
    text = render_template(their_processor.chat_template, MESSAGE, processor.tokenizer.special_tokens_map)
    side, apart, largest = model.vision_encoder.image_size[0], [], 0.0
    for margin in MARGINS:
        picture = _make_picture(side, margin)
        ours = processor(text=text, images=[picture], parse_special_tokens=True)
        back = their_processor(text=text, images=[picture], return_tensors="pt")
        _check_tokens(ours["input_ids"][0], back["input_ids"][0], model)
        pixels, found = ours["pixel_values"][0, 0, 0], back["pixel_values"][0]
        if _differs(pixels, found, processor):
            apart.append(margin)
        logits, theirs_logits = model(**_of_dtype(ours, model)).logits, theirs(**_of_dtype(back, model)).logits
        difference = (logits[0, -1] - theirs_logits[0, -1]).abs().max() / logits[0, -1].abs().max().clamp(min=1)
        largest = max(largest, float(difference))
    if apart and apart != [3]:
        raise CheckpointError(
            f"the exported processor and vlm make different pixels of pictures of {side} × {side} pixels and "
            f"{', '.join(map(str, apart))} more in width. Nothing was written; please report it with the composition."
        )
    return {"largest_picture_difference": largest, "notes": [_CROP_NOTE] if apart else []}


_CROP_NOTE = (
    "Transformers' processor crops a quarter of all pictures one pixel beside where vlm crops them, and answers about "
    "them may differ: those whose longer side has 3, 7, 11, … pixels more than the encoder's size once the shorter "
    "side has that size. To be sure, crop pictures to squares first."
)


def _make_picture(side: int, margin: int) -> Image.Image:
    """Return a picture from a PNG file that fits the vision encoder but for a margin in its width."""
    generator = torch.Generator().manual_seed(margin)
    shape = (side, side + margin, 3)
    values = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(values.numpy()).save(file, "PNG")
    return decode_image(file.getvalue(), "a picture").image


def _check_tokens(ours: Tensor, theirs: Tensor, model: VLM) -> None:
    media, num = model.config.media_token_id, model.num_positions()
    spread = [token for token in ours.tolist() for _ in range(num if token == media else 1)]
    if spread != theirs.tolist():
        raise CheckpointError(
            f"the exported processor makes other tokens of a message with {MEDIA_TOKEN}: {theirs.tolist()[:40]}; vlm "
            f"makes {spread[:40]}. Nothing was written; please report it with the composition."
        )


def _differs(ours: Tensor, theirs: Tensor, processor: VLMProcessor) -> bool:
    """Tell whether pixels differ by more than rounding; both are float[C, H, W]."""
    std = torch.tensor(processor.image_processor.preprocessing.config.std).view(-1, 1, 1)
    return ours.shape != theirs.shape or bool(((ours - theirs) * std * 255).abs().max() > PIXEL_LEVELS)


def _of_dtype(inputs: Any, model: VLM) -> dict[str, Any]:
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
