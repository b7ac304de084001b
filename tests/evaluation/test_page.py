"""The page of answers: nothing in a record becomes markup, and nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from tests.support import ROOT
from tests.support.questions import Write
from vlm_cli.data.record import Record
from vlm_cli.evaluation.answers import GradedAnswer, make_sample
from vlm_cli.evaluation.items import Item, read_items
from vlm_cli.evaluation.metrics import METRICS
from vlm_cli.evaluation.page import MAX_PIXELS, Column, write_page
from vlm_cli.evaluation.scores import Marks
from vlm_cli.media import MediaLoader

EVIL = "<script>alert('&')</script>\"><img src=http://x onerror=y>\0"
VOID = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """What a browser makes of a page: well-formed, or it fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cards: list[str] = []
        self.script = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self.cards.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "article" in self.open:
            self.cards[-1] += data
        if "script" in self.open:
            self.script += data


def page(answers: list[GradedAnswer], folder: Path) -> Page:
    return Page(written(EVIL, {"model": EVIL}, answers, folder))


def written(title: str, facts: dict[str, str], answers: list[GradedAnswer], folder: Path, metric: str = "exact") -> str:
    metrics = [METRICS[metric]]
    marks = Marks([make_sample(a.item, a.text) for a in answers], [a.item.kind for a in answers], metrics)
    graded = [replace(a, marks=own) for a, own in zip(answers, marks.of_items(), strict=True)]
    file = io.StringIO()
    column = Column("", marks.by_kind(), marks.total(), graded)
    write_page(file, title, facts, metrics, [column], MediaLoader(folder))
    return file.getvalue()


def answers_of(write: Write, *records: dict[str, str]) -> list[GradedAnswer]:
    items, _ = read_items(write(list(records)))
    return [GradedAnswer(item, item.expected if item.id.startswith("right") else EVIL, True) for item in items]


def test_records_cannot_write_markup(folder: Path, write: Write) -> None:
    (folder / "<b>&.png").write_bytes((folder / "red.png").read_bytes())
    record = {"id": EVIL, "kind": EVIL, "prompt": rf"<image:<b\>&.png>{EVIL}", "completion": f" {EVIL} or not"}
    found = page(answers_of(write, record), folder)
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"link", "iframe", "object", "b"}
    assert [tag for tag, _ in found.tags].count("script") == 1  # the page's own
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert found.cards[0].count("<script>alert('&')</script>") == 5  # kind, id, prompt, expected, answer
    assert found.cards[0].count("\N{SYMBOL FOR NULL}") == 5
    [image] = [attributes for tag, attributes in found.tags if tag == "img"]
    assert image["alt"] == "<b>&.png"


def test_nothing_is_fetched(folder: Path, write: Write) -> None:
    found = page(answers_of(write, {"prompt": "<image:red.png>", "completion": "x"}), folder)
    links = [value for _, attributes in found.tags for key, value in attributes.items() if key in ("src", "href")]
    assert len(links) == 1 and links[0].startswith("data:image/jpeg;base64,")
    [policy] = [a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    own = base64.b64encode(hashlib.sha256(found.script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{own}'"
    assert found.script == (ROOT / "vlm_cli/evaluation/page.js").read_text("utf-8")


def test_wrong_answers_come_first(folder: Path, write: Write) -> None:
    names = ["right 1", "wrong 1", "right 2", "wrong 2"]
    found = page(answers_of(write, *({"id": x, "prompt": "<image:red.png>", "completion": "x"} for x in names)), folder)
    order = [next(x for x in names if x in card) for card in found.cards]
    assert order == ["wrong 1", "wrong 2", "right 1", "right 2"]
    assert ["✗ wrong" in card for card in found.cards] == [True, True, False, False]


def test_pictures_stand_where_the_prompt_has_them(folder: Path, write: Write) -> None:
    Image.new("RGB", (1000, 500), "red").save(folder / "large.png")
    answers = answers_of(write, {"prompt": "<image:large.png> one.<image:blue.png> two.", "completion": "x"})
    found = page(answers, folder)
    images = [a["src"] or "" for tag, a in found.tags if tag == "img"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(x.partition(",")[2]))).size for x in images]
    assert sizes == [(MAX_PIXELS, MAX_PIXELS // 2), (40, 40)]
    kinds = [tag for tag, a in found.tags if tag == "img" or (tag == "span" and a.get("class") == "text")]
    assert kinds == ["img", "span", "img", "span"]


def test_cards_can_be_filtered(folder: Path, write: Write) -> None:
    """The script compares `data-kind` with the chosen option, and the class with "right"; it searches the text."""
    records = [{"kind": kind, "prompt": "<image:red.png>", "completion": "x"} for kind in ("b", EVIL, "b")]
    records.append({"prompt": "<image:red.png>", "completion": "x"})
    found = page(answers_of(write, *records), folder)
    options = [a["value"] for tag, a in found.tags if tag == "option"]
    assert options == ["", "0", "1", "2", "", "wrong", "right"]
    kinds = [a["data-kind"] for tag, a in found.tags if tag == "article"]
    assert sorted(map(str, kinds)) == ["0", "1", "1", "2"]
    assert [tag for tag, _ in found.tags].count("input") == 1


def test_pictures_are_made_when_they_are_seen(folder: Path, write: Write) -> None:
    """A browser leaves the content of a template alone."""
    found = page(answers_of(write, *[{"prompt": "<image:red.png>", "completion": "x"}] * 3), folder)
    order = [tag for tag, _ in found.tags if tag in ("template", "img")]
    assert order == ["template", "img"] * 3


def test_a_picture_that_is_gone(folder: Path, write: Write) -> None:
    (folder / "gone.png").write_bytes((folder / "red.png").read_bytes())
    answers = answers_of(write, {"prompt": "<image:gone.png>", "completion": "x"})
    (folder / "gone.png").unlink()
    assert "(cannot be read: gone.png)" in page(answers, folder).cards[0]


def test_a_picture_that_became_another_file_does_not_show_it(folder: Path, write: Write) -> None:
    (folder / "gone.png").write_bytes((folder / "red.png").read_bytes())
    answers = answers_of(write, {"prompt": "<image:gone.png>", "completion": "x"})
    (folder / "gone.png").write_text("root:x:0:0:root:/root:/bin/bash")
    found = written("title", {}, answers, folder)
    assert "(cannot be read: gone.png)" in found and "root:" not in found


def test_table(folder: Path) -> None:
    answers = [
        GradedAnswer(
            Item(line=1, id="1", kind=kind, prompt=(), expected="a", record=Record(1, "1", kind, ())), text, True
        )
        for kind, text in (("b", "a"), ("a", "x"), ("b", "x"))
    ]
    found = written("t", {}, answers, folder)
    rows = re.findall(r"<tr><td>(.+?)</td><td>(.+?)</td><td>(.+?)</td><td>(.+?)</td>", found)
    assert rows == [("a", "1", "exact", "0.0 %"), ("b", "2", "exact", "50.0 %"), ("total", "3", "exact", "33.3 %")]
