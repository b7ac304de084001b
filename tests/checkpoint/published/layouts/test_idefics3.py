"""Idefics3 and SmolVLM, against Transformers' classes and processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.idefics3 import CLASSES, FENCE, PATCH, make
from tests.support.published import rewrite_config
from tests.support.tiled import check_tiled
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError


@pytest.mark.matrix
@pytest.mark.parametrize("kind", CLASSES)
def test_photographs_of_many_shapes(tmp_path: Path, kind: str) -> None:
    check_tiled(make(tmp_path, kind), is_told=True)


def test_a_photograph(tmp_path: Path) -> None:
    """The quick case of the two tests around it."""
    imported = check_tiled(make(tmp_path), ["4:1"])
    assert imported.model is not None
    texts = imported.model.config.tiling_texts
    ids = imported.processor.tokenizer.convert_tokens_to_ids(["\n\n", FENCE, "<global-img>"])
    assert texts[f"\n\n{FENCE}<global-img>"] == ids


@pytest.mark.matrix
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "changes",
    [
        {"is_tied": True},
        {"shard": "40KB"},
        {"edge": 32},
        {"edge": 120},
        {"tile": 19 * PATCH, "edge": 38 * PATCH, "shuffle": 1},  # rounding gives two patches the same row
    ],
    ids=str,
)
def test_ways_to_write_it(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    check_tiled(make(tmp_path, kind, **changes), ["3:2", "1:4"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"do_image_splitting": False}, "do_image_splitting=false"),
        ({"max_image_size": {"longest_edge": 64}}, r"tiles of 64 pixels .* its vision encoder reads 32"),
        ({"do_flip": True}, "do_flip=true"),
    ],
    ids=str,
)
def test_what_is_not_read(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    make(tmp_path)
    rewrite_config(tmp_path, "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(tmp_path)
