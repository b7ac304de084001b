"""Open the tensors of a built model by its name."""

from __future__ import annotations

from collections.abc import Mapping

from vlm_cli.checkpoint.stored import StoredModel
from vlm_cli.models import load_meta_model, resolve_built_model

__all__ = ["open_stored"]


def open_stored(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    backbones: Mapping[str, str] | None = None,
    verify: bool = False,
) -> StoredModel:
    """Open the tensors of a model.

    Args:
        name: "demo", a directory or a hub id.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: whether the language model's own code may run.
        backbones: for a delta directory, part -> where its pretrained weights are now, if they moved.
        verify: whether to compare the hashes of all weight files with the manifest of the directory.

    Raises:
        VLMError: if there is no such model, or it cannot be read.
    """
    place = resolve_built_model(name, revision)
    model, _, _ = load_meta_model(place, trust_remote_code=trust_remote_code, revision=revision, verify=verify)
    return StoredModel.open(place, model, revision=revision, trust_remote_code=trust_remote_code, backbones=backbones)
