"""Rows of different lengths as one tensor, and the tokens that end an answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vlm_cli.modeling.batching import pad_left, stack_media
from vlm_cli.modeling.stop_tokens import stop_token_ids


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_rows_are_padded_at_the_left(kind):
    ids, mask = pad_left([kind([5, 6, 7]), kind([8])], pad=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.long


def test_no_rows_are_an_empty_batch():
    ids, mask = pad_left([], pad=0)
    assert ids.shape == mask.shape == (0, 0)


def test_media_of_different_lengths_are_padded_at_the_end():
    one, three, two = (torch.full((n, 4), float(n)) for n in (1, 3, 2))
    stacked, mask = stack_media([[one, three], [], [two]])
    assert stacked.shape == (3, 2, 3, 4)
    assert mask.tolist() == [
        [[True, False, False], [True, True, True]],
        [[False] * 3, [False] * 3],
        [[True, True, False], [False] * 3],
    ]
    assert torch.equal(stacked[0, 1], three) and torch.equal(stacked[2, 0, :2], two)
    assert not stacked[~mask].any()


def test_masks_of_media_stay():
    medium, mask = torch.ones(2, 4), torch.tensor([True, False])
    assert stack_media([[medium]], [[mask]])[1].tolist() == [[[True, False]]]


def test_no_media_have_the_shape_that_is_given():
    stacked, mask = stack_media([[], []], shape=(3, 8, 8))
    assert stacked.shape == (2, 0, 0, 3, 8, 8) and mask.shape == (2, 0, 0)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [((None,), ()), ((0,), (0,)), (([2, 7, 2],), (2, 7)), ((3, None, [4, 3]), (3, 4))],
    ids=str,
)
def test_stop_tokens_are_one_or_several(given, wanted):
    assert stop_token_ids(*(SimpleNamespace(eos_token_id=x) for x in given)) == wanted
    assert stop_token_ids(None, SimpleNamespace()) == ()
