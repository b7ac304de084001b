"""Files of other projects as records: what is opened, what is text, and what is said of files that cannot be read."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import write
from vlm_cli.data.formats import ColumnMap, recognise
from vlm_cli.data.record import Content
from vlm_cli.data.records import Reading, Records, read_records
from vlm_cli.data.sources.base import Embedded
from vlm_cli.prompt import Medium, Text

RED, BLUE = Medium("red.png"), Medium("blue.png")


def read(folder: Path, *rows: Any) -> Records:
    return read_records(write(folder / "rows.jsonl", rows))


def conversation(question: str, answer: str = "Red.", **others: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **others}


def chat(content: Any, answer: str = "Red.", **others: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **others}


def texts(question: Any, answer: str = "Red.", **others: Any) -> dict[str, Any]:
    return {"texts": [{"user": question, "assistant": answer}], **others}


@pytest.mark.parametrize(
    ("row", "context"),
    [
        (conversation("<image>\nWhat?", image="red.png"), (RED, Text("\nWhat?"))),
        (conversation("What? <image> ", image="red.png"), (RED, Text("\nWhat?"))),
        (conversation("a <image> b <image>", image=["red.png", "blue.png"]), (Text("a "), RED, Text(" b "), BLUE)),
        (conversation("What?", image="red.png"), (RED, Text("What?"))),
        (conversation("What?"), (Text("What?"),)),
        (conversation("What?", image=None), (Text("What?"),)),
        (conversation("<image:red.png> <video> \\<Image:x", images=["blue.png"]),
         (BLUE, Text("<image:red.png> <video> \\<Image:x"))),
        (chat("<image>What?", images=["red.png"]), (RED, Text("What?"))),
        (chat("What?", image="red.png"), (RED, Text("What?"))),
        (chat([{"type": "text", "text": "<image>"}, {"type": "image"}], images=["red.png"]), (Text("<image>"), RED)),
        (chat([{"type": "image", "url": "red.png"}, {"type": "text", "text": "?"}]), (RED, Text("?"))),
        (chat([{"type": "image_url", "image_url": "red.png"}]), (RED,)),
        (chat([{"type": "input_image", "image_url": "red.png", "detail": "low"}]), (RED,)),
        (chat([{"type": "image", "text": None, "index": 1}, {"type": "image", "index": 0, "text": None}],
              images=[{"bytes": None, "path": "red.png"}, "blue.png"]), (BLUE, RED)),
        ({"prompt": [{"role": "user", "content": "What?"}], "completion": [{"role": "assistant", "content": "Red."}],
          "images": ["red.png"]}, (RED, Text("What?"))),
        (texts("What?", images=["red.png", "blue.png"]), (RED, BLUE, Text("What?"))),
        (texts("<image>What?", images=["red.png"]), (RED, Text("<image>What?"))),
        (texts(None, images=["red.png"]), (RED,)),
    ],
)  # fmt: skip
def test_pictures_stand_where_the_format_puts_them(folder: Path, row: dict[str, Any], context: tuple[Any, ...]) -> None:
    records = read(folder, row)
    assert records.problems == []
    (record,) = records.good
    assert [segment.parts for segment in record.segments] == [context, (Text("Red."),)]
    assert record.is_turns


MAKE = {
    "conversations": lambda picture: conversation("<image>", image=picture),
    "messages": lambda picture: chat("<image>", images=[picture]),
    "parts": lambda picture: chat([{"type": "image", "image": picture}]),
    "texts": lambda picture: texts("?", images=[picture]),
}


@pytest.mark.parametrize("name", MAKE)
def test_pictures_come_in_several_forms(folder: Path, name: str) -> None:
    make = MAKE[name]
    data = base64.b64encode((folder / "red.png").read_bytes()).decode()
    uri = f"data:image/png;base64,{data}"
    rows = [
        make(x) for x in ("red.png", (folder / "red.png").as_uri(), uri, data, {"base64": data}, {"path": "red.png"})
    ]
    records = read(folder, *rows)
    assert records.problems == []
    found = [record.sources[0].source for record in records.good]
    assert found[2:] == [uri, uri, uri, "red.png"]
    embedded = make({"bytes": Embedded("inside:a#1/image", b"x"), "path": "red.png"})
    assert Medium("inside:a#1/image") in recognise(embedded).read(embedded).segments[0].parts


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ("rde.png", "cannot find 'rde.png': there is no 'rde.png' in"),
        ("https://example.org/red.png", "is no file: records name files or data: URIs. Download it first."),
        ("-", "is no file"),
        ("data:image/png;base64,AAAA", "data:image/png"),
        ("inside:other#1/image", "inside:other#1/image"),
    ],
)
def test_pictures_that_cannot_be_read_are_named(folder: Path, name: str, picture: str, words: str) -> None:
    records = read(folder, texts("?"), MAKE[name](picture))
    (problem,) = records.problems
    assert problem.line == 2 and words in problem.message


def test_one_file_holds_rows_of_all_formats(folder: Path) -> None:
    rows = [
        {"prompt": "<image:red.png>What?", "completion": " Red.", "id": "ours"},
        conversation("What?", id=7, kind="colour"),
        chat("<image> or <image>?", images=["red.png", "blue.png"]),
        texts("What?", images=["red.png"], id=True),
    ]
    records = read(folder, *rows)
    assert [record.id for record in records.good] == ["ours", "7", "line 3", "line 4"]
    assert [record.is_turns for record in records.good] == [False, True, True, True]
    assert [len(record.sources) for record in records.good] == [1, 0, 2, 1]
    assert records.formats == {
        "records of vlm": 1,
        "LLaVA conversations": 1,
        "chat messages": 1,
        "texts of FineVision": 1,
    }


def test_a_row_that_is_not_utf8_is_told(folder: Path) -> None:
    path = folder / "latin.jsonl"
    good = json.dumps(conversation("Wieso?"), ensure_ascii=False).encode()
    path.write_bytes(good + b"\n" + good.replace(b"Wieso", b"Wer f\xe4hrt") + b"\n")
    records = read_records(path)
    assert [(problem.line, "UTF-8" in problem.message) for problem in records.problems] == [(2, True)]


def test_the_system_is_told_apart(folder: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [
        chat("What?") | {"messages": [system, *chat("What?")["messages"]]},
        chat("What?", system="Be brief."),
        conversation("What?")
        | {"conversations": [{"from": "system", "value": "Be brief."}, *conversation("?")["conversations"]]},
        texts("What?", system=""),
    ]
    assert [record.system for record in read(folder, *rows).good] == ["Be brief.", "Be brief.", "Be brief.", None]


def test_what_a_format_leaves_out_is_noted(folder: Path) -> None:
    early = conversation("What?")
    early["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    records = read(folder, early, texts("a <image>", images=["red.png"]), early)
    summary, answer, tag = records.notes
    assert summary.endswith("rows.jsonl (JSON lines, 3 rows): 2 LLaVA conversations, 1 texts of FineVision")
    assert (
        answer.startswith("Note: line 1 of rows.jsonl begins with an answer, which is left out")
        and "1 more line" in answer
    )
    assert tag.startswith("Note: line 2 of rows.jsonl has <image> in a text")


TABLE = {"question": "What?", "answer": "Red.", "image": "red.png", "answers": [{"text": "A red one."}], "n": 3}


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ("prompt=question,completion=answer,images=image", TABLE, [(RED, Text("What?")), (Text("Red."),)]),
        ("completion=answers.0.text,image=image", TABLE, [(RED,), (Text("A red one."),)]),
        ("prompt=question,completion=n,images=image,id=n", TABLE, [(RED, Text("What?")), (Text("3"),)]),
        ("prompt=question,completion=answer,images=image", TABLE | {"question": "a <image:x> <image> <video>"},
         [(Text("a <image:x> "), RED, Text(" <video>")), (Text("Red."),)]),
        ("prompt=question,completion=answer", {"question": "<image>?", "answer": "No."},
         [(Text("<image>?"),), (Text("No."),)]),
        ("completion=answer", {"answer": "Words."}, [(), (Text("Words."),)]),
        ("messages=talk,images=image", {"talk": chat("<image>")["messages"], **TABLE}, [(RED,), (Text("Red."),)]),
        ("conversations=talk", {"talk": conversation("?")["conversations"]}, [(Text("?"),), (Text("Red."),)]),
    ],
)  # fmt: skip
def test_columns_are_read_as_the_user_says(columns: str, row: dict[str, Any], expected: list[tuple[Any, ...]]) -> None:
    content: Content = ColumnMap.parse(columns).read(row)
    assert [segment.parts for segment in content.segments] == expected
    assert content.is_turns == bool(expected[0])
    assert content.id == ("3" if "id=" in columns else None)


def test_relative_paths_start_at_the_image_folder(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [conversation("<image>", image="red.png")])
    assert len(read_records(path).problems) == 1
    assert read_records(path, Reading(image_folder=folder)).problems == []
    (problem,) = read_records(path, Reading(image_folder=folder, media_root=tmp_path)).problems
    assert "leads out of the media root" in problem.message
