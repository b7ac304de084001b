"""Shards of every kind hold the same rows, give their pictures back at any time, and are told when they are bad."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import feather, parquet
from safetensors.torch import save

from tests.support.shards import draw, rows_of, sample, write_tar
from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.sources import Source, open_source
from vlm_cli.errors import DataError, UsageError, VLMError
from vlm_cli.prompt import parse

ROWS = rows_of(50)


def write_stream(path: Path, table: pyarrow.Table, compression: str | None = None) -> None:
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_stream(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 50 records in every kind of shard."""
    folder = tmp_path_factory.mktemp("shards")
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, folder / "a.parquet", row_group_size=20)
    feather.write_feather(table, str(folder / "packed.feather"), compression="lz4", chunksize=15)
    feather.write_feather(table, str(folder / "plain.feather"), compression="uncompressed", chunksize=15)
    write_stream(folder / "stream.arrow", table)
    write_stream(folder / "packed.arrow", table, "zstd")
    write_tar(folder / "a.tar", [x for i, row in enumerate(ROWS) for x in sample(f"part/{i:04}", row)])
    structs = [{**row, "images": [{"bytes": row["images"][0], "path": "x.png"}]} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(structs), folder / "structs.parquet")
    saved = folder / "saved"  # the files of `save_to_disk`
    (saved / "train").mkdir(parents=True)
    (saved / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    for i, part in enumerate((table.slice(0, 30), table.slice(30))):
        write_stream(saved / f"train/data-{i:05}-of-00002.arrow", part)
    names = [{"filename": f"data-{i:05}-of-00002.arrow"} for i in range(2)]
    (saved / "train/state.json").write_text(json.dumps({"_data_files": names}))
    (saved / "train/dataset_info.json").write_text("{}")
    return folder


KINDS = {
    "a.parquet": "Parquet",
    "structs.parquet": "Parquet",
    "packed.feather": "Arrow",
    "plain.feather": "Arrow",
    "stream.arrow": "Arrow",
    "packed.arrow": "Arrow",
    "a.tar": "tar shards",
    "saved": "Arrow",
    "saved/train": "Arrow",
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_holds_the_same_rows(folder: Path, name: str) -> None:
    source = open_source(str(folder / name))
    assert source.kind == KINDS[name]
    rows = list(source.all_rows())
    assert [row.problem for row in rows] == [None] * 50
    for row, expected in zip(rows, ROWS, strict=True):
        (picture,) = row.data["images"]
        assert {key: row.data[key] for key in ("prompt", "completion", "id")} | {"images": [picture.data]} == expected
    first = list(source.rows(0))
    assert list(source.rows(0, start=17)) == first[17:]
    assert first[6].place.endswith(f"7 of {source.shards[0]}")


@pytest.mark.parametrize("name", KINDS)
def test_pictures_come_back_in_any_order_and_process(folder: Path, name: str) -> None:
    source = open_source(str(folder / name))
    references = [row.data["images"][0].reference for row in source.all_rows()]
    assert len(set(references)) == 50
    for opened in (source, pickle.loads(pickle.dumps(source)), open_source(str(folder / name))):
        for i in (49, 0, 31, 30, 14, 15):
            assert opened.bytes_of(references[i]) == ROWS[i]["images"][0]
    for wrong in ("inside:gone#1/images/0", "inside:a.tar#1/png/7", "inside:x", "a.png"):
        with pytest.raises(RecordError):
            source.bytes_of(wrong)


def test_a_directory_gives_the_split_to_learn(folder: Path, tmp_path: Path) -> None:
    assert (open_source(str(folder / "saved")).detail, len(open_source(str(folder / "saved")).shards)) == (
        "split train, 2 shards",
        2,
    )
    for name in ("data/test-00000.parquet", "data/train-00000.parquet", "data/train-00001.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((folder / "a.parquet").read_bytes())
    source = open_source(str(tmp_path))
    assert list(source.shards) == ["data/train-00000.parquet", "data/train-00001.parquet"]
    assert source.folder == tmp_path and source.detail == "split train, 2 shards"
    (tmp_path / "data/train-00000.parquet").rename(tmp_path / "data/dev.parquet")
    (tmp_path / "data/train-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"holds the splits validation, test\. Give one: --data"):
        open_source(str(tmp_path))


def test_patterns_name_shards(folder: Path, tmp_path: Path) -> None:
    for i in range(8, 12):
        write_tar(tmp_path / f"t-{i:03}.tar", sample("x", ROWS[i]))
    braces, stars = open_source(str(tmp_path / "t-{008..011}.tar")), open_source(str(tmp_path / "t-*.tar"))
    assert list(braces.shards) == list(stars.shards) == [f"t-{i:03}.tar" for i in range(8, 12)]
    assert [row.data["prompt"] for row in braces.all_rows()] == [f"Which shade is {i}?" for i in range(8, 12)]
    assert braces.digest() == stars.digest() != open_source(str(tmp_path / "t-{008..010}.tar")).digest()


# -- tar shards --------------------------------------------------------------------------------------------------------


def read_tar(path: Path, *members: tuple[str, bytes]) -> list[dict[str, Any]]:
    return [row.data or {"problem": row.problem} for row in open_source(str(write_tar(path, members))).all_rows()]


def test_a_sample_of_a_tar_shard_becomes_a_row(tmp_path: Path) -> None:
    image = draw(7)
    captioned, listed, metadata, several = read_tar(
        tmp_path / "a.tar",
        ("a.jpg", image),
        ("a.txt", b"A tag, <image>"),
        ("b.json", b'{"prompt": "<image> and <image>", "completion": "x", "images": ["right.png", "b.left.png"]}'),
        ("b.left.png", image),
        ("b.right.png", draw(9)),
        ("c.json", b'{"url": "https://x.org", "key": "7"}'),
        ("c.txt", b"caption"),
        ("c.webp", image),
        ("./.hidden", b"?"),
        ("d.cls", b"3"),
        ("d.mp4", b"clip"),
        ("d.npy", b"not read"),
    )
    assert (captioned["__key__"], captioned["prompt"], len(captioned["images"])) == ("a", "", 1)
    assert "".join(x.text for x in parse(captioned["completion"])) == "A tag, <image>"  # type: ignore[union-attr]
    assert [x.data for x in listed["images"]] == [draw(9), image]
    assert metadata["completion"] == "caption" and metadata["key"] == "7"
    assert (several["cls"], several["videos"][0].data, "npy" in several) == ("3", b"clip", False)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.json", b"{"), ("a.png", b"x")], "'a': not JSON"),
        ([("a.json", b'{"a": "\xff"}')], "'a': not UTF-8 text: byte 8 is 0xff"),
        ([("a.txt", b"\xff\xfea")], "'a': its .txt is not UTF-8 text but UTF-16"),
        ([("a.png", b"x"), ("a.PNG", b"y")], "'a': it has two members .png"),
    ],
)
def test_a_bad_sample_is_a_row_with_a_problem(tmp_path: Path, members: list[tuple[str, bytes]], words: str) -> None:
    bad, good = read_tar(tmp_path / "a.tar", *members, ("b.json", b'{"text": "x"}'))
    assert words in bad["problem"] and good["text"] == "x"


# -- bad shards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in KINDS if "saved" not in name])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_shard_that_is_cut_short_is_told(folder: Path, tmp_path: Path, name: str, share: float) -> None:
    raw = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(DataError, match=r"is damaged or cut short: .+\. Get it again\."):
        list(open_source(str(tmp_path / name)).all_rows())


def test_a_tar_that_ends_between_members_or_with_a_bad_header_is_told(folder: Path, tmp_path: Path) -> None:
    raw = (folder / "a.tar").read_bytes().rstrip(b"\0")
    for i, bad in enumerate((raw + bytes(-len(raw) % 512), raw[:51_200] + b"x" * 512 + raw[51_712:])):
        (tmp_path / f"{i}.tar").write_bytes(bad)
        with pytest.raises(DataError, match="damaged or cut short"):
            list(open_source(str(tmp_path / f"{i}.tar")).all_rows())


@pytest.mark.parametrize("name", ["a.parquet", "plain.feather", "stream.arrow", "a.tar"])
def test_a_shard_that_goes_or_changes_during_a_run_is_told(folder: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes((folder / name).read_bytes())
    source = open_source(str(path))
    reference = next(source.rows(0)).data["images"][0].reference
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"has changed since it was opened|is shorter than it was"):
        source.bytes_of(reference)
    path.unlink()
    for attempt in (lambda: source.bytes_of(reference), lambda: list(source.rows(0)), source.digest):
        with pytest.raises(DataError, match=f"the file '{name}' is gone. Put it back"):
            attempt()


def write_lists(folder: Path, names: Any) -> Path:
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d, "is a directory without files of records"),
        (lambda d: d / "*.tar", "no file matches"),
        (lambda d: [(d / "a-0.tar").touch(), d / "a-{0..2}.tar"][1], "a-1.tar', one of the shards of"),
        (lambda d: [(d / "a.gz").write_bytes(b"\x1f\x8b\x08"), d / "a.gz"][1], "Unpack it first: gunzip"),
        (lambda d: [(d / "a").write_bytes(b"FEA1"), d / "a"][1], "is Feather 1, which vlm does not read"),
        (lambda d: write_bytes(d / "a.jsonl", save({"x": torch.zeros(2)})), "the weights of a model (safetensors)"),
        (lambda d: write_bytes(d / "a.jsonl", draw(1)), "is a picture, and not rows"),
        (lambda d: write_bytes(d / "a.jsonl", draw(1, "JPEG")), "is a picture, and not rows"),
        (lambda d: write_bytes(d / "a", pickle.dumps({})), "is a pickle of Python. It may hold code, so vlm does not"),
        (lambda d: [torch.save(torch.zeros(1), d / "a.pt"), d / "a.pt"][1], "holds tensors of PyTorch. It may hold"),
        (lambda d: write_bytes(d / "a.jsonl", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda d: write_bytes(d / "a.json", b"<!DOCTYPE html>"), "is a page of the web (HTML)"),
        (lambda d: write_bytes(d / "a.csv", b"a,b\n1,2\n"), "load_dataset('csv', data_files='a.csv')"),
        (lambda d: write_bytes(d / "a", b"\1\2\0\0" * 9), "is a binary file of a kind that vlm does not know"),
        (lambda d: [(d / "a.jsonl").write_text("{}"), write_tar(d / "b.tar", [("a.txt", b"")]), d / "*.*"][2],
         "mixes kinds: 'a.jsonl' is JSON lines, and 'b.tar' tar shards"),
        (lambda d: [(d / "a.jsonl").touch(), (d / "b.tar").touch(), d][2], "of several kinds"),
        (lambda d: write_lists(d, [{"filename": "../x.arrow"}]), "lists '../x.arrow', which is no name of"),
        (lambda d: write_lists(d, []), "lists no files of data"),
        (lambda d: "hf:a:b:c:d", "is no data set of the hub. Write hf:ORG/NAME"),
    ],
)  # fmt: skip
def test_what_is_no_source_is_told(tmp_path: Path, make: Any, words: str) -> None:
    with pytest.raises((DataError, UsageError)) as error:
        open_source(str(make(tmp_path)))
    assert words in str(error.value)


def test_a_row_group_has_a_largest_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_cli.data.sources.tables._GROUP_BYTES", 100)
    with pytest.raises(DataError, match=r"reads at most 100\. Write it again with fewer rows"):
        list(open_source(str(folder / "a.parquet")).all_rows())


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_what_reads_a_source_may_be_absent(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"is not installed: pip install 'vlm-cli\[data\]'"):
        open_source(str(folder / "a.parquet") if module == "pyarrow" else "hf:org/set")


def test_a_source_says_what_it_does_not_hold(folder: Path) -> None:
    source: Source = open_source(str(folder / "a.parquet"))
    with pytest.raises(VLMError, match="holds no picture"):
        source.bytes_of("inside:a.parquet#1/prompt")


def test_a_stream_that_ends_between_batches_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes((folder / "stream.arrow").read_bytes()[:-8])
    with pytest.raises(DataError, match="no end of the stream is found"):
        list(open_source(str(tmp_path / "a.arrow")).all_rows())


def test_a_shard_is_named_once_or_with_its_source(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.tar").write_bytes((folder / "a.tar").read_bytes()[:9_000])
    for name, words in (("cut.tar", "^'cut.tar' is damaged"), ("*.tar", r"^'cut.tar' of '.*\*.tar' is damaged")):
        with pytest.raises(DataError, match=words):
            list(open_source(str(tmp_path / name)).all_rows())


def test_a_folder_is_not_read_in_the_place_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `datasets` reads it where both have one name."""
    (tmp_path / "org/set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"there is a folder 'org/set' here\. To read the folder, give it without"):
        open_source("hf:org/set")
