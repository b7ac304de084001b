"""A model card shows the names of models, parts and folders, and no name formats the card."""

from __future__ import annotations

import re
import shlex
from types import SimpleNamespace
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from vlm_cli.printable import CONTROLS, escape_controls, markdown_code, markdown_text
from vlm_cli.report.card import model_card
from vlm_cli.report.parameters import ParameterReport, ParameterRow

HOSTILE = [
    "<script>alert(1)</script>",
    "a\n# Heading\n",
    "a\r\n\r\n---\nlayout: evil",
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "<https://evil.example>",
    "a | b",
    "`</code>`<b>x",
    "``` \n# x\n```",
    "a\\|b",
    "&lt;script&gt;",
    "**bold** ~~gone~~ $x$ :tada: @somebody #1",
    "\x1b[31mred\x9b\u202e",
    '"; rm -rf ~ #',
]


def card(name: str) -> str:
    """The card of a model all of whose names are `name`."""
    part = SimpleNamespace(name=name, pretrained=name, type=name)
    composition = SimpleNamespace(vision_encoder=part, vision_tokenizer=part, fusion=part, language_model=part)
    row = ParameterRow(name, 1, 10, 4, 6, 1.0, 40)
    model: Any = SimpleNamespace(config=SimpleNamespace(composition=composition))
    return model_card(model, name, parameters=ParameterReport([row], row, "float32"))


def tokens(text: str) -> list[Token]:
    """What GitHub reads in a card: blocks, and the inline tokens of each."""
    body = text.split("---\n", 2)[2]
    blocks = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    return [x for block in blocks for x in (block, *(block.children or ()))]


def kinds(name: str) -> list[str]:
    """The kinds of a card's tokens, apart from text and the code in cells."""
    written = [x.type for x in tokens(card(name)) if x.content not in ("<code>", "</code>")]
    return [kind for kind in written if kind not in ("text", "text_special", "code_inline")]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_formats_nothing(name: str) -> None:
    text = card(name)
    assert kinds(name) == kinds("my-model")
    assert not re.search(f"[{CONTROLS}]", text.replace("\n", ""))
    assert not re.search(r"https?://|www\.|@s", text.split("```")[0])  # GitHub makes links of these
    shown = "".join(x.content for x in tokens(text) if x.type in ("text", "text_special"))
    assert escape_controls(name) in shown


def test_a_name_stays_one_word_of_the_command() -> None:
    for name in HOSTILE:
        [line] = [x for x in card(name).splitlines() if x.startswith("vlm generate")]
        assert len(shlex.split(line)) == 5


def test_plain_names_are_written_plainly() -> None:
    text = card("my-flamingo_2.0")
    assert "\n# my-flamingo_2.0\n" in text and "| `my-flamingo_2.0` |" in text and "--model my-flamingo_2.0 " in text
    assert markdown_code("hf-hub:timm/ViT-B-16") == "`hf-hub:timm/ViT-B-16`"
    assert markdown_text("Modèle 漢字") == "Modèle 漢字"


def test_an_unescaped_card_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_cli.report.card.markdown_text", lambda name: name)
    monkeypatch.setattr("vlm_cli.report.card.markdown_code", lambda name: f"`{name}`")
    assert all(kinds(name) != kinds("my-model") for name in ("[a](b)", "<b>x", "a\n# b"))
