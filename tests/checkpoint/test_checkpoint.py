"""Names of encoders and files, weights under either layout, directories written whole, code that comes along."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support import ROOT, tiny
from vlm_cli import Composition, create, load, plan
from vlm_cli.checkpoint.directory import read_tensors
from vlm_cli.checkpoint.parts.vision_encoders import find_tower, list_towers
from vlm_cli.checkpoint.published.layouts.own import own_targets_of
from vlm_cli.checkpoint.published.targets import Target
from vlm_cli.checkpoint.saving import save
from vlm_cli.checkpoint.weights import load_weights, open_weights
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.errors import CheckpointError, LanguageModelError, OutputExistsError, UnknownNameError
from vlm_cli.files import check_directory, is_vlm_directory, replacing_directory
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.vlm import VLM

PARITY = ROOT / "tests" / "parity"

# -- names -------------------------------------------------------------------------------------------------------------


def test_a_tower_of_openclip_has_its_preprocessing_and_the_activation_of_its_weights():
    found = find_tower(VisionEncoderOptions(name="ViT-L-14", pretrained="openai"))
    assert found.config["quick_gelu"] and found.config["preprocess"]["size"] == 224
    found = find_tower(VisionEncoderOptions(name="ViT-L-14"))
    assert not found.config["quick_gelu"] and found.weights is None
    found = find_tower(VisionEncoderOptions(name="ViT-B-16-SigLIP", pretrained="webli"))
    assert found.config["preprocess"]["mean"] == (0.5, 0.5, 0.5)
    assert found.config["preprocess"]["resize_mode"] == "squash"


def test_a_tag_that_is_not_there_is_no_file_either():
    with pytest.raises(UnknownNameError, match=r"no such file exists\. Did you mean 'openai'"):
        find_tower(VisionEncoderOptions(name="ViT-L-14", pretrained="opnai"))


def test_every_listed_tower_is_found():
    assert len(list_towers()) > 100
    for name in list_towers():
        config = find_tower(VisionEncoderOptions(name=name)).config
        assert config["embed_dim"] and config["preprocess"]["size"] == config["vision_cfg"].get("image_size", 224)


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("vision_encoder.conv1.weight", "vision_encoder.visual.conv1.weight"),
        ("lang_model.model.embed_tokens.additional_embedding.weight", "added_tokens.embedding.weight"),
        ("lang_model.lm_head.additional_fc.weight", "added_tokens.head.weight"),
        ("lang_model.lm_head.additional_fc.bias", "added_tokens.head.bias"),
        ("lang_model.model.layers.1.gated_cross_attn_layer.attn_gate", "fusion.blocks.1.attn_gate"),
        ("lang_model.transformer.blocks.11.gated_cross_attn_layer.ff.0.bias", "fusion.blocks.11.ff.0.bias"),
        ("lang_model.gated_cross_attn_layers.3.attn.to_q.weight", "fusion.blocks.3.attn.to_q.weight"),
        ("lang_model.model.layers.1.decoder_layer.mlp.up_proj.weight", "lang_model.model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_names_of_the_reference(theirs, ours):
    assert own_targets_of(theirs) == [Target(ours)] == own_targets_of(ours)


def own(**parts):
    """A tiny VLM that may be changed; those that `tiny` builds share their language models and towers."""
    return copy.deepcopy(tiny.build(**parts))


@pytest.fixture
def state(tmp_path):
    """All tensors of a tiny VLM, moved."""
    found = {name: x + 1 for name, x in tiny.build().state_dict().items()}
    save_file(found, tmp_path / "w.safetensors")
    return found


def test_loading_gives_each_tensor_its_own(state, tmp_path):
    model = own()
    report = load_weights(model, tmp_path / "w.safetensors")
    assert report.is_complete and set(report.loaded) == set(state)
    assert not (report.missing or report.absent or report.unused or report.mismatched)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


@pytest.mark.sample(2)
@pytest.mark.parametrize("change", ["missing", "mismatched", "empty"])
def test_a_model_is_unchanged_if_the_file_does_not_fit(state, tmp_path, change):
    if change == "missing":
        del state["vision_tokenizer.latents"]
    elif change == "mismatched":
        state["vision_tokenizer.latents"] = torch.zeros(1)
    else:
        state = {"other": torch.zeros(1)}
    save_file(state, tmp_path / "w.safetensors")
    model = own()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    report = load_weights(model, tmp_path / "w.safetensors")
    assert not report.is_complete
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_what_may_be_absent(state, tmp_path):
    trained = {name: x for name, x in state.items() if not name.startswith(("vision_encoder", "lang_model"))}
    save_file(trained, tmp_path / "w.safetensors")
    report = load_weights(own(), tmp_path / "w.safetensors")
    assert report.is_complete and set(report.absent) == state.keys() - trained.keys()
    report = load_weights(own(), tmp_path / "w.safetensors", random_parts=["language_model"])
    assert set(report.missing) == {name for name in state if name.startswith("lang_model")}
    report = load_weights(own(trainable=["language_model"]), tmp_path / "w.safetensors")
    assert "lang_model.model.norm.weight" in report.missing


def test_one_name_of_tied_weights_is_enough(tmp_path):
    model = own(language_model="llama-tied")
    state = {name: x + 1 for name, x in model.state_dict().items() if name != "lang_model.lm_head.weight"}
    save_file(state, tmp_path / "w.safetensors")
    report = load_weights(model, tmp_path / "w.safetensors", random_parts=["language_model"])
    assert report.is_complete and not report.absent
    assert set(report.loaded) == set(state)
    assert torch.equal(model.lang_model.lm_head.weight, state["lang_model.model.embed_tokens.weight"])


def test_quantized_weights_are_refused(state, tmp_path):
    """Without their scales, integers are other weights."""
    name = "lang_model.model.norm.weight"
    save_file({**state, name: state[name].to(torch.int8)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="its weights are quantized"):
        load_weights(own(), tmp_path / "w.safetensors")


def test_a_model_without_memory_gets_the_report_alone(state, tmp_path):
    with torch.device("meta"):
        model = VLM(own().config)
    report = load_weights(model, tmp_path / "w.safetensors")
    assert report.is_complete and set(report.loaded) == set(state)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_only_named_tensors_are_read(tmp_path):
    torch.save(
        {"model_state_dict": {"module.a": torch.ones(2), "step": 3}, "optimizer": {"lr": 0.1}}, tmp_path / "w.pt"
    )
    assert {name: x.tolist() for name, x in open_weights(tmp_path / "w.pt").read()} == {"a": [1.0, 1.0]}


# -- directories -------------------------------------------------------------------------------------------------------


def write(folder: Path, text: str, **keywords) -> None:
    with replacing_directory(folder, **keywords) as partial:
        (partial / "config.json").write_text(json.dumps({"model_type": "vlm", "text": text}))


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), replacing_directory(out) as partial:
        (partial / "half").touch()
        assert not out.exists()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    write(out, "first")
    assert is_vlm_directory(out)
    with pytest.raises(OutputExistsError):
        write(out, "second")
    write(out, "second", overwrite=True)
    assert json.loads((out / "config.json").read_text())["text"] == "second"
    assert list(tmp_path.iterdir()) == [out]


def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path):
    write(tmp_path / "real", "first")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "second", overwrite=True)
    assert not (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real/config.json").read_text())["text"] == "first"


def test_a_path_below_a_file_is_none(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="does not exist"):
        check_directory(tmp_path / "file/out", overwrite=True)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A llama with the tokenizer of a parity case."""
    folder = tmp_path_factory.mktemp("lm")
    shutil.copytree(PARITY / "flamingo-llama/language_model", folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blueprint(language_model, tmp_path_factory):
    tower = tmp_path_factory.mktemp("tower") / "tower.json"
    tower.write_text(json.dumps(tiny.VISION["vit"]))
    parts = {"vision_encoder": str(tower), "language_model": str(language_model)}
    sizes = {"vision_tokenizer": tiny.TOKENIZERS["perceiver"], "fusion": tiny.FUSIONS["cross-attention"]}
    return plan(Composition.compose("flamingo", parts, sizes))


def test_a_plan_holds_no_weights(blueprint):
    assert {p.device.type for p in blueprint.meta_model.parameters()} == {"meta"}
    names = {name: p.shape for name, p in create(blueprint).named_parameters()}
    assert {name: p.shape for name, p in blueprint.meta_model.named_parameters()} == names


@pytest.mark.parametrize("model_type", ["codegen", "rwkv"])
def test_a_configuration_may_name_no_special_tokens(blueprint, tmp_path, model_type):
    AutoConfig.for_model(model_type, n_layer=2, num_hidden_layers=2).save_pretrained(tmp_path)
    parts = Composition.from_dict(blueprint.config.composition.to_dict() | {"language_model": str(tmp_path)})
    config = plan(parts, need_tokenizer=False).config
    assert config.added_tokens == ["<|endofchunk|>", "<image>"]
    assert config.media_token_id == config.first_added_id + 1


def test_creating_leaves_the_random_state_alone(blueprint):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    first = create(blueprint, seed=1)
    assert torch.equal(torch.rand(3), wanted)
    second = create(blueprint, seed=1)
    assert torch.equal(first.vision_tokenizer.latents, second.vision_tokenizer.latents)
    assert not torch.equal(first.vision_tokenizer.latents, create(blueprint, seed=2).vision_tokenizer.latents)


def test_a_dtype_is_that_of_what_is_saved(blueprint):
    model = create(blueprint, dtype=torch.bfloat16)
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}
    assert model.lang_model.model.rotary_emb.inv_freq.dtype == torch.float32  # as after from_pretrained
    assert model.config.dtype == torch.bfloat16


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_few_tensors_without_the_rest(blueprint, tmp_path, shard):
    model = create(blueprint)
    save(model, blueprint.processor, tmp_path, max_shard_size=shard)
    name = "fusion.blocks.1.ff_gate"
    with torch.no_grad():
        model.fusion.blocks["1"].ff_gate.fill_(0.25)
    save(model, blueprint.processor, tmp_path, max_shard_size=shard)
    assert read_tensors(str(tmp_path), [name]) == {"blocks.1.ff_gate": torch.tensor([0.25])}
    assert read_tensors(str(tmp_path), []) == {}
    with pytest.raises(CheckpointError, match="cannot load"):
        read_tensors(str(tmp_path), ["fusion.nothing"])


