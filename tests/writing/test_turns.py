"""Turns by a chat template: what is learned, compared with a plain reading of the text that Transformers renders.

The templates behave as published ones do, whose names they bear, and are written anew.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest

from vlm_cli.errors import LanguageModelError
from vlm_cli.models import DEMO, read_processor_of
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Medium, Text, interleave
from vlm_cli.templates.conversation import ChatFormat, Conversation
from vlm_cli.writing.turns import Exchange, TurnsWriter

ENDS = ("<|im_end|>", "<|eot|>", "<|return|>", "<end_of_turn>")
SPECIAL = (
    *ENDS,
    "<|im_start|>",
    "<start_of_turn>",
    "<|head|>",
    "<|/head|>",
    "[INST]",
    "[/INST]",
    "<|final|>",
    "<|end|>",
)
SYSTEM = "Be brief."
SAID = [("<image:a.png>Which?", "A cat."), ("<image:b.png> Sure </s> ?", "Yes, <|im_end|> a cat."), ("And", "A dog")]


class Case(NamedTuple):
    """A template, and a pattern with a group for what is learned in its text.

    Attributes:
        template: a Jinja program.
        learned: what follows the place where a chat lets the model begin.
        system: whether the template takes a system text.
        repeats: whether each answer needs a sequence of its own.
        ends: whether the template writes a token that ends answers.
    """

    template: str
    learned: str
    system: bool = True
    repeats: bool = False
    ends: bool = True


CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A turn of the user may follow an answer; then its reasoning is dropped. The last answer always has some.
REASONING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endfor %}"
    "{% set ns.seen = -1 %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.seen = ns.seen + 1 %}{% endif %}"
    "{% set words = m.content.split('</think>')[-1].lstrip('\n') %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and ns.seen == ns.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "<think>\n{{ thought | trim }}\n</think>\n\n{% endif %}{{ words }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CASES = {
    "qwen2.5": Case(CHATML, r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)\n"),
    "qwen3": Case(REASONING, r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)\n"),
    "gemma": Case(
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        r"<start_of_turn>model\n(.*?<end_of_turn>)\n",
        system=False,
    ),
    "llama2": Case(
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set said = messages[1:] if system else messages %}{% for m in said %}{% if m.role == 'user' %}"
        "{{ bos_token }}[INST] {% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
        "{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        r"\[/INST\](.*? </s>)(?=<s>|$)",
    ),
    "mistral": Case(
        "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set said = messages[1:] if system else messages %}{% for m in said %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST]"
        "{{ system + '\n\n' if loop.index0 >= said | length - 2 and system else '' }}{{ m.content }}[/INST]"
        "{% else %}{{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
        r"\[/INST\](.*?</s>)(?=\[INST\]|$)",
        repeats=True,  # with a system text, which moves to the last turn
    ),
    "vicuna": Case(
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} "
        "{% elif m.role == 'user' %}USER: {{ m.content }} "
        "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        r"ASSISTANT:(.*?</s>)(?=USER|$)",
    ),
    "llama3": Case(
        "{{ bos_token }}"
        "{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
        r"assistant<\|/head\|>\n\n(.*?<\|eot\|>)(?=<\|head\|>|$)",
    ),
    "smollm": Case(
        CHATML.replace(
            "{{ m.content }}<|im_end|>\n",
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
            "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
        ),
        r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)\n",
    ),
    "parts": Case(
        CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"),
        r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)\n",
    ),
    "no opening": Case(
        "{% for m in messages %}"
        "### {{ m.role | capitalize }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}",
        r"### Assistant:(.*?</s>)\n",
    ),
    "two ends": Case(
        "{% for m in messages %}<|head|>{{ m.role }}{{ '<|final|>' if m.role == 'assistant' }}<|/head|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant{% endif %}",
        r"<\|head\|>assistant(<\|final\|><\|/head\|>(?:(?!<\|head\|>).)*<\|return\|>)",
        repeats=True,
    ),
    "no end": Case(
        "{% for m in messages %}"
        "{{ {'user': 'Q', 'assistant': 'A', 'system': 'S'}[m.role] }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}",
        r"A:( [^\n]*)\n$",
        repeats=True,
        ends=False,
    ),
}


@pytest.fixture(scope="module")
def processor() -> VLMProcessor:
    found = read_processor_of(str(DEMO))
    found.tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return found


def make(processor: VLMProcessor, template: str) -> TurnsWriter:
    tokenizer = processor.tokenizer
    tokenizer.chat_template = template
    ids = tokenizer.convert_tokens_to_ids(["</s>", *ENDS])
    return TurnsWriter(ChatFormat(processor), ids[0], ids[1:])


def exchanges(said: list[tuple[str, str]] = SAID) -> list[Exchange]:
    return [Exchange(tuple(interleave(asks).parts), answer) for asks, answer in said]


def harmless(text: str) -> str:
    """Spell what a user typed with other characters, so that the plain reading takes no word for the template's."""
    return re.sub("<image:[^>]*>", "<image>", text).replace("</s>", "(/s)").replace("<|im_end|>", "(im_end)")


