"""What a file says is shown on a terminal, and never acts on it."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from tests.support import ROOT
from tests.support.screens import Screens, commands_on_a_terminal, copy_on_a_terminal, on_a_terminal
from vlm_cli.cli import console, terminal
from vlm_cli.printable import CONTROLS, escape_controls, escape_json_controls

#: Turns the text red, sets the title of the window, rings, goes to another line, and reverses what follows.
HOSTILE = "\x1b[31mred\x1b]0;title\x07\rover\x9b2J\u202egnp.exe[red]"
SHOWN = r"\x1b[31mred\x1b]0;title\x07\rover\x9b2J\u202egnp.exe[red]"


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_every_control_character_is_escaped() -> None:
    controls = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    for code in controls:
        assert escape_controls(chr(code)).isprintable() and escape_controls(chr(code)).startswith("\\")
        assert json.loads(escape_json_controls(json.dumps(chr(code), ensure_ascii=False))) == chr(code)
    assert escape_controls("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"


def test_readable_text_stays_as_it_is() -> None:
    text = "Ünï — 漢字 שלום سلام 👩‍👩‍👧 क्‍ष \\x1b [red]"  # joiners belong to the spelling of some languages
    assert escape_controls(text) == escape_json_controls(text) == text


# -- where it is kept --------------------------------------------------------------------------------------------------

PRINTS: list[Callable[[str], None]] = [
    console.notify,
    console.error,
    console.print_line,
    console.print_lines,
    console.print_answer,
    console.write_answer,
    lambda text: console.print_table((text, "n"), [(text, "1"), ("x", "2")], title=text),
    terminal.overwrite_line,
]


@pytest.mark.parametrize("show", PRINTS)
def test_a_terminal_gets_escapes(show: Callable[[str], None], open_screens: Screens) -> None:
    screens = open_screens()
    show(HOSTILE)
    shown = "".join(screen.getvalue() for screen in screens)
    own = re.sub(r"\A\r|\x1b\[[\d;]*m|\x1b\[K", "", shown)  # vlm's own styles
    assert SHOWN in re.sub(r"\s*\n\s*", "", own) and not re.search(f"[{CONTROLS}]", own.replace("\n", ""))


def test_one_line_stays_one_line(open_screens: Screens) -> None:
    screens = open_screens()
    console.notify("a\nError: b")
    console.print_line("a\nb\tc")
    console.print_answer("a\nb\tc")
    assert screens[1].getvalue() == "a\\nError: b\n"
    assert screens[0].getvalue() == "a\\nb\\tc\na\nb\tc\n"


def test_json_on_a_terminal_holds_the_same_data(open_screens: Screens) -> None:
    screens = open_screens()
    console.print_json({HOSTILE: [HOSTILE]})
    shown = screens[0].getvalue()
    assert json.loads(shown) == {HOSTILE: [HOSTILE]} and not re.search(f"[{CONTROLS}]", shown.replace("\n", ""))


@pytest.mark.parametrize("show", PRINTS[:-2])
def test_a_pipe_gets_the_text_as_it_is(show: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    show(HOSTILE)
    captured = capsys.readouterr()
    assert HOSTILE in captured.out + captured.err


def test_what_others_print_is_guarded(open_screens: Screens) -> None:
    screens = open_screens()
    terminal.guard_streams()
    print(HOSTILE, end="")
    sys.stdout.writelines([HOSTILE])
    sys.excepthook(ValueError, ValueError(HOSTILE), None)
    console.notify(HOSTILE)
    assert screens[0].getvalue() == SHOWN * 2
    assert screens[1].getvalue().count(SHOWN) == 2 and "\x1b" not in screens[1].getvalue()


def test_progress_bars_move_the_cursor_and_no_more(open_screens: Screens) -> None:
    screens = open_screens()
    terminal.guard_streams()
    with tqdm(total=2, desc=HOSTILE, mininterval=0) as first, tqdm(total=2, mininterval=0) as second:
        first.update()
        second.update()
    shown = screens[1].getvalue()
    assert "\r" + SHOWN in shown and "\x1b[A" in shown
    assert not re.search(f"[{CONTROLS}]", shown.replace("\x1b[A", "").replace("\r", "").replace("\n", ""))


# -- no other way to the terminal --------------------------------------------------------------------------------------

SOURCES = sorted((ROOT / "vlm_cli").rglob("*.py"))

#: What a module may do with the streams besides writing.
QUIET = ("isatty", "flush", "fileno", "close", "reconfigure")


def bare_writes(source: str) -> Iterator[str]:
    """Yield the expressions of a module that write to stdout or stderr, or hand them to a writer."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("print", "pprint", "os.write") or re.fullmatch(
                r"(typer|click)\.s?(echo|echo_via_pager)", called
            ):
                yield ast.unparse(node)
            if called == "Console" and not any(k.arg in ("file", "width") for k in node.keywords):
                yield ast.unparse(node)
        if isinstance(node, ast.Attribute) and re.fullmatch(r"sys\.(__)?std(out|err)(__)?", ast.unparse(node)):
            parent = parents[node]
            if isinstance(parent, ast.Attribute) and parent.attr in QUIET:
                continue
            if isinstance(parent, ast.Call) and ast.unparse(parent.func).split(".")[-1] in (
                "is_terminal",
                "unguarded",
                "isinstance",
            ):
                continue
            if ast.unparse(parent).startswith("getattr(sys.stdout, 'encoding'"):
                continue
            if isinstance(parent, (ast.Tuple, ast.Compare)):  # `for stream in (sys.stdout, sys.stderr): stream.flush()`
                continue
            yield ast.unparse(parent)


