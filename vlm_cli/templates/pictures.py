"""Let a chat template take messages with pictures, as other programs send them: a list of parts, an image among them.

Most templates of language models take the content of a message as one text. A few lines before such a template turn the
parts into that text, with `<image>` for each image, as `vlm chat` does; the template itself stays as it is, so that
`leave_pictures_out` finds it again. A template that writes `<image>` for an image itself gets both as parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import EndlessTemplateError, LanguageModelError
from vlm_cli.templates.render import render_template

__all__ = ["MESSAGE", "PLAIN", "leave_pictures_out", "take_pictures", "takes_text"]

#: A message with a picture, and the same message as one text.
MESSAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
_AS_TEXT = [{"role": "user", "content": f"{MEDIA_TOKEN}What is it?"}]
_AS_PART = [{"role": "user", "content": [{"type": "text", "text": f"{MEDIA_TOKEN}What is it?"}]}]

#: What `vlm chat` writes for a model without a template: an answer behind its turn, another message on a new line.
PLAIN = """\
{%- set said = namespace(last='') -%}
{%- for message in messages -%}
{%- set text = message['content'] -%}
{%- if said.last and message['role'] != 'assistant' -%}{{- '\\n' -}}
{%- elif said.last and not said.last.isspace() and not text[:1].isspace() -%}{{- ' ' -}}
{%- endif -%}
{{- text -}}
{%- set said.last = text[-1:] or said.last -%}
{%- endfor -%}"""

_TO_TEXT = """\
{%- set flat = namespace(messages=[], parts=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is none or message['content'] is undefined -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set flat.parts = [] -%}
{%- for part in ([message['content']] if message['content'] is string else message['content']) -%}
{%- if part is string -%}{%- set flat.parts = flat.parts + [TEXT(part)] -%}
{%- elif part['type'] in TYPES -%}{%- set flat.parts = flat.parts + [PICTURE] -%}
{%- elif 'text' in part -%}{%- set flat.parts = flat.parts + [TEXT(part['text'])] -%}
{%- else -%}{{- raise_exception('a message may hold texts and KINDS, and no ' ~ part['type']) -}}{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=CONTENT)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
{{- '' }}"""  # the last line keeps whitespace at the start of the template
#: What a template gets: one text, one part that is a text, or all parts. Of each a picture, a text `{}`, the content.
_TEXT = (f"'{MEDIA_TOKEN}'", "{}", "flat.parts | join")
_PART = (f"'{MEDIA_TOKEN}'", "{}", "[{'type': 'text', 'text': flat.parts | join}]")
_PARTS = ("{'type': 'image'}", "{'type': 'text', 'text': {}}", "flat.parts")
_TYPES = (("['image', 'image_url']", "images"), ("['image', 'image_url', 'video', 'video_url']", "images and videos"))
#: Opens an answer for a template that knows no `add_generation_prompt`.
_OPENING = "{{{{ {heading} if add_generation_prompt else '' }}}}{{# opens an answer, as vlm does #}}"
_OPENED = re.compile(r"\{\{ [^\n{}]* if add_generation_prompt else '' \}\}\{# opens an answer, as vlm does #\}\Z")


def _begin(form: tuple[str, str, str], types: str, kinds: str) -> str:
    """Return what stands before a template that takes pictures."""
    picture, text, content = form
    template = _TO_TEXT
    for given in ("part", "part['text']"):
        template = template.replace(f"TEXT({given})", text.replace("{}", given))
    template = template.replace("PICTURE", picture).replace("CONTENT", content)
    return template.replace("TYPES", types).replace("KINDS", kinds)


def take_pictures(
    template: str,
    special_tokens: Mapping[str, Any],
    *,
    videos: bool = False,
    heading: str = "",
    gets_images: bool = True,
) -> str:
    """Return a template that writes a message with a picture as the given template writes it with `<image>`.

    Args:
        template: of the model; `PLAIN` for a model without one.
        special_tokens: names and texts of the tokenizer's special tokens.
        videos: write `<image>` for a clip, too, as a prompt of vlm has it.
        heading: what opens an answer, if the template knows no `add_generation_prompt`.
        gets_images: give images to a template that writes `<image>` for them; llama.cpp gives every template texts.

    Raises:
        LanguageModelError: if the template cannot write even one message.
    """
    as_text = template == PLAIN or takes_text(template, special_tokens)
    form, message = (_TEXT, _AS_TEXT) if as_text else (_PART, _AS_PART)
    if gets_images and template != PLAIN and writes_images(template, special_tokens):
        form, message = _PARTS, MESSAGE
    found = _begin(form, *_TYPES[videos]) + template
    if heading:
        found = found.removesuffix("\n") + _OPENING.format(heading=json.dumps(heading))
    if template == PLAIN:
        return found
    wanted = render_template(template, message, special_tokens) + heading
    if (written := render_template(found, MESSAGE, special_tokens)) != wanted or written.count(MEDIA_TOKEN) != 1:
        raise LanguageModelError(
            f"the model's chat template writes a message with an image as {written!r}, and with the text "
            f"{MEDIA_TOKEN!r} as {wanted!r}; one {MEDIA_TOKEN} has to be in both. Give the model another template."
        )
    return found


def leave_pictures_out(template: str) -> str:
    """Return the template that `take_pictures` was given; a template that comes from elsewhere stays as it is."""
    for form in (_TEXT, _PART, _PARTS):
        for types in _TYPES:
            if template.startswith(begin := _begin(form, *types)):
                return _OPENED.sub("", template[len(begin) :])
    return template


def takes_text(template: str, special_tokens: Mapping[str, Any]) -> bool:
    """Tell whether a template takes the content of a message as a text; some want a list of parts."""
    try:
        found = render_template(template, [{"role": "user", "content": "hello"}], special_tokens)
        return "hello" in found.lower()
    except EndlessTemplateError:
        raise
    except LanguageModelError:
        return False


def writes_images(template: str, special_tokens: Mapping[str, Any]) -> bool:
    """Tell whether a template writes `<image>` for a part that is an image, as those of published VLMs do."""
    try:
        found = render_template(template, MESSAGE, special_tokens)
        return found.count(MEDIA_TOKEN) == 1 and "What is it?" in found
    except EndlessTemplateError:
        raise
    except LanguageModelError:
        return False
