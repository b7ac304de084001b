"""Pieces of an input, and the files of their answers: nothing is lost, repeated or half-written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from tests.support.grid import grid
from vlm_cli.cli.batch_parts import Parts, Piece, cut
from vlm_cli.data.sources import open_source
from vlm_cli.errors import DataError, OutputExistsError, UsageError

SETTINGS = {"--model": "demo", "--seed": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of JSON lines, with empty lines and one that cannot be read."""
    shards = tmp_path / "rows"
    shards.mkdir()
    lines = [json.dumps({"prompt": f"p{i}", "id": i}) for i in range(7)]
    (shards / "a.jsonl").write_text("\n\n".join(lines[:5]) + "\n\n", encoding="utf-8")
    (shards / "b.jsonl").write_text("\n".join([lines[5], "{broken", lines[6]]), encoding="utf-8")
    return shards


@grid(rows_each=[1, 2, 3, 5, 100], quick={"rows_each": [2]})
def test_pieces_cover_each_row_once(folder, rows_each):
    source = open_source(str(folder))
    pieces = list(cut(source, rows_each))
    assert all(1 <= piece.count <= rows_each for piece in pieces)
    assert len({piece.name for piece in pieces}) == len(pieces)
    found = [(row.shard, row.number, row.data, row.problem) for piece in pieces for row in piece.rows(source)]
    assert found == [(row.shard, row.number, row.data, row.problem) for row in source.all_rows()]
    other = [Piece(piece.shard, piece.first + 1, None, piece.count) for piece in pieces]
    assert [row.number for piece in other for row in piece.rows(source)] != [number for _, number, *_ in found]


@pytest.mark.parametrize("as_parquet", [False, True])
def test_a_part_is_whole_or_absent(tmp_path, as_parquet):
    if as_parquet:
        pytest.importorskip("pyarrow")
    parts, piece = (
        Parts.open(str(tmp_path / "out"), SETTINGS, as_parquet=as_parquet, overwrite=False),
        Piece(0, 1, 0, 2),
    )

    def breaks():
        yield {"id": 1, "text": " a"}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        parts.write(piece, breaks())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]
    answers = [{"id": 1, "text": " a \u2028 \ud800"}, {"id": "x", "error": "line 2: no"}]
    if as_parquet:
        answers[0]["text"] = " a \u2028"
    parts.write(piece, iter(answers))
    parts.write(piece, iter(answers))  # by an actor that answers it again
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [parts.name_of(piece), "run.json"]
    assert parts.count_failed(piece) == 1
    if as_parquet:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(tmp_path / "out" / parts.name_of(piece)).to_pylist()
        assert [json.loads(row["row"]) for row in rows] == answers
        assert [(row["id"], row["text"], row["error"]) for row in rows] == [
            ("1", " a \u2028", None),
            ("x", None, "line 2: no"),
        ]
    else:
        assert [
            json.loads(line)
            for line in (tmp_path / "out" / parts.name_of(piece)).read_text(encoding="utf-8").split("\n")[:-1]
        ] == answers


def test_a_run_goes_on_with_its_own_settings_alone(tmp_path):
    out, piece = str(tmp_path / "out"), Piece(0, 1, 0, 1)
    Parts.open(out, SETTINGS, as_parquet=False, overwrite=False).write(piece, iter([{"text": ""}]))
    assert not Parts.open(out, SETTINGS, as_parquet=False, overwrite=False).missing([piece])
    with pytest.raises(UsageError, match=r"--seed: was None, is 7\nGive the same settings"):
        Parts.open(out, {**SETTINGS, "--seed": 7}, as_parquet=False, overwrite=False)
    assert Parts.open(out, {**SETTINGS, "--seed": 7}, as_parquet=False, overwrite=True).missing([piece]) == [piece]
    for other in (tmp_path / "file", tmp_path / "folder"):
        (other.mkdir if other.name == "folder" else other.touch)()
        with pytest.raises(OutputExistsError, match="holds no answers of `vlm batch --engine ray`"):
            Parts.open(str(other), SETTINGS, as_parquet=False, overwrite=True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine", "spark"], "--engine knows local and ray, got 'spark'"),
        (["--engine", "ray", "--part-format", "csv"], "--part-format knows jsonl and parquet, got 'csv'"),
        (["--actors", "3"], "--actors has no effect without --engine ray"),
    ],
)
def test_wrong_usage(folder, tmp_path, vlm, flags, words):
    found = vlm("batch", folder / "a.jsonl", "--output", tmp_path / "out", *flags)
    assert found.exit_code == 2 and words in found.stderr


