"""From which features tokens come, against what really changes when a feature changes, and against slow softmaxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.traced import Subject, clip, image
from vlm_cli.media import LoadedClip, LoadedImage
from vlm_cli.modeling.batching import stack_grids
from vlm_cli.tracing import origins
from vlm_cli.tracing.media import read_media
from vlm_cli.tracing.recording import record_attention

PINPOINTS = [[64, 64], [32, 64], [64, 32]]
ANYRES = {"type": "anyres", "pinpoints": PINPOINTS, "thumbnail": "first"}

#: Compositions of tokenizers that mix no further than their neighbourhoods.
MERGING: list[tuple[str, dict[str, Any], LoadedImage | LoadedClip]] = [
    ("linear", {}, image()),
    ("mlp", {}, clip(2)),
    ("linear", {"vision_tokenizer": {"frames": "mean"}}, clip(2)),
    ("linear", {"vision_encoder": {"class_token": True}}, image()),
    ("linear", {"vision_tokenizer": {"pixel_shuffle": 2}}, image()),
    ("mlp", {"vision_tokenizer": {"pixel_shuffle": 3, "pad": True, "shuffle_order": "channels"}}, image()),
    ("linear", {"vision_tokenizer": {"pool": 2}}, clip(2)),
    ("linear", {"vision_tokenizer": {"pool": 3, "pool_by": "bilinear", "pool_at": "before"}}, image()),
    ("linear", {"vision_tokenizer": {"convolutions": 1}}, image()),
    ("linear", {"tiling": ANYRES}, image(60, 24)),
    ("linear", {"tiling": ANYRES | {"thumbnail": "last", "newline": False}}, image(24, 60)),
    ("linear", {"tiling": ANYRES | {"shrink_beyond": 1}}, image(60, 60)),
    ("linear", {"tiling": ANYRES | {"clip_pool": 2, "clip_pool_at": "after"}}, clip(2)),
    ("linear", {"tiling": ANYRES | {"clip_pool": 2, "clip_pool_at": "before"}}, clip(2)),
    ("linear", {"tiling": {"type": "grid", "min_tiles": 2, "max_tiles": 4, "thumbnail": "last"}}, image(60, 24)),
    (
        "perceiver",
        {"tiling": ANYRES | {"bands": True, "newline": False}, "vision_tokenizer": {"frames": "apart"}},
        image(60, 24),
    ),
    ("perceiver", {}, clip(2)),
    ("qformer", {"vision_tokenizer": {"frames": "apart"}}, clip(2)),
    ("latent-attention", {}, clip(2)),
]


def changes(one: Subject, pixels: Any) -> Tensor:
    """Which tokens change with which features: bool[n, F, v]."""
    model = one.model
    views, size = pixels.views, pixels.size
    grid = stack_grids([[size]]).get("vision_grid")
    features = model.vision_encoder(views[None, None])  # [1, 1, F, v, d]

    def tokens(x: Tensor) -> Tensor:
        found, mask = model.encode_features(x, None, grid)
        return found[0, 0][mask[0, 0]]

    whole = tokens(features)
    F, v = features.shape[2:4]
    changed = torch.zeros(len(whole), F, v, dtype=torch.bool)
    for f in range(F):
        for p in range(v):
            other = features.clone()
            other[0, 0, f, p] += torch.randn(features.shape[-1])
            changed[:, f, p] = (tokens(other) - whole).abs().amax(-1) > 1e-6
    return changed


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("tokenizer", "settings", "medium"), MERGING, ids=[f"{i}-{x[0]}" for i, x in enumerate(MERGING)]
)
@torch.no_grad()
def test_tokens_come_from_the_features_that_change_them(
    subject: Callable[..., Subject], tokenizer: str, settings: dict[str, Any], medium: LoadedImage | LoadedClip
) -> None:
    one = subject(tokenizer, "language-stream", sections=settings)
    seen = read_media(one.model, one.processor, [medium])
    n = int(seen.mask.sum())
    found = seen.origins[0](torch.eye(n))  # [n, F, v]
    expected = changes(one, seen.pixels[0])
    assert torch.equal(found > 1e-9, expected)
    total = found.flatten(1).sum(-1)
    comes_from_pixels = expected.flatten(1).any(-1)  # newlines do not
    torch.testing.assert_close(total[comes_from_pixels], torch.ones(int(comes_from_pixels.sum())), atol=1e-5, rtol=0)
    assert not total[~comes_from_pixels].any()


@torch.no_grad()
def test_the_c_abstractor_reaches_its_neighbourhood(subject: Callable[..., Subject]) -> None:
    """Its two stages of one block reach one patch around the quarter that is pooled, and one token more."""
    one = subject("c-abstractor", "language-stream")
    tokenizer = one.model.vision_tokenizer
    seen = read_media(one.model, one.processor, [image()])
    found = seen.origins[0](torch.eye(4))[:, 0].unflatten(1, tokenizer.grid)  # [4, 4, 4]
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(4), atol=1e-5, rtol=0)
    for token, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        quarter = found[token, row : row + 2, column : column + 2]
        assert quarter.sum() > 0.5  # twice as much as anywhere


@torch.no_grad()
def test_a_tokenizer_of_another_package_is_measured(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject("linear", "language-stream", sections={"vision_tokenizer": {"pool": 2}})
    features = torch.randn(1, 2, 2, 16, 48)
    mask = torch.tensor([[[True, True], [True, False]]])
    known = origins.find_origins(one.model.vision_tokenizer, features, mask)
    foreign = _Foreign(one.model.vision_tokenizer)
    measured = origins.find_origins(foreign, features, mask)
    for medium, n in ((0, 8), (1, 4)):
        a, b = known[medium](torch.eye(n)), measured[medium](torch.eye(n))
        assert a.shape == b.shape and torch.equal(a > 0, b > 0)
        torch.testing.assert_close(b.flatten(1).sum(-1), torch.ones(n), atol=1e-5, rtol=0)
    assert not origins.is_known(foreign) and origins.is_known(one.model.vision_tokenizer)


class _Foreign(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        return self.inner(features, frame_mask)


# -- attention ---------------------------------------------------------------------------------------------------------


def slow_softmax(q: Tensor, k: Tensor, num_heads: int) -> Tensor:
    """float[n, d], float[S, d] -> float[n, S], the mean over heads."""
    width = q.shape[1] // num_heads
    out = torch.zeros(len(q), len(k))
    for h in range(num_heads):
        part = slice(h * width, (h + 1) * width)
        for i, query in enumerate(q[:, part]):
            scores = torch.stack([query @ key for key in k[:, part]]) / width**0.5
            out[i] += scores.exp() / scores.exp().sum() / num_heads
    return out


@torch.no_grad()
def test_attention_of_the_perceiver(subject: Callable[..., Subject]) -> None:
    tokenizer = subject("perceiver", "language-stream").model.vision_tokenizer
    features = torch.randn(1, 1, 1, 5, 48)
    attend = tokenizer.layers[0][0]
    with record_attention({0: attend}) as found:
        tokenizer(features)
    latents = attend.norm_latents(tokenizer.latents)
    keys = torch.cat([attend.norm_media(features[0, 0, 0]), latents])
    inner = attend.to_kv.weight.shape[0] // 2
    expected = slow_softmax(latents @ attend.to_q.weight.T, keys @ attend.to_kv.weight[:inner].T, attend.num_heads)
    torch.testing.assert_close(found.weights[0][0][0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_attention_of_latents(subject: Callable[..., Subject]) -> None:
    tokenizer = subject("latent-attention", "language-stream").model.vision_tokenizer
    features = torch.randn(1, 1, 1, 5, 48)
    (origin,) = origins.find_origins(tokenizer, features, torch.ones(1, 1, 1, dtype=torch.bool))
    attend, patches = tokenizer.x_attn, tokenizer.dense(nn.functional.normalize(features[0, 0, 0], dim=-1))
    keys = torch.cat([patches, tokenizer.latent_query])
    weights = slow_softmax(attend.q_proj(tokenizer.latent_query), attend.k_proj(keys), attend.num_heads)[:, :5]
    expected = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(origin(torch.eye(3))[:, 0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_attention_of_the_qformer(subject: Callable[..., Subject]) -> None:
    tokenizer = subject("qformer", "language-stream").model.vision_tokenizer
    features = torch.randn(1, 1, 1, 5, 48)
    layers = list(tokenizer.qformer.encoder.layer)
    with record_attention(
        {i: layer.crossattention for i, layer in enumerate(layers) if layer.has_cross_attention}
    ) as found:
        tokenizer(features)
    tokenizer.qformer.set_attn_implementation("eager")
    theirs = tokenizer.qformer(
        query_embeds=tokenizer.query_tokens, encoder_hidden_states=features[0, 0], output_attentions=True
    ).cross_attentions
    theirs = [x for x in theirs if x is not None]
    assert len(theirs) == len(found.weights) > 0
    for own, other in zip(found.weights.values(), theirs, strict=True):
        torch.testing.assert_close(own[0], other.mean(1), atol=1e-5, rtol=0)
