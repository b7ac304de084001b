"""The settings that published models need, each against a loop or against another library with the same weights."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import IdeficsConfig, MllamaTextConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from tests.support import invariants, reference, seed_torch, tiny
from tests.support.invariants import differs, logits, opened, same
from tests.support.tiny import VOCABULARY, nudged
from vlm_cli.checkpoint.create import plan
from vlm_cli.checkpoint.parts.vision_encoders import find_tower, load_tower
from vlm_cli.composition import Composition, LinearOptions, MLPOptions, PerceiverOptions, VisionEncoderOptions
from vlm_cli.errors import CompositionError, VisionEncoderError
from vlm_cli.modeling.fusion.visibility import MediaVisibility
from vlm_cli.modeling.towers import build_tower, find_tower_shape, patch_features, truncate_layers
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.modeling.vision_tokenizers.linear import LinearProjection, MLPProjection, pixel_shuffle
from vlm_cli.modeling.vision_tokenizers.perceiver import PerceiverResampler
from vlm_cli.modeling.vlm import VLM

# -- every invariant, with the settings ------------------------------------------------------------------------------

COMPOSITIONS: dict[str, dict[str, Any]] = {
    "blip2": {
        "vision": "eva02",
        "tokenizer": "qformer",
        "fusion": "language-stream",
        "vision_encoder": {"depth": 1, "class_token": True},
    },
    "flamingo-mini": {
        "tokenizer": {"type": "perceiver", "activation": "squared_relu"},
        "fusion": {"type": "cross-attention", "first": 0, "every": 2, "activation": "squared_relu"},
        "vision_encoder": {"class_token": True, "norm": False},
    },
    "idefics": {
        "tokenizer": {"type": "perceiver", "activation": "relu", "qk_norm": True},
        "fusion": {"type": "llama-cross-attention", "every": 2, "gate": "scalar", "qk_norm": False, "attend": "all"},
        "vision_encoder": {"class_token": True, "norm": False},
    },
    "mllama": {
        "tokenizer": "linear",
        "fusion": {
            **{"type": "llama-cross-attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "qk_norm": True},
            **{"feed_forward_before_media": False, "attend_before_media": True},
        },
    },
    "nanovlm": {
        "vision": "siglip",
        "tokenizer": {"type": "linear", "bias": False, "pixel_shuffle": 2},
        "fusion": "language-stream",
    },
}


@pytest.fixture(scope="module", params=COMPOSITIONS)
def model(request: pytest.FixtureRequest) -> VLM:
    return opened(**COMPOSITIONS[request.param])


@pytest.mark.sample(2)
def test_invariants_hold(model):
    invariants.check_text_only(model)
    invariants.check_against_bare(model)
    invariants.check_cached(model)
    invariants.check_rows(model)
    invariants.check_state(model)


# -- vision encoder --------------------------------------------------------------------------------------------------


def stack(visual: nn.Module) -> Any:
    return visual.transformer.resblocks if hasattr(visual, "transformer") else visual.trunk.blocks


@torch.no_grad()
def layer_output(visual: nn.Module, pixels: Tensor, layer: int) -> Tensor:
    """float[N, 1 + v, d] that a layer gives, the class token first."""
    seen: list[Tensor] = []
    handle = stack(visual)[layer].register_forward_hook(lambda module, args, out: seen.append(out))
    visual(pixels)
    handle.remove()
    return seen[0]


@pytest.mark.sample(2)
@pytest.mark.parametrize("norm", [None, True, False])
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("vision", ["vit", "siglip"])
@torch.no_grad()
def test_class_token_and_norm(vision, layer, norm):
    visual, pixels = tiny.tower(vision), torch.randn(2, 3, tiny.SIZE, tiny.SIZE)
    raw = layer_output(visual, pixels, layer)
    normed = (visual.ln_post if vision == "vit" else visual.trunk.norm)(raw)
    applies = layer == -1 if norm is None else norm
    expected, other = (normed, raw) if applies else (raw, normed)
    found = patch_features(visual, pixels, layer, class_token=True, norm=norm)
    same(found, expected)
    assert differs(found, other)
    same(patch_features(visual, pixels, layer, norm=norm), expected[:, 1:])
    assert find_tower_shape(tiny.VISION[vision], layer, class_token=True, norm=norm) == found.shape[1:]


@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_class_token_of_a_tower_without_a_norm_of_patches(layer):
    visual, pixels = tiny.tower("eva02"), torch.randn(2, 3, tiny.SIZE, tiny.SIZE)
    found = patch_features(visual, pixels, layer, class_token=True)
    same(found, layer_output(visual, pixels, layer))
    assert differs(found, layer_output(visual, pixels, -3 - layer))


@pytest.mark.parametrize("vision", ["vit", "eva02", "siglip", "coca"])
@torch.no_grad()
def test_a_tower_that_is_cut_gives_what_its_last_layer_gives(vision):
    whole, pixels = tiny.tower(vision), torch.randn(2, 3, tiny.SIZE, tiny.SIZE)
    depth = len(stack(whole)) - 1
    tower = truncate_layers(copy.deepcopy(whole), depth)
    settings = {"norm": False} if vision in ("vit", "siglip") else {}  # others have no norm of patches
    found = patch_features(tower, pixels, **settings)
    same(found, patch_features(whole, pixels, -2))
    assert differs(found, patch_features(whole, pixels, **settings))
    assert len(stack(build_tower(tiny.VISION[vision] | {"depth": depth}))) == len(stack(tower)) == depth
    assert truncate_layers(whole, None) is whole and len(stack(whole)) == depth + 1


@pytest.mark.parametrize("vision", ["vit", "siglip"])
def test_whole_weights_are_loaded_and_then_cut(vision, tmp_path):
    whole, pixels = tiny.tower(vision), torch.randn(1, 3, tiny.SIZE, tiny.SIZE)
    torch.save({f"visual.{name}": x for name, x in whole.state_dict().items()}, tmp_path / "whole.pt")
    (tmp_path / "tower.json").write_text(json.dumps(tiny.VISION[vision]))
    options = VisionEncoderOptions(name=str(tmp_path / "tower.json"), pretrained=str(tmp_path / "whole.pt"), depth=1)
    tower = find_tower(options)
    assert tower.config["depth"] == 1
    found = load_tower(tower)
    with torch.no_grad():
        same(patch_features(found, pixels, norm=False), layer_output(whole, pixels, 0)[:, 1:])
        assert differs(patch_features(found, pixels, norm=False), layer_output(whole, pixels, 1)[:, 1:])


def test_a_cut_model_is_saved_and_loaded(tmp_path):
    model = VLM(tiny.config(vision_encoder={"depth": 1, "class_token": True})).eval()
    assert (model.config.vision_config["num_patches"], len(stack(model.vision_encoder.visual))) == (5, 1)
    model.save_pretrained(tmp_path)
    loaded, batch = VLM.from_pretrained(tmp_path), tiny.batch(model)
    assert torch.equal(logits(copy.deepcopy(loaded).eval(), **batch), logits(model, **batch))


@pytest.mark.parametrize(
    ("vision", "settings", "message"),
    [
        (
            "no class",
            {"class_token": True},
            "layer=-1 and image_size=None and class_token=True: the tower has no class",
        ),
        ("resnet", {"class_token": True}, "the tower has no class token; leave out class_token"),
        ("eva02", {"norm": False}, "the tower has no last norm of its patches"),
        ("swin", {"norm": False}, "the tower has no last norm of its patches"),
        ("convnext", {"norm": True}, "the tower has no last norm of its patches"),
        ("coca", {"norm": True}, "the tower has no last norm of its patches"),
        ("resnet", {"depth": 1}, "the tower is no single stack of layers that could be cut"),
        ("fastvit", {"depth": 1}, "the tower is no single stack of layers that could be cut"),
        ("vit", {"depth": 3}, "depth=3: the tower has 2 layers, so depth can be at most 2"),
        ("vit", {"depth": 0}, "vision_encoder.depth must be at least 1, got 0"),
        ("vit", {"norm": "yes"}, "vision_encoder.norm must be true or false or null"),
    ],
)
def test_towers_that_lack_what_is_asked_for(vision, settings, message, tmp_path):
    with pytest.raises(CompositionError, match=message):
        planned(tmp_path, vision, vision_encoder=settings)


#: A tower of timm with register tokens and no class token.
NO_CLASS_TOKEN = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "timm_model_name": "test_vit3", "timm_pool": "avg", "timm_proj": "linear"},
}


def planned(folder: Path, vision: str = "vit", tokenizer: str = "perceiver", **settings: dict[str, Any]) -> Any:
    """The plan of a model of a tower, without tokenizer or weights; settings over the parts."""
    (folder / "tower.json").write_text(json.dumps((tiny.VISION | {"no class": NO_CLASS_TOKEN})[vision]))
    tiny.language_model_config("llama").save_pretrained(folder / "lm")
    parts = {
        "vision_encoder": {"name": str(folder / "tower.json")},
        "vision_tokenizer": tiny.TOKENIZERS[tokenizer],
        "fusion": tiny.FUSIONS["cross-attention"],
        "language_model": {"name": str(folder / "lm")},
    }
    return plan(Composition.compose(None, parts, settings), need_tokenizer=False)


def test_encoders_of_other_packages_refuse_the_settings(monkeypatch):
    from vlm_cli.registry import VISION_ENCODERS, RegisteredPart

    part = RegisteredPart("outside", f"{__name__}:Outside", "vlm_cli.composition:VisionEncoderOptions", "")
    monkeypatch.setitem(VISION_ENCODERS._built_in, "outside", part)
    assert "depth" not in find_tower(VisionEncoderOptions(name="outside")).config
    with pytest.raises(VisionEncoderError, match="of another package, and depth and norm are settings of OpenCLIP's"):
        find_tower(VisionEncoderOptions(name="outside", depth=3, norm=False))
    with pytest.raises(VisionEncoderError, match="class_token and norm are settings of OpenCLIP's towers"):
        patch_features(Outside({}), torch.zeros(1, 3, 8, 8), class_token=True)


class Outside(nn.Module):
    """A vision encoder of another package."""

    image_size = 8

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    @classmethod
    def configure(cls, options: VisionEncoderOptions) -> dict[str, Any]:
        return {"vision_cfg": {"image_size": 8}}

    def patch_features(self, pixels: Tensor, layer: int) -> Tensor:
        return pixels.flatten(2).transpose(1, 2) * self.scale


# -- perceiver -------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("activation", ["gelu", "relu", "squared_relu"])
@torch.no_grad()
def test_activations_of_the_perceiver(activation):
    options = PerceiverOptions(depth=2, num_heads=2, head_dim=8, num_latents=3, activation=activation)
    resampler, features = PerceiverResampler(options, 12, 4), torch.randn(2, 2, 1, 4, 12)
    mask = torch.ones(2, 2, 1, dtype=torch.bool)
    found = resampler(features, mask)
    for other in ("gelu", "relu", "squared_relu"):
        expected = reference.perceiver(resampler, features, mask, activation=other)
        assert differs(found, expected) is (other != activation)


IDEFICS_PERCEIVER = {
    "attn": {"norm_media": "context_layer_norm", "norm_latents": "latents_layer_norm", "to_q": "q_proj"}
    | {"to_out": "output_proj", "q_norm": "q_layer_norm", "k_norm": "k_layer_norm"},
    "ff": {"0": "ln", "1": "fc", "3": "c_proj"},
}


@torch.no_grad()
def test_the_perceiver_of_idefics():
    sizes = {"vision_config": {"embed_dim": 12}, "perceiver_config": {"qk_layer_norms_perceiver": True}}
    theirs = IdeficsPerceiverResampler(IdeficsConfig(**sizes), 12, 2, 3, 8, 5)
    tiny.stir(theirs, 0.3)
    options = PerceiverOptions(depth=2, num_heads=3, head_dim=8, num_latents=5, activation="relu", qk_norm=True)
    ours, context = PerceiverResampler(options, 12, 4), torch.randn(2, 4, 12)
    ours.latents.copy_(theirs.latents)
    ours.norm.load_state_dict(theirs.layer_norm.state_dict())
    for (attn, ff), (their_attn, their_ff) in zip(ours.layers, theirs.blocks, strict=True):
        for part, other, names in ((attn, their_attn, "attn"), (ff, their_ff, "ff")):
            for name, their_name in IDEFICS_PERCEIVER[names].items():
                part.get_submodule(name).load_state_dict(getattr(other, their_name).state_dict())
        attn.to_kv.weight.copy_(torch.cat([their_attn.k_proj.weight, their_attn.v_proj.weight]))
    expected = theirs(context)
    same(ours(context[:, None, None])[:, 0], expected)
    for name in ("q_norm", "k_norm"):
        with nudged(getattr(ours.layers[1][0], name).weight):
            assert differs(ours(context[:, None, None])[:, 0], expected)


# -- linear and mlp --------------------------------------------------------------------------------------------------


def test_pixel_shuffle_example():
    squares = pixel_shuffle(torch.arange(16)[:, None], 2)
    assert squares.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(("part", "options"), [(LinearProjection, LinearOptions), (MLPProjection, MLPOptions)])
@torch.no_grad()
def test_pixel_shuffle_matches_a_loop(part, options):
    s, side, d = 3, 6, 5
    tokenizer = part(options(pixel_shuffle=s), d, side**2, 7)
    features = torch.randn(2, 1, 2, side**2, d)
    found = tokenizer(features)
    assert found.shape == (2, 1, 2 * 4, 7) and tokenizer.num_tokens(2) == 8
    assert tokenizer.token_mask(torch.tensor([[[True, False]]])).sum() == 4

    def expected(first: str) -> Tensor:
        rows = []
        for row, frame in ((b, f) for b in range(2) for f in range(2)):
            grid = features[row, 0, frame].view(side, side, d)
            for top in range(0, side, s):
                for left in range(0, side, s):
                    offsets = [(y, x) if first == "row" else (x, y) for y in range(s) for x in range(s)]
                    rows.append(tokenizer.proj(torch.cat([grid[top + y, left + x] for y, x in offsets])))
        return torch.stack(rows).view_as(found)

    same(found, expected("row"))
    assert differs(found, expected("column"))


@pytest.mark.parametrize(("part", "options"), [(LinearProjection, LinearOptions), (MLPProjection, MLPOptions)])
def test_projections_without_bias(part, options):
    names = [[n for n, _ in part(options(bias=bias), 4, 4, 6).named_parameters()] for bias in (True, False)]
    assert [n for n in names[0] if not n.endswith("bias")] == names[1] and len(names[0]) == 2 * len(names[1])


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("vision", "settings", "message"),
    [
        (
            "vit",
            {"vision_tokenizer": {"pixel_shuffle": 3}},
            "rows and columns of patches that are multiples of 3, and there are 2 x 2",
        ),
        (
            "vit",
            {"vision_tokenizer": {"pixel_shuffle": 2}, "vision_encoder": {"class_token": True}},
            "gives 5 features, of which 2 x 2 are patches. Leave out vision_encoder.class_token",
        ),
        ("vit", {"vision_tokenizer": {"pixel_shuffle": 0}}, "pixel_shuffle must be at least 1"),
    ],
)
def test_pixel_shuffle_needs_a_grid(vision, settings, message, tmp_path):
    assert planned(tmp_path, vision, "linear", vision_tokenizer={"pixel_shuffle": 2}).meta_model
    with pytest.raises(CompositionError, match=message):
        planned(tmp_path, vision, "linear", **settings)


# -- gated cross-attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"first": 2},
            "fusion.first=2 leaves no cross-attention block: the language model has 2 layers. Choose at most 1",
        ),
        (
            {"every": 3},
            "fusion.every=3 leaves no cross-attention block: the language model has 2 layers. Choose at most 2",
        ),
        ({"first": -1}, "fusion.first must be at least 0, got -1"),
        ({"type": "llama-cross-attention", "norm_eps": 0.0}, "fusion.norm_eps must be positive and at most 1, got 0.0"),
        ({"type": "llama-cross-attention", "dim_ff": 0}, "fusion.dim_ff must be at least 1, got 0"),
        ({"type": "llama-cross-attention", "num_kv_heads": 5}, r"num_kv_heads must divide num_heads \(32\), got 5"),
        ({"type": "llama-cross-attention", "gate": "matrix"}, "fusion.gate must be 'scalar' or 'vector'"),
        ({"activation": "silu"}, "fusion.activation must be 'gelu' or 'relu' or 'squared_relu'"),
    ],
)
def test_blocks_that_cannot_be(settings, message, tmp_path):
    with pytest.raises(CompositionError, match=message):
        planned(tmp_path, fusion=settings)


def idefics_layer(qk_norm: bool, gate: str) -> IdeficsGatedCrossAttentionLayer:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 24, "vision_config": {"embed_dim": 20}}
    alphas = {"alpha_type": {"scalar": "float"}.get(gate, gate), "alpha_initializer": "zeros"}
    config = IdeficsConfig(**sizes, **alphas, qk_layer_norms=qk_norm, rms_norm_eps=1e-4)
    config._attn_implementation = "eager"
    layer = IdeficsGatedCrossAttentionLayer(config)
    tiny.stir(layer, 0.4)
    return layer


IDEFICS_BLOCK = {
    "attn_gate": "alpha_cross_attn",
    "ff_gate": "alpha_dense",
    "attn.norm.weight": "input_layernorm.weight",
    **{f"attn.{x}_proj.weight": f"cross_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attn.{x}_norm.weight": f"cross_attn.{x}_layer_norm.weight" for x in "qk"},
    "ff.norm.weight": "post_attention_layernorm.weight",
    **{f"ff.{x}_proj.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("gate", ["scalar", "vector"])
@torch.no_grad()
def test_the_block_of_idefics(qk_norm, gate):
    theirs = idefics_layer(qk_norm, gate)
    settings = {"type": "llama-cross-attention", "head_dim": 16, "qk_norm": qk_norm, "gate": gate, "norm_eps": 1e-4}
    fusion = opened(fusion=settings | {"attend": "all"}, tokenizer={"type": "perceiver", "dim_out": 20}).fusion
    block, weights = fusion.blocks["1"], theirs.state_dict()
    assert len(block.state_dict()) == len(weights)
    block.load_state_dict({ours: weights[IDEFICS_BLOCK[ours]].view_as(x) for ours, x in block.state_dict().items()})

    x, tokens = torch.randn(2, 6, 32), torch.randn(2, 2, 3, 20)
    positions = torch.tensor([[0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 2]])
    mask = torch.ones(2, 2, 3, dtype=torch.bool)
    visibility = fusion.visibility(positions, mask)
    seen = torch.arange(1, 3).repeat_interleave(3) <= positions[..., None]  # [B, T, S]
    hidden = torch.where(seen[:, None], 0.0, torch.finfo(torch.float32).min)
    expected = theirs(
        x,
        image_hidden_states=tokens.flatten(1, 2),
        image_attention_mask=hidden,
        cross_attention_gate=seen.any(-1).float(),
    )
    found = block(x, fusion.project(tokens)[:, 1], visibility)
    same(found, expected)
    last = MediaVisibility.build(positions, mask, attend="last", feed_forward_before_media=True)
    assert differs(block(x, fusion.project(tokens)[:, 1], last), expected)
    for name, parameter in block.named_parameters():
        with nudged(parameter):
            assert differs(block(x, fusion.project(tokens)[:, 1], visibility), expected), name
    rows = mask.clone()
    rows[1] = False  # a row without media passes through
    found = block(x, fusion.project(tokens)[:, 1], fusion.visibility(positions * torch.tensor([[1], [0]]), rows))
    assert torch.equal(found[1], x[1])
    same(found[0], expected[0])


MLLAMA_BLOCK = {
    "attn_gate": "cross_attn_attn_gate",
    "ff_gate": "cross_attn_mlp_gate",
    "attn.norm.weight": "input_layernorm.weight",
    **{f"attn.{x}.weight": f"cross_attn.{x}.weight" for x in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"attn.{x}.weight": f"cross_attn.{x}.weight" for x in ("q_norm", "k_norm")},
    "ff.norm.weight": "post_attention_layernorm.weight",
    **{f"ff.{x}_proj.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}


@torch.no_grad()
def test_the_block_of_mllama():
    """Four heads share two heads of keys and values; text before the first medium reads all of the row's media."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    config = MllamaTextConfig(**sizes, rms_norm_eps=1e-4)
    config._attn_implementation = "eager"
    theirs = tiny.stir(MllamaCrossAttentionDecoderLayer(config, 0), 0.4)
    settings = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dim_ff": 24, "qk_norm": True, "norm_eps": 1e-4}
    before = {"feed_forward_before_media": False, "attend_before_media": True}
    kind = {"type": "llama-cross-attention", "gate": "scalar", **settings}
    fusion = opened(fusion=kind | before, tokenizer={"type": "perceiver", "dim_out": 32}).fusion
    block, weights = fusion.blocks["1"], theirs.state_dict()
    assert len(block.state_dict()) == len(weights)
    block.load_state_dict({ours: weights[MLLAMA_BLOCK[ours]] for ours in block.state_dict()})

    x, tokens = torch.randn(2, 6, 32), torch.randn(2, 2, 3, 32)
    positions = torch.tensor([[0, 1, 1, 1, 1, 2], [0, 0, 1, 1, 1, 2]])
    mask = torch.ones(2, 2, 3, dtype=torch.bool)
    mask[0, 0, 2] = False  # a view that is padding
    seen = (torch.arange(1, 3).repeat_interleave(3) == positions[..., None]) & mask.flatten(1)[:, None]  # [B, T, S]
    sees = seen.any(-1, keepdim=True)
    hidden = torch.where((seen | ~sees)[:, None], 0.0, torch.finfo(torch.float32).min)
    expected = theirs(x, tokens.flatten(1, 2), hidden, None, sees[:, None].float())
    found = block(x, fusion.project(tokens)[:, 1], fusion.visibility(positions, mask))
    same(found, expected)
    for changed in ({"attend_before_media": False}, {"feed_forward_before_media": True}):
        other = opened(fusion=kind | before | changed, tokenizer={"type": "perceiver", "dim_out": 32}).fusion
        assert differs(block(x, fusion.project(tokens)[:, 1], other.visibility(positions, mask)), expected), changed
    rows = mask.clone()
    rows[0, 1] = False  # a medium that is padding is read by nobody
    alone = fusion.visibility(positions.clamp(max=1), rows)
    noise = torch.where(rows.any(-1)[..., None, None], tokens, 100.0)
    same(
        block(x, fusion.project(tokens)[:, 1], alone)[0],
        block(x, fusion.project(noise)[:, 1], alone)[0],
    )


