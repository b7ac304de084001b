"""Let a chat template take messages with pictures, as other programs send them: a list of parts, an image among them.

Most templates of language models take the content of a message as one text. A few lines before such a template turn the
parts into that text, with `<image>` for each image, as `vlm chat` does; the template itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import LanguageModelError
from vlm_cli.templates.render import render_template

__all__ = ["MESSAGE", "PLAIN", "take_pictures", "takes_text"]

#: A message with a picture, and the same message as one text.
MESSAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
_AS_TEXT = [{"role": "user", "content": f"{MEDIA_TOKEN}What is it?"}]
_AS_PART = [{"role": "user", "content": [{"type": "text", "text": f"{MEDIA_TOKEN}What is it?"}]}]

#: What `vlm chat` writes for a model without a template: an answer right behind its turn, the next turn on a new line.
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'user' and not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['content'] }}{% endfor %}"
)

_TO_TEXT = """\
{%- set flat = namespace(messages=[], parts=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] is none or message['content'] is undefined -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set flat.parts = [] -%}
{%- for part in message['content'] -%}
{%- if part is string -%}{%- set flat.parts = flat.parts + [part] -%}
{%- elif part['type'] in ['image', 'image_url'] -%}{%- set flat.parts = flat.parts + ['IMAGE'] -%}
{%- elif 'text' in part -%}{%- set flat.parts = flat.parts + [part['text']] -%}
{%- else -%}{{- raise_exception('a message may hold texts and images, and no ' + part['type']) -}}{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=CONTENT)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
""".replace("IMAGE", MEDIA_TOKEN)
_JOINED = "flat.parts | join"
_ONE_PART = "[{'type': 'text', 'text': flat.parts | join}]"


def take_pictures(template: str, special_tokens: Mapping[str, Any]) -> str:
    """Return a template that writes a message with a picture as the given template writes it with `<image>`.

    Args:
        template: of the model; `PLAIN` for a model without one.
        special_tokens: names and texts of the tokenizer's special tokens.

    Raises:
        LanguageModelError: if the template cannot write even one message.
    """
    as_text = takes_text(template, special_tokens)
    wanted = render_template(template, _AS_TEXT if as_text else _AS_PART, special_tokens)
    found = _TO_TEXT.replace("CONTENT", _JOINED if as_text else _ONE_PART) + template
    if (written := render_template(found, MESSAGE, special_tokens)) != wanted or written.count(MEDIA_TOKEN) != 1:
        raise LanguageModelError(
            f"the model's chat template writes a message with an image as {written!r}, and with the text "
            f"{MEDIA_TOKEN!r} as {wanted!r}; one {MEDIA_TOKEN} has to be in both. Give the model another template."
        )
    return found


def takes_text(template: str, special_tokens: Mapping[str, Any]) -> bool:
    """Tell whether a template takes the content of a message as a text; some want a list of parts."""
    try:
        found = render_template(template, [{"role": "user", "content": "hello"}], special_tokens)
        return "hello" in found.lower()
    except LanguageModelError:
        return False
