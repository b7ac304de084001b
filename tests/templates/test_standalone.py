"""`chat_template.jinja`: other programs write with it what `vlm chat` writes, and vlm finds its own template in it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from transformers import ProcessorMixin

from examples import tiny_language_model
from tests.support import disk
from tests.support.command import vlm
from vlm_cli import VLMProcessor
from vlm_cli.errors import EndlessTemplateError, LanguageModelError, VLMWarning
from vlm_cli.models import DEMO
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates import render
from vlm_cli.templates.conversation import ChatFormat, Conversation
from vlm_cli.templates.pictures import PLAIN, leave_pictures_out, take_pictures
from vlm_cli.templates.render import render_template

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\\n' + message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set said = none %}{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<s>[INST] ' + ('<<SYS>>\\n' + said + '\\n<</SYS>>\\n\\n' if loop.first and said else '')"
    " + message['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' </s>' }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PARTS = (
    "{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}{{ part['text'] }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
IMAGES = (  # as those of published VLMs: pictures first, each with a newline
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
UNOPENED = "\n  {% for message in messages %}\n{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}\n"
NAMED = {"default": CHATML, "tool_use": "tools"}
TEMPLATES = {
    "ChatML": CHATML,
    "Llama 2": LLAMA2,
    "Gemma": GEMMA,
    "parts": PARTS,
    "images": IMAGES,
    "unopened": UNOPENED,
    "named": NAMED,
    "none": None,
}

IMAGE, CLIP = {"type": "image", "url": "a.png"}, {"type": "video", "path": "b.mp4"}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


ASKED = {"role": "user", "content": [IMAGE, said("What is it?")]}
TURNS = [
    ASKED,
    {"role": "assistant", "content": [said("A cat.")]},
    {"role": "user", "content": [said("And "), {"type": "image"}, CLIP, said(" these?")]},
]


@pytest.fixture(scope="module")
def processor() -> VLMProcessor:
    return VLMProcessor.from_pretrained(DEMO)


def write(processor: VLMProcessor, template: object, folder: Path) -> VLMProcessor:
    """Write a processor whose language model has a template, and read it again."""
    processor.tokenizer.chat_template = template
    processor.save_pretrained(folder)
    return VLMProcessor.from_pretrained(folder)


def by_transformers(processor: VLMProcessor, messages: list, opens: bool) -> str:
    """What Transformers' own code writes with the file."""
    return ProcessorMixin.apply_chat_template(processor, messages, tokenize=False, add_generation_prompt=opens)


@pytest.mark.parametrize("name", TEMPLATES)
def test_other_programs_write_what_vlm_writes(processor, tmp_path, name):
    found = write(processor, TEMPLATES[name], tmp_path)
    bos = found.tokenizer.bos_token
    for messages in ([ASKED], TURNS, [{"role": "user", "content": "Only text."}]):
        for opens in (True, False):
            ours = found.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
            theirs = by_transformers(found, messages, opens)
            if name == "none":  # a tokenizer begins texts that no template writes
                ours = ours.removeprefix(bos)
            assert theirs == ours
            start = found.tokenizer("")["input_ids"] if name == "none" else []
            assert start + found.tokenizer(theirs, add_special_tokens=False)["input_ids"] == ours_ids(
                found, messages, opens
            )
            media = [x for message in messages for x in message["content"] if x in (IMAGE, CLIP, {"type": "image"})]
            assert theirs.count("<image>") == len(media)


def ours_ids(processor: VLMProcessor, messages: list, opens: bool) -> list[int]:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens).ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_vlm_finds_its_template_again(processor, tmp_path, name):
    wanted = TEMPLATES[name]["default"] if name == "named" else TEMPLATES[name]
    found = write(processor, TEMPLATES[name], tmp_path)
    assert found.chat_program == (wanted and wanted.removesuffix("\n" * (name == "unopened")))
    first = (tmp_path / "chat_template.jinja").read_text()
    found.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == first != wanted
    if name == "named":
        assert found.tokenizer.chat_template["tool_use"] == "tools"
    asked = Conversation.begin(ChatFormat(found)).ask([Medium("a.png"), Text("What is it?")])
    assert list(asked.ids) == ours_ids(found, [ASKED], True)  # what `vlm chat` feeds


