"""GOT-OCR 2.0, against Transformers' class and processor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.got_ocr2 import TOKENS, got_ocr2
from tests.support.photographs import photograph
from tests.support.published import VOCABULARY, rewrite_config, write_tokenizer
from tests.support.tiled import check_tiled
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError


def test_a_photograph(tmp_path):
    """The quick case of the tests below."""
    check_tiled(got_ocr2(tmp_path, size=64), ["4:1"], is_told=True)


@pytest.mark.matrix
def test_photographs_of_many_shapes(tmp_path):
    check_tiled(got_ocr2(tmp_path, size=64))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "changes",
    [
        {"is_tied": False},
        {"shard": "40KB"},
        {"size": 72},  # 9 patches of a side become 5 and then 3
        {"size": 40, "use_rel_pos": False},
        {"use_abs_pos": False, "qkv_bias": False, "layer_norm_eps": 1e-2},
        {"images": {"crop_to_patches": True}},  # the processor overrules it
        {"images": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}},
    ],
    ids=str,
)
def test_ways_to_write_it(tmp_path, changes):
    check_tiled(got_ocr2(tmp_path, **changes), ["3:2", "1:4"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)


@pytest.mark.matrix
def test_a_picture_is_cut_where_the_user_asks(tmp_path):
    imported = check_tiled(replace(got_ocr2(tmp_path, crops=True), over={"tiling": {"max_tiles": 12}}))
    assert "--set tiling.max_tiles=12" in imported.notes[1]
    assert imported.processor.image_processor.measure(400, 266).num_frames == 7


@torch.no_grad()
def test_the_chat_template_writes_what_the_processor_writes(tmp_path):
    case, picture = got_ocr2(tmp_path), photograph("3:2")
    imported, processor = import_checkpoint(tmp_path), case.processor.func
    tokenizer = imported.processor.tokenizer
    for question, is_formatted in (("\n OCR: ", False), ("\n OCR with format: ", True)):
        assert f"'<image>{question}'".replace("\n", "\\n") in imported.notes[0]
        _, (written,), *_ = processor.prepare_inputs_layout(picture, format=is_formatted, images_kwargs={})
        turn = {"role": "user", "content": f"<img><imgpad></img>{question}"}
        assert tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False) == written
    assert imported.model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]

    theirs = case.processor(images=picture, return_tensors="pt")
    turn = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "\n OCR: "}]}
    ours = imported.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=True, return_dict=True)
    expected, found = (x[0, -1, :VOCABULARY] for x in (case.model(**theirs).logits, imported.model(**ours).logits))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.matrix
def test_a_tokenizer_without_an_end_of_turns_keeps_its_own(tmp_path):
    got_ocr2(tmp_path)
    write_tokenizer(tmp_path, *TOKENS[:3], pad="w0")
    assert import_checkpoint(tmp_path).model.generation_config.eos_token_id is None


@pytest.mark.matrix
@pytest.mark.parametrize(
    "over",
    [
        {"vision_tokenizer": {"scale": 0.5}},
        {"vision_tokenizer": {"norm": "layer"}},
        {"tiling": {"picture_text": "</img>{views}<img>"}},
        {"tiling": {"picture_text": "{views}"}},
    ],
    ids=str,
)
def test_another_setting_is_noticed(tmp_path, over):
    with pytest.raises(AssertionError):
        check_tiled(replace(got_ocr2(tmp_path), over=over), ["3:2"])


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("processor_config.json", {"num_image_tokens": 9}, "sets num_image_tokens=9, and vlm does not know"),
        ("processor_config.json", {"image_processor": {"size": {"height": 9, "width": 9}}}, "the 32 pixels"),
        ("config.json", {"image_seq_length": 9, "vision_config": {"image_size": [32, 64]}}, "pixels; vlm cuts"),
    ],
)
def test_what_is_not_read(tmp_path, file, changes, words):
    got_ocr2(tmp_path)
    rewrite_config(tmp_path, file, **changes)
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(tmp_path)
