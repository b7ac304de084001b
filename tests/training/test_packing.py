"""Packing: what packs hold, how they are drawn, and that a packed run learns what an unpacked one does."""

from __future__ import annotations

import doctest
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import Result

from tests.support.clips import write_animation
from tests.support.grid import first_of
from tests.support.training import losses, write
from vlm_cli import load
from vlm_cli.modeling.learned import row_losses
from vlm_cli.training import packing
from vlm_cli.training.dataset import Collator, load_dataset
from vlm_cli.training.packing import PackedSampler, count_packs, join_items, pack

SIZES = np.random.default_rng(0).integers(2, 40, 300)


def test_packs_hold_each_item_once_and_no_more_than_fits() -> None:
    sizes = [*SIZES.tolist(), 90, 5]  # one is longer than a pack
    packs = list(pack(range(len(sizes)), 60, sizes.__getitem__, window=16))
    assert sorted(i for p in packs for i in p) == list(range(len(sizes)))
    lengths = [sum(sizes[i] for i in p) for p in packs]
    assert all(length <= 60 or len(p) == 1 for length, p in zip(lengths, packs, strict=True))
    assert sum(sizes) / (60 * len(packs)) > 0.95
    one_by_one = list(pack(range(len(sizes)), 60, sizes.__getitem__, window=1))
    assert len(one_by_one) == len(sizes)  # nothing waits, so that nothing is joined


def test_no_item_waits_for_long() -> None:
    """Each pack begins with the item that came first, also in a stream without an end."""
    packs = list(itertools.islice(pack(itertools.count(), 60, lambda i: 50 if i % 2 else 11, window=8), 40))
    taken: set[int] = set()
    for first, *others in packs:
        assert first == next(i for i in itertools.count() if i not in taken)
        taken |= {first, *others}
    assert len(taken) == sum(map(len, packs)) > len(packs)


def test_packs_follow_from_the_seed() -> None:
    drawn = [list(PackedSampler(SIZES, 30, length=60, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    longer = PackedSampler(SIZES, 90, length=60, seed=0)
    assert len(longer) == 90 and list(longer)[:30] == drawn[0]


def test_a_pass_holds_as_many_records_as_there_are() -> None:
    number = count_packs(SIZES, length=60, seed=3)
    drawn = list(PackedSampler(SIZES, number, length=60, seed=3))
    assert sum(map(len, drawn[:-1])) < len(SIZES) <= sum(map(len, drawn))


def test_a_damaged_picture_is_the_packs_error() -> None:
    good = {"index": 0, "ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, 2]), "pixels": []}
    assert join_items([good, {"index": 1, "error": "line 2 of 'x': broken"}])["error"] == "line 2 of 'x': broken"


@pytest.mark.parametrize("fusion", ["cross_attention", "language_stream"])
def test_a_batch_of_packs_has_the_losses_of_its_records(
    folder: Path, fusion: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Records of text alone, of one and several pictures, and of a clip."""
    vlm, processor = load(str(request.getfixturevalue(fusion)))
    clip = tmp_path / "clip.gif"
    clip.write_bytes(write_animation(9, "GIF"))
    red, blue = (f"<image:{folder / name}.png>" for name in ("red", "blue"))
    lines = [
        {"prompt": f"{red}Q: Which? A:", "completion": " red"},
        {"prompt": "Two and two?", "completion": " Four."},
        {"prompt": f"{blue}and{red}", "completion": " two"},
        {"prompt": f"<video:{clip}?frames=3>Then{red}", "completion": " x"},
        {"text": "Words."},
    ]
    data = load_dataset(write(tmp_path / "some.jsonl", lines), vlm, processor)
    items = [data[i] for i in range(len(data))]
    collate = Collator(processor.tokenizer.pad_token_id)

    def total(batch: dict[str, Any]) -> torch.Tensor:
        given = {key: x for key, x in batch.items() if isinstance(x, torch.Tensor) and key != "labels"}
        with torch.no_grad():
            return row_losses(vlm(**given).logits, batch["labels"], batch["logits_at"])[0]

    packed = collate([join_items(items[:3]), join_items(items[3:])])
    alone = torch.cat([total(collate([item])) for item in items])
    expected = torch.stack([alone[:3].sum(), alone[3:].sum()])
    torch.testing.assert_close(total(packed), expected, atol=1e-4, rtol=1e-5)
    assert packed["records"] == [0, 1, 2, 3, 4]
    segments = packed["segments"]
    for pack_of, records in zip(segments, ([0, 1, 2], [3, 4]), strict=True):
        tokens = [int((pack_of == i).sum()) for i in range(1, len(records) + 1)]
        assert tokens == [data.lengths[i] for i in records]
    del packed["segments"]
    assert not torch.allclose(total(packed), expected, atol=1e-4, rtol=1e-5)  # the twin


def test_positions_are_counted(folder: Path, language_stream: Path, tmp_path: Path) -> None:
    vlm, processor = load(str(language_stream))
    lines = [{"prompt": f"<image:{folder / 'red.png'}>A:", "completion": " red"}, {"text": "Words."}]
    data = load_dataset(write(tmp_path / "some.jsonl", lines), vlm, processor)
    assert data.positions.tolist() == [data.lengths[0] + 3, data.lengths[1]]  # a picture has 4 patches


@pytest.mark.matrix
@pytest.mark.parametrize("fusion", first_of(["language_stream", "cross_attention"]))
def test_a_packed_run(
    vlm: Callable[..., Result], folder: Path, tmp_path: Path, fusion: str, request: pytest.FixtureRequest
) -> None:
    """The run is resumed with the same packs, and other ones are another run."""
    model, out = request.getfixturevalue(fusion), tmp_path / "out"
    common = ("train", model, "--data", folder / "train.jsonl", "--batch-size", 2, "--log-every", 1, "--pack", 60)
    flags = (*common, "--save-every", 2, "--schedule", "constant", "--json", "--keep-checkpoints")
    whole = vlm(*flags, "--max-steps", 4, "-o", out)
    assert whole.exit_code == 0, whole.stderr
    assert "for 4 steps of 2 packed rows" in whole.stderr
    assert json.loads(whole.stdout)["images"] > 4 * 2  # a row holds several records
    part = tmp_path / "part"
    assert vlm(*flags, "--max-steps", 2, "-o", part).exit_code == 0
    other = vlm(*flags[:-1], "--max-steps", 4, "-o", part, "--resume", "--overwrite", "--pack", 50)
    assert other.exit_code == 2 and "--pack: was 60, is 50" in other.stderr, other.stderr
    again = vlm(*flags, "--max-steps", 4, "-o", part, "--resume", "--overwrite")
    assert again.exit_code == 0, again.stderr
    assert losses(part) == pytest.approx(losses(out), abs=1e-5)


def test_a_model_that_cannot_is_named(
    vlm: Callable[..., Result], folder: Path, cross_attention: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "find_packing_problem", lambda model: "layers 0, 1 keep a state.")
    result = vlm("train", cross_attention, "--data", folder / "train.jsonl", "-o", tmp_path / "out", "--pack", 60)
    assert result.exit_code == 2
    assert "--pack cannot join records for this model: layers 0, 1 keep a state. Leave --pack out." in result.stderr


def test_doctests() -> None:
    found = doctest.testmod(packing)
    assert found.attempted and not found.failed
