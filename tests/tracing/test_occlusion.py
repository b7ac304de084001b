"""Occlusion against the plain way: every picture with a blank part goes through the whole model, alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny import nudged
from tests.support.traced import Subject, clip, image
from vlm_cli.media import LoadedClip, LoadedImage
from vlm_cli.modeling.batching import stack_pixels
from vlm_cli.tracing.media import read_media
from vlm_cli.tracing.occlusion import Falls, Occlusion, list_windows

TILED = {"type": "grid", "min_tiles": 2, "max_tiles": 4}
ANSWER = [70, 80, 90]


def occlude(
    subject: Subject, media: Sequence[LoadedImage | LoadedClip], cells: int = 2
) -> tuple[list[int], list[Falls]]:
    """The prompt `twelve words <image> word <image> …`, and how the answer falls."""
    prompt = [*range(40, 52)]
    for number in range(len(media)):
        prompt += [subject.processor.media_token_id, 60 + number]
    with torch.no_grad():
        seen = read_media(subject.model, subject.processor, media)
        return prompt, Occlusion(seen, subject.processor, prompt, ANSWER, cells).measure()


@torch.no_grad()
def plain(
    subject: Subject, prompt: Sequence[int], media: Sequence[LoadedImage | LoadedClip], views: Any = None
) -> Tensor:
    """The log-probabilities of the answer; `views` changes the pixels of the media."""
    model = subject.model
    pixels = [subject.processor.image_processor.read(x) for x in media]
    if views is not None:
        views(pixels)
    ids = torch.tensor([[*prompt, *ANSWER]])
    prefix = torch.arange(ids.shape[1])[None] < len(prompt)
    inputs = stack_pixels([pixels])
    logits = model(input_ids=ids, **inputs, prefix_mask=prefix, use_cache=False).logits[0].float()
    logits[:, model.config.media_token_id] = -torch.inf
    return logits[-len(ANSWER) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(ANSWER)[:, None])[:, 0]


def blank_by_hand(medium: LoadedImage, box: tuple[int, int, int, int], color: tuple[int, int, int]) -> LoadedImage:
    pixels = medium.image.copy()
    for x in range(box[0], box[2]):
        for y in range(box[1], box[3]):
            pixels.putpixel((x, y), color)
    return LoadedImage(pixels, medium.source, medium.width, medium.height)


def mean_color(subject: Subject) -> tuple[int, int, int]:
    red, green, blue = (round(255 * x) for x in subject.processor.image_processor.preprocessing.config.mean)
    return red, green, blue


def check_falls(subject: Subject, first: LoadedImage, second: LoadedImage) -> None:
    prompt, falls = occlude(subject, [first, second])
    base = plain(subject, prompt, [first, second])

    def blank(medium: int, views: Any) -> Callable[[Any], None]:
        def change(pixels: Any) -> None:
            pixels[medium].views[views] = 0

        return change

    for number in range(2):
        whole = base - plain(subject, prompt, [first, second], blank(number, slice(None)))
        torch.testing.assert_close(falls[number].whole, whole, atol=1e-4, rtol=0)
        for view in range(falls[number].views.shape[1]):
            of_view = base - plain(subject, prompt, [first, second], blank(number, view))
            torch.testing.assert_close(falls[number].views[:, view], of_view, atol=1e-4, rtol=0)
    # The upper left cell of the second picture lies in four windows: itself, with its neighbours, and all four.
    width, height = second.width, second.height
    total = torch.zeros(len(ANSWER))
    for right, bottom in [(width // 2, height // 2), (width, height // 2), (width // 2, height), (width, height)]:
        changed = blank_by_hand(second, (0, 0, right, bottom), mean_color(subject))
        total += base - plain(subject, prompt, [first, changed])
    rows, columns = falls[1].cells.shape[1:]
    assert (rows, columns) == (1, 2) or (rows, columns) == (2, 2)
    if rows == 2:
        torch.testing.assert_close(falls[1].cells[:, 0, 0], total / 4, atol=1e-4, rtol=0)
    assert falls[1].cells.abs().max() > 1e-3  # something matters


COMPOSITIONS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("perceiver", "cross-attention", "llama", {}),
    ("perceiver", "cross-attention", "llama", {"fusion": {"attend": "all"}, "vision_tokenizer": {"max_num_media": 3}}),
    ("mlp", "llama-cross-attention", "llama", {}),
    ("linear", "language-stream", "llama", {}),
    ("linear", "language-stream", "llama", {"fusion": {"mask": "prefix"}}),
    ("linear", "language-stream", "llama", {"fusion": {"mask": "image"}}),
    ("qformer", "language-stream", "gpt_neox", {}),
    ("linear", "language-stream", "mamba", {}),
    ("linear", "language-stream", "jamba", {}),
    ("perceiver", "cross-attention", "mamba", {}),
    ("c-abstractor", "language-stream", "gpt2", {}),
    ("latent-attention", "cross-attention", "mistral", {}),
    ("mlp", "language-stream", "llama", {"tiling": TILED}),
    ("perceiver", "cross-attention", "llama", {"tiling": TILED, "vision_tokenizer": {"frames": "apart"}}),
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("tokenizer", "fusion", "language_model", "settings"), COMPOSITIONS)
def test_falls_equal_the_plain_way(
    subject: Callable[..., Subject], tokenizer: str, fusion: str, language_model: str, settings: dict[str, Any]
) -> None:
    check_falls(subject(tokenizer, fusion, language_model, settings), image(32, 32, 1), image(40, 40, 2))


def test_a_clip_falls_frame_by_frame(subject: Callable[..., Subject]) -> None:
    one = subject("perceiver", "cross-attention")
    shown = clip(3)
    prompt, falls = occlude(one, [shown])
    base = plain(one, prompt, [shown])
    assert len(falls) == 3
    for frame in range(3):

        def blank(pixels: Any, frame: int = frame) -> None:
            pixels[0].views[frame] = 0

        torch.testing.assert_close(falls[frame].whole, base - plain(one, prompt, [shown], blank), atol=1e-4, rtol=0)


def test_a_changed_weight_changes_the_falls(subject: Callable[..., Subject]) -> None:
    one = subject("linear", "language-stream")
    first = occlude(one, [image(32, 32)])[1][0]
    with nudged(one.model.vision_tokenizer.proj.weight):
        second = occlude(one, [image(32, 32)])[1][0]
    assert (first.cells - second.cells).abs().max() > 1e-4


@pytest.mark.sample(1)
@pytest.mark.parametrize("fusion", ["cross-attention", "llama-cross-attention"])
def test_a_picture_behind_closed_gates_changes_nothing(subject: Callable[..., Subject], fusion: str) -> None:
    one = subject("perceiver", fusion)
    gates = [gate for name, gate in one.model.gates().items() if name.endswith("attn_gate")]
    opened = [gate.detach().clone() for gate in gates]
    try:
        for gate in gates:
            gate.data.zero_()
        closed = occlude(one, [image(32, 32), image(32, 32, 1)])[1]
        gates[-1].data.fill_(0.5)
        half = occlude(one, [image(32, 32), image(32, 32, 1)])[1]
    finally:
        for gate, value in zip(gates, opened, strict=True):
            gate.data.copy_(value)
    for found in closed:
        for falls in (found.whole, found.views, found.cells):
            assert falls.abs().max() <= 1e-5
    # The last block lets words see the last picture before them, and that is not the first one.
    assert half[1].whole.abs().max() > 100 * half[0].whole.abs().max()


def test_a_picture_out_of_sight_changes_nothing(subject: Callable[..., Subject]) -> None:
    """Four layers that attend to two positions see four positions back: the last picture's tokens, and no others."""
    one = subject("perceiver", "language-stream", "mistral")
    one.model.lang_model.config.sliding_window = 2
    first, last = occlude(one, [image(32, 32), image(32, 32, 1)])[1]
    for falls in (first.whole, first.views, first.cells):
        assert falls.abs().max() <= 1e-5
    assert last.whole[0].abs() > 1e-3


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 3), (4, 3)])
def test_windows_blank_each_cell_as_often(rows: int, columns: int) -> None:
    times = torch.zeros(rows, columns)
    for down, across in list_windows(rows, columns):
        assert down.stop - down.start <= 2 and across.stop - across.start <= 2
        times[down, across] += 1
    assert (times == times[0, 0]).all() and times[0, 0] >= 1
