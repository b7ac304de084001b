"""Load configurations, tokenizers, processors and models of Transformers. Their own code runs only if a user allows it.

A file can ask Transformers to run Python code:

    "auto_map": {"AutoTokenizer": ["words.Words", null]}     a class in words.py beside the file
    "auto_map": {"AutoConfig": "org/name--own.Config"}       a class in another repository
    "attn_implementation": "org/name"                        a kernel of the hub
    adapter_config.json                                      an adapter, for which PEFT imports a module by its name

Without an explicit answer Transformers asks on stdin whether to run the code, and takes a piped prompt for the answer.
So every loader of the package is called here, with an explicit `trust_remote_code`; tests/docs/test_trust.py checks
that no other module calls one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils.hub import cached_file

from vlm_cli.errors import CheckpointError, UntrustedCodeError
from vlm_cli.plain_data import read_json
from vlm_cli.shim import is_shim
from vlm_cli.timm_sizes import find_timm_problems

__all__ = [
    "HUB_ARGUMENTS",
    "CodeRequest",
    "check_code",
    "check_settings",
    "fill_vision_model",
    "find_vision_class",
    "list_arguments",
    "list_model_classes",
    "load_config",
    "load_generation_config",
    "load_image_processor",
    "load_language_model",
    "load_pretrained",
    "load_tokenizer",
    "make_config",
    "make_language_model",
    "match_weights",
    "name_pixels",
]

#: Arguments of `from_pretrained` that say where a file is.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")

_CONFIG, _TOKENIZER, _ADAPTER = "config.json", "tokenizer_config.json", "adapter_config.json"

#: Files of a VLM into which vlm writes no reference to code but that to the shim.
_PLAIN_FILES = ("generation_config.json", "processor_config.json", "preprocessor_config.json")

#: Keys that refer to code. Those of the second group name a kernel if the value has a slash, and a built-in otherwise.
_CODE_KEYS = ("auto_map", "custom_generate", "custom_pipelines")
_KERNEL_KEYS = tuple(
    f"{start}_implementation{end}" for start in ("attn", "_attn", "experts", "_experts") for end in ("", "_internal")
)


@dataclass(frozen=True)
class CodeRequest:
    """A file's request to run code.

    Attributes:
        file: name of the file.
        key: the setting that refers to the code; "" if the file itself does.
        code: the class, repository or module that the file names.
    """

    file: str
    key: str
    code: str

    def __str__(self) -> str:
        return f"{self.file} asks for {self.code}{f' ({self.key})' if self.key else ''}"


# -- what files ask for ------------------------------------------------------------------------------------------------


def check_code(location: str | Path, *, trust_remote_code: bool = False, **keywords: Any) -> None:
    """Check that the files of a VLM ask for no code, before one of them is loaded.

    `text_config` may name code if Transformers has the type itself; so may a tokenizer whose class Transformers has.
    Directories that `vlm build` wrote hold such names, and those of the shim, and the code is not run.

    Args:
        location: directory or hub id.
        trust_remote_code: whether the code may run.
        keywords: those of `HUB_ARGUMENTS` say where the files are; others are ignored.

    Raises:
        UntrustedCodeError: if a file asks for code that may not run.
    """
    if trust_remote_code:
        return
    found: list[CodeRequest] = []
    for file in (_CONFIG, _TOKENIZER, *_PLAIN_FILES):
        data = _read(location, file, keywords)
        if is_shim(data.get("auto_map")):
            del data["auto_map"]
        if file == _CONFIG:
            text = data.pop("text_config", None)
            found += _requests(file, data)
            found += [x for x in _requests(file, text) if x.key != "auto_map" or not _has_model_type(text)]
        elif file != _TOKENIZER or not _has_tokenizer_class(data):
            found += _requests(file, data)
    _refuse(location, [*found, *_adapter_requests(location, keywords)])


def check_settings(name: str, settings: Mapping[str, Any], *, trust_remote_code: bool = False) -> None:
    """Check that the settings of a language model name no kernel of the hub.

    Args:
        name: of the checkpoint, for the message.
        settings: what its config.json says of the language model.
        trust_remote_code: whether the kernel's code may run.

    Raises:
        UntrustedCodeError: if they name a kernel that may not run.
    """
    if not trust_remote_code:
        _refuse(name, [x for x in _requests(_CONFIG, settings) if x.key in _KERNEL_KEYS])


def _requests(file: str, data: Any, key: str = "") -> Iterator[CodeRequest]:
    """Find the requests for code in the content of a JSON file, in its nested settings too."""
    if isinstance(data, list):
        for value in data:
            yield from _requests(file, value, key)
    if not isinstance(data, Mapping):
        return
    for name, value in data.items():
        if name in _CODE_KEYS:
            yield from (CodeRequest(file, name, code) for code in _names(value))
        elif name in _KERNEL_KEYS:
            yield from (CodeRequest(file, name, code) for code in _names(value) if "/" in code)
        else:
            yield from _requests(file, value, name)


def _names(value: Any) -> list[str]:
    """Return the names in a value of `auto_map` and its like: one name, a list of names, or a mapping to either."""
    if isinstance(value, Mapping):
        return [name for x in value.values() for name in _names(x)]
    if isinstance(value, list):
        return [name for x in value for name in _names(x)]
    return [] if value in (None, "", False) else [str(value)]


def _has_model_type(text: Any) -> bool:
    """Say whether Transformers has the type of a `text_config`, so that it needs no code."""
    return isinstance(text, Mapping) and text.get("model_type", "llama") in CONFIG_MAPPING


def _has_tokenizer_class(data: Mapping[str, Any]) -> bool:
    """Say whether Transformers has the class that a tokenizer_config.json names, so that it needs no code."""
    name = str(data.get("tokenizer_class") or "").removesuffix("Fast")
    return bool(name) and any(tokenizer_class_from_name(x) is not None for x in (name, f"{name}Fast"))


def _adapter_requests(location: str | Path, keywords: Mapping[str, Any]) -> list[CodeRequest]:
    """Return the request of an adapter beside a model's weights, which Transformers would load with PEFT."""
    data = _read(location, _ADAPTER, keywords)
    return [CodeRequest(_ADAPTER, "", f"an adapter of {data.get('base_model_name_or_path')!r}")] if data else []


