"""`apply_chat_template` of a processor, and Transformers' own pipeline on messages."""

from __future__ import annotations

import base64
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import pipeline

from tests.support import ROOT
from vlm_cli import load
from vlm_cli.errors import LanguageModelError, MediaError, PromptError
from vlm_cli.media import MediaLoader
from vlm_cli.modeling.batching import stack_pixels
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.conversation import ChatFormat, Conversation

FILE = ROOT / "examples" / "images" / "two.png"
OTHER = ROOT / "examples" / "images" / "three.png"
TEMPLATE = (
    "{% for m in messages %}{{ '<|endofchunk|>' + m['role'] + ': ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|endofchunk|>assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def processor(demo, monkeypatch):
    monkeypatch.setattr(demo[1], "chat_template", TEMPLATE)
    return demo[1]


def shown(**source):
    return {"type": "image", **source}


def said(text):
    return {"type": "text", "text": text}


TURNS = [
    {"role": "user", "content": [shown(url=str(FILE)), said("Is <|endofchunk|> or <image> a tag?")]},
    {"role": "assistant", "content": [said("a heart")]},
    {"role": "user", "content": [said("And "), shown(path=str(OTHER)), said(" this?")]},
]


def test_tokens_are_those_of_a_chat(processor):
    first = [Medium(str(FILE)), Text("Is <|endofchunk|> or <image> a tag?")]
    conversation = Conversation.begin(ChatFormat(processor)).ask(first)
    one = processor.apply_chat_template(TURNS[:1], add_generation_prompt=True, tokenize=True)
    assert one.tolist() == [list(conversation.ids)]
    answer = processor.encode([Text("a heart")], add_special_tokens=False)
    conversation = conversation.answer(answer, "a heart", lambda ids: processor.tokenizer.decode(ids))
    conversation = conversation.ask([Text("And "), Medium(str(OTHER)), Text(" this?")])
    found = processor.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert processor.decode(found["input_ids"][0]) == processor.decode(list(conversation.ids))
    assert found["input_ids"][0].tolist().count(processor.media_token_id) == 2
    loader = MediaLoader()
    pixels = [processor.image_processor.read(loader.load(str(file))) for file in (FILE, OTHER)]
    assert torch.equal(found["pixel_values"], stack_pixels([pixels])["pixel_values"])


@pytest.mark.parametrize("opens", (True, False))
def test_a_text_is_read_as_its_tokens(processor, opens):
    text = processor.apply_chat_template(TURNS, add_generation_prompt=opens)
    assert text.endswith("assistant:") == opens
    images = [Image.open(FILE), Image.open(OTHER)]
    found = processor(text=text, images=images)
    wanted = processor.apply_chat_template(TURNS, add_generation_prompt=opens, tokenize=True, return_dict=True)
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in found)
    assert not torch.equal(processor(text=str(text).replace("<image>", ""))["input_ids"], found["input_ids"])


SOURCES = {
    "pil": {"image": Image.open(FILE)},
    "path": {"path": str(FILE)},
    "image path": {"image": str(FILE)},
    "a Path": {"image": FILE},
    "url": {"url": FILE.as_uri()},
    "data": {"url": f"data:image/png;base64,{base64.b64encode(FILE.read_bytes()).decode()}"},
    "base64": {"base64": base64.b64encode(FILE.read_bytes()).decode()},
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_picture_is_given_as_transformers_takes_it(processor, source):
    turns = [{"role": "user", "content": [shown(**source), said("What?")]}]
    found = processor.apply_chat_template(turns, tokenize=True, return_dict=True)
    wanted = processor(text="<image>", images=[Image.open(FILE)])
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])
    apart = [{"role": "user", "content": [{"type": "image"}, said("What?")]}]
    again = processor.apply_chat_template(apart, images=[Image.open(FILE)], tokenize=True, return_dict=True)
    assert all(torch.equal(found[k], again[k]) for k in found)


def test_several_conversations_are_padded_at_the_left(processor):
    both = processor.apply_chat_template([TURNS, TURNS[:1]], tokenize=True, return_dict=True)
    for b, turns in enumerate((TURNS, TURNS[:1])):
        alone = processor.apply_chat_template(turns, tokenize=True)[0]
        assert torch.equal(both["input_ids"][b, -len(alone) :], alone)
    assert both["vision_mask"].sum().item() == 3


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ([], PromptError, "no messages"),
        ("hello", PromptError, "a list of messages"),
        ([{"role": "robot", "content": "x"}], PromptError, "role 'robot'"),
        ([{"role": "user", "content": 3}], PromptError, "a text or a list of parts, got 3"),
        ([{"role": "user", "content": [{"type": "audio"}]}], PromptError, "Known types: text, image"),
        ([{"role": "user", "content": [{"type": "text"}]}], PromptError, "is null"),
        ([{"role": "user", "content": [shown()]}], PromptError, "has no image"),
        ([{"role": "user", "content": [shown(url="")]}], PromptError, "is empty"),
        ([{"role": "user", "content": [shown(url="a", path="b")]}], PromptError, "Give one of them"),
        ([{"role": "user", "content": [shown(image=3)]}], PromptError, "Give a path, a URL or a PIL image"),
        ([{"role": "user", "content": [shown(url="missing.png")]}], MediaError, "missing.png"),
        ([{"role": "assistant", "content": [shown(url=str(FILE))]}], PromptError, "those of the user"),
    ],
)
def test_bad_messages(processor, messages, error, words):
    with pytest.raises(error, match=words):
        processor.apply_chat_template(messages, tokenize=True, return_dict=True)


@pytest.mark.parametrize(
    "template", ("{{ raise_exception('no') }}", "{% for %}", "{% for i in range(9**9) %}x{% endfor %}")
)
def test_a_template_that_fails_is_an_error(processor, template):
    with pytest.raises(LanguageModelError, match="cannot write this conversation"):
        processor.apply_chat_template(TURNS, chat_template=template)


@pytest.mark.parametrize("name", ("tools", "documents"))
def test_what_is_not_possible_is_refused(processor, name):
    with pytest.raises(PromptError, match=name):
        processor.apply_chat_template(TURNS, **{name: [{}]})


@pytest.fixture(scope="module")
def pipe():
    return pipeline("image-text-to-text", model=str(ROOT / "vlm_cli" / "demo"))


def test_a_pipeline_answers_messages_and_plain_prompts_without_a_warning(pipe, caplog, recwarn, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    turns = [{"role": "user", "content": [shown(url=str(FILE)), said("Describe the image.")]}]
    wanted = " a small yellow cross above a large red heart."
    how = {"max_new_tokens": 20, "return_full_text": False}
    (alone,) = pipe(text=turns, **how)
    several = pipe(text=[turns, turns], batch_size=2, **how)
    (plain,) = pipe(str(FILE), text="<image>Describe the image.", **how)
    texts = [x["generated_text"] for x in (alone, *(x for (x,) in several), plain)]
    assert texts == [wanted] * 4
    begun = [*turns, {"role": "assistant", "content": [said(" a small yellow")]}]
    (whole,) = pipe(text=begun, max_new_tokens=20)
    assert whole["generated_text"][-1]["content"][-1]["text"] == wanted
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [str(x.message) for x in recwarn if "transformers" in str(Path(x.filename))]
