"""Send a model's directory to the Hugging Face hub, as `vlm push` and `vlm train --push-to-hub` do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlm_cli.checkpoint.directory import read_config
from vlm_cli.checkpoint.run_record import RUN_FILE
from vlm_cli.errors import CheckpointError, UsageError, VLMError
from vlm_cli.manifest import compare_files
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.publishing.cards import CARD_FILE, CardFacts, choose_card, finish_card, parse_card, read_card
from vlm_cli.publishing.fetchable import check_places, completing_command
from vlm_cli.publishing.lineage import read_lineage
from vlm_cli.publishing.parts import agree_on_licence, languages_of, read_part
from vlm_cli.publishing.repository import Repository
from vlm_cli.publishing.results import read_evaluations
from vlm_cli.report.base_models import base_models
from vlm_cli.report.card_sections import Card

__all__ = ["PushOptions", "Shipment", "prepare", "push"]


@dataclass(frozen=True)
class PushOptions:
    """What the user says of the card.

    Attributes:
        license: name of the hub for a licence; None takes that of the parts, if all have the same.
        languages, datasets, tags: for the metadata of the card.
        results: files of `vlm eval --json`.
        card: whose text counts where a person edited both: "local", "hub", or "auto" for an error then.
    """

    license: str | None = None
    languages: Sequence[str] = ()
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    results: Sequence[Path] = ()
    card: str = "auto"


@dataclass(frozen=True)
class Shipment:
    """What is sent.

    Attributes:
        files: name in the repository -> file; the card aside.
        card: text of README.md.
        notes: what the user should know.
    """

    files: Mapping[str, Path]
    card: str
    notes: Sequence[str] = field(default=())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, the card included."""
        found = {name: path.stat().st_size for name, path in self.files.items()}
        return dict(sorted({**found, CARD_FILE: len(self.card.encode())}.items()))


def prepare(folder: Path, options: PushOptions, repository: Repository | None = None) -> Shipment:
    """Collect the files of a model's directory and write its card.

    Args:
        folder: the directory; nothing in it changes.
        options: what the user says.
        repository: where it goes, for the card there; without one, nothing is asked of the hub.

    Raises:
        VLMError: if the directory holds no model, or another one than it was written with, or the cards do not fit.
    """
    evaluations = read_evaluations(list(options.results))
    if not folder.is_dir():
        raise UsageError(f"there is no directory {str(folder)!r}. Give one that `vlm build` or `vlm train` wrote.")
    config = read_config(str(folder))
    check_places(folder, config)
    report = compare_files(folder)
    if report is not None and report.wrong:
        raise CheckpointError(f"{str(folder)!r} does not hold the weights that it was written with: {report.wrong[0]}.")
    remote = None
    if repository is not None and repository.card is not None:
        remote = parse_card(repository.card, f"of {repository.name!r}")
    card, notes = choose_card(read_card(folder), remote, options.card, repository.name if repository else "")
    parts, lineage = base_models(config.composition), read_lineage(folder)
    asks = repository is not None
    known = {name: read_part(name, repo, asks=asks) for name, repo in parts.items()}
    # A directory of another machine may have a name that a repository could have, too.
    started = {repo: read_part(repo, repo, asks=asks) for repo in lineage.bases}
    card = _without_bases(card, [repo for name, repo in parts.items() if repo and known[name] is None])
    if options.license is not None:
        card = replace(card, metadata={**card.metadata, "license": options.license})
    licence = card.metadata.get("license")
    if licence is None:
        licence, more = agree_on_licence(known, asks=asks)
        notes += more
    facts = CardFacts(
        bases=[
            *(repo for name, repo in parts.items() if repo and known[name] is not None and not config.random_weights),
            *(repo for repo, metadata in started.items() if metadata is not None),
        ],
        license=licence,
        datasets=options.datasets,
        languages=options.languages or languages_of(known[config.composition.language_model.name]),
        tags=options.tags,
        lineage=lineage,
        evaluations=evaluations,
    )
    text, more = finish_card(card, facts)
    return Shipment(_find_files(folder), text, [*notes, *more, *_tell_places(folder, config)])


def _without_bases(card: Card, repositories: Collection[str]) -> Card:
    """Take repositories that the hub does not have out of what `vlm build` wrote into the metadata."""
    metadata = dict(card.metadata)
    given = metadata.get("base_model")
    names = given if isinstance(given, list) else [given]
    left = [x for x in names if x not in repositories]
    if left != names:
        metadata["base_model"] = left
        if not left:
            del metadata["base_model"]
    return replace(card, metadata=metadata)


def push(
    folder: Path, repository: Repository, options: PushOptions, *, advice: str, progress: Callable[[str], None]
) -> tuple[Shipment, str]:
    """Send a model's directory in one commit. Its record of the run stays here, since it names folders of this machine.

    Args:
        folder: the directory.
        repository: where it goes.
        options: what the user says of the card.
        advice: what the user should type after an error of the hub.
        progress: called with the name of each step before it begins.

    Returns:
        What was sent, and the address of the commit.

    Raises:
        VLMError: as `prepare`, and if the hub does not take the files.
    """
    progress("writing the card")
    try:
        shipment = prepare(folder, options, repository)
    except VLMError as error:
        raise CheckpointError(f"{error} {advice}") from error
    progress(f"sending {sum(shipment.sizes.values()) / 1e6:,.1f} MB to {repository.name}")
    files: dict[str, Path | bytes] = {**shipment.files, CARD_FILE: shipment.card.encode()}
    return shipment, repository.send(files, message=f"Push {folder.resolve().name} with vlm", advice=advice)


def _find_files(folder: Path) -> dict[str, Path]:
    """Return the files of a directory, without hidden ones, the card and the record of the run.

    Raises:
        CheckpointError: for a link that leads out of the directory: nobody asked to publish what is there.
    """
    found, inside = {}, folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if not path.resolve().is_relative_to(inside):
            raise CheckpointError(f"{str(path)!r} leads out of the directory. Put the file there, or delete the link.")
        found[name.as_posix()] = path
    return {name: path for name, path in found.items() if name not in (CARD_FILE, RUN_FILE)}


def _tell_places(folder: Path, config: VLMConfig) -> list[str]:
    """Note that others fetch parts of a delta directory, or that a model names folders of this machine."""
    if config.is_delta:
        whole = completing_command(folder, config)
        return [f"this is a delta directory: others fetch its pretrained parts, or make it whole with {whole}"]
    named = [name.partition(":")[2] or name for name, repo in base_models(config.composition).items() if repo is None]
    local = [x for x in named if Path(x).is_absolute()]
    if not local:
        return []
    return [
        f"the card and the configuration name {' and '.join(local)} of this machine, where the parts came from. Build "
        "from hub ids to show those."
    ]