def _read(location: str | Path, file: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Read a JSON object from a directory or hub id; an empty one if there is none.

    The loaders report files that are missing or damaged.
    """
    hub = {key: keywords[key] for key in HUB_ARGUMENTS if key in keywords}
    try:
        path = cached_file(str(location), file, _raise_exceptions_for_missing_entries=False, **hub)
        if path is None or not Path(path).is_file():  # a pipe or a device would hold the command for ever
            return {}
        data = read_json(Path(path))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _refuse(location: str | Path, requests: Sequence[CodeRequest]) -> None:
    """Refuse requests for code; do nothing if there are none.

    Raises:
        UntrustedCodeError: naming the files and the code.
    """
    if requests:
        what = "; ".join(dict.fromkeys(map(str, requests)))
        raise UntrustedCodeError(
            f"{str(location)!r} wants to run code that vlm does not know: {what}. If you trust it, add "
            "--trust-remote-code, or trust_remote_code=True in Python."
        )


@contextmanager
def _explaining(location: str | Path, files: Sequence[str], keywords: Mapping[str, Any]) -> Iterator[None]:
    """Turn Transformers' advice to set `trust_remote_code` into an UntrustedCodeError that names file and code."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" not in str(error):
            raise
        found = [x for file in files for x in _requests(file, _read(location, file, keywords)) if x.key == "auto_map"]
        _refuse(location, found or [CodeRequest("a file", "", "a class of its own")])


# -- loaders -----------------------------------------------------------------------------------------------------------


def load_config(location: str | Path, *, trust_remote_code: bool = False, **keywords: Any) -> PreTrainedConfig:
    """Load a configuration of any type that Transformers knows.

    Args:
        location: directory or hub id.
        trust_remote_code: whether the configuration's own code may run.
        keywords: `revision`, `gguf_file`, … of Transformers' `from_pretrained`.

    Raises:
        UntrustedCodeError: if it needs code that may not run, or names a kernel of the hub.
        CheckpointError: if it would give a model of timm more than sizes.
    """
    if "gguf_file" not in keywords:
        settings = _read(location, _CONFIG, keywords)
        check_settings(str(location), settings, trust_remote_code=trust_remote_code)
        _check_timm(f"{_CONFIG} of {str(location)!r}", settings)
    with _explaining(location, [_CONFIG], keywords):
        config: PreTrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code, **keywords)
    return config


