"""`HookedLanguageModel`: the hooks through which a VLM's language model reads media and added tokens.

The hooks sit at the language model's entrance, at its input embedding and at its head; a fusion adds its own. They read
a `Conditioning` that lives for one call; without one they do nothing.

B rows, T positions of a call, N chosen positions, d channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm_cli.errors import LanguageModelLimit
from vlm_cli.modeling.added_tokens import AddedTokens
from vlm_cli.modeling.conditioning import Conditioning
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.hooks import Hooks, ModelHook, check_tied_rows
from vlm_cli.modeling.language_model import NO_CHUNKED_PREFILL
from vlm_cli.modeling.lm_interface import LanguageModelInterface, is_filled

__all__ = ["HookedLanguageModel"]


class HookedLanguageModel(PreTrainedModel):
    """A model around a language model, which hooks let read media and added tokens. Its layers and tables stay."""

    # Attributes of the `VLM` that inherits this class, and what its fusion does in the hooks.
    config: VLMConfig
    lang_model: Any
    added_tokens: AddedTokens
    hooks: Hooks
    conditioning: Conditioning | None
    condition_call: Callable[..., Conditioning]
    mask_call: Callable[[Conditioning, dict[str, Any]], dict[str, Any]]
    embed_media: Callable[[Tensor, Conditioning], Tensor]

    def _attach_hooks(self) -> None:
        lm = self.lang_model
        lm.register_forward_pre_hook(ModelHook(self, "_enter_language_model"), with_kwargs=True)
        self.hooks.attach(lm, lm.get_input_embeddings(), ModelHook(self, "_embed"))
        self.hooks.attach(lm, lm.get_output_embeddings(), ModelHook(self, "_choose_positions"), is_before=True)
        self.hooks.attach(lm, lm.get_output_embeddings(), ModelHook(self, "_extend_logits"))

    @cached_property
    def lm_interface(self) -> LanguageModelInterface:
        """Names by which the language model takes and returns things."""
        return LanguageModelInterface.of(self.lang_model)

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's input embeddings, without those of added tokens."""
        return self.lang_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's input embeddings."""
        self.lang_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language model's head, without the rows of added tokens."""
        return self.lang_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's head."""
        self.lang_model.set_output_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Return the input embeddings. Another number of tokens is refused, before anything changes.

        Raises:
            LanguageModelLimit: for a number of tokens. Added tokens stand beside the language model's tables.
        """
        if new_num_tokens is None:
            return self.get_input_embeddings()
        raise LanguageModelLimit(
            "a VLM keeps the language model's tables as they are, and added tokens beside them, so "
            "resize_token_embeddings cannot change their number. Name new tokens when you build the model: "
            "--set 'added_tokens=[…]', or Composition.compose(…, {'added_tokens': […]})."
        )

    def get_decoder(self) -> nn.Module:
        """Return the language model's decoder."""
        return self.lang_model.get_decoder()

    @property
    def _conditioning(self) -> Conditioning | None:
        """`conditioning` under its name until 0.1."""
        return self.conditioning

    def _enter_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note what this call reads, and replace ids of added tokens, for which the language model has no embedding."""
        if self.conditioning is None:
            return None
        if not torch.compiler.is_compiling():
            self.hooks.follow()
            check_tied_rows(self.lang_model)
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError("a conditioned language model takes input_ids; inputs_embeds would bypass the media.")
        mask = kwargs.get("attention_mask")
        end = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        prompt = self.conditioning.prompt or self.conditioning
        self.conditioning = replace(self.condition_call(prompt, ids, end), prompt=prompt)
        kwargs = self.mask_call(self.conditioning, kwargs)
        safe = ids.masked_fill(ids >= self.config.first_added_id, 0)
        return ((safe, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": safe})

    def _embed(self, module: nn.Module, args: tuple[Any, ...], embeddings: Tensor) -> Tensor | None:
        """Embed the added tokens, and let the fusion change the embeddings."""
        conditioning = self.conditioning
        # Some language models use the same table for other things than the ids of the call.
        if conditioning is None or embeddings.shape[:-1] != conditioning.ids.shape:
            return None
        conditioning.is_embedded = True
        return self.embed_media(self.added_tokens.embed(conditioning.ids, embeddings), conditioning)

    def _choose_positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the head the chosen positions alone: float[B, T, d] -> float[1, N, d]."""
        conditioning = self.conditioning
        if conditioning is None or conditioning.chosen is None:
            return None
        hidden = args[0]
        assert hidden.shape[:2] == conditioning.ids.shape, "the head reads other positions than the language model"
        return (hidden.flatten(0, 1)[conditioning.chosen][None], *args[1:]), kwargs

    def _extend_logits(self, module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        """Append the logits of added tokens."""
        conditioning = self.conditioning
        if conditioning is None:
            return None
        conditioning.head_input = args[0]
        return self._with_added_logits(args[0], self.added_tokens.bias_logits(logits), conditioning)

    def _with_added_logits(self, hidden: Tensor, logits: Tensor, conditioning: Conditioning) -> Tensor:
        logits = self.added_tokens.append_logits(hidden, logits)
        if conditioning.hide_media_logit:
            logits[..., self.config.media_token_id] = torch.finfo(logits.dtype).min
        return logits

    @contextmanager
    def _condition(self, conditioning: Conditioning | None) -> Iterator[None]:
        before, self.conditioning = self.conditioning, conditioning
        try:
            yield
        finally:
            self.conditioning = before

    def _check_chunk(self, lang_x: Tensor, cache: Any) -> None:
        """Refuse several tokens after a cache, if the language model cannot read them.

        Raises:
            LanguageModelLimit: with the reason.
        """
        kind = self.lang_model.config.model_type
        if kind in NO_CHUNKED_PREFILL and lang_x.shape[1] > 1 and is_filled(cache):
            raise LanguageModelLimit(
                f"a language model of type {kind} cannot read several tokens after a cache: "
                f"{NO_CHUNKED_PREFILL[kind]}. Give the whole prompt at once, without prefill_chunk_size."
            )

    def _run_language_model(self, conditioning: Conditioning, kwargs: dict[str, Any]) -> Any:
        """Call the language model under a conditioning, with those of `kwargs` that it takes."""
        with self._condition(conditioning):
            output = self.lm_interface.call(self.lang_model, conditioning.ids, **kwargs)
            after = self.conditioning  # of the call that has run
        if after is None or after.head_input is None or not after.is_embedded:
            raise LanguageModelLimit(
                "the language model did not run through the embedding table and the head that vlm knows, so it saw no "
                "media: another library replaced or wrapped the language model as a whole. Let it change parts of it "
                "(PEFT: target_modules or modules_to_save that name layers, the embedding table or the head)."
            )
        if output.logits.shape[-1] != self.config.first_added_id + self.added_tokens.num_tokens:
            # The model cuts its head's output down to its own vocabulary (inkling2).
            hidden = after.head_input[:, -output.logits.shape[1] :]
            output.logits = self._with_added_logits(hidden, output.logits, after)
        return output
