"""`vlm train --lora`: what OUT holds, who reads it, what resumes, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import Result

from tests.support.training import LANGUAGE_STREAM, losses
from vlm_cli import accelerate, load
from vlm_cli.errors import CheckpointError, VLMError
from vlm_cli.manifest import sign
from vlm_cli.modeling.adapters import adapter_parameters, has_adapter
from vlm_cli.training.checkpoints import Checkpoints

peft = pytest.importorskip("peft")

Vlm = Callable[..., Result]

STEPS = ("--batch-size", 6, "--log-every", 2, "--learning-rate", 1e-2, "--max-steps", 4)
LORA = ("--lora", "language-model:r=2,dora", "--trainable", "vision-tokenizer")


def output(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def error(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    return result.stderr


@torch.no_grad()
def logits(model: Any) -> Tensor:
    config = model.config
    pixels = torch.randn(1, 1, 1, 3, *model.vision_encoder.image_size, generator=torch.Generator().manual_seed(0))
    return model(vision_x=pixels, lang_x=torch.tensor([[config.media_token_id, 65, 66, 67]])).logits


@pytest.fixture(scope="module")
def start(build: Callable[..., Path]) -> Path:
    return build(LANGUAGE_STREAM)


@pytest.fixture(scope="module")
def trained(start: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from typer.testing import CliRunner

    from vlm_cli.cli.app import app

    out = tmp_path_factory.mktemp("lora") / "out"
    arguments = ["train", start, "--data", folder / "train.jsonl", "--output", out, *STEPS, *LORA]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ACCELERATE_USE_CPU", "true")  # Accelerate writes here
        output(CliRunner().invoke(app, [str(x) for x in arguments]))
    return out


def test_the_output_holds_what_trained_and_names_the_rest(trained: Path, start: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert config["adapters"] == ["language_model"]
    assert {part: x["location"] for part, x in config["backbones"].items()} == {
        "vision_encoder": str(start),
        "language_model": str(start),
    }
    held, before = load_file(trained / "delta.safetensors"), load_file(start / "model.safetensors")
    assert {name.split(".")[0] for name in held} == {"vision_tokenizer", "added_tokens"}
    changed = {name.split(".")[0] for name, x in held.items() if not torch.equal(x, before[name])}
    assert changed == {"vision_tokenizer"}
    adapter = load_file(trained / "adapters/language_model/adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in adapter)
    assert any(x.any() for name, x in adapter.items() if "lora_B" in name)
    model, _ = load(str(trained))
    assert (logits(model) - logits(load(str(start))[0])).abs().max() > 1e-2


@pytest.mark.parametrize("alone", [False, True])
def test_peft_reads_the_adapter(trained: Path, start: Path, parts: dict[str, Any], alone: bool) -> None:
    """Beside the language model of the VLM, and beside the one that was never in a VLM."""
    model, _ = load(str(trained))
    if alone:
        bare = AutoModelForCausalLM.from_pretrained(parts["language_model"], dtype=torch.float32)
        ids = torch.tensor([[65, 66, 67]])
        wanted, before = model.lang_model(ids).logits, bare(ids).logits
        found = peft.PeftModel.from_pretrained(bare, str(trained / "adapters/language_model"))(ids).logits
    else:
        other, _ = load(str(start))
        other.vision_tokenizer.load_state_dict(model.vision_tokenizer.state_dict())
        wanted, before = logits(model), logits(other)
        peft.PeftModel.from_pretrained(other.lang_model, str(trained / "adapters/language_model"))
        found = logits(other)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (before - wanted).abs().max() > 1e-2


def test_merged_weights_give_the_same_logits(trained: Path, start: Path, vlm: Vlm, tmp_path: Path) -> None:
    facts = json.loads(output(vlm("export", trained, tmp_path / "merged", "--format", "merged", "--json")))
    assert facts["largest_difference"] < 1e-4
    merged, _ = load(str(tmp_path / "merged"))
    wanted = logits(load(str(trained))[0])
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)
    assert merged.config.adapters is None and (tmp_path / "merged/model.safetensors").is_file()
    output(vlm("export", trained, tmp_path / "lm", "--format", "language-model"))
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")(torch.tensor([[65, 66]])).logits
    torch.testing.assert_close(alone, merged.lang_model(torch.tensor([[65, 66]])).logits, atol=1e-4, rtol=1e-4)
    assert "no adapter, so there is nothing to merge" in error(
        vlm("export", start, tmp_path / "again", "--format", "merged"), 2
    )


def test_commands_read_it_and_tell_adapters_apart(trained: Path, folder: Path, vlm: Vlm) -> None:
    output(vlm("generate", "--model", trained, "--image", folder / "red.png", "Caption:", "--quiet"))
    rows = {row["name"]: row for row in json.loads(output(vlm("count-params", trained, "--json")))["parts"]}
    adapter = load_file(trained / "adapters/language_model/adapter_model.safetensors")
    assert (
        rows["language_model"]["adapter"]
        == rows["language_model"]["trainable"]
        == sum(x.numel() for x in adapter.values())
    )
    assert rows["vision_encoder"]["adapter"] == 0
    assert "adapter" in output(vlm("inspect", trained)).lower()


@pytest.mark.matrix
def test_doctor_and_eval_read_it(trained: Path, folder: Path, vlm: Vlm) -> None:
    output(vlm("doctor", trained))
    (folder / "asked.jsonl").write_text((folder / "train.jsonl").read_text().splitlines()[0])
    output(vlm("eval", trained, "--data", folder / "asked.jsonl"))


@pytest.mark.matrix
def test_a_resumed_run_equals_one_without_a_break_to_the_bit(
    start: Path, folder: Path, vlm: Vlm, tmp_path: Path
) -> None:
    lora = ("--lora", "language_model:r=2,dropout=0.3", "--trainable", "none", "--save-every", 2)

    def train(out: str, *more: Any) -> Result:
        return vlm("train", start, "-d", folder / "train.jsonl", "-o", tmp_path / out, *STEPS, *lora, *more)

    output(train("whole", "--keep-checkpoints"))
    saved = Checkpoints(tmp_path / "whole.checkpoints").all()
    assert [x.step for x in saved] == [2, 4]
    names = load_file(saved[0].path / "model.safetensors")
    assert names and all("lora_" in name for name in names)
    shutil.copytree(tmp_path / "whole.checkpoints", tmp_path / "broken.checkpoints")
    shutil.rmtree(tmp_path / "broken.checkpoints/checkpoint-4")
    assert "--lora: was" in error(train("broken", "--resume", "--lora", "vision_tokenizer"), 2)
    output(train("broken", "--resume"))
    file = "adapters/language_model/adapter_model.safetensors"
    one, other = (load_file(tmp_path / name / file) for name in ("whole", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


@pytest.mark.matrix
def test_checkpointed_activations_change_nothing(start: Path, folder: Path, vlm: Vlm, tmp_path: Path) -> None:
    found = []
    for name, flags in {"plain": (), "checkpointed": ("--gradient-checkpointing",)}.items():
        lora = ("--lora", "language_model:r=2,targets=q_proj+v_proj", "--lora", "vision_encoder:r=1")
        output(vlm("train", start, "-d", folder / "train.jsonl", "-o", tmp_path / name, *STEPS, *lora, *flags))
        found.append(
            {
                part: load_file(tmp_path / name / f"adapters/{part}/adapter_model.safetensors")
                for part in ("language_model", "vision_encoder")
            }
        )
    for part, tensors in found[0].items():
        for name, x in tensors.items():
            torch.testing.assert_close(found[1][part][name], x, atol=1e-4, rtol=1e-3)


@pytest.mark.matrix
def test_a_delta_directory_is_named_by_its_own_places(
    start: Path, parts: dict[str, Any], folder: Path, vlm: Vlm, tmp_path: Path
) -> None:
    output(vlm("export", start, tmp_path / "delta", "--format", "delta"))
    output(vlm("train", tmp_path / "delta", "-d", folder / "train.jsonl", "-o", tmp_path / "out", *STEPS, *LORA))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["backbones"]["language_model"]["location"] == parts["language_model"]
    wanted = logits(load(str(tmp_path / "out"))[0])
    shutil.rmtree(tmp_path / "delta")
    assert torch.equal(logits(load(str(tmp_path / "out"))[0]), wanted)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lora", "langage_model"), "Did you mean 'language_model'"),
        (("--lora", "language_model:r=0"), "r must be a whole number from 1"),
        (("--lora", "language_model:targets=qkv"), "language_model has no layer 'qkv'. language_model has: q_proj (4)"),
        (("--lora", "fusion"), "fusion can have no adapter"),
        (("--lora", "language_model", "--trainable", "language_model"), "cannot train whole and through an adapter"),
    ],
)
def test_wrong_adapters_are_refused(
    start: Path, folder: Path, vlm: Vlm, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    result = vlm("train", start, "-d", folder / "train.jsonl", "-o", tmp_path / "out", *options)
    assert words in " ".join(error(result, 2).split())
    assert not (tmp_path / "out").exists()


def test_without_peft_the_extra_is_named(
    trained: Path, start: Path, folder: Path, vlm: Vlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    result = vlm("train", start, "-d", folder / "train.jsonl", "-o", tmp_path / "out", *LORA)
    assert "pip install 'vlm-cli[lora]'" in error(result, 2)
    with pytest.raises(CheckpointError, match="vlm-cli\\[lora\\]"):
        load(str(trained))


@pytest.mark.matrix
def test_the_model_that_an_output_names_is_not_replaced_by_it(
    start: Path, trained: Path, folder: Path, vlm: Vlm, tmp_path: Path
) -> None:
    shutil.copytree(start, tmp_path / "start")
    words = ("-d", folder / "train.jsonl", *STEPS, "--overwrite")
    message = error(vlm("train", tmp_path / "start", "-o", tmp_path / "start", *words, *LORA), 2)
    assert "cannot replace the model whose weights it would name" in message
    load(str(tmp_path / "start"))
    shutil.copytree(trained, tmp_path / "trained")  # a model with adapters names another one, so it may be replaced
    output(vlm("train", tmp_path / "trained", "-o", tmp_path / "trained", *words))
    load(str(tmp_path / "trained"))


@pytest.fixture
def own(trained: Path, start: Path, tmp_path: Path) -> Path:
    """A copy of the output and of the model that it names, to be spoilt."""
    shutil.copytree(start, tmp_path / "start")
    shutil.copytree(trained, tmp_path / "out")
    config = tmp_path / "out/config.json"
    config.write_text(config.read_text().replace(str(start), str(tmp_path / "start")))
    sign(tmp_path / "out")
    return tmp_path / "out"


def test_a_model_that_changed_is_noticed_and_one_that_moved_is_found(own: Path, trained: Path) -> None:
    moved = own.with_name("moved")
    own.with_name("start").rename(moved)
    with pytest.raises(VLMError, match="--backbone language_model=PATH"):
        load(str(own))
    found, _ = load(str(own), backbones={"language_model": str(moved)})
    assert torch.equal(logits(found), logits(load(str(trained))[0]))
    weights = load_file(moved / "model.safetensors")
    weights["lang_model.model.layers.0.self_attn.q_proj.weight"][0, 0] += 1e-3
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"is not the one that .* was made with: the hash"):
        load(str(own), backbones={"language_model": str(moved)})


@pytest.mark.matrix
def test_a_run_names_the_place_where_it_found_what_moved(
    own: Path, folder: Path, vlm: Vlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.with_name("start").rename(own.with_name("moved"))
    monkeypatch.chdir(tmp_path)
    words = ("-d", folder / "train.jsonl", *STEPS, "--overwrite", "--backbone", "language_model=moved")
    assert "cannot replace the model whose weights it would name" in error(vlm("train", own, "-o", "moved", *words), 2)
    output(vlm("train", own, "-o", "better", *words))
    config = json.loads((tmp_path / "better/config.json").read_text())
    assert {x["location"] for x in config["backbones"].values()} == {str(tmp_path / "moved")}
    load(str(tmp_path / "better"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 3}, "does not hold what adapter_config.json beside it describes"),
        ({"r": 0}, "r must be a whole number from 1"),
        ({"peft_type": "VERA"}, "peft_type must be one of LORA"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save to .* which vlm does not read"),
        ({"layers_to_transform": 1}, "sets layers_to_transform to 1"),
        ({"target_modules": ["no_such"]}, "language_model has no layer 'no_such'"),
        (None, "cannot read adapters/language_model/adapter_config.json"),
    ],
)
def test_a_damaged_adapter_is_refused(own: Path, change: dict[str, Any] | None, words: str) -> None:
    path = own / "adapters/language_model/adapter_config.json"
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    sign(own)
    with pytest.raises(CheckpointError, match=words):
        load(str(own))


def test_a_missing_adapter_is_named(own: Path) -> None:
    shutil.rmtree(own / "adapters")
    sign(own)
    with pytest.raises(CheckpointError, match=r"lacks adapters/language_model/adapter_config.json"):
        load(str(own))


@pytest.mark.matrix
def test_the_last_of_several_stages_may_have_an_adapter(start: Path, folder: Path, vlm: Vlm, tmp_path: Path) -> None:
    """OUT names the model of the first stage, for the parts that no stage changed."""
    records = f"data: {folder}/train.jsonl, max_steps: 2, learning_rate: 0.01"
    file = tmp_path / "stages.yaml"
    first, last = (
        "{name: a, %s, trainable: [vision_encoder]}",
        "{name: b, %s, lora: ['language_model:r=1'], trainable: []}",
    )
    whole = "{name: c, %s, trainable: [language_model]}"
    file.write_text(f"stages: [{first % records}, {last % records}]")
    output(vlm("train", start, "--stages", file, "-o", tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {part: x["location"] for part, x in config["backbones"].items()} == {"language_model": str(start)}
    held, before = load_file(tmp_path / "out/delta.safetensors"), load_file(start / "model.safetensors")
    assert any(not torch.equal(x, before[name]) for name, x in held.items() if name.startswith("vision_encoder."))
    assert not (tmp_path / "out.stages").exists()
    load(str(tmp_path / "out"))
    file.write_text(f"stages: [{last % records}, {whole % records}]")
    message = error(vlm("train", start, "--stages", file, "-o", tmp_path / "other"), 2)
    assert "names language_model, which has an adapter since stage 'b'" in " ".join(message.split())


def test_the_manifest_holds_adapters(own: Path) -> None:
    file = own / "adapters/language_model/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: x + 1 for name, x in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not hold the weights that it was written with: adapters/"):
        load(str(own))


@pytest.mark.matrix
def test_faster_answers_come_from_merged_weights(trained: Path) -> None:
    model, _ = load(str(trained))
    wanted = logits(model)
    accelerate(model, quantize="int8")
    assert not has_adapter(model)
    assert (logits(model) - wanted).abs().max() < 0.1 * wanted.abs().max()
    nothing_merged, _ = load(str(trained))
    for _, layer in adapter_parameters(nothing_merged):
        layer.data.zero_()
    assert (logits(nothing_merged) - wanted).abs().max() > 0.1 * wanted.abs().max()  # the twin: without the adapter


# -- going on ----------------------------------------------------------------------------------------------------------


def adapter(out: Path, part: str = "language_model") -> dict[str, Tensor]:
    return load_file(out / f"adapters/{part}/adapter_model.safetensors")


def test_adapters_go_on_training(trained: Path, start: Path, folder: Path, vlm: Vlm, tmp_path: Path) -> None:
    """OUT names the model of the first run, and holds the adapters that both runs trained."""

    def train(out: str, *more: Any) -> Result:
        words = (*STEPS, "--trainable", "none", "--lora", "vision_tokenizer:r=1", "--save-every", 2, *more)
        return vlm("train", trained, "-d", folder / "train.jsonl", "-o", tmp_path / out, *words)

    output(train("whole", "--keep-checkpoints"))
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["adapters"] == ["language_model", "vision_tokenizer"]
    assert {x["location"] for x in config["backbones"].values()} == {str(start)}
    before, after = adapter(trained), adapter(tmp_path / "whole")
    assert before.keys() == after.keys() and all(x.shape == after[name].shape for name, x in before.items())
    assert all(not torch.equal(x, after[name]) for name, x in before.items())
    assert (logits(load(str(tmp_path / "whole"))[0]) - logits(load(str(trained))[0])).abs().max() > 1e-3

    shutil.copytree(tmp_path / "whole.checkpoints", tmp_path / "broken.checkpoints")
    shutil.rmtree(tmp_path / "broken.checkpoints/checkpoint-4")
    output(train("broken", "--resume"))
    for part in config["adapters"]:
        other = adapter(tmp_path / "broken", part)
        assert all(torch.equal(x, other[name]) for name, x in adapter(tmp_path / "whole", part).items())


@pytest.mark.matrix
def test_two_runs_of_one_pass_each_equal_one_of_two_whose_optimizer_forgets(
    trained: Path, start: Path, folder: Path, vlm: Vlm, tmp_path: Path
) -> None:
    """Nothing but the adapters and the trained parts goes from one run to the next: its first loss tells."""
    first = vlm("train", trained, "-d", folder / "train.jsonl", "-o", tmp_path / "out", *STEPS, "--log-every", 1)
    output(first)
    output(vlm("export", trained, tmp_path / "merged", "--format", "merged"))
    again = ("--log-every", 1, "--trainable", "vision_tokenizer")
    output(vlm("train", tmp_path / "merged", "-d", folder / "train.jsonl", "-o", tmp_path / "other", *STEPS, *again))
    output(vlm("train", start, "-d", folder / "train.jsonl", "-o", tmp_path / "new", *STEPS, *again))
    found = [losses(tmp_path / name)[1] for name in ("out", "other", "new")]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert abs(found[0] - found[2]) > 1e-2


@pytest.mark.matrix
@pytest.mark.parametrize("again", [False, True])
def test_adapters_may_be_merged_first(
    trained: Path, start: Path, folder: Path, vlm: Vlm, tmp_path: Path, again: bool
) -> None:
    """A tiny rate changes nothing that one can see, so OUT has the logits of MODEL, in the layout that is asked for."""
    lora = ("--lora", "language_model:r=1") if again else ()
    words = ("--trainable", "vision_tokenizer", "--learning-rate", 1e-12, "--merge-adapters", *lora)
    output(vlm("train", trained, "-d", folder / "train.jsonl", "-o", tmp_path / "out", *STEPS, *words))
    found, _ = load(str(tmp_path / "out"))
    assert found.config.adapters == (["language_model"] if again else None)
    assert (tmp_path / "out/delta.safetensors").exists() == again
    torch.testing.assert_close(logits(found), logits(load(str(trained))[0]), atol=1e-4, rtol=1e-4)
    if again:
        assert json.loads((tmp_path / "out/config.json").read_text())["backbones"].keys() == {"vision_encoder"}
    assert "has no adapter" in error(
        vlm("train", start, "-d", folder / "train.jsonl", "-o", tmp_path / "other", *STEPS, *words), 2
    )


@pytest.mark.parametrize("option", ["--lora", "--trainable"])
def test_an_adapter_is_described_once(trained: Path, folder: Path, vlm: Vlm, tmp_path: Path, option: str) -> None:
    words = ("train", trained, "-d", folder / "train.jsonl", "-o", tmp_path / "out", option, "language_model")
    message = " ".join(error(vlm(*words), 2).split())
    assert f"Leave language_model out of {option}, or add --merge-adapters" in message


@pytest.mark.matrix
def test_adapters_go_on_from_stage_to_stage(start: Path, folder: Path, vlm: Vlm, tmp_path: Path) -> None:
    records = f"data: {folder}/train.jsonl, max_steps: 2, learning_rate: 0.01"
    stages = (
        f"{{name: a, {records}, trainable: [vision_encoder]}}",
        f"{{name: b, {records}, trainable: [none], lora: ['language_model:r=1']}}",
        f"{{name: c, {records}}}",
    )
    file = tmp_path / "stages.yaml"
    file.write_text(f"stages: [{', '.join(stages)}]")
    output(vlm("train", start, "--stages", file, "-o", tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["adapters"] == ["language_model"]
    assert {part: x["location"] for part, x in config["backbones"].items()} == {"language_model": str(start)}
    assert any(x.any() for name, x in adapter(tmp_path / "out").items() if "lora_B" in name)
    load(str(tmp_path / "out"))
