"""What is computed once, or not at all, changes no result: each shortcut beside the plain path.

`counted` shows that the shortcut was taken; each comparison has a twin in which another result is seen to differ.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import seed_torch, tiny
from tests.support.tiny import IMAGE
from vlm_cli.modeling import media_layout
from vlm_cli.modeling import vlm as core
from vlm_cli.modeling.deduplicate import deduplicate
from vlm_cli.modeling.fusion import expansion
from vlm_cli.modeling.fusion.visibility import MediaVisibility, Readers, attend_to_media
from vlm_cli.modeling.learned import find_learned
from vlm_cli.modeling.media_layout import MediaLayout
from vlm_cli.modeling.vlm import VLM

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
CROSS = ("cross-attention", "llama-cross-attention")
each_fusion = pytest.mark.parametrize("fusion", tiny.FUSIONS)


@contextmanager
def counted(module: nn.Module, count: Any = len) -> Iterator[list[int]]:
    """What `count` says of each first argument that a module is called with."""
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(count(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


def num_frames(x: Tensor) -> int:
    return x.shape[:3].numel()


def differ(a: Tensor, b: Tensor) -> None:
    with pytest.raises(AssertionError):
        torch.testing.assert_close(a, b, **TOLERANCE)


# -- equal images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_distinct(dtype):
    seed_torch(0)
    three = torch.randn(3, 3, 4, 4).to(dtype)
    three[1] = three[0].flip(-1)  # the same numbers elsewhere
    frames = three[[2, 0, 2, 1, 0]]
    few, which = deduplicate(frames)
    assert len(few) == 3 and torch.equal(few[which], frames)
    few, which = deduplicate(three)
    assert few is three and which.tolist() == [0, 1, 2]


def test_distinct_believes_no_sum(monkeypatch):
    # Frames whose sums are equal by accident: the second holds twice a word whose weight is half.
    words = torch.zeros(2, 3 * 4 * 4, dtype=torch.int32)
    words[0, 1], words[1, 0] = 1, 2
    frames = words.view(torch.float32).view(2, 3, 4, 4)
    few, which = deduplicate(frames)
    assert len(few) == 2 and which.tolist() == [0, 1]


@pytest.mark.sample(2)
@each_fusion
@pytest.mark.parametrize("tokenizer", [*tiny.TOKENIZERS, {"type": "perceiver", "max_num_media": 4}], ids=str)
def test_equal_images_and_padding_are_encoded_once(fusion, tokenizer, monkeypatch):
    model = tiny.open_gates(tiny.build(tokenizer=tokenizer, fusion=fusion))
    inputs = tiny.batch(model, (3, 1, 2))
    vision_x, mask = inputs["vision_x"], inputs["vision_mask"]
    vision_x[1, 0] = vision_x[0, 2]
    vision_x[2, 1] = vision_x[0, 2]
    encoder = model.vision_encoder
    with torch.no_grad(), counted(encoder, num_frames) as frames, counted(model.vision_tokenizer, num_frames) as media:
        logits = model(**inputs).logits
        tokens, token_mask = model.encode_vision(vision_x, mask)
    apart = model.encodes_media_independently
    assert apart == isinstance(tokenizer, str)  # the last has an embedding for each place
    assert frames == [4, 4] and media == [5 if apart else 9] * 2  # one of them for all padding
    monkeypatch.setattr(core.torch.compiler, "is_compiling", lambda: True)  # the plain path
    with torch.no_grad(), counted(encoder, num_frames) as frames:
        plain, plain_mask = model.encode_vision(vision_x, mask)
        expected = model(**inputs).logits
        other = model(**inputs | {"vision_x": vision_x.flip(1)}).logits
    assert frames[0] == num_frames(vision_x)
    assert torch.equal(token_mask, plain_mask)
    torch.testing.assert_close(tokens[token_mask], plain[token_mask], **TOLERANCE)
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    differ(other, expected)


def test_equal_images_train_as_different_ones(monkeypatch):
    model = tiny.open_gates(tiny.build(trainable=["vision_encoder", "vision_tokenizer", "fusion"]))
    inputs = tiny.batch(model, (3, 1))
    inputs["vision_x"][1, 0] = inputs["vision_x"][0, 1]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**inputs, labels=inputs["lang_x"]).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    once = gradients()
    monkeypatch.setattr(media_layout, "find_equal", lambda views: (torch.arange(len(views)),) * 2)
    each = gradients()
    assert len(once) == len(each) > 30
    for a, b in zip(once, each, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.sample(2)
@each_fusion
def test_encoded_media_may_be_given(fusion):
    model = tiny.open_gates(tiny.build(fusion=fusion))
    inputs = tiny.batch(model, (2, 0, 3))
    tokens, media_mask = model.encode_vision(inputs["vision_x"], inputs["vision_mask"])
    encoded = {key: inputs[key] for key in ("lang_x", "attention_mask")} | {
        "vision_tokens": tokens,
        "media_mask": media_mask,
    }
    with torch.no_grad(), counted(model.vision_encoder) as calls:
        logits, generated = model(**encoded).logits, model.generate(**encoded, **NEW)
        turned = model(**encoded | {"vision_tokens": tokens.flip(1)}).logits
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**inputs).logits, **TOLERANCE)
        assert torch.equal(generated, model.generate(**inputs, **NEW))
    differ(turned, logits)
    with pytest.raises(ValueError, match="same media"):
        model(**inputs, vision_tokens=tokens)
    with pytest.raises(ValueError, match="without vision_tokens"):
        model.generate(inputs["lang_x"], media_mask=media_mask)


# -- cross-attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_readers_attend_as_all_positions_do(seed, monkeypatch):
    seed_torch(seed)
    B, T, M, n, h, k = 3, 24, 5, 4, 2, 8
    there = torch.randint(0, M + 1, (B,))
    positions = torch.rand(B, T).lt(0.15).cumsum(-1).clamp(max=there[:, None])
    positions += torch.randint(0, 2, (B, 1)) * (positions < there[:, None])  # a piece that begins after media
    media_mask = (torch.arange(M) < there[:, None])[..., None].expand(B, M, n)
    q, keys_values = torch.randn(B, h, T, k), torch.randn(B, 2, h, M * n, k)

    def attend(keys_values: Tensor = keys_values) -> tuple[Tensor, MediaVisibility]:
        seen = MediaVisibility.build(positions, media_mask, attend="last", feed_forward_before_media=True)
        return attend_to_media(q, keys_values, seen).masked_fill(~seen.reads, 0), seen

    found, seen = attend()
    monkeypatch.setattr(Readers, "build", lambda *_: None)
    expected, plain = attend()
    assert torch.equal(seen.reads, plain.reads) and torch.equal(seen.feeds, plain.feeds)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    if seen.reads.any():
        differ(attend(keys_values.flip(-2))[0], found)


def test_readers_are_used_where_they_save_half():
    many = torch.arange(12).div(3, rounding_mode="floor")[None]
    assert Readers.build(many, 3) is not None
    assert Readers.build(torch.full((1, 12), 2), 3) is None  # all read one medium
    assert Readers.build(torch.zeros(1, 12, dtype=torch.long), 3) is None  # none reads
    assert Readers.build(torch.tensor([[3]]), 3) is None  # decoding


@pytest.mark.sample(2)
@pytest.mark.parametrize("fusion", CROSS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 3}])
def test_what_is_generated_reads_the_last_medium_alone(fusion, options, monkeypatch):
    model = tiny.open_gates(tiny.build(fusion={"type": fusion, "attend": "last"}))
    counts = (3,) if "prompt_lookup_num_tokens" in options else (3, 1, 0, 2)
    inputs = tiny.batch(model, counts)
    block = next(iter(model.fusion.blocks.values()))

    def generate(**more: Any) -> tuple[Tensor, list[int]]:
        seen: list[int] = []
        handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[1].shape[-2]))
        with torch.no_grad():
            output = model.generate(**inputs | more, **NEW, **options, output_scores=True, return_dict_in_generate=True)
        handle.remove()
        return torch.stack([*output.scores])[..., :IMAGE], seen

    scores, keys = generate()
    n = model.vision_tokenizer.num_tokens()
    assert keys[0] == 3 * n and set(keys[1:]) <= {n, 3 * n} and keys[-1] == n
    monkeypatch.setattr(
        core.VLMWithCrossAttention, "_update_model_kwargs_for_generation", VLM._update_model_kwargs_for_generation
    )
    plain, keys = generate()
    assert set(keys) == {3 * n}
    torch.testing.assert_close(scores, plain, **TOLERANCE)
    differ(generate(vision_x=inputs["vision_x"].flip(-1))[0], plain)


@pytest.mark.parametrize("fusion", CROSS)
def test_all_media_stay_where_all_are_seen(fusion):
    model = tiny.open_gates(tiny.build(fusion={"type": fusion, "attend": "all"}))
    block = next(iter(model.fusion.blocks.values()))
    seen: list[int] = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[1].shape[-2]))
    model.generate(**tiny.batch(model, (3, 1)), **NEW)
    assert set(seen) == {3 * model.vision_tokenizer.num_tokens()}


@pytest.mark.parametrize("fusion", CROSS)
def test_without_a_cache_all_media_stay(fusion):
    model = tiny.open_gates(tiny.build(fusion=fusion))
    inputs = tiny.batch(model, (3, 1))
    cached, whole = (model.generate(**inputs, **NEW, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("fusion", CROSS)
def test_projection_in_place_is_that_of_training(fusion):
    model = tiny.build(fusion=fusion)
    tokens = torch.randn(2, 3, model.vision_tokenizer.num_tokens(), model.vision_tokenizer.dim_out)
    tokens[1, 0] = tokens[0, 2]
    trained = model.fusion.project(tokens)
    attention = next(iter(model.fusion.blocks.values())).attn
    with torch.no_grad(), counted(getattr(attention, "to_kv", None) or attention.k_proj) as media:
        found = model.fusion.project(tokens)
        assert media == [5]
        other = model.fusion.project(tokens.flip(0))
    torch.testing.assert_close(found, trained, **TOLERANCE)
    differ(other, trained)


#: Operations after which a process waits for an accelerator that holds their inputs.
WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal")


class Waiting(TorchDispatchMode):
    """The lines of this package that look at the numbers in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        masked = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in WAITING or masked:
            frames = [frame for frame in traceback.extract_stack() if "/vlm_cli/" in frame.filename]
            inner = [frame for frame in traceback.extract_stack() if "/site-packages/transformers/" in frame.filename]
            if not inner:  # Transformers looks at its own masks
                self.places.append(f"{Path(frames[-1].filename).name}: {frames[-1].line}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokenizer", ["mlp", "perceiver"])
@pytest.mark.parametrize("fusion", ["language-stream", "cross-attention"])
def test_a_step_with_a_layout_does_not_wait(fusion, tokenizer, monkeypatch):
    monkeypatch.setattr(expansion, "is_on_host", lambda mask: False)  # as if an accelerator held it
    model = tiny.open_gates(tiny.build(fusion=fusion, tokenizer=tokenizer)).train()
    inputs = tiny.batch(model, (1, 0, 1))
    labels = inputs["lang_x"].masked_fill(torch.arange(inputs["lang_x"].shape[1]) < 5, -100)
    inputs |= {"labels": labels, "logits_at": find_learned(labels)}
    layout = MediaLayout.of(inputs["vision_x"], inputs["vision_mask"])
    with Waiting() as plain:
        expected = model(**inputs).loss
    with Waiting() as ahead:
        found = model(**inputs, media_layout=layout).loss
        found.backward()
    torch.testing.assert_close(found, expected)
    lengths = ["expansion.py: length = int(ends[:, -1].max())  # L"]  # by which the language model is called
    assert ahead.places == (lengths if fusion == "language-stream" else [])
    assert len(plain.places) >= len(ahead.places) + 4