def test_without_ray_the_extra_is_named(folder, tmp_path, vlm, monkeypatch):
    monkeypatch.setattr("vlm_cli.cli.batch_ray.find_spec", lambda name: None)
    found = vlm("batch", folder / "a.jsonl", "--output", tmp_path / "out", "--engine", "ray")
    assert found.exit_code == 2 and "pip install 'vlm-cli[ray]'" in found.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_of_another_is_refused_before_ray_starts(folder, tmp_path, vlm, monkeypatch):
    monkeypatch.setattr("vlm_cli.cli.batch_ray._check_ray", lambda: None)
    monkeypatch.setattr("vlm_cli.cli.batch_ray._start_ray", lambda: 1 / 0)
    (tmp_path / "out").mkdir()
    found = vlm("batch", folder / "a.jsonl", "--output", tmp_path / "out", "--engine", "ray")
    assert found.exit_code == 2 and "holds no answers of `vlm batch --engine ray`" in found.stderr


@pytest.fixture
def bucket():
    """An object store in memory, and an empty place in it."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.makedirs("/batch", exist_ok=True)
    yield system
    system.rm("/batch", recursive=True)


def test_rows_come_from_an_object_store(folder, bucket):
    bucket.put(str(folder), "/batch/rows", recursive=True)
    bucket.pipe_file("/batch/rows/_SUCCESS", b"")
    local, remote = open_source(str(folder)), open_source("memory://batch/rows")
    assert remote.shards == local.shards
    assert [row.data for row in remote.all_rows()] == [row.data for row in local.all_rows()]
    pieces = list(cut(remote, 2))
    assert pieces == list(cut(local, 2))
    again = open_source("memory://batch/rows")  # as an actor opens it
    assert [row.data for piece in pieces[::-1] for row in piece.rows(again)] == [
        row.data for piece in pieces[::-1] for row in piece.rows(local)
    ]
    before = remote.digest()
    assert again.digest() == before
    assert open_source("memory://batch/rows/b*.jsonl").shards == ["b.jsonl"]
    assert [row.data for row in open_source("memory://batch/rows/a.jsonl").all_rows()] == [
        row.data for row in local.rows(0)
    ]
    bucket.pipe_file("/batch/rows/a.jsonl", b'{"prompt": "another"}')
    assert open_source("memory://batch/rows").digest() != before
    for url, words in (("memory://batch/none", "cannot be read"), ("strange://x/y", "cannot be opened")):
        with pytest.raises((DataError, UsageError), match=words):
            open_source(url)


@pytest.mark.parametrize("as_parquet", [False, True])
def test_answers_go_to_an_object_store(bucket, as_parquet):
    if as_parquet:
        pytest.importorskip("pyarrow")
    out, pieces = "memory://batch/out", [Piece(0, 1, 0, 2), Piece(0, 3, 40, 1)]
    parts = pickle.loads(pickle.dumps(Parts.open(out, SETTINGS, as_parquet=as_parquet, overwrite=False)))
    assert parts.missing(pieces) == pieces
    parts.write(pieces[0], iter([{"id": 1, "text": " a"}, {"id": 2, "error": "line 2: no"}]))
    assert parts.count_failed(pieces[0]) == 1
    resumed = Parts.open(out, SETTINGS, as_parquet=as_parquet, overwrite=False)
    assert resumed.missing(pieces) == pieces[1:]
    with pytest.raises(UsageError, match="other settings"):
        Parts.open(out, {**SETTINGS, "--seed": 7}, as_parquet=as_parquet, overwrite=False)
    assert Parts.open(out, SETTINGS, as_parquet=as_parquet, overwrite=True).missing(pieces) == pieces
    bucket.pipe_file("/batch/other/file", b"")
    with pytest.raises(OutputExistsError, match="holds no answers"):
        Parts.open("memory://batch/other", SETTINGS, as_parquet=as_parquet, overwrite=True)


def test_one_process_writes_to_no_object_store(folder, vlm):
    found = vlm("batch", folder / "a.jsonl", "--output", "memory://batch/out.jsonl")
    assert found.exit_code == 2 and "only --engine ray writes to an object store" in found.stderr
