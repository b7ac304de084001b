"""OpenFlamingo's published checkpoints, v1 and v2, with the weights of the reference's own parity case."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, MptConfig

from tests.support.grid import first_of, grid
from tests.support.parity import Parity, check_greedy, check_text, check_vision, largest_difference, tell_of
from tests.support.published import VOCABULARY, write_tokenizer
from tests.support.tiny import stir
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint, TensorInfo
from vlm_cli.checkpoint.published.importing import Imported, import_checkpoint
from vlm_cli.checkpoint.published.layouts.open_flamingo import OpenFlamingo
from vlm_cli.composition import Composition, CompositionRequest
from vlm_cli.errors import CheckpointError, CompositionError

#: Heads, which shapes do not tell, and the norm, which the reference's later branch applies.
SETTINGS = ["vision_tokenizer.num_heads=2", "vision_tokenizer.head_dim=16", "vision_encoder.norm=true"]


def written(version: str, weights: dict[str, Tensor], *, whole: bool = False) -> dict[str, Tensor]:
    """Give the parity case's weights the names of OpenFlamingo v1 or v2; `whole` keeps frozen tensors too."""

    def joined(table: str, added: str) -> Tensor:
        return torch.cat([weights[f"lang_model.{table}.weight"], weights[f"lang_model.{table}.{added}.weight"]])

    found = {}
    for name, x in weights.items():
        if name.startswith("vision_tokenizer."):
            found[name.replace("vision_tokenizer.", "perceiver.")] = x
        elif block := re.search(r"\.(\d+)\.gated_cross_attn_layer\.(.*)", name):
            inside = f"lang_encoder.{name.removeprefix('lang_model.')}"
            found[inside if version == "v2" else f"lang_encoder.gated_cross_attn_layers.{block[1]}.{block[2]}"] = x
        elif whole and name.startswith("vision_encoder."):
            found[name] = x
        elif whole and (layer := re.search(r"\.(\d+)\.decoder_layer\.(.*)", name)):
            found[f"lang_encoder.{name.removeprefix('lang_model.')}"] = x
            found[f"lang_encoder.old_decoder_blocks.{layer[1]}.{layer[2]}"] = x
    found["lang_encoder.model.embed_tokens.weight"] = joined("model.embed_tokens", "additional_embedding")
    if whole:
        found["lang_encoder.lm_head.weight"] = joined("lm_head", "additional_fc")
        found["lang_encoder.model.norm.weight"] = weights["lang_model.model.norm.weight"]
    return found


def save(file, tensors: dict[str, Tensor], wrapper: str):
    named = {f"module.{k}" if wrapper else k: x for k, x in tensors.items()}
    torch.save({"model_state_dict": named, "epoch": 3} if wrapper else named, file)
    return str(file)


@pytest.fixture(scope="module")
def parity() -> Parity:
    return Parity.read("flamingo-llama")


@pytest.fixture(scope="module")
def parts(parity, tmp_path_factory) -> CompositionRequest:
    """Write the frozen parts with their weights."""
    folder = tmp_path_factory.mktemp("parts")
    config, weights = parity.tower(folder)
    settings = [*SETTINGS, f"vision_encoder.pretrained={weights}"]
    return CompositionRequest(language_model=parity.backbone(folder / "lm"), vision_encoder=config, overrides=settings)


def load(source: str, options: CompositionRequest) -> Imported:
    return import_checkpoint(PublishedCheckpoint.open(source), composition_over=options.compose_over)


@grid(version=["v1", "v2"], wrapper=["", "module"])
def test_published_files(parity, parts, tmp_path, version, wrapper):
    imported = load(save(tmp_path / "checkpoint.pt", written(version, parity.weights), wrapper), parts)
    report, model = imported.report, imported.model
    assert imported.layout.name == "OpenFlamingo" and not report.unused
    # The rows of an untied head are not in the file; they were never trained.
    assert [name for name in report.absent if name.startswith("added")] == ["added_tokens.head.weight"]
    assert model.config.added_tokens == ["<|endofchunk|>", "<image>"] and model.config.first_added_id == 96
    case = parity.case(model)
    check_vision(case)
    assert largest_difference(case, num_columns=96) <= 1e-4
    check_greedy(case)
    tell_of(imported, "flamingo")


