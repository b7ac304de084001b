"""`VLM`: any image tower, any vision tokenizer, any fusion, any causal language model.

    prompt ──► lang_x (B, T_txt) ─────────────────────────────┐
    files ───► vision_x (B, T_img, F, C, H, W)                │
                 │ vision encoder                             ▼
                 ▼ features (B, T_img, F, v, d)            fusion ──► language model ──► logits (B, T_txt, V)
                 │ vision tokenizer                           ▲
                 ▼ vision tokens (B, T_img, n, d) ────────────┘

`VLM` hooks the language model and does not change it (`hooked.py`); `vision_half.py` makes the vision tokens, and
`generation.py` continues prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from vlm_cli.composition import AnyresOptions
from vlm_cli.errors import LanguageModelLimit
from vlm_cli.manifest import recording, write_now
from vlm_cli.modeling.added_tokens import AddedTokens
from vlm_cli.modeling.announcement import make_announcement
from vlm_cli.modeling.arrangement import make_arrangement
from vlm_cli.modeling.bands import make_bands
from vlm_cli.modeling.conditioning import Conditioning, count_media
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.deduplicate import moved
from vlm_cli.modeling.fusion.contract import Fusion
from vlm_cli.modeling.fusion.expansion import ExpandedPrompt
from vlm_cli.modeling.generation import GenerationMixin
from vlm_cli.modeling.hooked import HookedLanguageModel
from vlm_cli.modeling.hooks import Hooks
from vlm_cli.modeling.inputs import check_media, resolve_names
from vlm_cli.modeling.language_model import NO_LEFT_PADDING, find_widths
from vlm_cli.modeling.learned import chosen_positions, learned_loss
from vlm_cli.modeling.lm_interface import is_filled, num_cached
from vlm_cli.modeling.media_layout import MediaLayout
from vlm_cli.modeling.packed import positions_within
from vlm_cli.modeling.towers import build_tower
from vlm_cli.modeling.trainable_parts import TrainableParts
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.modeling.vision_half import VisionHalf
from vlm_cli.modeling.vision_tokenizers.making import make_vision_tokenizer
from vlm_cli.registry import FUSIONS
from vlm_cli.trust import HUB_ARGUMENTS, check_code, load_pretrained, make_language_model

__all__ = ["VLM"]


class VLM(Fusion, HookedLanguageModel, VisionHalf, TrainableParts, GenerationMixin):
    """A vision-language model. `VLM(config)` and `VLM.from_pretrained(…)` return the class of its fusion.

    Each fusion is a subclass; `Fusion` says what it defines.

    Args:
        config: the composition and the configurations of its parts.
        vision_encoder: a loaded encoder; None builds one with random weights.
        lang_model: a loaded language model; None builds one with random weights.
    """

    config_class = VLMConfig
    config: VLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _no_split_modules = ["VisionEncoder"]
    lang_model: Any  # any causal language model, which Transformers or its author's code defines

    if TYPE_CHECKING:

        def to(self, *args: Any, **kwargs: Any) -> VLM:  # type: ignore[override]
            """Move or cast the model; Transformers decorates the method so that its type is lost."""

    def __new__(cls, config: VLMConfig | None = None, *args: Any, **kwargs: Any) -> VLM:
        # `copy` and `pickle` call it without a configuration, on the fusion's class.
        chosen = FUSIONS[config.composition.fusion.type].load() if cls is VLM and config is not None else cls
        return super().__new__(chosen)

    def __init__(
        self,
        config: VLMConfig,
        *,
        vision_encoder: VisionEncoder | None = None,
        lang_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        parts = config.composition
        self.vision_encoder = vision_encoder or VisionEncoder(
            build_tower(config.vision_config), **parts.vision_encoder.feature_arguments
        )
        self.lang_model = lang_model or make_language_model(config.text_config)
        width = find_widths(self.lang_model)
        self.vision_tokenizer = make_vision_tokenizer(config, self.media_width(width.embedding))
        grid = config.vision_config.get("grid")
        self.bands = make_bands(parts.tiling.options, self.vision_tokenizer, grid and tuple(grid))
        if isinstance(parts.tiling.options, AnyresOptions) and self.bands is None:
            self.vision_tokenizer.arrangement = make_arrangement(parts.tiling.options, self.vision_tokenizer)
        self.added_tokens = AddedTokens(
            len(config.added_tokens),
            config.first_added_id,
            dim_embedding=width.embedding,
            dim_head=width.head,
            bias=getattr(self.lang_model.get_output_embeddings(), "bias", None) is not None,
            base_bias=parts.language_model.head_bias,
        )
        self.hooks = Hooks()
        self.build_fusion(parts, width.layer)
        self.conditioning: Conditioning | None = None
        self.announcement = make_announcement(
            config, self.vision_encoder.image_size[::-1], self.num_vision_tokens, splices_media=self.splices_media
        )
        self._attach_hooks()
        self._is_stateful = self.lang_model._is_stateful
        self._can_compile_fullgraph = self.lang_model._can_compile_fullgraph
        if vision_encoder is not None:
            # Otherwise `post_init` would draw new weights for the loaded encoder.
            for x in (*vision_encoder.modules(), *vision_encoder.parameters()):
                x._is_hf_initialized = True  # type: ignore[attr-defined]
        self.post_init()
        self.set_trainable(parts.trainable)

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a directory or a hub id and return the model; with `output_loading_info`, the model and a report.

        See `PreTrainedModel.from_pretrained`. Code that the files name runs only with `trust_remote_code=True`.

        Raises:
            UntrustedCodeError: if a file asks for code that may not run.
            ValueError: for a delta directory, which only `vlm_cli.load` reads.
        """
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
        if cls is VLM:
            config = kwargs.get("config")
            if config is None:
                where = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
                config = load_pretrained(VLMConfig, pretrained_model_name_or_path, **where)
            if config.is_delta:
                raise ValueError(
                    f"{str(pretrained_model_name_or_path)!r} is a delta directory: its frozen parts are in other "
                    "places. Load it with vlm_cli.load(…), or make it whole: vlm build OUT --from it."
                )
            cls = FUSIONS[config.composition.fusion.type].load()
            return cls.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if pretrained_model_name_or_path is not None:
            check_code(pretrained_model_name_or_path, **kwargs)
        result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        # Loading replaces the parameters that the constructor froze.
        model.set_trainable(model.config.composition.trainable)
        return result

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the model's configuration and weights into a directory, with a manifest of these files.

        See `PreTrainedModel.save_pretrained`.
        """
        if not kwargs.get("is_main_process", True):
            super().save_pretrained(save_directory, **kwargs)
            return
        with recording(save_directory):
            super().save_pretrained(save_directory, **kwargs)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # `save_pretrained(…, push_to_hub=True)` uploads before it returns.
        write_now(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        # Transformers would pass True on to the language model, and then leave some of its buffers empty (falcon_h1).
        return False

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: Transformers would copy the module of this class into directories, in the place of the shim."""

    def _init_weights(self, module: Any) -> None:
        # Each module outside the language model draws its weights as its authors do. Checkpoints do not hold timm's
        # rotary and relative-position buffers, so timm computes them here.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def _expand_checked(
        self,
        lang_x: Tensor,
        attention_mask: Tensor | None,
        media_mask: Tensor | None,
        vision_grid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, ExpandedPrompt | None]:
        """Expand a prompt, and check that the language model can read its padding.

        Raises:
            LanguageModelLimit: if rows are padded at the left and the language model cannot read them together.
            ValueError: if `vision_grid` and the vision tokens do not match.
        """
        expanded = None
        if media_mask is not None and self.announcement is not None:
            expanded = self.announcement.expand(
                lang_x, attention_mask, media_mask, vision_grid, self.config.pad_token_id or 0
            )
        elif media_mask is not None:
            expanded = self.expand_prompt(lang_x, attention_mask, media_mask)
        if expanded is not None:
            lang_x, attention_mask = expanded.ids, expanded.attention_mask
        kind = self.lang_model.config.model_type
        if kind in NO_LEFT_PADDING and attention_mask is not None and not attention_mask[:, 0].all():
            raise LanguageModelLimit(
                f"a language model of type {kind} cannot read rows that are padded at the left: "
                f"{NO_LEFT_PADDING[kind]}. Give rows of one length, or one at a time (--batch-size 1)."
            )
        return lang_x, attention_mask, expanded

    # -- forward --------------------------------------------------------------------------------------------------

    @contextmanager
    def conditioned(
        self,
        lang_x: Tensor,
        vision_tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        media_mask: Tensor | None = None,
        vision_grid: Tensor | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Condition the language model on a prompt, so that you can call its own `forward` or `generate`.

            with model.conditioned(lang_x, vision_tokens) as inputs:
                model.lang_model.generate(**inputs, max_new_tokens=20)

        Args:
            lang_x: int[B, T_txt] of the prompt.
            vision_tokens: float[B, T_img, n, d], what `encode_vision` returned.
            attention_mask: int[B, T_txt].
            media_mask: bool[B, T_img, n]; None for no padding.
            vision_grid: int[B, T_img, 4], as for `encode_vision`.

        Yields:
            `input_ids` and `attention_mask` for the language model. Its logits exclude `<image>` before they are
            normalised; `VLM.generate` excludes it afterwards. The scores of beams therefore differ by the probability
            of `<image>`.
        """
        media, media_mask = self._resolve_media(None, None, None, vision_tokens, media_mask)
        media_mask = moved(media_mask, lang_x.device)
        check_media(lang_x, media_mask, self.config.media_token_id)
        ids, mask, _ = self._expand_checked(lang_x, attention_mask, media_mask, vision_grid)
        counts = count_media(ids, self.config.media_token_id)
        prefix = self.find_prefix(ids, None)
        with self._condition(Conditioning(ids, media, media_mask, counts, prefix, hide_media_logit=True)):
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}

    def forward(
        self,
        vision_x: Tensor | None = None,
        lang_x: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        vision_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        vision_tokens: Tensor | None = None,
        media: Tensor | None = None,
        media_mask: Tensor | None = None,
        media_counts: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        vision_grid: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        logits_at: Tensor | None = None,
        segments: Tensor | None = None,
        vision_features: Tensor | None = None,
        media_layout: MediaLayout | None = None,
        most_readers: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute logits, and the loss if there are labels.

        Args:
            vision_x: float[B, T_img, F, C, H, W]; the k-th medium of a row belongs to its k-th media token.
            lang_x: int[B, T_txt], with one media token for each medium.
            attention_mask: int[B, T_txt], 0 at padding; with a cache, over its positions too.
            labels: int[B, T_txt], -100 where there is no loss; `forward` shifts them.
            past_key_values: cache of the language model.
            use_cache: return a cache.
            vision_mask: bool[B, T_img, F], false at padding media and views; None for no padding.
            input_ids: another name of `lang_x`, used by Transformers.
            pixel_values: another name of `vision_x`, used by Transformers.
            vision_tokens: float[B, T_img, n, d], what `encode_vision` returned, instead of `vision_x`.
            media: what `project_media` returned, instead of `vision_x` and `vision_tokens`.
            media_mask: bool[B, T_img, n] of `vision_tokens` or `media`, false at padding; None for no padding.
            media_counts: int[B, T], media tokens at or before each position of the row, if `lang_x` is not the start of
                the row. `forward` then expands nothing: `lang_x` has one id for each position of the language model.
            position_ids: int[B, T] for the language model.
            logits_to_keep: number of last positions to compute logits for; 0 for all.
            prefix_mask: bool[B, T_txt], tokens that all see each other if the fusion's mask is `prefix`; None for those
                before the first label, or for all without labels, and for none after a cache.
            vision_grid: int[B, T_img, 4], as for `encode_vision`; together with `vision_tokens`, too.
            logits_at: int[N], indices of the flattened `lang_x`. `logits` are then float[1, N, V + added tokens], of
                these tokens alone, and so is the loss; None for all tokens.
            segments: int[B, T_txt] of packed rows, which do not see each other: the number of each token's row in its
                packed row, from 1, and 0 at padding. None if rows are not packed. Give -100 as the label of the first
                token of each row.
            vision_features: float[B, T_img, F, v, d], what the encoder gave for each view, instead of `vision_x`.
            media_layout: what `MediaLayout.of` says of `vision_x` or `vision_features`. A data loader finds it on the
                CPU, and `forward` then neither waits for an accelerator to find it nor checks that media and media
                tokens match.
            most_readers: positions after the medium that has most of them before the next one; None to count them,
                for which an accelerator has to be waited for.
            kwargs: for the language model.

        Returns:
            The language model's own output. Its `logits` are float[B, T_txt, V + added tokens]; at a media token they
            are those of the last position that its medium takes.

        Raises:
            ValueError: if tokens are missing, or if media and media tokens do not match.
            LanguageModelLimit: if the language model cannot read rows that are padded at the left, or several tokens
                after a cache.
        """
        lang_x, vision_x = resolve_names("forward", lang_x=(lang_x, input_ids), vision_x=(vision_x, pixel_values))
        if past_key_values is not None:
            kwargs[self.lm_interface.cache_name] = past_key_values
        self._check_chunk(lang_x, kwargs.get(self.lm_interface.cache_name))
        num_tokens = lang_x.shape[1]
        if vision_features is not None:
            vision_tokens, media_mask = self.encode_features(vision_features, vision_mask, vision_grid, media_layout)
        if media is None:
            given = (vision_x, vision_mask, vision_grid, vision_tokens, media_mask)
            media, media_mask = self._resolve_media(*given, media_layout)
        media_mask = moved(media_mask, lang_x.device)
        expanded = None
        if prefix_mask is None and media_counts is None and not is_filled(kwargs.get(self.lm_interface.cache_name)):
            prefix_mask = self.find_prefix(lang_x, labels, segments)
        if media_counts is None:
            if media_layout is None:
                check_media(lang_x, media_mask, self.config.media_token_id)
            if attention_mask is None and media_mask is not None and past_key_values is not None:
                # Expansion may pad the new positions; the mask must then cover the old positions too.
                attention_mask = lang_x.new_ones(len(lang_x), num_cached(past_key_values) + lang_x.shape[1])
            lang_x, attention_mask, expanded = self._expand_checked(lang_x, attention_mask, media_mask, vision_grid)
            media_counts = count_media(lang_x, self.config.media_token_id)
            if expanded is not None:
                position_ids = None
                prefix_mask = prefix_mask if prefix_mask is None else expanded.spread(prefix_mask.bool())
                segments = segments if segments is None else expanded.spread(segments)
            if segments is not None:
                position_ids = positions_within(segments)
            if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -lang_x.shape[1] :]
        if use_cache is None and self.training and self.is_gradient_checkpointing and torch.is_grad_enabled():
            use_cache = False  # a layer that runs a second time would add to the cache again
        kwargs |= {
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "position_ids": position_ids,
            # With an expanded prompt, `fold` below chooses the positions.
            "logits_to_keep": logits_to_keep if expanded is None else 0,
        }
        num_items = kwargs.pop("num_items_in_batch", None)
        conditioning = Conditioning(
            lang_x, media, media_mask, media_counts, prefix_mask, segments=segments, most_readers=most_readers
        )
        if logits_at is not None:
            kwargs["logits_to_keep"] = 0
            conditioning.chosen = chosen_positions(logits_at, num_tokens, expanded)
        output = self._run_language_model(conditioning, kwargs)
        if logits_at is not None:
            if labels is not None:
                output.loss = learned_loss(output.logits, labels, logits_at, num_items)
            return output
        if expanded is not None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = expanded.fold(output.logits)[:, kept]
        if labels is not None:
            output.loss = ForCausalLMLoss(
                output.logits, labels, vocab_size=output.logits.shape[-1], num_items_in_batch=num_items
            )
        return output


def __getattr__(name: str) -> Any:
    """Import the classes that lived in this module until 0.1, for packages that still look for them here."""
    moved = {
        "VLMWithCrossAttention": "vlm_cli.modeling.fusion.cross_attention",
        "VLMWithLanguageStream": "vlm_cli.modeling.fusion.language_stream",
        "VLMWithLlamaCrossAttention": "vlm_cli.modeling.fusion.llama_cross_attention",
    }
    if name not in moved:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(moved[name]), name)
