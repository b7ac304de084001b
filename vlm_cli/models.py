"""From a name to a model: the demo, a directory, a hub id, a family or a composition file.

    "demo"                 the model that ships with the package
    "./my-flamingo"        a directory that `vlm build` or `vlm train` wrote
    "ORG/NAME"             such a directory on the Hugging Face hub
    "flamingo"             a family: a composition, without weights
    "my-composition.yaml"  a composition file: without weights, too

Importing this module does not import torch: `resolve` answers before a command loads it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_cli.composition import FAMILIES, Composition, read_file
from vlm_cli.composition.request import CompositionRequest
from vlm_cli.errors import (
    CheckpointError,
    CompositionError,
    LanguageModelError,
    PluginError,
    UnknownNameError,
    UsageError,
    explain_reading,
)
from vlm_cli.hub_ids import check_hub_id
from vlm_cli.lookalike import find_named
from vlm_cli.offline import use_cache_without_network
from vlm_cli.registry import suggest

if TYPE_CHECKING:
    import torch

    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.processor import VLMProcessor

__all__ = [
    "DEMO",
    "compose",
    "hub_arguments",
    "load",
    "load_meta_model",
    "read_gate_values",
    "read_processor_of",
    "resolve",
    "resolve_built_model",
]

DEMO = Path(__file__).parent / "demo"  # the model that ships with the package


def compose(request: CompositionRequest, *layers: Mapping[str, Any]) -> Composition:
    """Make the composition of a request; `layers` lie between its family and its own choices.

    Raises:
        CompositionError: with all problems at once, parts that do not exist included.
    """
    try:
        return request.compose(*layers)
    except CompositionError as error:
        from vlm_cli.checkpoint.create import find_missing_parts

        raise CompositionError(error.problems + find_missing_parts(error)) from None


def resolve(model: str | None, request: CompositionRequest | None = None) -> Composition | str:
    """Find out what a name and composition choices mean: a composition, or the location of a built model.

    Args:
        model: the name; None means the request alone, or the demo if the request asks for nothing.
        request: choices that cover a family or a composition file; a built model takes none.

    Returns:
        A composition, or the directory or hub id of a built model.

    Raises:
        VLMError: if the name means nothing, or name and request contradict each other.
    """
    request = request or CompositionRequest()
    if model is None:
        return compose(request) if request.flags else str(DEMO)
    path = find_named(model)
    if model == DEMO.name and not path.is_dir():
        path = DEMO
    if model in FAMILIES and not path.is_dir():
        if request.family not in (None, model):
            raise UsageError(f"{model!r} and --family {request.family} name two families. Choose one.")
        return compose(replace(request, family=model))
    if path.is_file():
        if path.suffix not in (".yaml", ".yml", ".json"):
            raise UsageError(f"{model!r} is no composition: expected a .yaml or .json file, or a directory.")
        return compose(request, read_file(path))
    if not path.is_dir() and "/" not in model:
        nearby = [str(config.parent) for config in Path().glob("*/config.json")]
        raise UnknownNameError(
            f"unknown model {model!r}: no such file or directory, and no family."
            f"{suggest(model, [*nearby, *FAMILIES, DEMO.name])} Families: {', '.join(FAMILIES)}. Bundled: {DEMO.name}."
        )
    if not path.is_dir():
        check_hub_id(model, "a directory that `vlm build` wrote")
        use_cache_without_network()
    elif request.revision is not None:
        raise UsageError(f"--revision is for hub ids, and {model!r} is a directory. Leave it out.")
    if request.flags:
        raise CompositionError(
            f"{model!r} is built already, so {request.flags[0]} has no effect. Leave it out, or start from its "
            f"composition: {path / 'composition.yaml'}."
        )
    return str(path) if path.is_dir() else model


def resolve_built_model(model: str | None, revision: str | None = None) -> str:
    """Find the directory or hub id of a model that has weights; None means the demo.

    Raises:
        VLMError: if the name means nothing, or a composition without weights.
    """
    found = resolve(model, CompositionRequest(revision=revision))
    if isinstance(found, str):
        return found
    flag = "--family" if model in FAMILIES else "--config"
    raise CompositionError(f"{model!r} is a composition without weights. Build it first: vlm build OUT {flag} {model}")


def hub_arguments(revision: str | None) -> dict[str, Any]:
    """Return the arguments of Transformers' `from_pretrained` for a branch, tag or commit; None adds no argument."""
    return {} if revision is None else {"revision": revision}


