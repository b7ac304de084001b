"""Published weights to a model of ours: recognise the layout, compose, build without drawing, and fill."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, PreTrainedConfig

from vlm_cli.checkpoint.create import cast, configure, generation_config
from vlm_cli.checkpoint.parts.language_models import LanguageModelSource, find_language_model
from vlm_cli.checkpoint.parts.openclip import find_tower, load_tower
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts import LAYOUTS
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription, Layout, fill
from vlm_cli.checkpoint.weights import KeyReport
from vlm_cli.composition import Composition
from vlm_cli.errors import CheckpointError, CompositionError, VLMError, first_line
from vlm_cli.modeling.language_model import check_causal
from vlm_cli.modeling.towers import tower_shape
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import OpenCLIPImageProcessor, VLMProcessor

__all__ = ["Imported", "blaming_config_of", "import_checkpoint", "recognise"]


@dataclass(frozen=True)
class Imported:
    """A model that was made of published weights.

    Attributes:
        model: in evaluation mode; None if the report is not complete.
        processor: for its prompts and images.
        layout: how the weights were written.
        report: what became of each tensor.
        notes: what the user should know.
    """

    model: VLM | None
    processor: VLMProcessor
    layout: Layout
    report: KeyReport
    notes: tuple[str, ...]


def recognise(checkpoint: PublishedCheckpoint) -> Layout:
    """The layout whose names and shapes these are.

    Raises:
        CheckpointError: if it is none that is known.
    """
    for layout in LAYOUTS:
        if layout.matches(checkpoint):
            return layout
    if checkpoint.config.get("model_type") == "vlm":
        raise CheckpointError(
            f"{checkpoint.name!r} is a directory of vlm already. Use it as it is: --model {checkpoint.name}"
        )
    names = sorted(checkpoint.tensors)
    shown = ", ".join(names[:: max(1, len(names) // 4)][:4])
    raise CheckpointError(
        f"{checkpoint.name!r} is of no layout that is known: its {len(names)} tensors are called {shown}, …. Known: "
        f"{', '.join(layout.name for layout in LAYOUTS)}. To load trained weights of vlm's own over a composition: "
        "--weights FILE."
    )


def import_checkpoint(
    checkpoint: PublishedCheckpoint,
    compose: Callable[[Mapping[str, Any]], Composition],
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Imported:
    """A model of ours with a checkpoint's weights.

    Args:
        checkpoint: published weights.
        compose: the composition, given what the checkpoint says of it.
        dtype: of all weights; "auto" is that of the checkpoint.
        trust_remote_code: run the language model's own code from its repository.
        seed: of what is drawn: tokens that the checkpoint does not have.
        progress: is told each step.

    Raises:
        VLMError: if the layout is not known, or parts that the checkpoint does not hold cannot be found.
    """
    layout = recognise(checkpoint)
    progress(f"recognised {layout.name}")
    with blaming_config_of(checkpoint, layout):
        described = layout.describe(checkpoint)
    composition = compose(described.composition)
    _check_own_parts(described, composition)
    dtype = checkpoint.dtype if dtype == "auto" else dtype
    assert isinstance(dtype, torch.dtype)

    tower = None if described.vision_config is not None else find_tower(composition.vision_encoder)
    tower_config = described.vision_config if tower is None else tower.config
    assert tower_config is not None
    source = _language_model(checkpoint, layout, described, composition, trust_remote_code)
    tokenizer = source.tokenizer(composition.language_model.tokenizer or described.tokenizer)
    reading = composition.vision_encoder.feature_arguments
    with blaming_config_of(checkpoint, layout):
        shape = tower_shape(tower_config, **reading)
    config = configure(composition, tower_config, shape, source.config, tokenizer, described.first_added_id)

    visual = lang_model = None
    if tower is not None:
        progress(f"loading vision encoder {composition.vision_encoder.name}")
        visual = VisionEncoder(load_tower(tower), **reading)
    if described.text_config is None and not described.holds_language_model:
        progress(f"loading language model {source.name}")
        lang_model = source.load(dtype)
    with (
        blaming_config_of(checkpoint, layout),
        torch.random.fork_rng(devices=[]),
        init_empty_weights(include_buffers=False),
    ):
        torch.manual_seed(seed)
        model = VLM(config, vision_encoder=visual, lang_model=lang_model)
    # In there each parameter is made anew where it is put, so that tied ones came apart.
    model.lang_model.tie_weights()
    cast(model, dtype)
    # A tower that names no weights was drawn: the checkpoint has to bring them.
    drawn = tower is None or tower.weights is None
    backed = tuple(
        VLM.PART_PREFIXES[part]
        for part, has_weights in (("vision_encoder", not drawn), ("language_model", lang_model is not None))
        if has_weights
    )
    progress(f"reading {len(checkpoint.tensors)} tensors")
    report = fill(model, checkpoint, described, has_weights=lambda name: name.startswith(backed) if backed else False)
    processor = VLMProcessor(OpenCLIPImageProcessor(tower_config["preprocess"]), tokenizer)
    if not report.is_complete:
        return Imported(None, processor, layout, report, described.notes)
    lm = model.lang_model
    lm.tie_weights()
    _draw_added(model, report, seed)
    _start_as(model, processor, described.initialize_like)
    model.config.dtype = model.config.text_config.dtype = dtype
    model.generation_config = generation_config(model)
    model.set_trainable(composition.trainable)
    return Imported(model.eval(), processor, layout, report, described.notes)


def _check_own_parts(described: CheckpointDescription, composition: Composition) -> None:
    """
    Raises:
        CompositionError: if another part was named for one whose weights the checkpoint holds.
    """
    for part, flag, is_held in (
        ("vision_encoder", "--vision-encoder", described.vision_config is not None),
        ("language_model", "--language-model", described.text_config is not None),
    ):
        own, named = described.composition.get(part, {}).get("name"), getattr(composition, part).name
        if is_held and named != own:
            raise CompositionError(
                f"the checkpoint holds its own {part.replace('_', ' ')}, so {named!r} has no place. Leave {flag} out."
            )
    if described.vision_config is None:
        return
    # A family that has a tower of this name brings the weights it is known with.
    lm = {"language_model": {"name": composition.language_model.name}}  # not every checkpoint names one
    encoder = Composition.compose(None, described.composition, lm).vision_encoder
    for setting in ("pretrained", "image_size", "depth"):
        named = getattr(composition.vision_encoder, setting)
        if named != getattr(encoder, setting):
            raise CompositionError(
                f"the checkpoint holds its own vision encoder, so vision_encoder.{setting}={named} has no place. Leave "
                "it out."
            )


@contextmanager
def blaming_config_of(checkpoint: PublishedCheckpoint, layout: Layout) -> Iterator[None]:
    """Say of what stands in a configuration, and no model can be made of, where it stands."""
    try:
        yield
    except VLMError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"no model can be made of the configuration of {checkpoint.name!r}, which is read as {layout.name}: "
            f"{type(error).__name__}: {first_line(error)}. Is its config.json as it was published?"
        ) from error


def _language_model(
    checkpoint: PublishedCheckpoint,
    layout: Layout,
    described: CheckpointDescription,
    composition: Composition,
    trust_remote_code: bool,
) -> LanguageModelSource:
    """The language model that the checkpoint needs, or the one inside it."""
    if described.text_config is None:
        return find_language_model(composition.language_model, trust_remote_code=trust_remote_code)
    data = dict(described.text_config)
    with blaming_config_of(checkpoint, layout):
        config: PreTrainedConfig = AutoConfig.for_model(data.pop("model_type"), **data)
    check_causal(config, checkpoint.name)
    return LanguageModelSource(checkpoint.name, str(checkpoint.folder), {"trust_remote_code": False}, config)


def _draw_added(model: VLM, report: KeyReport, seed: int) -> None:
    """Rows that the checkpoint does not have start at the mean of the language model's, as in every new model."""
    drawn = [name for name in report.absent if name.startswith("added_tokens.")]
    if not drawn:
        return
    lm = model.lang_model
    fresh = copy.deepcopy(model.added_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh.reset_parameters()
        fresh.start_at_mean(lm.get_input_embeddings(), lm.get_output_embeddings())
    with torch.no_grad():
        for name in drawn:
            row = model.get_parameter(name)
            row.copy_(torch.where(row.isnan(), fresh.get_parameter(name.removeprefix("added_tokens.")), row))


@torch.no_grad()
def _start_as(model: VLM, processor: VLMProcessor, texts: Mapping[str, str]) -> None:
    """Give added tokens the embedding of a text's first token."""
    embedding, added = model.lang_model.get_input_embeddings(), model.added_tokens
    for name, text in texts.items():
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        row = embedding(torch.tensor(ids[:1]))[0]
        added.embedding.weight[processor.tokenizer.convert_tokens_to_ids(name) - added.first_id] = row
