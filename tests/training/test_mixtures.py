"""Runs on several sources: what they learn, in which order, how they go on, and what is told of bad ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from click.testing import Result
from pyarrow import parquet
from safetensors.torch import load_file

import vlm_cli
from tests.support.shards import sample, write_tar
from tests.support.training import losses, metrics, write
from vlm_cli.data.mixture import Ingredient, Mixture
from vlm_cli.data.records import DataError
from vlm_cli.models import load
from vlm_cli.training.dataset import Collator, RecordDataset, check_batch, load_dataset
from vlm_cli.training.preparing import RecordPreparer

Vlm = Callable[..., Result]
STEPS = ("--batch-size", 4, "--log-every", 1, "--save-every", 100, "--lr", 1e-2, "--quiet")


@pytest.fixture(scope="module")
def sources(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 24 records: as lines, in two halves, and the first half with its pictures in Parquet and in a tar shard."""
    made = tmp_path_factory.mktemp("sources")
    for picture in folder.glob("*.png"):
        shutil.copy(picture, made)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    write(made / "all.jsonl", lines)
    write(made / "a.jsonl", lines[:12])
    write(made / "b.jsonl", lines[12:])
    rows = []
    for line in lines[:12]:
        start, _, rest = line["prompt"].partition(">")
        row = {"prompt": f"<image>{rest}", "images": [(made / start.removeprefix("<image:")).read_bytes()]}
        turns = line.get("turns")
        rows.append({**row, "turns": turns} if turns else {**row, "completion": line["completion"]})
    for row in rows:  # columns of a table are the same in each row
        turns = row.pop("turns", None)
        if turns:
            row |= {"prompt": row["prompt"] + turns[0]["prompt"], "completion": turns[0]["completion"]}
    parquet.write_table(pyarrow.Table.from_pylist(rows), made / "a.parquet", row_group_size=5)
    write_tar(made / "a.tar", [x for i, row in enumerate(rows) for x in sample(f"{i:02}", row)])
    write(
        made / "pictures.jsonl",
        [{"text": "Words."}, {"prompt": "<image:red.png><image:blue.png>?", "completion": " 2"}],
    )
    return made


@pytest.fixture(scope="module")
def model(cross_attention: Path) -> Any:
    return load(str(cross_attention))


@pytest.fixture
def train(vlm: Vlm, cross_attention: Path, sources: Path, tmp_path: Path) -> Vlm:
    def run(out: str, data: str, *arguments: Any) -> Result:
        named = [x for name in data.split() for x in ("--data", name if ":" in name else sources / name)]
        return vlm("train", cross_attention, *named, "--output", tmp_path / out, *STEPS, *arguments)

    return run


def output(result: Result) -> str:
    assert result.exit_code == 0, result.stderr + repr(result.exception)
    return result.stderr


def error(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.stderr + repr(result.exception)
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.matrix
def test_sources_without_weights_are_one_long_file(train: Vlm, tmp_path: Path) -> None:
    for out, data, flags in (
        ("one", "all.jsonl", ()),
        ("two", "a.jsonl b.jsonl", ()),
        ("weighed", "a.jsonl b.jsonl", ("--weights", "1,1")),
    ):
        output(train(out, data, "--max-steps", 2, *flags))
    assert losses(tmp_path / "one") == losses(tmp_path / "two") != losses(tmp_path / "weighed")


@pytest.mark.matrix
def test_pictures_inside_shards_train_as_files_do(train: Vlm, model: Any, sources: Path, tmp_path: Path) -> None:
    batches = []
    for name in ("a.parquet", "a.tar"):
        output(train(name, name, "--max-steps", 1))
        data = load_dataset(sources / name, *model)
        batches.append(check_batch(Collator(0)([data[i] for i in range(12)]), notes=None))  # type: ignore[arg-type]
    assert losses(tmp_path / "a.parquet") == losses(tmp_path / "a.tar")
    files = load_dataset(sources / "a.jsonl", *model)
    expected = Collator(0)([files[i] for i in range(12)])
    for batch in batches:
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])


