"""Build a model and write its directory, from parts or from a published checkpoint.

build                   plan -> create -> load trained weights over it -> write
build_from_checkpoint   recognise -> import -> write
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import torch

from vlm_cli.checkpoint.completing import is_delta, load_delta, write_whole
from vlm_cli.checkpoint.create import Blueprint, create, plan
from vlm_cli.checkpoint.delta import PREFIXES
from vlm_cli.checkpoint.parts.vision_encoders import describe_random_tower
from vlm_cli.checkpoint.published.fill import KeyReport
from vlm_cli.checkpoint.published.importing import CompositionOver, import_checkpoint
from vlm_cli.checkpoint.published.layouts.base import Layout
from vlm_cli.checkpoint.published.recognising import recognise
from vlm_cli.checkpoint.saving import save, save_delta
from vlm_cli.checkpoint.weights import load_weights, open_weights
from vlm_cli.composition import Composition
from vlm_cli.errors import CheckpointError, UsageError
from vlm_cli.files import replacing_directory, reserved_directory
from vlm_cli.modeling.config import stored_dtype
from vlm_cli.modeling.generation_settings import inherit_checked
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of
from vlm_cli.processor import VLMProcessor
from vlm_cli.report.parameters import ParameterReport, count_parameters

__all__ = ["BuildResult", "IncompleteWeightsError", "build", "build_from_checkpoint"]

Progress = Callable[[str], None]
_P = ParamSpec("_P")


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A model that was built, or that would be built if there is no `out`.

    Attributes:
        model: in evaluation mode; without weights, on the meta device, if `build` wrote nothing.
        processor: turns prompts and images into the model's inputs.
        out: the directory that was written; None if nothing was written.
        parameters: number of parameters of each part.
        layout: how the tensors of a published checkpoint are named; None for a model of parts.
        keys: what became of each tensor of the weight file or published checkpoint; None without one.
        notes: sentences that the user should read.
        replaced: the parts of a published checkpoint that others replaced.
    """

    model: VLM
    processor: VLMProcessor
    out: Path | None
    parameters: ParameterReport
    layout: Layout | None = None
    keys: KeyReport | None = None
    notes: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


class IncompleteWeightsError(CheckpointError):
    """Weights that do not cover the model. Nothing was written.

    Attributes:
        keys: what became of each tensor.
        layout, notes: as of `BuildResult`.
    """

    def __init__(self, source: str, keys: KeyReport, layout: Layout | None = None, notes: tuple[str, ...] = ()) -> None:
        self.keys, self.layout, self.notes = keys, layout, notes
        surplus = f" {len(keys.surplus)} have no place in the model, e.g. {keys.surplus[0]!r}." if keys.surplus else ""
        super().__init__(
            f"{source!r} does not fit the composition: {count_of(len(keys.missing), 'tensor')} that train, or would "
            f"stay random, are missing, and {len(keys.mismatched)} have another shape.{surplus} Nothing was written."
        )


def _reserving_output(build: Callable[_P, BuildResult]) -> Callable[_P, BuildResult]:
    """Let a function keep other processes from writing its argument `out` until it returns."""

    @functools.wraps(build)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> BuildResult:
        given = inspect.signature(build).bind(*args, **kwargs).arguments
        if given.get("out") is None:
            return build(*args, **kwargs)
        with reserved_directory(Path(given["out"]), overwrite=given.get("overwrite", False)):
            return build(*args, **kwargs)

    return run


