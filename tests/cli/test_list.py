"""`vlm list`: every name that can be composed, and what is said of it."""

from __future__ import annotations

import json

import open_clip
import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vlm_cli.composition import FAMILIES, UNSUITABLE_LANGUAGE_MODELS
from vlm_cli.registry import FUSIONS, VISION_TOKENIZERS

KINDS = {
    "families": set(FAMILIES),
    "vision-tokenizers": set(VISION_TOKENIZERS),
    "fusions": set(FUSIONS),
    "language-models": set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(UNSUITABLE_LANGUAGE_MODELS),
    "vision-encoders": set(open_clip.list_models()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_holds_all_its_names(vlm, kind):
    result = vlm("list", kind)
    assert result.exit_code == 0 and not result.stderr
    words = set(result.stdout.split())
    assert KINDS[kind] <= words
    assert set(json.loads(vlm("list", kind, "--json").stdout)) == KINDS[kind]


def test_everything_at_once(vlm):
    result = vlm("list")
    assert {"flamingo", "perceiver", "cross-attention"} <= set(result.stdout.split())
    assert f"vision-encoders: {len(KINDS['vision-encoders'])}" in result.stdout
    found = json.loads(vlm("list", "--json").stdout)
    assert {kind: set(names) for kind, names in found.items()} == KINDS


def test_a_word_narrows_the_list(vlm):
    names = vlm("list", "vision-encoders", "SIGLIP").stdout.split()
    assert "ViT-B-16-SigLIP" in names and all("siglip" in name.lower() for name in names)
    result = vlm("list", "vision-encoders", "zzz")
    assert result.exit_code == 0 and not result.stdout and "'zzz'" in result.stderr


def test_an_unknown_kind(vlm):
    result = vlm("list", "fusion")
    assert result.exit_code == 2 and "unknown kind 'fusion'. Did you mean 'fusions'?" in result.stderr
