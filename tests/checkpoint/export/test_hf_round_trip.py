"""What is imported and exported again equals the original: tensors bit for bit, settings, and what both give."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.support import (
    deepseek_vl,
    fast_vlm,
    gemma,
    got_ocr2,
    grid_models,
    idefics,
    idefics3,
    llava,
    llava_next,
    ovis2,
    perception_lm,
    vipllava,
)
from tests.support.photographs import photograph
from tests.support.published import VOCABULARY
from vlm_cli.checkpoint.export.hf.classes import CLASSES
from vlm_cli.checkpoint.export.hf.write import export_hf
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import UsageError
from vlm_cli.trust import load_image_processor

#: Transformers' word for a class -> what writes a tiny checkpoint of it.
MADE: dict[str, Any] = {
    "llava": llava.huggingface,
    # Layers may be counted from the embeddings, too; they are written from the end.
    "vipllava": lambda folder, **more: vipllava.case(folder, vision_feature_layer=[-2, -5, -6, -4], **more),
    "llava_next": llava_next.llava_next,
    "llava_onevision": llava_next.llava_onevision,
    "internvl": grid_models.internvl,
    "idefics3": lambda folder, **more: idefics3.make(folder, "idefics3", **more),
    "smolvlm": lambda folder, **more: idefics3.make(folder, "smolvlm", **more),
    "paligemma": gemma.paligemma,
    "gemma3": gemma.gemma3,
    "cohere2_vision": grid_models.cohere2_vision,
    "aya_vision": grid_models.aya_vision,
    "qianfan_ocr": grid_models.qianfan_ocr,
    "llava_next_video": llava_next.llava_next_video,
    "deepseek_vl": deepseek_vl.deepseek_vl,
    "got_ocr2": lambda folder, **more: got_ocr2.got_ocr2(
        folder, size=128, patch_size=2, num_hidden_layers=1, global_attn_indexes=[], **more
    ),
    "perception_lm": perception_lm.case,
    "fast_vlm": fast_vlm.fast_vlm,
    "ovis2": ovis2.ovis2,
    "idefics": lambda folder, is_tied: idefics.huggingface(
        folder, bos="w1", tie_word_embeddings=is_tied, alpha_type="vector" if is_tied else "float"
    ),
}
#: Settings that name a writer, a dtype or padding, or that the class does not read (logit_scale), and change no output.
NO_MATTER = {"transformers_version", "dtype", "pad_token_id", "_pad_token_id", "_name_or_path", "image_seq_length"}
NO_MATTER |= {"logit_scale"}


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """The settings of the first configuration that the second has with another value."""
    if not isinstance(one, dict):
        return [] if one == other else [f"{path}: {one} -> {other}"]
    return [
        x
        for key in one.keys() - NO_MATTER
        for x in differences(one[key], (other or {}).get(key), f"{path}.{key}".lstrip("."))
    ]


@pytest.mark.sample(1)
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("kind", MADE)
def test_an_import_is_exported_as_it_was(tmp_path: Path, kind: str, is_tied: bool) -> None:
    if kind == "smolvlm":
        pytest.importorskip("num2words")
    if not hasattr(transformers, CLASSES[kind].model):
        pytest.skip(f"Transformers {transformers.__version__} has no {CLASSES[kind].model}")
    case = MADE[kind](tmp_path / "published", is_tied=is_tied)
    imported = import_checkpoint(case.source)
    assert imported.model is not None
    facts = export_hf(imported.model, imported.processor, tmp_path / "out")
    assert facts["class"] == CLASSES[kind].model and facts["largest_difference"] <= 1e-4
    # Where SmolVLM's processor cannot be made, Idefics3's class is written, and a note says what is missing.
    assert all("num2words" in note for note in facts["notes"]) and len(facts["notes"]) == (
        kind == "idefics3" and find_spec("num2words") is None
    )
    before, after = (load_file(x / "model.safetensors") for x in (tmp_path / "published", tmp_path / "out"))
    assert before.keys() == after.keys()
    other = [name for name, x in before.items() if not torch.equal(x, after[name])]
    if kind == "paligemma" and not is_tied:  # Gemma multiplies its rows, those of added tokens among them: they round
        table = other.pop()
        assert table.endswith("embed_tokens.weight")
        torch.testing.assert_close(after[table], before[table], rtol=2**-22, atol=0)
    if kind == "ovis2" and not is_tied:  # rows that the class reads from its visual vocabulary, and the import with it
        table, rows = other.pop(), slice(VOCABULARY + 1, VOCABULARY + 6)
        assert table.endswith("embed_tokens.weight")
        assert torch.equal(after[table][rows], before["model.visual_embeddings_table.weight"][-5:])
        before[table][rows] = after[table][rows]
        assert torch.equal(before[table], after[table])
    assert not other
    configs = [json.loads((x / "config.json").read_text()) for x in (tmp_path / "published", tmp_path / "out")]
    assert differences(*configs) == []
    if (tmp_path / "published" / "preprocessor_config.json").exists():
        photo = photograph("9:16")
        pixels = [
            load_image_processor(x)(images=[photo], return_tensors="pt")["pixel_values"]
            for x in (tmp_path / "published", tmp_path / "out")
        ]
        assert pixels[0].shape == pixels[1].shape or kind == "internvl"  # its own file does not cut; the processor does
        assert pixels[0].shape != pixels[1].shape or torch.equal(*pixels)


@pytest.mark.matrix
def test_ovis2_with_a_tokenizer_without_image(tmp_path: Path) -> None:
    """The class's processor searches prompts for `<image>`, which the import adds to such a tokenizer."""
    imported = import_checkpoint(ovis2.ovis2(tmp_path / "published", tokens=ovis2.TOKENS[:-1]).source)
    assert imported.model is not None
    facts = export_hf(imported.model, imported.processor, tmp_path / "out", name="ovis2")
    assert facts["largest_difference"] <= 1e-4


@pytest.mark.matrix
def test_idefics_needs_a_token_that_begins_a_text(tmp_path: Path) -> None:
    imported = import_checkpoint(idefics.huggingface(tmp_path / "published").source)
    assert imported.model is not None
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="begins each prompt with a BOS token, and the tokenizer has none"):
        export_hf(imported.model, imported.processor, tmp_path / "out", name="idefics")
    assert not [*(tmp_path / "out").iterdir()]


def test_each_class_exists() -> None:
    names = {word: (x.model, x.processor) for word, x in CLASSES.items()}
    absent = {word for word, pair in names.items() if not all(hasattr(transformers, name) for name in pair)}
    assert absent <= {"qianfan_ocr"}  # the oldest release may lack it
    assert MADE.keys() == CLASSES.keys()