@_reserving_output
def build(
    composition: Composition,
    out: str | Path | None = None,
    *,
    weights: str | Path | None = None,
    random_weights: bool = False,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
    delta: bool = False,
    trust_remote_code: bool = False,
    max_shard_size: str = "5GB",
    shim: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda step: None,
) -> BuildResult:
    """Build a model of a composition's parts, and write it as a directory that runs alone.

        composition = vlm_cli.Composition.compose("flamingo", {"language_model": "./my-llama"})
        result = vlm_cli.build(composition, "my-flamingo")

    Args:
        composition: the four parts, their settings, and what trains.
        out: the directory to write; None checks everything, counts parameters, and loads no pretrained weights.
        weights: file of trained weights to load over the pretrained parts.
        random_weights: whether to use random weights instead of pretrained ones; nothing is downloaded then.
        dtype: of all weights, such as torch.bfloat16; "auto" takes that of the language model.
        seed: seed for random weights.
        delta: whether the directory leaves out the tensors that the pretrained parts hold.
        trust_remote_code: whether the language model's own code may run.
        max_shard_size: largest size of one weight file, such as "5GB".
        shim: whether to write the file through which Transformers opens the directory with `trust_remote_code`.
        overwrite: whether to replace a directory that vlm wrote.
        progress: called with the name of each step before it begins.

    Raises:
        IncompleteWeightsError: if `weights` does not cover the model.
        VLMError: if parts cannot be found or do not fit, or the directory cannot be written.
    """
    if delta and random_weights:
        raise UsageError(
            "--delta leaves out what pretrained parts hold, and --random-weights loads none. Leave one out; a full "
            "directory becomes one later: vlm export OUT OTHER --format delta."
        )
    output = None if out is None else _Output(Path(out), delta, max_shard_size, shim, overwrite, trust_remote_code)
    file = None if weights is None else Path(weights)
    progress("checking the composition")
    blueprint = plan(composition, trust_remote_code=trust_remote_code)
    if not random_weights:
        blueprint.check_weights()
    _, notes = inherit_checked(blueprint.language_model.generation_config(), blueprint.language_model.name)
    if file is not None:
        open_weights(file)  # a file that cannot be read fails before anything is downloaded
    if output is None:
        model = blueprint.meta_model  # its tensors do not have the dtype that they would be loaded in
        count_as = stored_dtype(blueprint.config.get_text_config()) if isinstance(dtype, str) else dtype
    else:
        model = create(blueprint, random_weights=random_weights, dtype=dtype, seed=seed, progress=progress)
        count_as = None
        if random_weights and file is None:
            model.config.random_weights = True  # so that no card names base models
    keys = None if file is None else _load_over(model, blueprint, file, random_weights, progress)
    parameters = count_parameters(model, dtype=count_as)
    if output is not None:
        output.write(model, blueprint.processor, parameters, keys, progress)
    if file is None and not random_weights and (note := describe_random_tower(composition.vision_encoder)):
        notes += (note,)
    return BuildResult(
        model=model,
        processor=blueprint.processor,
        out=None if output is None else output.path,
        parameters=parameters,
        keys=keys,
        notes=notes,
    )