def test_a_gate_may_have_a_number_for_each_channel():
    shapes = {}
    for gate in ("scalar", "vector"):
        model = tiny.build(fusion={"type": "llama-cross-attention", "gate": gate})
        shapes[gate] = {tuple(x.shape) for name, x in model.fusion.named_parameters() if name.endswith("_gate")}
        assert not any(x.any() for name, x in model.fusion.named_parameters() if name.endswith("_gate"))
    assert shapes == {"scalar": {(1,)}, "vector": {(32,)}}


# -- a bias of the head ----------------------------------------------------------------------------------------------


def biased(language_model: str = "llama", fusion: str = "cross-attention") -> VLM:
    """A model whose language model's head has a bias of ours; what else is ours is as in `tiny.build`."""
    config = tiny.config(fusion=fusion, language_model=language_model)
    language_model_options = replace(config.composition.language_model, head_bias=True)
    config.composition = replace(config.composition, language_model=language_model_options)
    encoder = VisionEncoder(tiny.tower("vit"))
    seed_torch(0)
    lm = copy.deepcopy(tiny.language_model(language_model))
    return VLM(config, vision_encoder=encoder, lang_model=lm).eval()


@pytest.mark.sample(2)
@pytest.mark.parametrize("language_model", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("fusion", ["cross-attention", "language-stream"])
def test_a_bias_of_the_head_is_added_to_the_language_models_own_logits(fusion, language_model):
    model = biased(language_model, fusion)
    bias, batch = model.added_tokens.base_bias.data, tiny.batch(model)
    expected = logits(model, **batch)
    assert bias.shape == (VOCABULARY,) and not bias.any()
    plain = tiny.build(fusion=fusion, language_model=language_model)
    assert plain.added_tokens.base_bias is None
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(logits(plain, **batch), expected)

    bias.normal_()
    found = logits(model, **batch)
    same(found[..., :VOCABULARY], expected[..., :VOCABULARY] + bias)
    assert torch.equal(found[..., VOCABULARY:], expected[..., VOCABULARY:])
    model.added_tokens.head.bias.data.fill_(0.5)
    same(logits(model, **batch)[..., VOCABULARY:], expected[..., VOCABULARY:] + 0.5)
    bias[7] = 100.0
    assert (model.generate(**batch, max_new_tokens=2)[:, -2:] == 7).all()


def test_a_bias_of_the_head_belongs_to_the_added_tokens(tmp_path):
    model, plain = tiny.open_gates(biased()), tiny.build()
    names = {n for n, _ in model.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert names == {"added_tokens.base_bias", "added_tokens.head.bias"}
    invariants.check_cached(model)
    invariants.check_rows(model)
    invariants.check_state(model)
    invariants.check_gradients(model, ["added_tokens"], ["fusion", "language_model"])
    model.save_pretrained(tmp_path)
    loaded = VLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.added_tokens.base_bias, model.added_tokens.base_bias)


def test_tokens_start_at_the_mean_beside_a_bias_of_ours():
    model = biased()
    lm = model.lang_model
    model.added_tokens.start_at_mean(lm.get_input_embeddings(), lm.get_output_embeddings())
    assert not model.added_tokens.head.bias.any()


def test_a_bias_is_added_once_where_the_logits_are_cut_down():
    """Some models cut their head's output down to their own vocabulary, and the added columns are appended anew."""
    model = biased()
    model.added_tokens.base_bias.data.normal_()
    ids = torch.randint(1, VOCABULARY, (1, 5))
    expected = logits(model, lang_x=ids)

    def cut_down(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = output.logits[..., :VOCABULARY]
        return output

    model.lang_model.register_forward_hook(cut_down)
    assert torch.equal(logits(model, lang_x=ids), expected)
