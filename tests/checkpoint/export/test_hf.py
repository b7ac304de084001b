"""`vlm export --format hf` and `--format llava`: Transformers' classes give what the model gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlavaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import vlm_cli
from tests.support import disk, tiny
from tests.support.disk import run
from tests.support.photographs import photograph
from vlm_cli.checkpoint.export.hf import write
from vlm_cli.checkpoint.export.hf.classes import CLASSES
from vlm_cli.checkpoint.export.hf.language import find_hf_language_model
from vlm_cli.checkpoint.export.hf.write import check_hf, export_hf
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import UsageError
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.conversation import ChatFormat, Conversation
from vlm_cli.trust import load_image_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`lm`, `tower`, and `llava`, a model that LLaVA's class holds."""
    path = tmp_path_factory.mktemp("hf")
    disk.language_model(path / "lm")
    disk.tower(path / "tower")
    build(path, path / "llava")
    return path


def build(parts: Path, out: Path, tokenizer: str = "mlp", lm: str = "lm", **encoder) -> Path:
    named = f"local-dir:{parts / 'tower'}", str(parts / lm), tokenizer, "language-stream"
    return disk.write(out, disk.composition(*named, vision_encoder={"layer": -2, **encoder}))


def exported(model: Path, out: Path, kind: str = "hf") -> dict:
    result = run("export", model, out, "--format", kind, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# -- what a directory gives --------------------------------------------------------------------------------------------


@torch.no_grad()
def answer(out: Path, messages: list[dict], **settings) -> tuple[list[int], torch.Tensor]:
    """The tokens and the last logits of Transformers' own classes, as its documentation shows."""
    model, processor = AutoModelForImageTextToText.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return inputs["input_ids"][0].tolist(), model(**inputs).logits[0, -1]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("tokenizer", "encoder"),
    [
        ("mlp", {}),
        ("linear", {"layer": -1, "norm": False}),
        ("mlp", {"class_token": True}),
        ("mlp", {"layer": [-1, -2], "norm": False}),
        ("linear", {"depth": 2}),
    ],
    ids=str,
)
def test_llava_answers_as_the_model_does(folder, tmp_path, tokenizer, encoder):
    build(folder, tmp_path / "model", tokenizer, **encoder)
    report = exported(tmp_path / "model", tmp_path / "out")
    assert report["class"] == "LlavaForConditionalGeneration" and report["largest_difference"] <= 1e-4
    model, processor = vlm_cli.load(str(tmp_path / "model"))
    photo = photograph("16:9")
    message = {"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "What is it?"}]}
    ids, theirs = answer(tmp_path / "out", [message])
    ours = Conversation(ChatFormat(processor)).ask([Medium("a.png"), Text("What is it?")])
    num = model.num_positions()
    assert ids == [i for i in ours.ids for _ in range(num if i == model.config.media_token_id else 1)]
    batch = processor.image_processor.preprocess([[[photo]]])
    with torch.no_grad():
        logits = model(lang_x=torch.tensor([ours.ids]), **{"vision_x": batch["pixel_values"]}).logits[0, -1]
    # Transformers' default backend resizes with torchvision, which rounds other than Pillow.
    assert (theirs - logits)[: model.config.first_added_id].abs().max() < 0.05 * logits.abs().max()


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", ["mistral", "qwen3", "gpt2", "gpt_neox", "opt", "bloom", "gemma"])
def test_language_models_of_llava(folder, tmp_path, model_type):
    """Of any type, under the names that it gives its tables and its layers; what is written imports again."""
    (tmp_path / "tower").symlink_to(folder / "tower")
    disk.language_model(tmp_path / "lm", model_type)
    build(tmp_path, tmp_path / "model")
    assert exported(tmp_path / "model", tmp_path / "out")["largest_difference"] <= 1e-4
    model, _ = vlm_cli.load(str(tmp_path / "model"))
    back = import_checkpoint(tmp_path / "out").model
    assert back is not None
    theirs = back.lang_model.state_dict()  # whose tables have rows of added tokens, too
    pairs = {name: (x, theirs[name][: len(x)]) for name, x in model.lang_model.state_dict().items()}
    assert not [name for name, (x, y) in pairs.items() if not torch.equal(x, y)]


def scaled(kind, **settings):
    return AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **settings)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (scaled("llama"), None),
        (scaled("opt"), None),
        (scaled("granite", logits_scaling=1.0), None),
        (scaled("granite", logits_scaling=2.0), "scales or caps its logits"),
        (scaled("cohere", logit_scale=1.0), None),
        (scaled("cohere", logit_scale=0.5), "scales or caps its logits"),
        (scaled("gemma2"), "scales or caps its logits"),
        (scaled("phi"), "with a bias in its head"),
        (AutoConfig.for_model("fuyu"), "no plain language model with a head on it"),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_what_heads_do_is_measured(config, words):
    found = find_hf_language_model(config)
    assert found.problems == () if words is None else words in found.problems[0]


