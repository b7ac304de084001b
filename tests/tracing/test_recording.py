"""Recorded attention against Transformers' own, and against a slow softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny import LANGUAGE_MODELS, language_model, nudged
from tests.support.traced import Subject, image
from vlm_cli.modeling.language_model import decoder_layers
from vlm_cli.tracing.attention import record_model
from vlm_cli.tracing.media import read_media
from vlm_cli.tracing.recording import attention_weights, record_attention

IDS = torch.arange(1, 10)[None]
WITHOUT = {"mamba", "mamba2"}  # attention
HYBRID = {"jamba", "zamba2"}


def slow_softmax(q: Tensor, k: Tensor, sees: Callable[[int, int], bool], scale: float) -> Tensor:
    """float[h, T, k], float[g, S, k] -> float[h, T, S]."""
    out = torch.zeros(len(q), q.shape[1], k.shape[1])
    for h in range(len(q)):
        keys = k[h * len(k) // len(q)]
        for t, query in enumerate(q[h]):
            shown = [s for s in range(len(keys)) if sees(t, s)]
            exps = [math.exp(float(query @ keys[s]) * scale) for s in shown]
            for s, x in zip(shown, exps, strict=True):
                out[h, t, s] = x / sum(exps)
    return out


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "grouped", "scaled"])
def test_weights_of_a_product(kind: str) -> None:
    q, k = torch.randn(1, 4, 5, 6), torch.randn(1, 2 if kind == "grouped" else 4, 5, 6)
    mask = torch.rand(5, 5) < 0.6
    mask[:, 0] = True
    sees = {"causal": lambda t, s: s <= t, "bool": lambda t, s: bool(mask[t, s])}.get(kind, lambda t, s: True)
    options = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": mask},
        "float": {"attn_mask": torch.zeros(5, 5)},
        "grouped": {"enable_gqa": True},
        "scaled": {"scale": 0.3},
    }.get(kind, {})
    found = attention_weights(q, k, k, **options)[0]
    expected = slow_softmax(q[0], k[0], sees, 0.3 if kind == "scaled" else 6**-0.5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    value = nn.functional.scaled_dot_product_attention(q, k, k, **options)
    shared = k.repeat_interleave(2, 1) if kind == "grouped" else k
    torch.testing.assert_close(found @ shared[0], value[0], atol=1e-5, rtol=0)


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_attention_of_language_models(name: str) -> None:
    lm = language_model(name)
    with record_attention(dict(enumerate(decoder_layers(lm))), is_square=True) as found:
        lm(input_ids=IDS, use_cache=False)
    if name in WITHOUT:
        assert not found.weights
        return
    assert set(found.weights) == ({1} if name in HYBRID else {0, 1})
    before = lm.config._attn_implementation
    if name != "falcon":  # whose class does not change its implementation
        lm.set_attn_implementation("eager")
    try:
        theirs = lm(input_ids=IDS, use_cache=False, output_attentions=True).attentions
    finally:
        lm.set_attn_implementation(before)
    theirs = [x for x in theirs or () if x is not None]
    for own in found.weights.values():
        torch.testing.assert_close(own[0].sum(-1), torch.ones(1, 9), atol=1e-5, rtol=0)
        assert not own[0].triu(1).any()
    if len(theirs) == len(found.weights) and name != "falcon":  # which returns products before the softmax
        for own, other in zip(found.weights.values(), theirs, strict=True):
            torch.testing.assert_close(own[0], other.mean(1), atol=1e-5, rtol=0)
    else:
        assert name in ("falcon", "zamba2")  # the latter names other modules


@torch.no_grad()
def test_another_weight_gives_other_attention() -> None:
    lm = language_model("llama")
    layers = decoder_layers(lm)

    def record() -> Tensor:
        with record_attention({0: layers[0]}, is_square=True) as found:
            lm(input_ids=IDS, use_cache=False)
        return found.weights[0][0]

    first = record()
    with nudged(layers[0].self_attn.q_proj.weight, by=2.0):
        assert (record() - first).abs().max() > 1e-4
    assert torch.equal(record(), first)


def test_nothing_stays_behind() -> None:
    layer = decoder_layers(language_model("llama"))[0]
    before = [len(x._forward_hooks) + len(x._forward_pre_hooks) for x in layer.modules()]
    with pytest.raises(ZeroDivisionError), record_attention({0: layer}):
        raise ZeroDivisionError
    assert [len(x._forward_hooks) + len(x._forward_pre_hooks) for x in layer.modules()] == before


@pytest.mark.sample(1)
@pytest.mark.parametrize("attend", ["last", "all"])
@pytest.mark.parametrize("fusion", ["cross-attention", "llama-cross-attention"])
@torch.no_grad()
def test_attention_of_blocks(subject: Callable[..., Subject], fusion: str, attend: str) -> None:
    """Against a slow softmax over the block's own projections of its input."""
    one = subject("perceiver", fusion, sections={"fusion": {"attend": attend}})
    model, picture = one.model, one.processor.media_token_id
    seen = read_media(model, one.processor, [image(32, 32), image(32, 32, 1)])
    ids = torch.tensor([[41, picture, 42, 43, picture, 44, 45, 46, 47, 48]])
    inputs = {}

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[module] = args[:2]

    block = model.fusion.blocks["3"]
    with record_model(model) as found, _hooked(block, note):
        model(lang_x=ids, vision_tokens=seen.tokens, media_mask=seen.mask, use_cache=False)
    layer = found[0].layers[3]
    assert layer.block is not None
    x, keys_values = inputs[block]
    attn = block.attn
    q = attn.to_q(attn.norm(x)) if fusion == "cross-attention" else attn.q_norm(attn._split(attn.q_proj(attn.norm(x))))
    heads = q if q.ndim == 4 else q.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    count, n = [0, 1, 1, 1, 2, 2, 2, 2, 2, 2], seen.tokens.shape[2]

    def sees(t: int, s: int) -> bool:
        return s // n + 1 == count[t] if attend == "last" else s // n < count[t]

    expected = slow_softmax(heads[0], keys_values[0, 0], sees, heads.shape[-1] ** -0.5).mean(0)
    torch.testing.assert_close(layer.block.weights, expected, atol=1e-5, rtol=0)
    assert not layer.block.weights[0].any()
    torch.testing.assert_close(layer.block.weights[1:].sum(-1), torch.ones(9), atol=1e-5, rtol=0)


class _hooked:
    def __init__(self, module: nn.Module, hook: Callable[..., None]) -> None:
        self.handle = module.register_forward_pre_hook(hook)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.handle.remove()
