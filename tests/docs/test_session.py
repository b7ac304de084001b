"""The terminal that the README shows is what the commands print today."""

from __future__ import annotations

import html
import re
import runpy

from tests.support import ROOT
from tests.support.sessions import agrees

SCRIPT = runpy.run_path(str(ROOT / "docs" / "generate_session.py"))


def text_of(svg: str) -> str:
    """The lines of a terminal that rich drew, without trailing spaces."""
    lines: dict[int, str] = {}
    for number, text in re.findall(r'clip-path="url\(#session-line-(\d+)\)">(.*?)</text>', svg):
        lines[int(number)] = lines.get(int(number), "") + html.unescape(text).replace("\N{NO-BREAK SPACE}", " ")
    return "\n".join(lines[number].rstrip() for number in sorted(lines))


def test_session_is_current() -> None:
    drawn = SCRIPT["generate"]()
    assert len(drawn) == 2
    for path, svg in drawn.items():
        shown = text_of(path.read_text(encoding="utf-8"))
        assert "$ vlm generate" in shown and "a small yellow cross above a large red heart." in shown
        assert agrees(shown, text_of(svg)), "run `python docs/generate_session.py`"


def test_a_changed_line_is_noticed() -> None:
    path, svg = next(iter((path, path.read_text(encoding="utf-8")) for path in SCRIPT["IMAGES"].glob("session-*.svg")))
    assert not agrees(text_of(svg), text_of(svg.replace("red", "blue"))), path
