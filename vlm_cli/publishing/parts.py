"""What the cards of a model's pretrained parts say: their licence, and the languages of the language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_cli.errors import CheckpointError
from vlm_cli.publishing.cards import CARD_FILE, read_card
from vlm_cli.publishing.repository import explained

__all__ = ["agree_on_licence", "languages_of", "read_part"]


def read_part(name: str, repository: str | None, *, asks: bool) -> Mapping[str, Any] | None:
    """Return the metadata of the card of a pretrained part; empty if there is none.

    Args:
        name: as `base_models` gives it: a directory, perhaps after its kind, or something that has no card.
        repository: of the hub.
        asks: whether to ask the hub. Without that, only its cache on this machine is read.

    Returns:
        None if the hub shows this user no such repository.

    Raises:
        CheckpointError: if the hub cannot be asked, or a card cannot be read.
    """
    if repository is None:
        folder = Path(name.partition(":")[2] or name)
        return read_card(folder).metadata if folder.is_dir() else {}
    if not asks:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repository, CARD_FILE)
        return read_card(Path(found).parent).metadata if isinstance(found, str) else {}
    with explained(CheckpointError, f"cannot ask the hub for {repository!r}", "Try again."):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            card = HfApi().model_info(repository).card_data
        except RepositoryNotFoundError:
            return None
    return {} if card is None else card.to_dict()


def agree_on_licence(parts: Mapping[str, Mapping[str, Any] | None], *, asks: bool) -> tuple[str | None, list[str]]:
    """Return the licence that all parts have, or a note that says which have another one or none that is known.

    Args:
        parts: name -> metadata of its card.
        asks: whether the hub was asked for them.
    """
    known = {name: (metadata or {}).get("license") for name, metadata in parts.items()}
    found = set(map(str, known.values()))
    if len(found) == 1 and not found & {"other", "None"}:
        return found.pop(), []
    shown = ", ".join(f"{name}: {licence or 'unknown'}" for name, licence in known.items())
    unasked = "" if asks else " A dry run does not ask the hub."
    words = f"the card names no licence, since vlm knows none that holds for all parts ({shown}).{unasked}"
    return None, [f"{words} Give one: --license NAME"]


def languages_of(metadata: Mapping[str, Any] | None) -> list[str]:
    """Return the languages that a card names."""
    found = (metadata or {}).get("language")
    return [str(x) for x in (found if isinstance(found, list) else [found] if found else [])]
