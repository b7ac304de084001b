"""The prompt grammar, against a table, a slow second parser, and hostile text."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.texts import any_text
from vlm_cli.errors import PromptError
from vlm_cli.prompt import Interleaved, Medium, Slot, Text, escape, format, interleave, parse

CASES = {
    "": [],
    " ": [Text(" ")],
    "hello": [Text("hello")],
    "<image>": [Slot()],
    "<image><image>": [Slot(), Slot()],
    "a <image:cat.png> b": [Text("a "), Medium("cat.png"), Text(" b")],
    "<image:a.png>\n<image>.": [Medium("a.png"), Text("\n"), Slot(), Text(".")],
    # Near misses are text.
    "<images> <image > <IMAGE> < image> <image": [Text("<images> <image > <IMAGE> < image> <image")],
    "<image\n> </image> image>": [Text("<image\n> </image> image>")],
    "<<image>>": [Text("<"), Slot(), Text(">")],
    # A backslash is ordinary, except before a placeholder: half of each pair, an odd one escapes.
    r"C:\dir \n \\ \<images>": [Text(r"C:\dir \n \\ \<images>")],
    r"\<image>": [Text("<image>")],
    r"\\<image>": [Text("\\"), Slot()],
    r"\\\<image>": [Text(r"\<image>")],
    r"\\\\<image>": [Text(r"\\"), Slot()],
    r"\<image:a>": [Text("<image:a>")],
    r"\<video:a> \\\<IMG:": [Text(r"<video:a> \<IMG:")],
    "<imageset:a> <videos>: <i mg:a> <VIDEO>": [Text("<imageset:a> <videos>: <i mg:a> <VIDEO>")],
    # A clip; what stands after `?` is a part of its source.
    "<video>": [Slot(kind="video")],
    r"\<video> \\<video><image>": [Text("<video> \\"), Slot(kind="video"), Slot()],
    "a <video:b.mp4?frames=8&start=2> c": [Text("a "), Medium("b.mp4?frames=8&start=2", "video"), Text(" c")],
    r"<video:a\>b.mp4><image:a>": [Medium("a>b.mp4", "video"), Medium("a")],
    r"\<image: never closed": [Text("<image: never closed")],
    r"\\<image:a>": [Text("\\"), Medium("a")],
    # In a path the same holds before '>'.
    r"<image:C:\dir\a b.png>": [Medium(r"C:\dir\a b.png")],
    r"<image:a\>b.png>c": [Medium("a>b.png"), Text("c")],
    r"<image:C:\dir\\>": [Medium("C:\\dir\\")],
    r"<image:\\\>>": [Medium(r"\>")],
    r"<image:a<image>": [Medium("a<image")],
    "<image:->": [Medium("-")],
    "<image: >": [Medium(" ")],
    "<image:données/猫 \0.png>": [Medium("données/猫 \0.png")],
    "<image:data:image/png;base64,AA==>": [Medium("data:image/png;base64,AA==")],
}

ERRORS = {
    "see <image:abc": ["at character 5", "not closed", "'<image:abc'", "Write <image:FILE>", r"\<image:"],
    "a\nb <image:abc\n>": ["at line 2, character 3", "'<image:abc'"],
    "<image:a\r>": ["not closed", "'<image:a'"],
    r"<image:C:\dir\>": ["not closed", r"closed by \\>"],
    "one <image:>": ["<image:> at character 5 names no file", "<image:FILE>", r"\<image:>"],
    r"\\<image:": ["at character 3", "not closed"],
    # Another name for a placeholder would be read as text in silence.
    "see <Video:a.mp4>": [
        "<Video:…> at character 5 is no placeholder. Write <video:FILE>",
        r"\<Video: for the literal",
    ],
    "see <video:abc": ["'<video:abc'", "Write <video:FILE>", r"\<video:"],
    "one <video:>": ["<video:> at character 5 names no file", "<video:FILE>", "a bare <video>", r"\<video:>"],
    "<Image:a.png>": ["<Image:…> at character 1 is no placeholder. Write <image:FILE>"],
    r"a\nb \\< img :x>": ["< img :…> at character 8"],
    "<image:" + "x" * 500: ["xxx…'"],
}

# Every piece that means something to the grammar, and some that must not.
PIECES = ["<image>", "<image:", "<image", "<", "image", ":", ">", "\\", "\\\\", "\n", "\r", "\0", " ", "a"]
OPENERS = ["<image>", "<image:", "<video>", "<video:"]
NEAR = ["<IMAGE:", "<videos:", "< img\t:"]
PIECES += [*OPENERS[2:], "<images>", "<IMAGE>", "\u2028", "é", "猫", "\ud800", "-", *NEAR]
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
sources = texts.map(lambda s: s.replace("\n", "").replace("\r", "")).filter(bool)
kinds = st.sampled_from(["image", "video"])
media = st.one_of(st.builds(Slot, kind=kinds), st.builds(Medium, sources, kinds))


@st.composite
def normal_parts(draw: st.DrawFn) -> list[Text | Medium | Slot]:
    """Texts that are not empty and never side by side, among media."""
    parts: list[Text | Medium | Slot] = []
    for medium in [*draw(st.lists(media, max_size=5)), None]:
        text = draw(texts)
        parts += [Text(text)] if text else []
        parts += [medium] if medium else []
    return parts


NAMES = {"image", "images", "img", "picture", "pictures", "photo", "photos", "video", "videos", "audio"}


def near_opener(rest: str) -> str:
    """The `<name:` at the start of a text, if it plainly means a placeholder and is none; "" otherwise."""
    i = 1
    while rest[i : i + 1] in (" ", "\t"):
        i += 1
    name = ""
    while rest[i : i + 1].isalpha():
        name += rest[i]
        i += 1
    while rest[i : i + 1] in (" ", "\t"):
        i += 1
    found = rest[: i + 1]
    is_near = found[0:1] == "<" and found[-1:] == ":" and name.lower() in NAMES
    return found if is_near and found not in OPENERS else ""


def reference_parse(prompt: str) -> list[Text | Medium | Slot]:
    """The same grammar, one character at a time."""
    parts: list[Text | Medium | Slot] = []
    text = ""
    i = 0
    while i < len(prompt):
        slashes = 0
        while prompt[i + slashes :].startswith("\\"):
            slashes += 1
        rest = prompt[i + slashes :]
        near = near_opener(rest)
        if near and slashes % 2 == 0:
            raise PromptError("another name")
        if near:
            text += "\\" * (slashes // 2) + near
            i += slashes + len(near)
            continue
        if not rest.startswith(tuple(OPENERS)):
            step = max(slashes, 1)
            text += prompt[i : i + step]
            i += step
            continue
        text += "\\" * (slashes // 2)
        i += slashes + len("<image>")
        kind = rest[1:6]
        if slashes % 2 == 1:
            text += rest[:7]
            continue
        if text:
            parts.append(Text(text))
            text = ""
        if rest[6] == ">":
            parts.append(Slot(kind=kind))
            continue
        source = ""
        while True:
            slashes = 0
            while prompt[i : i + 1] == "\\":
                slashes += 1
                i += 1
            if i == len(prompt) or prompt[i] in "\r\n":
                raise PromptError("not closed")
            source += "\\" * (slashes // 2 if prompt[i] == ">" else slashes)
            i += 1
            if prompt[i - 1] == ">" and slashes % 2 == 0:
                break
            source += prompt[i - 1]
        if not source:
            raise PromptError("empty")
        parts.append(Medium(source, kind))
    return parts + ([Text(text)] if text else [])


def outcome(parser, prompt):
    try:
        return parser(prompt)
    except PromptError:
        return "refused"


@pytest.mark.parametrize("prompt", CASES)
def test_parse(prompt):
    assert parse(prompt) == CASES[prompt]
    assert format(CASES[prompt]) == prompt


@pytest.mark.parametrize("prompt", ERRORS)
def test_parse_refuses(prompt):
    with pytest.raises(PromptError) as caught:
        parse(prompt)
    for words in ERRORS[prompt]:
        assert words in str(caught.value)
    assert len(str(caught.value)) < 300


def test_parse_matches_reference_on_all_short_prompts():
    prompts = [
        "".join(pieces)
        for length in range(6)
        for pieces in itertools.product(["\\", "<image", "<video", ">", ":", " ", "\n"], repeat=length)
    ]
    ours = [outcome(parse, prompt) for prompt in prompts]
    assert ours == [outcome(reference_parse, prompt) for prompt in prompts]
    assert ours != [outcome(parse, prompt.replace("\\", "")) for prompt in prompts]  # the twin
    assert 0 < ours.count("refused") < len(ours) / 2


@given(texts)
def test_parse_matches_reference(prompt):
    assert outcome(parse, prompt) == outcome(reference_parse, prompt)


@given(texts)
def test_parse_loses_nothing(prompt):
    parts = outcome(parse, prompt)
    if parts != "refused":
        assert format(parts) == prompt


@given(any_text)
def test_parse_reads_any_text(prompt):
    assert outcome(parse, prompt) == outcome(reference_parse, prompt)


@given(normal_parts())
def test_format_is_undone_by_parse(parts):
    assert parse(format(parts)) == parts


@given(texts)
def test_escape_makes_text(text):
    assert parse(escape(text)) == ([Text(text)] if text else [])


def test_unescaped_text_may_hold_a_placeholder():
    for text in ("<image>", "a <image:b>", r"\\<image>"):
        assert parse(text) != [Text(text)] == parse(escape(text))


@given(texts, texts)
def test_slot_offsets_point_at_placeholders(before, after):
    prompt = f"{escape(before)} <image>{after}"
    parts = outcome(parse, prompt)
    for part in parts if parts != "refused" else []:
        assert not isinstance(part, Slot) or prompt[part.offset :].startswith(f"<{part.kind}>")


def test_format_joins_texts_before_it_escapes():
    assert parse(format([Text("<image"), Text(""), Text(">")])) == [Text("<image>")]


@pytest.mark.parametrize("source", ["", "a\nb", "a\rb"])
def test_format_refuses_a_path_without_spelling(source):
    with pytest.raises(PromptError, match=r"cannot be written in a prompt.*bare <image>"):
        format([Medium(source)])


def test_interleave_fills_slots_in_order():
    found = interleave("<image> and <image:b.png>, then <image>.", ["a.png", "c.png"])
    a, b, c = Medium("a.png"), Medium("b.png"), Medium("c.png")
    assert found == Interleaved([a, Text(" and "), b, Text(", then "), c, Text(".")])
    swapped = interleave("<image> and <image:b.png>, then <image>.", ["c.png", "a.png"])
    assert swapped.parts == [c, *found.parts[1:4], a, Text(".")]


def test_interleave_puts_images_first_without_placeholders():
    assert interleave("Describe.", ["a", "b"]) == Interleaved([Medium("a"), Medium("b"), Text("Describe.")], True)
    assert interleave(r"\<image>", ["a"]) == Interleaved([Medium("a"), Text("<image>")], True)
    assert interleave(" ", ["a"]).parts == [Medium("a"), Text(" ")]
    assert interleave("", ["a"]).parts == [Medium("a")]
    assert not interleave("Hello.").images_prepended
    assert not interleave("<image> Hello.", ["a"]).images_prepended


def test_interleave_fills_slots_of_each_kind():
    found = interleave("<video> and <image>, then <video> and <video:c>.", ["a.png"], ["a.mp4", "b.mp4"])
    first, second, third = Medium("a.mp4", "video"), Medium("b.mp4", "video"), Medium("c", "video")
    image = Medium("a.png")
    assert found.parts == [first, Text(" and "), image, Text(", then "), second, Text(" and "), third, Text(".")]
    assert interleave("Describe.", ["a"], ["b"]).parts == [Medium("a"), Medium("b", "video"), Text("Describe.")]
    with pytest.raises(PromptError, match=r"no bare <video> placeholders but 1 file was given with --video: .*'b'"):
        interleave("<image>", ["a"], ["b"])
    with pytest.raises(PromptError, match=r"1 bare <video> placeholder but no files were given with \"videos\""):
        interleave("<video>", given_with='"images"')


COUNTS = {
    ("<image> hello <image>", ("a.png",)): [
        "has 2 bare <image> placeholders but 1 file was given with --image",
        "the 2nd placeholder, at character 15, has no file.",
        r"write <image:FILE>, or write \<image>",
    ],
    ("<image>", ()): ["1 bare <image> placeholder but no files were given", "1st placeholder, at character 1"],
    ("a\n<image><image><image>", ()): ["1st placeholder, at line 2, character 1, has no file, like the 2 after it"],
    ("<image>" * 4, ("a", "b")): ["the 3rd placeholder", "has no file, like the one after it"],
    ("<image> hi", ("a", "b.png")): ["1 bare <image> placeholder but 2 files", "2nd file, 'b.png', has no placeholder"],
    ("<image> hi", ("a", "b", "c")): ["the 2nd file, 'b', and 1 more, has no placeholder", "leave the file out"],
    ("<image:x.png> hi", ("a.png",)): ["no bare <image> placeholders but 1 file was", "1st file, 'a.png'"],
    ("<image>" * 12, tuple("abcdefghijk")): ["the 12th placeholder"],
    ("<image> hi", ("a", "data:" + "x" * 1000)): ["xxx…'"],
}


@pytest.mark.parametrize(("prompt", "images"), COUNTS)
def test_interleave_refuses_other_counts(prompt, images):
    with pytest.raises(PromptError) as caught:
        interleave(prompt, images)
    for words in COUNTS[prompt, images]:
        assert words in str(caught.value)
    assert len(str(caught.value)) < 350


def test_interleave_names_where_the_files_came_from():
    with pytest.raises(PromptError, match=r"no files were given with 'images'.*Give it one with 'images'"):
        interleave("<image>", given_with="'images'")


@pytest.mark.parametrize("prompt", ["", " ", "\n\t \u2003"])
def test_interleave_refuses_an_empty_prompt(prompt):
    with pytest.raises(PromptError, match=r"prompt is empty.*Give some text"):
        interleave(prompt)
    assert interleave(prompt + "\0").parts == [Text(prompt + "\0")]
    assert interleave(f"{prompt}<image:a>").parts[-1] == Medium("a")


@given(texts, st.lists(sources, max_size=3))
def test_interleave_is_normal_or_refuses(prompt, images):
    found = outcome(lambda p: interleave(p, images), prompt)
    if found == "refused":
        return
    parts = found.parts
    assert parts and all(isinstance(part, Medium) or part.text for part in parts)
    assert not any(isinstance(a, Text) and isinstance(b, Text) for a, b in itertools.pairwise(parts))
    assert found.images_prepended == (bool(images) and Slot() not in parse(prompt))
    if found.images_prepended:
        assert parts == [*map(Medium, images), *parse(prompt)]


def test_parse_takes_long_runs_in_one_pass():
    """A pattern that tried each backslash of a run on its own would take 20 seconds here."""
    length = 50_000
    start = time.process_time()
    assert parse("\\" * length) == [Text("\\" * length)]
    assert parse("<image:" + "\\" * length + "a>") == [Medium("\\" * length + "a")]
    assert parse(escape("<image>" * length)) == [Text("<image>" * length)]
    assert format([Text("\\" * length), Slot()]) == "\\" * 2 * length + "<image>"
    assert time.process_time() - start < 5


def test_import_is_light():
    code = "import sys, vlm_cli.prompt; print({'torch', 'PIL', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
