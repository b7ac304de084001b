"""Learning rates and weight decay per part and per layer reach each parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vlm_cli import load
from vlm_cli.errors import UsageError
from vlm_cli.training.optimizer import make_optimizer
from vlm_cli.training.rates import check_parts, group_parameters


@pytest.fixture(scope="module")
def model(cross_attention: Path) -> Any:
    model, _ = load(str(cross_attention))
    model.set_trainable(["vision_encoder", "vision_tokenizer", "fusion", "added_tokens"])
    return model


def numbers(model: Any, **options: Any) -> dict[str, tuple[float, float]]:
    """Rate and decay of each parameter, by name."""
    names = {p: name for name, p in model.named_parameters()}
    groups = group_parameters(model, default_rate=1e-4, **options)
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_each_part_has_its_rate_and_its_decay(model: Any) -> None:
    found = numbers(
        model,
        learning_rate={"vision_tokenizer": 1e-3, "vision_encoder": 2e-6},
        weight_decay={"fusion": 0.3, "vision_tokenizer": 0.2},
    )
    wanted = {
        "vision_encoder": (2e-6, 0.0),
        "vision_tokenizer": (1e-3, 0.2),
        "fusion": (1e-4, 0.3),
        "added_tokens": (1e-4, 0.0),
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found == {name: wanted[name.split(".")[0]] for name in trained}
    assert numbers(model, learning_rate={"others": 5.0, "fusion": 1.0})["added_tokens.embedding.weight"] == (5.0, 0.0)


def test_one_rate_keeps_the_groups_of_earlier_versions(model: Any) -> None:
    """The optimizer's state in their checkpoints is in the order of the groups."""
    groups = group_parameters(model, 1e-3, default_rate=1.0)
    earlier = model.parameter_groups()
    assert [list(map(id, group["params"])) for group in groups] == [list(map(id, group["params"])) for group in earlier]


def test_the_groups_do_not_depend_on_the_numbers(model: Any) -> None:
    def sizes(*rates: float) -> list[int]:
        rate = dict(zip(("fusion", "added_tokens", "others"), rates, strict=True))
        return [len(group["params"]) for group in group_parameters(model, rate, default_rate=1.0)]

    assert sizes(1.0, 1.0, 1.0) == sizes(1.0, 2.0, 3.0)


def test_a_step_moves_a_part_by_its_rate(model: Any) -> None:
    """The first step of AdamW without decay moves each weight by the rate."""
    groups = group_parameters(model, {"vision_tokenizer": 1e-2, "others": 1e-3}, default_rate=1.0, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    make_optimizer(model, "adamw", [{**group, "weight_decay": 0.0} for group in groups]).step()
    for name, p in model.named_parameters():
        rate = 1e-2 if name.startswith("vision_tokenizer") else 1e-3
        moved = rate if p.requires_grad else 0.0
        torch.testing.assert_close(before[name] - p, torch.full_like(p, moved), atol=1e-6, rtol=0)
        with torch.no_grad():
            p.copy_(before[name])


def test_layer_decay_follows_the_layers_of_the_tower(model: Any) -> None:
    found = numbers(model, learning_rate={"others": 1.0, "vision_encoder": 0.1}, layer_decay=0.5)
    tower = "vision_encoder.visual"
    assert found[f"{tower}.transformer.resblocks.0.attn.in_proj_weight"][0] == pytest.approx(0.1)
    assert found[f"{tower}.ln_post.weight"][0] == pytest.approx(0.1)
    assert found[f"{tower}.conv1.weight"][0] == found[f"{tower}.class_embedding"][0] == pytest.approx(0.05)
    assert found["fusion.blocks.1.attn.to_q.weight"][0] == 1.0


@pytest.mark.parametrize(
    ("options", "layer_decay", "words"),
    [
        ({"--learning-rate": {"language_model": 1.0}}, None, "--learning-rate gives a number to language_model, which"),
        ({"--learning-rate": {"language_model": 1.0}}, None, "Add --trainable fusion,language_model to train it."),
        ({"--weight-decay": {"vision_encoder": 1.0, "others": 0.1}}, None, "--weight-decay gives a number to"),
        ({"--weight-decay": 0.1}, 0.9, "--layer-decay is about the layers of the vision encoder"),
    ],
)
def test_a_part_that_does_not_train_has_no_rate(options: Any, layer_decay: Any, words: str) -> None:
    with pytest.raises(UsageError) as error:
        check_parts(options, layer_decay, ("fusion",))
    assert words in str(error.value)
    check_parts({"--learning-rate": {"fusion": 1.0, "others": 2.0}}, None, ("fusion",))


def test_a_tower_without_layers_has_no_layer_decay(model: Any) -> None:
    tower = model.vision_encoder.visual
    model.vision_encoder.visual = nn.Linear(1, 1)
    try:
        with pytest.raises(UsageError) as error:
            group_parameters(model, 1.0, default_rate=1.0, layer_decay=0.5)
    finally:
        model.vision_encoder.visual = tower
    assert "the layers of this vision encoder cannot be told apart. Leave out --layer-decay." in str(error.value)
