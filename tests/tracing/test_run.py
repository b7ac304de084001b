"""Traces of tiny models of many compositions: what they hold, and that shares add up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.traced import Subject, clip, image
from vlm_cli.tracing.trace import Trace


def check_shares(trace: Trace) -> None:
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
            assert layer.kind == "layer" or text == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("fusion", ["cross-attention", "language-stream", "llama-cross-attention"])
@pytest.mark.parametrize("tokenizer", ["perceiver", "qformer", "linear", "mlp"])
def test_shares_of_attention_add_up(subject: Callable[..., Subject], tokenizer: str, fusion: str) -> None:
    trace = subject(tokenizer, fusion).trace(image(), clip(), image(20, 50, seed=2), cells=None)
    assert [picture.frame for picture in trace.pictures] == [None, 1, 2, 3, None]
    check_shares(trace)