def load(
    name: str = DEMO.name,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    backbones: Mapping[str, str] | None = None,
    allow_hosts: Collection[str] = (),
    verify: bool = False,
    **keywords: Any,
) -> tuple[VLM, VLMProcessor]:
    """Load a model, in evaluation mode, and its processor.

        model, processor = vlm_cli.load("demo")

    Args:
        name: "demo", a directory that `vlm build` or `vlm train` wrote, or a hub id of such a directory.
        dtype: of the weights, such as torch.bfloat16; "auto" keeps the dtype of the files.
        device: where the model goes, such as "cuda"; a `device_map` among the keywords replaces it. "auto" spreads the
            decoder layers over GPUs, memory and disk, as `max_memory` or else the free memory allows.
        trust_remote_code: whether the language model's own code from the directory may run.
        revision: branch, tag or commit of a hub id.
        backbones: for a delta directory, part -> where its pretrained weights are now, if they moved.
        allow_hosts: for a delta directory, hosts that its backbones may come from beside the hub.
        verify: whether to compare the hashes of all weight files with the manifest of the directory.
        keywords: `token`, `cache_dir`, `local_files_only`, … of Transformers' `from_pretrained`.

    Raises:
        UnknownNameError: if there is no such model.
        CompositionError: if the name is a family or a composition file, which has no weights.
        CheckpointError: if the files cannot be read, lack tensors, or are not the weights that were written.
    """
    from vlm_cli.checkpoint import directory

    return directory.load(
        resolve_built_model(name, revision),
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        backbones=backbones,
        allow_hosts=allow_hosts,
        verify=verify,
        **hub_arguments(revision),
        **keywords,
    )


def load_meta_model(
    chosen: Composition | str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    verify: bool = False,
) -> tuple[VLM, torch.dtype, VLMProcessor | None]:
    """Make a model on the meta device, where tensors have shapes and no bytes.

    Returns:
        The model, the dtype that its weights have or would have, and its processor; None for a built model, whose
        processor `read_processor_of` reads, and for a language model without a tokenizer.

    Raises:
        VLMError: if a part cannot be found, or the parts do not fit.
    """
    import torch

    from vlm_cli.checkpoint.create import plan
    from vlm_cli.checkpoint.directory import read_config, read_generation_config
    from vlm_cli.checkpoint.size_limits import limited_size
    from vlm_cli.checkpoint.whole import check_fetched_files
    from vlm_cli.modeling.config import stored_dtype
    from vlm_cli.modeling.meta import meta_device
    from vlm_cli.modeling.vlm import VLM

    if isinstance(chosen, Composition):
        blueprint = plan(chosen, trust_remote_code=trust_remote_code, need_tokenizer=False)
        dtype = stored_dtype(blueprint.config.get_text_config()) or torch.float32
        return blueprint.meta_model, dtype, blueprint.processor if blueprint.tokenizer else None
    hub = hub_arguments(revision)
    config = read_config(chosen, trust_remote_code=trust_remote_code, verify=verify, **hub)
    check_fetched_files(chosen, hub, verify=verify)
    try:
        with limited_size(repr(chosen)), meta_device():
            model = VLM(config)
    except (CheckpointError, PluginError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"config.json of {chosen!r} describes no model that can be built. Check its composition, text_config and "
            f"vision_config: {explain_reading(error)}."
        ) from error
    if config.adapters:
        from vlm_cli.checkpoint.adapters import attach_adapters

        with meta_device():
            attach_adapters(chosen, model, weights=False, **hub)
    model.generation_config = read_generation_config(chosen, **hub) or model.generation_config
    return model, stored_dtype(config) or torch.float32, None


def read_processor_of(
    chosen: Composition | str, revision: str | None = None, *, trust_remote_code: bool = False
) -> VLMProcessor:
    """Read the processor of a built model.

    Raises:
        VLMError: if it has none, or `chosen` is a composition whose language model has no tokenizer.
    """
    if isinstance(chosen, Composition):
        raise LanguageModelError(
            f"language model {chosen.language_model.name!r} has no tokenizer. Give one: "
            "--set language_model.tokenizer=DIRECTORY_OR_HUB_ID"
        )
    from vlm_cli.checkpoint.directory import read_processor

    return read_processor(chosen, trust_remote_code=trust_remote_code, **hub_arguments(revision))


def read_gate_values(chosen: Composition | str, model: VLM, revision: str | None = None) -> dict[str, float]:
    """Return tanh of each gate, or its mean size where a gate is a vector. Only the gates are read from the files."""
    names = list(model.gates())
    if isinstance(chosen, Composition):
        return dict.fromkeys(names, 0.0)
    from vlm_cli.checkpoint.delta import DELTA_FILE
    from vlm_cli.checkpoint.directory import read_tensors

    where = {"file": DELTA_FILE} if model.config.is_delta else {}
    found = read_tensors(chosen, [f"fusion.{name}" for name in names], **where, **hub_arguments(revision))
    opened = {name: x.float().tanh() for name, x in found.items()}
    return {name: float(x) if x.numel() == 1 else float(x.abs().mean()) for name, x in opened.items()}
