"""Options that several commands share: dataclasses whose fields become options of the command that takes one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from vlm_cli.cli import completion, console
from vlm_cli.cli.command import make_option, option
from vlm_cli.cli.spellings import accept_aliases, accept_old_names
from vlm_cli.composition import FAMILIES, PARTS, CompositionRequest
from vlm_cli.composition.tiling import TILE_LIMIT
from vlm_cli.errors import UsageError, first_line
from vlm_cli.flags import list_settings
from vlm_cli.lookalike import find_named
from vlm_cli.models import hub_arguments
from vlm_cli.registry import suggest
from vlm_cli.schema import show

if TYPE_CHECKING:
    import torch


__all__ = [
    "MAX_ROWS",
    "MAX_SEED",
    "MAX_WORKERS",
    "BackboneOptions",
    "ColumnsOption",
    "ComposeOptions",
    "DeviceOptions",
    "ExactOption",
    "ImageFolderOption",
    "JsonOption",
    "MaxPixelsOption",
    "MaxShardSizeOption",
    "MaxTilesOption",
    "MediaRootOption",
    "ModelArgument",
    "OverwriteOption",
    "PlacementOptions",
    "PrintOptions",
    "QuietOption",
    "SourceOptions",
    "StatsOption",
    "VerifyOption",
    "check_shard_size",
    "flatten_options",
    "resolve_dtype",
]

#: Headings of `--help`.
COMPOSE, RUN, OUTPUT = "Composition", "Model", "Output"
MAX_PIXELS_OF_ALL = 2**33  # that a user may allow for one image
HIDDEN = "hidden"  # marks a bundle whose options work, but do not stand in --help

MAX_SEED = 2**32 - 1  # NumPy takes no larger seed
MAX_ROWS = 65_536  # rows of a batch
MAX_WORKERS = 256  # processes that decode images
DTYPES = "auto|float32|bfloat16|float16"

JsonOption = Annotated[bool, option(OUTPUT, "Print the result as one JSON object.", "--json")]
ExactOption = Annotated[
    bool,
    option(OUTPUT, "Write whole numbers on a terminal, not 428.3 M; a pipe always gets them.", "--exact"),
]
QuietOption = Annotated[
    bool,
    option(OUTPUT, "Print neither notes nor progress on stderr.", "--quiet", "-q", callback=console.be_quiet),
]
OverwriteOption = Annotated[bool, option(OUTPUT, "Replace OUT, if vlm wrote it.", "--overwrite")]
MaxShardSizeOption = Annotated[
    str,
    option(OUTPUT, "Largest size of one weight file, in MB or GB, such as 500MB.", metavar="SIZE"),
]
NoShimOption = Annotated[
    bool,
    option(
        OUTPUT,
        "Leave vlm_shim.py out of OUT: the file through which other programs open a VLM with trust_remote_code=True.",
        "--no-shim",
    ),
]
StatsOption = Annotated[
    bool,
    option(OUTPUT, "Print tokens, seconds and peak memory on stderr.", "--stats"),
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Compare the hashes of all weight files with the model's manifest before use. Without this option, vlm "
        "compares their sizes.",
        rich_help_panel=RUN,
    ),
]


def _find_folder(path: Path | None) -> Path | None:
    return None if path is None else find_named(path)


MediaRootOption = Annotated[
    Path | None,
    option(
        "Prompt",
        "Read images only from the folder DIR: a path or link that leads out of it is an error. Without this "
        "option, image paths may lead anywhere.",
        metavar="DIR",
        callback=_find_folder,
    ),
]
ImageFolderOption = Annotated[
    Path | None,
    option(
        "Data",
        "Start relative paths of pictures at DIR instead of the folder of FILE.",
        metavar="DIR",
        callback=_find_folder,
    ),
]
ColumnsOption = Annotated[
    str | None,
    option(
        "Data",
        "Say which columns of FILE count: prompt=question,completion=answer,images=image. Records of vlm, LLaVA "
        "conversations, chat messages and texts of FineVision are recognised without it.",
        metavar="NAME=COLUMN,…",
    ),
]
MaxPixelsOption = Annotated[
    int | None,
    option(
        "Prompt",
        "Decode at most N pixels of one image; the default is 89,478,485. A larger JPEG file is read at a smaller "
        "size, and any other larger image is an error.",
        metavar="N",
        min=1,
        max=MAX_PIXELS_OF_ALL,
    ),
]
MaxTilesOption = Annotated[
    int | None,
    option(
        "Prompt",
        "Cut one image into at most N tiles, for a model that reads images in tiles; the default is the model's own "
        "number. Fewer tiles take fewer positions, and show less detail.",
        metavar="N",
        min=1,
        max=TILE_LIMIT,
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Directory or hub id of a built model, a family, a composition file, or demo.",
        show_default=False,
        autocompletion=completion.complete_subjects,
    ),
]


@dataclass(frozen=True)
class ComposeOptions:
    """The flags of a composition."""

    family: Annotated[
        str | None,
        option(
            COMPOSE,
            f"Start from a family: {', '.join(FAMILIES)}.",
            metavar="FAMILY",
            autocompletion=completion.complete_families,
        ),
    ] = None
    config: Annotated[
        Path | None,
        option(
            COMPOSE,
            "Composition file (YAML or JSON), or - for stdin; its settings replace those of the family.",
            metavar="FILE",
        ),
    ] = None
    vision_encoder: Annotated[
        str | None,
        option(
            COMPOSE,
            "Vision encoder: an OpenCLIP name, with the tag of its weights (ViT-L-14:openai), hf:ORG/NAME or "
            "hf:DIRECTORY of Transformers, timm:NAME.TAG, hf-hub:ORG/NAME or local-dir:FOLDER of OpenCLIP, or an "
            "OpenCLIP JSON file.",
            metavar="NAME[:TAG]",
            autocompletion=completion.complete_encoders,
        ),
    ] = None
    vision_tokenizer: Annotated[
        str | None,
        option(
            COMPOSE,
            "Vision tokenizer: perceiver, qformer, linear, mlp, c-abstractor, latent-attention, or a name that an "
            "installed package adds.",
            metavar="NAME",
            autocompletion=completion.complete_tokenizers,
        ),
    ] = None
    fusion: Annotated[
        str | None,
        option(
            COMPOSE,
            "Fusion: cross-attention, llama-cross-attention, language-stream, or a name that an installed "
            "package adds.",
            metavar="NAME",
            autocompletion=completion.complete_fusions,
        ),
    ] = None
    language_model: Annotated[
        str | None,
        option(
            COMPOSE,
            "Language model of Transformers: a hub id, a directory, or a GGUF file.",
            metavar="NAME",
            autocompletion=completion.complete_language_models,
        ),
    ] = None
    revision: Annotated[
        str | None,
        option(
            COMPOSE,
            "Branch, tag or commit on the hub: of MODEL or CHECKPOINT if that is a hub id, otherwise of the "
            "language model.",
            metavar="REVISION",
        ),
    ] = None
    trainable: Annotated[
        str | None,
        option(
            COMPOSE,
            f"Parts that training changes; all others stay frozen. Any of: {', '.join(PARTS)}.",
            metavar="PART,…",
            autocompletion=completion.complete_parts,
        ),
    ] = None
    set: Annotated[
        list[str] | None,
        option(
            COMPOSE,
            "Change one setting of the composition, such as vision_tokenizer.num_latents=32; may be given several "
            "times.",
            metavar="NAME=VALUE",
            autocompletion=completion.complete_settings,
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        option(COMPOSE, "Run Python code that comes with the language model.", "--trust-remote-code"),
    ] = False

    @property
    def request(self) -> CompositionRequest:
        """The composition flags as the library takes them."""
        choices = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(CompositionRequest) if hasattr(self, f.name)
        }
        return CompositionRequest(**choices, overrides=self.set or ())


@dataclass(frozen=True)
class PrintOptions:
    """How a command prints answers."""

    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print an answer when it is complete, not word by word.")
    ] = False
    as_json: JsonOption = False
    stats: StatsOption = False
    quiet: QuietOption = False

    @property
    def streams(self) -> bool:
        """Whether an answer is printed while the model writes it."""
        return not (self.no_stream or self.as_json)


@dataclass(frozen=True)
class BackboneOptions:
    """Where the backbones of a delta directory may come from."""

    backbone: Annotated[
        list[str] | None,
        option(
            RUN,
            "For a delta directory: read the pretrained weights of PART (vision_encoder or language_model) from "
            "PATH; may be given several times.",
            metavar="PART=PATH",
        ),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        option(
            RUN,
            "Let a delta directory's backbones come from HOST, and let HOST have an address of an internal "
            "network; may be given several times.",
            metavar="HOST",
        ),
    ] = None

    @property
    def backbones(self) -> dict[str, str]:
        """Where the user says that pretrained weights are: part -> path.

        Raises:
            UsageError: for a value that is not PART=PATH.
        """
        found = {}
        for given in self.backbone or ():
            part, equals, path = given.partition("=")
            if not equals or not path or part.replace("-", "_") not in ("vision_encoder", "language_model"):
                raise UsageError(f"--backbone expects vision_encoder=PATH or language_model=PATH, got {given!r}.")
            found[part.replace("-", "_")] = path
        return found

    @property
    def allow_hosts(self) -> tuple[str, ...]:
        """Hosts that may be asked although the table of OpenCLIP does not name them, or their address is internal."""
        return tuple(self.allow_host or ())

    @property
    def places(self) -> dict[str, Any]:
        """What the user says of backbones, as arguments of `vlm_cli.load`; nothing if the user gave no option."""
        given = {"backbones": self.backbones, "allow_hosts": self.allow_hosts}
        return {name: x for name, x in given.items() if x}


@dataclass(frozen=True)
class SourceOptions(BackboneOptions):
    """Which version of a built model, and what its files may run and reach."""

    revision: Annotated[
        str | None,
        option(RUN, "Branch, tag or commit of the model, if it is a hub id.", metavar="REVISION"),
    ] = None
    trust_remote_code: Annotated[
        bool,
        option(RUN, "Run Python code that comes with the language model.", "--trust-remote-code"),
    ] = False

    verify: VerifyOption = False

    @property
    def places(self) -> dict[str, Any]:
        """What the user says of the model's files, as arguments of `vlm_cli.load`; nothing without an option."""
        return {**super().places, **({"verify": True} if self.verify else {})}

    @property
    def hub(self) -> dict[str, Any]:
        """Arguments of Transformers' `from_pretrained`."""
        return hub_arguments(self.revision)


