"""`GenerationMixin`: how a VLM continues prompts; Transformers' own loop around the hooked language model.

B rows, T_txt tokens of the prompt, T_img media per row, L positions of the language model, n vision tokens per medium,
d channels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.utils.generic import ModelOutput

from vlm_cli.modeling.added_tokens import AddedTokens
from vlm_cli.modeling.batching import pad_left
from vlm_cli.modeling.conditioning import count_media
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.decoding.loop import decode, fits
from vlm_cli.modeling.decoding.static import StaticStep
from vlm_cli.modeling.deduplicate import is_on_host, moved, on_host
from vlm_cli.modeling.fusion.expansion import ExpandedPrompt
from vlm_cli.modeling.fusion.visibility import most_readers
from vlm_cli.modeling.inputs import check_media, resolve_names
from vlm_cli.modeling.language_model import NO_LEFT_PADDING
from vlm_cli.modeling.lm_interface import LanguageModelInterface
from vlm_cli.modeling.prompt_cache import PromptCache, PromptRow, ShownMedia

__all__ = ["ForbidToken", "GenerationMixin"]


class GenerationMixin(transformers.GenerationMixin):
    """`generate` of a `VLM`: media are encoded once, and `<image>` is never generated."""

    #: Tokens that a GPU may write before the host looks at them; None lets the device decide: 1 on a CPU.
    look_every: int | None = None
    #: The step of the last answer with a static cache, whose tensors the next one may use again.
    static_step: StaticStep | None = None

    # Attributes of the `VLM` that inherits this class.
    config: VLMConfig
    lang_model: Any
    added_tokens: AddedTokens
    num_positions_of: Callable[[Tensor], int]
    splices_media: bool
    reads_all_media: Callable[[Tensor, Tensor], bool]
    sees_ahead: Literal["nothing", "media", "prompt"]
    reads_before_media: bool
    find_prefix: Callable[[Tensor, Tensor | None], Tensor | None]
    project_media: Callable[[Tensor, Tensor], Tensor]
    __call__: Callable[..., Any]
    _resolve_media: Callable[..., tuple[Tensor | None, Tensor | None]]
    _expand_checked: Callable[..., tuple[Tensor, Tensor | None, ExpandedPrompt | None]]

    if TYPE_CHECKING:

        @property
        def device(self) -> torch.device:
            """Where the model is."""

    @property
    def lm_interface(self) -> LanguageModelInterface:
        """Names by which the language model takes and returns things; `VLM` finds them."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        vision_x: Tensor | None = None,
        lang_x: Tensor | None = None,
        attention_mask: Tensor | None = None,
        vision_mask: Tensor | None = None,
        vision_grid: Tensor | None = None,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        vision_tokens: Tensor | None = None,
        media_mask: Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        prompt_cache: PromptCache | None = None,
        media_keys: Sequence[Sequence[Hashable]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts. Every option of Transformers' `generate` applies.

        Pad rows at the left, as the processor does. Tokens, pixels, masks and grids may be on the CPU while the model
        is on an accelerator: what depends on their numbers is decided before they move, and nothing waits for the
        accelerator.

        Args:
            inputs: another name of `lang_x`.
            generation_config: as in Transformers.
            vision_x: float[B, T_img, F, C, H, W].
            lang_x: int[B, T_txt], with one media token for each medium.
            attention_mask: int[B, T_txt], 0 at padding; None hides each padding token.
            vision_mask: bool[B, T_img, F], false at padding media and views; None for no padding.
            vision_grid: int[B, T_img, 4], as for `VLM.encode_vision`.
            input_ids: another name of `lang_x`.
            pixel_values: another name of `vision_x`.
            vision_tokens: float[B, T_img, n, d], what `encode_vision` returned, instead of `vision_x`.
            media_mask: bool[B, T_img, n] of `vision_tokens`, false at padding; None for no padding.
            logits_processor: as in Transformers.
            prompt_cache: the cache of an earlier prompt. Positions that this prompt shares with it are not computed
                again. Give media as `vision_tokens`, which the cache compares.
            media_keys: for each row something for each of its media, equal where two media are; `prompt_cache` compares
                them in the place of vision tokens, for which it would have to wait for an accelerator.
            kwargs: as in Transformers.

        Returns:
            int[B, T_txt + new tokens], or Transformers' output object with these `sequences`. The object also has what
            the language model read: `attention_mask` int[B, L] and `media_counts` int[B], of the prompt and on the CPU,
            and `media` and `media_mask`.

        Raises:
            ValueError: if tokens are missing, if media and media tokens do not match, or if `prompt_cache` is given
                together with `vision_x` or with several sequences per row.
            LanguageModelLimit: if the language model cannot read rows of different lengths together.
        """
        lang_x, vision_x = resolve_names(
            "generate", lang_x=(lang_x, input_ids, inputs), vision_x=(vision_x, pixel_values)
        )
        if vision_x is not None and vision_mask is None:
            vision_mask = torch.ones([1, 1, 1, *vision_x.shape[:-3]][-3:], dtype=torch.bool)
        # What depends on numbers is decided on the CPU, before the accelerator has anything to do.
        lang_x, attention_mask = on_host(lang_x), on_host(attention_mask)
        vision_mask, media_mask, vision_grid = on_host(vision_mask), on_host(media_mask), on_host(vision_grid)
        if vision_tokens is not None and is_on_host(vision_tokens):
            vision_tokens = moved(vision_tokens, self.device)
        media, media_mask = self._resolve_media(vision_x, vision_mask, vision_grid, vision_tokens, media_mask)
        check_media(lang_x, media_mask, self.config.media_token_id)
        if attention_mask is None and self.config.pad_token_id is not None:
            attention_mask = (lang_x != self.config.pad_token_id).long()
        ids, mask, expanded = self._expand_checked(lang_x, attention_mask, media_mask, vision_grid)
        if generation_config is None:
            kwargs.setdefault("use_cache", True)  # MPT's own configuration switches it off
        wants_details = kwargs.get("return_dict_in_generate")
        if prompt_cache is not None:
            self._check_prompt_cache(vision_x, generation_config, kwargs)
            shown = ShownMedia(vision_tokens, media_mask, media_keys)
            ids, mask, cache = self._begin_with(prompt_cache, ids, mask, shown)
            kwargs["return_dict_in_generate"] = True
            if cache is not None:
                kwargs[self.lm_interface.cache_name] = cache
        output: Any = super().generate(
            moved(ids, self.device),
            generation_config,
            logits_processor=LogitsProcessorList([*(logits_processor or []), ForbidToken(self.config.media_token_id)]),
            attention_mask=moved(mask, self.device),
            media=media,
            media_mask=moved(media_mask, self.device),
            mm_token_type_ids=moved(self._position_types(ids, mask), self.device),
            most_readers=self._count_readers(ids, media_mask),
            reads_all_media=self._read_all(ids, media_mask),
            **kwargs,
        )
        if prompt_cache is not None:
            self._end_with(prompt_cache, output, shown)
            output = output if wants_details else output.sequences
        if isinstance(output, ModelOutput):  # for whoever goes on behind the answer
            output.attention_mask = torch.ones_like(ids) if mask is None else mask
            output.media, output.media_mask = media, moved(media_mask, self.device)
            output.media_counts = count_media(ids, self.config.media_token_id)[:, -1]
        if prompt_cache is None and expanded is None:
            return output
        return _restore_prompt(output, moved(lang_x, self.device), ids.shape[1])

    def _count_readers(self, ids: Tensor, media_mask: Tensor | None) -> int | None:
        """Count the positions after the medium that has most before the next one, of a prompt on the CPU."""
        if media_mask is None or self.splices_media or ids.is_meta:
            return None
        return most_readers(count_media(ids, self.config.media_token_id), media_mask.shape[1])

    def _read_all(self, ids: Tensor, media_mask: Tensor | None) -> bool:
        """Say whether the answer reads all vision tokens that it gets, for a prompt on the CPU."""
        if media_mask is None or ids.is_meta:
            return False
        return self.reads_all_media(count_media(ids, self.config.media_token_id)[:, -1:], media_mask)

    def _position_types(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Mark positions by 1 for media, and by 2 more if they all see each other: int[B, L].

        Transformers extends `mm_token_type_ids` by 0, repeats them for beams and cuts them into chunks.
        """
        types = (ids == self.config.media_token_id).long()
        prefix = self.find_prefix(ids, None)
        if prefix is None:
            return types
        return types + 2 * (prefix if mask is None else prefix & mask[:, -ids.shape[1] :].bool())

    # -- the prompt cache -----------------------------------------------------------------------------------------

    def _check_prompt_cache(self, vision_x: Tensor | None, generation_config: Any, kwargs: dict[str, Any]) -> None:
        """Refuse what does not work with a prompt cache.

        Raises:
            ValueError: for pixels, beams, or several answers of a row.
        """
        if vision_x is not None:
            raise ValueError(
                "a prompt_cache compares vision tokens, so give vision_tokens and media_mask, as encode_vision returns "
                "them, instead of vision_x."
            )
        for name in ("num_beams", "num_return_sequences"):
            if (kwargs.get(name) or getattr(generation_config or self.generation_config, name, None) or 1) > 1:
                raise ValueError(f"a prompt_cache holds one sequence for each row, so {name} must be 1.")

    def _prompt_row(self, ids: Tensor, row: int, shown: ShownMedia) -> PromptRow:
        """Describe one row of a batch for a prompt cache: int[L] ids without padding, on the CPU, and its media."""
        counts, media = count_media(ids, self.config.media_token_id), shown.of_row(row)
        keys = media if shown.keys is None else shown.keys[row]
        return PromptRow(ids, counts, keys, [self.num_positions_of(x) for x in media])

    def _begin_with(
        self,
        prompt_cache: PromptCache,
        ids: Tensor,
        mask: Tensor | None,
        shown: ShownMedia,
    ) -> tuple[Tensor, Tensor, Any]:
        """Find the positions of a prompt that need no computation, and move padding behind them.

        Two rows whose first 9 positions S are equal, of which the cache held 4, are read in two calls: one for the
        other 5 positions of S, with one row, and one for the rest of each row, after padding p:

            before    p S S S S S S S S S a           after    S S S S S S S S S p a
                      S S S S S S S S S b c                    S S S S S S S S S b c

        Args:
            prompt_cache: of earlier prompts; afterwards it holds what all rows share.
            ids: int[B, L], padded at the left, on the CPU.
            mask: bool[B, L], false at padding; None for no padding.
            shown: the media of the rows.

        Returns:
            ids and mask with the padding moved, and the language model's cache of the shared positions; None if no
            position can be reused.
        """
        is_valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = [
            self._prompt_row(row[valid], b, shown) for b, (row, valid) in enumerate(zip(ids, is_valid, strict=True))
        ]
        if len(set(map(len, rows))) > 1 and not self._may_pad_within():
            prompt_cache.reused = 0
            return ids, is_valid.long(), None
        if self.sees_ahead == "prompt" or self.reads_before_media:  # no position of a longer prompt is what it was
            prompt_cache.reused = 0
            return ids, is_valid.long(), None
        reuse = prompt_cache.match(rows, whole_media=self.sees_ahead == "media")
        prompt_cache.crop(reuse.cached)
        if reuse.shared > reuse.cached:
            self._read_shared(prompt_cache, rows[0].cut(reuse.shared), shown)
        start = prompt_cache.reused = prompt_cache.length
        if not start:
            return ids, is_valid.long(), None
        rest, is_rest = pad_left([row.ids[start:] for row in rows], self.config.pad_token_id or 0)
        shared = rows[0].ids[:start].expand(len(rows), -1)
        ids, mask = torch.cat([shared, rest], dim=1), torch.cat([torch.ones_like(shared), is_rest], dim=1)
        return ids, mask, prompt_cache.for_rows(len(rows))

    def _may_pad_within(self) -> bool:
        """Say whether padding may stand inside a row: the caller then numbers the positions, the model does not."""
        return self.lang_model.config.model_type not in NO_LEFT_PADDING and self.lm_interface.takes_positions

    def _read_shared(self, prompt_cache: PromptCache, row: PromptRow, shown: ShownMedia) -> None:
        """Read the start that several rows share, once, after what the prompt cache holds of it.

        Args:
            prompt_cache: holds a start of `row`; afterwards all of it.
            row: the shared positions, as the first row of the batch has them.
            shown: the media of the batch.
        """
        start = prompt_cache.length
        inputs: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        if shown.tokens is not None and shown.mask is not None:
            mask = shown.mask[:1]
            inputs |= {"media": self.project_media(shown.tokens[:1], mask), "media_mask": moved(mask, self.device)}
            inputs["most_readers"] = self._count_readers(row.ids[None], mask)
        output = self(
            lang_x=moved(row.ids[None, start:], self.device),
            attention_mask=torch.ones(1, len(row), dtype=torch.long, device=self.device),
            media_counts=moved(row.media_counts[None, start:], self.device),
            past_key_values=prompt_cache.take(),
            **inputs,
        )
        prompt_cache.keep(row, self.lm_interface.cache_in(output))

    def _end_with(self, prompt_cache: PromptCache, output: Any, shown: ShownMedia) -> None:
        """Keep the prompt and the answer of a single row; of several rows, the cache keeps what they shared."""
        if len(output.sequences) == 1:
            row = self._prompt_row(output.sequences[0].cpu(), 0, shown)
            prompt_cache.keep(row, self.lm_interface.cache_in(output))

    # -- Transformers' loop ---------------------------------------------------------------------------------------

    def _sample(
        self,
        input_ids: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if not fits(generation_config, stopping_criteria, synced_gpus=synced_gpus, kwargs=model_kwargs):
            return super()._sample(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        return decode(
            self,
            input_ids,
            processors=logits_processor,
            criteria=stopping_criteria,
            config=generation_config,
            streamer=streamer,
            kwargs=model_kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool = False,
        media: Tensor | None = None,
        media_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        media_counts: Tensor | None = None,
        most_readers: int | None = None,
        reads_all_media: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for one call: the language model's own, and the media with their counts.

        `media_counts`, int[B, 1], are those of a decoded token, if the caller knows them.
        """
        # The language model drops, slices and adds what its own forward needs.
        inputs = self.lang_model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        length = inputs["input_ids"].shape[1]
        if media_counts is not None:
            if self.lm_interface.first_position and kwargs.get("position_ids") is not None:
                # Those of the language model count padding, too.
                inputs["position_ids"] = kwargs["position_ids"][:, -length:]
            return inputs | {"media": media, "media_mask": media_mask, "media_counts": media_counts}
        counts = count_media(input_ids, self.config.media_token_id)
        if mm_token_type_ids is not None and mm_token_type_ids.shape[1] > counts.shape[1]:
            # `input_ids` is one chunk of the prompt; the attention mask ends where the chunk ends.
            end = None if attention_mask is None else attention_mask.shape[1]
            mm_token_type_ids = mm_token_type_ids[:, :end]
            counts = (mm_token_type_ids % 2).cumsum(-1)
        # A copy: a view of a row that grows has other strides at each step, and would be compiled each time.
        inputs["media_counts"] = torch.empty_like(inputs["input_ids"]).copy_(counts[:, -length:])
        if self.lm_interface.first_position and attention_mask is not None:
            inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if self.sees_ahead != "nothing" and length > 1:
            inputs["attention_mask"] = attention_mask  # `mask_call` prepares it, also for a static cache
            if self.sees_ahead == "prompt" and mm_token_type_ids is not None:
                inputs["prefix_mask"] = mm_token_type_ids[:, -length:] > 1
        # A later call without a cache, or with several tokens at once, has more positions after the last medium.
        bound = most_readers if is_first_iteration else None
        return inputs | {"media": media, "media_mask": media_mask, "most_readers": bound}

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # Transformers chooses the kind of cache by the class of the model.
        return self.lang_model._prepare_cache_for_generation(*args, **kwargs)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Some language models carry a state from step to step that is not a cache (rwkv).
        return self.lang_model._update_model_kwargs_for_generation(*args, **kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generator = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        if hasattr(generator, "vocab_size"):
            generator.vocab_size = self.config.first_added_id + self.added_tokens.num_tokens
        return generator

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        of_language_model = self.lm_interface.arguments
        own = {key: x for key, x in model_kwargs.items() if key not in of_language_model}
        super()._validate_model_kwargs(own)  # type: ignore[misc]


class ForbidToken(LogitsProcessor):
    """Never generate one token. Transformers' own class for this would replace the caller's `suppress_tokens`."""

    may_wait = True

    def __init__(self, token_id: int) -> None:
        self.token_id = token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.token_id] = -torch.inf
        return scores


def _restore_prompt(output: Any, lang_x: Tensor, length: int) -> Any:
    """Replace the first `length` positions of generated sequences by the prompt as the caller gave it.

    Args:
        output: int[B·r, L + new tokens] of r sequences for each row, or an object with such `sequences`.
        lang_x: int[B, T_txt].
        length: L.
    """

    def restore(sequences: Tensor) -> Tensor:
        repeats = sequences.shape[0] // lang_x.shape[0]
        return torch.cat([lang_x.repeat_interleave(repeats, dim=0), sequences[:, length:]], dim=1)

    if isinstance(output, dict):
        output["sequences"] = restore(output["sequences"])
        return output
    return restore(output)
