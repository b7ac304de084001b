"""Dataclasses whose fields become options of a command; in a file whose annotations are strings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from vlm_cli.cli.options import flatten_options


@dataclass(frozen=True)
class Size:
    """A bundle of options."""

    width: Annotated[int, typer.Option("--width", "-w", help="Columns.")] = 3
    colour: str | None = None


@dataclass(frozen=True)
class Depth:
    """Another bundle, with a field of the same name."""

    width: int = 1


def test_a_command_receives_its_bundle() -> None:
    app = typer.Typer()

    @app.command()
    @flatten_options
    def paint(name: str, size: Size = Size(), *, loud: bool = False) -> None:
        print(name, size, loud)

    result = CliRunner().invoke(app, ["a", "-w", "5", "--loud"])
    assert result.output == "a Size(width=5, colour=None) True\n"
    assert "Columns." in CliRunner().invoke(app, ["--help"]).output


def test_two_bundles_share_no_name() -> None:
    with pytest.raises(AssertionError, match="paint: two options have the name width"):

        @flatten_options
        def paint(size: Size = Size(), depth: Depth = Depth()) -> None: ...
