"""`vlm chat` on a terminal: what begins with a slash, and conversations as files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_cli.checkpoint import directory
from vlm_cli.cli.chat_commands import COMMANDS
from vlm_cli.data.records import read_records
from vlm_cli.modeling.budget import ContextBudget
from vlm_cli.prompt import Medium, Text

pytestmark = pytest.mark.usefixtures("loaded_once")

TEMPLATE = """\
{%- for message in messages -%}
<s>{{ message.role }}: {{ message.content | trim }}</s>
{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"""


@pytest.fixture(scope="module")
def templated(open_gates: Path) -> Path:
    out = Path(shutil.copytree(open_gates, open_gates.parent / "templated-commands"))
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with three pictures."""
    for i, name in enumerate(["a.png", "my b.png", "c.png"]):
        Image.frombytes("RGB", (40, 30), random.Random(i).randbytes(3 * 40 * 30)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


Typed = Callable[..., Any]
Asked = list[list[int]]


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "turn"),
    [
        (["/image a.png", "The cat"], "<image:a.png>The cat"),
        (["/image a.png", "/image 'my b.png'", r"/image my\ b.png"], "<image:a.png><image:my b.png><image:my b.png>"),
        (["/image c.png", "The <image>cat"], "The <image:c.png>cat"),
        (["/image a.png", "<image:nowhere.png> x", "The cat"], "<image:a.png>The cat"),
    ],
    ids=["before", "several", "placeholder", "after-a-mistake"],
)
def test_an_image_is_shown_in_the_next_turn(
    folder: Path, typed: Typed, asked: Asked, lines: list[str], turn: str
) -> None:
    words = [] if "cat" in lines[-1] else ["cat"]
    found = typed(*lines, *words, "The dog", EOFError())
    given = list(asked)
    asked.clear()
    wanted = typed(turn + "".join(words), "The dog", EOFError())
    assert found.stdout == wanted.stdout and given == asked and len(asked) == 2
    assert found.stderr.count("Image a.png (") == wanted.stderr.count("Image a.png (")  # told once


