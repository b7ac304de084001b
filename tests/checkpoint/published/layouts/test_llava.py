"""LLaVA-1.5 as Transformers and as its authors write it, against Transformers' class."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.support.grid import grid
from tests.support.llava import IMAGE, config, huggingface
from tests.support.published import (
    SIZE,
    VOCABULARY,
    Case,
    check,
    load,
    prompt,
    rewrite_config,
    shapes_of,
    sized,
    write_tokenizer,
)
from tests.support.tiny import stir
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.recognising import recognise
from vlm_cli.composition import CompositionRequest
from vlm_cli.errors import CheckpointError, CompositionError
from vlm_cli.image_processor import OpenCLIPImageProcessor
from vlm_cli.processor import VLMProcessor


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "changes",
    [{}, {"vision_feature_layer": -1}, {"vision_feature_layer": 1}, {"vision_feature_select_strategy": "full"}],
    ids=str,
)
def test_huggingface(tmp_path, changes):
    check(huggingface(tmp_path, **changes), is_told=not changes)


def test_pictures_are_cropped_where_transformers_crops_them(tmp_path):
    """OpenCLIP's own preprocessing starts one pixel later where a margin of the crop is 3, 7, 11, …"""
    imported = load(huggingface(tmp_path))
    theirs = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    own = imported.processor.image_processor
    assert own.preprocess_config["crop"] == "down"
    wide = Image.effect_noise((SIZE + 3, SIZE), 80).convert("RGB")
    for picture in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        assert (own.transform(picture) - theirs(picture, return_tensors="pt")["pixel_values"][0]).abs().max() < 1e-5
    rounded = OpenCLIPImageProcessor({**own.preprocess_config, "crop": "round"})
    assert (rounded.transform(wide) - own.transform(wide)).abs().max() > 0.1


def test_tied_tables(tmp_path):
    """The file has one table, whose last rows fill both tables of added tokens."""
    case = huggingface(tmp_path, is_tied=True)
    assert not any("lm_head" in name for name in PublishedCheckpoint.open(str(tmp_path)).tensors)
    check(case)
    added = load(case).model.added_tokens
    assert torch.equal(added.head.weight, added.embedding.weight)


@pytest.mark.parametrize(
    "named",
    [
        {"image_token": "<image>", "extra_special_tokens": {"image_token": "<image>"}},
        {"extra_special_tokens": ["<image>"]},
    ],
)
def test_a_tokenizer_that_has_a_name_for_the_image(tmp_path, named):
    """Published tokenizers name `<image>`, which would make it a special token again on loading."""
    case = huggingface(tmp_path / "theirs")
    rewrite_config(tmp_path / "theirs", "tokenizer_config.json", **named)
    imported = load(case)
    for processor in (imported.processor, saved(imported.processor, tmp_path / "ours")):
        assert "<image>" not in processor.tokenizer.all_special_tokens
        assert processor(text="w1 <image> w2", images=Image.new("RGB", (8, 8)))["input_ids"].tolist() == [[1, IMAGE, 2]]


def saved(processor, folder):
    processor.save_pretrained(folder)
    return VLMProcessor.from_pretrained(folder)


@pytest.mark.parametrize("begins", [True, False])
def test_a_chat_begins_as_the_published_processor_begins_it(tmp_path, begins):
    case = huggingface(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path, bos_token="w7")
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w7 $A", special_tokens=[("w7", 7)])
    tokenizer.save_pretrained(tmp_path)
    written = "'w3 <image> w4 ' if part.type == 'image' else part.text + ' w9 '"  # w4 as LLaVA's newline
    template = f"{{% for part in messages[0].content %}}{{{{ {written} }}}}{{% endfor %}}"
    (tmp_path / "chat_template.jinja").write_text(template)
    turn = {
        "role": "user",
        "content": [{"type": "image", "image": Image.new("RGB", (SIZE, SIZE))}, {"type": "text", "text": "w1"}],
    }
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    how = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    theirs = LlavaProcessor(pictures, tokenizer, chat_template=template, **how)
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    wanted = theirs.apply_chat_template([turn], **asked)["input_ids"][0]
    found = load(case).processor.apply_chat_template([turn], **asked)["input_ids"][0].tolist()
    assert found == [i for i, _ in groupby(wanted)] == [*[7] * begins, 3, IMAGE, 4, 1, 9]


