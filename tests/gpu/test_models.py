"""What a device computes: the numbers of the CPU and of Transformers' class, in each dtype, with each shortcut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tests.support import llava, tiny
from tests.support.tiny import IMAGE
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.doctor import CHECKS, check_invariants
from vlm_cli.modeling import vlm as core
from vlm_cli.modeling.decoding.read_rows import ReadRows
from vlm_cli.modeling.decoding.static import find_graph
from vlm_cli.modeling.decoding.static_slots import StaticSlots
from vlm_cli.modeling.prompt_cache import PromptCache
from vlm_cli.modeling.vlm import VLM

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
each_fusion = pytest.mark.parametrize("fusion", tiny.FUSIONS)


def build(fusion: str, **parts: Any) -> VLM:
    """A model that shares no module with those of other tests, so that it may be moved."""
    return copy.deepcopy(tiny.open_gates(tiny.build(fusion=fusion, **parts)))


def moved(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: x.to(device) for name, x in inputs.items() if x is not None}


def differ(a: Tensor, b: Tensor) -> None:
    with pytest.raises(AssertionError):
        torch.testing.assert_close(a, b, **CLOSE)


@each_fusion
@pytest.mark.parametrize("tokenizer", tiny.TOKENIZERS)
@torch.no_grad()
def test_a_device_computes_what_the_cpu_computes(fusion, tokenizer, device):
    model = build(fusion, tokenizer=tokenizer)
    inputs = tiny.batch(model, (3, 0, 1))
    expected, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    model.to(device)
    found = model(**moved(inputs, device)).logits.cpu()
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(model.generate(**moved(inputs, device), **GREEDY).cpu(), answer)
    differ(model(**moved(inputs | {"vision_x": inputs["vision_x"].flip(1)}, device)).logits.cpu(), expected)


@torch.no_grad()
def test_llava_of_transformers(tmp_path: Path, device: str) -> None:
    source = llava.huggingface(tmp_path / "llava").source
    theirs = LlavaForConditionalGeneration.from_pretrained(source).to(device).eval()
    ours = import_checkpoint(source).model
    assert ours is not None
    ours.to(device)
    pixels = torch.randn(1, 1, 1, 3, 32, 32, device=device)
    ids = torch.tensor([[5, ours.config.media_token_id, 7, 9]], device=device)
    theirs_ids = torch.tensor([[5, *[llava.IMAGE] * 4, 7, 9]], device=device)
    found = ours(vision_x=pixels, lang_x=ids).logits[0, 1:, : llava.VOCABULARY]
    expected = theirs(input_ids=theirs_ids, pixel_values=pixels[0, :, 0]).logits[0, 4:, : llava.VOCABULARY]
    torch.testing.assert_close(found, expected, **CLOSE)
    differ(found, theirs(input_ids=theirs_ids, pixel_values=-pixels[0, :, 0]).logits[0, 4:, : llava.VOCABULARY])
    new = ours.generate(vision_x=pixels, lang_x=ids, **GREEDY)[0, 4:]
    assert torch.equal(new, theirs.generate(input_ids=theirs_ids, pixel_values=pixels[0, :, 0], **GREEDY)[0, 7:])


@each_fusion
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("language_model", ["llama", "gpt2"])
def test_every_check_of_doctor_holds(fusion, dtype, language_model, device):
    model = build(fusion, language_model=language_model)
    for parameter in model.parameters():  # not `to(dtype)`, which would round the rotary frequencies, too
        parameter.data = parameter.data.to(dtype)
    model.to(device)
    findings = list(check_invariants(model))
    assert [f.name for f in findings] == list(CHECKS)
    assert {f.name: (f.verdict, f.note) for f in findings if f.verdict not in ("holds", "limit")} == {}
    # What is allowed must be far below what a real fault changes: float32 judges a model of half precision.
    assert all(f.allowed <= 0.01 * f.twin for f in findings if f.allowed and f.twin)


@each_fusion
@torch.no_grad()
def test_equal_images_are_encoded_once_with_equal_results(fusion, device, monkeypatch):
    model = build(fusion).to(device)
    inputs = moved(tiny.batch(model, (3, 1)), device)
    inputs["vision_x"][1, 0] = inputs["vision_x"][0, 1]
    found = model(**inputs).logits
    monkeypatch.setattr(core.torch.compiler, "is_compiling", lambda: True)  # the plain path
    expected = model(**inputs).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    differ(model(**inputs | {"vision_x": inputs["vision_x"].flip(1)}).logits, expected)


@each_fusion
@torch.no_grad()
def test_a_second_turn_reads_only_what_is_new(fusion, device):
    model, cache = build(fusion).to(device), PromptCache()
    pictures = torch.randn(2, 1, 1, 3, 32, 32, device=device)
    one, other = (
        dict(zip(("vision_tokens", "media_mask"), model.encode_vision(x[None]), strict=True)) for x in pictures
    )
    first = torch.tensor([[1, IMAGE, 4, 5, 6]], device=device)
    answer = model.generate(**one, lang_x=first, prompt_cache=cache, **GREEDY)
    second = torch.cat([answer, answer.new_tensor([[7, 8]])], dim=1)
    found = model.generate(**one, lang_x=second, prompt_cache=cache, **GREEDY)
    assert cache.reused >= first.shape[1]
    assert torch.equal(found, model.generate(**one, lang_x=second, **GREEDY))
    # With another picture, nothing after it may be reused.
    found = model.generate(**other, lang_x=second, prompt_cache=cache, **GREEDY)
    assert cache.reused <= 2 and torch.equal(found, model.generate(**other, lang_x=second, **GREEDY))


@each_fusion
@torch.inference_mode()
def test_rows_in_slots_of_a_captured_step(fusion, device):
    """A row takes the slot of another while a third one goes on; each is answered as alone."""
    model = build(fusion).to(device)
    rows = [row.inputs() for row in tiny.rows(model, (2, 0, 1))]
    alone = [model.generate(**x, **GREEDY, eos_token_id=None)[0, -8:].tolist() for x in rows]
    told: Any = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    step, newest = StaticSlots(model, graph=find_graph(model, None)), torch.zeros(2, dtype=torch.long, device=device)

    def write(slot: int, inputs: dict[str, Any]) -> int:
        output = model.generate(**inputs, **told)
        step.put([slot], ReadRows.of(model, output))
        newest[slot] = output.sequences[0, -1]
        return int(newest[slot])

    found = [[write(0, rows[0])], [write(1, rows[1])], []]
    for number in range(11):
        newest.copy_(step(newest).argmax(-1))
        found[0].append(int(newest[0]))
        found[2 if number > 3 else 1].append(int(newest[1]))
        if number == 3:
            step.release(1)
            found[2].append(write(1, rows[2]))
    assert [x[:8] for x in found[::2]] == alone[::2] and found[1] == alone[1][:5]
    assert (step._step._replay is not None) == (device == "cuda")  # type: ignore[union-attr]
