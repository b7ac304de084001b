"""What a check examines: the whole model, or its bare language model with text alone.

A check that fails on the whole model runs again on the bare language model. If that fails as badly, the language model
is the reason. Both subjects therefore offer the same calls.

B rows, T tokens, V columns of the logits.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from vlm_cli.modeling.lm_interface import LanguageModelInterface
from vlm_cli.modeling.vlm import VLM
from vlm_cli.tiling import MediumSize
from vlm_cli.tiling.texts import list_shapes

__all__ = [
    "NUM_DECODED",
    "BareLanguageModel",
    "Decoded",
    "Inputs",
    "Subject",
    "WholeModel",
    "find_special_ids",
    "without_hooks",
]

NUM_DECODED = 4  # tokens that a check decodes
_MAX_ID = 50_000  # random prompts draw from the ids below
_MAX_SPECIAL = 16  # special tokens in a prompt


@dataclass(frozen=True)
class Inputs:
    """One prompt.

    Attributes:
        lang_x: int[1, T] tokens.
        vision_x: float[1, T_img, F, C, H, W] media, or None.
        sizes: of the media; empty for pictures of one view.
        prefix: tokens at the start that all see each other, if the fusion's mask is `prefix`; None for all.
    """

    lang_x: Tensor
    vision_x: Tensor | None = None
    prefix: int | None = None
    sizes: tuple[MediumSize, ...] = ()

    @property
    def media(self) -> dict[str, Any]:
        """The arguments of `VLM.encode_vision`."""
        if not self.sizes or self.vision_x is None:
            return {"vision_x": self.vision_x}
        views = torch.tensor([[size.num_frames for size in self.sizes]])
        mask = torch.arange(self.vision_x.shape[2]) < views[..., None]
        grid = torch.tensor([[size.grid for size in self.sizes]])
        device = self.vision_x.device
        return {"vision_x": self.vision_x, "vision_mask": mask.to(device), "vision_grid": grid.to(device)}

    def to_dict(self) -> dict[str, Any]:
        """Return the keyword arguments of `VLM.forward`."""
        inputs = {"lang_x": self.lang_x, **self.media}
        if self.prefix is not None:
            inputs["prefix_mask"] = (torch.arange(self.lang_x.shape[1]) < self.prefix)[None].to(self.lang_x.device)
        return inputs

    def with_other_media(self, k: int | None = None) -> Inputs:
        """Return the same tokens with other images; only the k-th image changes if k is given."""
        if self.vision_x is None:
            return self
        vision_x = self.vision_x.clone()
        at = slice(None) if k is None else slice(k, k + 1)
        vision_x[:, at] = 1 - vision_x[:, at].flip(-1)
        return replace(self, vision_x=vision_x)

    def continued(self, sequence: Tensor) -> Inputs:
        """Return the same prompt with an answer, int[1, T + new tokens] together."""
        return replace(self, lang_x=sequence, prefix=self.lang_x.shape[1])


@dataclass(frozen=True)
class Decoded:
    """A greedy answer.

    Attributes:
        logits: float[B, NUM_DECODED, V].
        sequences: int[B, T + NUM_DECODED], the prompt and the answer.
    """

    logits: Tensor
    sequences: Tensor


class Subject(Protocol):
    """A model under examination.

    Attributes:
        model: the `VLM`, whose language model is the bare one.
        forbidden_ids: tokens that greedy decoding never chooses.
    """

    model: VLM
    forbidden_ids: list[int]

    @property
    def pad_token_id(self) -> int:
        """Return a token for padding that the subject knows; the attention mask hides it."""
        ...

    def draw(self, num_media: int, length: int = 9, seed: int = 0) -> Inputs:
        """Return a random prompt: `<image>` at every other token from the second on."""
        ...

    def call(self, lang_x: Tensor, attention_mask: Tensor | None = None, **keywords: Any) -> Any:
        """Run one forward pass and return the model's output, with `logits` float[B, T, V] and a cache."""
        ...

    def logits(self, inputs: Inputs) -> Tensor:
        """Return float[T, V] of one prompt."""
        ...

    def generate(self, lang_x: Tensor, attention_mask: Tensor | None = None, **media: Any) -> Decoded:
        """Decode NUM_DECODED tokens greedily, with a cache."""
        ...