def test_an_image_is_told_with_what_it_costs(
    folder: Path, typed: Typed, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = typed("/image a.png", "/image c.png", EOFError())
    assert "Your next turn shows it; it takes 1 position of the context." in found.stderr
    assert "Your next turn shows it, the last of 2; it takes" in found.stderr and asked == []
    monkeypatch.setattr(ContextBudget, "positions", lambda self, tokens, media: 1234)
    assert "it takes 1,234 positions of the context." in typed("/image a.png", EOFError()).stderr


def test_what_is_forgotten_is_not_shown(folder: Path, typed: Typed, asked: Asked) -> None:
    typed("The dog", EOFError())
    wanted = list(asked)
    for lines in (["/image a.png", "/clear"], ["The cat", "<image:c.png>The mat", "/clear"]):
        asked.clear()
        assert "Turns and pictures are forgotten." in typed(*lines, "The dog", EOFError()).stderr
        assert asked[-1:] == wanted
    asked.clear()
    typed("/clear", "The dog", EOFError(), flags=["--image", "a.png"])  # also those of the command line
    assert asked == wanted


# -- commands and turns ------------------------------------------------------------------------------------------------


#: What is typed, and what the error says.
MISTAKES = {
    "/imgae a.png": "unknown command '/imgae'. Did you mean '/image'?\nKnown: /image, /video, /clear,",
    "/": "unknown command '/'.\nKnown",
    "/home/me/a.png": "A turn that begins with a slash is typed with two: //",
    "/\x1b[31m": r"unknown command '/\x1b[31m'",
    "/image": "/image needs something behind it: /image FILE",
    "/video ": "/video needs something behind it: /video FILE",
    "/system": "/system needs something behind it: /system TEXT",
    "/save": "/save needs something behind it: /save FILE",
    "/load": "/load needs something behind it: /load FILE",
    "/clear all": "/clear takes nothing behind it, got 'all'. Type /clear alone.",
    "/help me": "/help takes nothing behind it",
    "/exit now": "/exit takes nothing behind it",
    "/image nowhere.png": "cannot find 'nowhere.png'",
    "/image 'a": 'cannot find "\'a"',
    "/image -": "stdin brings the turns of a chat",
    "/image http://example.org/a.png": "--allow-urls",
    "/video a.png?frames=0": "frames",
    "/system Be kind.": "no chat template, which would say where /system stands",
    "/save new.json": "no turn has been answered, so there is nothing to save",
    "/load nowhere.json": "cannot read 'nowhere.json': No such file or directory.",
    f"/image {'x' * 300}": "is given as data:image/png;base64,DATA",
    f"/load {'x' * 300}": "File name too long",
    "/load ~no-such-user/x": "cannot read '~no-such-user/x'",
    "/load -": "- means a standard stream",
    "/load .": "Is a directory",
}


def test_a_command_with_a_mistake_changes_nothing(folder: Path, typed: Typed, asked: Asked) -> None:
    found = typed(*MISTAKES, "The cat", EOFError())
    _, *errors = found.stderr.split("Error: ")
    assert found.exit_code == 0 and len(errors) == len(MISTAKES)
    wrong = [line for (line, problem), error in zip(MISTAKES.items(), errors, strict=True) if problem not in error]
    assert wrong == [] and len(asked) == 1 and not (folder / "new.json").exists()


def test_help_names_everything(typed: Typed) -> None:
    found = typed("/help", "/exit", AssertionError("nothing is read behind /exit"))
    assert (found.exit_code, found.stdout) == (0, "")
    shown = [line.removeprefix("> ") for line in found.stderr.splitlines()]
    assert all(any(line.startswith(f"  /{name} ") for line in shown) for name in COMMANDS)
    assert max(len(line) for line in shown if line.startswith("  ")) <= 80


#: What is typed, and the turn that it means.
TURNS: list[tuple[list[Any], str]] = [
    (["//image a.png"], "/image a.png"),
    ([" /clear"], " /clear"),
    (["The cat\\", "and the dog\\", "sit"], "The cat\nand the dog\nsit"),
    (['"""', "/clear", "", 'the "cat"\\', '"""'], '/clear\n\nthe "cat"\\'),
    (['"""The cat', 'sits.""" '], "The cat\nsits."),
    (['"""The cat"""'], "The cat"),
    (["The cat\\", KeyboardInterrupt(), '"""', "x", KeyboardInterrupt(), "The dog"], "The dog"),
]


def test_a_turn_may_have_any_text(open_gates: Path, typed: Typed, asked: Asked) -> None:
    lines = [key for keys, _ in TURNS for key in (*keys, "/clear")]
    assert typed(*lines, EOFError()).exit_code == 0
    processor = directory.load(str(open_gates), dtype="auto", device="cpu", trust_remote_code=False)[1]
    assert asked == [processor.encode([Text(turn)]) for _, turn in TURNS]


def test_typed_lines_are_kept_unless_the_user_does_not_want_it(tmp_path: Path, typed: Typed) -> None:
    history = tmp_path / "history"
    typed("/clear", "", "/exit", history=history, flags=["--no-history"])
    assert not history.exists()
    typed("/clear", "", "/exit", history=history)
    assert history.read_text() == "/clear\n/exit\n"


def test_an_empty_block_is_no_turn(typed: Typed, asked: Asked) -> None:
    assert typed('"""', "", '"""', '""""""', '"""', EOFError()).exit_code == 0 and asked == []


def test_in_a_pipe_every_line_is_a_turn(vlm: Typed, open_gates: Path, asked: Asked) -> None:
    result = vlm("chat", open_gates, "-n", 2, input='/exit\n//x\nThe cat\\\n"""\n')
    assert result.exit_code == 0 and len(asked) == 4
    vlm("chat", open_gates, "-n", 2, "-p", "/exit", input="")
    assert asked[4] == asked[0]


def test_a_full_context_does_not_end_a_typed_chat(typed: Typed, asked: Asked) -> None:
    found = typed("The cat", " cat" * 3000, "/clear", "The cat", EOFError())
    assert found.exit_code == 0 and "Start another one" in found.stderr
    assert "/save FILE keeps the conversation, and /clear begins another one." in found.stderr
    assert asked[-1] == asked[0]


# -- the system text ---------------------------------------------------------------------------------------------------


def test_a_system_text_begins_the_conversation_anew(vlm: Typed, templated: Path, typed: Typed, asked: Asked) -> None:
    found = typed("The cat", "/system Be kind.", "The dog", "/clear", "The dog", EOFError(), model=templated)
    assert "The conversation begins with this system text; 1 turn forgotten." in found.stderr
    assert "forgotten. The system text stays." in found.stderr
    vlm("chat", templated, "-n", 2, "--system", "Be kind.", "-p", "The dog", input="")
    assert asked[1] == asked[2] == asked[3] != asked[0]


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["open_gates", "templated"])
def test_a_loaded_conversation_goes_on_as_the_saved_one(
    name: str, folder: Path, typed: Typed, asked: Asked, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    begin = ["/system Be </s> kind."] if name == "templated" else []
    turns = [*begin, "/image a.png", "The cat", 'the <image:my b.png>"dog" \\<image>', "/save one.json"]
    whole = typed(*turns, "sits", EOFError(), model=model)
    wanted = asked[-1]
    (folder / "below").mkdir()
    shutil.move("one.json", "below/chat.json")
    found = typed("A mat", "/image c.png", "/load below/chat.json", "sits", "/save one.json", EOFError(), model=model)
    assert asked[-1] == wanted and found.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]
    assert "Loaded: below/chat.json (2 turns)" in found.stderr and "Saved: one.json (3 turns)" in found.stderr
    # The twin: another picture is seen.
    saved = Path("below/chat.json").read_text("utf-8")
    Path("other.json").write_text(saved.replace("my b.png", "c.png"), "utf-8")
    other = typed("/load other.json", "sits", EOFError(), model=model)
    assert asked[-1] == wanted
    assert name == "templated" or other.stdout.splitlines()[-1] != whole.stdout.splitlines()[-1]