@_reserving_output
def build_from_checkpoint(
    source: str | Path,
    out: str | Path | None = None,
    *,
    composition_over: CompositionOver | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
    delta: bool = False,
    trust_remote_code: bool = False,
    max_shard_size: str = "5GB",
    shim: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda step: None,
) -> BuildResult:
    """Build a model of published weights, and write it as a directory that runs alone.

        result = vlm_cli.build_from_checkpoint("./llava-1.5-7b-hf", "my-llava")

    Args:
        source: file, directory or hub id of the checkpoint.
        out: the directory to write; None imports the checkpoint and writes nothing.
        composition_over: changes the composition that the checkpoint describes, as of `vlm_cli.import_checkpoint`.
        revision: branch, tag or commit, if `source` is a hub id.
        dtype: of all weights, such as torch.bfloat16; "auto" takes that of the checkpoint.
        seed: for the random weights of tokens that the checkpoint does not have.
        delta: whether the directory leaves out the tensors that the pretrained parts hold.
        trust_remote_code: whether the language model's own code may run.
        max_shard_size: largest size of one weight file, such as "5GB".
        shim: whether to write the file through which Transformers opens the directory with `trust_remote_code`.
        overwrite: whether to replace a directory that vlm wrote.
        progress: called with the name of each step before it begins.

    Raises:
        IncompleteWeightsError: if the checkpoint does not cover the model.
        VLMError: if the checkpoint is damaged or has an unknown layout, or the directory cannot be written.
    """
    output = None if out is None else _Output(Path(out), delta, max_shard_size, shim, overwrite, trust_remote_code)
    progress(f"finding {source}")
    recognised = recognise(source, revision=revision)
    if is_delta(recognised.checkpoint.config):
        if delta:
            raise UsageError(f"{str(source)!r} is a delta directory already. Leave --delta out to make it whole.")
        progress(f"loading {source}")
        model, processor = load_delta(
            str(source), composition_over, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code
        )
        if output is not None:
            output.complete(model, processor, str(source), progress)
        out_path = None if output is None else output.path
        return BuildResult(model=model, processor=processor, out=out_path, parameters=count_parameters(model))
    if delta and recognised.holds_all_backbones:
        raise UsageError(
            f"--delta leaves out what pretrained parts hold, and {recognised.checkpoint.name!r} brings a vision "
            "encoder and a language model of its own. Leave --delta out."
        )
    imported = import_checkpoint(
        recognised,
        composition_over=composition_over,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        seed=seed,
        progress=progress,
    )
    notes = imported.notes
    if any(name.startswith("added_tokens.") for name in imported.report.absent):
        notes += ("the checkpoint has no rows for added tokens: they start at the mean of the language model's rows.",)
    if imported.model is None:
        raise IncompleteWeightsError(str(source), imported.report, imported.layout, notes)
    parameters = count_parameters(imported.model)
    if output is not None:
        output.write(imported.model, imported.processor, parameters, imported.report, progress)
    return BuildResult(
        model=imported.model,
        processor=imported.processor,
        out=None if output is None else output.path,
        parameters=parameters,
        layout=imported.layout,
        keys=imported.report,
        notes=notes,
        replaced=imported.replaced,
    )


def _load_over(model: VLM, blueprint: Blueprint, weights: Path, random_weights: bool, progress: Progress) -> KeyReport:
    """Load trained weights over a model; on the meta device, only compare names and shapes.

    Raises:
        IncompleteWeightsError: if a tensor is missing that trains or would stay random, or has another shape.
    """
    progress(f"loading weights {weights}")
    random_parts = ["vision_encoder"] if random_weights or blueprint.tower.weights is None else []
    random_parts += ["language_model"] if random_weights else []
    keys = load_weights(model, weights, random_parts=random_parts)
    if not keys.is_complete:
        raise IncompleteWeightsError(str(weights), keys)
    return keys


@dataclass(frozen=True)
class _Output:
    """The directory to write, and how to write it."""

    path: Path
    delta: bool
    max_shard_size: str
    shim: bool
    overwrite: bool
    trust_remote_code: bool

    def write(
        self,
        model: VLM,
        processor: VLMProcessor,
        parameters: ParameterReport,
        keys: KeyReport | None,
        progress: Progress,
    ) -> None:
        """Write the model. `keys` tells which tensors a weight file brought."""
        progress(f"writing {self.path}")
        how: dict[str, Any] = {"name": self.path.name, "parameters": parameters}
        how |= {"max_shard_size": self.max_shard_size, "shim": self.shim}
        with replacing_directory(self.path, overwrite=self.overwrite) as partial:
            if not self.delta:
                save(model, processor, partial, **how)
                return
            # A part of which no file brought a tensor holds its pretrained weights: no need to load them again.
            loaded = [] if keys is None else keys.loaded
            unchanged = [part for part, prefix in PREFIXES.items() if not any(x.startswith(prefix) for x in loaded)]
            save_delta(
                model,
                processor,
                partial,
                **how,
                unchanged=unchanged,
                trust_remote_code=self.trust_remote_code,
                progress=progress,
            )

    def complete(self, model: VLM, processor: VLMProcessor, source: str, progress: Progress) -> None:
        """Write the model of a delta directory with all of its tensors."""
        progress(f"writing {self.path}")
        with replacing_directory(self.path, overwrite=self.overwrite) as partial:
            how: dict[str, Any] = {"max_shard_size": self.max_shard_size, "shim": self.shim}
            write_whole(model, processor, partial, source, name=self.path.name, **how)