@dataclass(frozen=True)
class DeviceOptions:
    """Where a model runs, and in which dtype."""

    device: Annotated[
        str,
        option(
            RUN,
            "Device that runs the model: cpu, cuda, cuda:1, mps, or auto for the first of cuda, mps and cpu that "
            "this machine has.",
            metavar="DEVICE",
            autocompletion=completion.complete_devices,
        ),
    ] = "auto"
    dtype: Annotated[
        str,
        option(
            RUN,
            "Dtype of the weights in memory; auto keeps that of the files.",
            metavar=DTYPES,
            autocompletion=completion.complete_dtypes,
        ),
    ] = "auto"

    def resolve(self) -> tuple[str, torch.dtype | str]:
        """Return the device's name and torch's dtype, or "auto".

        Raises:
            UsageError: if this machine does not have the device, or there is no such dtype.
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


@dataclass(frozen=True)
class PlacementOptions(DeviceOptions):
    """Where a model runs that answers: on one device, or spread over several."""

    device_map: Annotated[
        str | None,
        option(
            RUN,
            "auto spreads the language model's layers over all GPUs, then the memory, then the files on disk.",
            metavar="auto",
        ),
    ] = None
    max_memory: Annotated[
        str | None,
        option(
            RUN,
            "What weights may take of each device with --device-map, such as 0=20GB,cpu=8GB; the default is most of "
            "what is free.",
            metavar="DEVICE=SIZE,…",
        ),
    ] = None

    @property
    def spread(self) -> dict[str, Any]:
        """The keywords of `load` that spread the model; none if it goes to one device.

        Raises:
            UsageError: for another value, or an option that has no effect.
        """
        if self.device_map is None:
            if self.max_memory is not None:
                raise UsageError("--max-memory has no effect without --device-map auto.")
            return {}
        if self.device_map != "auto":
            raise UsageError(f"--device-map knows auto, got {show(self.device_map)}. For one device: --device NAME.")
        if self.device != "auto":
            raise UsageError("--device and --device-map exclude each other. Give one of them.")
        if self.max_memory is None:
            return {"device_map": "auto"}
        sizes: dict[int | str, str] = {}
        for part in self.max_memory.split(","):
            found = re.fullmatch(r"\s*(cpu|\d{1,3})\s*=\s*(\d{1,6}\s*[kKMGT]i?B)\s*", part)
            if found is None:
                raise UsageError(
                    f"--max-memory expects DEVICE=SIZE with cpu or the number of a GPU, such as 0=20GB,cpu=8GB, got "
                    f"{show(part)}."
                )
            sizes[found[1] if found[1] == "cpu" else int(found[1])] = found[2].replace(" ", "")
        return {"device_map": "auto", "max_memory": sizes}


def resolve_dtype(name: str) -> torch.dtype | str:
    """Return torch's dtype of a name; "auto" stays "auto".

    Raises:
        UsageError: for another name.
    """
    import torch

    known: dict[str, torch.dtype | str] = {
        "auto": "auto",
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in known:
        raise UsageError(f"unknown dtype {name!r}.{suggest(name, known)} Known: {', '.join(known)}.")
    return known[name]


def check_shard_size(text: str) -> None:
    """Check that Transformers can read the value of --max-shard-size.

    Raises:
        UsageError: if it cannot.
    """
    if not re.fullmatch(r"[1-9]\d{0,5}\s*[kKMGT]i?B", text):
        raise UsageError(f"--max-shard-size expects a number of MB or GB, as 5GB or 500MB, got {show(text)}.")


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
        accept_aliases(command, {alias: setting.spelling for alias in setting.flag.aliases})
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