def make_config(model_type: str, **settings: Any) -> PreTrainedConfig:
    """Make the configuration of a type that Transformers knows. No code is loaded for it.

    Raises:
        ValueError: if Transformers does not know the type.
        CheckpointError: if the settings would give a model of timm more than sizes.
    """
    _check_timm(f"a configuration of type {model_type!r}", {"model_type": model_type, **settings})
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **settings)
    return config


def _check_timm(where: str, settings: Mapping[str, Any]) -> None:
    """Check that a configuration gives a model of timm no more than a name and sizes.

    Raises:
        CheckpointError: naming what else it would give.
    """
    if problem := next(find_timm_problems(settings), None):
        raise CheckpointError(f"{where} is not valid: {problem}")


def find_vision_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return Transformers' class for the vision models of a configuration; None if it has none. No code is loaded.

    Some vision halves of larger models have a class that no `Auto…` class lists. It stands beside the configuration.
    """
    classes = [x for x in list_model_classes(config) if name_pixels(x) is not None]
    # The class that others hold inside has not always the images as its main input.
    return min(classes, key=lambda x: x.main_input_name != "pixel_values", default=None)


def list_model_classes(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """List Transformers' classes for the models of a configuration, without those for one task. No code is loaded."""
    kind = type(config)
    if not kind.__module__.startswith("transformers."):
        return []
    listed = MODEL_MAPPING.get(kind, None)
    classes = list(listed) if isinstance(listed, (list, tuple)) else [listed]
    with suppress(ModuleNotFoundError):  # a type may have the models of another one
        module = import_module(kind.__module__.replace(".configuration_", ".modeling_"))
        beside = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, PreTrainedModel)]
        classes += [
            x for x in beside if x.config_class is kind and not re.search("For[A-Z][a-z]|PreTrained[MT]", x.__name__)
        ]
    return [x for x in classes if x is not None]


def name_pixels(model: type[PreTrainedModel]) -> str | None:
    """Return the argument in which a class takes images; None if it needs more than images, or none.

    Mllama's vision model needs more, and vlm gives it that.
    """
    first, *others = list_arguments(model)
    needed = [name for name, is_needed in others if is_needed and model.__name__ != "MllamaVisionModel"]
    return first[0] if first[0] in ("pixel_values", "hidden_states") and not needed else None


def list_arguments(model: type[PreTrainedModel]) -> list[tuple[str, bool]]:
    """List the arguments of a class's `forward`, and whether each is needed."""
    found = [x for x in signature(model.forward).parameters.values() if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)]
    return [(x.name, x.default is x.empty) for x in found[1:]] or [("", False)]


def find_causal_class(config: PreTrainedConfig) -> Any:
    """Return Transformers' causal language model that stands beside a configuration and that no `Auto…` class lists.

    The text halves of some larger models are such models (Kosmos-2). None if there is none. No code is loaded.
    """
    kind = type(config)
    if not kind.__module__.startswith("transformers.") or kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    module = import_module(kind.__module__.replace(".configuration_", ".modeling_"))
    models = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, PreTrainedModel)]
    return next((x for x in models if x.config_class is kind and x.__name__.endswith("ForCausalLM")), None)