def test_a_saved_conversation_is_what_training_reads(folder: Path, typed: Typed) -> None:
    lines = ["/image a.png", "The cat", "Is <image:c.png>\\<image> this?", "/save chat.json"]
    answers = typed(*lines, EOFError()).stdout.splitlines()
    records = read_records(folder / "chat.json")
    assert records.problems == [] and records.formats == {"chat messages": 1}
    a, c = (str(folder / name) for name in ("a.png", "c.png"))
    assert [segment.parts for segment in records.good[0].segments] == [
        (Medium(a), Text("The cat")),
        (Text(answers[0]),),
        (Text("Is "), Medium(c), Text("<image> this?")),
        (Text(answers[1]),),
    ]
    # As the clients of OpenAI have it.
    first = json.loads((folder / "chat.json").read_text("utf-8"))["messages"][0]
    assert first["content"][0] == {"type": "image_url", "image_url": {"url": a}}


def test_a_clip_is_kept_with_its_settings(folder: Path, typed: Typed, asked: Asked) -> None:
    frames = [Image.new("RGB", (8, 8), (i * 60, 0, 0)) for i in range(4)]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    typed("/video clip.gif?frames=2", "The cat", "/save chat.json", "sits", EOFError())
    assert f'"{folder}/clip.gif?frames=2"' in (folder / "chat.json").read_text("utf-8")
    wanted = asked[-1]
    found = typed("/load chat.json", "sits", EOFError())
    assert "Error" not in found.stderr and asked[-1] == wanted


