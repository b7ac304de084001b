"""`vlm build`: what it takes, what it writes, and that it runs alone."""

from __future__ import annotations

import json
import shutil
from types import ModuleType

import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support import ROOT
from tests.support.gguf_file import write_gguf
from tests.support.grid import first_of
from vlm_cli import VLM, Composition, create, load, plan

PARITY = ROOT / "tests" / "parity"


def inputs(processor, num_images=2):
    """A row with so many images and one without."""
    colours = ["red", "green", "blue"][:num_images]
    images = [[Image.new("RGB", (40, 50), colour) for colour in colours], []]
    return processor(text=["a <image>" * num_images, "hi"], images=images)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def weights(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def composition(folder):
    return yaml.safe_load((folder / "composition.yaml").read_text())


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", first_of(["flamingo", "kosmos"]))
def test_a_directory_gives_the_model_that_was_composed(family, request):
    folder = request.getfixturevalue(family)
    composed = create(plan(Composition.from_dict(composition(folder))))
    ours, processor = load(str(folder))
    theirs = VLM.from_pretrained(folder).eval()
    batch = inputs(processor)
    wanted = logits(composed, batch)
    assert torch.equal(logits(ours, batch), wanted)
    assert torch.equal(logits(theirs, batch), wanted)
    with torch.no_grad():
        next(ours.lang_model.parameters()).add_(0.01)
    assert not torch.equal(logits(ours, batch), wanted)


def test_the_files_of_a_directory(flamingo):
    assert {path.name for path in flamingo.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "composition.yaml",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vlm_manifest.json",
        "vlm_shim.py",
    }
    modes = {path.name: path.stat().st_mode & 0o777 for path in flamingo.iterdir()}
    assert set(modes.values()) == {modes["config.json"]}, "some files are not for those who may read the others"


def test_the_composition_in_a_directory_builds_the_same_again(vlm, flamingo, tmp_path):
    result = vlm("build", tmp_path / "again", "--config", flamingo / "composition.yaml", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "again/model.safetensors").read_bytes() == (flamingo / "model.safetensors").read_bytes()
    assert (tmp_path / "again/config.json").read_bytes() == (flamingo / "config.json").read_bytes()


def test_a_seed_decides_what_is_drawn(vlm, parts, flamingo, tmp_path):
    vlm("build", tmp_path / "a", *parts.flamingo, "--seed", 0)
    vlm("build", tmp_path / "b", *parts.flamingo, "--seed", 1)
    wanted = (flamingo / "model.safetensors").read_bytes()
    assert (tmp_path / "a/model.safetensors").read_bytes() == wanted
    assert (tmp_path / "b/model.safetensors").read_bytes() != wanted


def test_the_model_card_has_the_table_of_parameters(vlm, flamingo):
    card = (flamingo / "README.md").read_text()
    assert vlm("count-params", flamingo, "--markdown").stdout in card
    assert "vlm generate --model flamingo" in card and "perceiver" in card


def test_the_language_model_keeps_its_tensors_and_their_names(parts, flamingo):
    written = weights(flamingo)
    published = load_file(parts.language_model / "model.safetensors")
    for name, tensor in published.items():
        assert torch.equal(written[f"lang_model.{name}"], tensor)


def test_stdout_has_the_table_and_stderr_the_progress(vlm, parts, tmp_path):
    result = vlm("build", tmp_path / "out", *parts.flamingo)
    assert "vision_tokenizer" in result.stdout and "total" in result.stdout
    assert "loading language model" not in result.stdout
    for step in ("checking the composition", "loading language model", "composing", "writing"):
        assert step in result.stderr
    assert "vlm generate --model" in result.stderr


def test_json_prints_one_object(vlm, parts, tmp_path):
    data = json.loads(vlm("build", tmp_path / "out", *parts.flamingo, "--json").stdout)
    assert data["output"] == str(tmp_path / "out")
    assert data["composition"]["fusion"]["type"] == "cross-attention"
    assert data["total"]["parameters"] == sum(part["parameters"] for part in data["parts"])


@pytest.mark.parametrize("dtype", first_of(["bfloat16", "float16"]))
def test_dtype_is_that_of_every_tensor(vlm, parts, tmp_path, dtype):
    out = tmp_path / "out"
    assert vlm("build", out, *parts.kosmos, "--dtype", dtype, "--quiet").exit_code == 0
    wanted = getattr(torch, dtype)
    assert {tensor.dtype for tensor in weights(out).values()} == {wanted}
    composed = create(plan(Composition.from_dict(composition(out))), dtype=wanted)
    model, processor = load(str(out))
    batch = inputs(processor)
    assert torch.equal(logits(model, batch), logits(composed, batch))


def test_shards_hold_the_same_tensors(vlm, parts, flamingo, tmp_path):
    out = tmp_path / "out"
    assert vlm("build", out, *parts.flamingo, "--max-shard-size", "200KB", "--quiet").exit_code == 0
    assert len(list(out.glob("model-*.safetensors"))) > 2
    whole, sharded = weights(flamingo), weights(out)
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert load(str(out))[0].config.media_token_id == load(str(flamingo))[0].config.media_token_id


def test_dry_run_counts_and_writes_nothing(vlm, parts, flamingo, tmp_path):
    result = vlm("build", tmp_path / "out", *parts.flamingo, "--dry-run", "--json")
    assert result.exit_code == 0
    assert not list(tmp_path.iterdir())
    counted = json.loads(vlm("count-params", flamingo, "--json").stdout)
    assert json.loads(result.stdout)["total"] == counted["total"]


def test_dry_run_needs_no_output_and_a_real_one_does(vlm, parts):
    assert vlm("build", *parts.flamingo, "--dry-run").exit_code == 0
    result = vlm("build", *parts.flamingo)
    assert result.exit_code == 2 and "no output directory is named" in result.stderr


def test_random_weights_read_none(vlm, parts, language_model, tmp_path):
    (language_model / "model.safetensors").unlink()
    flags = [*parts.flamingo, "--language-model", language_model]
    assert vlm("build", tmp_path / "out", *flags).exit_code == 1
    assert vlm("build", tmp_path / "out", *flags, "--random-weights").exit_code == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["random_weights"] is True


# -- a composition from flags and files -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_builds_what_the_flags_build(vlm, parts, flamingo, tmp_path, suffix):
    wanted = composition(flamingo)
    file = tmp_path / f"composition.{suffix}"
    file.write_text(json.dumps(wanted) if suffix == "json" else yaml.safe_dump(wanted))
    assert vlm("build", tmp_path / "out", "--config", file, "--quiet").exit_code == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (flamingo / "model.safetensors").read_bytes()


def dry(vlm, *flags):
    result = vlm("build", "--dry-run", "--json", *flags)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["composition"]


def test_set_beats_a_flag_which_beats_a_file_which_beats_the_family(vlm, parts, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "family: flamingo\nvision_tokenizer: {depth: 3, num_latents: 7}\nfusion: {every: 2}\nweight_decay: 1e-3\n"
    )
    flags = ["--config", file, *parts.named]
    found = dry(vlm, *flags)
    assert found["vision_tokenizer"]["depth"] == 3
    assert found["vision_tokenizer"]["num_heads"] == 8
    assert found["weight_decay"] == 0.001
    assert found["added_tokens"] == ["<|endofchunk|>", "<image>"]
    assert dry(vlm, *flags, "--vision-tokenizer", "mlp")["vision_tokenizer"]["type"] == "mlp"
    found = dry(vlm, *flags, "--set", "vision_tokenizer.depth=1", "--set", "weight_decay=2e-2")
    assert (found["vision_tokenizer"]["depth"], found["vision_tokenizer"]["num_latents"]) == (1, 7)
    assert found["weight_decay"] == 0.02
    found = dry(vlm, *flags, "--family", "kosmos", "--fusion", "cross-attention")
    assert (found["family"], found["trainable"][-1]) == ("kosmos", "language_model")
    assert found["fusion"]["type"] == "cross-attention" and found["vision_tokenizer"]["depth"] == 3


def test_paths_in_a_file_start_at_its_folder(vlm, parts, tmp_path):
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(**json.loads(parts.tower.read_text()))
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(parts.tower, folder / "tower.json")
    save_file(clip.state_dict(), folder / "tower.safetensors")
    (folder / "c.yaml").write_text(
        "family: kosmos\nvision_encoder: {name: tower.json, pretrained: tower.safetensors}\n"
        f"vision_tokenizer: {{depth: 1}}\nlanguage_model: {parts.language_model}\n"
    )
    assert vlm("build", tmp_path / "out", "--config", folder / "c.yaml", "--quiet").exit_code == 0
    written = weights(tmp_path / "out")
    assert torch.equal(written["vision_encoder.visual.conv1.weight"], clip.visual.conv1.weight)


def test_trainable_flag_decides_what_trains(vlm, parts):
    found = dry(vlm, *parts.flamingo, "--trainable", "language-model,fusion")
    assert found["trainable"] == ["language_model", "fusion"]


def test_all_problems_are_told_at_once(vlm, parts, tmp_path):
    flags = [
        *("--vision-encoder", "ViT-B32:openai", "--language-model", tmp_path / "lmm"),
        *("--vision-tokenizer", "percever", "--family", "flamigo", "--trainable", "fusoin"),
        *("--set", "fusion.type=cross-attention", "--set", "fusion.evry=2", "--set", "depth"),
    ]
    result = vlm("build", tmp_path / "out", *flags)
    assert result.exit_code == 2 and not result.stdout
    for words in (
        "the composition has 7 problems",
        "unknown vision encoder 'ViT-B32'. Did you mean 'ViT-B-32'?",
        "there is no directory",
        "unknown vision tokenizer 'percever'. Did you mean 'perceiver'?",
        "unknown family 'flamigo'. Did you mean 'flamingo'?",
        "unknown part 'fusoin' in trainable. Did you mean 'fusion'?",
        "unknown key fusion.evry. Did you mean 'every'?",
        "--set expects NAME=VALUE",
    ):
        assert words in result.stderr
    assert not list(tmp_path.iterdir())


def test_misfits_are_found_before_anything_is_read(vlm, parts, language_model, tmp_path):
    (language_model / "model.safetensors").unlink()  # whoever loads weights would stumble over this
    flags = [*parts.kosmos, "--language-model", language_model]
    for setting, words in (
        ("vision_tokenizer.dim_out=17", "vision_tokenizer.dim_out=17 does not fit"),
        ("vision_tokenizer.num_latents=4000", "one image takes 4000 positions, but the language model has 2048"),
        ("vision_encoder.layer=-9", "does not give features with layer=-9"),
    ):
        result = vlm("build", tmp_path / "out", *flags, "--set", setting)
        assert result.exit_code == 2 and words in result.stderr
    result = vlm("build", tmp_path / "out", *parts.flamingo, "--set", "fusion.every=9")
    assert result.exit_code == 2 and "fusion.every=9 leaves no cross-attention block" in result.stderr


# -- vision encoders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(parts):
    torch.manual_seed(5)
    return open_clip.model.CLIP(**json.loads(parts.tower.read_text())).eval()


PREPROCESS = {"mean": [0.5] * 3, "std": [0.4] * 3, "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture
def openclip_folder(parts, clip, tmp_path):
    folder = tmp_path / "openclip"
    folder.mkdir()
    model = json.loads(parts.tower.read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": PREPROCESS}))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@torch.no_grad()
def patches(visual, pixels):
    """OpenCLIP's own forward up to the last norm, without the class token."""
    return visual.ln_post(visual.transformer(visual._embeds(pixels)))[:, 1:]


def built_encoder(vlm, out, *flags):
    result = vlm("build", out, *flags, "--quiet")
    assert result.exit_code == 0, result.stderr
    return load(str(out))


def test_a_local_openclip_folder_brings_weights_and_preprocessing(vlm, parts, clip, openclip_folder, tmp_path):
    flags = [*parts.kosmos, "--vision-encoder", f"local-dir:{openclip_folder}"]
    model, processor = built_encoder(vlm, tmp_path / "out", *flags)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = model.vision_encoder(pixels[:, None, None])[:, 0, 0]
    torch.testing.assert_close(ours, patches(clip.visual, pixels), atol=1e-6, rtol=0)
    found = processor.image_processor.preprocess_config
    assert {key: found[key] for key in PREPROCESS} == PREPROCESS and found["size"] == 32


@pytest.mark.sample(2)
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "wrapped.pt"])
def test_vision_weights_by_file(vlm, parts, clip, tmp_path, suffix):
    file = tmp_path / f"weights.{suffix}"
    state = clip.state_dict()
    if suffix == "safetensors":
        save_file(state, file)
    elif suffix == "pt":
        torch.save(state, file)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": x for name, x in state.items()}}, file)
    model, _ = built_encoder(vlm, tmp_path / "out", *parts.kosmos, "--set", f"vision_encoder.pretrained={file}")
    found = model.vision_encoder.visual.state_dict()
    assert all(torch.equal(found[name], x) for name, x in clip.visual.state_dict().items())


def test_another_image_size_resizes_the_position_embeddings_as_openclip_does(vlm, parts, openclip_folder, tmp_path):
    flags = [*parts.kosmos, "--vision-encoder", f"local-dir:{openclip_folder}", "--set", "vision_encoder.image_size=48"]
    model, processor = built_encoder(vlm, tmp_path / "out", *flags)
    config = json.loads(parts.tower.read_text())
    config["vision_cfg"]["image_size"] = 48
    theirs = open_clip.model.CLIP(**config)
    open_clip.factory.load_checkpoint(theirs, str(openclip_folder / "open_clip_model.safetensors"))
    ours = model.vision_encoder.visual.state_dict()
    assert all(torch.equal(ours[name], x) for name, x in theirs.visual.state_dict().items())
    assert processor(text="<image>", images=[Image.new("RGB", (9, 9))])["pixel_values"].shape[-1] == 48


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 4}, "lack 12 tensors of the vision tower"),
        ({"layers": 2}, "hold 12 tensors that the vision tower does not have"),
        ({"width": 32}, "another shape"),
    ],
)
def test_weights_of_another_tower_are_refused(vlm, parts, openclip_folder, tmp_path, change, words):
    config = json.loads(parts.tower.read_text())
    config["vision_cfg"] |= change
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config))
    file = openclip_folder / "open_clip_model.safetensors"
    flags = [*parts.kosmos, "--vision-encoder", other, "--set", f"vision_encoder.pretrained={file}"]
    result = vlm("build", tmp_path / "out", *flags)
    assert result.exit_code == 1 and words in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_encoder_without_weights_is_said_to_be_random(vlm, parts, tmp_path):
    words = "names no pretrained weights, so its weights are random"
    assert words in vlm("build", tmp_path / "a", *parts.flamingo).stderr
    assert words not in vlm("build", tmp_path / "b", *parts.flamingo, "--random-weights").stderr


