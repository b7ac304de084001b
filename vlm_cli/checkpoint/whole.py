"""Compare a directory that is about to be loaded with its manifest, and say what is not as it was written."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_cli.checkpoint.inside import check_folder
from vlm_cli.errors import CheckpointError, VLMWarning
from vlm_cli.files import EXPORT_FILE, is_vlm_directory
from vlm_cli.manifest import MANIFEST_FILE, ManifestReport, compare_files, sign

__all__ = ["check_fetched_files", "check_files", "check_snapshot", "sign_directory"]

_SHOWN = 4  # names of edited files in one line


def check_files(folder: Path, *, verify: bool = False) -> ManifestReport | None:
    """Compare a directory with its manifest. Small files that differ give a `VLMWarning`.

    Args:
        folder: the directory.
        verify: whether to compare the hashes of large weight files, too.

    Returns:
        What was compared; None if the directory has no manifest.

    Raises:
        CheckpointError: if a weight file is missing or is another one, or the manifest cannot be read.
    """
    report = compare_files(folder, verify=verify)
    if report is not None:
        _tell(report, str(folder), f"vlm doctor {shlex.quote(str(folder))} --sign")
    return report


def check_fetched_files(name: str, keywords: Mapping[str, Any], *, verify: bool = False) -> ManifestReport | None:
    """Compare what was fetched of a hub repository with the repository's manifest; do nothing for a directory.

    Args:
        name: hub id.
        keywords: `revision`, … of Transformers' `from_pretrained`.
        verify: as of `check_files`.

    Returns:
        What was compared; None if there is no manifest.

    Raises:
        CheckpointError: as of `check_files`.
    """
    from transformers.utils.hub import cached_file

    from vlm_cli.trust import HUB_ARGUMENTS

    if Path(name).is_dir():
        return None
    places = {key: x for key, x in keywords.items() if key in HUB_ARGUMENTS}
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    try:
        path = cached_file(name, MANIFEST_FILE, **quiet, **places)
    except OSError:  # no such repository, which the loaders report
        return None
    return None if path is None else check_snapshot(Path(path).parent, name, verify=verify)


def check_snapshot(folder: Path, name: str, *, verify: bool = False) -> ManifestReport | None:
    """Compare the files that were fetched of a hub repository with its manifest; files that were not do not count.

    Args:
        folder: where they are.
        name: hub id.
        verify: as of `check_files`.

    Returns:
        What was compared; None if there is no manifest.

    Raises:
        CheckpointError: as of `check_files`.
    """
    report = compare_files(folder, verify=verify, may_lack=True)
    if report is not None:
        _tell(report, name, "vlm doctor DIR --sign, in a copy of the repository")
    return report


def sign_directory(folder: Path) -> int:
    """Write the manifest of a directory anew, for the files that it holds now, and return their number.

    Raises:
        CheckpointError: if vlm did not write the directory, or the manifest cannot be written.
    """
    check_folder(folder)
    if not (is_vlm_directory(folder) or (folder / EXPORT_FILE).is_file() or (folder / MANIFEST_FILE).is_file()):
        raise CheckpointError(
            f"{str(folder)!r} is no directory that vlm wrote, so it gets no manifest: config.json must say that its "
            "model_type is vlm."
        )
    return sign(folder)


def _tell(report: ManifestReport, name: str, command: str) -> None:
    """Raise an error for weights that are other ones, and warn of small files that were edited.

    Raises:
        CheckpointError: if a weight file is missing or is another one.
    """
    if report.wrong:
        more = f" (and {len(report.wrong) - 1} more)" if len(report.wrong) > 1 else ""
        raise CheckpointError(
            f"{name!r} does not hold the weights that it was written with: {report.wrong[0]}{more}. Copy or fetch it "
            f"again. If you changed it on purpose: {command}"
        )
    if report.edited:
        shown = ", ".join(report.edited[:_SHOWN])
        more = f" and {len(report.edited) - _SHOWN} more" if len(report.edited) > _SHOWN else ""
        verb = "differs" if len(report.edited) == 1 else "differ"
        warnings.warn(
            f"{shown}{more} of {name!r} {verb} from what was written. If you edited on purpose: {command}",
            VLMWarning,
            stacklevel=4,
        )
