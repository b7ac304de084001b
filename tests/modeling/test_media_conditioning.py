"""Media: where each image acts, how frames are masked, and each part of the model against a slow loop.

Section numbers are those of the invariants in docs/architecture.md. `tests/support/invariants.py` holds the checks that
other tests repeat on other models.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import reference, tiny
from tests.support.grid import grid
from tests.support.invariants import (
    check_placeholders,
    differs,
    generate_with_logits,
    logits,
    opened,
    same,
    swapped,
)
from tests.support.tiny import IMAGE, nudged
from vlm_cli.modeling.fusion.expansion import expand_media_tokens, pack_valid_tokens, scatter_media
from vlm_cli.modeling.fusion.visibility import MediaVisibility, attend_to_media
from vlm_cli.modeling.language_model import update_hidden_states
from vlm_cli.modeling.towers import build_tower, find_tower_shape, patch_features
from vlm_cli.modeling.vlm import VLM

each_fusion = pytest.mark.parametrize("fusion", tiny.FUSIONS)


# -- 9: the k-th image lands at the k-th placeholder -------------------------------------------------------------------


@pytest.mark.sample(2)
def test_each_image_is_first_seen_at_its_placeholder(model):
    check_placeholders(model)


@pytest.mark.sample(2)
@each_fusion
def test_swapping_two_images_swaps_two_rows(fusion):
    model = opened(fusion=fusion)
    row = tiny.row(model, 2)
    both = tiny.Row(torch.cat([row.vision_x, swapped(row.vision_x)]), row.lang_x.expand(2, -1))
    one, other = logits(model, **both.inputs())
    again, first = logits(model, vision_x=swapped(both.vision_x), lang_x=both.lang_x)
    same(torch.stack([one, other]), torch.stack([first, again]))
    assert differs(one, other)


@pytest.mark.sample(2)
@each_fusion
def test_generated_tokens_follow_the_order_of_images(fusion):
    model = opened(fusion=fusion)
    row = tiny.row(model, 2)
    ordered = generate_with_logits(model, row.inputs(), 2).logits[1]
    changed = generate_with_logits(model, {"vision_x": swapped(row.vision_x), "lang_x": row.lang_x}, 2).logits[1]
    assert differs(ordered, changed)


# -- 10: frames --------------------------------------------------------------------------------------------------------


TOKENIZERS_WITH_FRAMES: dict[str, tiny.Settings] = {
    **tiny.TOKENIZERS,
    "perceiver-frames": {"type": "perceiver", "max_num_frames": 4, "max_num_media": 3},
    "linear-mean": {"type": "linear", "frames": "mean"},
    "mlp-mean": {"type": "mlp", "frames": "mean"},
}


def video_model(tokenizer: str, fusion: str = "cross-attention") -> VLM:
    return opened(fusion=fusion, tokenizer=TOKENIZERS_WITH_FRAMES[tokenizer])


@pytest.mark.sample(2)
@grid(tokenizer=TOKENIZERS_WITH_FRAMES, fusion=tiny.FUSIONS)
def test_padding_frames_never_leak(tokenizer, fusion):
    model = video_model(tokenizer, fusion)
    rows = [tiny.row(model, n, 7 + n, frames=frames, seed=n) for n, frames in ((1, 2), (2, 3), (0, 1), (2, 1))]
    batch = tiny.collate(rows, garbage=1e4)
    together = logits(model, **batch)
    for i, row in enumerate(rows):
        there = batch["attention_mask"][i].bool()
        same(together[i][there], logits(model, **row.inputs())[0])
    batch["vision_mask"][0, 0, 2] = True
    assert differs(logits(model, **batch)[0], together[0])


@pytest.mark.sample(2)
@pytest.mark.parametrize("tokenizer", TOKENIZERS_WITH_FRAMES)
def test_tokens_of_ragged_videos_match_a_loop(tokenizer):
    model = video_model(tokenizer)
    module = model.vision_tokenizer
    mask = torch.tensor([[[True, True, False], [True, True, True]], [[True, False, False], [False, False, False]]])
    features = torch.randn(*mask.shape, model.config.vision_config["num_patches"], model.config.vision_config["dim"])
    with torch.no_grad():
        found, there = module(features, mask), module.token_mask(mask)
        if tokenizer.startswith("perceiver"):
            expected = reference.perceiver(module, features, mask)
        elif tokenizer == "qformer":
            expected = reference.qformer(module, features, mask, num_heads=2, every=2)
        else:
            media = reference.projection(module, features, mask)
            same(found[there], torch.cat([tokens for row in media for tokens in row]))
            assert [[len(tokens) for tokens in row] for row in media] == [
                [x for x in r if x] for r in there.sum(-1).tolist()
            ]
            return
    assert torch.equal(there, mask.any(-1, keepdim=True).expand_as(there))
    same(found[there], expected[there])
    with nudged(next(module.parameters())):
        assert differs(module(features, mask)[there], expected[there])


@pytest.mark.parametrize(("tokenizer", "sees_order"), [("perceiver", False), ("perceiver-frames", True)])
def test_frame_embeddings_tell_frames_apart(tokenizer, sees_order):
    model = video_model(tokenizer)
    video = tiny.row(model, 1, frames=3).vision_x
    with torch.no_grad():
        forward, backward = model.encode_vision(video)[0], model.encode_vision(video.flip(2))[0]
    assert differs(forward, backward) is sees_order


@pytest.mark.parametrize(("media", "frames", "kind"), [(1, 5, "5 frames"), (4, 1, "4 media")])
def test_more_frames_or_media_than_embeddings_are_refused(media, frames, kind):
    model = video_model("perceiver-frames")
    with pytest.raises(ValueError, match=f"got {kind}, but the resampler was made for at most"):
        model.encode_vision(torch.zeros(1, media, frames, 3, tiny.SIZE, tiny.SIZE))


def test_the_mean_of_frames_has_the_tokens_of_one():
    concatenated, mean = video_model("linear"), video_model("linear-mean")
    video = tiny.row(mean, 1, frames=3).vision_x
    with torch.no_grad():
        found, frames = mean.encode_vision(video)[0], concatenated.encode_vision(video)[0]
    same(found, frames.unflatten(2, (3, -1)).mean(2))
    assert (
        (found.shape[2], frames.shape[2])
        == (4, 12)
        == (
            mean.vision_tokenizer.num_tokens(3),
            concatenated.vision_tokenizer.num_tokens(3),
        )
    )


@pytest.mark.sample(2)
@each_fusion
def test_a_video_is_one_medium_in_generation(fusion):
    model = video_model("linear", fusion)
    rows = [tiny.row(model, 1, 6, frames=3), tiny.row(model, 2, 8, frames=1)]
    options = {"max_new_tokens": 4, "do_sample": False}
    alone = [model.generate(**row.inputs(), **options)[0, -4:].tolist() for row in rows]
    assert model.generate(**tiny.collate(rows), **options)[:, -4:].tolist() == alone


# -- the parts against slow loops --------------------------------------------------------------------------------------


def attending(**settings: Any) -> VLM:
    return opened(fusion={"type": "cross-attention"} | settings)


@pytest.mark.sample(2)
@pytest.mark.parametrize("attend", ["last", "all"])
@pytest.mark.parametrize(("feed_forward_before_media", "activation"), [(True, "squared_relu"), (False, "gelu")])
def test_cross_attention_matches_a_loop(attend, feed_forward_before_media, activation):
    settings = {
        "attend": attend,
        "feed_forward_before_media": feed_forward_before_media,
        "activation": activation,
    }
    fusion = attending(**settings).fusion
    block = fusion.blocks["1"]
    x, tokens = torch.randn(3, 6, 32), torch.randn(3, 3, 2, 32)
    positions = torch.tensor([[0, 1, 1, 2, 2, 3], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    mask = (torch.arange(3) < positions[:, -1:])[..., None].repeat(1, 1, 2)
    mask[0, 1, 1] = False

    def ours(mask: Tensor) -> Tensor:
        keys_values = fusion.project(tokens)[:, 1]
        return block(x, keys_values, fusion.visibility(positions, mask))

    with torch.no_grad():
        expected = reference.cross_attend(block, x, tokens, mask, positions, **settings)
        same(ours(mask), expected)
        mask[0, 1, 1] = True
        assert differs(ours(mask), expected)
        mask[0, 1, 1] = False
        with nudged(block.attn.to_kv.weight):
            assert differs(ours(mask), expected)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("settings", "numbers"), [({}, ["0", "1"]), ({"every": 2}, ["1"]), ({"every": 2, "first": 0}, ["0"])]
)
def test_blocks_stand_before_their_layers(settings, numbers):
    model = attending(**settings)
    assert list(model.fusion.blocks) == numbers
    row, seen = tiny.row(model, 2), {}
    for i, layer in enumerate(model.lang_model.model.layers):
        layer.register_forward_pre_hook(lambda m, args, i=i: seen.update({f"into {i}": args[0]}))
        layer.register_forward_hook(lambda m, args, out, i=i: seen.update({f"out of {i}": out}))
    model.lang_model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.update({"embedded": out}))
    with torch.no_grad():
        model(**row.inputs())
        tokens, mask = model.encode_vision(row.vision_x)
        positions = (row.lang_x == IMAGE).cumsum(-1)
        for i, before in enumerate(("embedded", "out of 0")):
            expected = seen[before]
            if str(i) in numbers:
                expected = reference.cross_attend(model.fusion.blocks[str(i)], expected, tokens, mask, positions)
            same(seen[f"into {i}"], expected)


@each_fusion
def test_a_fusion_says_what_it_has(fusion):
    model = tiny.build(fusion=fusion)
    has_blocks = fusion != "language-stream"
    assert model.block_layers == ([0, 1] if has_blocks else [])
    gates = {f"blocks.{i}.{name}" for i in model.block_layers for name in ("attn_gate", "ff_gate")}
    assert model.gates().keys() == gates and not any(gate.any() for gate in model.gates().values())
    assert [model.media_seen(k) for k in (0, 1, 3)] == [[], [1], [3] if has_blocks else [1, 2, 3]]
    assert model.splices_media is not has_blocks and model.fusion_problem() is None


@pytest.mark.parametrize("fusion", ["cross-attention", "llama-cross-attention"])
def test_a_fusion_that_attends_to_all_media_says_so(fusion):
    model = tiny.build(fusion={"type": fusion, "attend": "all", "every": 2, "first": None})
    assert model.media_seen(3) == [1, 2, 3] and model.block_layers == [1]


def test_media_visibility_example():
    positions, mask = torch.tensor([[0, 1, 1, 2, 2]]), torch.ones(1, 2, 2, dtype=torch.bool)
    last, everything = (
        MediaVisibility.build(positions, mask, attend=attend, feed_forward_before_media=False)
        for attend in ("last", "all")
    )
    # Equal keys and values that name their position: what is looked at has a share in the result.
    keys_values = torch.stack([torch.zeros(1, 1, 4, 4), torch.eye(4)[None, None]], dim=1)
    shares = attend_to_media(torch.zeros(1, 1, 5, 4), keys_values, last).masked_fill(~last.reads, 0)
    pictures = ["".join(".1"[int(x > 0)] for x in row) for row in shares[0]]
    assert pictures == ["....", "11..", "11..", "..11", "..11"]
    assert last.reads.flatten().tolist() == last.feeds.flatten().tolist() == [False, True, True, True, True]
    assert everything.attention[0, 0, 3:].all() and not everything.attention[0, 0, 1:3, 2:].any()


def test_expand_example():
    a, b, c, I, p = 5, 6, 7, IMAGE, tiny.PAD  # noqa: E741
    rows = torch.tensor([[a, I, b], [a, b, c]])
    expansion = expand_media_tokens(rows, None, rows == I, torch.tensor([[3], [0]]), p)
    assert expansion.ids.tolist() == [[a, I, I, I, b], [p, p, a, b, c]]
    assert expansion.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert expansion.last.tolist() == [[0, 3, 4], [2, 3, 4]]
    assert expansion.fold(torch.arange(10).view(2, 5, 1))[..., 0].tolist() == [[0, 3, 4], [7, 8, 9]]


def test_compact_and_place_example():
    tokens, mask = torch.arange(1.0, 5).view(1, 2, 2, 1), torch.tensor([[[True, False], [True, True]]])
    media = pack_valid_tokens(tokens, mask)
    assert media.flatten().tolist() == [1, 3, 4, 2]
    is_media = torch.tensor([[True, False, True, True]])
    placed = scatter_media(torch.full((1, 4, 1), 9.0), media, is_media, is_media.cumsum(-1))
    assert placed.flatten().tolist() == [1, 9, 3, 4]


def test_layers_with_several_residual_streams():
    """AltUp (gemma3n) changes its active stream; hyper-connections add to all what the mean gains."""
    B, T, S, d = 2, 3, 4, 5

    def update(x: Tensor) -> Tensor:
        assert x.shape == (B, T, d)
        return 2 * x + 1

    def run(hidden: Tensor) -> Tensor:
        (found, flag), _ = update_hidden_states(update, (hidden, "flag"), {}, torch.Size((B, T)), d)
        _, named = update_hidden_states(update, (), {"hidden_states": hidden}, torch.Size((B, T)), d)
        assert flag == "flag" and torch.equal(named["hidden_states"], found)
        return found

    plain, streams = torch.randn(B, T, d), torch.randn(B, T, S, d)
    same(run(plain), 2 * plain + 1)
    expected = streams + streams.mean(2, keepdim=True) + 1
    same(run(streams), expected)
    same(run(streams.flatten(2)), expected.flatten(2))
    altup = streams.permute(2, 0, 1, 3)
    same(run(altup), torch.cat([2 * altup[:1] + 1, altup[1:]]))


@pytest.mark.sample(2)
@grid(vision=tiny.VISION, layer=[-1, -2])
def test_features_have_the_shape_that_was_foretold(vision, layer):
    tower = tiny.tower(vision)
    config = tiny.config(vision=vision, vision_encoder={"layer": layer}).vision_config
    size = config["vision_cfg"]["image_size"]
    with torch.no_grad():
        features = patch_features(tower, torch.randn(2, 3, size, size), layer)
    assert features.shape == (2, config["num_patches"], config["dim"])
    assert differs(features[0], features[1])


@pytest.mark.sample(2)
@pytest.mark.filterwarnings("ignore::UserWarning:timm")  # of how it resizes Swin's tables
@pytest.mark.parametrize("vision", ["vit", "siglip", "eva02", "swin", "convnext"])
def test_towers_are_built_at_the_size_that_is_asked_for(vision):
    config = copy.deepcopy(tiny.VISION[vision])
    config["vision_cfg"]["image_size"] = 64
    tower = build_tower(config)
    with torch.no_grad():
        features = patch_features(tower.eval(), torch.randn(1, 3, 64, 64))
    assert features.shape[1:] == find_tower_shape(config)
