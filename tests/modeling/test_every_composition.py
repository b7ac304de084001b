"""Every combination of vision encoder, vision tokenizer, fusion and language model.

It takes minutes, so it runs only with `-m matrix`.
"""

from __future__ import annotations

import pytest

from tests.support import tiny
from tests.support.invariants import (
    check_against_bare,
    check_cached,
    check_gradients,
    check_rows,
    check_state,
    check_text_only,
)

# -- everything with everything ----------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("language_model", tiny.LANGUAGE_MODELS)
@pytest.mark.parametrize("fusion", tiny.FUSIONS)
@pytest.mark.parametrize("tokenizer", tiny.TOKENIZERS)
@pytest.mark.parametrize("vision", tiny.VISION)
def test_every_composition(vision, tokenizer, fusion, language_model):
    model = tiny.open_gates(tiny.build(vision, tokenizer, fusion, language_model))
    check_text_only(model)
    check_against_bare(model)
    check_cached(model)
    check_rows(model)
    check_state(model)
    check_gradients(model, model.config.composition.trainable, ["vision_encoder"])