@pytest.mark.parametrize("version", first_of(["v2", "v1"]))
def test_whole_models(parity, parts, tmp_path, version):
    """A file with the frozen parts and the head fills everything, so all columns equal the reference's."""
    source = save(tmp_path / "checkpoint.pt", written(version, parity.weights, whole=True), "module")
    lm = parity.backbone(tmp_path / "lm", is_random=True)
    report = (imported := load(source, dataclasses.replace(parts, language_model=lm, overrides=SETTINGS))).report
    assert not report.unused and not report.absent
    case = parity.case(imported.model)
    check_vision(case)
    check_text(case)
    check_greedy(case)


def test_a_tower_without_weights_is_missed(parity, parts, tmp_path):
    source = save(tmp_path / "checkpoint.pt", written("v2", parity.weights), "")
    report = load(source, dataclasses.replace(parts, overrides=SETTINGS)).report
    assert not report.is_complete and "vision_encoder.visual.conv1.weight" in report.missing


def test_a_changed_weight_is_noticed(parity, parts, tmp_path):
    tensors = written("v2", parity.weights)
    name = "lang_encoder.model.layers.3.gated_cross_attn_layer.attn.to_q.weight"
    tensors[name] = tensors[name] + 1
    imported = load(save(tmp_path / "checkpoint.pt", tensors, ""), parts)
    assert largest_difference(parity.case(imported.model), num_columns=96) > 1e-3


def test_patches_before_the_last_norm(parity, parts, tmp_path):
    """OpenCLIP gave patches before the norm until version 2.22, and published models were trained on them."""
    source = save(tmp_path / "checkpoint.pt", written("v2", parity.weights), "")
    settings = [x for x in parts.overrides if "norm" not in x]
    model = load(source, dataclasses.replace(parts, overrides=settings)).model
    case = parity.case(model)
    with torch.no_grad():
        features = model.vision_encoder(case.tensors["vision_x"])
        normed = model.vision_encoder.visual.ln_post(features)
    torch.testing.assert_close(normed, case.tensors["vision_features"], atol=1e-4, rtol=0)
    assert largest_difference(case, num_columns=96) > 1e-2  # the wrong one is another model


# -- other language models ---------------------------------------------------------------------------------------------

WIDTH = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
NEOX = GPTNeoXConfig(vocab_size=VOCABULARY + 12, intermediate_size=48, max_position_embeddings=64, **WIDTH)
MPT = MptConfig(vocab_size=VOCABULARY + 12, d_model=32, n_layers=4, n_heads=4, expansion_ratio=2, max_seq_len=64)


@pytest.mark.parametrize("config", [NEOX, MPT], ids=["gpt-neox", "mpt"])
def test_tables_under_other_names(parity, parts, tmp_path, config):
    """OpenFlamingo resized a padded table to fewer rows, and a pad token is the third added token."""
    torch.manual_seed(0)
    lm = stir(AutoModelForCausalLM.from_config(config), seed=5)
    lm.save_pretrained(tmp_path / "lm")
    write_tokenizer(tmp_path / "lm")
    is_neox = config.model_type == "gpt_neox"
    layers, table = ("gpt_neox.layers", "gpt_neox.embed_in") if is_neox else ("transformer.blocks", "transformer.wte")
    base = lm.get_input_embeddings().weight.detach()[:VOCABULARY]
    tensors = {
        name.replace("model.layers", layers): x
        for name, x in written("v2", parity.weights).items()
        if "embed_tokens" not in name
    }
    rows = tensors[f"lang_encoder.{table}.weight"] = torch.cat([base, torch.randn(3, 32)])
    if is_neox:  # "embed" in its name keeps it in the file
        head = lm.get_output_embeddings().weight.detach()[:VOCABULARY]
        rows = tensors["lang_encoder.embed_out.weight"] = torch.cat([head, torch.randn(3, 32)])
    source = save(tmp_path / "checkpoint.pt", tensors, "")
    imported = load(source, dataclasses.replace(parts, language_model=str(tmp_path / "lm")))
    model = imported.model
    assert model is not None and not imported.report.unused
    assert model.config.added_tokens == ["<|endofchunk|>", "<image>", "<pad>"]
    assert not [name for name in imported.report.absent if name.startswith("added")]
    # Gates open or not, the head of text alone is that of the resized language model.
    lm.resize_token_embeddings(VOCABULARY + 3)
    with torch.no_grad():
        lm.get_input_embeddings().weight.copy_(tensors[f"lang_encoder.{table}.weight"])
        lm.get_output_embeddings().weight.copy_(rows)
        ids = torch.tensor([[5, VOCABULARY, 7, 8, VOCABULARY + 2, 9]])
        torch.testing.assert_close(model(lang_x=ids).logits, lm(ids).logits, atol=1e-4, rtol=0)
        image = torch.randn(1, 1, 1, 3, 32, 32)
        ids[0, 2] = VOCABULARY + 1
        seen, mirrored = (model(lang_x=ids, vision_x=x).logits[0, -1] for x in (image, -image))
    assert float((seen - mirrored).abs().max()) > 1e-3


