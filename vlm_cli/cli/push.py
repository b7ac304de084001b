"""`vlm push`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_cli.cli import console
from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_models
from vlm_cli.cli.options import JsonOption, QuietOption, flatten_options
from vlm_cli.errors import UsageError
from vlm_cli.lookalike import find_named

if TYPE_CHECKING:
    from vlm_cli.publishing.push import PushOptions, Shipment

__all__ = ["push"]

CARD = "Card"
HUB = "Hub"


@dataclass(frozen=True)
class CardOptions:
    """What the model card tells."""

    license: Annotated[
        str | None,
        option(
            CARD,
            "Licence, by its name on the hub, such as apache-2.0. Without it, vlm takes that of the card or, if all "
            "pretrained parts have the same one, theirs.",
            "--license",
            metavar="NAME",
        ),
    ] = None
    language: Annotated[
        list[str] | None,
        option(
            CARD,
            "Language that the model knows, such as en; may be given several times. Without it, those of the language "
            "model's card.",
            metavar="CODE",
        ),
    ] = None
    dataset: Annotated[
        list[str] | None,
        option(
            CARD,
            "Data set of the hub that the model learned from; may be given several times. Those that `vlm train` read "
            "from the hub are named anyway.",
            metavar="ORG/NAME",
        ),
    ] = None
    tag: Annotated[
        list[str] | None, option(CARD, "Tag for the search of the hub; may be given several times.", metavar="TAG")
    ] = None
    results: Annotated[
        list[Path] | None,
        option(
            CARD,
            "Show the results in FILE, which `vlm eval … --json > FILE` wrote; may be given several times.",
            metavar="FILE",
        ),
    ] = None
    card: Annotated[
        str,
        option(
            CARD,
            "Whose text counts if README.md was edited in DIR and in the repository: local, hub, or auto for an error.",
            "--card",
            metavar="auto|local|hub",
        ),
    ] = "auto"

    def read(self) -> PushOptions:
        """Return the options as the library takes them.

        Raises:
            UsageError: for a value that is not possible.
        """
        from vlm_cli.hub_ids import is_hub_id
        from vlm_cli.publishing.cards import CARDS
        from vlm_cli.publishing.push import PushOptions

        if self.card not in CARDS:
            raise UsageError(f"unknown --card {self.card!r}. Known: {', '.join(CARDS)}.")
        if wrong := next((x for x in self.dataset or () if not is_hub_id(x)), None):
            raise UsageError(f"--dataset expects ORG/NAME, got {wrong!r}.")
        return PushOptions(
            license=self.license,
            languages=self.language or (),
            datasets=self.dataset or (),
            tags=self.tag or (),
            results=[find_named(x) for x in self.results or ()],
            card=self.card,
        )


@flatten_options
def push(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Directory of a model.", show_default=False, autocompletion=complete_models),
    ],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository of the hub.", show_default=False)],
    *,
    private: Annotated[bool, option(HUB, "Make a private repository, if there is none yet.", "--private")] = False,
    force: Annotated[bool, option(HUB, "Send the model to a repository that holds something else.", "--force")] = False,
    dry_run: Annotated[
        bool, option(HUB, "Show what would be sent, and the card. Ask nothing of the hub.", "--dry-run")
    ] = False,
    about: CardOptions = CardOptions(),
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send a model to the Hugging Face hub: all of its files in one commit, with a model card.

    Log in with `hf auth login`, or set HF_TOKEN. If a push breaks, type the same command again: what arrived is not
    sent twice. What you wrote into the card stays, here and on the hub.

    Example: vlm push my-llava me/my-llava --private
    """
    options = about.read()
    from vlm_cli.publishing.push import prepare
    from vlm_cli.publishing.push import push as send
    from vlm_cli.publishing.repository import open_repository
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    folder = find_named(folder)
    shipment = prepare(folder, options)  # before anything is made on the hub
    address: str | None = None
    if not dry_run:
        with console.announced_steps(quiet) as announce:
            announce(f"opening {repository}")
            opened = open_repository(repository, option="ORG/NAME", private=private, force=force)
            shipment, address = send(folder, opened, options, advice=_advice(), progress=announce)
    _print(shipment, repository, address, as_json)


def _advice() -> str:
    return f"To go on, type the same command again: vlm {shlex.join(sys.argv[1:])}"


def _print(shipment: Shipment, repository: str, address: str | None, as_json: bool) -> None:
    sizes = shipment.sizes
    if as_json:
        facts = {"repository": repository, "commit": address, "files": sizes, "card": shipment.card}
        console.print_json({**facts, "notes": list(shipment.notes)})
    else:
        rows = [[name, f"{size:,}"] for name, size in sizes.items()]
        console.print_table(("File", "Bytes"), [*rows, ["total", f"{sum(sizes.values()):,}"]], total=True)
    for note in shipment.notes:
        console.note(f"Note: {note}")
    if address is None:
        if not as_json:
            console.print_lines(f"\n{shipment.card}")
        console.notify("Nothing was sent. Leave out --dry-run to send it.")
    else:
        console.notify(f'Sent to {address}. Next: vlm generate --model {repository} --image FILE "A photo of"')
