"""Make a VLM of published weights (`vlm build --from`, `vlm_cli.import_checkpoint`).

recognise -> _compose -> _find_parts -> _configure -> _build_empty -> plan_fill, FillPlan.copy -> _finish
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from vlm_cli.checkpoint.create import Blueprint, cast, check_fit, configure, find_shape, generation_config
from vlm_cli.checkpoint.parts.language_models import LanguageModelSource, find_language_model
from vlm_cli.checkpoint.parts.tower import Tower
from vlm_cli.checkpoint.parts.vision_encoders import check_tower_weights, find_tower, load_tower
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.fill import FillPlan, KeyReport, plan_fill
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription, Layout
from vlm_cli.checkpoint.published.layouts.own import OwnDirectory
from vlm_cli.checkpoint.published.recognising import RecognisedCheckpoint, recognise
from vlm_cli.checkpoint.published.swapping import Swap, find_swap
from vlm_cli.composition import UNTILED, Composition, keep_trained_settings
from vlm_cli.errors import CheckpointError, CompositionError
from vlm_cli.image_processor import OpenCLIPImageProcessor
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.generation_settings import inherit_checked
from vlm_cli.modeling.language_model import check_causal
from vlm_cli.modeling.meta import SkipsFilling, meta_device
from vlm_cli.modeling.towers import build_tower, find_tower_shape
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.modeling.vlm import VLM
from vlm_cli.plain_data import read_json
from vlm_cli.preprocessing import CROP_DOWN
from vlm_cli.processor import VLMProcessor
from vlm_cli.tokenizer import make_media_plain, rename_token
from vlm_cli.trust import check_settings, find_causal_class, make_config, make_language_model

__all__ = ["CompositionOver", "Imported", "import_checkpoint"]

#: Settings over a checkpoint's own composition; a whole composition in its place; or a function of it, plain data.
CompositionOver = Composition | Mapping[str, Any] | Callable[[Mapping[str, Any]], Composition]


@dataclass(frozen=True)
class Imported:
    """A model with published weights.

    Attributes:
        model: in evaluation mode; None if the report is not complete.
        processor: for the model's prompts and images.
        layout: how the weights were named.
        report: what became of each tensor.
        notes: sentences that the user should read.
        replaced: the parts of the checkpoint that the user replaced by others.
    """

    model: VLM | None
    processor: VLMProcessor
    layout: Layout
    report: KeyReport
    notes: tuple[str, ...]
    replaced: tuple[str, ...] = ()


def import_checkpoint(
    source: RecognisedCheckpoint | PublishedCheckpoint | str | Path,
    *,
    composition_over: CompositionOver | None = None,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    seed: int = 0,
    revision: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Imported:
    """Make a model of a published checkpoint.

    Args:
        source: file, directory or hub id of the checkpoint, or a checkpoint that is open already.
        composition_over: changes the composition that the checkpoint describes: settings that are laid over it, as in
            `{"vision_encoder": {"norm": True}}`; a whole composition; or a function from the checkpoint's composition
            (plain data) to a composition. None changes nothing. Another encoder, language model, or type of vision
            tokenizer or fusion replaces that part of the checkpoint; what depends on it starts anew, and the notes
            say which tensors were kept.
        dtype: of all weights; "auto" is the checkpoint's.
        trust_remote_code: run the language model's own code from its repository.
        seed: for the random weights of tokens that the checkpoint does not have.
        revision: branch, tag or commit of a hub id.
        progress: called with the name of each step before it begins.

    Returns:
        The model, and what became of each tensor. The model is None if tensors are missing or have another shape.

    Raises:
        VLMError: if the layout is unknown, or parts that the checkpoint does not hold cannot be found.
    """
    found = source if isinstance(source, RecognisedCheckpoint) else recognise(source, revision=revision)
    progress(f"recognised {found.layout.name}")
    description = found.description
    composition, swap = _compose(found, composition_over)
    dtype = found.checkpoint.dtype if dtype == "auto" else dtype
    assert isinstance(dtype, torch.dtype)
    swap = _decide_swap(found, composition, swap, trust_remote_code)
    parts = _find_parts(found, composition, swap, trust_remote_code)
    config = _configure(found, composition, parts, swap)
    if swap.named:
        swap = _plan_swap(found, config, parts, swap)
    model = _build_empty(found, config, parts, swap, dtype, seed, progress)
    progress(f"reading {len(found.checkpoint.tensors)} tensors")
    plan = _plan_fill(found, model, parts, swap)
    notes = description.notes + swap.notes(model, plan.report)
    images = OpenCLIPImageProcessor(parts.tower_config["preprocess"], config.composition.tiling.to_dict())
    processor = VLMProcessor(images, parts.tokenizer)
    generation, more = inherit_checked(parts.language_model.generation_config(), parts.language_model.name)
    if plan.report.is_complete:
        model.lang_model.generation_config = generation
        plan.copy(found.checkpoint)
        _finish(model, processor, description, plan.report, swap, dtype, seed)
    is_complete = plan.report.is_complete
    return Imported(model if is_complete else None, processor, found.layout, plan.report, notes + more, swap.named)


def _plan_fill(found: RecognisedCheckpoint, model: VLM, parts: _Parts, swap: Swap) -> FillPlan:
    """Decide what each tensor of the checkpoint fills, without reading a tensor."""
    return plan_fill(
        model,
        found.checkpoint,
        found.description.targets_for(_own_config(found, model.config, swap) if swap.named else model.config),
        has_weights=lambda name: name.startswith(parts.loaded_prefixes),
        is_optional=found.description.is_optional,
        new=swap.prefixes,
    )


def _decide_swap(found: RecognisedCheckpoint, composition: Composition, swap: Swap, trust_remote_code: bool) -> Swap:
    """Decide whether the backbones that the user names for a checkpoint without backbones replace others.

    They do if the checkpoint's tensors do not fit them, unless nothing of the checkpoint would remain then: the report
    then tells which shapes differ.
    """

    def report(swap: Swap) -> KeyReport:
        parts = _find_parts(found, composition, swap, trust_remote_code)
        with meta_device():
            model = VLM(_configure(found, composition, parts, swap))
        return _plan_fill(found, model, parts, swap.spread(model)).report

    if not swap.doubtful:
        return swap
    try:
        fits = report(swap).is_complete
    except CheckpointError:
        fits = False
    replaced = swap.decide(False)
    return swap.decide(True) if fits or not (swap.named or report(replaced).loaded) else replaced


def _plan_swap(found: RecognisedCheckpoint, config: VLMConfig, parts: _Parts, swap: Swap) -> Swap:
    """Find the parts that start anew with those that the user replaces, and check that all parts fit.

    Raises:
        VLMError: if the new parts and the kept ones do not fit, or weights on this machine do not fit a new part.
    """
    tower = parts.tower or Tower(dict(parts.tower_config), {}, None)
    blueprint = Blueprint(config, tower, parts.language_model, parts.tokenizer)
    check_fit(blueprint)
    if parts.loads_language_model:
        parts.language_model.check_files(blueprint.meta_model.lang_model)
    if parts.tower is not None:
        check_tower_weights(parts.tower)
    swap = swap.spread(blueprint.meta_model)
    return swap.widen(_plan_fill(found, blueprint.meta_model, parts, swap))


def _own_config(found: RecognisedCheckpoint, config: VLMConfig, swap: Swap) -> VLMConfig:
    """Make the configuration of the checkpoint's own model, for which its layout knows the targets of each tensor.

    Args:
        found: the checkpoint.
        config: of the model that is built; what nobody replaces is the same in both.
        swap: what replaces parts of the checkpoint.

    Raises:
        VLMError: if a part that the checkpoint does not hold cannot be found.
    """
    description, own = found.description, replace(swap.own, tiling=UNTILED)
    if "vision_encoder" in swap.named:
        tower_config = description.vision_config or find_tower(own.vision_encoder).config
    else:
        tower_config = {k: x for k, x in config.vision_config.items() if k not in ("num_patches", "dim", "grid")}
    if "language_model" not in swap.named:
        text_config = config.text_config
    elif description.text_config is None:
        text_config = find_language_model(own.language_model).config
    else:
        text_config = _find_own_language_model(found, description.text_config, False).config
    with found.blaming_config():
        shape = find_tower_shape(tower_config, **own.vision_encoder.feature_arguments)
        made = configure(own, tower_config, shape, text_config, None, description.first_added_id)
    if "language_model" not in swap.named:
        made.added_tokens, made.first_added_id = config.added_tokens, config.first_added_id
        made.media_token_id = config.media_token_id
    return made


def _compose(found: RecognisedCheckpoint, over: CompositionOver | None) -> tuple[Composition, Swap]:
    """Lay the user's settings over the composition that a checkpoint describes, and find the parts that they replace.

    Raises:
        CompositionError: for settings that do not fit.
        CheckpointError: for a directory of vlm of which nothing is replaced.
    """
    description = found.description
    if isinstance(over, Composition):
        composition = over
    elif over is None or isinstance(over, Mapping):
        composition = Composition.compose(
            None, description.composition, keep_trained_settings(description.composition, over or {})
        )
    else:
        composition = over(description.composition)
    swap = find_swap(description, composition)
    if description.vision_config is not None and "vision_encoder" not in swap.named:
        _check_own_tower(swap.own, composition)
    if found.layout.name == OwnDirectory.name and not swap.named:
        name = found.checkpoint.name
        raise CheckpointError(
            f"{name!r} is a directory of vlm already. Use it as it is: --model {name}; or name another part, as in "
            "--language-model ORG/NAME."
        )
    return composition, swap


def _check_own_tower(own: Composition, composition: Composition) -> None:
    """Refuse settings of a vision encoder that the checkpoint's own one cannot have.

    Raises:
        CompositionError: names the setting.
    """
    for setting in ("pretrained", "image_size", "depth"):
        given = getattr(composition.vision_encoder, setting)
        if given != getattr(own.vision_encoder, setting):
            raise CompositionError(
                f"the checkpoint holds its own vision encoder, so vision_encoder.{setting}={given} cannot change it. "
                "Leave the setting out."
            )


@dataclass(frozen=True)
class _Parts:
    """What a checkpoint's model is made of, inside the checkpoint or outside.

    Attributes:
        tower: the vision encoder outside; None if the checkpoint holds it.
        tower_config: OpenCLIP's configuration of the vision encoder.
        language_model: the language model's configuration, and where its weights and tokenizer are.
        loads_language_model: whether the language model's weights come from outside.
        tokenizer: of the language model.
    """

    tower: Tower | None
    tower_config: Mapping[str, Any]
    language_model: LanguageModelSource
    loads_language_model: bool
    tokenizer: PreTrainedTokenizerBase

    @property
    def loaded_prefixes(self) -> tuple[str, ...]:
        """Beginnings of the names whose weights come from outside. A tower that names no weights is random."""
        has_tower = self.tower is not None and self.tower.weights is not None
        loaded = {"vision_encoder": has_tower, "language_model": self.loads_language_model}
        return tuple(VLM.PART_PREFIXES[part] for part, is_loaded in loaded.items() if is_loaded)


def _find_parts(found: RecognisedCheckpoint, composition: Composition, swap: Swap, trust_remote_code: bool) -> _Parts:
    """Find the backbones and the tokenizer, without loading weights.

    Raises:
        VLMError: if a part cannot be found.
    """
    description = found.description
    holds_tower = description.vision_config is not None and "vision_encoder" not in swap.named
    tower = None if holds_tower else find_tower(composition.vision_encoder)
    tower_config = description.vision_config if tower is None else tower.config
    assert tower_config is not None
    crops_down = description.crops_down and "vision_encoder" not in swap.named
    if tower is not None and crops_down and tower_config["preprocess"].get("resize_mode") == "shortest":
        tower_config = {**tower_config, "preprocess": tower_config["preprocess"] | CROP_DOWN}
    is_swapped = "language_model" in swap.named
    if description.text_config is None or is_swapped:
        source = find_language_model(composition.language_model, trust_remote_code=trust_remote_code)
    else:
        source = _find_own_language_model(found, description.text_config, trust_remote_code)
    if is_swapped:
        tokenizer = source.tokenizer(composition.language_model.tokenizer)
    else:
        tokenizer = _load_own_tokenizer(found, source, composition.language_model.tokenizer)
    return _Parts(
        tower=tower,
        tower_config=tower_config,
        language_model=source,
        loads_language_model=is_swapped or (description.text_config is None and not description.holds_language_model),
        tokenizer=tokenizer,
    )


def _load_own_tokenizer(
    found: RecognisedCheckpoint, source: LanguageModelSource, other: str | None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a checkpoint was trained with, or the one that the user names, with its chat template."""
    tokenizer = source.tokenizer(other or found.description.tokenizer)
    for old, new in (found.description.renamed_tokens or {}).items():
        rename_token(tokenizer, old, new)
    if found.description.starts_with_bos is not None:
        tokenizer.add_bos_token = found.description.starts_with_bos
    if found.description.chat_template is not None and other is None:
        tokenizer.chat_template = found.description.chat_template
    if (end := found.description.end_of_answer) in tokenizer.get_vocab() and other is None:
        tokenizer.eos_token = end
    if found.description.text_config is not None and other is None:
        make_media_plain(tokenizer)
    if tokenizer.chat_template is None and other is None:
        tokenizer.chat_template = _read_template(found.checkpoint.folder)
    if found.description.text_config is not None and found.description.chat_template is None and other is None:
        _begin_with_bos(tokenizer)
    return tokenizer


