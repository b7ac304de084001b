"""Whether a class of Transformers holds a composition, and if not, which settings stand in the way.

The import reads a draft of the class as if it were a published checkpoint. Each setting that it reads and that differs
from the composition's is a setting that the class cannot hold. So the export knows no more of a class than the import.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, Source
from vlm_cli.checkpoint.export.hf.language import HFLanguageModel, find_hf_language_model
from vlm_cli.checkpoint.export.hf.tensors import Plan, plan_tensors
from vlm_cli.checkpoint.export.hf.towers import HFTower, NotHeld, find_hf_tower, find_timm_tower
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint, TensorInfo
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.targets import Target, make_targets_of
from vlm_cli.composition import Composition
from vlm_cli.errors import VLMError, first_line
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.meta import SkipsFilling, meta_device
from vlm_cli.modeling.vlm import VLM
from vlm_cli.preprocessing import make_preprocessing, three
from vlm_cli.schema import show
from vlm_cli.trust import make_config

__all__ = ["Fit", "Subject", "fit_class"]

#: Settings that no picture and no text reaches: those of clips, of training, and widths that follow from other parts.
_NO_MATTER = ("frames", "dropout", "dim_out", "max_num_frames", "frame_text", "between_frames_text")
_ADDRESS = "the export"


@dataclass(frozen=True)
class Fit:
    """What a class makes of a composition.

    Attributes:
        draft: the class's settings.
        config: the class's configuration.
        problems: what stands in the way; empty if the class holds the composition.
        plan: where the class's tensors come from; None if there are problems.
        is_exact: whether the class also treats clips as the composition does.
    """

    draft: Draft
    config: Any
    problems: tuple[str, ...]
    plan: Plan | None = None
    is_exact: bool = False


@dataclass(frozen=True)
class Subject:
    """The model that classes judge, and what each of them has to know of it.

    Attributes:
        config: of the VLM.
        model: the VLM on the meta device.
        tokenizer: of the VLM, if it is known.
        language: its language model in Transformers' terms.
    """

    config: VLMConfig
    model: VLM
    tokenizer: PreTrainedTokenizerBase | None
    language: HFLanguageModel

    @classmethod
    def of(cls, config: VLMConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Subject:
        """Look at a model. No weights are read."""
        with meta_device(), SkipsFilling():
            model = VLM(config)
        return cls(config, model, tokenizer, find_hf_language_model(config.text_config))

    def find_tower(self, target: HFClass) -> HFTower:
        """Describe the vision encoder in Transformers' terms, as a class has it.

        Raises:
            NotHeld: if the class does not hold it.
        """
        find = find_timm_tower if target.takes_timm else find_hf_tower
        name = self.config.composition.vision_encoder.name
        tower = find(self.config.vision_config, name)
        if tower.is_map != target.takes_maps:
            gives, reads = ("a map", "a row of patches") if tower.is_map else ("a row of patches", "a map")
            raise NotHeld(f"vision_encoder {name!r} gives {gives}; the class reads {reads}.")
        return tower


def fit_class(target: HFClass, subject: Subject) -> Fit:
    """Find out whether a class holds a composition. No weights are read."""
    config = subject.config
    text, problems = _find_text_config(target, subject)
    source = Source(
        config=config,
        tower=target.stand_in,
        text_config=text,
        tokenizer=subject.tokenizer,
        num_positions=subject.model.vision_tokenizer.num_tokens(1),
    )
    draft = Draft(config={}, images=None)
    try:
        try:
            source = replace(source, tower=subject.find_tower(target))
            draft = target.draft(source)
        except NotHeld as error:
            problems.append(str(error))
            source = replace(source, tower=target.stand_in, tokenizer=None, problems=[])
            draft = target.draft(source)
        problems += source.problems
        theirs_config: Any = make_config(**draft.config)
        theirs_config.tie_word_embeddings = getattr(theirs_config.get_text_config(), "tie_word_embeddings", False)
        with meta_device(), SkipsFilling():
            theirs = getattr(transformers, target.model)(theirs_config)
        found = _read_back(target, draft, theirs)
        is_known = source.tower is not target.stand_in
        problems += _differences(config, found, source.tower if is_known else None)
    except (NotHeld, VLMError) as error:
        return Fit(draft, None, (*problems, f"{first_line(error).replace(f'{_ADDRESS!r} ', 'the class ')}."))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return Fit(draft, None, (*problems, f"the class cannot be made of these parts: {first_line(error)}."))
    if problems:
        return Fit(draft, theirs_config, tuple(problems))
    tower_of, layout_of = make_targets_of(source.tower.make_rules(target.tower)), found.targets_for(config)

    def targets_of(name: str) -> Sequence[Target] | None:
        targets = tower_of(name)
        return layout_of(name) if targets is None else targets

    unneeded = f"{found.optional_pattern}|{source.tower.unneeded}"
    plan = plan_tensors(subject.model, theirs, targets_of, unneeded)
    same_clips = _clips_as(config, found)
    return Fit(draft, theirs_config, tuple(_tensor_problems(plan)), plan, is_exact=same_clips)


def _find_text_config(target: HFClass, subject: Subject) -> tuple[Mapping[str, Any], list[str]]:
    """Return the configuration of the language model, or of one that the class has; and what stands in the way."""
    language, known, kind = subject.language, target.language_models, subject.config.text_config.model_type
    problems = ["language_model.head_bias is true; the class has false."]
    problems = problems if subject.config.composition.language_model.head_bias else []
    if known is None:
        return language.config or {"model_type": "llama"}, [*language.problems, *problems]
    if language.config is not None and language.config["model_type"] in known:
        return language.config, problems
    return {"model_type": known[0]}, [f"language_model is of type {kind}; it would have to be {' or '.join(known)}."]


def _read_back(target: HFClass, draft: Draft, theirs: nn.Module) -> CheckpointDescription:
    """Read a draft as the import reads a published checkpoint."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokens = {"extra_special_tokens": draft.named_tokens, "added_tokens_decoder": draft.token_ids}
        (folder / "config.json").write_text(json.dumps(draft.config), encoding="utf-8")
        (folder / "preprocessor_config.json").write_text(draft.images.to_json_string(), encoding="utf-8")
        (folder / "processor_config.json").write_text(json.dumps(draft.processor), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens), encoding="utf-8")
        tensors = {k: TensorInfo(tuple(x.shape), x.dtype, folder) for k, x in theirs.state_dict().items()}
        return target.layout.describe(PublishedCheckpoint(_ADDRESS, folder, tensors, draft.config))


