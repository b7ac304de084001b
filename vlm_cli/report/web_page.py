"""What the web pages of vlm have in common: one file that needs no other, and that runs nothing from a record."""

from __future__ import annotations

import base64
import hashlib
import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["data_uri", "page_head", "page_text"]

_STYLE = (Path(__file__).parent / "web_page.css").read_text(encoding="utf-8")

#: Control characters, which HTML cannot hold, and the symbols that stand for them: ␀ for NUL.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


def page_head(title: str, style: str, script: str = "", *, reload_seconds: int | None = None) -> str:
    """Return the start of a page, up to its heading.

    Args:
        title: of the page.
        style: its CSS, beside what all pages have in common.
        script: the only script that it may run.
        reload_seconds: after which a browser reads the page again; None for a page that does not change.
    """
    # The policy forbids the page to fetch anything and to run any other script, whatever a record says.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        policy += f"; script-src 'sha256-{digest}'"
    reload = "" if reload_seconds is None else f'<meta http-equiv="refresh" content="{reload_seconds}">\n'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{reload}<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{page_text(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<h1>{page_text(title)}</h1>
"""


def page_text(text: str) -> str:
    """Turn text into HTML that shows it.

    >>> page_text("<b>\\0")
    '&lt;b&gt;␀'
    """
    return escape(text.translate(_CONTROLS))


def data_uri(image: Image, most_pixels: int, *, quality: int = 90) -> str:
    """Return a picture as an address that holds it.

    Args:
        image: the picture, which is made smaller in place.
        most_pixels: of its longer side.
        quality: of the JPEG, up to 100.
    """
    image.thumbnail((most_pixels, most_pixels))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