def test_a_changed_weight_is_noticed(folder, tmp_path, monkeypatch):
    """The comparison that every export makes has a twin that must fail."""
    real = write.load_pretrained

    def nudged(cls, *args, **keywords):
        found = real(cls, *args, **keywords)
        if isinstance(found, torch.nn.Module):
            found.model.multi_modal_projector.linear_1.weight.data[0] += 1
        return found

    monkeypatch.setattr(write, "load_pretrained", nudged)
    result = run("export", folder / "llava", tmp_path / "out", "--format", "hf")
    assert result.exit_code == 1 and "the exported model differs from the model by" in result.stderr
    assert not list(tmp_path.iterdir())


TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}[assistant]"
PARTS = "{% for m in messages %}[{{ m['role'] }}]{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
IN_PARTS = [{"type": "image"}, {"type": "text", "text": "Is "}, {"type": "text", "text": "it?"}]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("template", "wanted"),
    [(TURNS, "[user]<image>Is it?</s>[assistant]"), (PARTS, "[user]<image>Is it?[assistant]"), (None, "<image>Is it?")],
)
def test_a_template_takes_pictures(folder, tmp_path, template, wanted):
    model, processor = vlm_cli.load(str(folder / "llava"))
    processor.tokenizer.chat_template = template
    export_hf(model, processor, tmp_path)
    back = AutoProcessor.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": IN_PARTS}]
    assert back.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == wanted
    with pytest.raises(Exception, match="no video"):
        back.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda found: setattr(found, "num_additional_image_tokens", 3), "makes other tokens of a message"),
        pytest.param(
            lambda found: setattr(found.image_processor, "image_mean", [0.4] * 3),
            "make different pixels of a picture of 333 × 97 pixels, by up to",
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            lambda found: setattr(found.image_processor, "size", {"shortest_edge": 33}),
            "make different pixels of a picture of 333 × 97",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_a_processor_that_differs_is_not_written(folder, tmp_path, monkeypatch, spoil, words):
    saving = LlavaProcessor.save_pretrained

    def save(self, out):
        spoil(self)
        return saving(self, out)

    monkeypatch.setattr(LlavaProcessor, "save_pretrained", save)
    result = run("export", folder / "llava", tmp_path / "out", "--format", "llava")
    assert result.exit_code == 1 and words in result.stderr and not list(tmp_path.iterdir())


FITTING = {"tokenizer": "mlp", "fusion": "language-stream", "vision_encoder": {"name": "vit", "layer": -2}}


def sized(**parts):
    """The configuration of tiny parts, with pictures of their size."""
    config = tiny.config(**{**FITTING, **parts})
    config.vision_config["preprocess"] = {"size": tiny.SIZE}
    return config


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"fusion": "cross-attention"}, "fusion is cross-attention; the class has language-stream"),
        ({"tokenizer": "perceiver"}, "vision_tokenizer is perceiver; the class has mlp"),
        ({"fusion": {"type": "language-stream", "mask": "image"}}, "fusion.mask is 'image'; the class has 'causal'"),
        ({"tokenizer": {"type": "mlp", "pixel_shuffle": 2}}, "vision_tokenizer.pixel_shuffle is 2; the class has 1"),
        ({"tiling": {"type": "grid"}}, "tiling is grid; the class has none"),
        ({"tiling": {"type": "none", "picture_text": "<{views}>"}}, "tiling.picture_text is '<{views}>'; the class"),
        ({"vision": "resnet"}, "has a ResNet; Transformers' CLIP is a plain ViT"),
        ({"vision": "siglip"}, "is timm's VisionTransformer with 1 tokens before the patches"),
        ({"vision": "coca"}, "attentional_pool=True; Transformers' CLIP is a plain ViT"),
        ({"vision": "eva02"}, "is timm's Eva model"),
        ({"vision_encoder": {"name": "vit", "layer": -1}}, "layer -1 of the vision encoder passes its last norm"),
    ],
)
def test_what_llava_cannot_hold(parts, problem):
    with pytest.raises(UsageError, match=r"What stands in the way.*:\n  LlavaForCond") as caught:
        check_hf(sized(**parts), "llava")
    assert problem in str(caught.value)


