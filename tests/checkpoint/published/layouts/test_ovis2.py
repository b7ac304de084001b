"""Ovis2, against Transformers' class and processor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.ovis2 import TOKENS, VISION, ovis2
from tests.support.photographs import photograph
from tests.support.published import VOCABULARY, rewrite_config
from tests.support.tiled import check_tiled
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.doctor import check_invariants
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.vlm import VLM

GRID = {
    **{"type": "grid", "choose": "cover", "max_tiles": 6, "thumbnail": "first"},
    **{"picture_text": "<IMG_START>{views}<IMG_END>", "thumbnail_text": "{image}<IMG_GRID>"},
    **{"between_tiles_text": "<IMG_COL>", "between_rows_text": "<IMG_ROW>"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return ovis2(tmp_path_factory.mktemp("ovis2"))


def test_a_photograph(made):
    check_tiled(made, ["4:1"], is_told=True)


@pytest.mark.matrix
def test_photographs_of_many_shapes(made):
    check_tiled(made)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "changes",
    [
        {"is_tied": True},
        {"shard": "40KB"},
        {"hidden_stride": 1},
        {"tokens": TOKENS[:-1]},
        {"images": {"use_covering_area_grid": False, "min_patches": 2, "max_patches": 4}},
        {"images": {"crop_to_patches": False}},
        {"qkv_bias": True, "vocab_size": 40},
    ],
    ids=str,
)
def test_ways_to_write_it(tmp_path, changes):
    imported = check_tiled(ovis2(tmp_path, **changes), ["3:2", "tiny"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)
    table = imported.model.lang_model.get_input_embeddings().weight
    head = imported.model.lang_model.get_output_embeddings().weight
    announced = slice(VOCABULARY + 1, VOCABULARY + 6)
    assert not torch.equal(table[announced], head[announced])


def test_a_model_without_added_tokens_is_written_and_loaded(made, tmp_path):
    """The tokenizer has all tokens, `<image>` among them, so the tables of added tokens have no row."""
    imported = import_checkpoint(made.source)
    assert imported.model.added_tokens.num_tokens == 0
    imported.model.save_pretrained(tmp_path)
    loaded = VLM.from_pretrained(tmp_path).eval()
    inputs = imported.processor(text="w5 <image> w6", images=[photograph("3:2")])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, imported.model(**inputs).logits)
    checks = ("text-only", "saved")
    found = [x.verdict for x in check_invariants(loaded, checks, tokenizer=imported.processor.tokenizer)]
    assert found == ["holds", "holds"]


@pytest.mark.matrix
@pytest.mark.parametrize(
    "over",
    [
        {"vision_tokenizer": {"activation": "gelu"}},
        {"vision_tokenizer": {"hidden_norm": None}},
        {"vision_tokenizer": {"shuffle_order": "channels"}},
        {"vision_encoder": {"norm": False}},
        {"tiling": GRID | {"choose": "shape"}},
        {"tiling": GRID | {"between_rows_text": "<IMG_COL>"}},
        {"tiling": GRID | {"thumbnail": "last"}},
    ],
    ids=str,
)
def test_another_setting_is_noticed(made, over):
    with pytest.raises(AssertionError):
        check_tiled(replace(made, over=over), ["9:16", "3:2"])


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"vision_config": {**VISION, "tokenize_function": "st_argmax"}}, "builds only 'softmax'"),
        ("processor_config.json", {"image_seq_length": 5}, "4 vision tokens for each view, and its processor writes 5"),
    ],
)
def test_what_is_not_read(made, file, changes, words):
    before = (made.source / file).read_bytes()
    rewrite_config(made.source, file, **changes)
    try:
        with pytest.raises(CheckpointError, match=words):
            import_checkpoint(made.source)
    finally:
        (made.source / file).write_bytes(before)
