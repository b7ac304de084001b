"""Nothing waits for an accelerator between pixels and the language model, if inputs are on the CPU.

The accelerator is a pretended one, whose tensors have no numbers: whatever looks at numbers there fails. Twins look.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.support import seed_torch, tiny
from tests.support.pretended_gpu import GPU, Waits, pretended_gpu
from vlm_cli.modeling.batching import stack_grids
from vlm_cli.modeling.fusion.visibility import Readers
from vlm_cli.modeling.prompt_cache import PromptCache
from vlm_cli.tiling import MediumSize

WAITING = (Waits, torch._subclasses.fake_tensor.DataDependentOutputException)


def test_the_pretended_gpu_sees_what_waits():
    with pretended_gpu():
        there, here = torch.arange(4, device=GPU), torch.arange(4)
        assert here[here > 1].tolist() == [2, 3] and there.device == GPU
        assert (there + 1)[there].device == here.to(GPU, non_blocking=True).device == GPU
        for look in (
            lambda: there.tolist(),
            lambda: there.cpu(),
            lambda: int(there.max()),
            lambda: torch.equal(there, there),
            lambda: here.to(GPU),
            lambda: there[here],
            lambda: torch.tensor([1, 2], device=GPU),
        ):
            with pytest.raises(WAITING):
                look()
        for look in (lambda: there.nonzero(), lambda: there[there > 1], lambda: there.unique()):
            with pytest.raises((*WAITING, torch._subclasses.fake_tensor.DynamicOutputShapeException)):
                look()


@pytest.mark.sample(4)
@pytest.mark.parametrize("place", ["cpu", "masks on the cpu", "gpu"])
@pytest.mark.parametrize("tokenizer", tiny.TOKENIZERS)
def test_encode_vision(tokenizer, place):
    model = tiny.build(tokenizer=tokenizer)
    inputs = tiny.batch(model, (3, 1, 2))
    pixels, mask = inputs["vision_x"], inputs["vision_mask"]
    expected, expected_mask = model.encode_vision(pixels, mask)
    with pretended_gpu() as gpu, torch.no_grad():
        model = gpu.copied(model)
        pixels = pixels if place == "cpu" else pixels.to(GPU, non_blocking=True)
        mask = mask.to(GPU, non_blocking=True) if place == "gpu" else mask
        tokens, token_mask = model.encode_vision(pixels, mask)
        assert (tokens.device, tokens.shape) == (GPU, expected.shape)
        assert token_mask.device == mask.device
        if place != "gpu":
            assert torch.equal(token_mask, expected_mask)
        assert model.encode_vision(pixels)[1].device == GPU


def reach_language_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let `generate` call `forward` once in the place of Transformers' loop, which looks at its own masks."""
    seen: list[Any] = []

    def once(self: Any, ids: Tensor, *args: Any, attention_mask: Tensor, mm_token_type_ids: Any, **kwargs: Any) -> Any:
        media = {name: kwargs.get(name) for name in ("media", "media_mask", "most_readers")}
        counts = (ids == model.config.media_token_id).cumsum(-1)
        seen.append(model.condition_call(_conditioning(ids, counts, **media), ids, ids.shape[1]).fusion_state)
        sequences = torch.cat([ids, ids[:, :1]], dim=1)
        is_told = kwargs.get("return_dict_in_generate")
        return transformers.utils.ModelOutput(sequences=sequences) if is_told else sequences

    monkeypatch.setattr(transformers.GenerationMixin, "generate", once)
    return seen


def _conditioning(ids: Tensor, counts: Tensor, media: Any, media_mask: Any, most_readers: Any) -> Any:
    from vlm_cli.modeling.conditioning import Conditioning

    return Conditioning(ids, media, media_mask, counts, most_readers=most_readers)


@pytest.mark.parametrize("fusion", tiny.FUSIONS)
def test_generate_until_the_language_model(fusion, monkeypatch):
    model = tiny.build(fusion=fusion)
    inputs = tiny.batch(model, (3, 1, 2))
    tokens, mask = model.encode_vision(inputs["vision_x"], inputs["vision_mask"])
    text = {name: inputs[name] for name in ("lang_x", "attention_mask")}
    keys = [["a", "b", "c"], ["a"], ["a", "b"]]
    seen = reach_language_model(model, monkeypatch)
    with pretended_gpu() as gpu:
        model = gpu.copied(model)
        assert model.generate(**inputs).device == GPU
        there = tokens.to(GPU, non_blocking=True)
        given = text | {"vision_tokens": there, "media_mask": mask}
        assert model.generate(**given, media_keys=keys, prompt_cache=PromptCache()).device == GPU
        assert len(seen) == 2
        # Without keys, the cache compares the vision tokens themselves.
        with pytest.raises(WAITING):
            model.generate(**given, prompt_cache=PromptCache())


@pytest.mark.parametrize("fusion", ["cross-attention", "llama-cross-attention"])
def test_readers_are_counted_on_the_cpu(fusion, monkeypatch):
    model = tiny.build(fusion={"type": fusion, "attend": "last"})
    seen = reach_language_model(model, monkeypatch)
    inputs = tiny.batch(model, (3, 3))
    with pretended_gpu() as gpu:
        model = gpu.copied(model)
        model.generate(**inputs)
        assert seen[0].readers is not None
        counts = inputs["lang_x"].eq(model.config.media_token_id).cumsum(-1)
        with pytest.raises(WAITING):
            Readers.build(counts.to(GPU, non_blocking=True), 3)


@pytest.mark.parametrize("bound", [None, 4, 6])
def test_a_bound_of_readers_may_be_too_large(bound):
    seed_torch(0)
    counts = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3], [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3]])
    readers, q = Readers.build(counts, 3, bound), torch.randn(2, 2, 12, 4)
    assert readers is not None
    reads = (counts > 0)[:, None, :, None]
    assert torch.equal(readers.scatter(readers.gather(q)) * reads, q * reads)
    found = Readers.build(counts, 3, 3)
    assert not torch.equal(found.scatter(found.gather(q)) * reads, q * reads)  # a bound that is too small


def test_tiles_are_arranged_by_what_the_cpu_knows():
    model = tiny.build(tokenizer="mlp", tiling={"type": "anyres", "pinpoints": [[32, 64], [64, 32]]})
    sizes = [[MediumSize(3, 1, 2, 40, 80)], [MediumSize(3, 2, 1, 80, 40)]]
    grid = stack_grids(sizes)["vision_grid"]
    pixels = torch.randn(2, 1, 3, model.vision_encoder.num_channels, *model.vision_encoder.image_size)
    mask = torch.ones(2, 1, 3, dtype=torch.bool)
    expected = model.encode_vision(pixels, mask, grid)
    with pretended_gpu() as gpu, torch.no_grad():
        model = gpu.copied(model)
        tokens, token_mask = model.encode_vision(pixels, mask, grid)
        assert tokens.shape == expected[0].shape and torch.equal(token_mask, expected[1])
        with pytest.raises(WAITING):
            model.encode_vision(pixels, mask, grid.to(GPU, non_blocking=True))
