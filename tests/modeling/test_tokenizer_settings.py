"""The settings of vision tokenizers that published models need, against Transformers' own modules with their weights.

B batch, T_img media, F frames, v patches, d channels.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support import tiny
from tests.support.invariants import check_rows, check_state, differs, opened, same
from vlm_cli.composition import (
    CAbstractorOptions,
    LatentAttentionOptions,
    LinearOptions,
    MLPOptions,
    PerceiverOptions,
    QFormerOptions,
)
from vlm_cli.errors import CompositionError
from vlm_cli.modeling.towers import find_grid
from vlm_cli.modeling.vision_tokenizers.c_abstractor import CAbstractor
from vlm_cli.modeling.vision_tokenizers.grid import pixel_shuffle, pool
from vlm_cli.modeling.vision_tokenizers.latent_attention import LatentAttention
from vlm_cli.modeling.vision_tokenizers.linear import LinearProjection, MLPProjection
from vlm_cli.modeling.vision_tokenizers.perceiver import PerceiverResampler
from vlm_cli.modeling.vision_tokenizers.qformer import QFormer

D, OUT, SIDE = 6, 10, 6  # channels of the features and of the tokens; patches per side


def config(**sizes: Any) -> Any:
    return SimpleNamespace(text_config=SimpleNamespace(hidden_size=OUT), **sizes)


def gemma3() -> tuple[nn.Module, dict[str, Any], Callable[[Tensor], Tensor]]:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    vision = SimpleNamespace(hidden_size=D, layer_norm_eps=1e-6, image_size=SIDE * 2, patch_size=2)
    theirs = Gemma3MultiModalProjector(config(vision_config=vision, mm_tokens_per_image=(SIDE // 2) ** 2))
    settings = {"pool": 2, "norm": "gemma", "norm_eps": 1e-6, "bias": False}
    return theirs, {"type": "linear", **settings}, theirs


def internvl() -> tuple[nn.Module, dict[str, Any], Callable[[Tensor], Tensor]]:
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    theirs = InternVLMultiModalProjector(
        config(vision_config=SimpleNamespace(hidden_size=D), downsample_ratio=0.5, projector_hidden_act="gelu")
    )

    def run(x: Tensor) -> Tensor:
        grid = InternVLModel.pixel_shuffle(None, x.unflatten(1, (SIDE, SIDE)))  # type: ignore[arg-type]
        return theirs(grid.flatten(1, 2))

    return theirs, {"type": "mlp", "pixel_shuffle": 2, "norm": "layer"}, run


def aya() -> tuple[nn.Module, dict[str, Any], Callable[[Tensor], Tensor]]:
    from transformers.models.aya_vision.modeling_aya_vision import AyaVisionMultiModalProjector

    vision = SimpleNamespace(hidden_size=D)
    sizes = {"downsample_factor": 2, "alignment_intermediate_size": 14, "adapter_layer_norm_eps": 1e-6}
    theirs = AyaVisionMultiModalProjector(config(vision_config=vision, **sizes))
    settings = {"pixel_shuffle": 2, "norm": "layer", "norm_eps": 1e-6, "activation": "swiglu", "dim_hidden": 7}
    return theirs, {"type": "mlp", **settings}, lambda x: theirs(x).flatten(1, 2)


def perception() -> tuple[nn.Module, dict[str, Any], Callable[[Tensor], Tensor]]:
    from transformers.models.perception_lm.modeling_perception_lm import PerceptionLMMultiModalProjector

    vision = SimpleNamespace(model_args={"embed_dim": D})
    theirs = PerceptionLMMultiModalProjector(config(vision_config=vision, projector_pooling_ratio=2))
    return theirs, {"type": "mlp", "pool": 2, "pool_at": "after"}, theirs


def idefics3() -> tuple[nn.Module, dict[str, Any], Callable[[Tensor], Tensor]]:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    theirs = Idefics3Connector(config(vision_config=SimpleNamespace(hidden_size=D), scale_factor=3))
    return theirs, {"type": "linear", "pixel_shuffle": 3, "bias": False}, theirs


def vipllava() -> tuple[nn.Module, dict[str, Any], Callable[[Tensor], Tensor]]:
    from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

    sizes = {"vision_feature_layers": [-1], "vision_feature_layer": -1, "projector_layernorm_eps": 1e-5}
    vision = SimpleNamespace(hidden_size=D)
    theirs = VipLlavaMultiModalProjector(config(vision_config=vision, projector_hidden_act="quick_gelu", **sizes))
    return theirs, {"type": "mlp", "norm": "layer", "activation": "quick_gelu"}, theirs


def mistral3() -> tuple[nn.Module, dict[str, Any], Callable[[Tensor], Tensor]]:
    from transformers.models.mistral3.modeling_mistral3 import Mistral3PatchMerger

    theirs = Mistral3PatchMerger(
        config(vision_config=SimpleNamespace(hidden_size=D, patch_size=2), spatial_merge_size=2)
    )
    settings = {"pixel_shuffle": 2, "shuffle_order": "channels", "bias": False, "dim_out": D}

    def run(x: Tensor) -> Tensor:
        sizes = torch.tensor([[SIDE * 2, SIDE * 2]] * len(x))
        return theirs(x.flatten(0, 1), sizes).unflatten(0, (len(x), -1))

    return theirs, {"type": "linear", **settings}, run


def got_ocr2() -> tuple[nn.Module, dict[str, Any], Callable[[Tensor], Tensor]]:
    from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2MultiModalProjector

    theirs = GotOcr2MultiModalProjector(config(vision_config=SimpleNamespace(output_channels=D)))

    def run(x: Tensor) -> Tensor:
        return theirs(x.transpose(1, 2).unflatten(2, (SIDE, SIDE)))

    return theirs, {"type": "linear", "convolutions": 2}, run


TOKENIZERS: dict[str, Any] = {"linear": (LinearProjection, LinearOptions), "mlp": (MLPProjection, MLPOptions)}


def make(settings: dict[str, Any], grid: tuple[int, int] = (SIDE, SIDE)) -> Any:
    part, options = TOKENIZERS[settings["type"]]
    settings = {key: x for key, x in settings.items() if key != "type"}
    return part(options(**settings), D, grid[0] * grid[1], settings.get("dim_out", OUT), grid)


@pytest.mark.sample(2)
@pytest.mark.parametrize("model", [gemma3, internvl, aya, perception, idefics3, vipllava, mistral3, got_ocr2])
@torch.no_grad()
def test_the_projector_of(model):
    theirs, settings, run = model()
    tiny.stir(theirs, 0.5)
    ours = make(settings)
    names = list(ours.state_dict())
    # We list the norm and then the maps. Gemma's matrix stands before its norm, and has its axes the other way round.
    weights = sorted(theirs.state_dict().items(), key=lambda item: "norm" not in item[0])
    if settings.get("norm") is None:
        weights = list(theirs.state_dict().items())
    shapes = ours.state_dict()
    state = {name: x if x.shape == shapes[name].shape else x.T for name, (_, x) in zip(names, weights, strict=True)}
    ours.load_state_dict(state)

    features = torch.randn(3, SIDE**2, D)
    found = ours(features[:, None, None])[:, 0]
    assert found.shape[1] == ours.num_tokens() == ours.token_grid[0] * ours.token_grid[1]
    same(found, run(features))
    changed = next(name for name in names if name.startswith("norm" if settings.get("norm") else "proj"))
    with tiny.nudged(ours.state_dict()[changed]):
        assert differs(ours(features[:, None, None])[:, 0], run(features))


@torch.no_grad()
def test_odd_grids_are_completed_with_zeros():
    tokenizer = make({"type": "linear", "pixel_shuffle": 2, "pad": True}, grid=(3, 5))
    features = torch.randn(1, 1, 1, 15, D)
    assert tokenizer.num_tokens() == 6 and tokenizer.token_grid == (2, 3)
    whole = torch.zeros(4, 6, D)
    whole[:3, :5] = features.view(3, 5, D)
    last = torch.cat([whole[2, 4], torch.zeros(3 * D)])
    same(tokenizer(features)[0, 0, -1], tokenizer.proj(last))
    with pytest.raises(CompositionError, match=r"multiples of 2, and there are 3 x 5.*--set vision_tokenizer.pad=true"):
        make({"type": "linear", "pixel_shuffle": 2}, grid=(3, 5))
    # Ovis2 pads in this way, and a model of one frame in a square.
    square = torch.randn(2, 25, D)
    padded = functional.pad(square.unflatten(1, (5, 5)), (0, 0, 0, 1, 0, 1))
    expected = padded.reshape(2, 3, 2, 3, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(2, 9, 4 * D)
    assert torch.equal(pixel_shuffle(square, 2), expected)


def test_pooling_rounds_a_bilinear_grid_up():
    features = torch.randn(2, 3, 15, D)
    found = pool(features, 2, (3, 5), "bilinear")
    image = features.flatten(0, 1).transpose(1, 2).reshape(6, D, 3, 5)
    expected = functional.interpolate(image, size=(2, 3), mode="bilinear")
    same(found, expected.flatten(2).transpose(1, 2).view(2, 3, 6, D))
    assert differs(found, pool(features.flip(2), 2, (3, 5), "bilinear"))
    assert make({"type": "linear", "pool": 2, "pool_by": "bilinear"}, grid=(3, 5)).num_tokens(2) == 12


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_convolutions_halve_the_grid_rounded_up(count):
    tokenizer = make({"type": "linear", "convolutions": count}, grid=(3, 5))
    assert tokenizer.token_grid == {1: (2, 3), 3: (1, 1)}[count]
    assert [x.out_channels for x in tokenizer.convolutions] == [*[2 * D, 4 * D][: count - 1], OUT]
    features = torch.randn(1, 1, 2, 15, D)
    x = features[0, 0, 1].T.reshape(1, D, 3, 5)
    for weight in tokenizer.convolutions.state_dict().values():  # each token from its 3 × 3 neighbours, by hand
        windows = functional.unfold(x, 3, padding=1, stride=2)[0]
        x = (weight.flatten(1) @ windows).reshape(1, len(weight), -(-x.shape[2] // 2), -(-x.shape[3] // 2))
    found, expected = tokenizer(features)[0, 0], tokenizer.proj(x[0].flatten(1).T)
    same(found[len(expected) :], expected)
    assert differs(found[: len(expected)], expected)


@torch.no_grad()
def test_scale_and_depth():
    plain, scaled = make({"type": "mlp", "map_depth": 3}), make({"type": "mlp", "map_depth": 3, "scale": 0.25})
    scaled.load_state_dict(plain.state_dict())
    features = torch.randn(1, 2, 1, SIDE**2, D)
    same(scaled(features), plain(features) / 4)
    assert [name for name, _ in plain.named_parameters()] == [
        f"proj.{i}.{x}" for i in (0, 2, 4) for x in ("weight", "bias")
    ]


@pytest.mark.parametrize("part", ["perceiver", "qformer", "latent-attention"])
@torch.no_grad()
def test_frames_apart_are_frames_alone(part):
    made: Any = {
        "perceiver": (PerceiverResampler, PerceiverOptions),
        "qformer": (QFormer, QFormerOptions),
        "latent-attention": (LatentAttention, LatentAttentionOptions),
    }[part]
    known = tiny.TOKENIZERS.get(part, {"type": part, "num_latents": 3, "num_heads": 2})
    sizes = {key: x for key, x in known.items() if key != "type"}
    apart, together = (made[0](made[1](**sizes, frames=x), D, 4, OUT).eval() for x in ("apart", "together"))
    together.load_state_dict(apart.state_dict())
    features, mask = torch.randn(2, 2, 3, 4, D), torch.tensor([[[True] * 3, [True, True, False]]] * 2)
    found = apart(features, mask)
    assert found.shape == (2, 2, apart.num_tokens(3), OUT) and apart.num_tokens(3) == 3 * apart.num_tokens()
    alone = torch.cat([together(features[:, :, i : i + 1]) for i in range(3)], dim=2)
    kept = apart.token_mask(mask)
    same(found[kept], alone[kept])
    assert kept.sum() == 2 * 5 * 3 and differs(found[kept], alone.roll(1, 2)[kept])
    assert together.num_tokens(3) == 3


def test_grids_follow_from_the_image():
    def grid(num_patches: int, size: Any, patch: Any = 8, *, class_token: bool = False, **more: Any) -> Any:
        return find_grid({"vision_cfg": {"image_size": size, "patch_size": patch}, **more}, num_patches, class_token)

    assert grid(16, 32) == (4, 4) and grid(17, 32, class_token=True) == (4, 4)
    assert grid(8, [16, 32]) == (2, 4) and grid(8, [32, 16]) == (4, 2)
    assert grid(256, 224, [7, 28]) == (32, 8)
    assert grid(17, 32) is None and grid(7, [16, 32]) is None
    assert grid(12, 32, grid=[3, 4]) == (3, 4)


def regnet_block(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """A block of a RegNetY with LayerNorms over channels and SiLU, from its paper's drawing; float[d, h, w]."""

    def norm(y: Tensor, conv: str) -> Tensor:
        mean, var = y.mean(0), y.var(0, unbiased=False)
        return ((y - mean) / (var + 1e-5).sqrt()) * w[f"{conv}.bn.weight"][:, None, None] + w[f"{conv}.bn.bias"][
            :, None, None
        ]

    def conv(y: Tensor, at: str, **sizes: Any) -> Tensor:
        return norm(functional.conv2d(y[None], w[f"{name}.{at}.conv.weight"], **sizes)[0], f"{name}.{at}")

    y = functional.silu(conv(x, "conv1"))
    y = functional.silu(conv(y, "conv2", padding=1, groups=len(y)))
    squeezed = y.mean((1, 2))
    for fc, act in (("fc1", functional.silu), ("fc2", torch.sigmoid)):
        squeezed = act(w[f"{name}.se.{fc}.weight"][..., 0, 0] @ squeezed + w[f"{name}.se.{fc}.bias"])
    y = conv(y * squeezed[:, None, None], "conv3")
    shortcut = conv(x, "downsample") if f"{name}.downsample.conv.weight" in w else x
    return functional.silu(y + shortcut)


