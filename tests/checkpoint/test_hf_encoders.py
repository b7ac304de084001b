"""`hf:` names: vision models of Transformers, and the vision halves of larger models, from directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from torch import nn

from tests.support import ROOT, seed_torch
from vlm_cli.checkpoint.parts import hf_weights
from vlm_cli.checkpoint.parts.tower import RepositoryWeights
from vlm_cli.checkpoint.parts.vision_encoders import check_tower_weights, find_tower, load_tower
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.errors import VisionEncoderError
from vlm_cli.modeling.encoders.hf import check_tokens
from vlm_cli.modeling.towers import patch_features
from vlm_cli.preprocessing import Preprocessing

_VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_WIDE = _VIT | {"intermediate_size": 64}
_TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_DINO = {"image_size": 56, "num_register_tokens": 4}
_NEXT: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 32}
_HIERA: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "masked_unit_size": [4, 4]}

#: Name -> a model that Transformers makes, the vision model in it, and its image processor.
MODELS: dict[str, tuple[Callable[[], Any], str, Any]] = {
    "clip": (
        lambda: hf.CLIPModel(hf.CLIPConfig(vision_config=_WIDE, text_config=_TEXT, projection_dim=16)),
        "vision_model",
        hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    ),
    "dino": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**(_VIT | _DINO))),
        "",
        hf.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    ),
    "vit for classes": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**_WIDE)),
        "vit",
        hf.ViTImageProcessor(size={"height": 32, "width": 32}),
    ),
    "siglip": (
        lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=_WIDE, text_config=_TEXT)),
        "vision_model",
        hf.SiglipImageProcessor(size={"height": 32, "width": 32}),
    ),
    "convnext": (
        lambda: hf.ConvNextModel(hf.ConvNextConfig(**_NEXT, image_size=64)),
        "",
        hf.ConvNextImageProcessor(size={"shortest_edge": 64}),
    ),
    "deit": (
        lambda: hf.DeiTModel(hf.DeiTConfig(**_WIDE)),
        "",
        hf.DeiTImageProcessor(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
    ),
    "swin": (
        lambda: hf.SwinModel(hf.SwinConfig(**_SWIN)),
        "",
        hf.ViTImageProcessor(size={"height": 32, "width": 32}),
    ),
    "hiera": (
        lambda: hf.HieraModel(hf.HieraConfig(**_HIERA, num_query_pool=1, image_size=[64, 64], mlp_ratio=2.0)),
        "",
        hf.BitImageProcessor(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}),
    ),
    "llava": (
        lambda: hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**_WIDE), text_config=hf.LlamaConfig(**_TEXT))
        ),
        "model.vision_tower",
        hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    ),
}
QUICK = ("llava",)
NAMES = [x if x in QUICK else pytest.param(x, marks=pytest.mark.matrix) for x in MODELS]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a model and its image processor once, and returns the directory; LLaVA's weights are in shards."""
    root = tmp_path_factory.mktemp("models")

    def write(name: str) -> Path:
        folder = root / name.replace(" ", "-")
        if not folder.exists():
            make, _, processor = MODELS[name]
            seed_torch(0)
            model = make()
            for p in model.parameters():
                nn.init.normal_(p, std=0.2)
            model.save_pretrained(folder, max_shard_size="60KB" if name == "llava" else "5GB")
            processor.save_pretrained(folder)
        return folder

    return write