def messages_of(said: list[tuple[str, str]], system: str | None, parts: bool) -> list[dict[str, Any]]:
    turns = [("system", system)] if system else []
    turns += [pair for asks, answer in said for pair in (("user", harmless(asks)), ("assistant", harmless(answer)))]
    return [{"role": r, "content": [{"type": "text", "text": x}] if parts else x} for r, x in turns]


def slow_reading(processor: VLMProcessor, case: Case, said: Any, system: str | None) -> tuple[list[int], list[bool]]:
    """Read the whole text that Transformers renders: its tokens, and which of them the pattern says are learned."""
    tokenizer = processor.tokenizer
    parts = case is CASES["parts"]
    text = tokenizer.apply_chat_template(messages_of(said, system, parts), tokenize=False)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [match.span(1) for match in re.finditer(case.learned, text, re.DOTALL)]
    learned = [any(a <= start and end <= b for a, b in spans) for start, end in found["offset_mapping"]]
    last = max(i for i, is_learned in enumerate(learned) if is_learned)
    return found["input_ids"][: last + 1], learned[: last + 1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("system", [None, SYSTEM], ids=["alone", "system"])
def test_what_is_learned_is_what_a_plain_reading_finds(processor: VLMProcessor, name: str, system: str | None) -> None:
    case = CASES[name]
    if system and not case.system:
        pytest.skip("refused below")
    said = [(asks.replace("</s>", "(/s)"), answer.replace("<|im_end|>", "(im_end)")) for asks, answer in SAID]
    found = make(processor, case.template).write(exchanges(said), system)
    repeats = case.repeats and not (name == "mistral" and system is None)
    assert len(found) == (len(said) if repeats else 1)
    assert [x.num_media for x in found] == ([1, 2, 2] if repeats else [2])
    for number, written in enumerate(found, start=1):
        so_far = said[:number] if repeats else said
        ids, learned = slow_reading(processor, case, so_far, system)
        if name == "qwen3":  # a chat lets the model begin where the template would write an empty thought
            thought = processor.tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
            at = next(i for i in range(len(ids), 0, -1) if ids[i : i + len(thought)] == thought)
            ids, learned = [x[:at] + x[at + len(thought) :] for x in (ids, learned)]  # type: ignore[assignment]
        if not case.ends:
            ids, learned = [*ids, processor.tokenizer.eos_token_id], [*learned, True]
        if repeats:  # earlier answers are learned in sequences of their own
            first = max(i for i, x in enumerate(learned) if x and not learned[i - 1])
            learned = [x and i >= first for i, x in enumerate(learned)]
        assert written.ids == ids
        assert written.is_target == learned


@pytest.mark.parametrize("name", CASES)
def test_each_answer_stands_behind_what_a_chat_feeds(processor: VLMProcessor, name: str) -> None:
    """The words of a special token, typed by the user or in an answer, are text in both."""
    case = CASES[name]
    system = SYSTEM if case.system else None
    writer = make(processor, case.template)
    found = writer.write(exchanges(), system)
    chat = Conversation.begin(writer.format, system)
    fed = []
    for asks, answer in SAID:
        chat = chat.ask(interleave(asks).parts)
        fed.append(list(chat.ids))
        # The model writes what it has learned to write there.
        row = next(x for x in found if x.ids[: len(chat.ids)] == fed[-1] and x.is_target[len(chat.ids)])
        learned = row.ids[len(chat.ids) :]
        size = next(i for i, x in enumerate(learned) if x in writer.stop_ids)
        assert all(row.is_target[len(chat.ids) :][: size + 1])
        assert processor.tokenizer.decode(learned[:size]).strip().endswith(answer)
        text = processor.tokenizer.decode(learned[:size]) if name != "two ends" else answer
        chat = chat.answer(learned[:size], text, processor.tokenizer.decode)
    assert sum(sum(x.is_target) for x in found) < sum(len(x.ids) for x in found)


def test_reasoning_is_learned_where_the_template_keeps_it(processor: VLMProcessor) -> None:
    said = [("One?", "<think>I\n</think>1."), ("Two?", "<think>II</think>\n\n2.")]
    found = make(processor, REASONING).write(exchanges(said))
    decode = processor.tokenizer.decode
    learned = [decode([i for i, x in zip(w.ids, w.is_target, strict=True) if x]) for w in found]
    assert learned == [f"<think>\n{a}\n</think>\n\n{b}.<|im_end|>" for a, b in (("I", 1), ("II", 2))]
    assert decode(found[1].ids).count("<think>") == 1  # the thought of an earlier turn is not read again


@pytest.mark.parametrize(
    ("template", "system", "problem"),
    [
        (
            CASES["gemma"].template,
            SYSTEM,
            r"takes no system text .*System role not supported.*Leave the system text out",
        ),
        (
            CHATML.replace("in messages %}", "in messages if m.role != 'system' %}"),
            SYSTEM,
            "leaves out the system text",
        ),
        (CHATML.replace("m.content }}", "m.content | upper }}"), None, r"changes the words.*'A cat.' becomes 'A CAT.'"),
        (CHATML.replace("assistant\n{%", "assistant\n<think>\n{%"), None, r"does not write an answer where .*<think>"),
        (CHATML.replace("in messages %}", "in messages[-2:] %}"), None, r"writes 1 of 2 images"),
        (CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}"), None, "does not write an answer"),
    ],
    ids=["refuses system", "forgets system", "shouts", "opens another way", "forgets turns", "forgets answers"],
)
def test_a_template_that_would_teach_something_else_is_refused(
    processor: VLMProcessor, template: str, system: str | None, problem: str
) -> None:
    with pytest.raises(LanguageModelError, match=re.compile(problem, re.DOTALL)):
        make(processor, template).write(exchanges(), system)


def test_a_template_that_forgets_turns_of_text_is_followed(processor: VLMProcessor) -> None:
    """A chat forgets them, too."""
    template = CHATML.replace("in messages %}", "in messages[(messages | length - 1) // 2 * 2 :] %}")
    found = make(processor, template).write([Exchange((Text(f"Q{i}"),), f"A{i}") for i in range(3)])
    texts = [processor.tokenizer.decode(x.ids) for x in found]
    assert [[f"Q{k}" in x for k in range(3)] for x in texts] == [[i == k for k in range(3)] for i in range(3)]


def test_notes_tell_what_a_template_does(processor: VLMProcessor) -> None:
    def notes(name: str) -> str:
        writer = make(processor, CASES[name].template)
        writer.write(exchanges())
        return " ".join(writer.notes)

    assert notes("qwen2.5") == ""
    assert "begins answers with '<|final|><|/head|>'" in notes("two ends")
    assert "so the model learns </s> there" in notes("no end")


def test_a_medium_in_an_answer_is_none(processor: VLMProcessor) -> None:
    """The spelling of a placeholder in an answer is text."""
    found = make(processor, CHATML).write([Exchange((Medium("a.png"),), "An <image>.")])
    assert found[0].ids.count(processor.media_token_id) == found[0].num_media == 1
