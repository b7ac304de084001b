"""Packed rows: the losses and gradients of the rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.compatibility.language_models import model_types, tiny_vlm
from tests.support import tiny
from tests.support.invariants import differs, logits, opened, same
from vlm_cli.modeling.learned import IGNORED
from vlm_cli.modeling.packable import find_packing_problem
from vlm_cli.modeling.packed import count_within, positions_within
from vlm_cli.modeling.vlm import VLM

PARTS = ["vision_tokenizer", "fusion", "added_tokens", "language_model"]
LAST = 4  # learned tokens of a row


def rows_of(model: VLM, counts: Sequence[int] = (2, 0, 1), frames: int = 1) -> list[tiny.Row]:
    return [tiny.row(model, n, 9 + i, frames=frames, seed=i) for i, n in enumerate(counts)]


def packed(rows: Sequence[tiny.Row]) -> dict[str, Any]:
    """Rows as one."""
    media = [row.vision_x for row in rows if row.vision_x is not None]
    return {
        "vision_x": torch.cat(media, dim=1) if media else None,
        "lang_x": torch.cat([row.lang_x for row in rows], dim=1),
        "segments": torch.cat([torch.full_like(row.lang_x, i) for i, row in enumerate(rows, 1)], dim=1),
        "labels": torch.cat([labels_of(row) for row in rows], dim=1),
    }


def labels_of(row: tiny.Row) -> Tensor:
    labels = row.lang_x.clone()
    labels[:, :-LAST] = IGNORED
    return labels


def gradients(model: VLM, batches: Sequence[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the losses over all learned tokens, and its gradients."""
    model.zero_grad()
    loss = torch.stack([model(**batch, num_items_in_batch=1).loss for batch in batches]).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


#: Positions that are learned, rotary, or counted from a window; layers of two kinds; grouped and joined queries.
LANGUAGE_MODELS = ["llama", "gpt2", "mistral", "gemma2", "opt", "gpt_neox", "qwen3", "gemma3_text", "falcon"]
FUSIONS: list[Any] = [
    "language-stream",
    {"type": "language-stream", "mask": "image"},
    {"type": "language-stream", "mask": "prefix"},
    "cross-attention",
    {"type": "cross-attention", "attend": "all", "feed_forward_before_media": False},
    {"type": "llama-cross-attention", "attend": "all", "attend_before_media": True},
]


def name_of(fusion: Any) -> str:
    return fusion if isinstance(fusion, str) else "-".join(map(str, fusion.values()))


@pytest.mark.parametrize(
    ("language_model", "fusion"),
    [
        pytest.param(lm, fusion, id=f"{lm}-{name_of(fusion)}", marks=() if i == j else pytest.mark.matrix)
        for i, lm in enumerate(LANGUAGE_MODELS)
        for j, fusion in enumerate(FUSIONS)
    ],
)
def test_loss_and_gradients_are_those_of_the_rows_alone(language_model: str, fusion: Any) -> None:
    model = opened(language_model=language_model, fusion=fusion, tokenizer="linear")
    model.set_trainable(PARTS)
    rows = rows_of(model)
    alone = [{**row.inputs(), "labels": labels_of(row)} for row in rows]
    loss, expected = gradients(model, alone)
    together = packed(rows)
    found_loss, found = gradients(model, [together])
    torch.testing.assert_close(found_loss / (3 * LAST), loss / (3 * LAST), atol=1e-5, rtol=0)
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=1e-5, rtol=1e-4)
    unmasked, _ = gradients(model, [{key: x for key, x in together.items() if key != "segments"}])
    assert (unmasked - loss).abs() > 1e-2  # the twin


@pytest.mark.parametrize("fusion", ["language-stream", "cross-attention"])
@pytest.mark.parametrize("frames", [1, 3])
def test_packs_of_a_batch(fusion: str, frames: int) -> None:
    """Two packs of different lengths, media and frames, padded at the left."""
    model = opened(fusion=fusion, tokenizer="linear")
    packs = [rows_of(model, (2, 0, 1), frames), rows_of(model, (1, 1), frames)]
    joined = [packed(rows) for rows in packs]
    batch = tiny.collate([tiny.Row(x["vision_x"], x["lang_x"]) for x in joined], garbage=1e4)
    segments = torch.zeros_like(batch["lang_x"])
    for b, x in enumerate(joined):
        segments[b, -x["segments"].shape[1] :] = x["segments"]
    found = logits(model, **batch, segments=segments)
    for b, rows in enumerate(packs):
        expected = torch.cat([logits(model, **row.inputs())[0] for row in rows])
        same(found[b, -len(expected) :], expected)
    assert differs(found[0, -len(expected) :], expected)


def test_with_checkpoints_and_chosen_logits() -> None:
    model = opened(fusion="cross-attention")
    model.set_trainable(PARTS)
    together = packed(rows_of(model))
    expected = gradients(model, [together])
    model.train()
    model.gradient_checkpointing_enable()
    tokens = (together["labels"][0] != IGNORED).nonzero()[:, 0] - 1
    loss, found = gradients(model, [{**together, "logits_at": tokens}])
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in expected[1].items():
        same(found[name], gradient)


def test_positions_and_counts() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 3, 3]])
    assert positions_within(segments).tolist() == [[0, 1, 0, 1, 2, 0, 0, 1]]
    flags = torch.tensor([[1, 0, 0, 1, 1, 1, 0, 1]]).bool()
    assert count_within(flags, segments).tolist() == [[1, 1, 0, 1, 2, 1, 0, 1]]


@pytest.mark.parametrize(
    ("language_model", "reason"),
    [
        ("mamba", "takes no position_ids"),
        ("bloom", "takes no position_ids"),
        ("jamba", "takes no mask for each pair of positions"),
        ("llama", None),
    ],
)
def test_language_models_are_measured(language_model: str, reason: str | None) -> None:
    problem = find_packing_problem(opened(language_model=language_model))
    assert problem is None if reason is None else reason in str(problem)


@pytest.mark.parametrize("what", ["sees the row before", "has one position only"])
def test_a_model_that_mixes_rows_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(language_model="gpt2")

    def mix(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden + 0.3 * hidden.roll(1, dims=1), *args[1:]), kwargs

    if what == "sees the row before":
        model.lang_model.transformer.h[1].register_forward_pre_hook(mix, with_kwargs=True)
    else:  # positions that go on
        monkeypatch.setattr("vlm_cli.modeling.vlm.positions_within", lambda x: torch.arange(x.shape[1]).expand_as(x))
    assert "a row changes with the rows around it" in str(find_packing_problem(model))


@pytest.mark.matrix
@pytest.mark.parametrize("fusion", ["language-stream", "cross-attention"])
@pytest.mark.parametrize("model_type", model_types())
def test_every_language_model_that_passes(model_type: str, fusion: str) -> None:
    """What the measurement lets pass gives longer rows their own logits."""
    model = tiny_vlm(model_type, fusion)
    if find_packing_problem(model) is not None:
        return
    rows = [tiny.row(model, n, 13 + 3 * n, seed=n) for n in (1, 0, 2)]
    expected = torch.cat([logits(model, **row.inputs())[0] for row in rows])
    together = packed(rows)
    scale = expected.std()
    found = logits(model, **together)[0]
    same(found / scale, expected / scale, {"atol": 1e-3, "rtol": 1e-3})
    del together["segments"]
    assert differs(logits(model, **together)[0] / scale, expected / scale, {"atol": 1e-3, "rtol": 1e-3})
