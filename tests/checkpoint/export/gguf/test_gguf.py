"""`vlm export --format gguf`: what the two files hold, and that llama.cpp answers as the model does."""

from __future__ import annotations

import base64
import copy
import io
import json
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import disk, llama_cpp, tiny
from tests.support.disk import run
from vlm_cli.checkpoint import size_limits
from vlm_cli.checkpoint.export.gguf import comparing, exporting
from vlm_cli.checkpoint.export.gguf.checking import check_gguf
from vlm_cli.checkpoint.export.gguf.exporting import export_gguf, write_gguf
from vlm_cli.checkpoint.export.gguf.language_models import language_weights
from vlm_cli.checkpoint.export.gguf.llama_cpp import MARKER, ask_llama_cpp
from vlm_cli.checkpoint.export.gguf.projectors import PROJECTORS
from vlm_cli.checkpoint.saving import save
from vlm_cli.errors import CheckpointError, UsageError

#: What the projector types `internvl` and `gemma3` hold.
INTERNVL = {
    "tokenizer": {"type": "mlp", "norm": "layer", "pixel_shuffle": 2},
    "tower": disk.TOWER,
    "tiling": {"type": "none", "picture_text": "<img>{views}</img>"},
}
GEMMA3 = {
    "tokenizer": {"type": "linear", "bias": False, "pool": 2, "norm": "gemma", "norm_eps": 1e-6},
    "mask": "image",
    "tiling": {"type": "none", "picture_text": "<start_of_image>{views}<end_of_image>"},
}
_FENCE = "<fake_token_around_image>"
#: What `idefics3` holds, with tiles of 32 pixels.
IDEFICS3 = {
    "tokenizer": {"type": "linear", "bias": False, "pixel_shuffle": 2},
    "tower": {"model_cfg": llama_cpp.SIGLIP, "preprocess_cfg": {"size": 32, "interpolation": "lanczos"}},
    "tiling": {
        "type": "split",
        "longest_edge": 96,
        "tile_text": f"{_FENCE}<row_{{row}}_col_{{column}}>{{image}}",
        "row_end_text": "\n",
        "thumbnail_text": f"\n{_FENCE}<global-img>{{image}}{_FENCE}",
    },
    "added_tokens": [_FENCE, "<global-img>", "\n\n", "<image>"],
}
#: What `lfm2` holds: 8 rows of vision tokens.
LFM2 = {
    "tokenizer": {"type": "mlp", "pixel_shuffle": 2},
    "tower": llama_cpp.SIGLIP_OF_MANY_PATCHES,
    "tiling": {"type": "none", "picture_text": "<|image_start|>{views}<|image_end|>"},
}
needs_llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def made(folder):
    """A model like LLaVA with SigLIP, and its processor."""
    return llama_cpp.make(folder)


@pytest.fixture(scope="module")
def written(folder, made) -> Path:
    (folder / "f32").mkdir()
    write_gguf(*made, folder / "f32", name="my model", out_type="f32")
    return folder / "f32"


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return {x.name: torch.from_numpy(x.data.copy()) for x in gguf.GGUFReader(file).tensors}


# -- what the files hold -----------------------------------------------------------------------------------------------