#: How a process that a signal ends writes its last line.
IN_SIGNALS = {
    "print(line, file=sys.stderr)",
    "os.write(file, f'{line}\\n'.encode(errors='backslashreplace'))",
    "file=sys.stderr",
}


def test_only_one_module_writes_to_the_terminal() -> None:
    found = {path.relative_to(ROOT).as_posix(): list(bare_writes(path.read_text("utf-8"))) for path in SOURCES}
    assert found.pop("vlm_cli/cli/terminal.py")
    assert found.pop("vlm_cli/cli/standard_streams.py")  # opens them
    assert found.pop("vlm_cli/templates/process.py")  # a child process, whose stdout is a pipe
    assert found.pop("vlm_cli/checkpoint/export/gguf/llama_cpp.py")  # another one
    # A signal ends the process around Python's buffers; the text is escaped there.
    assert set(found.pop("vlm_cli/interrupt.py")) == IN_SIGNALS
    assert {path: writes for path, writes in found.items() if writes} == {}


@pytest.mark.parametrize(
    "source",
    [
        "print(name)",
        "typer.echo(name)",
        "click.secho(name)",
        "sys.stdout.write(name)",
        "csv.writer(sys.stdout)",
        "out = sys.stderr",
        "sys.__stdout__.write(name)",
        "os.write(1, name)",
        "Console().print(name)",
    ],
)
def test_other_ways_are_found(source: str) -> None:
    assert list(bare_writes(source))


# -- a real terminal ---------------------------------------------------------------------------------------------------

ESC = "\x1b[31mEVIL\x9b\u202e\x07"
ESCAPED = r"\x1b[31mEVIL\x9b\u202e\x07"


@pytest.fixture(scope="module", params=[copy_on_a_terminal, pytest.param(on_a_terminal, marks=pytest.mark.matrix)])
def shown(
    tmp_path_factory: pytest.TempPathFactory,
    flamingo: Path,
    parts: Any,
    photo: Path,
    environment: dict[str, str],
    request: pytest.FixtureRequest,
) -> dict[str, str]:
    """What a terminal receives of hostile files, by the name of what is hostile in them."""
    folder = tmp_path_factory.mktemp("hostile")

    def copy(name: str, file: str, change: Callable[[dict[str, Any]], None], source: Path = flamingo) -> str:
        copied = shutil.copytree(source, folder / name)
        data = json.loads((copied / file).read_text("utf-8"))
        change(data)
        (copied / file).write_text(json.dumps(data), "utf-8")
        return str(copied)

    decoder = {"type": "Replace", "pattern": {"Regex": "."}, "content": ESC}
    talking = copy("answer", "tokenizer.json", lambda data: data.update(decoder=decoder))
    template = {"chat_template": f"{{{{ raise_exception({json.dumps(ESC)}) }}}}"}
    raising = copy("template", "tokenizer_config.json", lambda data: data.update(template))
    Path(raising, "chat_template.jinja").write_text(template["chat_template"], "utf-8")
    unknown = copy("type", "config.json", lambda data: data.update(model_type=ESC), parts.language_model)
    save_file({ESC: torch.zeros(1)}, folder / "weights.safetensors")
    image = shutil.copy(photo, folder / f"{ESC}.png")
    turns = folder / "turn.txt"
    turns.write_text("Hello", "utf-8")
    generate = ["generate", "--model", talking, "--image", str(photo), "A", "-n", "5"]
    commands = {
        "stream": generate,
        "answer": [*generate, "--no-stream"],
        "json": [*generate, "--json"],
        "chat": ["chat", talking, "-f", str(turns), "-n", "5"],
        "template": ["chat", raising, "-f", str(turns), "-n", "5"],
        "model-type": ["build", *parts.flamingo[:4], "--language-model", unknown, "--dry-run"],
        "tensor": ["build", str(folder / "out"), *parts.flamingo, "--weights", str(folder / "weights.safetensors")],
        "image": ["generate", "--model", str(flamingo), "--image", str(image), "A", "-n", "1"],
        "out": ["build", str(folder / ESC), *parts.flamingo, "--quiet"],
        "flag": ["inspect", f"--{ESC}"],
        "name": ["inspect", f"./{ESC}"],
    }
    return commands_on_a_terminal(commands, environment, request.param)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "name",
    ["stream", "answer", "json", "chat", "template", "model-type", "tensor", "image", "out", "flag", "name"],
)
def test_hostile_files_do_not_act_on_a_terminal(name: str, shown: dict[str, str]) -> None:
    spelled = ESCAPED if name != "json" else json.dumps(ESC)[1:-1]
    assert "EVIL" in shown[name] and spelled in shown[name].replace("\r\n", "")
    own = re.sub(r"\x1b\[[013]*m|\x1b\[K|\r", "", shown[name])  # styles of tables, and progress
    assert not re.search(f"[{CONTROLS}]", own.replace("\n", ""))


def test_the_command_guards_its_streams(environment: dict[str, str]) -> None:
    """Typer prints this error, not vlm."""
    received = on_a_terminal(["-m", "vlm_cli", "inspect", f"--{ESC}"], environment)
    assert ESCAPED in received and not re.search(f"[{CONTROLS}]", re.sub(r"[\r\n]", "", received))


def test_a_guarded_terminal_takes_typed_lines(environment: dict[str, str]) -> None:
    program = "import readline; from vlm_cli.cli import terminal; terminal.guard_streams(); print([input('> ')])"
    assert on_a_terminal(["-c", program], environment, b"The cab\x7ft\n").endswith("['The cat']\r\n")
