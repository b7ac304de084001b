"""The rollout against a sum over all paths, one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from vlm_cli.tracing.rollout import Block, Layer, normalised, roll_out, roll_out_latents, roll_out_queries

T, S = 4, 3


def causal() -> Tensor:
    return normalised(torch.rand(T, T).tril())


def layers(opening: float = 0.5) -> list[Layer]:
    block = normalised(torch.rand(T, S))
    block[0] = 0  # before the first medium
    return [Layer(causal(), Block(block, opening)), Layer(None), Layer(causal()), Layer(causal(), Block(block, 0.9))]


def walk(stack: list[Layer], row: int) -> tuple[Tensor, Tensor]:
    """Follow every path from a position downwards, and add up its product."""
    text, media = torch.zeros(T), torch.zeros(S)

    def step(depth: int, at: int, share: float) -> None:
        if depth < 0:
            text[at] += share
            return
        layer = stack[depth]
        for before in range(T):
            stays = 1.0 if before == at else 0.0
            own = 2 * stays if layer.weights is None else stays + float(layer.weights[at, before])
            passed = share * own / 2
            if not passed:
                continue
            if layer.block is not None:
                seen = layer.block.opening * float(layer.block.weights[before].sum())
                for s in range(S):
                    media[s] += passed * layer.block.opening * float(layer.block.weights[before, s]) / (1 + seen)
                passed /= 1 + seen
            step(depth - 1, before, passed)

    step(len(stack) - 1, row, 1.0)
    return text, media


def test_a_rollout_is_the_sum_of_all_paths() -> None:
    stack = layers()
    text, media = roll_out(stack, [1, 3])
    for i, row in enumerate((1, 3)):
        for found, expected in zip((text[i], media[i]), walk(stack, row), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(text.sum(-1) + media.sum(-1), torch.ones(2))


def test_a_closed_gate_lets_nothing_through() -> None:
    closed = [Layer(x.weights, x.block and Block(x.block.weights, 0.0)) for x in layers()]
    assert not roll_out(closed, [3])[1].any()


@pytest.mark.parametrize("opening", [0.1, 0.6])
def test_an_open_gate_counts_by_its_opening(opening: float) -> None:
    only = [Layer(None, Block(normalised(torch.rand(T, S)), opening))]
    text, media = roll_out(only, [2])
    torch.testing.assert_close(media.sum() / text.sum(), torch.tensor(opening))


def test_latents_and_queries() -> None:
    n, read = 2, 3
    first, second = (normalised(torch.rand(n, read + n)) for _ in range(2))
    expected = torch.zeros(n, read)
    for i, p in itertools.product(range(n), range(read)):
        # A latent has what it was, or what it read, or what another latent had of the layer before.
        after_first = [float(first[j, p]) / 2 for j in range(n)]
        through = sum(float(second[i, read + j]) * after_first[j] for j in range(n))
        expected[i, p] = (after_first[i] + float(second[i, p]) + through) / 2
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(roll_out_latents([first, second], read), expected, atol=1e-6, rtol=0)
    own, cross = normalised(torch.rand(n, n)), normalised(torch.rand(n, read))
    queries = roll_out_queries([(own, cross), (own, None)])
    expected = cross / 2
    expected = (expected + own @ expected) / 2
    torch.testing.assert_close(queries, expected / expected.sum(-1, keepdim=True), atol=1e-6, rtol=0)