def test_transformers_reads_the_language_model_back(made, written):
    model, processor = made
    file = "my-model-F32.gguf"
    back = AutoModelForCausalLM.from_pretrained(written, gguf_file=file, dtype=torch.float32)
    ids = processor.tokenizer("A cat sits on the mat.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = model.lang_model(ids).logits, back(ids).logits
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
        with tiny.nudged(back.model.layers[0].self_attn.q_proj.weight):
            assert (back(ids).logits - ours).abs().max() > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(written, gguf_file=file)
    assert tokenizer("A cat sits on the mat.")["input_ids"] == ids[0].tolist()
    held = gguf.GGUFReader(written / file).fields["tokenizer.ggml.tokens"].contents()
    assert len(held) == model.config.first_added_id and "<image>" not in held  # the model never writes it, nor <pad>


def test_the_vision_side_has_the_keys_that_llama_cpp_asks_for(written):
    fields = gguf.GGUFReader(written / "mmproj-my-model-F32.gguf").fields
    read = {key: fields[key].contents() for key in fields if key.startswith("clip.")}
    assert read["clip.projector_type"] == "mlp" and read["clip.has_vision_encoder"] is True
    assert (read["clip.vision.image_size"], read["clip.vision.patch_size"]) == (32, 8)
    assert (read["clip.vision.block_count"], read["clip.vision.feature_layer"]) == (3, [3])
    assert (read["clip.vision.attention.head_count"], read["clip.vision.projection_dim"]) == (3, 64)


def test_a_linear_map_is_written_as_two_with_a_gelu_between(folder, tmp_path):
    model, processor = llama_cpp.make(folder, "linear")
    files = write_gguf(model, processor, tmp_path, name="x", out_type="f32")
    held = tensors(tmp_path / files["mmproj"])
    x = torch.randn(5, 48)
    hidden = torch.nn.functional.gelu(x @ held["mm.0.weight"].T + held["mm.0.bias"])
    with torch.no_grad():
        torch.testing.assert_close(hidden @ held["mm.2.weight"].T + held["mm.2.bias"], model.vision_tokenizer.proj(x))


def test_layers_that_nothing_reads_are_left_out(folder, tmp_path):
    model, processor = llama_cpp.make(folder, encoder={"layer": -2})
    files = write_gguf(model, processor, tmp_path, name="x", out_type="f32")
    held = tensors(tmp_path / files["mmproj"])
    assert "v.blk.1.ln1.weight" in held and "v.blk.2.ln1.weight" not in held and "v.post_ln.weight" not in held


def test_a_class_token_that_stands_last_keeps_its_position(folder, tmp_path):
    model, processor = llama_cpp.make(folder, **INTERNVL)
    files = write_gguf(model, processor, tmp_path, name="x", out_type="f32")
    held, visual = tensors(tmp_path / files["mmproj"]), model.vision_encoder.visual
    positions = visual.positional_embedding.detach()
    torch.testing.assert_close(held["v.position_embd.weight"], torch.cat([positions[1:], positions[:1]]))
    assert files["projector"] == "internvl" and held["v.class_embd"].shape == (48,)


@pytest.mark.parametrize(
    ("out_type", "kinds"), [("f16", {"F16", "F32"}), ("bf16", {"BF16", "F32"}), ("q8_0", {"Q8_0", "F16", "F32"})]
)
def test_matrices_have_the_type_and_norms_stay_exact(made, tmp_path, out_type, kinds):
    files = write_gguf(*made, tmp_path, name="x", out_type=out_type)
    held = [x for name in ("language_model", "mmproj") for x in gguf.GGUFReader(tmp_path / files[name]).tensors]
    assert {x.tensor_type.name for x in held} == kinds
    assert all(x.tensor_type.name == "F32" for x in held if "norm" in x.name or "ln" in x.name)


def test_a_weight_that_float16_does_not_hold(made, tmp_path):
    model, processor = made
    refused = pytest.raises(CheckpointError, match=r"ffn_up.weight has values up to .*Choose --outtype bf16 or f32")
    with tiny.nudged(model.lang_model.model.layers[0].mlp.up_proj.weight, by=1e5), refused:
        write_gguf(model, processor, tmp_path, name="x", out_type="f16")


def resized(mode: str, by: str, fill: tuple[int, int, int]) -> PreprocessCfg:
    return PreprocessCfg(size=32, resize_mode=mode, interpolation=by, fill_color=fill)


def test_the_export_says_which_pictures_llama_cpp_resizes_otherwise():
    grey = (122, 116, 104)
    assert PROJECTORS["mlp"].picture_note(resized("longest", "bicubic", grey), 32, 32) is None
    assert PROJECTORS["gemma3"].picture_note(resized("longest", "bilinear", (0, 0, 0)), 32, 32) is None
    for other in (resized("squash", "bicubic", grey), resized("longest", "bilinear", grey)):
        assert "make pictures 32x32" in PROJECTORS["mlp"].picture_note(other, 32, 32)
    for name, words in (
        ("internvl", "shows a picture twice if it is wider or higher than 32 pixels"),
        ("idefics3", "pictures whose longer side has 96 pixels, and whose shorter side has a multiple of 32"),
        ("lfm2", "keeps the shape of a picture that is not square"),
    ):
        assert words in PROJECTORS[name].picture_note(resized("longest", "bicubic", grey), 32, 96)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"fusion": "cross-attention"}, "fusion is cross-attention; it would have to be language-stream"),
        ({"tokenizer": "perceiver"}, "as mlp, vision_tokenizer is perceiver; it would have to be linear or mlp"),
        ({"tokenizer": {"type": "mlp", "map_depth": 3}}, "vision_tokenizer.map_depth is 3; it would have to be 2"),
        ({"vision": "vit"}, "the vision encoder has a class token, which llama.cpp puts behind the patches"),
        ({"vision": "convnext"}, "the vision encoder is ConvNeXt; it would have to be a plain vision transformer"),
        ({"language_model": "mamba"}, "the language model is of type mamba; it would have to be llama, mistral"),
        ({"language_model": "mistral"}, "sliding_window is 5 tokens; it would have to be none"),
    ],
)
def test_what_llama_cpp_cannot_hold(parts, problem):
    given = {"vision": "vit", "tokenizer": "mlp", "fusion": "language-stream", "language_model": "llama", **parts}
    with pytest.raises(UsageError, match=problem):
        check_gguf(tiny.config(**given))


