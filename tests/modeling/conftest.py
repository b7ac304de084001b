"""The models on which the invariants are tested."""

from __future__ import annotations

import pytest

from tests.support import tiny
from tests.support.invariants import opened_of
from vlm_cli.modeling.vlm import VLM

QUICK = tiny.covering(fusions_each=1)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(parts, id="+".join(parts), marks=() if parts in QUICK else pytest.mark.matrix)
        for parts in tiny.covering()
    ],
)
def model(request: pytest.FixtureRequest) -> VLM:
    """Each language model, encoder and tokenizer, and with `-m matrix` each language model with a second fusion.

    Gates are open. Tests leave the model as it was.
    """
    return opened_of(*request.param)