# -- as the authors write it -------------------------------------------------------------------------------------------

#: Where each of Transformers' tensors was: the inverse of the table in its own conversion script.
ORIGINAL = (
    (r"model\.vision_tower\.(.*)", r"model.vision_tower.vision_tower.vision_model.\1"),
    (r"model\.multi_modal_projector\.linear_1\.(.*)", r"model.mm_projector.0.\1"),
    (r"model\.multi_modal_projector\.linear_2\.(.*)", r"model.mm_projector.2.\1"),
    (r"model\.language_model\.(.*)", r"model.\1"),
    (r"(lm_head\..*)", r"\1"),
)


def original_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, x in tensors.items():
        pattern, right = next(rule for rule in ORIGINAL if re.fullmatch(rule[0], name))
        found[re.sub(pattern, right, name)] = x.contiguous()
    return found


def original_config(settings: LlavaConfig, **changes: Any) -> dict[str, Any]:
    """Make the configuration of liuhaotian/llava-v1.5-7b: the language model's, mixed with LLaVA's settings."""
    return {
        **settings.text_config.to_dict(),
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "pad",
        "mm_hidden_size": settings.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "use_mm_proj": True,
        **changes,
    }


@pytest.fixture(scope="module")
def theirs() -> LlavaForConditionalGeneration:
    """Make a model with heads of 64 channels in its tower, and no row for `<image>`, which is only an id in LLaVA."""
    settings = config()
    settings.vision_config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=16,
    )
    settings.text_config.vocab_size = VOCABULARY
    settings.image_token_index = 3  # Transformers needs an id; its embedding is overwritten
    return stir(LlavaForConditionalGeneration(settings), seed=5)


def original(folder: Path, theirs: LlavaForConditionalGeneration, held: str = ".*", **changes: Any) -> Case:
    """Write a directory with the tensors whose names match."""
    tensors = {k: x for k, x in original_names(theirs.state_dict()).items() if re.fullmatch(held, k)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(original_config(theirs.config, **changes)))
    write_tokenizer(folder, pad="w0")

    @torch.no_grad()
    def logits(lang_x: Tensor, vision_x: Tensor) -> Tensor:
        embeddings = theirs.get_input_embeddings()
        images = iter(theirs.model.get_image_features(vision_x[0, :, 0], vision_feature_layer=-2).pooler_output)
        pieces = [next(images) if x == IMAGE else embeddings(x)[None] for x in lang_x[0]]
        last = torch.tensor([len(x) for x in pieces]).cumsum(0) - 1
        output = theirs.model.language_model(inputs_embeds=torch.cat(pieces)[None]).last_hidden_state
        return theirs.lm_head(output)[0, last]

    return Case(source=folder, logits=logits, made_by="Transformers' LlavaForConditionalGeneration")


def backbones(folder: Path, theirs: LlavaForConditionalGeneration) -> CompositionRequest:
    """Write the language model and the tower as they were before LLaVA's training."""
    (whole := folder / "whole").mkdir()
    found = load(original(whole, theirs)).model
    found.lang_model.save_pretrained(folder / "lm")
    write_tokenizer(folder / "lm", pad="w0")
    vision = {key: x for key, x in found.config.vision_config.items() if key in ("embed_dim", "vision_cfg")}
    (folder / "tower.json").write_text(json.dumps(vision | {"quick_gelu": True}))
    visual = found.vision_encoder.visual.state_dict()
    save_file({f"visual.{k}": x.contiguous() for k, x in visual.items()}, folder / "tower.safetensors")
    return CompositionRequest(
        language_model=str(folder / "lm"),
        vision_encoder=str(folder / "tower.json"),
        overrides=[f"vision_encoder.pretrained={folder / 'tower.safetensors'}"],
    )