def test_saving_replaces_only_files_of_this_chat(folder: Path, typed: Typed) -> None:
    found = typed(
        "The cat",
        "/save chat.json",
        "The dog",
        "/save chat.json",
        "/save no/chat.json",
        f"/save {'x' * 300}",
        EOFError(),
    )
    assert found.stderr.count("Saved: ") == 2 and "the folder" in found.stderr
    assert found.exit_code == 0 and "File name too long" in found.stderr
    kept = (folder / "chat.json").read_text("utf-8")
    assert len(json.loads(kept)["messages"]) == 4
    again = typed("The cat", "/save chat.json", "/save .", EOFError())
    assert "'chat.json' exists, and stays as it is. Choose another name." in again.stderr
    assert again.stderr.count("Error: ") == 2 and (folder / "chat.json").read_text("utf-8") == kept
    assert sorted(x.name for x in folder.iterdir()) == ["a.png", "c.png", "chat.json", "my b.png"]


USER = {"role": "user", "content": "The cat"}
ANSWER = {"role": "assistant", "content": "sits"}


#: What a file holds, and what the error says.
HOSTILE: list[tuple[Any, str]] = [
    ("{", "is no conversation: it is not JSON: line 1"),
    (b"\xff\xfe\xfd", "is no conversation: it is"),
    ("[" * 100_000, "nested too deeply"),
    ("3", "it holds a number, not an object"),
    ({}, 'it has no "messages"'),
    ({"messages": "x"}, '"messages" must be a list, got text'),
    ([], "it holds no turn"),
    ([3], "message 1 must be an object, got a number"),
    ([{"role": "\x1b[31mking", "content": ""}], r"unknown role '\x1b[31mking'"),
    ([ANSWER, USER, ANSWER], "turn 1, of the assistant, is the first"),
    ([USER, ANSWER, ANSWER], "Turns must alternate"),
    ([USER, ANSWER, USER], "message 3, the last, has no answer. Leave it out, and ask it anew."),
    ([{"role": "system", "content": "Hi"}, USER, ANSWER], "where the system text of that file stands"),
    ([{"role": "user", "content": [{"type": "image", "path": "gone.png"}]}, ANSWER], "cannot find 'gone.png'"),
    ([{"role": "user", "content": [{"type": "image", "path": "-"}]}, ANSWER], "stdin brings the turns"),
    ([{"role": "user", "content": [{"type": "image", "url": "http://x.org/a.png"}]}, ANSWER], "--allow-urls"),
    ([{"role": "user", "content": "cat " * 3000}, ANSWER], "the conversation takes"),
    ([USER, ANSWER] * 5000, "the conversation takes"),
]


def test_a_file_that_is_no_conversation_is_refused(folder: Path, typed: Typed, asked: Asked) -> None:
    for i, (content, _) in enumerate(HOSTILE):
        raw = content if isinstance(content, (bytes, str)) else json.dumps(content)
        (folder / f"{i}.json").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    loads = [f"/load {i}.json" for i in range(len(HOSTILE))]
    found = typed("The dog", *loads, "The cat", EOFError())
    _, *errors = found.stderr.split("Error: ")
    assert found.exit_code == 0 and len(errors) == len(HOSTILE) and "\x1b" not in found.stderr
    wrong = [error for (_, problem), error in zip(HOSTILE, errors, strict=True) if problem not in error]
    assert wrong == []
    typed("The dog", "The cat", EOFError())
    assert len(asked) == 4 and asked[1] == asked[3]  # the conversation went on


def test_an_empty_answer_is_kept(folder: Path, typed: Typed, asked: Asked) -> None:
    (folder / "chat.json").write_text(json.dumps([USER, {"role": "assistant", "content": ""}]))
    found = typed("/load chat.json", "The dog", "/save new.json", EOFError())
    assert "Loaded: chat.json (1 turn)" in found.stderr and len(asked) == 1
    assert "Note: the answer to turn 1 is empty, which `vlm train` refuses." in found.stderr
    assert read_records(folder / "new.json").problems
