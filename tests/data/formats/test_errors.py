"""What is said of rows of each format that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_cli.data.formats import ColumnMap, recognise
from vlm_cli.data.jsonl import RecordError
from vlm_cli.errors import UsageError

ASKS = {"from": "human", "value": "<image>\nWhat?"}
TELLS = {"from": "gpt", "value": "A cat."}
LLAVA = {"image": "a.png", "conversations": [ASKS, TELLS]}
USER = {"role": "user", "content": "What?"}
ASSISTANT = {"role": "assistant", "content": "A cat."}
CHAT = {"messages": [USER, ASSISTANT], "images": ["a.png"]}
PAIRS = {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A cat."}]}


def said(**parts: Any) -> dict[str, Any]:
    """A row of messages whose user says this part."""
    return {"messages": [{"role": "user", "content": [parts]}, ASSISTANT]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        # pictures of another type
        (LLAVA | {"image": 7}, '"image" must hold a picture: the name of a file, a data: URI, or base64, got a number'),
        (LLAVA | {"image": ["a.png", True]}, "got true or false"),
        (LLAVA | {"image": ""}, "got an empty text"),
        (LLAVA | {"image": {"size": 3}}, 'got an object with the keys "size"'),
        (CHAT | {"images": 7}, '"images" must hold a picture'),
        (PAIRS | {"images": [[7]]}, '"images" must hold a picture'),
        (PAIRS | {"image": "b.png"}, 'has both "image" and "images"'),
        # placeholders and files
        (LLAVA | {"image": ["a.png", "b.png"]}, "has 1 placeholder <image>, but 2 pictures. Give one for each"),
        ({"conversations": [ASKS, TELLS]}, "has 1 placeholder <image>, but 0 pictures"),
        (LLAVA | {"conversations": [ASKS, {"from": "gpt", "value": "<image>"}]}, "turn 2, an answer, has <image>"),
        ({"messages": [USER | {"content": "<image>?"}, ASSISTANT]}, "0 pictures. Give one for each. To show the words"),
        (said(type="image", index=1) | {"images": ["a.png"]}, 'shows the image of "index" 1, but 1 are given'),
        (said(type="image", path="b.png") | {"images": ["a.png"]}, "has 0 placeholders <image>, but 1 picture."),
        # answers
        (LLAVA | {"conversations": [ASKS, TELLS | {"value": " \n"}]}, "turn 2, an answer, is empty"),
        (LLAVA | {"conversations": [ASKS]}, "turn 1, the last, has no answer"),
        (LLAVA | {"conversations": []}, '"conversations" is empty'),
        (LLAVA | {"conversations": [ASKS, TELLS | {"value": None}]}, 'turn 2: "value" must be text, got null'),
        (CHAT | {"messages": [USER, ASSISTANT | {"content": ""}]}, "turn 2, an answer, is empty"),
        (CHAT | {"messages": [USER, ASSISTANT | {"content": None}]}, "must be text or a list of parts, got null"),
        (CHAT | {"messages": [USER, ASSISTANT, USER]}, "turn 3, the last, has no answer"),
        (CHAT | {"messages": []}, '"messages" is empty'),
        (CHAT | {"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]}, "message 2 calls tools"),
        (CHAT | {"messages": [USER, ASSISTANT | {"weight": 0}]}, 'message 2 has the "weight" 0'),
        (PAIRS | {"texts": [{"user": "What?", "assistant": ""}]}, "turn 2, an answer, is empty"),
        (PAIRS | {"texts": [{"user": "What?"}]}, "turn 1, the last, has no answer"),
        (PAIRS | {"texts": [{"user": "What?"}, {"user": "A?", "assistant": "x"}]}, 'pair 1: "assistant" must be text'),
        (PAIRS | {"texts": [{"human": "What?", "assistant": "x"}]}, "pair 1 has no \"user\". It has: 'human', 'assist"),
        (PAIRS | {"texts": []}, '"texts" is empty'),
        # roles
        (LLAVA | {"conversations": [ASKS, TELLS, TELLS]}, "turn 3, of the assistant, follows turn 2 of the same role"),
        (LLAVA | {"conversations": [ASKS, ASKS, TELLS], "image": ["a", "b"]}, "turn 2, of the user, follows turn 1"),
        (LLAVA | {"conversations": [ASKS | {"from": "humna"}]}, "unknown role 'humna'. Did you mean 'human'? Known: "),
        (LLAVA | {"conversations": [ASKS, {"from": 3}]}, "turn 2 has the unknown role a number"),
        (CHAT | {"messages": [ASSISTANT, USER, ASSISTANT]}, "turn 1, of the assistant, is the first. Turns"),
        (CHAT | {"messages": [USER, {"role": "tool", "content": "x"}]}, "turn 2 has the unknown role 'tool'"),
        # the system
        (CHAT | {"messages": [USER, {"role": "system", "content": "x"}]}, "turn 2 is of the system, which may"),
        (CHAT | {"system": "a", "messages": [{"role": "system", "content": "x"}, USER]}, 'has a "system" beside'),
        (PAIRS | {"system": 3}, '"system" must be text, got a number'),
        # other types
        (LLAVA | {"conversations": "Hello"}, '"conversations" must be a list of turns, got text'),
        (LLAVA | {"conversations": ["Hello"]}, "turn 1 must be an object, got text"),
        (CHAT | {"messages": {}}, '"messages" must be a list, got an object'),
        (CHAT | {"messages": ["x"]}, "message 1 must be an object, got text"),
        (PAIRS | {"texts": ["x"]}, "pair 1 must be an object, got text"),
        (PAIRS | {"texts": [{"user": 3, "assistant": "x"}]}, 'pair 1: "user" must be text, got a number'),
        (said(type="audio", audio="a.wav"), "part of the unknown type 'audio'. Known: text, image,"),
        (said(type="text", text=None), 'the "text" of a part must be text, got null'),
        (said(type="image", image=3), '"image" must hold a picture'),
        ({"messages": [USER, ASSISTANT | {"content": [{"type": "image"}]}]}, "of the assistant, has a picture"),
        # which format
        (CHAT | {"text": "x"}, 'can be read as records of vlm ("prompt" with'),
        (CHAT | {"text": "x"}, "--columns messages=messages"),
        ({"question": "x"}, "--columns prompt=COLUMN,completion=COLUMN,images=COLUMN"),
    ],
)  # fmt: skip
def test_bad_rows_are_explained(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RecordError) as raised:
        recognise(row).read(row)
    assert words in str(raised.value)


TABLE = {"question": "What?", "answer": "A cat.", "image": "a.png", "answers": ["A cat.", "Cat."], "n": 3}


@pytest.mark.parametrize(
    ("columns", "row", "words"),
    [
        ("prompt=questoin,completion=answer", TABLE, "no column \"questoin\". Did you mean 'question'? It has: "),
        ("prompt=question,completion=answer", TABLE, 'in "image", which --columns does not name. Add images='),
        ("completion=answers,images=image", TABLE, 'must be text or a number, got a list. Name one of them: '),
        ("completion=answers.2,images=image", TABLE, 'has no column "answers.2"'),
        ("completion=answer,images=n", TABLE, '"images" must hold a picture'),
        ("completion=answer,images=image", TABLE | {"answer": " "}, '"answer" is empty'),
        ("prompt=question,completion=answer,images=image", TABLE | {"question": "<image><image>"}, "has 2 placeh"),
        ("messages=answer", TABLE | {"image": None}, '"answer" must be a list, got text'),
    ],
)  # fmt: skip
def test_bad_rows_of_a_table_are_explained(columns: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(RecordError) as raised:
        ColumnMap.parse(columns).read(row)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("question", "expects NAME=COLUMN, got 'question'. Write, for instance, --columns prompt=question"),
        ("prompt=", "expects NAME=COLUMN"),
        ("promt=question,completion=a", "unknown name 'promt'. Did you mean 'prompt'? Known: prompt, completion,"),
        ("completion=a,completion=b", "names 'completion' twice: 'a' and 'b'"),
        ("prompt=question", "must name the answer"),
        ("messages=a,completion=b", "must name the answer"),
    ],
)
def test_column_maps_are_checked(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        ColumnMap.parse(text)
    assert words in str(raised.value)