def _read_template(folder: Path) -> str | None:
    """Read the chat template of a checkpoint's processor, which may stand in a file of its own; None without one."""
    for file in (folder / "chat_template.json", folder / "processor_config.json"):
        if file.is_file() and isinstance(found := read_json(file).get("chat_template"), str):
            return found
    return None


def _begin_with_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a chat template write the BOS token that a processor of Transformers puts before what it writes.

    A processor does so if its tokenizer does; a tokenizer alone, as ours, leaves that to its template.
    """
    template, bos = tokenizer.chat_template, tokenizer.bos_token
    if not isinstance(template, str) or bos is None or bos in template or "bos_token" in template:
        return
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        tokenizer.chat_template = "{{ bos_token }}" + template


def _find_own_language_model(
    found: RecognisedCheckpoint, text_config: Mapping[str, Any], trust_remote_code: bool
) -> LanguageModelSource:
    """Return the language model inside a checkpoint.

    Raises:
        VLMError: if no causal language model can be made of its configuration, or the configuration names a kernel
            that may not run.
    """
    checkpoint, data = found.checkpoint, dict(text_config)
    check_settings(checkpoint.name, data, trust_remote_code=trust_remote_code)
    with found.blaming_config():
        config: PreTrainedConfig = make_config(data.pop("model_type"), **data)
    if find_causal_class(config) is None:
        check_causal(config, checkpoint.name)
    return LanguageModelSource(
        checkpoint.name, str(checkpoint.folder), {"trust_remote_code": trust_remote_code}, config
    )


def _configure(found: RecognisedCheckpoint, composition: Composition, parts: _Parts, swap: Swap) -> VLMConfig:
    """Make the model's configuration; the tokenizer gets the composition's added tokens.

    Raises:
        VLMError: if the parts do not fit together.
    """
    if parts.tower is not None and "vision_encoder" in swap.named:
        shape = find_shape(parts.tower, composition)
    else:
        with found.blaming_config():
            shape = find_tower_shape(parts.tower_config, **composition.vision_encoder.feature_arguments)
    first_added_id = None if "language_model" in swap.named else found.description.first_added_id
    return configure(
        composition, parts.tower_config, shape, parts.language_model.config, parts.tokenizer, first_added_id
    )


def _build_empty(
    found: RecognisedCheckpoint,
    config: VLMConfig,
    parts: _Parts,
    swap: Swap,
    dtype: torch.dtype,
    seed: int,
    progress: Callable[[str], None],
) -> VLM:
    """Build the model: outside parts with their weights, and all other parameters on the meta device.

    If parts are replaced, the vision tokenizer, the fusion and the added tokens have their first weights: some of them
    start anew, and the checkpoint's tensors cover the others.

    Raises:
        VLMError: if a part cannot be loaded.
    """
    visual = lang_model = None
    encoder_arguments = config.composition.vision_encoder.feature_arguments
    if parts.tower is not None:
        progress(f"loading vision encoder {config.composition.vision_encoder.name}")
        visual = VisionEncoder(load_tower(parts.tower), **encoder_arguments)
    if parts.loads_language_model:
        progress(f"loading language model {parts.language_model.name}")
        lang_model = parts.language_model.load(dtype)
    empty = init_empty_weights(include_buffers=False)
    if swap.named:
        with found.blaming_config(), empty, SkipsFilling():
            if visual is None:
                visual = VisionEncoder(build_tower(config.vision_config), **encoder_arguments)
            lang_model = lang_model or make_language_model(config.text_config)
        empty = nullcontext()
    with found.blaming_config(), torch.random.fork_rng(devices=[]), empty, SkipsFilling():
        torch.manual_seed(seed)
        model = VLM(config, vision_encoder=visual, lang_model=lang_model)
    # `init_empty_weights` replaces each parameter when a module registers it, which separates tied ones.
    model.lang_model.tie_weights()
    cast(model, dtype)
    return model


def _finish(
    model: VLM,
    processor: VLMProcessor,
    description: CheckpointDescription,
    report: KeyReport,
    swap: Swap,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Initialize what the checkpoint left open, and set the model up for use."""
    model.lang_model.tie_weights()
    if "added_tokens" in swap.new:
        lm = model.lang_model
        with torch.no_grad():
            model.added_tokens.start_at_mean(lm.get_input_embeddings(), lm.get_output_embeddings())
    else:
        _initialize_added_rows(model, report, seed)
        _initialize_like(model, processor, description.initialize_like or {})
    model.config.dtype = model.config.text_config.dtype = dtype
    model.generation_config = generation_config(model)
    model.set_trainable(model.config.composition.trainable)
    model.eval()


def _initialize_added_rows(model: VLM, report: KeyReport, seed: int) -> None:
    """Start rows that the checkpoint did not fill at the mean of the language model's rows, as in every new model.

    `FillPlan.copy` marks such rows with NaN.
    """
    unfilled = [name for name in report.absent if name.startswith("added_tokens.")]
    if not unfilled:
        return
    lm = model.lang_model
    fresh = copy.deepcopy(model.added_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh.reset_parameters()
        fresh.start_at_mean(lm.get_input_embeddings(), lm.get_output_embeddings())
    with torch.no_grad():
        for name in unfilled:
            rows = model.get_parameter(name)
            rows.copy_(torch.where(rows.isnan(), fresh.get_parameter(name.removeprefix("added_tokens.")), rows))


@torch.no_grad()
def _initialize_like(model: VLM, processor: VLMProcessor, texts: Mapping[str, str]) -> None:
    """Give each of these added tokens the embedding of its text's first token."""
    embedding, added = model.lang_model.get_input_embeddings(), model.added_tokens
    for name, text in texts.items():
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        row = embedding(torch.tensor(ids[:1]))[0]
        added.embedding.weight[processor.tokenizer.convert_tokens_to_ids(name) - added.first_id] = row
