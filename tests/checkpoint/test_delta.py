"""Delta directories: what pretrained parts hold is left out, pinned and hashed, and found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vlm_cli
from tests.support import disk
from tests.support.disk import run
from tests.support.gguf_file import write_gguf
from tests.support.grid import first_of
from vlm_cli import VLM
from vlm_cli.checkpoint.backbones import hash_tensors
from vlm_cli.checkpoint.delta import write_delta
from vlm_cli.checkpoint.saving import save_delta
from vlm_cli.errors import CheckpointError, UsageError
from vlm_cli.manifest import sign


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`lm`, `tower`, a full model of each fusion, and the delta of each."""
    path = tmp_path_factory.mktemp("delta")
    named = f"local-dir:{disk.tower(path / 'tower')}", str(disk.language_model(path / "lm"))
    disk.write(path / "flamingo", disk.composition(*named, "perceiver", "cross-attention"))
    disk.write(path / "llava", disk.composition(*named, "mlp", "language-stream"), dtype=torch.bfloat16)
    for model in ("flamingo", "llava"):
        result = run("export", path / model, path / f"{model}-delta", "--format", "delta", "--json")
        assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def own(folder, tmp_path) -> SimpleNamespace:
    """A delta directory and its backbones, to be spoilt."""
    for name in ("lm", "tower", "flamingo-delta"):
        shutil.copytree(folder / name, tmp_path / name)
    config = tmp_path / "flamingo-delta/config.json"
    config.write_text(config.read_text().replace(str(folder), str(tmp_path)))
    return SimpleNamespace(delta=str(tmp_path / "flamingo-delta"), lm=tmp_path / "lm", tower=tmp_path / "tower")


@torch.no_grad()
def logits(model, processor):
    photo = Image.new("RGB", (32, 40), "red")
    return model(**processor(text=["The <image> cat", "hi"], images=[[photo], []])).logits


