"""What every command shares: headings in its help, and old names of its options."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from vlm_cli.cli.command import Command
from vlm_cli.cli.spellings import accept_aliases, accept_old_names
from vlm_cli.flags import Alias


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
    accept_aliases(paint, {Alias("--num-layers"): "--coats", Alias("--layer-ratio", below=9): "--coats"})
    accept_aliases(paint, {Alias("--coat-count", beside_switch=True): "--coats"})
    app.command(cls=Command)(paint)
    return app


def test_help_has_headings(app: typer.Typer) -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    heads = [line for line in text.splitlines() if line.endswith(":")]
    assert heads == ["Arguments:", "Options:", "Work:"]
    assert text.index("Work:") < text.index("--coats") and text.index("--loud") < text.index("Work:")
    assert "--layers" not in text


@pytest.mark.parametrize("words", [["--num-layers", "3"], ["--num_layers=3"], ["--num-layers=3", "--", "x"]])
def test_an_alias_works_and_says_nothing(app: typer.Typer, words: list[str]) -> None:
    result = CliRunner().invoke(app, ["door", *words] if "--" not in words else words)
    assert (result.stdout, result.stderr) == (f"{'x' if '--' in words else 'door'} 3 False\n", "")


@pytest.mark.parametrize(
    "words",
    [
        ["--coats", "--coat-count", "3"],
        ["--coat_count=3", "--coats"],
        ["--coats", "True", "--coat-count", "3", "--loud"],
    ],
)
def test_an_option_may_be_a_switch_beside_an_alias(app: typer.Typer, words: list[str]) -> None:
    result = CliRunner().invoke(app, ["door", *words])
    assert result.stdout == f"door 3 {'--loud' in words}\n"
    assert (
        CliRunner().invoke(app, ["door", "--num-layers", "3", "--coats"]).exit_code == 2
    )  # which is no switch's alias


def test_two_names_of_one_option_are_an_error(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["door", "--coats", "3", "--num_layers", "3"])
    assert result.exit_code == 2
    assert "--coats and --num_layers are two names of one option. Give one of them." in " ".join(result.stderr.split())


def test_an_alias_may_allow_less_than_its_option(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["door", "--layer-ratio", "9"])
    assert result.exit_code == 2
    assert "--layer-ratio must be below 9, got 9. For more, give --coats." in " ".join(result.stderr.split())
    assert CliRunner().invoke(app, ["door", "--layer-ratio", "8"]).stdout == "door 8 False\n"


@pytest.mark.parametrize("old", [["--layers", "3"], ["--layers=3"]])
def test_an_old_name_still_works_and_says_so(app: typer.Typer, old: list[str]) -> None:
    result = CliRunner().invoke(app, ["door", *old])
    assert result.stdout == "door 3 False\n"
    assert result.stderr == "Note: --layers is now called --coats.\n"


def test_the_new_name_says_nothing_and_a_text_is_no_option(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--coats", "3", "--", "--layers"])
    assert (result.stdout, result.stderr) == ("--layers 3 False\n", "")
