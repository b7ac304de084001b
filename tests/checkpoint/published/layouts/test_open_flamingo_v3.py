"""Files of open_flamingo's later branch: the parity cases, whole and trained tensors alone."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.parity import Parity, check_greedy, check_text, check_vision, largest_difference, tell_of
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.importing import Imported, import_checkpoint
from vlm_cli.composition import CompositionRequest
from vlm_cli.errors import CheckpointError, CompositionError

#: Heads, which shapes do not tell.
HEADS = {
    "flamingo-llama": ["vision_tokenizer.num_heads=2", "vision_tokenizer.head_dim=16"],
    "kosmos-llama": ["vision_tokenizer.num_heads=2", "vision_tokenizer.head_dim=16"],
    "blip-opt": ["vision_tokenizer.num_heads=4"],
    "llava-llama": [],
}
#: Names of what each family trains, and so saves.
TRAINED = {
    "flamingo-llama": "vision_tokenizer|.*gated_cross_attn_layer|.*additional_",
    "kosmos-llama": "vision_tokenizer|lang_model",
    "blip-opt": "vision_tokenizer",
    "llava-llama": "vision_tokenizer|lang_model",
}


@pytest.fixture(params=HEADS)
def parity(request) -> Parity:
    return Parity.read(request.param)


def options(parity: Parity, folder, **changes) -> CompositionRequest:
    """Request the parts without weights, and the settings that shapes do not tell."""
    config, _ = parity.tower(folder)
    found = CompositionRequest(
        language_model=parity.language_model, vision_encoder=config, overrides=list(HEADS[parity.folder.name])
    )
    return dataclasses.replace(found, **changes)


def load(tensors: dict[str, Tensor], folder, flags: CompositionRequest) -> Imported:
    save_file(tensors, folder / "w.safetensors")
    return import_checkpoint(
        PublishedCheckpoint.open(str(folder / "w.safetensors")), composition_over=flags.compose_over
    )


@pytest.mark.sample(2)
def test_whole_files(parity, tmp_path):
    """The file fills everything; the named backbones have no weights."""
    source = PublishedCheckpoint.open(str(parity.folder / "weights.safetensors"))
    imported = import_checkpoint(source, composition_over=options(parity, tmp_path).compose_over)
    report, case = imported.report, parity.case(imported.model)
    assert imported.layout.name == "OpenFlamingo v3 (open_flamingo, later branch)"
    assert imported.model.config.composition.family == parity.config["family"]
    assert not (report.unused or report.absent)
    check_vision(case)
    check_text(case)
    check_greedy(case)
    tell_of(imported, parity.config["family"])


@pytest.mark.sample(2)
def test_trained_tensors_alone(parity, tmp_path):
    tensors = {k: x for k, x in parity.weights.items() if re.match(TRAINED[parity.folder.name], k)}
    _, weights = parity.tower(tmp_path)
    flags = options(parity, tmp_path)
    flags = dataclasses.replace(flags, overrides=[*flags.overrides, f"vision_encoder.pretrained={weights}"])
    if parity.folder.name in ("flamingo-llama", "blip-opt"):  # their language model is frozen
        flags = dataclasses.replace(flags, language_model=parity.backbone(tmp_path / "lm"))
    imported = load(tensors, tmp_path, flags)
    assert not imported.report.unused
    case = parity.case(imported.model)
    check_vision(case)
    # BLIP does not train the row of `<image>`, and does not save it.
    assert largest_difference(case, num_columns=96 if parity.folder.name == "blip-opt" else None) <= 1e-4
    check_greedy(case)


@pytest.mark.sample(2)
def test_a_changed_weight_is_noticed(parity, tmp_path):
    name, x = next(
        (name, x)
        for name, x in sorted(parity.weights.items(), reverse=True)
        if name.startswith("vision_tokenizer") and x.ndim == 2
    )
    imported = load({**parity.weights, name: x + torch.randn_like(x)}, tmp_path, options(parity, tmp_path))
    assert largest_difference(parity.case(imported.model)) > 1e-3


@pytest.mark.sample(2)
def test_a_language_model_that_is_nowhere(parity, tmp_path):
    """A file with only some of a language model's layers does not hold that model."""
    tensors = {k: x for k, x in parity.weights.items() if not re.search(r"layers\.3\.(?!gated)", k)}
    report = load(tensors, tmp_path, options(parity, tmp_path)).report
    assert not report.is_complete and any(re.match(r"lang_model\..*layers\.3\.", name) for name in report.missing)


def test_parts_have_to_be_named(parity, tmp_path):
    with pytest.raises(CompositionError) as error:
        load(parity.weights, tmp_path, CompositionRequest())
    assert "--language-model" in str(error.value) and "--vision-encoder" in str(error.value)


@pytest.mark.parametrize("name", ["flamingo-llama", "kosmos-llama"])
def test_heads_have_to_be_said(name, tmp_path):
    parity = Parity.read(name)
    with pytest.raises(CheckpointError, match=r"attention of 32 channels .* 8 heads of 64 channels make 512"):
        load(parity.weights, tmp_path, options(parity, tmp_path, overrides=[]))


def test_another_interval_or_depth(tmp_path):
    parity = Parity.read("flamingo-llama")
    flags = options(parity, tmp_path)
    with pytest.raises(CheckpointError, match=r"before layers \[1, 3\].*fusion.every=1 has it before \[0, 1, 2, 3\]"):
        load(parity.weights, tmp_path, dataclasses.replace(flags, overrides=[*flags.overrides, "fusion.every=1"]))
    deep = parity.backbone(tmp_path / "deep", num_hidden_layers=6)
    with pytest.raises(CheckpointError, match=r"a language model of 6 layers .* before \[1, 3, 5\]"):
        load(parity.weights, tmp_path, dataclasses.replace(flags, language_model=deep))


