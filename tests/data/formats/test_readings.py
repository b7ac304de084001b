"""Rows of other projects say to vlm what they say to the training code of these projects."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from tests.support.other_formats import (
    flatten,
    random_conversation,
    random_messages,
    random_texts,
    read_conversation_slowly,
    read_messages_slowly,
    read_texts_slowly,
)
from vlm_cli.data.formats import recognise

ROWS = 400


@pytest.mark.parametrize(
    ("make", "read", "change"),
    [
        (random_conversation, read_conversation_slowly, {"moves": False}),
        (random_conversation, read_conversation_slowly, {"skips": False}),
        (random_texts, read_texts_slowly, {"first": False}),
        (random_messages, read_messages_slowly, {"in_order": False}),
    ],
)
def test_rows_are_read_as_their_projects_read_them(
    make: Callable[[Random], dict[str, Any]], read: Callable[..., Any], change: dict[str, bool]
) -> None:
    rows = [make(Random(seed)) for seed in range(ROWS)]
    found = [flatten(recognise(row).read(row)) for row in rows]
    assert found == [read(row) for row in rows]
    assert found != [read(row, **change) for row in rows]  # the comparison notices another reading
