"""Show text from files without its power: over a terminal, or over a page of Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

__all__ = ["count_of", "escape_controls", "escape_json_controls", "markdown_code", "markdown_text"]

#: Characters on which a terminal acts: the controls C0, DEL and C1, the separators of lines and paragraphs, and the
#: format characters of Unicode that reorder, hide or annotate the text around them.
CONTROLS = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\U000e0001\U000e0020-\U000e007f"
_CONTROL = re.compile(f"[{CONTROLS}]")
_CONTROL_IN_JSON = re.compile(f"(?!\n)[{CONTROLS}]")  # line ends between values stay

#: Characters that mean nothing in Markdown. A dot does: GitHub makes a link of www.example.org.
_PLAIN = re.compile(r"(?i)(?<=www)\.|[^\w .-]")
_PLAIN_CODE = re.compile(r"[\w ./:@+,=()-]+")


def count_of(number: int, noun: str) -> str:
    """Write a number of things.

    >>> count_of(1, "new token"), count_of(2000, "row")
    ('1 new token', '2,000 rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def escape_controls(text: str, keep: str = "") -> str:
    r"""Replace each control character by its escape in Python's spelling.

    >>> escape_controls("a\x1b[31m\tb\u202e")
    'a\\x1b[31m\\tb\\u202e'

    Args:
        text: any text.
        keep: control characters that stay, such as the line end of a text that may have lines.
    """
    return _replace(_CONTROL, text, lambda c: c if c in keep else c.encode("unicode_escape").decode("ascii"))


def escape_json_controls(text: str) -> str:
    r"""Replace the control characters in JSON by escapes of JSON, so that it still holds the same data.

    >>> escape_json_controls('"\x9b"')
    '"\\u009b"'
    """
    return _replace(_CONTROL_IN_JSON, text, lambda c: json.dumps(c)[1:-1])


def markdown_text(text: str) -> str:
    """Write text for a heading or a table of Markdown, where it shows as it is and formats nothing.

    >>> markdown_text("my-model [a](b)")
    'my-model &#91;a&#93;&#40;b&#41;'
    """
    return _replace(_PLAIN, escape_controls(text), _entity)


def markdown_code(text: str) -> str:
    """Write text as code of Markdown, also inside a table.

    >>> markdown_code("ViT-B-32"), markdown_code("a|b")
    ('`ViT-B-32`', '<code>a&#124;b</code>')
    """
    return f"`{text}`" if _PLAIN_CODE.fullmatch(text) else f"<code>{markdown_text(text)}</code>"


def _entity(character: str) -> str:
    return f"&#{ord(character)};"


def _replace(pattern: re.Pattern[str], text: str, spell: Callable[[str], str]) -> str:
    return pattern.sub(lambda found: spell(found[0]), text)