@pytest.mark.matrix
def test_a_mixture_of_every_kind_trains_and_goes_on(train: Vlm, sources: Path, tmp_path: Path) -> None:
    listed = ["a.jsonl", "a.parquet", "a.tar", "pictures.jsonl"]
    mixture = {"seed": 3, "sources": [{"data": name, "weight": i + 1} for i, name in enumerate(listed)]}
    (sources / "mixture.yaml").write_text(json.dumps(mixture))
    flags = ("--max-steps", 3, "--save-every", 1, "--keep-checkpoints", "--no-group-by-length")
    output(train("whole", "mixture.yaml", *flags))
    shutil.copytree(tmp_path / "whole.checkpoints", tmp_path / "broken.checkpoints")
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"broken.checkpoints/checkpoint-{step}")
    output(train("broken", "mixture.yaml", *flags, "--resume"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    record = json.loads((tmp_path / "whole/training_args.json").read_text())
    assert [x["weight"] for x in record["job"]["data"]["sources"]] == [1, 2, 3, 4]
    mixture["sources"][0]["weight"] = 9  # type: ignore[index]
    (sources / "mixture.yaml").write_text(json.dumps(mixture))
    shutil.rmtree(tmp_path / "broken")
    assert "weights of the sources" in error(train("broken", "mixture.yaml", *flags, "--resume"), 2)


def test_weights_say_how_often_a_source_is_drawn(train: Vlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    get = RecordDataset.__getitem__
    monkeypatch.setattr(RecordDataset, "__getitem__", lambda self, i: drawn.append(i) or get(self, i))  # type: ignore[func-returns-value]
    output(train("out", "a.jsonl b.jsonl", "--weights", "3,1", "--max-steps", 2, "--batch-size", 32))
    assert 40 <= sum(i < 12 for i in drawn) <= 56 and len(drawn) == 64
    assert [entry["epoch"] for entry in metrics(tmp_path / "out")][-1] == pytest.approx(64 / 24, abs=1e-3)


@pytest.mark.parametrize(
    ("data", "flags", "code", "words"),
    [
        ("a.jsonl a.jsonl", (), 2, "two sources have the name"),
        ("a.jsonl b.jsonl", ("--weights", "0,0"), 2, "the weights of the sources sum to 0"),
        ("a.jsonl b.jsonl", ("--weights", "1,x"), 2, "--weights expects a number for each --data"),
        ("a.jsonl b.jsonl", ("--weights", "1"), 2, "gives 1 numbers for 2 sources"),
        ("a.jsonl gone.jsonl", (), 1, "cannot find the records"),
        ("a.jsonl", ("--too-long", "no"), 2, "Known: error, drop, cut."),
    ],
)
def test_what_is_no_mixture_is_told(train: Vlm, data: str, flags: Any, code: int, words: str) -> None:
    assert words in error(train("out", data, *flags), code)


@pytest.mark.matrix
def test_a_loss_that_is_no_number_names_source_and_row(train: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_of = vlm_cli.modeling.vlm.learned_loss
    monkeypatch.setattr(vlm_cli.modeling.vlm, "learned_loss", lambda *args, **kw: loss_of(*args, **kw) * torch.nan)
    message = error(train("out", "a.parquet a.jsonl", "--weights", "1,0", "--batch-size", 1))
    assert "the loss is nan at step 1, in the records row " in message and "a.parquet'" in message
    message = error(train("out", "a.jsonl b.jsonl", "--batch-size", 12))
    assert "a.jsonl'" in message and "b.jsonl'" in message and "'caption-" in message


def test_a_shard_that_goes_during_a_run_keeps_its_steps(
    train: Vlm, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = sources / "going.tar"
    shutil.copy(sources / "a.tar", shard)
    done = []
    get = RecordDataset.__getitem__

    def remove(self: RecordDataset, index: int) -> Any:
        done.append(index)
        if len(done) == 9:
            shard.unlink()
        return get(self, index)

    monkeypatch.setattr(RecordDataset, "__getitem__", remove)
    message = error(train("out", "going.tar", "--max-steps", 4))
    assert "sample" in message and "the file 'going.tar' is gone. Put it back" in message
    assert "checkpoint-2' keeps the run at step 2. Mend the data, and repeat the command with --resume." in message


def test_ids_that_come_twice_are_told(sources: Path, model: Any) -> None:
    mixture = Mixture.of([sources / "a.jsonl", sources / "b.jsonl"])
    notes = load_dataset(mixture, *model).notes
    (note,) = [note for note in notes if "more than one record" in note]
    assert note == (
        "Note: 4 ids stand at more than one record, as 'caption-red' in line 1 of a.jsonl and in line 1 of b.jsonl."
    )
    assert not [x for x in load_dataset(sources / "a.jsonl", *model).notes if "more than one record" in x]


def test_each_source_is_named_with_its_kind(sources: Path, model: Any) -> None:
    notes = load_dataset(Mixture.of([sources / "a.tar", sources / "[ab].jsonl"]), *model).notes
    first, second = [note for note in notes if note.startswith("Data: ")]
    assert "(tar shards, 12 rows)" in first and "(JSON lines, 2 shards, 24 rows)" in second


def test_a_picture_column_of_another_type_is_told(sources: Path, model: Any) -> None:
    for images, words in (([3], '"images" must be'), ([b"no picture"], "is not an image that Pillow can read")):
        path = sources / "bad.parquet"
        parquet.write_table(
            pyarrow.Table.from_pylist([{"prompt": "<image>a", "completion": "x", "images": images}]), path
        )
        with pytest.raises(DataError, match=words):
            load_dataset(path, *model)


# -- records that are too long -----------------------------------------------------------------------------------------


def long_records(sources: Path, context: int) -> Path:
    words = " one" * context
    return write(
        sources / "long.jsonl",
        [
            {"prompt": "<image:red.png>Count:", "completion": words},
            {"prompt": "<image:red.png>Colour:", "completion": " red"},
            {"prompt": f"<image:red.png>{words}", "completion": " red"},
        ],
    )


@pytest.fixture
def context(model: Any) -> int:
    return int(RecordPreparer(*model)._budget.context or 0)


def test_a_record_that_is_too_long_is_an_error(sources: Path, model: Any, context: int) -> None:
    with pytest.raises(DataError, match=rf"2 of the 3 records .*\n  line 1: takes \d+ positions .*has {context}"):
        load_dataset(long_records(sources, context), *model)


def test_a_record_that_is_too_long_is_left_out_and_counted(sources: Path, model: Any, context: int) -> None:
    data = load_dataset(long_records(sources, context), *model, too_long="drop")
    assert (len(data), data.rows) == (1, [("line", 2, "long.jsonl")])
    assert (
        f"Note: 2 records are longer than the {context:,} positions of the language model and were left out, as "
        "line 1 of long.jsonl." in data.notes
    )
    write(sources / "long.jsonl", [json.loads((sources / "long.jsonl").read_text().splitlines()[0])])
    with pytest.raises(DataError, match=r"no record of '.*long.jsonl' is left"):
        load_dataset(sources / "long.jsonl", *model, too_long="drop")


def test_a_record_that_is_too_long_is_cut(sources: Path, model: Any, context: int, language_stream: Path) -> None:
    path = long_records(sources, context)
    for loaded in (model, load(str(language_stream))):
        data = load_dataset(path, *loaded, too_long="cut")
        assert [row[1] for row in data.rows] == [1, 2]  # of the third, nothing to learn would be left
        assert data.positions.tolist()[0] == context and data.is_target[: data.ends[1]].any()
        whole = RecordPreparer(*loaded)._encoder
        assert whole is not None and [len(media) for media in data.media] == [1, 1]
        assert any("1 record is longer" in x and "was cut, as line 1" in x for x in data.notes)
        assert any("1 record is longer" in x and "was left out, as line 3" in x for x in data.notes)


def test_ingredients_say_where_their_pictures_are(sources: Path, model: Any, tmp_path: Path) -> None:
    write(tmp_path / "far.jsonl", [{"question": "?", "answer": "red", "image": "red.png"}])
    (sources / "far.yaml").write_text(
        json.dumps({"sources": [{
            "data": str(tmp_path / "far.jsonl"), "image_folder": ".",
            "columns": {"prompt": "question", "completion": "answer", "images": "image"},
        }]})
    )  # fmt: skip
    data = load_dataset(sources / "far.yaml", *model)
    assert [x.source for x in data.media[0]] == ["red.png"]
    assert np.array_equal(data[0]["pixels"][0].views, load_dataset(sources / "a.jsonl", *model)[0]["pixels"][0].views)
    assert Ingredient("x").refine(data_reading := vlm_cli.data.records.PLAIN_READING) == data_reading
