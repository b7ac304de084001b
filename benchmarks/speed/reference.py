"""The reference from a checkout of mlfoundations/open_flamingo, branch reduce-scope-mllm; nothing of it is copied."""

from __future__ import annotations

import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import nn

from benchmarks.speed.measure import Skipped

__all__ = ["build", "find"]

_CLASSES = {"flamingo": "Flamingo", "kosmos": "Kosmos", "blip": "BLIP", "llava": "Llava"}


def find(checkout: Path | None, family: str) -> type[nn.Module]:
    """The reference's class of a family: flamingo, kosmos, blip or llava.

    Raises:
        Skipped: if there is no checkout.
    """
    if checkout is None:
        raise Skipped("give --open-flamingo PATH")
    if not (checkout / "open_flamingo" / "src" / f"{family}.py").is_file():
        raise Skipped("--open-flamingo holds no open_flamingo/src of branch reduce-scope-mllm")
    return getattr(_module(checkout, family), _CLASSES[family])


def build(model_class: Any, tower: Any, lang_model: Any, vocabulary: int, dim: int) -> nn.Module:
    """A model around a tower and a language model, both of which it changes.

    The reference's factory would build every tower for images of 490 pixels, so its classes are called.

    Args:
        model_class: what `find` gave.
        tower: OpenCLIP's vision transformer.
        lang_model: a LLaMA.
        vocabulary: tokens of the language model; the added ones come after them.
        dim: channels of the tower's patches.
    """
    tower.output_tokens = True
    options: dict[str, Any] = {"cross_attn_every_n_layers": 1} if model_class.__name__ == "Flamingo" else {}
    model = model_class(
        vision_encoder=tower,
        lang_model=lang_model,
        vis_feature_dim=dim,
        initial_tokenizer_len=vocabulary,
        pad_token_id=0,
        decoder_layers_attr_name="model.layers",
        **options,
    )
    names = list(model.special_tokens.values())
    model.lang_model.config.vocab_size = vocabulary + len(names)
    model.set_special_token_ids({name: vocabulary + i for i, name in enumerate(names)})
    return model


def _module(checkout: Path, name: str) -> types.ModuleType:
    if "einops_exts" not in sys.modules and find_spec("einops_exts") is None:
        # The one function of that package that the reference calls.
        stand_in: Any = types.ModuleType("einops_exts")
        stand_in.rearrange_many = lambda xs, pattern, **sizes: [rearrange(x, pattern, **sizes) for x in xs]
        sys.modules["einops_exts"] = stand_in
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module(f"open_flamingo.src.{name}")
