"""Make a model of a composition: find the parts, check that they fit, load them, put them together.

plan(composition) -> Blueprint    reads configurations of a few kB, and reports every problem at once
create(blueprint) -> VLM          downloads and loads weights
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from vlm_cli.checkpoint.parts.language_models import LanguageModelSource, find_language_model
from vlm_cli.checkpoint.parts.tower import Tower
from vlm_cli.checkpoint.parts.vision_encoders import check_tower_weights, find_tower, load_tower
from vlm_cli.checkpoint.size_limits import check_memory, limited_size
from vlm_cli.checkpoint.tiling_texts import tokenize_texts
from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN, Composition
from vlm_cli.errors import CheckpointError, CompositionError, VLMError, explain_reading
from vlm_cli.image_processor import OpenCLIPImageProcessor
from vlm_cli.modeling.budget import ContextBudget
from vlm_cli.modeling.config import VLMConfig, stored_dtype
from vlm_cli.modeling.generation_settings import inherit_checked
from vlm_cli.modeling.language_model import decoder_layers, find_widths
from vlm_cli.modeling.meta import meta_device
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.modeling.towers import find_grid, find_tower_shape
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.quiet import quiet_libraries
from vlm_cli.tiling import MediumSize, check_tiling
from vlm_cli.tokenizer import add_tokens

__all__ = [
    "Blueprint",
    "cast",
    "check_fit",
    "configure",
    "create",
    "find_missing_parts",
    "find_shape",
    "generation_config",
    "plan",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blueprint:
    """A composition whose parts exist and fit together: everything about the model but its weights.

    Attributes:
        config: configuration of the model.
        tower: the vision encoder, and where its weights are.
        language_model: the language model, and where its weights are.
        tokenizer: the language model's, with the added tokens; None if there is none and none was needed.
    """

    config: VLMConfig
    tower: Tower
    language_model: LanguageModelSource
    tokenizer: Tokenizer | None

    @cached_property
    def meta_model(self) -> VLM:
        """The model on the meta device, where tensors have shapes and no bytes."""
        try:
            with limited_size("the composition"), meta_device():
                return VLM(self.config)
        except VLMError:
            raise
        except Exception as error:
            raise CompositionError(
                f"no model can be made of vision encoder {self.config.composition.vision_encoder.name!r} and language "
                f"model {self.language_model.name!r}: {explain_reading(error)}. Check their configurations."
            ) from error

    def check_weights(self) -> None:
        """Check that the pretrained parts on this machine fit their configurations, by names and shapes.

        A dry run and a build both ask here, so that the one accepts no more than the other.

        Raises:
            VLMError: if a file cannot be read, lacks a tensor, or holds one for which the part has no place.
        """
        self.language_model.check_files(self.meta_model.lang_model)
        check_tower_weights(self.tower)

    @property
    def processor(self) -> VLMProcessor:
        return VLMProcessor(self.image_processor, self.tokenizer)

    @property
    def image_processor(self) -> OpenCLIPImageProcessor:
        return OpenCLIPImageProcessor(self.tower.config["preprocess"], self.config.composition.tiling.to_dict())


def plan(composition: Composition, *, trust_remote_code: bool = False, need_tokenizer: bool = True) -> Blueprint:
    """Find the parts of a composition and check that they fit, before any weight is downloaded or allocated.

    Args:
        composition: the parts.
        trust_remote_code: whether the language model's own code may run.
        need_tokenizer: whether a language model without a tokenizer is an error.

    Raises:
        VLMError: if there is one problem; if there are several, a CompositionError with all of them.
    """
    search = _Search()
    tower = search.attempt(lambda: find_tower(composition.vision_encoder))
    shape = search.attempt(lambda: find_shape(tower, composition)) if tower else None
    lm = search.attempt(lambda: find_language_model(composition.language_model, trust_remote_code=trust_remote_code))
    tokenizer = search.attempt(lambda: _tokenizer(lm, composition, need_tokenizer)) if lm else None
    _raise(search.problems)
    assert shape is not None
    config = configure(composition, tower.config, shape, lm.config, tokenizer)
    blueprint = Blueprint(config, tower, lm, tokenizer)
    check_fit(blueprint)
    return blueprint


def configure(
    composition: Composition,
    tower_config: Mapping[str, Any],
    shape: tuple[int, int],
    text_config: PreTrainedConfig,
    tokenizer: Tokenizer | None,
    first_added_id: int | None = None,
) -> VLMConfig:
    """Make the configuration of a model of these parts, and add the composition's tokens to the tokenizer.

    Args:
        composition: the parts.
        tower_config: configuration of the vision encoder, as `find_tower` gives it.
        shape: number of patches and channels of its features.
        text_config: configuration of the language model.
        tokenizer: changed in place; None numbers the added tokens after the language model's vocabulary.
        first_added_id: id of the first added token, if the tokenizer has these tokens already; None adds them after
            its last token.
    """
    rows = text_config.get_text_config(decoder=True).vocab_size
    if tokenizer is None:
        added, first = list(composition.added_tokens), rows if first_added_id is None else first_added_id
        media_id = first + added.index(MEDIA_TOKEN)
        pad_id = getattr(text_config.get_text_config(), "pad_token_id", None)
    else:
        added, first = add_tokens(tokenizer, composition.added_tokens, rows, first_added_id)
        media_id, pad_id = tokenizer.convert_tokens_to_ids(MEDIA_TOKEN), tokenizer.pad_token_id
    features: dict[str, Any] = {"num_patches": shape[0], "dim": shape[1]}
    class_token = composition.vision_encoder.feature_arguments["class_token"]
    if (grid := find_grid(tower_config, shape[0], class_token)) is not None:
        features["grid"] = [*grid]
    return VLMConfig(
        text_config=text_config,
        vision_config={**tower_config, **features},
        composition=composition,
        added_tokens=added,
        first_added_id=first,
        media_token_id=media_id,
        pad_token_id=pad_id,
        eos_token_id=_stop_tokens(text_config, tokenizer, added),
        tiling_texts=tokenize_texts(composition.tiling, tower_config["preprocess"], tokenizer),
        architectures=["VLM"],
    )


def find_missing_parts(error: CompositionError) -> list[str]:
    """Say which parts do not exist, of those that a composition with problems names.

    `CompositionError` reports them with the other problems, so that a user meets all of them at once.
    """
    search = _Search()
    encoder, lm = error.readable.get("vision_encoder"), error.readable.get("language_model")
    with quiet_libraries():
        if encoder is not None and encoder.name:
            search.attempt(lambda: find_tower(encoder))
        if lm is not None and lm.name:
            search.attempt(lambda: find_language_model(lm))
    return [str(problem) for problem in search.problems]


@dataclass
class _Search:
    """Calls functions that may fail, and collects their problems instead of stopping at the first."""

    problems: list[VLMError] = field(default_factory=list)

    def attempt(self, find: Callable[[], Any]) -> Any:
        try:
            return find()
        except VLMError as error:
            self.problems.append(error)
            return None


def _tokenizer(lm: LanguageModelSource, composition: Composition, needed: bool) -> Tokenizer | None:
    other = composition.language_model.tokenizer
    try:
        return lm.tokenizer(other)
    except VLMError:
        if needed or other:
            raise
        logger.info("%s has no tokenizer; its vocabulary is taken from its configuration", lm.name)
        return None


def find_shape(tower: Tower, composition: Composition) -> tuple[int, int]:
    """Return the number of patches and channels of a tower's features.

    Raises:
        VLMError: if it gives none with the composition's settings.
    """
    options = composition.vision_encoder
    try:
        with limited_size(f"vision encoder {options.name!r}"):
            return find_tower_shape(tower.config, **options.feature_arguments)
    except CheckpointError:  # too large
        raise
    except Exception as error:
        asked = {"layer": options.layer, "image_size": options.image_size, **options.openclip_settings}
        raise CompositionError(
            f"vision encoder {options.name!r} does not give features with "
            f"{' and '.join(f'{key}={value}' for key, value in asked.items())}: {explain_reading(error)}."
        ) from None


def check_fit(blueprint: Blueprint) -> None:
    """Check that the parts fit each other.

    Raises:
        CompositionError: with each misfit between parts that exist.
    """
    model = blueprint.meta_model
    problems: list[VLMError] = []
    if (named := model.config.composition.language_model.decoder_layers) is not None:
        decoder_layers(model.lang_model, named)  # a fusion without blocks in the layers would not notice a wrong name
    width = model.media_width(find_widths(model.lang_model).embedding)
    if width is not None and model.vision_tokenizer.dim_out != width:
        problems.append(
            CompositionError(
                f"vision_tokenizer.dim_out={model.vision_tokenizer.dim_out} does not fit: in the language stream, "
                f"vision tokens have the {width} channels of the language model's embeddings. Leave dim_out out."
            )
        )
    if problem := model.fusion_problem():
        problems.append(CompositionError(problem))
    try:
        check_tiling(model.config.composition.tiling, *blueprint.image_processor.preprocessing.tiles)
    except CompositionError as error:
        problems.append(error)
    budget = ContextBudget.of(model)
    positions = budget.positions(1, [MediumSize()])
    left = budget.left(positions)
    if left is not None and left < 1:
        problems.append(
            CompositionError(
                f"one image takes {positions} positions, but the language model has {budget.context}. Choose a vision "
                "tokenizer with fewer tokens (perceiver, qformer), another vision encoder, or cross-attention."
            )
        )
    _raise(problems)


def _raise(problems: list[VLMError]) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise CompositionError([str(problem) for problem in problems])


def create(
    blueprint: Blueprint,
    *,
    random_weights: bool = False,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
    progress: Callable[[str], None] = logger.info,
) -> VLM:
    """Load the pretrained parts of a blueprint, and make the model around them.

        model = vlm_cli.create(vlm_cli.plan(composition))

    Args:
        blueprint: what `plan` found.
        random_weights: whether the pretrained parts get random weights, too; nothing is downloaded then.
        dtype: of all weights; "auto" takes that of the language model.
        seed: seed for random weights.
        progress: called with the name of each step before it begins.

    Returns:
        The model, in evaluation mode.

    Raises:
        VLMError: if weights cannot be fetched or do not fit.
    """
    config = blueprint.config
    if isinstance(dtype, str):
        dtype = stored_dtype(config.get_text_config()) or torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if random_weights:
            progress("drawing random weights")
            check_memory(blueprint.meta_model, "this model")
            model = put_together(config, None, None)
        else:
            progress(f"loading vision encoder {config.composition.vision_encoder.name}")
            visual = load_tower(blueprint.tower)
            progress(f"loading language model {blueprint.language_model.name}")
            lang_model = blueprint.language_model.load(dtype)
            progress("composing")
            model = put_together(config, visual, lang_model)
        lm = model.lang_model
        model.added_tokens.start_at_mean(lm.get_input_embeddings(), lm.get_output_embeddings())
    cast(model, dtype)
    model.config.dtype = model.config.text_config.dtype = dtype
    model.generation_config = generation_config(model)
    return model.eval()


def put_together(config: VLMConfig, visual: nn.Module | None, lang_model: PreTrainedModel | None) -> VLM:
    """Make a model around its pretrained parts; a part that is None is made with random weights."""
    encoder = None
    if visual is not None:
        encoder = VisionEncoder(visual, **config.composition.vision_encoder.feature_arguments)
    return VLM(config, vision_encoder=encoder, lang_model=lang_model)


def cast(model: VLM, dtype: torch.dtype) -> None:
    """Cast every tensor that a file holds. Other buffers (rotary frequencies) keep their dtype, as after loading."""
    saved = set(model.state_dict())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _stop_tokens(config: PreTrainedConfig, tokenizer: Tokenizer | None, added: list[str]) -> list[int] | None:
    """Return the ids that end an answer: those of the language model and of its tokenizer, and the end of a chunk."""
    stops = list(stop_token_ids(config.get_text_config(decoder=True), tokenizer))
    if tokenizer is not None and END_OF_CHUNK in added:
        end = tokenizer.convert_tokens_to_ids(END_OF_CHUNK)
        stops += [end] if isinstance(end, int) and end not in stops else []
    return stops or None


def generation_config(model: VLM) -> GenerationConfig:
    """Return the language model's own settings of generation, with the pad and stop tokens of the model."""
    config, _ = inherit_checked(model.lang_model.generation_config, model.config.composition.language_model.name)
    config.pad_token_id = model.config.pad_token_id
    config.eos_token_id = list(stop_token_ids(config, model.config)) or None
    return config
