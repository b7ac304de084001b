"""Weights of few bits: as near to the weights as the libraries' own, small, and with the hooks of the VLM."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import vlm_cli
from tests.support import seed_torch, tiny
from tests.support.grid import grid
from vlm_cli.errors import LanguageModelLimit, VLMError
from vlm_cli.modeling import quantizing
from vlm_cli.modeling.quantizations import QUANTIZATIONS
from vlm_cli.modeling.quantizing import Int4Linear, Int8Linear, quantize_model, quantized_bytes
from vlm_cli.modeling.vlm import VLM

NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
#: Layers of every kind: joined and separate weights, biases, and states instead of attention.
QUICK = ("llama", "gpt2", "opt-projected", "falcon", "mamba2", "jamba")


def test_int8_is_as_near_as_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    seed_torch(0)
    theirs = nn.Sequential(nn.Linear(64, 48, bias=False))
    weight = theirs[0].weight.detach().clone()
    quantization.quantize_(theirs, quantization.Int8WeightOnlyConfig())
    our_error, their_error = (
        (x.float() - weight).pow(2).mean()
        for x in (Int8Linear(weight, None).dequantized(torch.float32), theirs[0].weight.dequantize())
    )
    assert our_error < 1.05 * their_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 7)])
def test_int8_linear(shape, dtype):
    seed_torch(0)
    linear = nn.Linear(64, 48).to(dtype)
    linear.weight.data[3] = 0  # a row without a scale
    quantized = Int8Linear(linear.weight, linear.bias)
    x = torch.randn(*shape, 64).to(dtype)
    with torch.no_grad():
        out, plain = quantized(x), linear(x)
        as_multiplied = nn.functional.linear(x.float(), quantized.dequantized(torch.float32), linear.bias.float())
    assert out.dtype == dtype and out.shape == (*shape, 48)
    torch.testing.assert_close(out.float(), as_multiplied, atol=0.03, rtol=0.02)  # sums in bfloat16
    assert 0 < (out - plain).abs().max() < 0.1
    # Half a step, and what the largest of a row loses to the scale's rounding.
    error = (quantized.dequantized(torch.float32) - linear.weight.float()).abs()
    assert error.max() < linear.weight.abs().max() * (1 / 254 + 1 / 256)


@pytest.mark.sample(1)
@pytest.mark.parametrize("shape", [(48, 64), (5, 7)])
def test_int4_linear(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    seed_torch(0)
    linear = nn.Linear(*shape[::-1])
    quantized = Int4Linear(linear.weight, linear.bias)
    # A slow reading of NF4: of the 16 values times the largest of 64 weights, the nearest.
    values = functional.get_4bit_type("nf4", device="cpu")
    flat = linear.weight.detach().flatten()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        nearest = values[(block[:, None] / block.abs().max() - values).abs().argmin(1)] * block.abs().max()
        torch.testing.assert_close(quantized.weight.flatten()[start : start + 64], nearest, atol=1e-6, rtol=1e-5)
    x = torch.randn(3, 2, shape[1])
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), nn.functional.linear(x, quantized.weight, linear.bias))
        assert (quantized(x) - linear(x)).abs().max() > 1e-3


def rounded(model: VLM, name: str) -> VLM:
    """A plain copy of a model, with the weights that `quantize_model` should keep in few bits."""
    model = copy.deepcopy(model)
    tables = {id(p) for p in model.lang_model.get_input_embeddings().parameters()}
    for _, _, module in quantizing._linear_layers(model):
        weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().contiguous()
        if name == "int4":
            functional = pytest.importorskip("bitsandbytes.functional")
            found = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
        else:
            largest = {"int8": 127, "fp8": torch.finfo(torch.float8_e4m3fn).max}[name]
            scale = weight.abs().amax(1, keepdim=True) / largest
            steps = weight / scale
            found = (steps.round() if name == "int8" else steps.to(torch.float8_e4m3fn).float()) * scale
        found = found.T if isinstance(module, Conv1D) else found
        if id(module.weight) in tables:  # the table keeps its weights, the head does not
            module.weight = nn.Parameter(found)
        else:
            module.weight.data.copy_(found)
    return model


@pytest.mark.sample(4)
@grid(
    language_model=tiny.LANGUAGE_MODELS,
    fusion=["cross-attention", "language-stream"],
    name=list(QUANTIZATIONS),
    quick={"language_model": QUICK},
)
def test_answers_are_those_of_rounded_weights(language_model, fusion, name):
    if name != "int8":
        pytest.importorskip(QUANTIZATIONS[name])
    model = tiny.open_gates(tiny.build(fusion=fusion, language_model=language_model))
    inputs = tiny.batch(model, (2, 2))
    expected = rounded(model, name)
    head = model.lang_model.get_output_embeddings()
    hooks = [len(head._forward_hooks), len(head._forward_pre_hooks)]
    counted = quantized_bytes(copy.deepcopy(model).to("meta"), name, torch.float32)
    with torch.no_grad():
        plain = model(**inputs).logits
        other = model(**inputs | {"vision_x": -inputs["vision_x"]}).logits
        vlm_cli.accelerate(model, quantize=name)
        found, wanted = model(**inputs).logits, expected(**inputs).logits
    head = model.lang_model.get_output_embeddings()
    assert hooks == [len(head._forward_hooks), len(head._forward_pre_hooks)]
    assert found.shape[-1] == tiny.VOCABULARY + len(model.config.added_tokens)
    error, lost, signal = ((x - y).pow(2).mean().sqrt() for x, y in ((found, wanted), (plain, wanted), (other, plain)))
    # Our int8 layers add in bfloat16, which is as coarse as int8.
    assert error < (0.35 * plain.std() if name == "int8" else 1e-4) and lost > 1e-3
    assert error < 2 * signal
    assert model.generate(**inputs, **NEW).shape[1] == inputs["lang_x"].shape[1] + 6
    assert sum(counted.values()) == sum(map(bytes_of, (*model.parameters(), *kept_buffers(model))))


def bytes_of(x: torch.Tensor) -> int:
    """Bytes of a tensor, of one of torchao's too."""
    inner = [getattr(x, name) for name in ("qdata", "scale") if isinstance(getattr(x, name, None), torch.Tensor)]
    return sum(y.numel() * y.element_size() for y in inner or [x])


