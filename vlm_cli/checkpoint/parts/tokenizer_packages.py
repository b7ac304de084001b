"""Which packages a tokenizer needs if it has no tokenizer.json, but a file of SentencePiece or tiktoken.

A failure to read such a file has a message of its own for each package, and names the wrong one where SentencePiece's
file cannot be read: Transformers then tries tiktoken.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

__all__ = ["explain_missing_packages"]

#: Names of files that SentencePiece or tiktoken wrote, in the repositories of causal language models.
_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")

#: Module -> the package that brings it.
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
_TIKTOKEN = {"tiktoken": "tiktoken"}


def explain_missing_packages(location: str, revision: str | None = None) -> str | None:
    """Say which packages read a tokenizer and cannot be imported, and how to install them; None if none is needed.

    Args:
        location: a directory, or a hub id whose files are in the cache.
        revision: of the hub id.
    """
    if _find(location, "tokenizer.json", revision) is not None:
        return None
    file = next((found for name in _FILES if (found := _find(location, name, revision))), None)
    if file is None:
        return None
    is_sentencepiece = _is_sentencepiece(file)
    wanted = _SENTENCEPIECE if is_sentencepiece else _TIKTOKEN
    missing = [package for module, package in wanted.items() if not _can_import(module)]
    if is_sentencepiece and not missing and not _can_import("sentencepiece.sentencepiece_model_pb2"):
        missing = ["a newer protobuf"]  # SentencePiece brings code that protobuf made, and that older ones refuse
    if not missing:
        return None
    return (
        f"it has a {file.name} of {'SentencePiece' if is_sentencepiece else 'tiktoken'} and no tokenizer.json, and "
        f"needs {' and '.join(missing)}. Install what it needs: pip install 'vlm-cli[sentencepiece]'"
    )


def _can_import(module: str) -> bool:
    try:
        import_module(module)
    except Exception:  # not installed, or versions of two packages that do not fit
        return False
    return True


def _find(location: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a directory, or of a hub id in the cache."""
    here = Path(location)
    if here.is_dir():
        return here / name if (here / name).is_file() else None
    try:
        found = try_to_load_from_cache(location, name, revision=revision)
    except ValueError:  # no hub id
        return None
    return Path(found) if isinstance(found, str) else None


def _is_sentencepiece(file: Path) -> bool:
    """Tell SentencePiece's protocol buffer from tiktoken's lines of text."""
    with file.open("rb") as opened:
        return opened.read(1) == b"\n"  # the tag of the first piece
