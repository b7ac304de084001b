"""BLIP-2 in the layouts of Transformers and LAVIS, against Transformers' own class.

The class is what LAVIS's published weights were converted to; the generator below undoes that conversion
(transformers/models/blip_2/convert_blip_2_original_to_pytorch.py).
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm.models
import torch
from safetensors.torch import load_file
from timm.models.eva import Eva
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig, OPTForCausalLM, T5Config

from tests.support.grid import first_of
from tests.support.published import (
    SIZE,
    VOCABULARY,
    Case,
    check,
    load,
    prompt,
    rewrite,
    rewrite_config,
    shapes_of,
    sized,
    write_tokenizer,
)
from tests.support.swaps import check_swap, other_parts
from tests.support.tiny import stir
from vlm_cli.checkpoint.published.recognising import recognise
from vlm_cli.checkpoint.published.towers import eva
from vlm_cli.checkpoint.published.towers.eva import EvaTower
from vlm_cli.composition import CompositionRequest
from vlm_cli.errors import CheckpointError, VLMError
from vlm_cli.modeling.vlm import VLM

IMAGE = VOCABULARY
QUERIES = 3
DIM = 128  # of the Q-Former: two heads of BERT's 64 channels
TOWER = "tiny_eva_giant"


@timm.models.register_model
def tiny_eva_giant(pretrained: bool = False, **kwargs: Any) -> Eva:
    """`eva_giant_patch14_224` with other sizes, and one block more than BLIP-2 keeps."""
    sizes = {"img_size": SIZE, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
    return timm.models.build_model_with_cfg(Eva, TOWER, pretrained, **{**sizes, **kwargs})


@pytest.fixture(autouse=True)
def tiny_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = EvaTower(openclip="tiny-eva", timm=TOWER, embed_dim=24, num_heads=2, image_size=SIZE)
    monkeypatch.setitem(eva.EVA_TOWERS, (32, 64, 16), tower)


def config(media_id: int | None = IMAGE, vocab_size: int = VOCABULARY + 8, **vision: Any) -> Blip2Config:
    """Write a BLIP-2 whose language model has padded tables, as the newer published files do."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 16,
    }
    return Blip2Config(
        vision_config={**sizes, **vision},
        qformer_config={
            "hidden_size": DIM,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "cross_attention_frequency": 2,
        },
        text_config=text_config(vocab_size).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=media_id,
    )


def text_config(vocab_size: int = VOCABULARY) -> OPTConfig:
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def model(settings: Blip2Config) -> Blip2ForConditionalGeneration:
    theirs = stir(Blip2ForConditionalGeneration(settings), seed=5)
    with torch.no_grad():
        for layer in theirs.vision_model.encoder.layers:  # EVA trains no bias of keys
            layer.self_attn.qkv.bias[32:64] = 0
    return theirs


def case(source: Path, theirs: Blip2ForConditionalGeneration, **settings: Any) -> Case:
    has_media_token = theirs.config.image_token_index is not None

    @torch.no_grad()
    def logits(lang_x: Tensor, vision_x: Tensor) -> Tensor:
        """Run Transformers' model: a media token for each query, or features before the text without such a token."""
        counts = torch.where(lang_x[0] == IMAGE, QUERIES, 1)
        ids, pixels = lang_x[0].repeat_interleave(counts)[None], vision_x[0, :, 0]
        if has_media_token:
            found = theirs(pixel_values=pixels, input_ids=ids).logits
        else:
            assert (lang_x[0] == IMAGE).nonzero().flatten().tolist() == [0]
            text = theirs.language_model.get_input_embeddings()(lang_x[:, 1:])
            features = theirs.get_image_features(pixels).pooler_output
            found = theirs.language_model(inputs_embeds=torch.cat([features, text], dim=1)).logits
        return found[0, counts.cumsum(0) - 1, :VOCABULARY]

    return Case(source=source, logits=logits, made_by="Transformers' Blip2ForConditionalGeneration", **settings)


def huggingface(folder: Path, settings: Blip2Config | None = None) -> Case:
    theirs = model(settings or config())
    theirs.save_pretrained(folder)
    write_tokenizer(folder, *(["<image>"] if theirs.config.image_token_index else []), pad="w0")
    return case(folder, theirs)


