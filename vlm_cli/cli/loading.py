"""From the model that a user asked for to a model that is ready to answer."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from vlm_cli.cli import console
from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_models, complete_quantizations
from vlm_cli.cli.options import RUN, PlacementOptions, SourceOptions
from vlm_cli.composition import Composition
from vlm_cli.errors import UsageError
from vlm_cli.manifest import MANIFEST_FILE
from vlm_cli.modeling.quantizations import QUANTIZATIONS
from vlm_cli.models import DEMO, resolve_built_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlm_cli.media import LoadedClip, LoadedImage
    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.processor import VLMProcessor
    from vlm_cli.writing.choice import TemplateChoice
    from vlm_cli.writing.writer import PromptWriter

__all__ = ["LoadedModel", "ModelOption", "ModelRequest", "QuantizeOption", "keep_collecting", "notify_of_random_tower"]

ModelOption = Annotated[
    str,
    option(
        RUN,
        "Directory that `vlm build` wrote, or hub id.",
        "--model",
        "-m",
        metavar="MODEL",
        autocompletion=complete_models,
    ),
]
QuantizeOption = Annotated[
    str | None,
    option(
        RUN,
        "Keep the weights that each token reads in fewer bits: int8, int4 (NF4) or fp8. Answers change a little. "
        "int8 on a CPU needs nothing; the others need vlm-cli[quantize].",
        "--quantize",
        metavar="NAME",
        autocompletion=complete_quantizations,
    ),
]


_SCENE = (64, 64)  # pixels of every scene that the demo was trained on


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to answer.

    Attributes:
        model: in evaluation mode, on its device.
        processor: of the model.
        device: that the user chose, or that was found.
        seconds: that loading took.
    """

    model: VLM
    processor: VLMProcessor
    device: str
    seconds: float

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def writer(
        self, choice: TemplateChoice, *, special_tokens: bool, system: str | None = None, tells: bool = True
    ) -> PromptWriter:
        """Make what turns prompts into tokens, and tell the user of a chat template that is not used.

        Raises:
            UsageError: if the tokenizer has no chat template to write with.
        """
        from vlm_cli.writing.writer import PromptWriter

        writer = PromptWriter(self.processor, choice, system=system, parse_special_tokens=special_tokens)
        if tells and writer.note:
            console.note(writer.note)
        return writer


@dataclass(frozen=True)
class ModelRequest:
    """Which model a user asked for, and how the model is to run.

    Attributes:
        name: what the user typed.
        directory: where the model is; or its hub id.
        devices: device and dtype.
        source: version of a hub id, and whether its own code may run.
        quantize: name of a quantization; None for the weights as they are.
        compile: compile the step that writes a token.
        max_tiles: the most tiles of one image; None for the model's own number.
    """

    name: str
    directory: str
    devices: PlacementOptions
    source: SourceOptions
    quantize: str | None = None
    compile: bool = False
    max_tiles: int | None = None

    @classmethod
    def of(
        cls,
        name: str,
        devices: PlacementOptions,
        source: SourceOptions,
        *,
        quantize: str | None = None,
        compile: bool = False,
        max_tiles: int | None = None,
    ) -> ModelRequest:
        """Find the model, without loading it.

        Raises:
            VLMError: if it does not exist, or cannot run as the user wants.
        """
        if quantize not in (None, *QUANTIZATIONS):
            raise UsageError(f"unknown --quantize {quantize!r}. Known: {', '.join(QUANTIZATIONS)}.")
        if devices.spread and (quantize or compile):
            flag = "--quantize" if quantize else "--compile"
            raise UsageError(f"{flag} needs the whole model on one device. Leave out {flag} or --device-map.")
        return cls(name, resolve_built_model(name, source.revision), devices, source, quantize, compile, max_tiles)

    def load(self) -> LoadedModel:
        """Load the model, and say on stderr which model runs where.

        Raises:
            VLMError: if the files, the device or this machine do not allow it.
        """
        from vlm_cli.quiet import silence_libraries

        silence_libraries()
        from vlm_cli.checkpoint.directory import load
        from vlm_cli.checkpoint.placement import describe_places
        from vlm_cli.modeling.acceleration import accelerate
        from vlm_cli.modeling.generation_settings import inherit_settings

        device, dtype = self.devices.resolve()
        started = time.monotonic()
        model, processor = load(
            self.directory,
            dtype=dtype,
            device=device,
            trust_remote_code=self.source.trust_remote_code,
            **self.source.places,
            **self.source.hub,
            **self.devices.spread,
        )
        self.limit_tiles(processor)
        # Directories that an earlier vlm wrote may hold settings under which greedy answers are not greedy, or fail.
        model.generation_config, left_out = inherit_settings(model.generation_config)
        accelerate(model, quantize=self.quantize, compile=self.compile)
        loaded = LoadedModel(model, processor, device, time.monotonic() - started)
        places = describe_places(model) if self.devices.spread else None
        how = ", ".join([loaded.dtype, *([self.quantize] if self.quantize else [])])
        console.note(f"Model {self.name} on {places or device}, {how}")
        if left_out:
            console.note(f"Note: generation_config.json sets {', '.join(left_out)}, which vlm does not use.")
        return loaded

    def limit_tiles(self, processor: VLMProcessor) -> None:
        """Make a processor cut images into no more tiles than the user wants.

        Raises:
            CompositionError: if the model does not cut images, or knows no text for so many tiles.
        """
        if self.max_tiles is not None:
            processor.image_processor.limit_tiles(self.max_tiles)

    @property
    def is_demo(self) -> bool:
        return self.directory == str(DEMO)

    def warn_of_photographs(self, images: Sequence[LoadedImage | LoadedClip]) -> None:
        """Tell users of the demo what it cannot do, if an image has another size than the scenes that it knows."""
        if self.is_demo and any((image.width, image.height) != _SCENE for image in images):
            console.note("Note: demo knows drawn scenes only; about a photograph it is confident and wrong.")

    def digest(self) -> str:
        """Return a text that changes when the model changes.

        It is a digest of names, sizes and times of the files in a directory, or the commit of a hub id.
        """
        import hashlib

        folder = Path(self.directory)
        if folder.is_dir():
            without = ("README.md", MANIFEST_FILE)
            paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in without)
            facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
            return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        from vlm_cli.checkpoint.directory import read_config

        config = read_config(self.directory, trust_remote_code=self.source.trust_remote_code, **self.source.hub)
        return str(getattr(config, "_commit_hash", None))


def notify_of_random_tower(chosen: Composition | str) -> None:
    """Say on stderr that a composition's vision encoder will be random, as its name brings no weights."""
    if isinstance(chosen, Composition):
        from vlm_cli.checkpoint.parts.vision_encoders import describe_random_tower

        if note := describe_random_tower(chosen.vision_encoder):
            console.notify(f"Note: {note}")


def keep_collecting() -> None:
    """Let Python collect garbage again, for a command that runs for long.

    `main` stops the collector, because a command that ends soon needs none. Objects that exist by now, such as the
    modules of torch, live until the end; the collector does not look at them again.
    """
    gc.freeze()
    gc.enable()