# -- what does not fit -------------------------------------------------------------------------------------------------


def refuse(parity, parts, tmp_path, tensors=None, **changes) -> str:
    source = save(tmp_path / "checkpoint.pt", tensors or written("v2", parity.weights), "")
    with pytest.raises((CheckpointError, CompositionError)) as error:
        load(source, dataclasses.replace(parts, **changes))
    return str(error.value)


def test_heads_have_to_be_said(parity, parts, tmp_path):
    unsaid = [x for x in parts.overrides if "vision_tokenizer" not in x]
    message = refuse(parity, parts, tmp_path, overrides=unsaid)
    assert "attention of 32 channels" in message and "8 heads of 64 channels make 512" in message
    assert "--set vision_tokenizer.num_heads=" in message


def test_another_interval(parity, parts, tmp_path):
    message = refuse(parity, parts, tmp_path, overrides=[*parts.overrides, "fusion.every=1"])
    assert "before layers [1, 3]" in message and "fusion.every=1 has it before [0, 1, 2, 3]" in message


def test_irregular_layers(parity, parts, tmp_path):
    tensors = written("v2", parity.weights)
    tensors |= {name.replace("layers.3.gated", "layers.4.gated"): x for name, x in tensors.items()}
    assert "before layers [1, 3, 4]" in refuse(parity, parts, tmp_path, tensors)


def test_another_depth(parity, parts, tmp_path):
    lm = parity.backbone(tmp_path / "lm", num_hidden_layers=6)
    message = refuse(parity, parts, tmp_path, language_model=lm)
    assert "before layers [1, 3]" in message and "6 layers" in message and "[1, 3, 5]" in message


def test_another_vocabulary(parity, parts, tmp_path):
    tensors = written("v2", parity.weights)
    name = "lang_encoder.model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], torch.zeros(5, 32)])
    message = refuse(parity, parts, tmp_path, tensors)
    assert "embeddings of 103 tokens" in message and "96, and 2 are added" in message


def test_another_width(parity, parts, tmp_path):
    lm = parity.backbone(tmp_path / "lm", hidden_size=64, head_dim=16)
    source = save(tmp_path / "checkpoint.pt", written("v2", parity.weights), "")
    report = load(source, dataclasses.replace(parts, language_model=lm)).report
    assert not report.is_complete
    assert report.mismatched["lang_encoder.model.embed_tokens.weight"] == ([96, 32], [96, 64])


def test_parts_have_to_be_named(parity, tmp_path):
    source = save(tmp_path / "checkpoint.pt", written("v2", parity.weights), "")
    with pytest.raises(CompositionError) as error:
        load(source, CompositionRequest())
    assert "--language-model" in str(error.value) and "--vision-encoder" in str(error.value)