def make_language_model(config: PreTrainedConfig) -> Any:
    """Make a causal language model with random weights, of a class that is known by now.

    Raises:
        UntrustedCodeError: if the configuration names a class of its own.
    """
    if (beside := find_causal_class(config)) is not None:
        return beside._from_config(config)
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        _refuse(config.name_or_path or config.model_type, [*_requests(_CONFIG, config.to_dict())])
        raise


def load_language_model(location: str | Path, *, trust_remote_code: bool = False, **keywords: Any) -> Any:
    """Load a causal language model with its weights.

    Args:
        location: directory or hub id.
        trust_remote_code: whether the model's own code, and an adapter beside it, may be loaded.
        keywords: of Transformers' `from_pretrained`.

    Raises:
        UntrustedCodeError: if it needs code that may not run.
    """
    if not trust_remote_code:
        _refuse(location, _adapter_requests(location, keywords))
    with _explaining(location, [_CONFIG], keywords):
        return AutoModelForCausalLM.from_pretrained(
            location, trust_remote_code=trust_remote_code, weights_only=True, **keywords
        )


def match_weights(model: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return which weights a model would miss, refuse and leave out, as Transformers' loading reports it.

    Args:
        model: a language model; it stays as it is.
        state: name -> tensor on the meta device.
    """
    loaded: Any = type(model).from_pretrained(
        None,
        config=copy.deepcopy(model.config),
        state_dict=dict(state),
        device_map="meta",
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    info: Mapping[str, Any] = loaded[1]
    return info


def fill_vision_model(
    cls: Any, config: PreTrainedConfig, state: Mapping[str, Any], **keywords: Any
) -> tuple[Any, Mapping[str, Any]]:
    """Make a vision model of tensors that were read before. No code is loaded for it.

    Args:
        cls: its class.
        config: its configuration.
        state: name -> tensor; Transformers renames those with names of earlier releases.
        keywords: of the class.

    Returns:
        The model in float32, and Transformers' report on missing, unexpected and mismatched tensors.
    """
    model, info = cls.from_pretrained(
        None,
        config=copy.deepcopy(config),
        state_dict=dict(state),
        dtype="float32",
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **keywords,
    )
    return model, info


def load_tokenizer(location: str | Path, *, trust_remote_code: bool = False, **keywords: Any) -> Tokenizer:
    """Load a tokenizer.

    Args:
        location: directory or hub id.
        trust_remote_code: whether the tokenizer's own code may run.
        keywords: of Transformers' `from_pretrained`.

    Raises:
        UntrustedCodeError: if it needs code that may not run.
    """
    with _explaining(location, [_TOKENIZER, _CONFIG], keywords):
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code, **keywords)
    return tokenizer


def load_image_processor(location: str | Path, **keywords: Any) -> Any:
    """Load how a vision model's images are prepared, with PIL. No code is loaded for it.

    Args:
        location: directory or hub id.
        keywords: `revision` of Transformers' `from_pretrained`.

    Raises:
        OSError: if there is no such file.
        UntrustedCodeError: if it needs code.
    """
    with _explaining(location, _PLAIN_FILES, keywords):
        return AutoImageProcessor.from_pretrained(location, backend="pil", trust_remote_code=False, **keywords)


def load_generation_config(location: str | Path, **keywords: Any) -> GenerationConfig:
    """Load how a model ends and samples its answers. No code is loaded for it.

    Raises:
        OSError: if there is no such file.
    """
    return GenerationConfig.from_pretrained(location, **keywords)


def load_pretrained(cls: Any, location: str | Path, *, trust_remote_code: bool = False, **keywords: Any) -> Any:
    """Load an object of a class that is known: a VLM, its processor, or a class of Transformers.

    Args:
        cls: the class.
        location: directory or hub id.
        trust_remote_code: whether code that its files name may run.
        keywords: of the class's `from_pretrained`.

    Raises:
        UntrustedCodeError: if a file needs code that may not run.
    """
    with _explaining(location, [_CONFIG, _TOKENIZER, *_PLAIN_FILES], keywords):
        return cls.from_pretrained(location, trust_remote_code=trust_remote_code, **keywords)
