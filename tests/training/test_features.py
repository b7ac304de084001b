"""`--cache-features`: the losses of a run that encodes its pictures, without encoding them again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from tests.support import tiny
from tests.support.clips import write_animation
from tests.support.invariants import differs, logits, opened, same
from tests.support.training import losses, write
from vlm_cli import load
from vlm_cli.errors import UsageError
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.prompt import Medium
from vlm_cli.training import features
from vlm_cli.training.dataset import Collator, RecordDataset, load_dataset
from vlm_cli.training.features import FeatureCache, check_cacheable

CPU = torch.device("cpu")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of views in each call of a vision encoder."""
    calls: list[int] = []
    forward = VisionEncoder.forward

    def count(self: VisionEncoder, vision_x: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(vision_x.shape[:3].numel())
        return forward(self, vision_x, *args)

    monkeypatch.setattr(VisionEncoder, "forward", count)
    return calls


@pytest.fixture(scope="module")
def model(language_stream: Path) -> tuple[Any, Any]:
    return load(str(language_stream))


@pytest.fixture
def data(folder: Path, model: tuple[Any, Any], tmp_path: Path) -> RecordDataset:
    clip = tmp_path / "clip.gif"
    clip.write_bytes(write_animation(9, "GIF"))
    shutil.copy(folder / "red.png", tmp_path / "again.png")
    red, blue, again = (f"<image:{path}>" for path in (folder / "red.png", folder / "blue.png", tmp_path / "again.png"))
    lines = [
        {"prompt": f"{red}and{blue}", "completion": " two"},
        {"prompt": f"<video:{clip}?frames=3>Then{again}", "completion": " x"},
        {"text": "Words."},
    ]
    return load_dataset(write(tmp_path / "some.jsonl", lines), *model)


def fill(root: Path, model: tuple[Any, Any], data: RecordDataset, **options: Any) -> tuple[FeatureCache, list[str]]:
    vlm, processor = model
    told: list[str] = []
    cache = FeatureCache.of(root, vlm, processor.image_processor, bf16=False)
    media = list(data.media_of(0))
    cache.fill(media, data.loaders[0], data.images, vlm, device=CPU, tell=told.append)
    return cache, told


def batch_of(data: RecordDataset) -> dict[str, Any]:
    batch = Collator(0)([data[i] for i in range(len(data))])
    return {key: x for key, x in batch.items() if isinstance(x, torch.Tensor) and key != "labels"}


@pytest.mark.sample(2)
@pytest.mark.parametrize("fusion", ["language-stream", "cross-attention"])
@pytest.mark.parametrize("tokenizer", ["linear", "perceiver", "qformer", "mlp"])
def test_logits_from_features_are_those_from_pixels(tokenizer: str, fusion: str) -> None:
    model = opened(tokenizer=tokenizer, fusion=fusion)
    batch = tiny.batch(model, (1, 0, 3), frames=2)
    pixels = batch.pop("vision_x")
    features = model.vision_encoder(pixels)
    features[~batch["vision_mask"]] = 1e4  # padding counts for nothing
    found = logits(model, **batch, vision_features=features)
    same(found, logits(model, **batch, vision_x=pixels))
    assert differs(found, logits(model, **batch, vision_features=features.flip(-1)))


def test_each_picture_is_encoded_once(model: Any, data: RecordDataset, tmp_path: Path, encoded: list[int]) -> None:
    plain = batch_of(data)
    cache, told = fill(tmp_path / "cache", model, data)
    assert encoded == [2 + 3]  # two names of one picture are one file
    assert len(list(cache.folder.rglob("*.safetensors"))) == 3
    assert told[0].startswith(f"Features of 3 pictures take 0.0 MB in {cache.folder}; ")
    data.features = [cache]
    kept = batch_of(data)
    assert "pixel_values" not in kept and torch.equal(kept["vision_mask"], plain["vision_mask"])
    same(logits(model[0], **kept), logits(model[0], **plain))
    encoded.clear()
    assert fill(tmp_path / "cache", model, data)[1] == [f"Features: all are in {cache.folder}."]
    assert encoded == []


def test_what_is_cut_off_is_written_again(model: Any, data: RecordDataset, tmp_path: Path, encoded: list[int]) -> None:
    cache, _ = fill(tmp_path, model, data)
    first, second, _ = sorted(cache.folder.rglob("*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    second.write_bytes(b"")
    encoded.clear()
    fill(tmp_path, model, data)
    assert sum(encoded) in (2, 4) and first.read_bytes() == whole


def test_a_run_that_is_killed_leaves_no_file_that_is_read(
    model: Any, data: RecordDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(tensors: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features, "save_file", stop)
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path, model, data)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.partial"))


def changes(model: tuple[Any, Any]) -> Iterator[tuple[Any, Any, bool]]:
    """A model, an image processor and a precision, each with one difference."""
    vlm, processor = model
    images = processor.image_processor
    yield vlm, type(images)(images.preprocess_config | {"mean": [0.4] * 3}), False
    yield vlm, type(images)(images.preprocess_config, {"type": "grid"}), False
    yield vlm, images, True
    with tiny.nudged(next(vlm.vision_encoder.parameters()), at=-1):
        yield vlm, images, False


def test_another_encoder_has_its_own_folder(model: Any, tmp_path: Path) -> None:
    vlm, processor = model
    own = FeatureCache.of(tmp_path, vlm, processor.image_processor, bf16=False).folder
    assert FeatureCache.of(tmp_path, vlm, processor.image_processor, bf16=False).folder == own
    others = [FeatureCache.of(tmp_path, vlm, images, bf16=bf16).folder for vlm, images, bf16 in changes(model)]
    assert len({own, *others}) == 1 + 4


def test_a_file_that_changed_is_another_picture(model: Any, data: RecordDataset, folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "one.png"
    shutil.copy(folder / "red.png", picture)
    data.media = [(Medium(str(picture), "image"),)]
    cache, _ = fill(tmp_path / "cache", model, data)
    shutil.copy(folder / "green.png", picture)
    again, _ = fill(tmp_path / "cache", model, data)
    before, after = cache.find(data.media[0][0]), again.find(data.media[0][0])
    assert before is not None and after is not None and differs(before.views, after.views)


def test_too_little_space_is_told_before_anything_is_written(
    model: Any, data: RecordDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(UsageError, match=r"the features take 0\.0 GB, .* Give a folder on a larger disk"):
        fill(tmp_path / "cache", model, data)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_features_that_vanish_are_named(model: Any, data: RecordDataset, tmp_path: Path) -> None:
    cache, _ = fill(tmp_path / "cache", model, data)
    data.features = [cache]
    shutil.rmtree(cache.folder)
    assert "line 1 of 'some.jsonl': its features are no longer in" in Collator(0)([data[0]])["error"]
    data.features = [replace(cache, digests={})]
    data.media[0] = (Medium("absent.png", "image"),)
    assert "cannot find 'absent.png'" in data[0]["error"]


def test_an_encoder_that_trains_is_refused() -> None:
    model = opened()
    check_cacheable(model)
    model.set_trainable(["vision_encoder"])
    with pytest.raises(UsageError, match="vision_encoder trains here"):
        check_cacheable(model)


@pytest.mark.matrix
def test_a_run_with_features(
    vlm: Callable[..., Result], folder: Path, language_stream: Path, tmp_path: Path, encoded: list[int]
) -> None:
    """Packed and with held-out records, which have the same pictures."""
    found = []
    held_out = write(tmp_path / "held-out.jsonl", [{"prompt": f"<image:{folder / 'red.png'}>A:", "completion": " red"}])
    for number, cached in enumerate([(), ("--cache-features", tmp_path / "cache")]):
        out = tmp_path / f"out{number}"
        flags = ("--max-steps", 2, "--batch-size", 2, "--log-every", 1, "--eval-data", held_out, "--pack", 60, *cached)
        encoded.clear()
        result = vlm("train", language_stream, "--data", folder / "train.jsonl", "-o", out, *flags)
        assert result.exit_code == 0, result.stderr + repr(result.exception)
        found.append(losses(out))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert encoded == [4] and "Features of 4 pictures take" in result.stderr
