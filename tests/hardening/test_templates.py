"""A chat template may neither loop nor fill the memory, and is rendered as Transformers renders it."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vlm_cli.errors import LanguageModelError
from vlm_cli.templates import render as templates
from vlm_cli.templates.render import render_template

MESSAGES = [
    {"role": "user", "content": "hello </s> ünï"},
    {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "extra": ["<a>", "<b>"]}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'x' * 10**10 }}", "512 MB of memory"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 2 seconds"),
        ("{{ 'x'.ljust(10**10) }}", "512 MB of memory"),
        ("{{ '%9999999999d' % 1 }}", "512 MB of memory"),
        ("{{ 10 ** (10 ** 9) }}", "takes more than 2 seconds"),
        ("{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}", "writes more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too often"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('x') }}", "SecurityError"),
        ("{{ raise_exception('no roles') }}", "TemplateError: no roles"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_hostile_template_is_an_error(monkeypatch: pytest.MonkeyPatch, template: str, words: str) -> None:
    monkeypatch.setattr(templates, "SECONDS", 2)
    started = time.monotonic()
    with pytest.raises(LanguageModelError, match="chat template cannot write this conversation") as error:
        render_template(template, MESSAGES, TOKENS)
    assert words in str(error.value)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ bos_token + m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}",
        "{%- for m in messages %}{%- if loop.first %}{% continue %}{% endif %}\n{{ m | tojson(indent=1) }}{% endfor %}",
        "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
        "{% generation %}a{{ messages[0].content }}{% endgeneration %}{{ dict(a=1) }}{{ extra[1] }}",
        "{{ strftime_now('%Y') }}{% if add_generation_prompt %}>{% endif %}{% if tools is not none %}t{% endif %}",
        "{{ messages | length }}{{ messages[1].content[0].text }}{{ undefined_name }}{{ dict.fromkeys('ab') }}",
    ],
)
def test_as_transformers_renders(template: str) -> None:
    keywords: dict[str, Any] = {"add_generation_prompt": True, "chat_template": template, **TOKENS}
    (expected,), _ = render_jinja_template([MESSAGES], **keywords)
    assert render_template(template, MESSAGES, TOKENS) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% set count = namespace(n=0) %}{% set count.n = count.n + 1 %}{{ count.n }}",
        "{% set n = n | default(0) + 1 %}{{ n }}",
        "{% set turn = cycler('a', 'b') %}{{ turn.next() }}",
    ],
)
def test_a_template_keeps_nothing_for_the_next_conversation(template: str) -> None:
    assert render_template(template, [], {}) == render_template(template, [], {}) != ""


def render_many(name: str) -> list[str]:
    return [render_template(f"{name}{{{{ {i} }}}}", MESSAGES, TOKENS) for i in range(40)]


def test_a_copy_of_the_process_renders_by_itself() -> None:
    """As workers that load data: with one pipe for all, an answer would reach the wrong one."""
    render_many("before")
    names = ["first", "second"]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        waiting = [pool.apply_async(render_many, (name,)) for name in names]
        found = [render_many("own"), *(x.get(30) for x in waiting)]
    assert found == [[f"{name}{i}" for i in range(40)] for name in ("own", *names)]