@pytest.mark.sample(1)
@pytest.mark.parametrize("command", ["count-params", "build --dry-run", "inspect"])
def test_a_name_of_openclip_without_a_tag_is_said_to_be_random(vlm, parts, command):
    flags = ["--family", "flamingo", "--language-model", parts.language_model, "--vision-encoder"]
    words = "'ViT-S-32-alt' names no pretrained weights, so its weights are random. Give a tag"
    assert words in vlm(*command.split(), *flags, "ViT-S-32-alt").stderr
    siglip = vlm(*command.split(), *flags, "ViT-B-16-SigLIP").stderr
    assert "random, and images are prepared with CLIP's mean and std. Give a tag" in siglip
    assert "random" not in vlm(*command.split(), *flags, "ViT-B-16-SigLIP:webli").stderr


@pytest.mark.parametrize("command", ["generate", "count-params"])
def test_an_adapter_is_no_model(vlm, tmp_path, command):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "adapter_model.safetensors").touch()
    words = {"generate": ["A photo of", "-m", tmp_path], "count-params": [tmp_path]}[command]
    result = vlm(command, *words)
    assert result.exit_code == 1 and result.stderr.startswith(f"Error: {str(tmp_path)!r} holds a PEFT adapter and no ")
    assert "peft.PeftModel.from_pretrained, and write what merge_and_unload() returns: vlm_cli.save." in result.stderr


