"""Replace parts of a published model by others: which parts were named, which start anew with them, and what to say.

    part that is replaced   starts anew, too
    vision_encoder          vision_tokenizer, which has learned the features of the old one
    vision_tokenizer        -
    fusion                  -
    language_model          added_tokens and fusion; vision_tokenizer, if vision tokens stand among the text

A vision tokenizer or fusion that this table keeps starts anew, too, if one of its tensors has no place any more.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from vlm_cli.checkpoint.parts.language_models import find_language_model
from vlm_cli.checkpoint.parts.vision_encoders import describe_random_tower, find_tower
from vlm_cli.checkpoint.published.fill import FillPlan, KeyReport
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.composition import PARTS, Composition, LanguageModelOptions, VisionEncoderOptions
from vlm_cli.errors import CompositionError, VLMError
from vlm_cli.modeling.language_model import find_widths
from vlm_cli.modeling.towers import find_tower_shape
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of

__all__ = ["Swap", "find_swap", "own_composition"]


@dataclass(frozen=True)
class Swap:
    """What replaces parts of a checkpoint.

    Attributes:
        own: the composition of the checkpoint itself.
        named: the parts that the user replaces, of `PARTS`; empty if none is.
        new: the parts that start anew, those of `named` included.
        doubtful: backbones that may replace those with which the checkpoint was trained.
    """

    own: Composition
    named: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that are new."""
        return tuple(VLM.PART_PREFIXES[part] for part in self.new)

    def decide(self, fits: bool) -> Swap:
        """Return the swap in which the doubtful backbones replace others, unless the checkpoint fits them."""
        named = self.named if fits else tuple(x for x in PARTS if x in (*self.named, *self.doubtful))
        return replace(self, named=named, doubtful=())

    def spread(self, model: VLM) -> Swap:
        """Return the swap with the parts that depend on the ones that were named."""
        new = set(self.named)
        if "language_model" in new:
            new |= {"added_tokens", "fusion"}
            if model.media_width(find_widths(model.lang_model).embedding) is not None:
                new.add("vision_tokenizer")
        if "vision_encoder" in new:
            new.add("vision_tokenizer")
        return self._with(new)

    def widen(self, plan: FillPlan) -> Swap:
        """Return the swap with the vision tokenizer and the fusion, if the checkpoint's tensors do not fill them."""
        new = set(self.new)
        for part in ("vision_tokenizer", "fusion"):
            prefix = VLM.PART_PREFIXES[part]
            if any(name.startswith(prefix) for name in (*plan.report.missing, *plan.unfit)):
                new.add(part)
        return self._with(new)

    def _with(self, new: Collection[str]) -> Swap:
        return replace(self, new=tuple(part for part in PARTS if part in new))

    def notes(self, model: VLM, report: KeyReport) -> tuple[str, ...]:
        """Say for each part whether its tensors were kept, and where they come from otherwise; nothing without a swap.

        Raises:
            CompositionError: if nothing of the checkpoint is kept.
        """
        if not self.named:
            return ()
        if not report.loaded:
            raise CompositionError(
                "every part of the checkpoint would be replaced, so nothing of it remains. Leave --from out, or keep a "
                "part."
            )
        composition = model.config.composition
        state = model.state_dict()
        sources = {
            "vision_encoder": f"the weights of {composition.vision_encoder.name!r}",
            "language_model": f"the weights of {composition.language_model.name!r}",
            "added_tokens": "they start at the mean of the language model's rows",
        }
        notes = []
        numbers = {part: sum(name.startswith(VLM.PART_PREFIXES[part]) for name in state) for part in PARTS}
        for part, number in numbers.items():
            if not number:
                continue
            told = "kept" if part not in self.new else f"new, {sources.get(part, 'random weights')}"
            notes.append(f"{part}: {count_of(number, 'tensor')} {told}.")
        random = [part for part in ("vision_tokenizer", "fusion") if part in self.new and numbers[part]]
        if idle := [part for part in random if part not in composition.trainable]:
            notes.append(
                f"{' and '.join(idle)} {'is' if len(idle) == 1 else 'are'} random and would not train: add "
                f"--trainable {','.join([*composition.trainable, *idle])}."
            )
        if "vision_encoder" in self.new and (random_tower := describe_random_tower(composition.vision_encoder)):
            notes.append(random_tower)
        return tuple(notes)


def own_composition(description: CheckpointDescription, composition: Composition) -> Composition:
    """Return the composition of a checkpoint itself, with the user's names for backbones that it does not name."""
    layer = {
        part: {"name": getattr(composition, part).name}
        for part in ("vision_encoder", "language_model")
        if not description.composition.get(part, {}).get("name")
    }
    return Composition.compose(None, description.composition, layer)


def find_swap(description: CheckpointDescription, composition: Composition) -> Swap:
    """Compare what the user wants with what a checkpoint holds.

    The name of a backbone that the checkpoint does not hold is a guess by its layout, and another name may be that of a
    copy, of a variant that was trained further, or of the true one. So it is doubtful whether one of another structure
    replaces it, until the checkpoint's tensors are found not to fit.
    """
    own = own_composition(description, composition)
    encoder, lm = composition.vision_encoder, composition.language_model
    other_encoder, other_lm = encoder.name != own.vision_encoder.name, lm.name != own.language_model.name
    holds_encoder, holds_lm = description.vision_config is not None, description.text_config is not None
    replaces = {
        "vision_encoder": other_encoder and holds_encoder,
        "vision_tokenizer": composition.vision_tokenizer.type != own.vision_tokenizer.type,
        "fusion": composition.fusion.type != own.fusion.type,
        "language_model": other_lm and holds_lm,
    }
    may_replace = {
        "vision_encoder": other_encoder
        and not holds_encoder
        and _channels(own.vision_encoder) not in (None, _channels(encoder)),
        "language_model": other_lm and not holds_lm and _sizes(own.language_model) not in (None, _sizes(lm)),
    }
    named, doubtful = (tuple(part for part in PARTS if of.get(part)) for of in (replaces, may_replace))
    return Swap(own, named, doubtful=doubtful)


def _channels(options: VisionEncoderOptions) -> int | None:
    """Return the channels of a vision encoder's features; None if it cannot be found here."""
    try:
        return find_tower_shape(find_tower(options).config, **options.feature_arguments)[1]
    except Exception:  # whoever builds the model says what is wrong
        return None


def _sizes(options: LanguageModelOptions) -> tuple[object, ...] | None:
    """Return width, depth and vocabulary of a language model; None if it cannot be found here."""
    try:
        config = find_language_model(options).config.get_text_config(decoder=True)
    except VLMError:
        return None
    return config.hidden_size, config.num_hidden_layers, config.vocab_size
