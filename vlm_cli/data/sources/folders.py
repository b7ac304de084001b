"""Directories of data: what `datasets` saves, and folders with the files of one or several splits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_cli.errors import DataError
from vlm_cli.plain_data import read_json

__all__ = ["ENDINGS", "choose_split", "find_shards"]

ENDINGS = (".parquet", ".arrow", ".feather", ".jsonl", ".ndjson", ".json", ".tar")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "indices.json")
_SPLIT = re.compile(r"(train(?:ing)?|valid(?:ation)?|val|dev|test(?:ing)?|eval(?:uation)?)(?![a-z])", re.IGNORECASE)
_MEANS = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"}


def find_shards(folder: Path) -> tuple[list[Path], str]:
    """Return the files of a directory's training data, and what the log tells of the choice.

    Raises:
        DataError: if it holds none, or several kinds or splits among which nothing decides.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _strings(_read(folder / "dataset_dict.json").get("splits"), folder)
        split = choose_split(splits, repr(str(folder)), f"--data {folder}/SPLIT")
        return _saved_files(folder / split), f"split {split}"
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved_files(folder), ""
    names = sorted(
        str(PurePosixPath(path.relative_to(folder)))
        for level in ("*", "*/*")
        for path in folder.glob(level)
        if path.is_file() and path.suffix.lower() in ENDINGS and path.name not in _ABOUT
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not names:
        raise DataError(
            f"{str(folder)!r} is a directory without files of records ({', '.join(ENDINGS)}). Give the JSONL file."
        )
    chosen, of_split = split_files(names, repr(str(folder)), f"--data '{folder}/SPLIT-*'")
    endings = sorted({PurePosixPath(name).suffix.lower() for name in chosen})
    if len(endings) > 1:
        raise DataError(
            f"{str(folder)!r} is a directory with files of several kinds. Give those of one: "
            f"--data '{folder}/*{endings[0]}'"
        )
    return [folder / name for name in chosen], f"split {of_split}" if of_split else ""


def split_files(names: Sequence[str], where: str, advice: str) -> tuple[list[str], str | None]:
    """Return those of some files that belong to the split to learn, and the split; all of them if none names a split.

    Raises:
        DataError: as in `choose_split`.
    """
    splits: dict[str | None, list[str]] = {}
    for name in names:
        splits.setdefault(_split_of(name), []).append(name)
    if set(splits) == {None}:
        return list(names), None
    split = choose_split([x for x in splits if x is not None], where, advice)
    return splits[split], split


def choose_split(splits: Sequence[str], where: str, advice: str) -> str:
    """Return the split to learn: the only one, or train.

    Raises:
        DataError: if there are several, and none is called train.
    """
    if len(splits) == 1 or "train" in splits:
        return splits[0] if len(splits) == 1 else "train"
    what = f"the splits {', '.join(splits)}" if splits else "no split"
    raise DataError(f"{where} holds {what}. Give one: {advice}")


def _split_of(name: str) -> str | None:
    """Name the split of a file by its folder or by how its name begins."""
    for part in PurePosixPath(name).parts:
        if found := _SPLIT.match(part):
            word = found[1].lower()
            return _MEANS.get(word, word)
    return None


def _saved_files(folder: Path) -> list[Path]:
    """Return the files of a directory that `save_to_disk` wrote."""
    entries = _read(folder / "state.json").get("_data_files")
    listed = [x.get("filename") if isinstance(x, dict) else x for x in entries] if isinstance(entries, list) else None
    return [folder / name for name in _strings(listed, folder)]


def _strings(value: Any, folder: Path) -> list[str]:
    """Check the names that a file lists: none leads out of its folder."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{str(folder)!r} lists no files of data. Save it again with `save_to_disk`.")
    for name in value:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise DataError(f"{str(folder)!r} lists {name!r}, which is no name of a file in it.")
    return list(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{str(path)!r} cannot be used: {error}.") from None
    return data if isinstance(data, dict) else {}
