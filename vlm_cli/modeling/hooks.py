"""Hooks on modules of the language model, which other libraries may replace or wrap after the model was made.

PEFT puts an adapter around the embedding table or the head, and a copy of a module in its place. A hook must then run
on what stands in the module's place, and not on what is inside of it or on a copy.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlm_cli.errors import LanguageModelLimit

__all__ = ["Hooks", "ModelHook", "check_tied_rows"]


class ModelHook:
    """A hook that calls a method of a model. In a copy of the hooked module, without the model, it does nothing.

    Args:
        model: the model; a copy of the model has a hook of its own.
        method: name of the method.
    """

    def __init__(self, model: Any, method: str = "") -> None:
        self.model, self.method = model, method

    def __call__(self, *args: Any) -> Any:
        return None if self.model is None else self.run(*args)

    def run(self, *args: Any) -> Any:
        """Call the method with the arguments of the hook."""
        return getattr(self.model, self.method)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelHook:
        copied = copy.copy(self)
        copied.model = memo.get(id(self.model))  # None if the hooked module is copied without the model
        return copied


@dataclass
class _Attached:
    """A hook, the module that has it, and the place of that module."""

    root: nn.Module
    path: str
    hook: ModelHook
    is_before: bool
    module: nn.Module


class Hooks:
    """The hooks of one model, each at a place in its language model."""

    def __init__(self) -> None:
        self._attached: list[_Attached] = []

    def attach(self, root: nn.Module, module: nn.Module, hook: ModelHook, *, is_before: bool = False) -> None:
        """Attach a hook to a module inside `root`.

        Args:
            root: its names for its modules stay.
            module: is hooked now; later whatever has its name.
            hook: is called with the module, its arguments and what it returns; before the module runs, with the module
                and its two kinds of arguments.
            is_before: whether the hook runs before the module.
        """
        path = next(name for name, x in root.named_modules(remove_duplicate=False) if x is module)
        attached = _Attached(root, path, hook, is_before, module)
        _register(attached)
        self._attached.append(attached)

    def follow(self) -> None:
        """Move each hook whose module was replaced or wrapped to the module that has its name now."""
        for attached in self._attached:
            current = attached.root.get_submodule(attached.path)
            if current is not attached.module:
                _remove(attached)
                attached.module = current
                _register(attached)


def check_tied_rows(lang_model: Any) -> None:
    """Refuse trained rows of a table that the head shares, where PEFT trains them in the table alone.

    PEFT asks the VLM whether the two are tied, and the answer stands in the language model. Once such an adapter is
    merged, the head has the trained rows, too, so that the merged model is another one than the trained one.

    Raises:
        LanguageModelLimit: naming PEFT's setting.
    """
    table, head = lang_model.get_input_embeddings(), lang_model.get_output_embeddings()
    is_tied = getattr(lang_model.config.get_text_config(decoder=True), "tie_word_embeddings", False)
    if is_tied and hasattr(table, "token_adapter") and not hasattr(head, "token_adapter"):
        raise LanguageModelLimit(
            "trainable_token_indices would train rows of the embedding table alone, and the head of this language "
            "model shares them. Train the table with LoRA (target_modules), or whole copies of both "
            "(modules_to_save with the names of the embedding table and the head)."
        )


def _register(attached: _Attached) -> None:
    if attached.is_before:
        attached.module.register_forward_pre_hook(attached.hook, with_kwargs=True)
    else:
        attached.module.register_forward_hook(attached.hook)


def _remove(attached: _Attached) -> None:
    for hooks in (attached.module._forward_hooks, attached.module._forward_pre_hooks):
        for number in [number for number, hook in hooks.items() if hook is attached.hook]:
            del hooks[number]