def options(folder: Path, **settings: Any) -> VisionEncoderOptions:
    return VisionEncoderOptions(name=f"hf:{folder}", **settings)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_pixels_and_features_are_those_of_transformers(name: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(name)
    tower = find_tower(options(folder, norm=False if name in ("clip", "llava") else None))
    check_tower_weights(tower)
    ours: Any = load_tower(tower).eval()
    theirs = MODELS[name][0]().eval()
    theirs = type(theirs).from_pretrained(folder).eval().get_submodule(MODELS[name][1])
    processor = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    prepare = Preprocessing(tower.config["preprocess"])
    for file in ("cat.jpg", "rocket.jpg"):
        with Image.open(ROOT / "examples" / "images" / file) as image:
            picture = image.convert("RGB")
        pixels = prepare(picture)[None]
        torch.testing.assert_close(pixels, processor(picture, return_tensors="pt")["pixel_values"], atol=1e-6, rtol=0)
        last = theirs(pixel_values=pixels).last_hidden_state
        last = last.flatten(2).mT if last.ndim == 4 else last
        norm = False if name in ("clip", "llava") else None
        features = patch_features(ours, pixels, norm=norm)
        rows, columns = ours.grid
        assert features.shape[1] == rows * columns
        assert torch.equal(features, last[:, -features.shape[1] :])
        assert not torch.equal(features, patch_features(ours, pixels + 0.1, norm=norm))


def test_only_the_vision_tensors_are_read(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llava")
    found = hf_weights.VisionTensors.find(
        RepositoryWeights(str(folder)), ["embeddings.class_embedding", "encoder.layers.0.layer_norm1.weight"]
    )
    assert found.prefix.endswith("vision_tower.") or found.prefix.endswith("vision_tower.vision_model.")
    assert 0 < len(found.files) < len(list(folder.glob("*.safetensors")))
    assert all(not name.startswith(("language_model", "multi_modal")) for name in found.read({}))


@pytest.mark.matrix
@torch.inference_mode()
def test_another_image_size_resizes_the_positions(folder_of: Callable[[str], Path]) -> None:
    tower = find_tower(options(folder_of("siglip"), image_size=48))
    assert tower.config["config"]["image_size"] == 48 and tower.config["preprocess"]["size"] == 48
    ours: Any = load_tower(tower)
    assert ours.grid == (6, 6) and ours.embeddings.position_embedding.weight.shape == (36, 32)
    whole: Any = load_tower(find_tower(options(folder_of("siglip"))))
    old, new = (x.embeddings.position_embedding.weight for x in (whole, ours))
    torch.testing.assert_close(old.mean(0), new.mean(0), atol=0.1, rtol=0)
    assert torch.equal(whole.post_layernorm.weight, ours.post_layernorm.weight)


@pytest.mark.matrix
def test_fewer_layers_are_kept(folder_of: Callable[[str], Path]) -> None:
    ours: Any = load_tower(find_tower(options(folder_of("siglip"), depth=2)))
    assert len(ours.encoder.layers) == 2 and ours.structure.depth == 2


def test_tokens_are_checked_on_the_weights(folder_of: Callable[[str], Path]) -> None:
    ours: Any = load_tower(find_tower(options(folder_of("dino"))))
    check_tokens(ours, "dino")
    for wrong in ({"before": 4}, {"before": 6}, {"after": 1}):
        ours.structure = type(ours.structure)(**vars(type(ours).structure.func(ours)) | wrong)
        with pytest.raises(VisionEncoderError, match="cannot tell its patches apart"):
            check_tokens(ours, "dino")


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_directory_without_a_vision_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VisionEncoderError, match=r"no config\.json"):
        find_tower(options(tmp_path))
    hf.LlamaConfig(**_TEXT).save_pretrained(tmp_path)
    with pytest.raises(VisionEncoderError, match="type 'llama', in which Transformers has no vision model"):
        find_tower(options(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(VisionEncoderError, match="cannot read the configuration"):
        find_tower(options(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:", "no directory ''"),
        ("hf:/no/where", "no directory '/no/where', and it is no id"),
        ("hf:org/name@", "no id of a hub repository"),
        ("hf:org/none", "cannot fetch vision encoder 'hf:org/none'"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, message: str) -> None:
    with pytest.raises(VisionEncoderError, match=message):
        find_tower(VisionEncoderOptions(name=name))


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("GatedRepoError", r"is gated: .*https://huggingface\.co/org/name.*hf auth login"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
        ("RepositoryNotFoundError", "the hub has no repository 'org/name', or it is private"),
    ],
)
def test_what_the_hub_refuses_is_named(cause: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_config(*args: Any, **keywords: Any) -> None:
        # Transformers wraps the hub's error into one of its own.
        raise OSError("org/name is not a local folder") from type(cause, (Exception,), {})("refused")

    monkeypatch.setattr("vlm_cli.trust.load_config", load_config)
    with pytest.raises(VisionEncoderError, match=message):
        find_tower(VisionEncoderOptions(name="hf:org/name@v9"))


def test_settings_that_do_not_fit_are_refused(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(VisionEncoderError, match="brings its own weights"):
        find_tower(options(folder_of("siglip"), pretrained="openai"))
    with pytest.raises(VisionEncoderError, match="can be at most 3"):
        load_tower(find_tower(options(folder_of("siglip"), depth=4)))


@pytest.mark.matrix
def test_weights_that_do_not_fit_are_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**_WIDE))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, message in (
        ("num_hidden_layers", 4, "lack 16 tensors"),
        ("num_hidden_layers", 2, "layers that the configuration does not have"),
        ("intermediate_size", 80, "another shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        tower = find_tower(options(tmp_path))
        for load in (check_tower_weights, load_tower):
            with pytest.raises(VisionEncoderError, match=message):
                load(tower)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(VisionEncoderError, match=r"no file named model\.safetensors"):
        load_tower(tower)


def test_code_of_an_encoder_does_not_run(tmp_path: Path) -> None:
    code = {"model_type": "my_encoder", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(code))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(VisionEncoderError, match="runs no code of a vision encoder"):
        find_tower(options(tmp_path))


def test_views_that_vlm_leaves_out_are_named(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("siglip")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = hf.LlavaNextImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).to_dict()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(data))
    (tmp_path / "processor_config.json").unlink(missing_ok=True)
    [note] = find_tower(options(tmp_path)).notes
    assert "image_grid_pinpoints" in note and "squashed to 32x32" in note
