"""Every setting of a published checkpoint is carried over, has no effect, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, GenerationConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.support.llava import IMAGE, huggingface
from tests.support.published import SIZE, check, load
from vlm_cli.checkpoint.published.layouts import blip2, idefics, llava
from vlm_cli.checkpoint.published.preprocessing import read_preprocessing
from vlm_cli.checkpoint.published.recognising import recognise
from vlm_cli.checkpoint.published.settings import Settings, check_settings_of
from vlm_cli.checkpoint.published.towers.clip import CLIP_SETTINGS
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.towers import build_tower
from vlm_cli.preprocessing import Preprocessing

TABLES = {
    "llava": llava.HuggingFaceLLaVA.settings,
    "llava.clip": CLIP_SETTINGS,
    **{f"blip2.{part}": table for part, table in blip2._SETTINGS.items()},
    **{f"idefics.{part}": table for part, table in idefics._SETTINGS.items()},
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_each_setting_of_transformers_is_in_a_table(table: Settings) -> None:
    """A later Transformers may add a setting: it is then refused unless it has its default."""
    general = {*PreTrainedConfig().to_dict(), *vars(GenerationConfig())}
    assert {name for name in table.config().to_dict() if table.unknown(name)} <= general


def test_a_setting_that_no_table_has_is_refused_unless_it_has_its_default() -> None:
    table = Settings(config=CLIPVisionConfig, read={"hidden_size"})
    check_settings_of("x", "vision_config", {"hidden_size": 9, "image_size": 224, "what_nobody_reads": 1}, table)
    with pytest.raises(CheckpointError, match=r"'x' has vision_config.image_size=32, and vlm does not know"):
        check_settings_of("x", "vision_config", {"image_size": 32}, table)


# -- LLaVA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-5, 1e-2])
def test_the_epsilon_of_the_vision_encoder(tmp_path: Path, epsilon: float) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=16, projection_dim=24, layer_norm_eps=epsilon)
    case = huggingface(tmp_path, vision=vision)
    check(case)
    tower = build_tower(recognise(str(tmp_path)).description.vision_config)
    assert {x.eps for x in tower.modules() if isinstance(x, nn.LayerNorm)} == {epsilon}


def test_sizes_that_a_file_leaves_out_are_those_of_transformers(tmp_path: Path) -> None:
    """Early releases wrote no size that is the default of the vision encoder's class."""
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "projection_dim": 24}
    case = huggingface(tmp_path, vision=CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=16))
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["vision_config"].pop("num_attention_heads") == 12
    (tmp_path / "config.json").write_text(json.dumps(settings))
    check(case)


def over_siglip(folder: Path, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**sizes, image_size=SIZE, patch_size=16)
    return huggingface(folder, vision=vision, **{"vision_feature_select_strategy": "full", **changes})


@pytest.mark.parametrize("layer", [-1, -2])
def test_llava_over_siglip(tmp_path: Path, layer: int) -> None:
    case = over_siglip(tmp_path, vision_feature_layer=layer)
    check(case)
    mean = load(case).processor.image_processor.preprocess_config["mean"]
    assert tuple(mean) == (0.5, 0.5, 0.5)  # SigLIP's, not CLIP's


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"projector_hidden_act": "silu"}, "has projector_hidden_act='silu'; vlm builds only 'gelu' or 'linear'"),
        ({"vision_config": {"model_type": "bert"}}, "type 'bert'; vlm reads CLIP, SigLIP and other vision"),
        ({"vision_config": {"num_channels": 1}}, "has vision_config.num_channels=1; vlm builds only 3"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "drops the first patch"),
    ],
)
def test_settings_that_are_refused(llava_files: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    for file in llava_files.iterdir():
        (tmp_path / file.name).hardlink_to(file) if file.name != "config.json" else None
    data = json.loads((llava_files / "config.json").read_text())
    data["vision_config"] |= changes.pop("vision_config", {})
    (tmp_path / "config.json").write_text(json.dumps(data | changes))
    with pytest.raises(CheckpointError, match=words):
        recognise(str(tmp_path)).description  # noqa: B018


@pytest.fixture(scope="module")
def llava_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    huggingface(folder)
    return folder


def test_files_beside_the_weights(tmp_path: Path) -> None:
    case = huggingface(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7], "temperature": 0.2}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    imported = load(case)
    assert imported.model is not None and imported.model.generation_config.eos_token_id[:2] == [5, 7]
    assert imported.model.generation_config.temperature is None and "temperature=0.2" in imported.notes[-1]
    assert imported.processor.tokenizer.chat_template == "{{ messages[0].content }}!"
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "LlavaImageProcessor", "do_pad": true}'
    )
    assert any("padded to squares" in note for note in load(case).notes)
    assert imported.processor.media_token_id == IMAGE


# -- preprocessing -----------------------------------------------------------------------------------------------------

SQUARE = {"height": 32, "width": 32}
PLAIN: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"shortest_edge": 36}},
        {"do_normalize": False},
        {"size": SQUARE},
        {"resample": 2},
        {"do_pad": False},
    ],
    ids=str,
)
def test_pixels_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = CLIPImageProcessorPil(**PLAIN | changes)
    theirs.save_pretrained(tmp_path)
    ours = Preprocessing(read_preprocessing(tmp_path, 32))
    plain = CLIPImageProcessorPil(**PLAIN)
    for size in ((64, 40), (41, 75)):
        picture = Image.effect_noise(size, 80).convert("RGB")
        wanted = torch.as_tensor(theirs(picture, return_tensors="pt")["pixel_values"][0])
        assert (ours(picture) - wanted).abs().max() < 2e-2
        if changes and "do_pad" not in changes:  # the picture shows what each setting does
            assert (wanted - torch.as_tensor(plain(picture, return_tensors="pt")["pixel_values"][0])).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": {"shortest_edge": 30}}, r"sets size=\{'shortest_edge': 30\}; .* the 32 pixels of the vision encoder"),
        ({"size": {"height": 36, "width": 36}}, "sets size="),
        ({"size": {"longest_edge": 32}}, "sets size="),
        ({"crop_size": 28}, "sets crop_size=28"),
        ({"do_center_crop": False}, "sets do_center_crop=false"),
        ({"do_resize": False}, "sets do_resize=false; vlm prepares images with do_resize=true"),
        ({"do_rescale": False}, "sets do_rescale=false"),
        ({"rescale_factor": 0.5}, "sets rescale_factor=0.5"),
        ({"image_grid_pinpoints": [[1, 2]]}, "sets image_grid_pinpoints="),
        ({"resample": 5}, "with filter 5"),
    ],
)
def test_preprocessing_that_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PLAIN | changes))
    with pytest.raises(CheckpointError, match=words):
        read_preprocessing(tmp_path, 32)