def test_another_width(tmp_path):
    parity = Parity.read("llava-llama")
    wide = parity.backbone(tmp_path / "wide", hidden_size=64, head_dim=16)
    report = load(parity.weights, tmp_path, options(parity, tmp_path, language_model=wide)).report
    assert not report.is_complete
    assert report.mismatched["vision_tokenizer.proj.weight"] == ([32, 48], [64, 48])


def test_the_rest_of_a_flamingo(tmp_path):
    parity = Parity.read("flamingo-llama")
    tensors = {k: x for k, x in parity.weights.items() if "gated" not in k}
    with pytest.raises(CheckpointError, match="no cross-attention"):
        load(tensors, tmp_path, options(parity, tmp_path))


def test_a_pad_token_of_ours(tmp_path):
    """The code base uses a row of the language model as pad token; vlm's pad token starts at the mean of all rows."""
    parity = Parity.read("flamingo-llama")
    folder = tmp_path / "lm"
    shutil.copytree(parity.language_model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    words = folder / "tokenizer.json"
    words.write_text(words.read_text().replace("<pad>", "w0"))
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    imported = load(parity.weights, tmp_path, options(parity, tmp_path, language_model=str(folder)))
    added = imported.model.added_tokens.embedding.weight
    table = imported.model.get_input_embeddings().weight
    assert len(added) == 3 and imported.report.absent == ["added_tokens.embedding.weight", "added_tokens.head.weight"]
    assert torch.equal(added[:2], parity.weights["lang_model.model.embed_tokens.additional_embedding.weight"])
    torch.testing.assert_close(added[2], table.mean(0), atol=0.1, rtol=0)
    case = parity.case(imported.model)
    case.tensors["logits"] = torch.nn.functional.pad(case.tensors["logits"], (0, 1))
    assert largest_difference(case, num_columns=98) <= 1e-4


# -- the head's bias ---------------------------------------------------------------------------------------------------


def with_bias(parity: Parity, rows: int = 96) -> dict[str, Tensor]:
    torch.manual_seed(0)
    num_added = len(parity.config["special_tokens"])
    bias = {
        "lang_model.lm_head.bias": torch.randn(rows),
        "lang_model.lm_head.additional_fc.bias": torch.ones(num_added),
    }
    return {**parity.weights, **bias}


def test_a_bias_of_the_head_is_kept(tmp_path):
    parity = Parity.read("kosmos-llama")
    tensors, flags = with_bias(parity), options(parity, tmp_path)
    case = parity.case(load(tensors, tmp_path, flags).model)
    bias = torch.cat([tensors["lang_model.lm_head.bias"], torch.ones(1)])
    assert largest_difference(case) > 0.5  # without the bias, it is another model
    case.tensors["logits"] = case.tensors["logits"] + bias
    assert largest_difference(case) <= 1e-4
    dropped = dataclasses.replace(flags, overrides=[*flags.overrides, "language_model.head_bias=false"])
    with pytest.raises(CheckpointError, match=r"Add --set language_model\.head_bias=true"):
        load(tensors, tmp_path, dropped)


def test_a_bias_of_the_language_model_itself(tmp_path):
    parity = Parity.read("llava-llama")
    folder = tmp_path / "phi"
    shutil.copytree(parity.language_model, folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    phi = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", vocab_size=96, pad_token_id=0, **sizes))
    torch.nn.init.normal_(phi.lm_head.bias)
    phi.config.save_pretrained(folder)
    kept = {k: x for k, x in parity.weights.items() if not k.startswith("lang_model.")}
    kept |= {f"lang_model.{k}": x for k, x in phi.state_dict().items()}
    kept["lang_model.model.embed_tokens.additional_embedding.weight"] = torch.randn(1, 32)
    kept["lang_model.lm_head.additional_fc.weight"] = torch.randn(1, 32)
    kept["lang_model.lm_head.additional_fc.bias"] = torch.ones(1)
    flags = options(parity, tmp_path, language_model=str(folder))
    model = load(kept, tmp_path, dataclasses.replace(flags, overrides=["language_model.head_bias=false"])).model
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(lang_x=ids).logits[..., :96], phi.eval()(ids).logits, atol=1e-4, rtol=0)
    assert model.added_tokens.base_bias is None and model.added_tokens.head.bias.tolist() == [1]
    with pytest.raises(CheckpointError, match=r"Add --set language_model\.head_bias=false"):
        load(kept, tmp_path, flags)


def test_a_bias_that_was_not_saved(tmp_path):
    """Flamingo trains only the bias of added rows; the code base draws the others and does not save them."""
    parity = Parity.read("flamingo-llama")
    tensors = with_bias(parity)
    del tensors["lang_model.lm_head.bias"]
    flags = options(parity, tmp_path)
    imported = load(tensors, tmp_path, flags)
    assert imported.report.absent == ["added_tokens.base_bias"] and any("bias" in note for note in imported.notes)
    case = parity.case(imported.model)
    case.tensors["logits"][..., 96:] += 1
    assert largest_difference(case) <= 1e-4


def test_the_command(vlm, tmp_path):
    parity = Parity.read("kosmos-llama")
    flags = options(parity, tmp_path)
    sets = [word for x in flags.overrides for word in ("--set", x)]
    words = ["--language-model", flags.language_model, "--vision-encoder", flags.vision_encoder, *sets]
    result = vlm("build", tmp_path / "out", "--from", parity.folder / "weights.safetensors", *words)
    assert result.exit_code == 0 and "later branch" in result.stderr
    from vlm_cli import VLM

    check_text(parity.case(VLM.from_pretrained(tmp_path / "out")))
