"""The operations that a run tells are those of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.support import tiny
from tests.support.costs import plain_products, real_prompt
from tests.support.training import metrics
from vlm_cli.costs import flops
from vlm_cli.costs.cards import CARDS, find_device
from vlm_cli.costs.workload import Workload
from vlm_cli.modeling.learned import IGNORED, find_learned
from vlm_cli.modeling.vlm import VLM
from vlm_cli.training.operations import Operations
from vlm_cli.training.trainer import VLMTrainer

FIRST, OTHER = Workload(pictures=2, text=30, rows=2), Workload(pictures=1, text=45, rows=3)
PARTS = {
    "cross-attention": ("vit", "perceiver", "cross-attention", "llama"),
    "language-stream": ("vit", "linear", "language-stream", "llama"),
}


def learn(model: VLM, workload: Workload) -> None:
    inputs = real_prompt(model, workload)
    labels = inputs["lang_x"].clone()
    labels[:, : workload.pictures] = IGNORED
    model(**inputs, labels=labels, logits_at=find_learned(labels), use_cache=False).loss.backward()


def counted_by_torch(model: VLM, workload: Workload) -> int:
    with plain_products(), FlopCounterMode(display=False) as counter:
        learn(model, workload)
    return counter.get_total_flops()


def sizes(workload: Workload) -> tuple[int, int]:
    """The tokens and pictures of a workload."""
    return workload.rows * workload.tokens, workload.rows * workload.pictures


@pytest.mark.sample(2)
@pytest.mark.parametrize("trains", ["frozen", "whole"])
@pytest.mark.parametrize("fusion", PARTS)
def test_a_pass_is_counted_and_others_are_estimated(fusion: str, trains: str) -> None:
    model = tiny.build(*PARTS[fusion]).train()
    model.vision_encoder.requires_grad_(trains == "whole")
    operations = Operations(model, peak=2e9)
    assert operations.estimate(1, 1) is None and operations.measure(1, 1, steps=1, seconds=1) == {}
    with plain_products(), operations.counting(*sizes(FIRST)):
        learn(model, FIRST)
    assert operations.first is not None
    assert operations.first.flops == counted_by_torch(model, FIRST) == round(operations.estimate(*sizes(FIRST)) or 0)
    other = counted_by_torch(model, OTHER)
    assert abs((operations.estimate(*sizes(OTHER)) or 0) / other - 1) < 0.13
    assert abs(operations.first.flops / other - 1) > 0.3  # a twin: the first pass is not the other
    with operations.counting(*sizes(OTHER)):
        learn(model, OTHER)
    assert operations.first.tokens == sizes(FIRST)[0]  # later passes run without being counted
    told = operations.measure(*sizes(FIRST), steps=2, seconds=4.0)
    whole = operations.first.flops
    assert told["flops_per_step"] == round(whole / 2) and told["flops_per_second"] == round(whole / 4)
    assert told["utilisation"] == round(whole / 4 / 2e9, 4)


def test_a_first_pass_of_text_alone_says_nothing_of_pictures() -> None:
    model = tiny.build(*PARTS["cross-attention"]).train()
    operations = Operations(model, None)
    text = Workload(pictures=0, text=20)
    with operations.counting(*sizes(text)):
        learn(model, text)
    without = operations.estimate(*sizes(FIRST))
    with plain_products(), operations.counting(*sizes(FIRST)):
        learn(model, FIRST)
    assert operations.estimate(*sizes(FIRST)) == counted_by_torch(model, FIRST) != without
    assert "utilisation" not in operations.measure(*sizes(FIRST), steps=1, seconds=1.0)


def test_the_fused_kernels_of_a_frozen_encoder_are_counted_as_its_products() -> None:
    model = tiny.build(*PARTS["language-stream"]).train()
    model.vision_encoder.requires_grad_(False)
    encoder = model.vision_encoder
    pixels = real_prompt(model, FIRST)["vision_x"]
    with plain_products(), FlopCounterMode(display=False) as counter:
        encoder(pixels)
    fused, bare = Operations(model, None), Operations(model, None)
    for operations in (fused, bare):
        with operations.counting(*sizes(FIRST)):
            encoder(pixels if operations is fused else pixels[:1])
    assert fused.first is not None and fused.first.vision == fused.first.flops == counter.get_total_flops()
    assert bare.first is not None and 2 * bare.first.flops == fused.first.flops


def test_what_no_formula_knows_leaves_the_numbers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> int:
        raise ValueError("of another shape")

    monkeypatch.setitem(flops._FORMULAS, torch.ops.aten.mm, broken)
    layer = nn.Linear(2, 2)
    model = tiny.build(*PARTS["language-stream"])
    operations = Operations(model, 1.0)
    with operations.counting(1, 0):
        layer(torch.ones(3, 2)).sum().backward()
    assert operations.problem is not None and "of another shape" in operations.problem
    assert operations.measure(1, 1, steps=1, seconds=1.0) == {}


def test_a_run_tells_the_operations_of_its_steps(
    vlm: Any, language_stream: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, counted = VLMTrainer.training_step, []

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        with plain_products(), FlopCounterMode(display=False) as counter:
            loss = step(self, *args, **kwargs)
        counted.append(counter.get_total_flops())
        return loss

    monkeypatch.setattr(VLMTrainer, "training_step", count)
    flags = ["--data", folder / "train.jsonl", "--batch-size", 4, "--gradient-accumulation", 2, "--log-every", 1]
    done = vlm("train", language_stream, *flags, "--max-steps", 2, "--output", tmp_path / "out", "--device", "cpu")
    assert done.exit_code == 0, done.output
    found = metrics(tmp_path / "out")
    for entry, wanted in zip(found, (sum(counted[:2]), sum(counted[2:])), strict=True):
        assert abs(entry["flops_per_step"] / wanted - 1) < 0.25  # it learns no padding
        assert 0 < entry["utilisation"] < 1 and entry["flops_per_second"] > 0
    assert done.stderr.count("A step computes about") == 1
    assert "operations</dt>" in (tmp_path / "out" / "run.html").read_text()


def test_only_a_known_device_has_a_peak() -> None:
    assert find_device("NVIDIA H100 80GB HBM3") is CARDS["h100"]
    assert find_device("NVIDIA H100 PCIe") is None and find_device("NVIDIA L40S") is None