# -- language models --------------------------------------------------------------------------------------------------


def rewritten(folder, change=None, **config):
    """A language model whose tokenizer went through `change`, and whose weights have another configuration."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if change is not None:
        change(tokenizer)
    if config:
        settings = AutoConfig.from_pretrained(folder)
        settings.update(config)
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def no_change(tokenizer):
    return None


def with_pad(tokenizer):
    tokenizer.add_special_tokens({"pad_token": "</s>"})


def with_more_tokens(tokenizer):
    tokenizer.add_tokens(["foo", "bar"])


def with_image(tokenizer):
    tokenizer.add_tokens([AddedToken("<image>", special=False, normalized=False)])


VOCABULARY = 466  # tokens of the tiny language model


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("change", "rows", "added", "first", "media", "pad"),
    [
        (no_change, None, ["<|endofchunk|>", "<image>", "<pad>"], 466, 467, 468),
        (with_pad, None, ["<|endofchunk|>", "<image>"], 466, 467, 1),
        # Rows that no token has give way to ours.
        (no_change, 512, ["<|endofchunk|>", "<image>", "<pad>"], 466, 467, 468),
        # Tokens that no row has get one of ours.
        (with_more_tokens, None, ["foo", "bar", "<|endofchunk|>", "<image>", "<pad>"], 466, 469, 470),
        (with_image, 512, ["<|endofchunk|>", "<pad>"], 467, 466, 468),
        (with_image, None, ["<image>", "<|endofchunk|>", "<pad>"], 466, 466, 468),
    ],
)
def test_tokens_that_are_added(vlm, parts, language_model, tmp_path, change, rows, added, first, media, pad):
    rewritten(language_model, change, **({} if rows is None else {"vocab_size": rows}))
    result = vlm("build", tmp_path / "out", *parts.flamingo, "--language-model", language_model)
    assert result.exit_code == 0, result.stderr
    model, processor = load(str(tmp_path / "out"))
    config = model.config
    assert (config.added_tokens, config.first_added_id) == (added, first)
    assert (config.media_token_id, config.pad_token_id) == (media, pad)
    assert processor.media_token_id == media and processor.tokenizer.pad_token_id == pad
    batch = inputs(processor)
    assert (batch["input_ids"] == media).sum() == 2
    assert logits(model, batch).shape[-1] == len(processor.tokenizer)
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).max() < len(processor.tokenizer)


def test_a_special_token_image_of_the_tokenizer_is_refused(vlm, parts, language_model, tmp_path):
    rewritten(language_model, lambda t: t.add_special_tokens({"additional_special_tokens": ["<image>"]}))
    result = vlm("build", tmp_path / "out", *parts.flamingo, "--language-model", language_model)
    assert result.exit_code == 1
    assert "special token '<image>' of its own" in result.stderr and "language_model.tokenizer=" in result.stderr


def test_another_tokenizer_stands_in(vlm, parts, language_model, tmp_path):
    for file in language_model.glob("tokenizer*"):
        file.unlink()
    flags = [*parts.flamingo, "--language-model", language_model]
    assert "has no tokenizer" in vlm("build", tmp_path / "out", *flags).stderr
    flags += ["--set", f"language_model.tokenizer={parts.language_model}"]
    assert vlm("build", tmp_path / "out", *flags).exit_code == 0
    assert load(str(tmp_path / "out"))[1].tokenizer.convert_tokens_to_ids("<image>") == VOCABULARY + 1


def test_stop_tokens_of_the_language_model_are_kept(vlm, parts, language_model, tmp_path):
    settings = json.loads((language_model / "generation_config.json").read_text())
    (language_model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [1, 7]}))
    assert vlm("build", tmp_path / "out", *parts.flamingo, "--language-model", language_model).exit_code == 0
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written["eos_token_id"] == [1, 7, VOCABULARY]
    shown = json.loads(vlm("inspect", tmp_path / "out", "--json").stdout)
    assert shown["tokens"]["stop"] == [1, 7, VOCABULARY]


@pytest.mark.matrix
def test_a_gguf_language_model(vlm, parts, photo, tmp_path):
    write_gguf(parts.language_model, tmp_path / "lm.gguf")
    flags = [*parts.flamingo, "--language-model", tmp_path / "lm.gguf"]
    result = vlm("build", tmp_path / "out", *flags)
    assert result.exit_code == 0, result.stderr
    written, published = weights(tmp_path / "out"), load_file(parts.language_model / "model.safetensors")
    assert all(torch.equal(written[f"lang_model.{name}"], x) for name, x in published.items())
    tokenizer = AutoTokenizer.from_pretrained(parts.language_model)
    assert load(str(tmp_path / "out"))[1].tokenizer("The cat").input_ids == tokenizer("The cat").input_ids
    result = vlm("generate", "-m", tmp_path / "out", "<image>The cat", "-i", photo, "-n", 3)
    assert result.exit_code == 0, result.stderr
    file = tmp_path / "lm.gguf"
    file.write_bytes(file.read_bytes()[:-5000])
    result = vlm("build", tmp_path / "cut", *flags)
    assert result.exit_code == 1 and "lm.gguf" in result.stderr and not (tmp_path / "cut").exists()


@pytest.mark.sample(1)
@pytest.mark.parametrize("model_type", first_of(["gpt2", "mamba", "opt", "gpt_neox", "qwen3", "mpt"], 2))
def test_other_types_of_language_models(vlm, parts, example: ModuleType, photo, tmp_path, model_type):
    """From the directory to text, with the type's own default for what is not set."""
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
        "opt": {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 32, "num_attention_heads": 2}
        | {"word_embed_proj_dim": 32},
        "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2},
        "qwen3": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
        | {"num_attention_heads": 2, "num_key_value_heads": 2},
    }.get(model_type, {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 2})
    tokenizer = example.make_tokenizer()
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **sizes, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    flags = [*parts.flamingo, "--language-model", tmp_path / "lm"]
    result = vlm("build", tmp_path / "out", *flags, "--quiet")
    assert result.exit_code == 0, result.stderr
    result = vlm("generate", "-m", tmp_path / "out", "<image>The cat", "-i", photo, "-n", 3, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["new_tokens"] == 3


# -- trained weights over a composition --------------------------------------------------------------------------------


def parity_flags(name):
    """The composition that a case of `tests/parity` was made with."""
    config = json.loads((PARITY / name / "config.json").read_text())
    renamed = {"heads": "num_heads", "dim_head": "head_dim", "num_query_tokens": "num_queries", "hidden_size": "dim"}
    renamed |= {"num_hidden_layers": "depth", "num_attention_heads": "num_heads", "intermediate_size": "dim_ff"}
    renamed |= {"cross_attention_frequency": "cross_attention_every"}
    sizes = config["vision_tokenizer"]
    flags = ["--family", config["family"], "--vision-tokenizer", sizes.pop("type"), "--random-weights"]
    flags += ["--language-model", str(PARITY / name / "language_model")]
    flags += [x for key, value in sizes.items() for x in ("--set", f"vision_tokenizer.{renamed.get(key, key)}={value}")]
    every = config.get("cross_attn_every_n_layers")
    return [*flags, *(["--set", f"fusion.every={every}"] if every else [])]


@pytest.fixture
def tower(parts, tmp_path):
    """The vision encoder of the cases; the composition names its JSON."""
    config = json.loads(parts.tower.read_text())
    config["vision_cfg"]["layers"] = 2
    path = tmp_path / "tower.json"
    path.write_text(json.dumps(config))
    return ["--vision-encoder", str(path)]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["flamingo-llama", "kosmos-llama", "blip-opt", "llava-llama"])
