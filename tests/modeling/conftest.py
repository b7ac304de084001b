"""The models on which the invariants are tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.support import tiny
from tests.support.invariants import opened_of
from vlm_cli.modeling.vlm import VLM

#: Each language model once.
EACH = tiny.covering(fusions_each=1)
#: Each encoder, tokenizer and fusion, and each kind of language model: with learned positions, ALiBi, rotary positions,
#: a sliding window, projected embeddings, or a state instead of some of its attention or of all.
QUICK = [EACH[i] for i in (0, 9, 2, 11, 4, 13, 14, 15)]


def each_of(quick: Sequence[tuple[str, ...]]) -> list[Any]:
    """Two fusions for each language model; those that are not quick run with `-m matrix`."""
    return [
        pytest.param(parts, id="+".join(parts), marks=() if parts in quick else pytest.mark.matrix)
        for parts in tiny.covering()
    ]


@pytest.fixture(scope="module", params=each_of(QUICK))
def model(request: pytest.FixtureRequest) -> VLM:
    """One model for each part. Gates are open. Tests leave the model as it was."""
    return opened_of(*request.param)


@pytest.fixture(scope="module", params=each_of(EACH))
def model_of_each(request: pytest.FixtureRequest) -> VLM:
    """One model for each language model, as `model` gives them."""
    return opened_of(*request.param)
