"""`vlm inspect --weights`: norms, dead and exploding rows, and how far parts moved."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlm_cli
from vlm_cli.checkpoint.delta import own_tensors
from vlm_cli.differences.opening import open_stored
from vlm_cli.report.weights import measure_tensor


@pytest.fixture
def shown(vlm):
    def inspect(*flags):
        result = vlm("inspect", *flags, "--weights", "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return inspect


def loaded(folder) -> dict[str, torch.Tensor]:
    """The tensors of a model with its adapters merged, as PEFT merges them."""
    model, _ = vlm_cli.load(str(folder))
    if model.config.adapters:
        model.merge_adapters()
    return {name: x.detach() for name, x in own_tensors(model).items()}


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("form", ["lora", "delta", "full", "dora", "llava"])
def test_each_tensor_is_that_of_the_loaded_model(made, form):
    stored, model = open_stored(str(made.get(form))), loaded(made.get(form))
    assert stored.tensors.keys() == model.keys() and not stored.missing
    for name, x in model.items():
        torch.testing.assert_close(stored.read(name), x, atol=1e-6, rtol=1e-6)
    assert any(x.has_adapter for x in stored.tensors.values()) == (form in ("lora", "dora"))
    if form in ("lora", "dora"):  # the twin: without the adapter, they differ
        assert not all(torch.equal(stored.read_plain(name), x) for name, x in model.items())


def test_a_backbone_that_is_another_one_is_not_read(made, tmp_path):
    shutil.copytree(made.path / "lm", tmp_path / "lm")
    file = tmp_path / "lm/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    stored = open_stored(str(made.delta), backbones={"language_model": str(tmp_path / "lm")})
    assert "is another one: the hash" in stored.missing["language_model"]
    assert not any(name.startswith("lang_model.") for name in stored.tensors)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_dead_and_exploding_rows_are_found():
    x = torch.ones(6, 2, 3)
    x[1] = 0
    x[2] *= 11
    x[3] *= 9
    x[4, 0, 0] = math.inf
    found = measure_tensor("a", x)
    assert (found.rows, found.dead, found.exploding) == (6, (1,), (2, 4))
    assert measure_tensor("a", x, times=8).exploding == (2, 3, 4)
    assert found.squares == sum(float(v) ** 2 for v in x.flatten() if math.isfinite(v))


def test_a_vector_of_zeros_is_not_dead_and_one_that_is_not_finite_explodes():
    assert (measure_tensor("bias", torch.zeros(4)).dead, measure_tensor("bias", torch.zeros(4)).exploding) == ((), ())
    assert measure_tensor("bias", torch.tensor([1.0, math.nan])).exploding == (0,)
    assert measure_tensor("empty", torch.zeros(0, 3)).rows == 0


def test_the_report_of_a_model(shown, made):
    found, model = shown(made.trained), loaded(made.trained)
    start = loaded(made.full)
    prefixes = {"language_model": "lang_model."}
    for part in found["parts"]:
        prefix = prefixes.get(part["name"], f"{part['name']}.")
        mine = {name: x for name, x in model.items() if name.startswith(prefix)}
        change = sum(float((x - start[name]).double().square().sum()) for name, x in mine.items())
        before = sum(float(start[name].double().square().sum()) for name in mine)
        assert part["norm"] == pytest.approx(sum(float(x.double().square().sum()) for x in mine.values()) ** 0.5)
        assert part["moved"] == pytest.approx(math.sqrt(change / before), abs=1e-9)
        assert (part["moved"] > 0.01) == (part["name"] in ("language_model", "fusion"))
        assert sum(layer["parameters"] for layer in part["layers"]) == sum(x.numel() for x in mine.values())
    layers = [layer["name"] for part in found["parts"] for layer in part["layers"]]
    assert {"transformer.resblocks.2", "blocks.3", "model.layers.0", "model.embed_tokens", "latents"} <= set(layers)


@pytest.mark.matrix
@pytest.mark.parametrize("form", ["lora", "dora"])
def test_how_far_an_adapter_moves_a_part(shown, made, form):
    moved = {part["name"]: part["moved"] for part in shown(made.get(form))["parts"]}
    model, start = loaded(made.get(form)), loaded(made.full)
    names = [name for name in model if name.startswith("lang_model.")]
    change = sum(float((model[name] - start[name]).double().square().sum()) for name in names)
    before = sum(float(start[name].double().square().sum()) for name in names)
    assert moved["language_model"] == pytest.approx(math.sqrt(change / before), rel=1e-5)
    assert moved["vision_encoder"] == 0
    if form == "lora":  # the delta under the other one has no record of where its fusion began
        assert moved["fusion"] == 0 and moved["vision_tokenizer"] > 0.01


def test_rounding_to_bfloat16_is_no_training(shown, made):
    moved = {part["name"]: part["moved"] for part in shown(made.llava)["parts"]}
    assert moved["language_model"] == moved["vision_encoder"] == 0 and moved["vision_tokenizer"] is None


def test_what_is_not_at_hand_is_said(vlm, shown, made, tmp_path):
    shutil.copytree(made.trained, tmp_path / "trained")
    config = tmp_path / "trained/config.json"
    config.write_text(config.read_text().replace(str(made.path / "lm"), str(tmp_path / "gone")))
    record = tmp_path / "trained/training_args.json"
    record.write_text(json.dumps({"job": {"model": "a/gone"}}))
    shown_parts = {part["name"]: part for part in shown(tmp_path / "trained")["parts"]}
    assert shown_parts["language_model"]["start"]["unknown"] == "which is not on this machine"
    assert shown_parts["fusion"]["start"] == {"place": "a/gone", "unknown": "which is not on this machine"}
    assert shown_parts["fusion"]["moved"] is None and shown_parts["vision_encoder"]["moved"] == 0
    assert (
        "fusion, added_tokens: a/gone, which is not on this machine"
        in vlm("inspect", tmp_path / "trained", "--weights").stdout
    )
    record.write_text("[]")  # no record that vlm could have written
    assert {part["name"]: part for part in shown(tmp_path / "trained")["parts"]}["fusion"]["start"]["place"] is None


def test_a_damaged_row_is_named(vlm, made, tmp_path):
    shutil.copytree(made.llava, tmp_path / "model", ignore=shutil.ignore_patterns("vlm_manifest.json"))
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    tensors["lang_model.model.embed_tokens.weight"][3] = 0
    tensors["lang_model.model.embed_tokens.weight"][5] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    text = vlm("inspect", tmp_path / "model", "--weights").stdout
    rows = len(tensors["lang_model.model.embed_tokens.weight"])
    assert f"lang_model.model.embed_tokens.weight: 1 of {rows} dead (3), 1 of {rows} exploding (5)" in text
    assert json.loads(vlm("inspect", tmp_path / "model", "--weights", "--json").stdout)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("flamingo", "--weights"), "--weights needs a built model"),
        (("demo", "--weights", "--prompt", "a"), "exclude each other"),
        (("demo", "--exploding", "3"), "--exploding has no effect without --weights"),
        (("demo", "--backbone", "language_model=x"), "--backbone has no effect without --weights"),
    ],
)
def test_what_does_not_fit_is_refused(vlm, flags, words):
    result = vlm("inspect", *flags)
    assert result.exit_code == 2 and words in result.stderr