def kept_buffers(model: VLM) -> list[torch.Tensor]:
    return [x for module in model.modules() if isinstance(module, (Int4Linear, Int8Linear)) for x in module.buffers()]


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_the_vision_half_keeps_its_weights(name):
    if name != "int8":
        pytest.importorskip(QUANTIZATIONS[name])
    model = tiny.build()
    kept = {"vision_encoder", "vision_tokenizer", "added_tokens"}
    before = {part: [x.clone() for x in model.part_modules()[part].parameters()] for part in kept}
    table = model.lang_model.get_input_embeddings().weight.clone()
    vlm_cli.accelerate(model, quantize=name)
    for part, values in before.items():
        torch.testing.assert_close(list(model.part_modules()[part].parameters()), values, atol=0, rtol=0)
    torch.testing.assert_close(model.lang_model.get_input_embeddings().weight, table, atol=0, rtol=0)
    assert not any(isinstance(x, nn.Linear) for part in (model.fusion, model.lang_model) for x in part.modules())


def test_refusals(monkeypatch):
    model = tiny.build()
    with monkeypatch.context() as patched:
        patched.setattr(quantizing, "Conv1D", int)
        # A head alone is not worth it: everything else is of a kind that is not known.
        for module in model.lang_model.modules():
            if type(module) is nn.Linear and module is not model.lang_model.get_output_embeddings():
                module.__class__ = type("Other", (nn.Linear,), {"forward": lambda self, x: x.relu()})
        with pytest.raises(LanguageModelLimit, match="no linear layers"):
            quantize_model(model, "int8")
    for name, package in QUANTIZATIONS.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(VLMError, match=r"pip install 'vlm-cli\[quantize\]'"):
            quantize_model(copy.deepcopy(model).to("meta"), name)


@pytest.mark.matrix
def test_no_code_is_fetched(tmp_path):
    """With the package `kernels`, bitsandbytes fetches programs from the hub where it finds such a processor."""
    pytest.importorskip("bitsandbytes")
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs):\n    raise SystemExit('fetched')\n")
    theirs = "import bitsandbytes"
    ours = "from vlm_cli.modeling.quantizing import _way; import torch; _way('int4', torch.device('cpu'))"
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    found = [
        "fetched" in subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True).stderr
        for code in (theirs, ours)
    ]
    if not found[0]:
        pytest.skip("bitsandbytes has no such program for this processor")
    assert not found[1]
