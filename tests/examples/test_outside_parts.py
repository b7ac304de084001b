"""Parts of another package in this process: those of `examples/plugin`, and vision encoders made for a test.

The checks of `tests/support/invariants.py` run here, on the models of this file, as they run on our own parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vlm_cli.registry
from tests.support import ROOT, invariants, tiny
from tests.support.packages import forget_packages
from vlm_cli.checkpoint.parts.vision_encoders import find_tower, list_towers, load_tower
from vlm_cli.composition import Composition, VisionEncoderOptions
from vlm_cli.errors import CompositionError, PluginError, UnknownNameError, VisionEncoderError
from vlm_cli.modeling.conditioning import Conditioning
from vlm_cli.modeling.renamed import encodes_media_independently
from vlm_cli.modeling.towers import find_tower_shape, patch_features
from vlm_cli.modeling.vlm import VLM
from vlm_cli.registry import VISION_ENCODERS, VISION_TOKENIZERS, RegisteredPart

PLUGIN = ROOT / "examples" / "plugin"


@pytest.fixture(scope="module")
def plugin() -> Iterator[None]:
    """The plugin, as if it were installed here."""
    declared = re.findall(
        r'^\[project\.entry-points\."(.+)"\]\n(.+) = "(.+)"', (PLUGIN / "pyproject.toml").read_text(), re.MULTILINE
    )
    points = [EntryPoint(name, value, group) for group, name, value in declared]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PLUGIN)
        patch.setattr(vlm_cli.registry, "entry_points", lambda group: [x for x in points if x.group == group])
        forget_packages()
        yield
    forget_packages()


MODELS = (
    ("conv-patches", "grid-pooling", "running-mean", "llama"),
    ("conv-patches", "perceiver", "cross-attention", "gpt2"),
    ("vit", "grid-pooling", "language-stream", "mistral"),
    ("resnet", "linear", "running-mean", "mamba2"),
)


@pytest.fixture(scope="module", params=MODELS, ids="+".join)
def model(request: pytest.FixtureRequest, plugin: None) -> Iterator[VLM]:
    """Parts of the plugin together and among ours; gates open. Tests leave it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.VISION, "conv-patches", find_tower(encoder(image_size=64)).config)
        patch.setitem(tiny.TOKENIZERS, "grid-pooling", {"type": "grid-pooling"})
        patch.setitem(tiny.FUSIONS, "running-mean", {"type": "running-mean"})
        yield tiny.open_gates(tiny.build(*request.param))


def encoder(**settings: Any) -> Any:
    """Options of the plugin's encoder."""
    return VISION_ENCODERS["conv-patches"].options_class()(name="conv-patches", **settings)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "check",
    [
        invariants.check_text_only,
        invariants.check_against_bare,
        invariants.check_cached,
        invariants.check_continued_cache,
        invariants.check_chunked_prefill,
        invariants.check_rows,
        invariants.check_trainable,
        invariants.check_placeholders,
    ],
)
def test_what_holds_for_our_parts_holds_here(model: VLM, check: Callable[[VLM], None]) -> None:
    if check is invariants.check_chunked_prefill and invariants.language_model_name(model) == "mamba2":
        pytest.skip(invariants.NO_CHUNKED_GENERATE["mamba2"])
    check(model)


@pytest.mark.sample(2)
def test_a_saved_model_is_loaded_as_it_was(model: VLM, tmp_path: Path) -> None:
    invariants.check_saved(model, tmp_path)


@pytest.mark.sample(2)
def test_padding_frames_never_leak(model: VLM) -> None:
    rows = [tiny.row(model, n, 7 + n, frames=frames, seed=n) for n, frames in ((1, 2), (2, 3), (0, 1))]
    batch = tiny.collate(rows, garbage=1e4)
    together = invariants.logits(model, **batch)
    for i, row in enumerate(rows):
        alone = invariants.logits(model, **row.inputs())[0]
        invariants.same(together[i][batch["attention_mask"][i].bool()], alone)
    batch["vision_mask"][0, 0, 2] = True
    assert invariants.differs(invariants.logits(model, **batch)[0], together[0])


def test_a_closed_gate_is_the_bare_language_model(plugin: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.FUSIONS, "running-mean", {"type": "running-mean"})
        model = tiny.build(fusion="running-mean")
    row = tiny.row(model, 2)
    ours = invariants.logits(model, **row.inputs())[0, :, : tiny.VOCABULARY]
    assert torch.equal(ours, invariants.bare_logits(model, row))