def test_weights_in_the_layout_of_the_reference(vlm, tower, tmp_path, name):
    file = PARITY / name / "weights.safetensors"
    result = vlm("build", tmp_path / "out", *parity_flags(name), *tower, "--weights", file)
    assert result.exit_code == 0, result.stderr
    theirs, ours = load_file(file), weights(tmp_path / "out")
    for words in (f"{len(theirs)} tensors loaded", "0 tensors missing", "0 tensors not used"):
        assert words in result.stderr
    loaded = {x.double().sum().item() for x in ours.values()}
    assert all(x.double().sum().item() in loaded for x in theirs.values())
    renamed = "added_tokens.embedding.weight"
    original = next(key for key in theirs if key.endswith("additional_embedding.weight"))
    assert torch.equal(ours[renamed], theirs[original])


@pytest.mark.matrix
@pytest.mark.parametrize("form", first_of(["distributed", "plain", "wrapped", "old"], 2))
def test_weights_in_pytorch_files(vlm, tower, tmp_path, form):
    state = load_file(PARITY / "flamingo-llama/weights.safetensors")
    file = tmp_path / "checkpoint.pt"
    if form == "distributed":
        state = {f"module.{key}": x for key, x in state.items()}
    content = state if form in ("plain", "old") else {"epoch": 1, "model_state_dict": state}
    torch.save(content, file, _use_new_zipfile_serialization=form != "old")
    flags = [*parity_flags("flamingo-llama"), *tower, "--quiet"]
    result = vlm("build", tmp_path / "pt", *flags, "--weights", file)
    assert result.exit_code == 0, result.stderr
    vlm("build", tmp_path / "st", *flags, "--weights", PARITY / "flamingo-llama/weights.safetensors")
    assert (tmp_path / "pt/model.safetensors").read_bytes() == (tmp_path / "st/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(flamingo):
    """Our own layout: what trains of a flamingo, moved."""
    state = load_file(flamingo / "model.safetensors")
    return {name: x + 1 for name, x in state.items() if name.startswith(("vision_tokenizer", "fusion", "added_tokens"))}


def build_over(vlm, parts, tmp_path, state, *flags):
    save_file(state, tmp_path / "trained.safetensors")
    return vlm("build", tmp_path / "out", *parts.flamingo, *flags, "--weights", tmp_path / "trained.safetensors")


def test_weights_in_our_layout(vlm, parts, trained, openclip_folder, tmp_path):
    result = build_over(vlm, parts, tmp_path, trained, "--vision-encoder", f"local-dir:{openclip_folder}")
    assert result.exit_code == 0, result.stderr
    ours = weights(tmp_path / "out")
    assert all(torch.equal(ours[name], x) for name, x in trained.items())
    published = load_file(parts.language_model / "model.safetensors")
    assert all(torch.equal(ours[f"lang_model.{name}"], x) for name, x in published.items())
    absent = len(ours) - len(trained)
    assert f"{len(trained)} tensors loaded" in result.stderr and "0 tensors missing" in result.stderr
    assert "expected to be absent (frozen, from a pretrained part)" in result.stderr
    assert absent > 0


def test_a_missing_trainable_tensor_is_an_error(vlm, parts, trained, openclip_folder, tmp_path):
    state = {name: x for name, x in trained.items() if name != "vision_tokenizer.latents"}
    result = build_over(vlm, parts, tmp_path, state, "--vision-encoder", f"local-dir:{openclip_folder}")
    assert result.exit_code == 1
    assert "1 tensor missing: vision_tokenizer.latents" in result.stderr
    assert "Nothing was written" in result.stderr and not (tmp_path / "out").exists()


def test_a_part_that_would_stay_random_must_be_in_the_file(vlm, parts, trained, tmp_path):
    result = build_over(vlm, parts, tmp_path, trained)  # its tower names no weights
    assert result.exit_code == 1 and "tensors missing: vision_encoder." in result.stderr


def test_another_shape_is_an_error(vlm, parts, trained, openclip_folder, tmp_path):
    state = trained | {"vision_tokenizer.latents": torch.zeros(5, 48)}
    result = build_over(vlm, parts, tmp_path, state, "--vision-encoder", f"local-dir:{openclip_folder}")
    assert result.exit_code == 1
    assert "1 tensor of another shape: vision_tokenizer.latents: file [5, 48], model [6, 48]" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_not_used_is_said(vlm, parts, trained, openclip_folder, tmp_path):
    state = trained | {"optimizer.step": torch.zeros(1)}
    result = build_over(vlm, parts, tmp_path, state, "--vision-encoder", f"local-dir:{openclip_folder}")
    assert result.exit_code == 0 and "1 tensor not used: optimizer.step" in result.stderr


def test_dry_run_tries_the_weights(vlm, parts, trained, openclip_folder, tmp_path):
    flags = ("--vision-encoder", f"local-dir:{openclip_folder}", "--dry-run")
    assert build_over(vlm, parts, tmp_path, trained, *flags).exit_code == 0
    state = {name: x for name, x in trained.items() if name != "vision_tokenizer.latents"}
    assert build_over(vlm, parts, tmp_path, state, *flags).exit_code == 1
    assert not (tmp_path / "out").exists()


# -- where it is written ----------------------------------------------------------------------------------------------


def test_an_old_directory_is_replaced_only_when_asked(vlm, parts, tmp_path):
    out = tmp_path / "out"
    vlm("build", out, *parts.flamingo, "--seed", 1)
    before = (out / "model.safetensors").read_bytes()
    result = vlm("build", out, *parts.flamingo, "--seed", 2)
    assert result.exit_code == 2 and "add --overwrite" in result.stderr
    assert (out / "model.safetensors").read_bytes() == before
    assert vlm("build", out, *parts.flamingo, "--seed", 2, "--overwrite").exit_code == 0
    assert (out / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["language model", "file", "other files", "link to nothing"])
def test_overwrite_replaces_nothing_but_what_vlm_wrote(vlm, parts, language_model, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "language model":
        out = language_model
    elif kind == "file":
        out.write_text("mine")
    elif kind == "other files":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        out.symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.rglob("*"))
    result = vlm("build", out, *parts.flamingo, "--overwrite")
    assert result.exit_code == 2 and "not a directory that vlm wrote" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_directory_may_be_filled(vlm, parts, tmp_path):
    (tmp_path / "out").mkdir()
    assert vlm("build", tmp_path / "out", *parts.flamingo).exit_code == 2
    assert vlm("build", tmp_path / "out", *parts.flamingo, "--overwrite").exit_code == 0


@pytest.mark.parametrize("out", [".", ".."])
def test_the_working_directory_is_not_replaced(vlm, parts, tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = vlm("build", out, *parts.flamingo, "--overwrite")
    assert result.exit_code == 2 and "is the working directory or holds it" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