def test_original(tmp_path, theirs):
    case = original(tmp_path, theirs)
    check(case, is_told=True)
    imported = load(case)
    assert imported.layout.name == "LLaVA (original)" and not imported.report.unused
    assert sorted(x for x in imported.report.absent if "visual" not in x) == [
        "added_tokens.embedding.weight",
        "added_tokens.head.weight",
    ]
    assert imported.model.config.composition.trainable == ("vision_tokenizer", "language_model")
    assert any("padded to squares" in note for note in imported.notes)


@pytest.mark.parametrize("model_type", ["llava_llama", "llava_mistral"])
def test_types_of_later_releases(tmp_path, theirs, model_type):
    model = load(original(tmp_path, theirs, model_type=model_type)).model
    assert model.config.text_config.model_type == model_type.removeprefix("llava_")


@pytest.mark.parametrize("held", [".*mm_projector.*", "(?!model.vision_tower).*"], ids=["projector", "no-tower"])
def test_original_over_backbones(tmp_path, theirs, held):
    flags = backbones(tmp_path, theirs)
    (folder := tmp_path / "found").mkdir()
    case = original(folder, theirs, held)
    if "mm_projector" not in held:  # it has its own language model
        flags = replace(flags, language_model=None)
    check(replace(case, options=flags))


def test_a_projector_file(tmp_path, theirs):
    """LLaVA's pretraining writes `mm_projector.bin` without a configuration."""
    flags = backbones(tmp_path, theirs)
    rounded = copy.deepcopy(theirs)  # as the file is, whose numbers are float16
    for parameter in rounded.model.multi_modal_projector.parameters():
        parameter.data = parameter.data.half().float()
    case = original(tmp_path, rounded)
    file = tmp_path / "mm_projector.bin"
    projector = {k: x.half() for k, x in original_names(rounded.state_dict()).items() if "mm_projector" in k}
    torch.save({k: x.float() for k, x in projector.items()}, file)
    found = load(Case(source=file, logits=case.logits, options=flags, made_by=case.made_by))
    assert found.model.config.vision_config["preprocess"]["crop"] == "down"  # LLaVA's code has Transformers' processor
    lang_x, vision_x = prompt(found.model)
    text = (lang_x[0] != IMAGE).nonzero().flatten()
    with torch.no_grad():
        ours = found.model(lang_x=lang_x, vision_x=vision_x).logits[0, text, :VOCABULARY]
    torch.testing.assert_close(ours, case.logits(lang_x, vision_x)[text], atol=1e-4, rtol=0)


@pytest.mark.parametrize("wrong", [{"mm_vision_select_layer": -1}, {"mm_vision_select_layer": -3}])
def test_another_layer_is_noticed(tmp_path, theirs, wrong):
    with pytest.raises(AssertionError):
        check(original(tmp_path, theirs, **wrong))


def test_the_class_token(tmp_path, theirs):
    model = load(original(tmp_path, theirs, mm_vision_select_feature="cls_patch")).model
    assert model.config.vision_config["num_patches"] == 5


def test_a_tower_has_to_be_read_as_there(tmp_path, theirs):
    case = original(tmp_path, theirs)
    flags = CompositionRequest(overrides=["vision_encoder.layer=-1", "vision_encoder.norm=null"])
    with pytest.raises(CheckpointError, match=r"layer=-1 and norm=None\. Add .*layer=-2 .*norm=false"):
        load(Case(source=tmp_path, logits=case.logits, options=flags, made_by=case.made_by))