@pytest.mark.parametrize(
    ("parts", "changes", "problem"),
    [
        (
            IDEFICS3,
            {"longest_edge": 90},
            "longest_edge is 90; it would have to be a multiple of the 32 pixels of a",
        ),
        (IDEFICS3, {"longest_edge": 32}, "longest_edge is 32; it would have to be a multiple .* from 64 to 4096"),
        (IDEFICS3, {"enlarge": False}, "as idefics3, tiling.enlarge is False; it would have to be True"),
        (IDEFICS3, {"row_end_text": ""}, "as idefics3, tiling.row_end_text is ''; it would have to be"),
        ({**IDEFICS3, "added_tokens": ["<image>"]}, {}, "<global-img> or two newlines for several tokens each"),
        ({**IDEFICS3, "tower": llama_cpp.SIGLIP}, {}, "resized by bicubic; it would have to be lanczos"),
        ({**LFM2, "tower": llama_cpp.SIGLIP}, {}, "as lfm2, the vision tokens of a picture have 2 rows; .* 8 to 16"),
    ],
)
def test_what_the_types_with_pixel_shuffle_cannot_hold(folder, parts, changes, problem):
    model, _ = llama_cpp.make(folder, **{**parts, "tiling": {**parts["tiling"], **changes}})
    with pytest.raises(UsageError, match=problem):
        check_gguf(model.config)


def test_a_type_that_llama_cpp_lacks(tmp_path):
    result = run("export", "demo", tmp_path / "out", "--format", "gguf", "--outtype", "q9_9")
    assert result.exit_code == 2 and "--outtype is 'q9_9'; vlm writes f32, f16, bf16, q8_0." in result.stderr
    assert "llama-quantize" in result.stderr and not (tmp_path / "out").exists()
    result = run("export", "demo", tmp_path / "out", "--format", "delta", "--outtype", "f32")
    assert result.exit_code == 2 and "--outtype is for --format gguf" in result.stderr


def test_without_llama_cpp_the_command_says_what_it_did_not_check(made, tmp_path, monkeypatch):
    save(*made, tmp_path / "model")
    monkeypatch.setattr(comparing, "llama_cpp_version", lambda: None)
    result = run("export", tmp_path / "model", tmp_path / "out", "--format", "gguf", "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["files"]) >= {"out-F16.gguf", "mmproj-out-F16.gguf"}
    assert "their answers are not compared" in result.stderr and "pip install 'vlm-cli[gguf]'" in result.stderr


def test_a_model_too_large_to_compare_is_written_without_a_check(made, tmp_path, monkeypatch):
    save(*made, tmp_path / "model")
    monkeypatch.setattr(comparing, "llama_cpp_version", lambda: "1")
    monkeypatch.setattr(size_limits, "_free_memory", lambda: 1000)
    words = ["export", tmp_path / "model", tmp_path / "out", "--format", "gguf"]
    result = run(*words)
    assert result.exit_code == 1 and "GB are free. Nothing was written." in result.stderr
    assert "add --no-check" in result.stderr and not (tmp_path / "out").exists()
    result = run(*words, "--no-check", "--json")
    assert result.exit_code == 0 and "Note: nothing was checked" in result.stderr
    assert "largest_difference" not in json.loads(result.stdout) and (tmp_path / "out" / "out-F16.gguf").exists()
    result = run("export", tmp_path / "model", tmp_path / "other", "--format", "delta", "--no-check")
    assert result.exit_code == 2 and "--no-check is for --format gguf" in result.stderr


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.matrix
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"tokenizer": "linear", "model_type": "qwen3"},
        {"model_type": "qwen2", "encoder": {"layer": [-2, -1]}},
        {"model_type": "mistral", "encoder": {"layer": -2}},
        {"model_type": "gemma2"},
        {"model_type": "phi3"},
        {"model_type": "smollm3"},
        {"model_type": "olmo2"},
        {"model_type": "seed_oss"},
        {"model_type": "gemma"},
        {**INTERNVL, "encoder": {"layer": -2}},
        {**GEMMA3, "model_type": "gemma3_text"},
        IDEFICS3,
        {**LFM2, "tokenizer": {"type": "linear", "pixel_shuffle": 2, "norm": "layer"}},
        LFM2,
    ],
)
def test_llama_cpp_answers_as_the_model_does(folder, tmp_path, parts):
    facts = export_gguf(*llama_cpp.make(folder, **parts), tmp_path, name="x", out_type="f32")
    assert facts["largest_difference"] < 5e-4 and facts["equal_tokens"]["text"] == 16


