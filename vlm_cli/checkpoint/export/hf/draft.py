"""What a class of Transformers would be made of, to hold a model as well as it can.

A class of this folder turns a composition into the class's settings, where the class has such a setting. What it cannot
hold is found afterwards (`fit.py`): the import reads the draft as if it were a published checkpoint, and what it reads
is compared with the composition.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlm_cli.checkpoint.export.hf.towers import STAND_IN, HFTower
from vlm_cli.checkpoint.published.layouts.base import Layout
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.vlm import VLM
from vlm_cli.preprocessing import make_preprocessing, three

__all__ = ["Draft", "HFClass", "SoftToken", "Source", "image_settings", "make_one_view", "soft_token", "split_text"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model that is written.

    Attributes:
        config: of the VLM.
        tower: its vision encoder in Transformers' terms.
        text_config: of its language model, as plain data with a `model_type`.
        tokenizer: its tokenizer; None where only the configuration is known.
        num_positions: vision tokens of a view.
        problems: gets what a class finds in the model that it cannot hold.
    """

    config: VLMConfig
    tower: HFTower
    text_config: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase | None = None
    num_positions: int = 0
    problems: list[str] = field(default_factory=list)

    def option(self, part: str, name: str, default: Any = None) -> Any:
        """Return a setting of a part; the default if the part's type does not have it."""
        chosen: Any = getattr(self.config.composition, part)
        return getattr(getattr(chosen, "options", chosen), name, default)

    @property
    def layer(self) -> int | list[int]:
        """The layers of the vision encoder whose features are read, counted from the end."""
        layer = self.config.composition.vision_encoder.layer
        return list(layer) if isinstance(layer, tuple) else layer

    def named_token(self, name: str, default: str) -> str:
        """Return a special token that the tokenizer has under a name, as published tokenizers do."""
        found = getattr(self.tokenizer, name, None) if self.tokenizer is not None else None
        return found if isinstance(found, str) else default

    def check_tokens(self, *texts: str) -> None:
        """Check that texts around a picture are single tokens; else there is a problem."""
        known = None if self.tokenizer is None else self.tokenizer.get_vocab()
        if wrong := [text for text in texts if not text or (known is not None and text not in known)]:
            self.problems.append(
                f"tiling.picture_text has {wrong[0]!r} beside a picture; the class has a token of the tokenizer there."
            )

    @property
    def square(self) -> dict[str, int]:
        """The pixels of what the vision encoder reads, as image processors have them."""
        return {"height": self.tower.image_size, "width": self.tower.image_size}

    def describe(self, model_type: str, token: SoftToken | None = None) -> dict[str, Any]:
        """Return the settings of a class that say what its parts are.

        The language model's tables get a row for each token that vlm added, unless the class's own token stands for
        vision tokens.

        Args:
            model_type: of the class.
            token: at the positions of vision tokens; None for vlm's.
        """
        first, num = self.config.first_added_id, len(self.config.added_tokens)
        size = self.config.get_text_config(decoder=True).vocab_size
        rows = {"vocab_size": max(size, first + num)} if token is None or token.is_added else {}
        return {
            "model_type": model_type,
            "vision_config": dict(self.tower.config),
            "text_config": {**self.text_config, **rows},
        }


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A class's settings.

    Attributes:
        config: content of `config.json`, with `model_type`.
        images: the image processor, with its torchvision backend, which Transformers takes by default.
        processor: settings of the class of processors.
        parts: what the processor has beside its image processor and its tokenizer.
        media_token: what a prompt has in the place of a picture.
        named_tokens: name -> special token that the tokenizer has under this name.
        token_ids: id -> token of the tokenizer that `config` names by its id.
        has_added_rows: whether the tables get a row for each token that vlm added.
        ends_prompts_with: text that the class's processor puts after each prompt.
        plain_prompt: what the class's processor makes of a picture and `{text}`, if it takes no chat template.
        kept_tokens: added tokens without a row in the tables that the tokenizer keeps: prompts are searched for them.
        unanswered: ids whose rows the class takes from elsewhere once a prompt has passed; no answer has them.
    """

    config: Mapping[str, Any]
    images: Any
    processor: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    media_token: str = MEDIA_TOKEN
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    token_ids: Mapping[int, Any] = field(default_factory=dict)
    has_added_rows: bool = True
    ends_prompts_with: str = ""
    plain_prompt: str | None = None
    kept_tokens: Sequence[str] = ()
    unanswered: Sequence[int] = ()


class HFClass(ABC):
    """A class of Transformers' VLMs that vlm writes.

    Attributes:
        layout: reads what is written; its tables and settings are those of the import.
        model: name of the class.
        processor: name of its processor's class.
        tower: pattern before the names of the vision encoder's tensors, in memory.
        language_models: types of language models that the class computes as they are; None for every type whose head
            is a plain linear map.
        takes_maps: whether the class reads a vision encoder whose output is a map.
        takes_timm: whether it makes its vision encoder of timm, by Transformers' wrapper.
        stand_in: takes the place of a vision encoder that the class does not hold, so that the rest can be judged.
    """

    layout: Layout
    model: str
    processor: str
    tower: str = r"model\.vision_tower\."
    language_models: tuple[str, ...] | None = None
    takes_maps: bool = False
    takes_timm: bool = False
    stand_in: HFTower = STAND_IN

    @abstractmethod
    def draft(self, source: Source) -> Draft:
        """Return the settings with which the class is nearest to a model.

        Raises:
            NotHeld: if the class has no settings for the model's vision encoder or tokens.
        """

    def find_tables(self, model: VLM, config: Any) -> tuple[Tensor, Tensor]:
        """Return the language model's embedding and head as the class has them; one tensor twice if they are tied.

        Args:
            model: the VLM.
            config: of the class.
        """
        lm = model.lang_model
        return lm.get_input_embeddings().weight, lm.get_output_embeddings().weight


@dataclass(frozen=True)
class SoftToken:
    """The token at the positions of vision tokens.

    Attributes:
        text: of the token.
        id: of the token.
        is_added: whether it is one that vlm added, and not the tokenizer's own.
    """

    text: str
    id: int
    is_added: bool


def soft_token(source: Source, name: str, text: str = MEDIA_TOKEN) -> SoftToken:
    """Return the token that a published tokenizer has for vision tokens; else vlm's `<image>`.

    Args:
        source: with the tokenizer.
        name: under which the tokenizer has it.
        text: of the token in a tokenizer that names none.
    """
    known = {} if source.tokenizer is None else source.tokenizer.get_vocab()
    found = source.named_token(name, text if text in known else MEDIA_TOKEN)
    if found == MEDIA_TOKEN or source.tokenizer is None:
        return SoftToken(MEDIA_TOKEN, source.config.media_token_id, True)
    return SoftToken(found, int(known[found]), False)


def split_text(source: Source, name: str, at: str) -> tuple[str, str]:
    """Return what a text of the tiling has before and after a placeholder; empty texts without one.

    Args:
        source: with the tiling.
        name: of the text.
        at: the placeholder.
    """
    before, found, after = str(source.option("tiling", name) or "").partition(at)
    return (before, after) if found else ("", "")


def image_settings(config: VLMConfig) -> dict[str, Any]:
    """Return the settings of Transformers' image processors that say how a view becomes numbers."""
    found = make_preprocessing(config.vision_config.get("preprocess") or {})
    return {
        "image_mean": three(found.config.mean),
        "image_std": three(found.config.std),
        "resample": int(found.filter),
    }


def make_one_view(source: Source) -> Any:
    """Return the image processor of a picture that is one view: stretched, or its middle."""
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    given: Any = source.config.vision_config.get("preprocess") or {}
    if given.get("resize_mode") == "squash":
        return SiglipImageProcessor(size=source.square, **image_settings(source.config))
    size = {"shortest_edge": given.get("shortest_edge", source.tower.image_size)}
    return CLIPImageProcessor(size=size, crop_size=source.square, **image_settings(source.config))