def _differences(config: VLMConfig, found: CheckpointDescription, tower: HFTower | None) -> Iterator[str]:
    """Say what a class has other than a composition; without a tower, nothing is said of the vision encoder."""
    ours = config.composition
    read = found.composition
    if ours.tiling.type == "none":
        read = {**read, "tiling": _without_single_tile(read.get("tiling", {"type": "none"}))}
    theirs = Composition.compose(None, read, {})
    for part in ("vision_tokenizer", "fusion", "tiling"):
        one, other = getattr(ours, part), getattr(theirs, part)
        if one.type != other.type:
            yield f"{part} is {one.type}; the class has {other.type}."
        else:
            yield from _option_differences(part, *(_spelled_out(x, tower) for x in (one.options, other.options)))
    if tower is not None:
        yield from _feature_differences(ours.vision_encoder, theirs.vision_encoder, tower)
        assert found.vision_config is not None
        if ours.tiling.type == theirs.tiling.type:
            yield from _pixel_differences(config, found.vision_config["preprocess"])


def _without_single_tile(tiling: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return no tiling for a grid of one tile that has no text of its own: both show a picture as one view."""
    known = {"type", "choose", "min_tiles", "max_tiles", "picture_text", *_NO_MATTER}
    if tiling["type"] != "grid" or tiling.get("max_tiles") != 1 or not tiling.keys() <= known:
        return tiling
    return {key: x for key, x in tiling.items() if key not in ("choose", "min_tiles", "max_tiles")} | {"type": "none"}


def _spelled_out(options: Any, tower: HFTower | None) -> Any:
    """Return settings with the values of those that follow from others."""
    side = 0 if tower is None else tower.image_size
    defaults = {"longest_edge": 4 * side, "tile_size": side, "whole_text": getattr(options, "thumbnail_text", None)}
    unset = {key: x for key, x in defaults.items() if hasattr(options, key) and getattr(options, key) is None and x}
    return replace(options, **unset) if unset else options


def _option_differences(part: str, ours: Any, theirs: Any) -> Iterator[str]:
    has_norm = getattr(ours, "norm", None) or getattr(theirs, "norm", None)
    for field in fields(ours):
        name = field.name
        if name in _NO_MATTER or name.startswith("clip_") or (name.startswith("norm_") and not has_norm):
            continue
        if name == "pool_at" and (ours.pool, theirs.pool) == (1, 1):
            continue
        if (one := getattr(ours, name)) != (other := getattr(theirs, name)):
            yield f"{part}.{name} is {show(one)}; the class has {show(other)}."


def _clips_as(config: VLMConfig, found: CheckpointDescription) -> bool:
    """Say whether clips are cut and announced alike."""
    one, other = config.composition.tiling.options, Composition.compose(None, found.composition, {}).tiling.options
    names = [x.name for x in fields(one) if x.name.startswith("clip_") or x.name in _NO_MATTER]
    return all(getattr(one, name) == getattr(other, name, None) for name in names)


def _feature_differences(ours: Any, theirs: Any, tower: HFTower) -> Iterator[str]:
    if ours.layers != theirs.layers:
        yield f"vision_encoder.layer is {show(ours.layer)}; the class has {show(theirs.layer)}."
    if ours.class_token != theirs.class_token:
        yield f"vision_encoder.class_token is {show(ours.class_token)}; the class has {show(theirs.class_token)}."
    one = (-1 in ours.layers and tower.has_norm) if ours.norm is None else ours.norm
    other = (-1 in theirs.layers and tower.is_normed) if theirs.norm is None else theirs.norm
    if one != other:
        how, theirs_does = ("passes", "does not") if one else ("does not pass", "does")
        advice = " Take layer -2, or set norm to false." if one and -1 in ours.layers else ""
        place = f"layer {show(ours.layer)} of the vision encoder"
        yield f"{place} {how} its last norm; in the class it {theirs_does}.{advice}"


def _pixel_differences(config: VLMConfig, theirs: Mapping[str, Any]) -> Iterator[str]:
    """Say what is done to every picture other than in the class."""
    ours = make_preprocessing(config.vision_config.get("preprocess") or {})
    back = make_preprocessing(theirs)
    mode = None if config.composition.tiling.type != "none" else ours.config.resize_mode or "shortest"
    for name, one, other in (
        ("size", (ours.width, ours.height), (back.width, back.height)),
        ("mean", three(ours.config.mean), three(back.config.mean)),
        ("std", three(ours.config.std), three(back.config.std)),
        ("interpolation", ours.filter.name.lower(), back.filter.name.lower()),
        ("resize_mode", mode, mode and (back.config.resize_mode or "shortest")),
        ("squashed", ours.squashed, back.squashed if mode == "squash" else ours.squashed),
        ("shortest_edge", ours.edge, back.edge if mode == "shortest" else ours.edge),
    ):
        if one != other:
            yield f"pictures are prepared with {name} {show(one)}; the class has {show(other)}."


def _tensor_problems(plan: Plan) -> Iterator[str]:
    if plan.unfilled:
        yield f"the class has {plan.unfilled[0]}, and the model has no tensor for it."
    if plan.misfit:
        yield f"{plan.misfit[0]} has another shape in the class, where the vocabulary counts the added tokens."
    if plan.left_over:
        yield f"the model has {plan.left_over[0]}, and the class has no tensor for it."