def test_layers_without_rotation_must_be_those_of_smollm3(folder):
    model, _ = llama_cpp.make(folder, model_type="smollm3")
    check_gguf(model.config)
    model.config.text_config.no_rope_layers = [1, 1, 1, 1]
    with pytest.raises(UsageError, match="no_rope_layers differ from SmolLM3's"):
        check_gguf(model.config)


def test_a_head_that_llama_cpp_has_no_place_for(folder):
    """Its Gemma 2 reads the table as the head, which has no rows for tokens that the model has added."""
    model, _ = llama_cpp.make(folder, model_type="gemma2")
    assert "output.weight" not in language_weights(model, [])
    with pytest.raises(UsageError, match="gemma2 has no head beside its table, and this model has one, for 1 added"):
        language_weights(model, [model.config.first_added_id])


@needs_llama_cpp
@pytest.mark.matrix
@pytest.mark.parametrize(
    "spoiled", ["v.blk.0.attn_q.weight", "v.position_embd.weight", "mm.2.weight", "output_norm.weight"]
)
def test_a_file_that_differs_is_not_written(made, tmp_path, monkeypatch, spoiled):
    save(*made, tmp_path / "model")
    write = exporting.write_file

    def spoil(path, arch, weights, *args, **keywords):
        return write(path, arch, {k: x.flip(0) if k == spoiled else x for k, x in weights.items()}, *args, **keywords)

    monkeypatch.setattr(exporting, "write_file", spoil)
    result = run("export", tmp_path / "model", tmp_path / "out", "--format", "gguf", "--outtype", "f32")
    assert result.exit_code == 1 and "llama.cpp, about a" in result.stderr and "Nothing was written" in result.stderr
    assert not (tmp_path / "out").exists()


@needs_llama_cpp
@pytest.mark.matrix
def test_a_chat_template_that_llama_cpp_writes_otherwise(made, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "write_chat_template", lambda processor: "{{ messages[0]['content'] }}!")
    with pytest.raises(CheckpointError, match=r"llama\.cpp writes a message with a picture as"):
        export_gguf(*made, tmp_path, name="x", out_type="f32")


@pytest.mark.parametrize(("behind", "is_told"), [("", False), (" ", True)])
def test_what_a_template_writes_around_an_image_is_told(made, tmp_path, behind, is_told):
    model, processor = made[0], copy.deepcopy(made[1])
    processor.tokenizer.chat_template = (
        "{% for m in messages %}{% for p in m['content'] %}"
        f"{{{{ '<image>{behind}' if p['type'] == 'image' else p['text'] }}}}{{% endfor %}}{{% endfor %}}"
    )
    notes = export_gguf(model, processor, tmp_path, name="x", out_type="f32", check=False)["notes"]
    assert any("around an image" in note for note in notes) == is_told


@pytest.mark.parametrize("text_begins", [False, True])
@pytest.mark.parametrize("chat_begins", [False, True])
def test_both_texts_and_chats_must_begin_with_the_first_token(made, text_begins, chat_begins):
    processor = copy.deepcopy(made[1])
    if text_begins:
        template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        processor.tokenizer.backend_tokenizer.post_processor = template
    processor.tokenizer.chat_template = "{{ bos_token }}" * chat_begins + "{{ messages[0]['content'] }}"
    assert exporting.begins_with_bos(processor) == (text_begins and chat_begins)


@needs_llama_cpp
@pytest.mark.matrix
@pytest.mark.parametrize(("projector", "parts"), [("mlp", {}), ("gemma3", GEMMA3)])
def test_pictures_get_the_bars_that_the_note_names(folder, tmp_path, projector, parts):
    model, processor = llama_cpp.make(folder, **parts)
    files = write_gguf(model, processor, tmp_path, name="x", out_type="f32")
    chosen = PROJECTORS[projector]
    small = torch.randint(256, (6, 6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(small.numpy()).resize((64, 48), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (32, 32), chosen.bars)
    square.paste(picture.resize((32, 24), Image.Resampling[chosen.filter.upper()]), (0, 4))
    pairs = [(MARKER + "A", encoded(picture)), (MARKER + "A", encoded(square))]
    names = tmp_path / files["language_model"], tmp_path / files["mmproj"]
    (given, made), _ = ask_llama_cpp(*names, pairs, num_tokens=8, top=64)
    assert given.tokens == made.tokens and given.num_prompt == made.num_prompt
    plain = picture.resize((32, 32))
    (other,), _ = ask_llama_cpp(*names, [(MARKER + "A", encoded(plain))], num_tokens=8, top=64)
    assert other.tokens != given.tokens


def encoded(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
