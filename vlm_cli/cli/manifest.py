"""What `vlm doctor` does with the manifest of a model's directory."""

from __future__ import annotations

from pathlib import Path

from vlm_cli.cli import console
from vlm_cli.composition import Composition
from vlm_cli.errors import UsageError
from vlm_cli.manifest import MANIFEST_FILE
from vlm_cli.printable import count_of

__all__ = ["compare_files", "sign_files"]


def compare_files(location: str, verbose: bool) -> None:
    """Compare the files of a directory with its manifest, hashes of weights included.

    Args:
        location: the directory; the files of a hub id are compared after they are fetched.
        verbose: whether to say on stderr how many files were compared.

    Raises:
        CheckpointError: if a weight file is another one.
    """
    from vlm_cli.checkpoint.whole import check_files

    if not Path(location).is_dir():
        return
    report = check_files(Path(location), verify=True)
    if verbose and report is None:
        console.notify(f"Files: no {MANIFEST_FILE} says what was written. To write one: vlm doctor DIR --sign")
    elif verbose and report is not None and not report.edited:
        console.notify(f"Files: {count_of(report.hashed, 'file')} with the hashes that were written.")


def sign_files(model: Composition | str, as_json: bool) -> None:
    """Write the manifest of a directory anew, and print how many files it names.

    Raises:
        UsageError: if the model is no directory.
        CheckpointError: if vlm did not write the directory, or the manifest cannot be written.
    """
    if not isinstance(model, str) or not Path(model).is_dir():
        raise UsageError("--sign needs the directory of a built model: vlm doctor DIR --sign")
    from vlm_cli.checkpoint.whole import sign_directory

    number = sign_directory(Path(model))
    if as_json:
        console.print_json({"model": model, "files": number})
    console.notify(f"Wrote {Path(model) / MANIFEST_FILE}, which names {count_of(number, 'file')}.")