def test_the_command(vlm, parity, parts, tmp_path):
    source = save(tmp_path / "checkpoint.pt", written("v2", parity.weights), "module")
    sets = [word for x in parts.overrides for word in ("--set", x)]
    flags = ["--language-model", parts.language_model, "--vision-encoder", parts.vision_encoder, *sets]
    result = vlm("build", tmp_path / "out", "--from", source, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["layout"] == "OpenFlamingo"
    from vlm_cli import VLM

    assert largest_difference(parity.case(VLM.from_pretrained(tmp_path / "out")), num_columns=96) <= 1e-4


# -- published sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("layers", "table", "width", "depth", "every", "rows", "known", "trained"),
    [
        ("gpt_neox.layers", "gpt_neox.embed_in", 2560, 32, 2, 50280, "RedPajama-INCITE-Base-3B-v1", 1_089_480_736),
        ("transformer.blocks", "transformer.wte", 2048, 24, 1, 50280, "mpt-1b-redpajama-200b", 1_046_992_944),
        ("transformer.blocks", "transformer.wte", 4096, 32, 4, 50280, "mpt-7b", 1_384_781_840),
        ("model.layers", "model.embed_tokens", 4096, 32, 4, 32003, "llama-7b", 1_309_919_248),
    ],
)
def test_published_sizes(layers, table, width, depth, every, rows, known, trained):
    """The published shapes (OpenFlamingo-4B, 3B, 9B and 9B v1) give the composition and the size."""
    shapes = {"perceiver.latents": (64, 1024), "perceiver.norm.weight": (1024,), "perceiver.norm.bias": (1024,)}
    for i in range(6):
        attend, ff = f"perceiver.layers.{i}.0.", f"perceiver.layers.{i}.1."
        for norm in ("norm_media", "norm_latents"):
            shapes |= {f"{attend}{norm}.weight": (1024,), f"{attend}{norm}.bias": (1024,)}
        shapes |= {f"{attend}to_q.weight": (512, 1024), f"{attend}to_kv.weight": (1024, 1024)}
        shapes |= {f"{attend}to_out.weight": (1024, 512), f"{ff}0.weight": (1024,), f"{ff}0.bias": (1024,)}
        shapes |= {f"{ff}1.weight": (4096, 1024), f"{ff}3.weight": (1024, 4096)}
    for i in range(every - 1, depth, every):
        block = f"lang_encoder.{layers}.{i}.gated_cross_attn_layer."
        shapes |= {f"{block}attn_gate": (1,), f"{block}ff_gate": (1,)}
        shapes |= {f"{block}attn.norm.weight": (width,), f"{block}attn.norm.bias": (width,)}
        shapes |= {f"{block}attn.to_q.weight": (512, width), f"{block}attn.to_kv.weight": (1024, 1024)}
        shapes |= {f"{block}attn.to_out.weight": (width, 512)}
        shapes |= {f"{block}ff.0.weight": (width,), f"{block}ff.0.bias": (width,)}
        shapes |= {f"{block}ff.1.weight": (4 * width, width), f"{block}ff.3.weight": (width, 4 * width)}
    shapes[f"lang_encoder.{table}.weight"] = (rows, width)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == trained
    tensors = {name: TensorInfo(shape, torch.float32, None) for name, shape in shapes.items()}
    checkpoint = PublishedCheckpoint("checkpoint.pt", None, tensors, {})
    assert OpenFlamingo().matches(checkpoint)
    parts = Composition.compose(None, OpenFlamingo().describe(checkpoint).composition)
    assert parts.language_model.name.endswith(known)
    assert (parts.vision_encoder.name, parts.vision_encoder.norm) == ("ViT-L-14", False)
    assert parts.fusion.options == type(parts.fusion.options)(every=every)
    assert parts.vision_tokenizer.options == type(parts.vision_tokenizer.options)()
    lm = AutoConfig.for_model("llama", hidden_size=width, num_hidden_layers=depth, vocab_size=rows)
    assert _trained(parts, lm, rows) == trained


def _trained(parts: Composition, lm, rows: int) -> int:
    """Count the parameters of vlm's resampler and blocks, and of the resized table."""
    from vlm_cli.modeling.fusion.cross_attention import GatedCrossAttention
    from vlm_cli.modeling.vision_tokenizers.perceiver import PerceiverResampler

    every = parts.fusion.options.every
    with torch.device("meta"):
        perceiver = PerceiverResampler(parts.vision_tokenizer.options, 1024, 256)
        numbers = range(every - 1, lm.num_hidden_layers, every)
        fusion = GatedCrossAttention(parts.fusion.options, lm.hidden_size, 1024, numbers)
    return sum(p.numel() for part in (perceiver, fusion) for p in part.parameters()) + rows * lm.hidden_size
