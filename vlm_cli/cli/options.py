"""Options that commands share, as dataclasses whose fields become options of the command that asks for one."""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from vlm_cli.cli.command import accept_old_names, make_option
from vlm_cli.composition import FAMILIES, CompositionRequest
from vlm_cli.errors import UsageError, first_line
from vlm_cli.flags import list_settings
from vlm_cli.models import hub_arguments
from vlm_cli.registry import suggest

__all__ = [
    "ComposeOptions",
    "DeviceOptions",
    "JsonOption",
    "ModelArgument",
    "SourceOptions",
    "StatsOption",
    "flatten_options",
]

COMPOSE, RUN = "Composition", "Model"  # headings in --help
HIDDEN = "hidden"  # marks a bundle whose options work, but do not stand in --help

MAX_SEED = 2**32 - 1  # the largest seed that NumPy takes

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
StatsOption = Annotated[bool, typer.Option("--stats", help="Write tokens, seconds and peak memory to stderr.")]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Directory, composition file, family name, hub id, or demo.", show_default=False
    ),
]


@dataclass(frozen=True)
class ComposeOptions:
    """A composition from flags."""

    family: Annotated[str | None, typer.Option(help=f"Preset: {', '.join(FAMILIES)}.", rich_help_panel=COMPOSE)] = None
    config: Annotated[Path | None, typer.Option(help="Composition file, YAML or JSON.", rich_help_panel=COMPOSE)] = None
    vision_encoder: Annotated[
        str | None,
        typer.Option(
            help="OpenCLIP name with a tag (ViT-L-14:openai), hf-hub:…, local-dir:…, or a JSON file.",
            rich_help_panel=COMPOSE,
        ),
    ] = None
    vision_tokenizer: Annotated[
        str | None, typer.Option(help="perceiver, qformer, linear or mlp.", rich_help_panel=COMPOSE)
    ] = None
    fusion: Annotated[
        str | None,
        typer.Option(help="cross-attention, llama-cross-attention or language-stream.", rich_help_panel=COMPOSE),
    ] = None
    language_model: Annotated[
        str | None, typer.Option(help="Hub id, directory, or GGUF file.", rich_help_panel=COMPOSE)
    ] = None
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=COMPOSE)
    ] = None
    trainable: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated parts that train: vision_encoder, vision_tokenizer, fusion, added_tokens, "
            "language_model.",
            rich_help_panel=COMPOSE,
        ),
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Any setting: vision_tokenizer.num_latents=32.", rich_help_panel=COMPOSE
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run code from the language model's repository.", rich_help_panel=COMPOSE
        ),
    ] = False

    @property
    def request(self) -> CompositionRequest:
        """The composition flags as the library takes them."""
        choices = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(CompositionRequest) if hasattr(self, f.name)
        }
        return CompositionRequest(**choices, overrides=self.set or ())


@dataclass(frozen=True)
class SourceOptions:
    """Which version of a built model, and whether its own code may run."""

    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the language model's own code from the directory.")
    ] = False

    @property
    def hub(self) -> dict[str, Any]:
        """Arguments for Transformers."""
        return hub_arguments(self.revision)


@dataclass(frozen=True)
class DeviceOptions:
    """Where and how a model runs."""

    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, or cuda:1.", rich_help_panel=RUN)] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=RUN)] = "auto"

    def resolve(self) -> tuple[str, Any]:
        """The device's name and torch's dtype, or "auto".

        Raises:
            UsageError: for one that is not there.
        """
        import torch

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            torch.empty(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"device {device!r} cannot be used here: {first_line(error)}. Give another, or --device auto."
            ) from None
        return device, resolve_dtype(self.dtype)


def resolve_dtype(name: str) -> Any:
    """torch's dtype, or "auto".

    Raises:
        UsageError: for another name.
    """
    import torch

    known = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UsageError(f"unknown dtype {name!r}.{suggest(name, known)} Known: {', '.join(known)}.")
    return known[name]


def flatten_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn each field of a command's dataclass parameters into an option of the command.

    `def build(out: str, device: DeviceOptions = DeviceOptions())` becomes a command with `--device` and `--dtype`,
    and `build` still receives one `DeviceOptions`. Annotations may be strings (`from __future__ import annotations`).
    `Annotated[DeviceOptions, HIDDEN]` keeps the options out of --help.
    """
    signature = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)
    hidden = {name for name, hint in hints.items() if HIDDEN in get_args(hint)[1:]}
    hints |= {name: get_args(hints[name])[0] for name in hidden}
    bundles = {name: hints[name] for name in signature.parameters if dataclasses.is_dataclass(hints[name])}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in bundles:
            parameters += _field_parameters(bundles[name], is_hidden=name in hidden)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))
    names = [parameter.name for parameter in parameters]
    repeated = {name for name in names if names.count(name) > 1}
    assert not repeated, f"{function.__name__}: two options have the name {', '.join(sorted(repeated))}"

    @functools.wraps(function)
    def command(**kwargs: Any) -> Any:
        for name, bundle in bundles.items():
            fields = [field.name for field in dataclasses.fields(bundle)]
            kwargs[name] = bundle(**{key: kwargs.pop(key) for key in fields})
        return function(**kwargs)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    for setting in (setting for bundle in bundles.values() for setting in list_settings(bundle)):
        accept_old_names(command, {old: setting.spelling for old in setting.flag.old_names})
    return command


def _field_parameters(bundle: Any, *, is_hidden: bool = False) -> list[inspect.Parameter]:
    """Turn the fields of a dataclass into parameters of a command."""
    annotations = get_type_hints(bundle, include_extras=True)
    annotations |= {setting.name: make_option(setting) for setting in list_settings(bundle)}
    if is_hidden:
        annotations = {name: _hide(annotation) for name, annotation in annotations.items()}
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotations[field.name]
        )
        for field in dataclasses.fields(bundle)
    ]


def _hide(annotation: Any) -> Any:
    """Return `Annotated[type, option]` with a copy of the option that does not stand in --help."""
    kind, option = get_args(annotation)
    option = copy.copy(option)
    option.hidden = True
    return Annotated[kind, option]