@dataclass
class WholeModel:
    """The `VLM` itself, with media.

    Attributes:
        seed: of prompts and images.
        workspace: an empty directory that the checks may write to.
        special_ids: special tokens of the language model's own.
    """

    model: VLM
    seed: int
    workspace: Path
    special_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        media_token_id = self.model.config.media_token_id
        assert media_token_id is not None
        self.forbidden_ids = [media_token_id]

    @property
    def pad_token_id(self) -> int:
        return self.model.config.pad_token_id or 0

    def draw(self, num_media: int, length: int = 9, seed: int = 0) -> Inputs:
        config, (lang_x, generator) = self.model.config, _draw_text(self.model, self.seed, num_media, length, seed)
        lang_x[0, 1 : 2 * num_media : 2] = config.media_token_id
        added = range(config.first_added_id, config.first_added_id + len(config.added_tokens))
        if words := [i for i in added if i not in (config.media_token_id, config.pad_token_id)]:
            lang_x[0, -2] = words[0]
        lang_x = lang_x.to(self.model.device)
        if not num_media:
            return Inputs(lang_x)
        height, width = self.model.vision_encoder.image_size
        sizes = self._sizes(num_media)
        num_views = max(size.num_frames for size in sizes)
        channels = self.model.vision_encoder.num_channels
        vision_x = torch.randn(1, num_media, num_views, channels, height, width, generator=generator)
        vision_x = vision_x.to(self.model.device, next(self.model.vision_encoder.parameters()).dtype)
        return Inputs(lang_x, vision_x, sizes=sizes if num_views > 1 else ())

    def _sizes(self, num_media: int) -> tuple[MediumSize, ...]:
        """Return sizes of media: a picture of few tiles first, if the composition cuts pictures, then one view."""
        tiling = self.model.config.composition.tiling
        shapes = list_shapes(tiling, self.model.vision_encoder.image_size[::-1])
        tiled = min(
            (size for size in shapes if size.rows * size.columns > 1), key=lambda x: x.num_frames, default=shapes[0]
        )
        return tuple(tiled if k % 2 == 0 else shapes[0] for k in range(num_media))

    @torch.no_grad()
    def call(self, lang_x: Tensor, attention_mask: Tensor | None = None, **keywords: Any) -> Any:
        return self.model(lang_x=lang_x, attention_mask=attention_mask, **keywords)

    def logits(self, inputs: Inputs) -> Tensor:
        return self.call(**inputs.to_dict()).logits[0]

    def generate(self, lang_x: Tensor, attention_mask: Tensor | None = None, **media: Any) -> Decoded:
        return _decode(self.model, self.pad_token_id, lang_x=lang_x, attention_mask=attention_mask, **media)

    @cached_property
    def saved(self) -> Path:
        """The directory of the saved model; the first check that asks for it saves the model."""
        self.without_adapters.save_pretrained(self.workspace)
        return self.workspace

    @cached_property
    def without_adapters(self) -> VLM:
        """The model as a full directory has it: of a model with adapters, a copy into which they are merged."""
        if not self.model.config.adapters:
            return self.model
        merged = copy.deepcopy(self.model)
        merged.merge_adapters()
        return merged


@dataclass
class BareLanguageModel:
    """The language model of a `VLM` without the hooks of the `VLM`; it reads text alone, and its prompts hold no media.

    Attributes:
        seed: of prompts.
    """

    model: VLM
    seed: int

    def __post_init__(self) -> None:
        self.forbidden_ids: list[int] = []

    @property
    def pad_token_id(self) -> int:
        # The bare language model does not know the added tokens.
        padding = self.model.config.pad_token_id or 0
        return 0 if padding >= self.model.config.first_added_id else padding

    def draw(self, num_media: int, length: int = 9, seed: int = 0) -> Inputs:
        lang_x, _ = _draw_text(self.model, self.seed, num_media, length, seed)
        return Inputs(lang_x.to(self.model.device))

    @torch.no_grad()
    def call(self, lang_x: Tensor, attention_mask: Tensor | None = None, **keywords: Any) -> Any:
        lm: PreTrainedModel = self.model.lang_model
        if attention_mask is not None:
            keywords.setdefault("position_ids", (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -lang_x.shape[1] :])
        interface = LanguageModelInterface.of(lm)
        keywords |= {"attention_mask": attention_mask, interface.cache_name: keywords.get("past_key_values")}
        known = interface.arguments
        with without_hooks(lm):
            return lm(input_ids=lang_x, **{k: x for k, x in keywords.items() if k in known and x is not None})

    def logits(self, inputs: Inputs) -> Tensor:
        return self.call(inputs.lang_x).logits[0]

    def generate(self, lang_x: Tensor, attention_mask: Tensor | None = None, **media: Any) -> Decoded:
        with without_hooks(self.model.lang_model):
            return _decode(self.model.lang_model, self.pad_token_id, input_ids=lang_x, attention_mask=attention_mask)