def test_a_linear_projection(tmp_path, theirs):
    """LLaVA-1 projects by a single matrix, whose name has no number."""
    case = original(tmp_path, theirs)
    tensors = {k: x for k, x in original_names(theirs.state_dict()).items() if "mm_projector.2" not in k}
    save_file(
        {k.replace("mm_projector.0", "mm_projector"): x for k, x in tensors.items()}, tmp_path / "model.safetensors"
    )
    model = load(case).model
    assert model.config.composition.vision_tokenizer.type == "linear"
    assert torch.equal(model.vision_tokenizer.proj.weight, tensors["model.mm_projector.0.weight"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_aspect_ratio": "anyres"}, "cuts images into tiles"),
        ({"mm_vision_select_layer": 1}, "of layer 1"),
        ({"mm_vision_select_feature": "all"}, "takes 'all'"),
    ],
)
def test_what_is_not_read(tmp_path, theirs, changes, words):
    with pytest.raises(CheckpointError, match=words):
        load(original(tmp_path, theirs, **changes))


def test_a_deeper_projection(tmp_path, theirs):
    case = original(tmp_path, theirs)
    tensors = original_names(theirs.state_dict())
    tensors |= {
        k.replace("mm_projector.2", "mm_projector.4"): x.clone() for k, x in tensors.items() if "projector.2" in k
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="projection of 3 layers"):
        load(case)


def test_another_width_is_named(tmp_path, theirs):
    case = original(tmp_path, theirs)
    rewrite_config(tmp_path, hidden_size=64)
    report = load(case).report
    assert not report.is_complete
    assert report.mismatched["model.mm_projector.0.weight"] == ([32, 128], [64, 128])


def test_an_unknown_tower_has_to_be_named(tmp_path, theirs):
    case = original(tmp_path, theirs, "(?!model.vision_tower).*", mm_vision_tower="ORG/NAME")
    with pytest.raises(CompositionError, match="Add --vision-encoder"):
        load(case)


# -- published sizes ---------------------------------------------------------------------------------------------------

LLAMA = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
SIZES = {"7b": (20_979_712, 7_062_902_784), "13b": (31_467_520, 13_350_839_296)}


def published(size: str, vocabulary: int, **changes: Any) -> LlavaForConditionalGeneration:
    text = LlamaConfig(vocab_size=vocabulary, **LLAMA[size])
    text.num_key_value_heads = text.num_attention_heads
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **changes))


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@grid(size=SIZES, layout=["Hugging Face", "original"])
@pytest.mark.matrix
def test_published_sizes(size, layout):
    """Sizes of https://huggingface.co/liuhaotian/llava-v1.5-7b and -13b; llava-hf's tables have 64 more rows."""
    projector, total = SIZES[size]
    if layout == "original":
        theirs = published(size, 32000)
        checkpoint = shapes_of(original_names(theirs.state_dict()))
        object.__setattr__(checkpoint, "config", original_config(theirs.config))
    else:
        checkpoint = shapes_of(published(size, 32064, image_token_index=32000))
    model, report = sized(checkpoint)
    assert report.is_complete and not report.unused
    assert count(model.vision_tokenizer) == projector
    visual = model.vision_encoder.visual
    # What OpenCLIP's tower has and LLaVA does not use is not in its count.
    used = count(visual) - visual.proj.numel()
    extra = 0 if layout == "original" else 2 * 64 * model.config.text_config.hidden_size
    assert used + count(model.vision_tokenizer) + count(model.lang_model) - extra == total
    assert model.config.vision_config["num_patches"] == 576
    assert (model.config.composition.vision_encoder.name, model.vision_encoder.layer) == ("ViT-L-14-336", -2)


def test_published_projector():
    """https://huggingface.co/liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5: its shapes tell the parts."""
    tensors = original_names(published("7b", 32000).state_dict())
    found = shapes_of({k: x for k, x in tensors.items() if "mm_projector" in k})
    described = recognise(found).description
    parts = CompositionRequest().compose_over(described.composition)
    assert (parts.vision_encoder.name, parts.vision_encoder.pretrained) == ("ViT-L-14-336", "openai")
    assert (parts.vision_encoder.layer, parts.language_model.name) == (-2, "lmsys/vicuna-7b-v1.5")
    assert parts.trainable == ("vision_tokenizer",) and len(described.notes) == 2
