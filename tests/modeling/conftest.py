"""The models on which the invariants are tested."""

from __future__ import annotations

import pytest

from tests.support import tiny
from tests.support.invariants import opened_of
from vlm_cli.modeling.vlm import VLM


@pytest.fixture(scope="module", params=tiny.covering(), ids="+".join)
def model(request: pytest.FixtureRequest) -> VLM:
    """Each language model, encoder and tokenizer with several fusions; gates open. Tests leave it as it was."""
    return opened_of(*request.param)
