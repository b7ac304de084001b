"""LLaVA-NeXT and LLaVA-OneVision, against Transformers' classes and processors."""

from __future__ import annotations

import pytest

from tests.support.llava_next import PINPOINTS, llava_next, llava_onevision
from tests.support.published import rewrite_config
from tests.support.tiled import check_tiled
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError

MADE = {"llava_next": llava_next, "llava_onevision": llava_onevision}


@pytest.mark.matrix
@pytest.mark.parametrize("kind", MADE)
def test_photographs_of_many_shapes(tmp_path, kind):
    check_tiled(MADE[kind](tmp_path), is_told=True)


def test_a_panorama(tmp_path):
    """The quick case of the two tests around it: its tiles shrink."""
    check_tiled(llava_onevision(tmp_path), ["4:1"])


@pytest.mark.matrix
@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("changes", [{"is_tied": True}, {"shard": "40KB"}, {"vision_feature_layer": -2}], ids=str)
def test_ways_to_write_it(tmp_path, kind, changes):
    imported = check_tiled(MADE[kind](tmp_path, **changes), ["3:2", "1:4"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)
    assert imported.model.config.composition.tiling.options.unpad


def test_pinpoints_that_differ_are_refused(tmp_path):
    llava_next(tmp_path)
    rewrite_config(tmp_path, "preprocessor_config.json", image_grid_pinpoints=PINPOINTS[:2])
    with pytest.raises(CheckpointError, match="other image_grid_pinpoints"):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_feature_layer": [-2, -1]}, r"layers \[-2, -1\]"),
        ({"vision_aspect_ratio": "anyres"}, "anyres_max_ and"),
    ],
)
def test_what_is_not_read(tmp_path, changes, words):
    llava_onevision(tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(tmp_path)
