"""Records: what can be read, and what each bad line is told."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from tests.support.training import write
from vlm_cli.data.records import raise_problems, read_records
from vlm_cli.errors import DataError
from vlm_cli.prompt import Medium, Text

RED = Medium("red.png")
BLUE = Medium("blue.png")


def read(folder: Path, *lines: Any) -> Any:
    return read_records(write(folder / "records.jsonl", lines))


def problem(folder: Path, line: Any) -> str:
    """What is said of one bad line."""
    records = read(folder, line)
    assert not records.good
    return records.problems[0].message


@pytest.mark.parametrize(
    ("line", "segments"),
    [
        (
            {"prompt": "<image:red.png>Caption:", "completion": " red"},
            [(RED, Text("Caption:")), (Text(" red"),)],
        ),
        (
            {"prompt": "<image>and<image:blue.png>", "completion": "both", "images": ["red.png"]},
            [(RED, Text("and"), BLUE), (Text("both"),)],
        ),
        ({"prompt": "It:", "completion": " red", "images": ["red.png"]}, [(RED, Text("It:")), (Text(" red"),)]),
        ({"prompt": "", "completion": "red", "images": ["red.png", "blue.png"]}, [(RED, BLUE), (Text("red"),)]),
        (
            {
                "prompt": "<image>",
                "turns": [{"prompt": "a", "completion": "b"}, {"prompt": "c<image>", "completion": "d"}],
                "images": ["red.png", "blue.png"],
            },
            [(RED, Text("a")), (Text("b"),), (Text("c"), BLUE), (Text("d"),)],
        ),
        (
            {"text": "See <image:red.png> this and <image:blue.png> that."},
            [(Text("See "), RED), (Text(" this and "), BLUE, Text(" that."))],
        ),
        ({"prompt": r"<image:red.png>\<image>", "completion": "x"}, [(RED, Text("<image>")), (Text("x"),)]),
        ({"prompt": "<image:red.png>", "completion": r"\<image>"}, [(RED,), (Text("<image>"),)]),
        ({"prompt": "<image:red.png>", "completion": "x", "source": "elsewhere"}, [(RED,), (Text("x"),)]),
        ({"prompt": "Two and two?", "completion": " Four."}, [(Text("Two and two?"),), (Text(" Four."),)]),
        ({"text": "Words."}, [(), (Text("Words."),)]),
    ],
)  # fmt: skip
def test_records_are_read(folder: Path, line: dict[str, Any], segments: list[tuple[Any, ...]]) -> None:
    (record,) = read(folder, line).good
    assert [segment.parts for segment in record.segments] == segments
    assert [segment.is_target for segment in record.segments] == [False, True] * (len(segments) // 2)
    assert record.sources == tuple(p for parts in segments for p in parts if isinstance(p, Medium))


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "line 1"), ({"id": "a"}, "a"), ({"id": 7, "kind": "caption"}, "7")]
)
def test_records_have_names(folder: Path, given: dict[str, Any], expected: str) -> None:
    (record,) = read(folder, {"text": "<image:red.png>red", **given}).good
    assert (record.id, record.kind) == (expected, given.get("kind"))


GOOD = {"prompt": "<image:red.png>", "completion": "x"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([], "expected an object, {…}, got a list"),
        (7, "got a number"),
        ({}, 'neither "prompt" nor "text"'),
        ({"promt": "<image:red.png>", "completion": "x"}, "neither \"prompt\" nor \"text\". Did you mean 'prompt'?"),
        ({"prompt": "<image:red.png>"}, 'has no "completion"'),
        ({"prompt": "<image:red.png>", "completions": "x"}, "has no \"completion\". Did you mean 'completions'?"),
        (GOOD | {"text": "x"}, 'both "text" and "prompt"'),
        (GOOD | {"turns": []}, 'both "completion" and "turns"'),
        ({"prompt": ["<image:red.png>"], "completion": "x"}, '"prompt" must be text, got a list'),
        ({"prompt": "<image:red.png>", "completion": 3}, '"completion" must be text, got a number'),
        ({"prompt": "<image:red.png>", "completion": None}, '"completion" must be text, got null'),
        (GOOD | {"id": True}, '"id" must be text or a number, got true or false'),
        (GOOD | {"kind": 3}, '"kind" must be text, got a number'),
        (GOOD | {"images": "red.png"}, '"images" must be a list of files, got text'),
        (GOOD | {"images": [3]}, '"images" must be a list of files, got 3 in it'),
        ({"prompt": "<image:red.png>", "completion": " \n"}, "is empty, got ' \\n'"),
        ({"prompt": "<image:red.png>", "turns": []}, '"turns" is empty'),
        ({"prompt": "<image:red.png>", "turns": ["x"]}, "turn 1 must be an object, got text"),
        ({"prompt": "<image:red.png>", "turns": [{"prompt": "x", "completion": ""}]}, 'turn 1: "completion" is empty'),
        ({"text": "Words. <image:red.png> "}, "ends with its images: the model would have nothing to learn"),
        ({"text": " "}, "is empty: the model would have nothing to learn"),
        ({"prompt": "a", "completion": "x", "image": "red.png"}, '"image" is not read. Give pictures as a list: '),
        ({"prompt": "a", "turns": [{"prompt": "b", "completion": "c", "images": ["red.png"]}]},
         'turn 1: "images" is not read. Give pictures beside "turns" as a list'),
        ({"prompt": "<Video:a.mp4>", "completion": "x"}, '"prompt": <Video:…> at character 1 is no placeholder'),
        ({"prompt": "<video:a.mp4>", "completion": "x"}, "cannot find 'a.mp4'"),
        ({"prompt": "<video:red.png?fps=0>", "completion": "x"}, "fps expects frames for each second"),
        ({"prompt": "<video>", "completion": "x"}, 'has 1 bare <video> placeholder, but 0 files in "videos"'),
        ({"prompt": "a", "videos": "red.png", "completion": "x"}, '"videos" must be a list of files'),
        ({"prompt": "<image>", "completion": "x"}, "1 bare <image> placeholder, but 0 files"),
        (GOOD | {"prompt": "<image><image>", "images": ["red.png"]}, "2 bare <image> placeholders, but 1 file in"),
        (GOOD | {"images": ["blue.png"]}, "0 bare <image> placeholders, but 1 file"),
        ({"prompt": "<image:red.png", "completion": "x"}, '"prompt": the placeholder at character 1 is not closed'),
        ({"prompt": "a", "completion": "<image:red.png>"}, '"completion" has a placeholder'),
        ({"prompt": "<image:rde.png>", "completion": "x"}, "cannot find 'rde.png': there is no 'rde.png' in"),
        ({"prompt": "<image:train.jsonl>", "completion": "x"}, "is not an image that Pillow can read"),
        ({"prompt": "<image:.>", "completion": "x"}, "is a directory"),
        ({"prompt": "<image:->", "completion": "x"}, "'stdin' is no file"),
        ({"prompt": "<image:https://x.org/a.png>", "completion": "x"}, "Download it first"),
        ({"prompt": "<image:data:image/png;base64,AAAA>", "completion": "x"}, "is not an image that Pillow can read"),
    ],
)  # fmt: skip
def test_a_message_says_why_a_line_is_bad(folder: Path, line: Any, words: str) -> None:
    assert words in problem(folder, line)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"prompt": "<image:red.png>", }', "not JSON: Illegal trailing comma before end of object at character 30"),
        (b'{"prompt": "\xff"}', "not UTF-8 text: byte 13 is 0xff"),
        (b"[" * 100_000, "not a record: it is nested too deeply"),
    ],
)
def test_lines_that_are_not_json(folder: Path, raw: bytes, words: str) -> None:
    path = folder / "raw.jsonl"
    path.write_bytes(raw + b"\n")
    found = read_records(path).problems[0].message
    assert words in found or found.startswith("not JSON")  # the parser's words change with Python


def test_every_bad_line_is_listed_at_once(folder: Path) -> None:
    lines = [GOOD, *([{"text": ""}] * 25), GOOD]
    records = read(folder, *lines)
    assert len(records.good) == 2
    with pytest.raises(DataError) as error:
        raise_problems(records)
    message = str(error.value)
    assert message.startswith("25 of the 27 records in ")
    assert [f"line {n}:" in message for n in (1, 2, 21, 22)] == [False, True, True, False]
    assert "… and 5 more: lines 22, 23, 24, 25, 26" in message


def test_blank_lines_and_a_byte_order_mark_are_no_records(folder: Path) -> None:
    path = folder / "blank.jsonl"
    path.write_text("\ufeff" + json.dumps(GOOD) + "\n\n \n" + json.dumps(GOOD))
    assert [record.line for record in read_records(path).good] == [1, 4]


@pytest.mark.parametrize(
    ("name", "words"),
    [("trian.jsonl", "Did you mean 'train.jsonl'?"), ("empty.jsonl", "holds no records")],
)
def test_files_that_hold_no_records(folder: Path, name: str, words: str) -> None:
    (folder / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError) as error:
        read_records(folder / name)
    assert words in str(error.value)


def test_images_are_found_from_the_file_and_in_the_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    data = base64.b64encode((folder / "red.png").read_bytes()).decode()
    sources = ("red.png", str(folder / "blue.png"), f"data:image/png;base64,{data}", (folder / "red.png").as_uri())
    assert len(read(folder, *({"text": f"<image:{s}>x"} for s in sources)).good) == len(sources)


def test_pixels_are_not_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert len(read_records(folder / "train.jsonl").good) == 24
    with pytest.raises(AssertionError), Image.open(folder / "red.png") as image:
        image.load()
