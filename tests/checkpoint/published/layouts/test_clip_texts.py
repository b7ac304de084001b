"""Clips of InternVL, SmolVLM and Perception-LM against Transformers, with the texts around frames."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, SmolVLMProcessor, SmolVLMVideoProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_utils import VideoMetadata

from tests.checkpoint.published.layouts import test_perception_lm
from tests.support import idefics3, perception_lm
from tests.support.grid_models import SQUARE, internvl
from tests.support.photographs import photograph
from tests.support.published import VOCABULARY
from tests.support.tiled import AFTER, BEFORE, TiledCase
from tests.support.tiny import nudged
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.media import ChosenFrames, LoadedClip
from vlm_cli.modeling.batching import pad_left, stack_pixels
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.clip_text import add_clip_texts, chosen_of, split_clips

WORDS = slice(0, VOCABULARY)


@dataclass(frozen=True)
class ClipCase:
    """A tiny checkpoint, and how its processor is asked.

    Attributes:
        case: the checkpoint.
        placeholder: what its prompts write for a clip.
        key: the name of the pixels that the processor makes of a clip.
        keywords: of the processor.
    """

    case: TiledCase
    placeholder: str = "<video>"
    key: str = "pixel_values"
    keywords: tuple[tuple[str, Any], ...] = ()


def name_words(folder: Path, words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Give words of a tokenizer other names, so that the ids of a text are not all unknown."""
    data = json.loads((folder / "tokenizer.json").read_text())
    for i, word in enumerate(words, start=20):
        data["model"]["vocab"][word] = data["model"]["vocab"].pop(f"w{i}")
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def make_internvl(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ClipCase:
    case = internvl(folder)
    case.processor.tokenizer = name_words(folder, ["Frame1:", "Frame2:", "Frame3:"])
    case.processor.video_processor.size = SQUARE
    return ClipCase(case)


def make_smolvlm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ClipCase:
    monkeypatch.setattr(processing_smolvlm, "num2words", {3: "three", 2: "two"}.__getitem__)
    case = idefics3.make(folder)
    words = ["three", "frames", "0:00:03", "Frame", "from", "00:00:", "00:01:", "00:02:"]
    tile = {"longest_edge": idefics3.TILE}
    clips = SmolVLMVideoProcessor(size=tile, max_image_size=tile, do_sample_frames=False)
    own = case.processor
    processor = SmolVLMProcessor(own.image_processor, name_words(folder, words), clips, image_seq_len=4)
    seen = VideoMetadata(total_num_frames=3, fps=1.0, duration=3.0, frames_indices=[0, 1, 2])
    return ClipCase(replace(case, processor=processor), keywords=(("video_metadata", [seen]),))


def make_perception_lm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ClipCase:
    case = test_perception_lm.case(folder)
    case.processor.video_processor.size = perception_lm.SQUARE
    case.processor.video_processor.image_mean = case.processor.video_processor.image_std = [0.5] * 3
    return ClipCase(case, "<|video|>", "pixel_values_videos")


MADE: dict[str, Callable[[Path, pytest.MonkeyPatch], ClipCase]] = {
    "internvl": make_internvl,
    "smolvlm": make_smolvlm,
    "perception_lm": make_perception_lm,
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", MADE)
@torch.no_grad()
def test_a_clip_is_written_and_read_as_published(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MADE[kind](tmp_path, monkeypatch)
    imported = import_checkpoint(tmp_path)
    model, processor = imported.model, imported.processor
    assert model is not None
    frames = [photograph("1:1").rotate(12 * i).resize((64, 64)) for i in range(3)]
    clip = np.stack([np.asarray(frame) for frame in frames])
    text = f"{BEFORE} {made.placeholder} {AFTER}"
    theirs = dict(made.case.processor(text=text, videos=[clip], return_tensors="pt", **dict(made.keywords)))
    theirs = {key: x for key, x in theirs.items() if key in ("input_ids", "attention_mask", made.key)}

    ours, written = encode(processor, frames)
    # Transformers resizes clips by torch, which rounds other than Pillow: 1 of 255, by their deviation.
    pixels = theirs[made.key].flatten(0, -4)
    own = ours["pixel_values"].flatten(0, 2)
    torch.testing.assert_close(own, pixels, atol=1.6 / 255 / 0.26, rtol=0)
    theirs[made.key] = own.reshape(theirs[made.key].shape)
    words = [x for x in theirs["input_ids"][0].tolist() if x < VOCABULARY]
    assert [x for x in ours["input_ids"][0].tolist() if x < VOCABULARY] == words
    last = [-3, -2, -1]
    expected = made.case.model(**theirs).logits[0, last, WORDS]
    found = model(**ours).logits[0, last, WORDS]
    assert float((found - expected).abs().max()) <= 1e-4
    wrong = ours | {"pixel_values": ours["pixel_values"].flip(1 if written > 1 else 2)}
    assert float((model(**wrong).logits[0, last, WORDS] - found).abs().max()) > 1e-3
    with nudged(next(model.vision_tokenizer.parameters())):
        assert float((model(**ours).logits[0, last, WORDS] - found).abs().max()) > 1e-3
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    rows = [*range(VOCABULARY, made.case.model.get_output_embeddings().weight.shape[0])]
    added = [*range(VOCABULARY, model.config.first_added_id + model.added_tokens.num_tokens)]
    answer = made.case.model.generate(**theirs, **options, suppress_tokens=rows)[0, -4:]
    assert torch.equal(model.generate(**ours, **options, suppress_tokens=added)[0, -4:], answer)


def encode(processor: Any, frames: list[Image.Image]) -> tuple[dict[str, Any], int]:
    """Return the inputs for a prompt with a clip of a frame a second, and the number of its media."""
    chosen = ChosenFrames(tuple(range(len(frames))), tuple(map(float, range(len(frames)))), float(len(frames)))
    clip = LoadedClip(tuple(frames), "a.mp4", *frames[0].size, chosen)
    parts = [Text(f"{BEFORE} "), Medium("a.mp4", "video"), Text(f" {AFTER}")]
    media = [processor.image_processor.read(x) for x in split_clips([clip], processor)]
    ids, mask = pad_left([processor.encode(add_clip_texts(parts, processor, chosen_of([clip])))], 0)
    return {"input_ids": ids, "attention_mask": mask, **stack_pixels([media])}, len(media)