def test_media_count_from_their_placeholder_on_and_on_average(plugin: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.FUSIONS, "running-mean", {"type": "running-mean"})
        model = tiny.open_gates(tiny.build(fusion="running-mean"))
    row = tiny.row(model, 2, 7)  # `<image>` at positions 1 and 3
    tokens, mask = model.encode_vision(row.vision_x)
    with model.conditioned(row.lang_x, tokens) as inputs:
        ids = inputs["input_ids"].clamp(max=tiny.VOCABULARY - 1)
        model.conditioning.ids = row.lang_x
        with_media = model.get_input_embeddings()(ids)
        model.conditioning.media = None
        without = model.get_input_embeddings()(ids)
    first, second = tokens[0].mean(1)
    gate = model.fusion.media_gate.tanh()
    seen = [None, first, first, (first + second) / 2, (first + second) / 2]
    for position, mean in enumerate(seen):
        expected = 0 * without[0, 0] if mean is None else gate * model.fusion.proj(mean)
        torch.testing.assert_close((with_media - without)[0, position], expected, atol=1e-5, rtol=1e-4)


def test_pooling_is_the_mean_of_each_quarter(plugin: None) -> None:
    part = VISION_TOKENIZERS["grid-pooling"]
    tokenizer = part.load()(part.options_class()(), dim_in=5, num_patches=16)
    grid = torch.randn(4, 4, 5)
    quarters = [grid[y : y + 2, x : x + 2].mean((0, 1)) for y in (0, 2) for x in (0, 2)]
    found = tokenizer(grid.reshape(1, 1, 1, 16, 5))
    torch.testing.assert_close(found[0, 0], tokenizer.proj(torch.stack(quarters)))
    with pytest.raises(CompositionError, match="needs a square of patches, got 15"):
        part.load()(part.options_class()(), dim_in=5, num_patches=15)


# -- the registry of vision encoders -----------------------------------------------------------------------------------


def compose(*overrides: str, **parts: Any) -> Composition:
    return Composition.compose("flamingo", parts, overrides=overrides)


@pytest.mark.parametrize("name", ["conv-patches", {"name": "conv-patches"}, {"name": "conv-patches", "depth": 4}])
def test_an_encoder_has_its_own_settings(plugin: None, name: Any) -> None:
    found = compose("vision_encoder.depth=4", vision_encoder=name)
    assert found.vision_encoder == encoder(depth=4)
    assert Composition.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    tagged = compose(vision_encoder="conv-patches:some.safetensors")
    assert tagged.vision_encoder == encoder(pretrained="some.safetensors")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vision_encoder.depth=no", "vision_encoder.depth must be a whole number, got false"),
        ("vision_encoder.dept=1", "unknown key vision_encoder.dept. Did you mean 'depth'?"),
        ("vision_encoder.depth=-1", "vision_encoder.depth must be at least 0, got -1"),
        ("vision_encoder.layer=0", "vision_encoder.layer counts from the end"),
    ],
)
def test_own_settings_are_checked_as_all_are(plugin: None, override: str, message: str) -> None:
    with pytest.raises(CompositionError) as caught:
        compose(override, vision_encoder="conv-patches")
    assert message in str(caught.value)


def test_the_settings_of_one_encoder_are_not_those_of_another(plugin: None) -> None:
    assert compose(vision_encoder="ViT-B-32").vision_encoder == VisionEncoderOptions(name="ViT-B-32")
    # Both have a `depth`, of convolutions and of the layers that are kept.
    assert (
        encoder(depth=0).openclip_settings == {} and encoder(depth=0).feature_arguments == encoder().feature_arguments
    )
    with pytest.raises(CompositionError, match=r"vision_encoder\.depth must be at least 1, got 0"):
        compose("vision_encoder.depth=0", vision_encoder="ViT-B-32")


def test_an_encoder_is_described_as_those_of_openclip_are(plugin: None) -> None:
    config = find_tower(encoder(image_size=48, depth=1)).config
    assert config["type"] == "conv-patches" and config["vision_cfg"] == {"image_size": 48, "depth": 1}
    theirs = find_tower(VisionEncoderOptions(name="ViT-B-32", image_size=48)).config["preprocess"]
    assert config["preprocess"] == {**theirs, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert find_tower_shape(config) == (9, 64)
    assert list_towers()["conv-patches"] == VISION_ENCODERS["conv-patches"].summary


def test_layers_count_from_the_end(plugin: None) -> None:
    tower, pixels = load_tower(find_tower(encoder(depth=2))), torch.randn(1, 3, 224, 224)
    first, last = tower.stem(pixels).flatten(2).transpose(1, 2), patch_features(tower, pixels)
    assert torch.equal(patch_features(tower, pixels, -3), first) and not torch.equal(last, first)
    with pytest.raises(ValueError, match="has 3 layers"):
        patch_features(tower, pixels, -4)


def test_an_encoder_loads_its_weights(plugin: None, tmp_path: Path) -> None:
    state = load_tower(find_tower(encoder())).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_tower(find_tower(encoder(pretrained=str(tmp_path / "w.safetensors")))).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)
    with pytest.raises(VisionEncoderError, match="'conv-patches' cannot load the weights 'nowhere'"):
        load_tower(find_tower(encoder(pretrained="nowhere")))