def lavis_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Invert the published conversion; BERT's buffer of positions stays in the file."""
    renames = (
        (r"vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
        (r"vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
        (r"vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
        (r"vision_model\.post_layernorm", "ln_vision"),
        (r"vision_model\.encoder\.layers", "visual_encoder.blocks"),
        (r"layer_norm([12])", r"norm\1"),
        (r"self_attn\.qkv", "attn.qkv"),
        (r"self_attn\.projection", "attn.proj"),
        (r"^qformer\.layernorm", "Qformer.bert.embeddings.LayerNorm"),
        (r"attention\.attention", "attention.self"),
        (r"^qformer", "Qformer.bert"),
        (r"language_projection", "opt_proj"),
        (r"^language_model", "opt_model"),
    )
    found = {"Qformer.bert.embeddings.position_ids": torch.arange(8)[None]}
    for name, x in tensors.items():
        for pattern, replacement in renames if not name.startswith("language_model") else renames[-1:]:
            name = re.sub(pattern, replacement, name)
        if name.endswith("attn.qkv.bias"):
            q, _, v = x.chunk(3)
            found |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            found[name] = x
    return found


#: What LAVIS saves: all, all but the language model (a tower that was trained), or what trains over both.
HELD = {"whole": "", "tower": r"opt_model\.", "trained": r"opt_model\.|visual_encoder\."}


def lavis(folder: Path, held: str, **more: Tensor) -> Case:
    theirs = model(config(None, VOCABULARY))
    language_model = folder / "opt"
    theirs.language_model.save_pretrained(language_model)
    write_tokenizer(language_model, pad="w0")
    tensors = lavis_names(theirs.state_dict())
    kept = {k: x for k, x in tensors.items() if not (HELD[held] and re.match(HELD[held], k))}
    torch.save({"model": {**kept, **more}, "iteration": 5}, folder / "blip2.pth")
    overrides = []
    if held == "trained":
        overrides = tower_files(folder, tensors)
    options = CompositionRequest(language_model=str(language_model), overrides=overrides)
    return case(folder / "blip2.pth", theirs, options=options)


def tower_files(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """Write the tower as OpenCLIP has it, with the block and the norm that BLIP-2 drops."""
    vision_cfg = {"image_size": SIZE, "timm_model_name": TOWER, "timm_pool": "token", "timm_proj": None}
    settings = {"embed_dim": 24, "vision_cfg": vision_cfg, "text_cfg": {}}
    (folder / "tower.json").write_text(json.dumps(settings))
    visual = open_clip.model._build_vision_tower(24, open_clip.CLIPVisionCfg(**vision_cfg))
    mine = {k.removeprefix("visual_encoder."): x for k, x in tensors.items() if k.startswith("visual_encoder.")}
    assert not visual.trunk.load_state_dict(mine, strict=False).unexpected_keys
    torch.save({f"visual.{k}": x for k, x in visual.state_dict().items()}, folder / "tower.pt")
    return [
        f"vision_encoder.name={folder / 'tower.json'}",
        f"vision_encoder.pretrained={folder / 'tower.pt'}",
        # Another name brings none of the old settings.
        "vision_encoder.depth=3",
        "vision_encoder.class_token=true",
        "vision_encoder.norm=true",
    ]


@pytest.mark.parametrize("num_media", first_of([2, 1]))
def test_huggingface(tmp_path, num_media):
    found = huggingface(tmp_path)
    check(found, num_media, is_told=num_media == 2)
    imported = load(found)
    assert imported.layout.name == "BLIP-2 (Hugging Face)"
    assert imported.model.config.media_token_id == IMAGE
    assert imported.model.config.composition.vision_encoder.depth == 3
    rows = load_file(tmp_path / "model.safetensors")["language_model.model.decoder.embed_tokens.weight"]
    assert torch.equal(imported.model.added_tokens.embedding.weight[0], rows[IMAGE])
    assert torch.equal(imported.model.added_tokens.head.weight[0], rows[IMAGE])  # tied


@pytest.mark.matrix
@pytest.mark.parametrize("vocab_size", first_of([VOCABULARY, VOCABULARY + 8]))
def test_huggingface_before_media_tokens(tmp_path, vocab_size):
    """Older files have no id for `<image>`, and some have no row for it."""
    check(huggingface(tmp_path, config(None, vocab_size)), 1)


@pytest.mark.matrix
def test_bias_of_keys_changes_nothing(tmp_path):
    """timm has no bias of keys, and a file that holds one gives equal logits."""
    found = huggingface(tmp_path)

    def fill_in(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        biases = [x for name, x in tensors.items() if name.endswith("qkv.bias")]
        for bias in biases:
            bias[32:64] = torch.randn(32)
        return tensors

    rewrite(tmp_path, fill_in)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    check(replace(found, logits=case(tmp_path, theirs).logits))


@pytest.mark.matrix
def test_other_image_size(tmp_path):
    """The models tuned on COCO read images of 364 pixels instead of 224."""
    found = huggingface(tmp_path, config(image_size=2 * SIZE))
    check(found)
    assert load(found).model.vision_encoder.image_size == (2 * SIZE, 2 * SIZE)


@pytest.mark.matrix
@pytest.mark.parametrize("held", first_of(HELD))
def test_lavis(tmp_path, held):
    found = lavis(tmp_path, held)
    check(found, 1)
    imported = load(found)
    assert imported.layout.name == "BLIP-2 (LAVIS)"
    assert ("vision_encoder.visual.trunk.cls_token" in imported.report.absent) == (held == "trained")
    assert "vision_encoder.visual.trunk.norm.weight" in imported.report.loaded
    assert any("does not hold the vision encoder" in note for note in imported.notes) == (held == "trained")


@pytest.mark.matrix
@torch.no_grad()
def test_built_directory(vlm, tmp_path):
    """A written directory loads as the same model, with its shortened tower."""
    found = huggingface(tmp_path / "published")
    result = vlm("build", tmp_path / "ours", "--from", tmp_path / "published")
    assert result.exit_code == 0, result.stderr
    imported, built = load(found).model, VLM.from_pretrained(tmp_path / "ours").eval()
    lang_x, vision_x = prompt(imported, 1)
    ours, theirs = (model(lang_x=lang_x, vision_x=vision_x).logits for model in (imported, built))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_lavis_over_another_width_is_named(tmp_path):
    found = lavis(tmp_path, "trained")
    other = OPTForCausalLM(OPTConfig(**{**text_config().to_dict(), "hidden_size": 48, "word_embed_proj_dim": 48}))
    other.save_pretrained(tmp_path / "opt")
    report = load(found).report
    assert report.mismatched == {"opt_proj.weight": ([32, DIM], [48, DIM]), "opt_proj.bias": ([32], [48])}


@pytest.mark.matrix
def test_lavis_text_branch(tmp_path):
    """A file may hold the Q-Former's layers for text, which a VLM does not need."""
    text = "Qformer.bert.encoder.layer.0"
    more = {
        "Qformer.bert.embeddings.word_embeddings.weight": torch.randn(9, DIM),
        "Qformer.bert.embeddings.position_embeddings.weight": torch.randn(8, DIM),
        f"{text}.intermediate.dense.weight": torch.randn(48, DIM),
        f"{text}.output.dense.weight": torch.randn(DIM, 48),
        f"{text}.output.LayerNorm.weight": torch.randn(DIM),
        "Qformer.cls.predictions.bias": torch.randn(9),
    }
    check(lavis(tmp_path, "whole", **more), 1, is_told=True)


@pytest.mark.parametrize("wrong", first_of(["vision_encoder.class_token=false", "vision_encoder.norm=false"]))
def test_reading_the_tower_otherwise_is_noticed(tmp_path, wrong):
    found = huggingface(tmp_path)
    difference = float((logits_of(load(found)) - logits_of(load(replace(found, options=options(wrong))))).abs().max())
    assert difference > 1e-2


def options(*overrides: str) -> CompositionRequest:
    return CompositionRequest(overrides=list(overrides))


@torch.no_grad()
def logits_of(imported: Any) -> Tensor:
    lang_x, vision_x = prompt(imported.model, 1)
    return imported.model(lang_x=lang_x, vision_x=vision_x).logits


def test_media_come_before_the_first_token(tmp_path):
    """BLIP-2 puts the image before `</s>`; the other order gives other logits, and a note says so."""
    imported = load(huggingface(tmp_path))
    lang_x, vision_x = prompt(imported.model, 1)
    swapped = lang_x[:, [1, 0, *range(2, lang_x.shape[1])]]
    with torch.no_grad():
        here, there = (imported.model(lang_x=x, vision_x=vision_x).logits[0, -1] for x in (lang_x, swapped))
    assert float((here - there).abs().max()) > 1e-2
    assert any("before the token that begins" in note for note in imported.notes)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ({"hidden_size": 48}, "48 channels"),
        ({"intermediate_size": 96}, "96 hidden channels"),
        ({"num_attention_heads": 4}, "4 heads"),
        ({"patch_size": 8}, "patches of 8 pixels"),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ({"num_hidden_layers": 5}, "has 4 layers"),
    ],
    ids=str,
)
def test_another_tower_is_refused(tmp_path, vision, words):
    Blip2ForConditionalGeneration(config(**vision)).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "<image>", pad="w0")
    with pytest.raises(VLMError, match=re.escape(words)):
        load(Case(source=tmp_path, logits=lambda *_: _, made_by=""))


def test_irregular_cross_attention_is_refused(tmp_path):
    found = huggingface(tmp_path)
    rewrite(tmp_path, lambda tensors: {k: x for k, x in tensors.items() if "layer.0.crossattention" not in k})
    with pytest.raises(CheckpointError, match=re.escape("in layers [2] of its 3")):
        load(found)


def test_lacking_tensor_is_missing(tmp_path):
    found = huggingface(tmp_path)
    rewrite(tmp_path, lambda tensors: {k: x for k, x in tensors.items() if k != "qformer.layernorm.weight"})
    imported = load(found)
    assert imported.model is None
    assert imported.report.missing == ["vision_tokenizer.qformer.layernorm.weight"]


def test_encoder_decoder_is_refused(tmp_path):
    found = huggingface(tmp_path)
    rewrite_config(tmp_path, text_config=T5Config(d_model=32, num_layers=2).to_dict())
    with pytest.raises(VLMError, match="encoder-decoder"):
        load(found)


OPT = {
    "opt-2.7b": (2560, 10240, 32, 32, 107_130_880),
    "opt-6.7b": (4096, 16384, 32, 32, 108_312_064),
}


@pytest.mark.parametrize("name", first_of(OPT))
@pytest.mark.matrix
def test_published_sizes(name):
    """Sizes of https://huggingface.co/Salesforce/blip2-opt-2.7b and -6.7b; all others are Transformers' defaults."""
    width, dim_ff, depth, num_heads, trainable = OPT[name]
    text = {
        "model_type": "opt",
        "vocab_size": 50304,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": dim_ff,
        "num_hidden_layers": depth,
        "num_attention_heads": num_heads,
    }
    settings = Blip2Config(text_config=text, image_token_index=50265)
    with torch.device("meta"):
        theirs = Blip2ForConditionalGeneration(settings)
    model, report = sized(shapes_of(theirs))
    assert report.is_complete and not report.unused
    assert sum(p.numel() for p in model.vision_tokenizer.parameters()) == trainable
    trunk = model.vision_encoder.visual.trunk
    head, biases = sum(p.numel() for p in trunk.head.parameters()), 39 * 1408  # OpenCLIP's head; no bias of keys
    assert len(trunk.blocks) == 39
    assert sum(p.numel() for p in trunk.parameters()) - head + biases == theirs.vision_model.num_parameters()
    assert model.lang_model.num_parameters() == theirs.language_model.num_parameters()
    assert (model.config.vision_config["num_patches"], model.config.media_token_id) == (257, 50265)


def test_published_lavis_sizes():
    """A file of trained tensors alone tells its backbones by their widths."""
    settings = Blip2Config(
        text_config=OPTConfig(hidden_size=2560, num_hidden_layers=1, num_attention_heads=32).to_dict()
    )
    with torch.device("meta"):
        tensors = lavis_names(Blip2ForConditionalGeneration(settings).state_dict())
    kept = {k: x for k, x in tensors.items() if not re.match(HELD["trained"], k)}
    found = shapes_of(kept)
    described = recognise(found).description.composition
    assert described["language_model"] == {"name": "facebook/opt-2.7b"}
    assert described["vision_encoder"] == {
        "name": "EVA01-g-14",
        "pretrained": "laion400m_s11b_b41k",
        "depth": 39,
        "class_token": True,
        "norm": True,
    }
    assert described["vision_tokenizer"]["num_queries"] == 32
    assert described["vision_tokenizer"]["num_heads"] == 12


@pytest.mark.matrix
def test_another_language_model(tmp_path):
    (tmp_path / "blip2").mkdir()
    case, others = huggingface(tmp_path / "blip2"), other_parts(tmp_path)
    new = {"vision_tokenizer", "added_tokens", "language_model"}
    check_swap(case.source, new, case.options, language_model=others["language_model"])