@pytest.mark.matrix
def test_a_refusal_tells_of_the_nearest_classes():
    config = sized(fusion="cross-attention", tokenizer="perceiver")
    with pytest.raises(UsageError) as short:
        check_hf(config)
    with pytest.raises(UsageError) as whole:
        check_hf(config, verbose=True)
    named = [[x.model for x in CLASSES.values() if f"  {x.model}:" in str(error.value)] for error in (short, whole)]
    assert len(named[0]) == 3 and len(named[1]) == len(CLASSES)
    assert f"{len(CLASSES) - 3} other classes are no nearer; --verbose" in str(short.value)
    assert "--verbose" not in str(whole.value)


def test_what_fits_has_no_problem():
    check_hf(sized())


def test_a_refusal_comes_before_weights_are_read(folder, tmp_path):
    (broken := tmp_path / "model").mkdir()
    data = json.loads((folder / "llava" / "config.json").read_text())
    data["composition"]["fusion"] = {"type": "cross-attention"}
    (broken / "config.json").write_text(json.dumps(data))
    result = run("export", broken, tmp_path / "out", "--format", "llava")
    assert result.exit_code == 2 and "fusion is cross-attention" in result.stderr
    assert "LlavaForConditionalGeneration" in result.stderr


# -- compositions of our own -------------------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_PINPOINTS = {"type": "anyres", "pinpoints": [[32, 64], [64, 32], [64, 64]]}
_ANYRES = [f"tiling={json.dumps(_PINPOINTS)}"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> Path:
    """A CLIP, a SigLIP and a DINOv2 of Transformers, with their image processors."""
    folder = tmp_path_factory.mktemp("encoders")
    square, middle = {"height": 32, "width": 32}, {"size": {"shortest_edge": 32}, "crop_size": 32}
    for name, model, images in (
        (
            "clip",
            CLIPVisionModel(CLIPVisionConfig(**_SIZES)),
            CLIPImageProcessor(**middle),
        ),
        ("siglip", SiglipVisionModel(SiglipVisionConfig(**_SIZES)), SiglipImageProcessor(size=square)),
        ("dinov2", Dinov2Model(Dinov2Config(**_SIZES)), CLIPImageProcessor(**middle)),
    ):
        tiny.stir(model, seed=3).save_pretrained(folder / name)
        images.save_pretrained(folder / name)
    return folder


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("encoder", "tokenizer", "settings", "found"),
    [
        ("hf:clip", "mlp", [], "Llava"),
        ("hf:clip", "mlp", ["vision_encoder.layer=-2", "vision_encoder.class_token=true"], "Llava"),
        ("hf:siglip", "mlp", [], "Llava"),
        ("hf:siglip", "linear", ["vision_encoder.layer=-2"], "Llava"),
        ("hf:dinov2", "mlp", [], "Llava"),
        ("ViT-B-16-SigLIP", "mlp", ["vision_encoder.depth=2"], "Llava"),
        ("ViT-B-16-SigLIP2", "linear", ["vision_encoder.depth=2"], "Llava"),
        ("hf:clip", "mlp", _ANYRES, "LlavaNext"),
        ("hf:siglip", "mlp", [*_ANYRES, "tiling.shrink_beyond=2"], "LlavaOnevision"),
    ],
    ids=str,
)
def test_a_composition_of_our_own(folder, encoders, tmp_path, encoder, tokenizer, settings, found):
    kind, _, name = encoder.partition(":")
    named = f"hf:{encoders / name}" if kind == "hf" else encoder
    random = [] if kind == "hf" else ["--random-weights"]
    chosen = [word for x in ("vision_encoder.norm=false", *settings) for word in ("--set", x)]
    flags = ["--family", "llava", "--vision-encoder", named, "--vision-tokenizer", tokenizer, *random, *chosen]
    result = run("build", tmp_path / "model", "--language-model", folder / "lm", "--dtype", "float32", *flags)
    assert result.exit_code == 0, result.output
    report = exported(tmp_path / "model", tmp_path / "out")
    assert report["class"] == f"{found}ForConditionalGeneration" and report["largest_difference"] <= 1e-4
    model, processor = vlm_cli.load(str(tmp_path / "model"))
    photo = photograph("16:9")
    back = AutoProcessor.from_pretrained(tmp_path / "out")
    back.image_processor = load_image_processor(tmp_path / "out")
    theirs = back(text="<image>What", images=[photo], return_tensors="pt")
    ours = processor(text="<image>What", images=[photo])
    pixels = theirs["pixel_values"].flatten(0, -4)
    if not report["notes"]:  # of a crop that lies elsewhere
        torch.testing.assert_close(pixels, ours["pixel_values"][0, 0], atol=1e-5, rtol=0)
    with torch.no_grad():
        logits = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()(**theirs).logits[0, -1]
        wanted = model(**ours).logits[0, -1]
    size = model.config.first_added_id
    torch.testing.assert_close(logits[:size], wanted[:size], atol=1e-4 if not report["notes"] else 1, rtol=0)