def _draw_text(model: VLM, model_seed: int, num_media: int, length: int, seed: int) -> tuple[Tensor, torch.Generator]:
    """Return int[1, length] random tokens of text, and the generator for what the prompt needs further."""
    generator = torch.Generator().manual_seed(1000 * model_seed + 10 * seed + num_media)
    # Leave out tokens that stand for padding, or for media that the language model itself knows.
    configs = (model.lang_model.config.get_text_config(decoder=True), model.config.text_config, model.config)
    special = {i for ids in _named_ids(*configs).values() for i in ids}
    known = torch.tensor([i for i in range(1, min(model.config.first_added_id, _MAX_ID)) if i not in special])
    return known[torch.randint(len(known), (1, length), generator=generator)], generator


def find_special_ids(model: VLM, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Return special tokens of the language model's own that a text may hold; of many, the lowest and the highest.

    A token is the language model's own if its table has a row for it and the composition did not add it. This function
    does not ask `first_added_id`: the check of text alone finds out whether that is right.
    """
    named = _named_ids(model.lang_model.config.get_text_config(decoder=True), model.config.text_config)
    in_text = [i for key in _IN_TEXT for i in named.get(key, ())]
    if tokenizer is not None:
        added = set(model.config.added_tokens)
        own = {name: i for name, i in tokenizer.get_added_vocab().items() if name not in added}
        in_text += own.values()
    # Some language models know media, whose tokens do not stand in text alone.
    media = {i for key, ids in named.items() if key not in _IN_TEXT for i in ids} | {model.config.media_token_id}
    rows = model.lang_model.get_input_embeddings().weight.shape[0]
    found = sorted({i for i in in_text if isinstance(i, int) and 0 <= i < rows} - media)
    if tokenizer is None:
        found = [i for i in found if i < model.config.first_added_id]
    half = _MAX_SPECIAL // 2
    return tuple(found if len(found) <= _MAX_SPECIAL else [*found[:half], *found[-half:]])


#: Settings that name tokens which may stand in any text.
_IN_TEXT = ("bos_token_id", "eos_token_id")


def _named_ids(*configs: PreTrainedConfig) -> dict[str, set[Any]]:
    """Return the token ids that configurations name, by setting."""
    found: dict[str, set[Any]] = {}
    for config in configs:
        for key, x in vars(config).items():
            if key.endswith("_token_id"):
                found.setdefault(key, set()).update(x if isinstance(x, (list, tuple)) else [x])
    return found


def _decode(model: Any, pad_token_id: int, **inputs: Any) -> Decoded:
    """Decode greedily without the model's own generation settings, which may end or bend an answer."""
    before = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=pad_token_id)
    options = {"max_new_tokens": NUM_DECODED, "do_sample": False, "use_cache": True, "output_logits": True}
    try:
        output = model.generate(**inputs, **options, return_dict_in_generate=True)
        return Decoded(torch.stack(output.logits, dim=1), output.sequences)
    finally:
        model.generation_config = before


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Take all hooks off a module and its submodules inside the block."""
    before = [(m, m._forward_hooks, m._forward_pre_hooks) for m in module.modules()]
    for m, _, _ in before:
        m._forward_hooks, m._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for m, hooks, pre_hooks in before:
            m._forward_hooks, m._forward_pre_hooks = hooks, pre_hooks
