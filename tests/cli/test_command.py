"""What every command shares: headings in its help, and old names of its options."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from vlm_cli.cli.command import Command, accept_old_names


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)

    def paint(
        name: Annotated[str, typer.Argument(help="Title.")],
        coats: Annotated[int, typer.Option(help="Number of coats.", rich_help_panel="Work")] = 1,
        loud: Annotated[bool, typer.Option(help="Say so.")] = False,
    ) -> None:
        print(name, coats, loud)

    accept_old_names(paint, {"--layers": "--coats"})
    app.command(cls=Command)(paint)
    return app


def test_help_has_headings(app: typer.Typer) -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    heads = [line for line in text.splitlines() if line.endswith(":")]
    assert heads == ["Arguments:", "Options:", "Work:"]
    assert text.index("Work:") < text.index("--coats") and text.index("--loud") < text.index("Work:")
    assert "--layers" not in text


@pytest.mark.parametrize("old", [["--layers", "3"], ["--layers=3"]])
def test_an_old_name_still_works_and_says_so(app: typer.Typer, old: list[str]) -> None:
    result = CliRunner().invoke(app, ["door", *old])
    assert result.stdout == "door 3 False\n"
    assert result.stderr == "Note: --layers is now called --coats.\n"


def test_the_new_name_says_nothing_and_a_text_is_no_option(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--coats", "3", "--", "--layers"])
    assert (result.stdout, result.stderr) == ("--layers 3 False\n", "")
