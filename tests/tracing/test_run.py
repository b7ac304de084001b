"""Traces of tiny models of many compositions: what they hold, and that shares add up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.support.traced import Subject, clip, image
from vlm_cli.errors import PromptError
from vlm_cli.tracing.attention import RecordedAttention, list_gates
from vlm_cli.tracing.rollout import Layer
from vlm_cli.tracing.trace import Trace

GRID: dict[str, Any] = {"type": "grid", "min_tiles": 2, "max_tiles": 4}
ANYRES: dict[str, Any] = {"type": "anyres", "pinpoints": [[64, 64], [32, 64], [64, 32]]}


def check_shares(trace: Trace, *, has_newlines: bool = False) -> None:
    for word in range(len(trace.words)):
        maps = [trace.map(word, picture, "attention") for picture in range(len(trace.pictures))]
        total = 0.0
        for found in maps:
            assert found is not None
            assert found.whole == pytest.approx(sum(found.views), abs=1e-5)
            assert sum(map(sum, found.values)) <= found.whole + 1e-5
            total += found.whole
        assert 0 < total <= 1 + 1e-5
    for layer in trace.layers:
        for text, pictures in zip(layer.text, layer.pictures, strict=True):
            assert text + sum(pictures) == pytest.approx(1, abs=1e-5)
            assert layer.kind == "layer" or has_newlines or text == pytest.approx(0, abs=1e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize("fusion", ["cross-attention", "language-stream", "llama-cross-attention"])
@pytest.mark.parametrize("tokenizer", ["perceiver", "qformer", "linear", "mlp"])
def test_shares_of_attention_add_up(subject: Callable[..., Subject], tokenizer: str, fusion: str) -> None:
    trace = subject(tokenizer, fusion).trace(image(), clip(), image(20, 50, seed=2), cells=None)
    assert [picture.frame for picture in trace.pictures] == [None, 1, 2, 3, None]
    check_shares(trace)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("tokenizer", "fusion", "settings"),
    [
        ("linear", "language-stream", {"tiling": GRID}),
        ("mlp", "cross-attention", {"tiling": GRID}),
        ("linear", "language-stream", {"tiling": ANYRES}),
        ("linear", "llama-cross-attention", {"tiling": ANYRES}),
        ("linear", "language-stream", {"tiling": GRID | {"tile_text": "<{row},{column}>{image}"}}),
        ("perceiver", "cross-attention", {"tiling": GRID, "vision_tokenizer": {"frames": "apart"}}),
        ("c-abstractor", "language-stream", {"fusion": {"mask": "image"}}),
        ("latent-attention", "language-stream", {"fusion": {"mask": "prefix"}}),
        ("perceiver", "cross-attention", {"vision_tokenizer": {"max_num_media": 3, "max_num_frames": 4}}),
        ("linear", "language-stream", {"tiling": {"type": "none", "frame_text": "Frame{number}: {image}"}}),
    ],
)
def test_tiles_masks_and_texts(
    subject: Callable[..., Subject], tokenizer: str, fusion: str, settings: dict[str, Any]
) -> None:
    trace = subject(tokenizer, fusion, sections=settings).trace(image(60, 24), clip(2), image(30, 30, seed=2))
    check_shares(trace, has_newlines=settings.get("tiling") == ANYRES)
    assert trace.measures == ("attention", "occlusion")
    assert len(trace.maps) == 2 * len(trace.words) * len(trace.pictures) == 2 * len(trace.words) * 4
    for found in trace.maps:
        picture = trace.pictures[found.picture]
        assert len(found.views) == len(picture.views)
        assert (found.rows > found.columns) == (picture.height > picture.width) or found.rows == found.columns
    json.dumps(trace.as_json(), allow_nan=False)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("language_model", "fusion", "note"),
    [
        ("mamba", "language-stream", "(mamba) shows no attention, so maps of attention are left out"),
        ("mamba", "cross-attention", "(mamba) shows no attention, so maps of attention show the gated blocks alone"),
        ("mistral", "language-stream", "Layers 0, 1, 2, 3 attend to the last 8 positions alone."),
    ],
)
def test_what_a_language_model_does_not_show_is_said(
    subject: Callable[..., Subject], language_model: str, fusion: str, note: str
) -> None:
    one = subject("linear", fusion, language_model)
    if language_model == "mistral":
        one.model.lang_model.config.sliding_window = 8
    trace = one.trace(image(32, 32))
    assert any(note in x for x in trace.notes), trace.notes
    has_attention = (language_model, fusion) != ("mamba", "language-stream")
    assert trace.measures == (("attention", "occlusion") if has_attention else ("occlusion",))
    assert any(found.whole for found in trace.maps if found.measure == "occlusion")


def test_layers_without_attention_and_with_sinks_are_named() -> None:
    whole = torch.full((3, 3), 1 / 3).tril()
    whole = whole / whole.sum(-1, keepdim=True)
    found = RecordedAttention([Layer(None), Layer(whole), Layer(whole * 0.5)], torch.arange(2), torch.arange(2), 2)
    first, second = found.notes("jamba")
    assert first.startswith("Layer 0 shows no attention (the language model is jamba);")
    assert second == "Layer 2 attends to a learned sink, too, which is left out."
    assert found.knows_media


def test_closed_gates_are_said(subject: Callable[..., Subject]) -> None:
    one = subject("mlp", "cross-attention", sections={"fusion": {"every": 2}})
    gates = list(one.model.gates().values())
    for gate in gates:
        gate.data.zero_()
    trace = one.trace(image(32, 32))
    assert [gate.opening for gate in trace.gates] == [0.0] * 4
    assert "All 4 gates of the fusion are closed, so the pictures change nothing yet." in trace.notes
    for found in trace.maps:
        assert abs(found.whole) <= 1e-5 and max(abs(x) for row in found.values for x in row) <= 1e-5


def test_an_unattended_picture_has_no_share_in_blocks(subject: Callable[..., Subject]) -> None:
    """With `attend: last`, the words of the answer see the last picture."""
    trace = subject("perceiver", "cross-attention").trace(image(32, 32), image(32, 32, 1), cells=None)
    blocks = [layer for layer in trace.layers if layer.kind == "block"]
    assert len(blocks) == 4
    for layer in blocks:
        for first, last in layer.pictures:
            assert first == 0 and last == pytest.approx(1, abs=1e-5)


def test_words_are_those_that_generate_gives(subject: Callable[..., Subject]) -> None:
    """Each token of the model's own answer is the likeliest one, and its probability that of a plain forward."""
    one = subject("linear", "language-stream")
    trace = one.trace(image(32, 32), answer=None, cells=None)
    tokens = [token for word in trace.words for token in word.tokens]
    assert len(tokens) == 3
    for token in tokens:
        best = max(token.alternatives, key=lambda x: x.probability)
        assert math.isclose(best.probability, math.exp(token.log_probability), rel_tol=1e-4)
    assert "".join(word.text for word in trace.words) == trace.answer


