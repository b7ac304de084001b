"""What a terminal of 80 columns shows: names that can be copied, short numbers, colours that can be switched off."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.screens import Screens, commands_on_a_terminal, copy_on_a_terminal, on_a_terminal
from vlm_cli.cli import console
from vlm_cli.doctor import CHECKS, QUICK
from vlm_cli.report.encoders import EncoderTable
from vlm_cli.report.tables import human_count

STYLES = re.compile(r"\x1b\[[\d;]*m")
NOISE = re.compile(r"it/s|Loading weights|shards:|[Ww]arning|torchao|GGUF(?! file)")


def lines_of(text: str) -> list[str]:
    """The lines that stay on a terminal: a line that was overwritten does not."""
    text = STYLES.sub("", text).replace("\r\n", "\n")
    return [line.split("\r")[-1].replace("\x1b[K", "").rstrip() for line in text.split("\n")]


@pytest.fixture(scope="module", params=[copy_on_a_terminal, pytest.param(on_a_terminal, marks=pytest.mark.matrix)])
def shown(open_gates: Path, environment: dict[str, str], request: pytest.FixtureRequest) -> dict[str, str]:
    """What a terminal of 80 columns receives, by command."""
    commands = {
        "exact": ["count-params", str(open_gates), "--exact"],
        "short": ["count-params", str(open_gates), "--depth", "3"],
        "list": ["list", "vision-encoders", "ViT"],
        "inspect": ["inspect", str(open_gates)],
        "weights": ["inspect", str(open_gates), "--weights"],
        "doctor": ["doctor", str(open_gates), "--quick"],
        "families": ["diff", "flamingo", "kosmos"],
        "models": ["diff", str(open_gates), "demo"],
        "costs": ["cost", "--text", "8", "--against", "language-stream", "--train"],
    }
    return commands_on_a_terminal(commands, environment | {"COLUMNS": "80", "TERM": "xterm"}, request.param)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "name", ["exact", "weights", "short", "list", "inspect", "doctor", "families", "models", "costs"]
)
def test_lines_fit_the_terminal_and_no_library_speaks(name: str, shown: dict[str, str]) -> None:
    lines = lines_of(shown[name])
    path = re.compile(r"\S{77,}")  # a longer word than the terminal cannot fit, and is not broken
    assert [line for line in lines if len(line) > 80 and not path.search(line)] == []
    assert not NOISE.search(shown[name])


def test_names_of_encoders_and_tags_are_whole(shown: dict[str, str]) -> None:
    words = {word.rstrip(",") for line in lines_of(shown["list"]) for word in line.split()}
    facts = {name: x for name, x in EncoderTable.read().facts.items() if "vit" in name.lower()}
    assert facts.keys() <= words and {tag for x in facts.values() for tag in x.pretrained} <= words
    assert "Not shown in 80 columns: v patches, pixels, d channels, M parameters." in shown["list"]


def test_numbers_are_short_unless_the_user_wants_them_exact(shown: dict[str, str]) -> None:
    short = next(line for line in lines_of(shown["short"]) if line.startswith(" total"))
    exact = next(line for line in lines_of(shown["exact"]) if line.startswith(" total"))
    assert human_count(int(exact.split()[1].replace(",", ""))) == " ".join(short.split()[1:3])
    assert re.search(r"vision_tokenizer +\d+\.\d k", shown["short"])


def test_gates_are_bars(shown: dict[str, str]) -> None:
    gates = [line for line in lines_of(shown["inspect"]) if "_gate" in line]
    assert len(gates) == 8 and all(line.endswith("+0.4621            │█████") for line in gates)


def test_doctor_has_a_line_for_each_check(shown: dict[str, str]) -> None:
    lines = [line for line in lines_of(shown["doctor"]) if line]
    assert lines[0].startswith("Model ") and lines[-1] == f"{len(QUICK)} hold"
    assert [line.split()[:2] for line in lines[1:-1]] == [["✓", name] for name in QUICK]
    assert all(re.search(r" (0|\d\.\de-\d\d) ≤ (0|\d\.\de[+-]\d\d)$", line) for line in lines[1:-1])
    assert "\x1b[32m✓" in shown["doctor"]


def test_claims_fit() -> None:
    claims = [x for check in CHECKS.values() for x in (check.claim, check.claim_in_stream)]
    assert max(map(len, claims)) <= 42 and all(check.claim for check in CHECKS.values())


@pytest.mark.parametrize("switch", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_can_be_switched_off(
    switch: dict[str, str], open_screens: Screens, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show() -> str:
        screens = open_screens()
        console.print_table(("a", "b"), [("x", "1")])
        console.print_marked("✓", "green", "fine")
        console.error("no")
        return "".join(screen.getvalue() for screen in screens)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m✓" in show() and "\x1b[31mError:" in show()  # the twin
    for name, value in switch.items():
        monkeypatch.setenv(name, value)
    assert "\x1b" not in show()


def test_a_pipe_gets_whole_lines_without_colours(capsys: pytest.CaptureFixture[str]) -> None:
    row = ("a-name", "word " * 60)
    console.print_table(("name", "words"), [row], optional=("words",))
    console.print_section("Title", [row])
    console.error("no")
    captured = capsys.readouterr()
    assert f"a-name   {row[1].strip()}" in captured.out and f"  a-name  {row[1].strip()}\n" in captured.out
    assert "\x1b" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("columns", "heads"), [(80, ["name", "first", "second", "last"]), (40, ["name", "second", "last"]), (20, ["name"])]
)
def test_columns_are_dropped_in_order(
    columns: int, heads: list[str], open_screens: Screens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    out, err = open_screens()
    row: list[Any] = ["n" * 24, "1" * 9, "2" * 5, "ab cd ef"]
    console.print_table(["name", "first", "second", "last"], [row], optional=["first", "second", "last"])
    lines = [line.strip() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[0].split() == heads and lines[2].split()[0] == row[0]
    assert ("Not shown" in err.getvalue()) == (columns < 80)


@pytest.mark.parametrize(("number", "words"), [(999, "999"), (1000, "1.0 k"), (999_949, "999.9 k"), (999_950, "1.0 M")])
def test_short_numbers(number: int, words: str) -> None:
    assert human_count(number) == words and human_count(7_241_732_096) == "7.2 B"
