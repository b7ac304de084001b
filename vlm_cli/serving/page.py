"""The page at `/`: one file that needs no other, and may run no script but its own."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from html import escape
from pathlib import Path

__all__ = ["read_page"]

_FILES = Path(__file__).parent


@cache
def read_page(model: str, *, needs_key: bool, new_tokens: int, temperature: float) -> tuple[str, str]:
    """Return the page, and the policy that its answer has to name.

    Args:
        model: name of the model.
        needs_key: whether requests need an API key, for which the page then asks.
        new_tokens: of an answer, until someone asks for another number.
        temperature: in the same way.
    """
    page, style, script = ((_FILES / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    page = page.replace("{key}", "" if needs_key else "hidden").replace("{temperature}", f"{temperature:g}")
    page = page.replace("{new_tokens}", str(new_tokens)).replace("{model}", escape(model))
    page = page.replace("/* style */", style).replace("/* script */", script)
    sources = (f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'" for x in (style, script))
    of_style, of_script = sources
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; media-src data:; "
        f"style-src {of_style}; script-src {of_script}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
