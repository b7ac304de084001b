"""The card that is sent: what the directory, the repository and the user say. What a person wrote stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import EvalResult, model_index_to_eval_results

from vlm_cli.errors import CheckpointError, UsageError
from vlm_cli.plain_data import read_text
from vlm_cli.printable import markdown_code
from vlm_cli.publishing.lineage import Lineage
from vlm_cli.publishing.results import Evaluation
from vlm_cli.report.card import METADATA
from vlm_cli.report.card_sections import Card, sign_section

__all__ = ["CARDS", "CARD_FILE", "CardFacts", "choose_card", "finish_card", "read_card"]

CARD_FILE = "README.md"
#: Which card counts where a person edited both.
CARDS = ("auto", "local", "hub")
_RECORD = "record"  # the section of this module; `vlm build` and `vlm train` write the section "model"
_LISTS = ("base_model", "datasets", "language", "tags")


@dataclass(frozen=True)
class CardFacts:
    """What a card tells beside the model's parts.

    Attributes:
        bases: repositories of the pretrained parts, or of the model with which training began.
        license: name of the hub for a licence; None if it is not known.
        datasets, languages, tags: of the metadata.
        lineage: the runs that made the model.
        evaluations: results of `vlm eval`.
    """

    bases: Sequence[str] = ()
    license: str | None = None
    datasets: Sequence[str] = ()
    languages: Sequence[str] = ()
    tags: Sequence[str] = ()
    lineage: Lineage = field(default_factory=Lineage)
    evaluations: Sequence[Evaluation] = ()

    def to_metadata(self) -> dict[str, Any]:
        """Return what the metadata gains, results aside."""
        found = {
            "license": self.license,
            "base_model": list(self.bases),
            "datasets": [*dict.fromkeys([*self.lineage.datasets, *self.datasets])],
            "language": list(self.languages),
            **METADATA,
            "tags": [*dict.fromkeys([*METADATA["tags"], *self.tags])],
        }
        return {key: value for key, value in found.items() if value}

    def to_section(self) -> str:
        """Return the text about training and results; empty if nothing is known."""
        lines: list[str] = []
        if self.lineage.rows:
            lines += ["## How it was trained", ""]
            lines += ["| stage | data | records | steps | learning rate | loss | held-out loss |"]
            lines += ["|---|---|--:|--:|--:|--:|--:|", *self.lineage.rows, ""]
        if self.evaluations:
            lines += ["## Evaluation", "", "| data | metric | value | 95 % interval | items |", "|---|---|--:|---|--:|"]
            lines += [row for x in self.evaluations for row in x.to_rows()]
            lines += ["", *(f"Measured with {markdown_code(x.command)}." for x in self.evaluations)]
        return "\n".join(lines)


def read_card(folder: Path) -> Card:
    """Read the card of a model's directory; an empty one if there is none.

    Raises:
        CheckpointError: if it cannot be read.
    """
    path = folder / CARD_FILE
    try:
        return parse_card(read_text(path), repr(str(path))) if path.exists() else Card({}, "")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the card {str(path)!r}: {error}.") from None


def parse_card(text: str, place: str) -> Card:
    """Read a card.

    Raises:
        CheckpointError: if its metadata cannot be read.
    """
    try:
        return Card.parse(text)
    except ValueError as error:
        raise CheckpointError(
            f"the card {place} cannot be read: {error}. Correct the part between its lines ---."
        ) from None


def choose_card(local: Card, remote: Card | None, which: str, repository: str) -> tuple[Card, list[str]]:
    """Choose the text that a person may have edited, here or on the hub, and join the metadata of both.

    Args:
        local: of the directory.
        remote: of the repository; None if it has none.
        which: of `CARDS`.
        repository: its name.

    Returns:
        The card, and notes for the user.

    Raises:
        UsageError: if a person edited both, and `which` is "auto".
    """
    if remote is None:
        return local, []
    if which == "auto" and remote.own_text and local.own_text and remote.own_text != local.own_text:
        raise UsageError(
            f"the card in {repository!r} and {CARD_FILE} of the directory hold different text that vlm did not write. "
            "Give --card local to send that of the directory, or --card hub to keep that of the repository."
        )
    if which == "hub" or (which == "auto" and remote.own_text and remote.own_text != local.own_text):
        card = remote
        for name, section in local.sections.items():
            if name in remote.sections:
                card = card.with_section(name, section)
        return (
            replace(card, metadata={**local.metadata, **remote.metadata}),
            [f"the text that somebody wrote into the card of {repository} stays; --card local replaces it."],
        )
    return replace(local, metadata={**remote.metadata, **local.metadata}), []


def finish_card(card: Card, facts: CardFacts) -> tuple[str, list[str]]:
    """Add facts to a card. What it says already counts: vlm adds keys, elements of lists, results and its own section.

    Returns:
        The text, and notes for the user.
    """
    notes = []
    if _RECORD in card.edited:
        notes.append(
            f"somebody edited what vlm wrote about training and results in {CARD_FILE}, so it stays. Delete it with "
            "the comments around it, and vlm writes it anew."
        )
    section = facts.to_section()
    card = card.with_section(_RECORD, sign_section(_RECORD, section) if section else card.sections.get(_RECORD, ""))
    metadata, added = dict(card.metadata), facts.to_metadata()
    for key, value in added.items():
        given = metadata.get(key)
        if key in _LISTS and given is not None:
            value = [*dict.fromkeys([*(given if isinstance(given, list) else [given]), *value])]
            metadata[key] = value if len(value) > 1 or isinstance(given, list) else given
        elif given is None:
            metadata[key] = value
    return f"---\n{_write(metadata, facts.evaluations)}\n---\n\n{card.body.strip()}\n", notes


def _write(metadata: Mapping[str, Any], evaluations: Sequence[Evaluation]) -> str:
    given = dict(metadata)
    results = _results(given.pop("model-index", None))
    new = {_key(x): x for evaluation in evaluations for x in evaluation.to_metadata()}
    results = [x for x in results if _key(x) not in new] + list(new.values())
    if results:
        given |= {"eval_results": results, "model_name": given.get("model_name") or "model"}
    return str(ModelCardData(ignore_metadata_errors=True, **given).to_yaml(original_order=[*metadata]))


def _results(index: Any) -> list[EvalResult]:
    try:
        return model_index_to_eval_results(index)[1] if index else []
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"model-index in the metadata of the card cannot be read: {error!r}. Correct it."
        ) from None


def _key(result: EvalResult) -> tuple[str, ...]:
    return result.dataset_name, result.dataset_type, result.metric_type