@torch.no_grad()
def test_the_c_abstractor_matches_its_drawing():
    tokenizer = CAbstractor(CAbstractorOptions(num_queries=4, depth=2, dim=8), D, 16, OUT, (4, 4)).eval()
    tiny.stir(tokenizer, 0.4)
    w, features = tokenizer.state_dict(), torch.randn(2, 1, 2, 16, D)
    found = tokenizer(features)
    assert found.shape == (2, 1, tokenizer.num_tokens(2), OUT)
    x = (features[1, 0, 1] + w["pos_emb"][0]).T.view(D, 4, 4)
    for block in ("net.0.b1", "net.0.b2"):
        x = regnet_block(x, w, block)
    x = torch.stack([x[:, a : a + 2, b : b + 2].mean((1, 2)) for a in (0, 2) for b in (0, 2)], -1).view(-1, 2, 2)
    for block in ("net.2.b1", "net.2.b2"):
        x = regnet_block(x, w, block)
    tokens = functional.silu(x.flatten(1).T @ w["readout.0.weight"].T + w["readout.0.bias"])
    expected = tokens @ w["readout.2.weight"].T + w["readout.2.bias"]
    same(found[1, 0, 4:], expected)
    assert differs(found[1, 0, :4], expected)


@pytest.mark.matrix
@pytest.mark.parametrize("fusion", ["language-stream", "cross-attention"])
@pytest.mark.parametrize(
    "tokenizer",
    [
        {"type": "c-abstractor", "num_queries": 4, "depth": 1, "dim": 16},
        {"type": "latent-attention", "num_latents": 3, "num_heads": 2},
        {"type": "perceiver", "frames": "apart"},
        {"type": "qformer", "frames": "apart"},
        {"type": "mlp", "pixel_shuffle": 2, "norm": "layer", "activation": "swiglu"},
        {"type": "linear", "pool": 2, "norm": "gemma", "scale": 0.5, "bias": False},
        {"type": "mlp", "convolutions": 1, "norm": "rms", "frames": "mean"},
    ],
    ids=lambda x: x["type"],
)
def test_invariants_hold(tokenizer, fusion):
    base = tiny.TOKENIZERS.get(tokenizer["type"], {}) | tokenizer
    model = opened(tokenizer=base, fusion=fusion)
    check_rows(model)
    check_state(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"convolutions": 2, "pixel_shuffle": 2}, "pixel_shuffle=2 and convolutions=2 both merge .*one of them[.]"),
        ({"convolutions": -1}, "convolutions must be at least 0, got -1"),
        ({"convolutions": 9}, "convolutions must be at most 8, got 9"),
        ({"pool": 2, "pixel_shuffle": 2}, "pool=2 and pixel_shuffle=2 both merge patches before the map"),
        ({"pad": True}, "pad fills the grid for pixel_shuffle, which is 1"),
        ({"norm": "layer", "norm_eps": 0.0}, "norm_eps must be positive"),
        ({"scale": 0.0}, "scale must be a number other than 0"),
        ({"map_depth": 1}, "map_depth must be at least 2. For a single map, choose the type linear"),
        ({"dim_hidden": 0}, "dim_hidden must be at least 1"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(CompositionError, match=message):
        MLPOptions(**settings)


def test_a_c_abstractor_makes_a_square():
    with pytest.raises(CompositionError, match="the square of a whole number, such as 144, got 150"):
        CAbstractorOptions(num_queries=150)
