"""JSON lines and JSON arrays as sources: their rows, where reading goes on, and what is told of bad ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from vlm_cli.data.records import read_records
from vlm_cli.data.sources import json_array, open_source

ROWS = [{"prompt": f'Ünt {i} [,] \\" }}', "completion": " x", "list": [[1.5, None], {"a": i}]} for i in range(7)]


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize(("indent", "ascii"), [(None, True), (1, False)])
def test_an_array_gives_the_objects_that_json_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, indent: int | None, ascii: bool
) -> None:
    monkeypatch.setattr(json_array, "_STEP", step)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=indent, ensure_ascii=ascii) + "\n", encoding="utf-8")
    source = open_source(str(path))
    assert (source.kind, list(source.shards), source.folder) == ("JSON array", ["a.json"], tmp_path)
    rows = list(source.rows(0))
    assert [row.data for row in rows] == ROWS
    assert rows[6].place == "element 7 of a.json"
    assert list(source.rows(0, start=5)) == rows[5:]
    begins = [row.begin for row in rows]
    assert None not in begins and begins == sorted(set(begins))
    for start in range(1, 7):
        assert list(source.rows(0, start, known=(start, begins[start - 1]))) == rows[start:]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "good", "words"),
    [
        (b'[{"a": 1}, 7, {"a": 2}]', 2, "expected an object, {…}, got a number"),
        (b'[{"a": 1}, {"a": 2', 1, "not JSON: Expecting ',' delimiter at character 8 of the element. Nothing behind"),
        (b'[{"a": 1}, {"a: 2}]', 1, "Unterminated string"),
        (b'[{"a": 1}', 1, "']' is expected, and the file ends. Is it cut short?"),
        (b'[{"a": 1} {"a": 2}]', 1, "']' is expected, got '{'"),
        (b'[{"a": 1}] x', 1, "'x' stands behind the end of the array"),
        (b'[{"a": 1}, {"a": "\xff"}]', 0, "not UTF-8 text: it has the byte 0xff"),
        (b'[{"a": 1}, ' + b"[" * 100_000, 1, "nested too deeply"),
        (b'[{"a": 1}, {"b": 1' + b"0" * 5000 + b"}]", 1, "not JSON: Exceeds the limit"),
    ],
)
def test_a_bad_array_is_read_as_far_as_possible(tmp_path: Path, raw: bytes, good: int, words: str) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    rows = list(open_source(str(tmp_path / "a.json")).all_rows())
    assert len([row for row in rows if row.problem is None]) == good
    (problem,) = [row.problem for row in rows if row.problem is not None]
    assert words in problem


def test_an_element_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "JSON_BYTES", 50)
    monkeypatch.setattr(json_array, "_STEP", 16)
    (tmp_path / "a.json").write_text(json.dumps([{"a": 1}, {"a": "x" * 1000}]))
    rows = list(open_source(str(tmp_path / "a.json")).all_rows())
    assert rows[0].problem is None
    assert "it is larger than 50 characters" in (rows[1].problem or "")


def test_lines_go_on_behind_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(['{"a": 1}', "", "[]", '{"a": 2}']))
    source = open_source(str(path))
    assert [(row.number, row.data, row.problem is None) for row in source.rows(0)] == [
        (1, {"a": 1}, True),
        (3, {}, False),
        (4, {"a": 2}, True),
    ]
    assert [row.number for row in source.rows(0, start=3)] == [4]
    assert source.digest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_array_makes_records(folder: Path) -> None:
    lines: list[Any] = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    (folder / "train.json").write_text(json.dumps(lines))
    found, expected = read_records(folder / "train.json"), read_records(folder / "train.jsonl")
    assert [record.segments for record in found.good] == [record.segments for record in expected.good]
    assert (found.good[3].place, expected.good[3].place) == ("element 4 of train.json", "line 4 of train.jsonl")
