"""Optimizers and the plot."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from vlm_cli import load
from vlm_cli.training import optimizer as optimizer_module
from vlm_cli.training.optimizer import find_matrices
from vlm_cli.training.plot import draw_losses
from vlm_cli.training.rates import group_parameters


def make_optimizer(model: Any, name: Any, rate: float) -> Any:
    return optimizer_module.make_optimizer(model, name, group_parameters(model, rate, default_rate=1.0))


@pytest.fixture(scope="module")
def model(cross_attention: Path) -> Any:
    model, _ = load(str(cross_attention))
    model.set_trainable(["vision_tokenizer", "fusion", "added_tokens", "language_model"])
    return model


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_trainable_parameter_has_its_weight_decay(model: Any, name: Any) -> None:
    optimizer = make_optimizer(model, name, 1e-3)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    fusion = set(model.fusion.parameters())
    assert decay == {p: 0.1 if p in fusion else 0.0 for p in model.parameters() if p.requires_grad}


@pytest.mark.matrix
def test_updates_that_rounding_would_lose_count_on_average() -> None:
    """An update of an eighth of the distance between two numbers of bfloat16."""
    pytest.importorskip("torchao")
    distance = 2.0**-8  # below 1
    found = {}
    for is_random in (True, False):
        weight = torch.nn.Parameter(torch.full((4096,), 0.75, dtype=torch.bfloat16))
        groups = [{"params": [weight], "lr": distance / 8, "weight_decay": 0.0}]
        if is_random:
            optimizer = optimizer_module.make_optimizer(Any, "adamw", groups, rounds_at_random=True)
        else:
            optimizer = torch.optim.AdamW(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 4 else 0.0)
        for _ in range(6):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            scheduler.step()
        found[is_random] = (0.75 - weight.detach().float()).mean().item() / distance
    assert found[True] == pytest.approx(4 / 8, rel=0.1)
    assert found[False] == 0


def test_muon_takes_matrices_that_are_no_tables(model: Any) -> None:
    names = {name for name, p in model.named_parameters() if p in find_matrices(model)}
    assert "fusion.blocks.1.attn.to_q.weight" in names
    assert "lang_model.model.layers.0.mlp.up_proj.weight" in names
    assert "vision_tokenizer.layers.0.0.to_kv.weight" in names
    assert "vision_encoder.visual.transformer.resblocks.0.attn.in_proj_weight" in names
    tables = [name for name in names if "embed" in name or "latents" in name or "added" in name or "head" in name]
    assert not tables


def step(model: nn.Module, optimizer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()


def test_muon_is_torch_s_two_optimizers_side_by_side(model: Any) -> None:
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = make_optimizer(ours, "muon", 1e-2)
    chosen, fusion = find_matrices(theirs), set(theirs.fusion.parameters())

    def groups(of_matrices: bool) -> list[dict[str, Any]]:
        params = [p for p in theirs.parameters() if p.requires_grad and (p in chosen) == of_matrices]
        return [{"params": [p], "weight_decay": 0.1 if p in fusion else 0.0} for p in params]

    muon = torch.optim.Muon(groups(True), lr=1e-2, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(groups(False), lr=1e-2, betas=(0.9, 0.98))
    for seed in range(3):
        step(ours, optimizer, seed)
        step(theirs, muon, seed)
        step(theirs, adamw, seed)
    torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_resumes_from_its_saved_state(model: Any, name: Any, tmp_path: Path) -> None:
    whole = copy.deepcopy(model)
    optimizer = make_optimizer(whole, name, 1e-2)
    step(whole, optimizer, 0)
    half, path = copy.deepcopy(whole), tmp_path / "optimizer.pt"
    torch.save(optimizer.state_dict(), path)
    step(whole, optimizer, 1)
    resumed = make_optimizer(half, name, 1e-2)
    resumed.load_state_dict(torch.load(path, weights_only=True))
    step(half, resumed, 1)
    torch.testing.assert_close(dict(half.named_parameters()), dict(whole.named_parameters()), atol=0, rtol=0)


def test_the_plot_shows_both_losses(tmp_path: Path) -> None:
    history = [{"step": i, "loss": 3 / i} for i in range(1, 200)] + [{"step": 150, "eval_loss": 1.5}]
    draw_losses(history, tmp_path / "loss.png", title="x")
    with Image.open(tmp_path / "loss.png") as image:
        colours = {colour for _, colour in image.getcolors(2**16)}
    assert {(0x1F, 0x5F, 0xA8), (0xD9, 0x62, 0x2B)} <= colours


@pytest.mark.sample(2)
@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 0.0}], [{"step": 1, "loss": 2.0}] * 2])
def test_a_short_run_has_a_plot(tmp_path: Path, history: list[dict[str, Any]]) -> None:
    draw_losses(history, tmp_path / "loss.png", title="x")
    assert (tmp_path / "loss.png").stat().st_size > 1000