def test_a_tokenizer_may_get_a_template_after_loading(processor, tmp_path):
    found = write(processor, None, tmp_path)
    assert found.chat_template is not None and found.chat_program is None
    found.tokenizer.chat_template = CHATML
    assert found.chat_program == CHATML


def test_a_template_of_another_program_stays_as_it_is():
    for template in (CHATML, "", PLAIN + " ", take_pictures(CHATML, {})[1:]):
        assert leave_pictures_out(template) == template


@pytest.mark.parametrize("template", [LLAMA2, IMAGES])
def test_text_that_spells_a_placeholder_or_a_token_stays_text(processor, tmp_path, template):
    found = write(processor, template, tmp_path)
    messages = [{"role": "user", "content": [IMAGE, said("Is <image> or </s> a tag?")]}]
    ids = ours_ids(found, messages, True)
    assert ids.count(found.media_token_id) == 1 and found.tokenizer.eos_token_id not in ids
    theirs = found.tokenizer(by_transformers(found, messages, True))["input_ids"]
    assert theirs.count(found.media_token_id) == 2 and found.tokenizer.eos_token_id in theirs  # one text cannot tell


@pytest.mark.parametrize("videos", [True, False])
def test_parts_of_other_types_are_refused(videos):
    template = take_pictures(CHATML, {}, videos=videos)
    for type, given in (("audio", False), ("video", videos), ("image_url", True)):
        messages = [{"role": "user", "content": [{"type": type}]}]
        if given:
            assert "<image>" in render_template(template, messages, {})
        else:
            with pytest.raises(LanguageModelError, match=f"and no {type}"):
                render_template(template, messages, {})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no pictures here') }}", "no pictures here"),
        ("{% for %}", "TemplateSyntaxError"),
        ("nothing", "nothing"),
    ],
)
def test_a_template_that_writes_no_picture_is_written_with_a_warning(processor, tmp_path, template, words):
    with pytest.warns(VLMWarning, match=words):
        found = write(processor, template, tmp_path)
    assert found.chat_program == template == (tmp_path / "chat_template.jinja").read_text()


@pytest.mark.matrix
def test_a_template_without_end_is_tried_once(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(render, "SECONDS", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.warns(VLMWarning, match="takes more than 1 seconds"):
        found = write(processor, endless, tmp_path)
    with pytest.raises(EndlessTemplateError, match="takes more than 1 seconds"):
        found.apply_chat_template([{"role": "system", "content": "Be brief."}, ASKED])
    assert time.monotonic() - started < 4  # each of the two tries it once, and not for each thing that it might take


def test_build_writes_the_file_and_an_export_of_the_language_model_has_its_own(tmp_path):
    tower = disk.tower(tmp_path / "tower")
    lm = tiny_language_model.make(tmp_path / "lm")
    (lm / "chat_template.jinja").write_text(GEMMA)
    parts = disk.composition(f"local-dir:{tower}", str(lm), "mlp", "language-stream")
    out = disk.write(tmp_path / "vlm", parts)
    template = (out / "chat_template.jinja").read_text()
    assert template.endswith(GEMMA) and template != GEMMA
    code, printed = vlm(["export", str(out), str(tmp_path / "again"), "--format", "language-model"])
    assert code == 0 and (tmp_path / "again" / "chat_template.jinja").read_text() == GEMMA, printed
    with pytest.raises(LanguageModelError, match="System role not supported"):
        VLMProcessor.from_pretrained(out).apply_chat_template([{"role": "system", "content": "Be brief."}, ASKED])