@pytest.mark.parametrize("command", ["inspect", "count-params", "generate"])
def test_a_revision_reaches_the_hub(monkeypatch, command):
    from typer.testing import CliRunner

    from vlm_cli.cli.app import app

    asked = []

    def spy(name, **keywords):
        asked.append((name, keywords.get("revision")))
        raise OSError("no network")

    monkeypatch.setattr(VLMConfig, "get_config_dict", spy)
    words = ["generate", "hi", "-m"] if command == "generate" else [command]
    result = CliRunner().invoke(app, [*words, "org/model", "--revision", "abc"])
    assert result.exit_code == 1 and asked == [("org/model", "abc")]


# -- code that comes along ---------------------------------------------------------------------------------------------

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

from .parts import NAME


class OwnConfig(LlamaConfig):
    model_type = "llama_of_its_own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    name = NAME
"""


@pytest.fixture
def own_code(language_model, tmp_path, monkeypatch):
    """A language model whose classes are in its directory."""
    folder = Path(shutil.copytree(language_model, tmp_path / "own"))
    (folder / "modeling.py").write_text(CODE)
    (folder / "parts.py").write_text("NAME = 'own'\n")
    config = json.loads((folder / "config.json").read_text())
    references = {"AutoConfig": "modeling.OwnConfig", "AutoModelForCausalLM": "modeling.OwnModel"}
    config |= {"model_type": "llama_of_its_own", "architectures": ["OwnModel"], "auto_map": references}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    CONFIG_MAPPING._extra_content.pop("llama_of_its_own", None)


def test_code_of_a_language_model_is_run_only_where_it_is_trusted(own_code, blueprint, language_model, tmp_path):
    parts = Composition.from_dict(blueprint.config.composition.to_dict() | {"language_model": str(own_code)})
    with pytest.raises(LanguageModelError, match="If you trust it, add --trust-remote-code"):
        plan(parts)
    found = plan(parts, trust_remote_code=True)
    model = create(found)
    assert model.lang_model.name == "own"
    theirs = load_file(language_model / "model.safetensors")
    assert all(torch.equal(model.lang_model.state_dict()[name], x) for name, x in theirs.items())

    (tmp_path / "vlm").mkdir()
    save(model, found.processor, tmp_path / "vlm")
    assert (tmp_path / "vlm/modeling.py").read_text() == CODE and (tmp_path / "vlm/parts.py").exists()
    shutil.rmtree(own_code)
    CONFIG_MAPPING._extra_content.pop("llama_of_its_own")  # as in a new process
    with pytest.raises(CheckpointError, match="If you trust it, add --trust-remote-code"):
        load(str(tmp_path / "vlm"))
    loaded, _ = load(str(tmp_path / "vlm"), trust_remote_code=True)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(lang_x=ids).logits, model(lang_x=ids).logits)