@pytest.mark.matrix
def test_a_delta_of_a_trained_model_keeps_the_record_of_its_run(folder, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(folder / "flamingo", trained)
    result = {"steps": 1500, "records": 20, "loss": 0.25, "eval_loss": None}
    files = {"training_args.json": json.dumps({"result": result}), "metrics.jsonl": "{}\n", "loss.png": "a plot"}
    for name, text in files.items():
        (trained / name).write_text(text)
    assert run("export", trained, tmp_path / "delta", "--format", "delta").exit_code == 0
    assert {name: (tmp_path / "delta" / name).read_text() for name in files} == files
    card = (tmp_path / "delta/README.md").read_text()
    assert "1,500 steps on 20 records.\nLoss per token: 0.2500;" in card and "untrained" not in card
    assert "untrained until you train" in (folder / "flamingo-delta/README.md").read_text()  # the twin
    assert not (folder / "flamingo-delta/training_args.json").exists()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("delta*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("model", first_of(["llava", "flamingo"]))
def test_a_delta_gives_the_logits_of_the_full_directory(folder, model):
    whole, delta = (vlm_cli.load(str(folder / name)) for name in (model, f"{model}-delta"))
    assert torch.equal(logits(*delta), logits(*whole))
    assert {k: x.dtype for k, x in delta[0].state_dict().items()} == {
        k: x.dtype for k, x in whole[0].state_dict().items()
    }
    assert delta[0].generation_config.to_dict() == whole[0].generation_config.to_dict()
    trainable = [{k for k, x in m.named_parameters() if x.requires_grad} for m, _ in (whole, delta)]
    assert trainable[0] == trainable[1] and not delta[0].training
    with torch.no_grad():
        delta[0].vision_tokenizer.get_parameter(next(iter(delta[0].vision_tokenizer.state_dict()))).mul_(1.5)
    assert not torch.equal(logits(*delta), logits(*whole))


def test_only_what_differs_is_written(folder):
    for model in ("flamingo", "llava"):
        held = tensors(folder / f"{model}-delta")
        assert {name.partition(".")[0] for name in held} == {"vision_tokenizer", "added_tokens"} | (
            {"fusion"} if model == "flamingo" else set()
        )
        told = json.loads(run("count-params", folder / model, "--json").stdout)
        assert told["delta_bytes"] == sum(x.nbytes for x in held.values()) < told["total"]["bytes"] / 2
    text = run("count-params", folder / "flamingo").stdout
    assert "A delta directory (build --delta) holds" in text


def test_backbones_are_pinned(folder):
    config = json.loads((folder / "flamingo-delta/config.json").read_text())
    lm, tower = config["backbones"]["language_model"], config["backbones"]["vision_encoder"]
    assert (lm["kind"], lm["location"]) == ("path", str(folder / "lm"))
    assert tower["location"] == str(folder / "tower/open_clip_model.safetensors")
    published = load_file(folder / "lm/model.safetensors")
    assert lm["sha256"] == hash_tensors((f"lang_model.{name}", x) for name, x in published.items())
    assert lm["tensors"] == len(published) and lm["bytes"] == sum(x.nbytes for x in published.values())
    whole = json.loads((folder / "flamingo/config.json").read_text())
    del config["backbones"]
    assert config == whole


def test_a_hash_sees_names_dtypes_shapes_and_bytes():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    hashes = [
        hash_tensors(pairs)
        for pairs in (
            [("a", x), ("b", x)],
            [("a", x), ("c", x)],
            [("a", x), ("b", x.view(torch.int32))],
            [("a", x), ("b", x.view(2, 2))],
            [("a", x), ("b", x.flip(0))],
            [("a", x)],
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_tensors([("b", x), ("a", x)]) == hashes[0]
    assert hash_tensors([("a", x[::2])]) == hash_tensors([("a", x[::2].clone())])
    hash_tensors([("a", torch.tensor(1.0, dtype=torch.bfloat16)), ("empty", torch.zeros(0))])


@pytest.mark.matrix
def test_build_writes_a_delta(folder, tmp_path):
    flags = ["--config", folder / "flamingo/composition.yaml", "--seed", 3]
    assert run("build", tmp_path / "full", *flags, "--quiet").exit_code == 0
    result = run("build", tmp_path / "delta", *flags, "--delta")
    assert result.exit_code == 0 and "comparing with" not in result.stderr  # the parts were loaded a moment ago
    pair = [vlm_cli.load(str(tmp_path / name)) for name in ("full", "delta")]
    assert torch.equal(logits(*pair[0]), logits(*pair[1]))
    result = run("build", tmp_path / "x", *flags, "--delta", "--random-weights")
    assert result.exit_code == 2 and "--random-weights loads none" in result.stderr


@pytest.mark.matrix
def test_what_was_trained_of_a_pretrained_part_is_kept(folder, tmp_path):
    """One layer, and the embedding that the head is tied to."""
    model, processor = vlm_cli.load(str(folder / "flamingo"))
    with torch.no_grad():
        model.lang_model.model.layers[1].self_attn.q_proj.weight.mul_(3)
        model.lang_model.model.embed_tokens.weight.mul_(1.1)
    (tmp_path / "delta").mkdir()
    save_delta(model, processor, tmp_path / "delta", max_shard_size="20KB")
    assert len(list(tmp_path.glob("delta/delta-*.safetensors"))) > 1
    assert {name for name in tensors(tmp_path / "delta") if name.startswith("lang_model")} == {
        "lang_model.model.layers.1.self_attn.q_proj.weight",
        "lang_model.model.embed_tokens.weight",
    }
    assert not hasattr(model.config, "backbones")
    delta = vlm_cli.load(str(tmp_path / "delta"))
    assert torch.equal(logits(*delta), logits(model, processor))
    assert not torch.equal(logits(*delta), logits(*vlm_cli.load(str(folder / "flamingo"))))


@pytest.mark.matrix
def test_a_part_without_pretrained_weights_is_kept(folder, tmp_path):
    (tmp_path / "tower.json").write_text(json.dumps(disk.TOWER))
    parts = disk.composition(str(tmp_path / "tower.json"), str(folder / "lm"), "mlp", "language-stream")
    whole = disk.write(tmp_path / "whole", parts)
    assert run("export", whole, tmp_path / "delta", "--format", "delta").exit_code == 0
    names = tensors(tmp_path / "delta")
    assert "vision_encoder.visual.conv1.weight" in names and not any(x.startswith("lang_model") for x in names)
    told = json.loads(run("count-params", whole, "--json").stdout)
    assert told["delta_bytes"] == sum(x.nbytes for x in names.values())
    assert torch.equal(*(logits(*vlm_cli.load(str(tmp_path / name))) for name in ("whole", "delta")))


def test_a_delta_of_nothing_pretrained_is_refused(folder, tmp_path):
    run("build", tmp_path / "full", "--config", folder / "flamingo/composition.yaml", "--random-weights", "--quiet")
    model, _ = vlm_cli.load(str(tmp_path / "full"))
    with torch.no_grad():
        for part in (model.vision_encoder, model.lang_model):
            for parameter in part.parameters():
                parameter += 1
    with pytest.raises(UsageError, match=r"would hold all of it\. Write a full one"):
        write_delta(model, tmp_path)


def test_a_delta_needs_its_pretrained_parts(folder, tmp_path):
    shutil.copytree(folder / "flamingo", tmp_path / "full")
    config = tmp_path / "full/config.json"
    config.write_text(config.read_text().replace(str(folder / "lm"), "gone/lm"))
    result = run("export", tmp_path / "full", tmp_path / "delta", "--format", "delta")
    assert result.exit_code == 1 and "a delta needs the pretrained language model at hand" in result.stderr
    assert "gone/lm" in result.stderr and not (tmp_path / "delta").exists()


@pytest.mark.matrix
def test_a_gguf_backbone(folder, tmp_path):
    write_gguf(folder / "lm", tmp_path / "lm.gguf")
    named = f"local-dir:{folder / 'tower'}", str(tmp_path / "lm.gguf")
    whole = disk.write(tmp_path / "whole", disk.composition(*named, "mlp", "language-stream"))
    assert run("export", whole, tmp_path / "delta", "--format", "delta").exit_code == 0
    assert not any(name.startswith("lang_model") for name in tensors(tmp_path / "delta"))
    assert torch.equal(*(logits(*vlm_cli.load(str(tmp_path / name))) for name in ("whole", "delta")))


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_commands_take_a_delta(folder, tmp_path):
    reports = [json.loads(run("inspect", folder / name, "--json").stdout) for name in ("flamingo", "flamingo-delta")]
    assert reports[0] == reports[1] and all(reports[1]["gates"].values())
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 32), "blue").save(photo)
    answers = [
        json.loads(run("generate", "-m", folder / name, "<image>A", "-i", photo, "-n", 5, "--json").stdout)
        for name in ("flamingo", "flamingo-delta")
    ]
    assert answers[0]["text"] == answers[1]["text"] and answers[1]["new_tokens"] == 5
    again = tmp_path / "again"
    assert run("export", folder / "flamingo-delta", again, "--format", "delta").exit_code == 0
    assert (again / "config.json").read_bytes() == (folder / "flamingo-delta/config.json").read_bytes()


def test_a_loaded_delta_is_saved_whole(folder, tmp_path):
    model, processor = vlm_cli.load(str(folder / "flamingo-delta"), dtype=torch.bfloat16)
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    assert "backbones" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(VLM.from_pretrained(tmp_path).eval(), processor), logits(model, processor))


def test_transformers_alone_loads_no_delta(folder):
    with pytest.raises(ValueError, match=r"is a delta directory.*vlm_cli\.load"):
        VLM.from_pretrained(folder / "flamingo-delta")


# -- what can go wrong -------------------------------------------------------------------------------------------------


def test_a_backbone_that_is_not_there_is_named(own):
    own.tower.rename(own.tower.with_name("moved"))
    result = run("generate", "hi", "-m", own.delta)
    assert result.exit_code == 1
    for words in ("leaves out the tensors of its vision encoder", str(own.tower), "Put it back there", "backbones={"):
        assert words in result.stderr
    with pytest.raises(CheckpointError, match="leaves out the tensors of its vision encoder"):
        vlm_cli.load(own.delta)
    model, processor = vlm_cli.load(own.delta, backbones={"vision_encoder": str(own.tower.with_name("moved"))})
    shutil.rmtree(own.lm)
    with pytest.raises(CheckpointError, match="leaves out the tensors of its language model"):
        vlm_cli.load(own.delta, backbones={"vision_encoder": str(own.tower.with_name("moved"))})


def test_places_are_for_backbones_that_are_left_out(folder):
    with pytest.raises(CheckpointError, match=r"has no backbone 'fusion'\. It has: language_model, vision_encoder"):
        vlm_cli.load(str(folder / "flamingo-delta"), backbones={"fusion": "x"})
    with pytest.raises(CheckpointError, match="holds all of its tensors"):
        vlm_cli.load(str(folder / "flamingo"), backbones={"language_model": "x"})
    with pytest.raises(CheckpointError, match="cannot be loaded with device_map"):
        vlm_cli.load(str(folder / "flamingo-delta"), device_map="auto")


@pytest.mark.parametrize("part", ["language model", "vision encoder"])
def test_another_backbone_is_noticed(own, part):
    file = own.lm / "model.safetensors" if part == "language model" else own.tower / "open_clip_model.safetensors"
    state = load_file(file)
    name = next(name for name in sorted(state) if state[name].ndim == 2 and name != "visual.proj")
    state[name][0, 0] += 1e-6
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the {part} .* is not the one that .* was made with: the hash of its"):
        vlm_cli.load(own.delta)


@pytest.mark.sample(2)
@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_delta_that_does_not_cover_the_model(own, change):
    file = Path(own.delta) / "delta.safetensors"
    state = load_file(file)
    if change == "missing":
        del state["vision_tokenizer.latents"]
    elif change == "unknown":
        state["vision_tokenizer.other"] = torch.zeros(1)
    else:
        state["vision_tokenizer.latents"] = torch.zeros(1)
    save_file(state, file)
    sign(file.parent)
    with pytest.raises(CheckpointError, match=r"does not cover the model: .*vision_tokenizer"):
        vlm_cli.load(own.delta)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"delta\.safetensors is missing"):
        vlm_cli.load(own.delta)


def test_the_random_state_is_left_alone(folder):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    vlm_cli.load(str(folder / "flamingo-delta"))
    assert torch.equal(torch.rand(3), wanted)
