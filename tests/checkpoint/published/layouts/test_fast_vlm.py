"""FastVLM, against Transformers' class and processor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.fast_vlm import fast_vlm
from tests.support.published import rewrite_config
from tests.support.tiled import check_tiled
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import VLMError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return fast_vlm(tmp_path_factory.mktemp("fast_vlm"))


@pytest.mark.matrix
def test_a_photograph(made):
    check_tiled(made, ["3:2"], is_told=True)


@pytest.mark.matrix
def test_photographs_of_many_shapes(made):
    check_tiled(made)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "changes",
    [{"is_tied": True}, {"is_merged": False}, {"shard": "2MB"}, {"multimodal_projector_bias": False}],
    ids=str,
)
def test_ways_to_write_it(tmp_path, changes):
    check_tiled(fast_vlm(tmp_path, **changes), ["1:4"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)


@pytest.mark.matrix
@pytest.mark.parametrize("over", [{"vision_tokenizer": {"activation": "relu"}}, {"vision_tokenizer": {"scale": 1.5}}])
def test_another_setting_is_noticed(made, over):
    with pytest.raises(AssertionError):
        check_tiled(replace(made, over=over), ["3:2"])


def test_what_is_not_read(made):
    """An argument could make timm read a file."""
    config = made.source / "config.json"
    before = config.read_bytes()
    changed = {"model_type": "timm_wrapper", "architecture": "fastvit_t8", "model_args": {"checkpoint_path": "x.pth"}}
    try:
        for vision, words in (
            (changed, "would give timm's model checkpoint_path, and vlm gives it only sizes"),
            (
                {**changed, "model_args": None, "architecture": "hf-hub:a/b"},
                "may only be a name that timm itself has, but is 'hf-hub:a/b'",
            ),
        ):
            rewrite_config(made.source, vision_config=vision)
            with pytest.raises(VLMError, match=words):
                import_checkpoint(made.source)
    finally:
        config.write_bytes(before)