class Encoder(nn.Module):
    """One that has what it must have and nothing more."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.image_size, self.scale = 8, nn.Parameter(torch.ones(1))

    @classmethod
    def configure(cls, options: VisionEncoderOptions) -> dict[str, Any]:
        return {"vision_cfg": {"image_size": 8}}

    def patch_features(self, pixels: torch.Tensor, layer: int) -> torch.Tensor:
        return pixels.flatten(2).transpose(1, 2) * self.scale


class Forgetful(Encoder):
    @classmethod
    def configure(cls, options: VisionEncoderOptions) -> dict[str, Any]:
        return {"vision_cfg": {}}


class Misspelt(Encoder):
    @classmethod
    def configure(cls, options: VisionEncoderOptions) -> dict[str, Any]:
        return {"vision_cfg": {"image_size": 8}, "preprocess": {"means": [0.5, 0.5, 0.5]}}


class Flat(Encoder):
    def patch_features(self, pixels: torch.Tensor, layer: int) -> torch.Tensor:
        return pixels.flatten(1)


@pytest.fixture
def minimal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`minimal(cls, name)` registers an encoder for one test."""

    def register(cls: type, name: str = "minimal") -> VisionEncoderOptions:
        part = RegisteredPart(name, f"{__name__}:{cls.__name__}", "vlm_cli.composition:VisionEncoderOptions", "")
        monkeypatch.setitem(VISION_ENCODERS._built_in, name, part)
        return VisionEncoderOptions(name=name)

    return register


def test_a_tag_needs_a_way_to_load_it(minimal: Any) -> None:
    minimal(Encoder)
    assert find_tower_shape(find_tower(VisionEncoderOptions(name="minimal")).config) == (64, 3)
    with pytest.raises(UnknownNameError, match="'minimal' has no pretrained weights, so pretrained='best'"):
        find_tower(VisionEncoderOptions(name="minimal", pretrained="best"))


def test_an_encoder_that_does_not_keep_to_the_protocol(minimal: Any) -> None:
    with pytest.raises(PluginError, match=r"Forgetful\.configure gives no configuration.*KeyError: 'image_size'"):
        find_tower(minimal(Forgetful))
    with pytest.raises(PluginError, match=r"preprocess has 'means', and may have size, mode, mean, std"):
        find_tower(minimal(Misspelt))
    with pytest.raises(ValueError, match=r"gives \(1, 192\) for one image, expected \(1, v, d\)"):
        find_tower_shape(find_tower(minimal(Flat)).config)
    with pytest.raises(PluginError, match="'ViT-B-32' is a name of OpenCLIP"):
        find_tower(minimal(Encoder, "ViT-B-32"))


class OldFusion(VLM):
    """A fusion with the names of the plugin contract until 0.1: it adds the number of media so far."""

    @classmethod
    def media_width(cls, dim_embedding: int) -> int | None:
        return None

    def _build_fusion(self, parts: Any, dim_layer: int) -> None:
        self.fusion = nn.Module()
        self.calls = 0

    def prepare_media(self, vision_tokens: Tensor, media_mask: Tensor) -> Tensor:
        return vision_tokens.flatten(1).mean(1)

    def _at_call(self, prompt: Conditioning, ids: Tensor, end: int | None) -> Conditioning:
        self.calls += 1
        return super()._at_call(prompt, ids, end)

    def _embed_media(self, embeddings: Tensor, c: Conditioning) -> Tensor:
        assert c is self._conditioning
        return embeddings + c.media_positions[..., None]

    def positions_per_medium(self, num_frames: int = 1) -> int:
        return super().positions_per_medium(num_frames)


def test_the_contract_of_01_is_still_read() -> None:
    torch.manual_seed(0)
    model = tiny.open_gates(OldFusion(tiny.config(fusion="language-stream")).eval())
    row = tiny.row(model, 2)
    found = invariants.logits(model, **row.inputs())[..., : tiny.VOCABULARY]
    assert model.calls == 1 and model.num_positions(3) == 1
    ids = row.lang_x.clamp(max=tiny.VOCABULARY - 1)
    embeddings = model.added_tokens.embed(row.lang_x, model.get_input_embeddings()(ids))
    counts = (row.lang_x == tiny.IMAGE).cumsum(-1)
    with torch.no_grad():
        expected = model.lang_model(inputs_embeds=embeddings + counts[..., None]).logits
    invariants.same(found, expected)
    assert invariants.differs(found, model.lang_model(inputs_embeds=embeddings).logits)


def test_a_tokenizer_of_01_says_that_it_reads_media_apart() -> None:
    assert encodes_media_independently(SimpleNamespace(reads_media_apart=True))
    assert not encodes_media_independently(SimpleNamespace(reads_media_apart=False))
    assert not encodes_media_independently(SimpleNamespace())
    assert not encodes_media_independently(SimpleNamespace(encodes_media_independently=False, reads_media_apart=True))