def test_a_prompt_without_pictures_is_refused(subject: Callable[..., Subject]) -> None:
    with pytest.raises(PromptError, match="shows no picture, so there is nothing to trace"):
        subject("linear", "language-stream").trace()


def test_an_answer_that_leaves_no_room_is_refused(subject: Callable[..., Subject]) -> None:
    with pytest.raises(PromptError, match=r"the answer to trace has \d+ tokens, and from 1 to \d+ are possible"):
        subject("linear", "language-stream").trace(image(32, 32), answer="cat " * 3000)


def test_pictures_of_one_pixel(subject: Callable[..., Subject]) -> None:
    trace = subject("linear", "language-stream").trace(image(1, 1), image(1, 50, 1), answer=" a")
    assert {(x.rows, x.columns) for x in trace.maps if x.picture == 0} == {(1, 1)}
    check_shares(trace)


def test_gates_of_any_fusion_are_listed() -> None:
    """A fusion of another package may have a gate outside of blocks."""
    gates = {"blocks.3.attn_gate": torch.tensor([1.0, -1.0]), "media_gate": torch.zeros(1)}
    first, second = list_gates(cast(Any, SimpleNamespace(gates=lambda: gates)))
    assert (first.layer, first.name, first.opening) == (0, "media_gate", 0.0)
    assert (second.layer, second.name) == (3, "attn_gate") and second.opening == pytest.approx(math.tanh(1))
