"""`VLM` and its fusions: any OpenCLIP tower, any vision tokenizer, any causal language model.

    prompt ──► lang_x (B, T_txt) ─────────────────────────────┐
    files ───► vision_x (B, T_img, F, C, H, W)                │
                 │ vision encoder                             ▼
                 ▼ features (B, T_img, F, v, d)            fusion ──► language model ──► logits (B, T_txt, V)
                 │ vision tokenizer                           ▲
                 ▼ vision tokens (B, T_img, n, d) ────────────┘

The language model is hooked, not changed: at its boundary, its input embedding, its head and, for cross-attention, its
decoder layers. The hooks read a `Conditioning` that lives for one call; without one they do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.loss.loss_utils import ForCausalLMLoss

from vlm_cli.composition import PARTS, Composition
from vlm_cli.errors import LanguageModelLimit
from vlm_cli.modeling.added_tokens import AddedTokens
from vlm_cli.modeling.conditioning import Conditioning, count_media
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.deduplicate import deduplicate
from vlm_cli.modeling.fusion.expansion import ExpandedPrompt
from vlm_cli.modeling.fusion.gates import is_gate
from vlm_cli.modeling.language_model import (
    NO_CHUNKED_PREFILL,
    NO_LEFT_PADDING,
    forward_arguments,
    widths,
)
from vlm_cli.modeling.lm_interface import is_filled
from vlm_cli.modeling.prompt_cache import PromptCache
from vlm_cli.modeling.towers import build_tower
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.registry import FUSIONS, VISION_TOKENIZERS

__all__ = ["VLM"]


class VLM(PreTrainedModel, GenerationMixin):
    """A vision-language model. `VLM(config)` and `VLM.from_pretrained(…)` return the class of its fusion.

    Args:
        config: the composition and the configurations of its parts.
        vision_encoder: a tower that is already loaded; None builds one with random weights.
        lang_model: a language model that is already loaded; None builds one with random weights.
    """

    config_class = VLMConfig
    config: VLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _no_split_modules = ["GatedCrossAttentionBlock", "VisionEncoder"]

    #: What the names of a part's tensors begin with.
    PART_PREFIXES: ClassVar[dict[str, str]] = {
        part: "lang_model." if part == "language_model" else f"{part}." for part in PARTS
    }

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
        self.lang_model = lang_model or AutoModelForCausalLM.from_config(config.text_config)
        width = widths(self.lang_model)
        dim_out = parts.vision_tokenizer.options.dim_out
        self.vision_tokenizer = VISION_TOKENIZERS[parts.vision_tokenizer.type].load()(
            parts.vision_tokenizer.options,
            dim_in=config.vision_config["dim"],
            num_patches=config.vision_config["num_patches"],
            dim_out=self.media_width(width.embedding) if dim_out is None else dim_out,
        )
        self.added_tokens = AddedTokens(
            len(config.added_tokens),
            config.first_added_id,
            dim_embedding=width.embedding,
            dim_head=width.head,
            bias=getattr(self.lang_model.get_output_embeddings(), "bias", None) is not None,
            base_bias=parts.language_model.head_bias,
        )
        self.build_fusion(parts, width.layer)
        self._conditioning: Conditioning | None = None
        self._attach_hooks()
        self._is_stateful = self.lang_model._is_stateful
        self._can_compile_fullgraph = self.lang_model._can_compile_fullgraph
        if vision_encoder is not None:
            # `post_init` draws anew whatever is not marked as loaded.
            for x in (*vision_encoder.modules(), *vision_encoder.parameters()):
                x._is_hf_initialized = True
        self.post_init()
        self.set_trainable(parts.trainable)

    # -- what a fusion defines ------------------------------------------------------------------------------------

    @classmethod
    def media_width(cls, dim_embedding: int) -> int | None:
        """Channels that the fusion wants of vision tokens; None takes any."""
        raise TypeError(f"{cls.__name__} is no fusion.")

    def num_positions(self, num_frames: int = 1) -> int:
        """Positions that one medium takes in the language model."""
        return 1

    def num_positions_of(self, vision_tokens: Tensor) -> int:
        """Positions that a medium of such tokens, float[n, d], takes in the language model."""
        return 1

    #: Whether vision tokens take the place of `<image>` among the text's embeddings.
    splices_media = False

    def media_seen(self, num_media: int) -> list[int]:
        """Return the numbers, from 1, of the media that text after the `num_media`-th medium of its row reads."""
        return list(range(1, num_media + 1))

    def gates(self) -> dict[str, nn.Parameter]:
        """Return the fusion's gates by their names in it; a gate is one number, or one for each channel."""
        return {name: parameter for name, parameter in self.fusion.named_parameters() if is_gate(name)}

    @property
    def block_layers(self) -> list[int]:
        """The numbers, from 0, of the decoder layers that the fusion puts a block of its own before."""
        return []

    def fusion_problem(self) -> str | None:
        """Say why the fusion does not fit the language model; None if it fits."""
        return None

    def build_fusion(self, parts: Composition, dim_layer: int) -> None:
        """Make `self.fusion`, the fusion's own modules."""
        raise TypeError(f"{type(self).__name__} is no fusion.")

    def project_media(self, vision_tokens: Tensor, media_mask: Tensor) -> Tensor:
        """What of the vision tokens is the same at every decoded token, computed once: float[B, …]."""
        raise TypeError(f"{type(self).__name__} is no fusion.")

    def expand_prompt(self, lang_x: Tensor, attention_mask: Tensor | None, media_mask: Tensor) -> ExpandedPrompt | None:
        """The prompt over the language model's positions; None where each token has one."""
        return None

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> VLM:
        """Load a directory or a hub id; see `PreTrainedModel.from_pretrained`."""
        if cls is VLM:
            config = kwargs.get("config")
            if config is None:
                hub = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")
                config = VLMConfig.from_pretrained(
                    pretrained_model_name_or_path, **{key: kwargs[key] for key in hub if key in kwargs}
                )
            if getattr(config, "backbones", None):
                raise ValueError(
                    f"{str(pretrained_model_name_or_path)!r} is a delta directory, whose frozen parts are elsewhere. "
                    "Load it with vlm_cli.load(…), or make a whole one: vlm build."
                )
            cls = FUSIONS[config.composition.fusion.type].load()
            return cls.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        # Loading puts new parameters in the place of those that the constructor froze.
        model.set_trainable(model.config.composition.trainable)
        return result

    @classmethod
    def is_custom_code(cls) -> bool:
        # True would be handed down to the language model, some of whose buffers would then never be filled (falcon_h1).
        return False

    def _init_weights(self, module: nn.Module) -> None:
        # Everything outside of the language model starts as its authors wrote it. timm's rotary and relative-position
        # buffers are not in checkpoints and are computed here.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def _attach_hooks(self) -> None:
        self.lang_model.register_forward_pre_hook(self._enter_language_model, with_kwargs=True)
        self.lang_model.get_input_embeddings().register_forward_hook(self._embed)
        self.lang_model.get_output_embeddings().register_forward_hook(self._extend_logits)

    @cached_property
    def _language_model_arguments(self) -> frozenset[str]:
        return forward_arguments(self.lang_model)

    def get_input_embeddings(self) -> nn.Module:
        return self.lang_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.lang_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lang_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.lang_model.get_decoder()

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _enter_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """No table inside ever sees an id that it does not have."""
        if self._conditioning is None:
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError("a conditioned language model takes input_ids; inputs_embeds would bypass the media.")
        mask = kwargs.get("attention_mask")
        end = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        prompt = self._conditioning.prompt or self._conditioning
        self._conditioning = replace(self.condition_call(prompt, ids, end), prompt=prompt)
        safe = ids.masked_fill(ids >= self.config.first_added_id, 0)
        return ((safe, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": safe})

    def condition_call(self, prompt: Conditioning, ids: Tensor, end: int | None) -> Conditioning:
        return prompt.for_call(ids, self.config.media_token_id, end)

    def _embed(self, module: nn.Module, args: tuple[Any, ...], embeddings: Tensor) -> Tensor | None:
        c = self._conditioning
        # Some models embed other things with the same table.
        if c is None or embeddings.shape[:-1] != c.ids.shape:
            return None
        return self.embed_media(self.added_tokens.embed(c.ids, embeddings), c)

    def embed_media(self, embeddings: Tensor, c: Conditioning) -> Tensor:
        return embeddings

    def _extend_logits(self, module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        c = self._conditioning
        if c is None:
            return None
        c.head_input = args[0]
        return self._with_added_logits(args[0], self.added_tokens.bias_logits(logits), c)

    def _with_added_logits(self, hidden: Tensor, logits: Tensor, c: Conditioning) -> Tensor:
        logits = self.added_tokens.append_logits(hidden, logits)
        if c.hide_media_logit:
            logits[..., self.config.media_token_id] = torch.finfo(logits.dtype).min
        return logits

    # -- forward --------------------------------------------------------------------------------------------------

    def encode_vision(self, vision_x: Tensor, vision_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Vision tokens of media.

        Args:
            vision_x: float[B, T_img, F, C, H, W]; F, and T_img with it, may be left out where it is 1.
            vision_mask: bool[B, T_img, F], true for frames that are there; None for all.

        Returns:
            float[B, T_img, n, d] and bool[B, T_img, n], true for the tokens that stand for something.

        Raises:
            ValueError: for no media, another number of dimensions or image size, or a mask that does not fit.
        """
        if not vision_x.numel():
            raise ValueError("vision_x holds no media; a prompt without media goes without vision_x.")
        vision_x = self._to_6d(vision_x)
        if vision_mask is not None and vision_mask.shape != vision_x.shape[:3]:
            raise ValueError(
                f"vision_mask must be (B, T_img, F) = {tuple(vision_x.shape[:3])}, got {tuple(vision_mask.shape)}."
            )
        vision_x = vision_x.to(next(self.vision_encoder.parameters()).dtype)
        frame_mask = None if vision_mask is None else vision_mask.bool()
        if torch.compiler.is_compiling() or vision_x.is_meta:  # what depends on values has no shape to trace
            tokens = self.vision_tokenizer(self.vision_encoder(vision_x), frame_mask)
        else:
            tokens = self._encode_distinct(vision_x, frame_mask)
        if frame_mask is None:
            frame_mask = vision_x.new_ones(vision_x.shape[:3], dtype=torch.bool)
        return tokens, self.vision_tokenizer.token_mask(frame_mask)

    def _encode_distinct(self, vision_x: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Vision tokens; equal frames, and equal media where their tokenizer allows it, are encoded once, and padding
        is not encoded.

        float[B, T_img, F, C, H, W], bool[B, T_img, F] -> float[B, T_img, n, d].
        """
        number = torch.full(vision_x.shape[:3], -1, device=vision_x.device)  # of each frame; -1 is padding
        there = number < 0 if frame_mask is None or not frame_mask.any() else frame_mask
        frames, number[there] = deduplicate(vision_x[there])
        features = self.vision_encoder(frames[:, None, None]).flatten(0, 2)  # [frames, v, d]
        apart, place = getattr(self.vision_tokenizer, "encodes_media_independently", False), None
        if apart:
            number, place = number.flatten(0, 1).unique(dim=0, return_inverse=True)
            number = number[:, None]  # each medium is a row
        mask = number >= 0
        features = torch.where(mask[..., None, None], features[number.clamp(min=0)], 0)
        tokens = self.vision_tokenizer(features, None if mask.all() else mask)
        return tokens if place is None else tokens[place, 0].unflatten(0, vision_x.shape[:2])

    def _resolve_media(
        self, vision_x: Tensor | None, vision_mask: Tensor | None, tokens: Tensor | None, media_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Media in the fusion's own form, and bool[B, T_img, n]; neither without media.

        Raises:
            ValueError: for both pixels and tokens, or a mask without tokens.
        """
        if vision_x is not None:
            if tokens is not None:
                raise ValueError("vision_x and vision_tokens are the same media. Give one of them.")
            tokens, media_mask = self.encode_vision(vision_x, vision_mask)
        if tokens is None:
            if media_mask is not None:
                raise ValueError("media_mask is given without vision_tokens.")
            return None, None
        if media_mask is None:
            media_mask = torch.ones_like(tokens[..., 0], dtype=torch.bool)
        return self.project_media(tokens, media_mask), media_mask

    def _to_6d(self, vision_x: Tensor) -> Tensor:
        missing, (height, width) = 6 - vision_x.ndim, self.vision_encoder.image_size
        if missing not in (0, 1, 2) or vision_x.shape[-3:] != (3, height, width):
            raise ValueError(f"vision_x must be (B, T_img, F, 3, {height}, {width}), got {tuple(vision_x.shape)}.")
        for _ in range(missing):
            vision_x = vision_x.unsqueeze(-4)
        return vision_x

    @contextmanager
    def conditioned(
        self,
        lang_x: Tensor,
        vision_tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        media_mask: Tensor | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Condition the language model, so that its own `forward` or `generate` can be called.

            with model.conditioned(lang_x, vision_tokens) as inputs:
                model.lang_model.generate(**inputs, max_new_tokens=20)

        Args:
            lang_x: int[B, T_txt] of the prompt.
            vision_tokens: float[B, T_img, n, d], as `encode_vision` returns them.
            attention_mask: int[B, T_txt].
            media_mask: bool[B, T_img, n]; None for all.

        Yields:
            `input_ids` and `attention_mask` for the language model. Its logits give `<image>` no chance before they are
            normalised, and our `generate` does after that: scores of beams differ by what `<image>` would have got.
        """
        media, media_mask = self._resolve_media(None, None, vision_tokens, media_mask)
        self._check_media(lang_x, media_mask)
        ids, mask, _ = self._expand_checked(lang_x, attention_mask, media_mask)
        positions = count_media(ids, self.config.media_token_id)
        with self._condition(Conditioning(ids, media, media_mask, positions, hide_media_logit=True)):
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}

    @contextmanager
    def _condition(self, conditioning: Conditioning | None) -> Iterator[None]:
        before, self._conditioning = self._conditioning, conditioning
        try:
            yield
        finally:
            self._conditioning = before

    def _check_media(self, lang_x: Tensor, media_mask: Tensor | None) -> None:
        """Each row needs as many media as it has media tokens.

        Raises:
            ValueError: naming the row.
        """
        if torch.compiler.is_compiling() or lang_x.is_meta:
            return
        tokens = (lang_x == self.config.media_token_id).sum(-1)
        there = tokens.new_zeros(len(tokens), 1) if media_mask is None else media_mask.any(-1).long()
        if not torch.equal(there, there.cumprod(-1)):
            raise ValueError("vision_mask has padding before a medium; padding comes last in each row.")
        media = there.sum(-1)
        if not torch.equal(tokens, media):
            row = int((tokens != media).nonzero()[0])
            raise ValueError(
                f"row {row} of lang_x has {int(tokens[row])} media tokens, but vision_x has {int(media[row])} media "
                "for it. Give one of each, or mark the padding of vision_x in vision_mask."
            )

    def _expand_checked(
        self, lang_x: Tensor, attention_mask: Tensor | None, media_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, ExpandedPrompt | None]:
        """
        Raises:
            LanguageModelLimit: for rows of several lengths, if the language model cannot read them together.
        """
        expansion = None if media_mask is None else self.expand_prompt(lang_x, attention_mask, media_mask)
        if expansion is not None:
            lang_x, attention_mask = expansion.ids, expansion.attention_mask
        kind = self.lang_model.config.model_type
        if kind in NO_LEFT_PADDING and attention_mask is not None and not attention_mask[:, 0].all():
            raise LanguageModelLimit(
                f"a language model of type {kind} cannot read rows that are padded at the left: "
                f"{NO_LEFT_PADDING[kind]}. Give rows of one length, or one at a time (--batch-size 1)."
            )
        return lang_x, attention_mask, expansion

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
        **kwargs: Any,
    ) -> Any:
        """Logits, and the loss if there are labels.

        Args:
            vision_x: float[B, T_img, F, C, H, W]; the k-th medium of a row belongs to its k-th media token.
            lang_x: int[B, T_txt], with one media token for each medium.
            attention_mask: int[B, T_txt], 0 at padding; with a cache, over its positions too.
            labels: int[B, T_txt], -100 where there is no loss; shifted inside.
            past_key_values: cache of the language model.
            use_cache: whether to return one.
            vision_mask: bool[B, T_img, F], false at padding media and frames.
            input_ids: other name of `lang_x`, used by Transformers.
            pixel_values: other name of `vision_x`, used by Transformers.
            vision_tokens: float[B, T_img, n, d], as `encode_vision` returns them, instead of `vision_x`.
            media: the same in the fusion's own form (`project_media`).
            media_mask: bool[B, T_img, n] of `vision_tokens` or `media`; None for all.
            media_counts: int[B, T], media tokens at or before each position of the row, where `lang_x` is not the
                row's beginning; `lang_x` is then taken as it is, one id for each position of the language model.
            position_ids: int[B, T] for the language model.
            logits_to_keep: number of last positions to compute logits for; 0 for all.
            kwargs: for the language model.

        Returns:
            The language model's own output. Its `logits` are float[B, T_txt, V + added tokens]; those at a media token
            are of the last position that its medium takes.

        Raises:
            ValueError: if media and media tokens do not match.
            LanguageModelLimit: if the language model cannot read rows that are padded at the left, or several tokens
                after a cache.
        """
        lang_x = input_ids if lang_x is None else lang_x
        vision_x = pixel_values if vision_x is None else vision_x
        if lang_x is None:
            raise ValueError("lang_x is missing: forward needs int[B, T_txt] tokens.")
        if past_key_values is not None:
            kwargs[self._cache_argument] = past_key_values
        kind = self.lang_model.config.model_type
        if kind in NO_CHUNKED_PREFILL and lang_x.shape[1] > 1 and is_filled(kwargs.get(self._cache_argument)):
            raise LanguageModelLimit(
                f"a language model of type {kind} cannot read several tokens after a cache: "
                f"{NO_CHUNKED_PREFILL[kind]}. Give the whole prompt at once, without prefill_chunk_size."
            )
        if media is None:
            media, media_mask = self._resolve_media(vision_x, vision_mask, vision_tokens, media_mask)
        expansion = None
        if media_counts is None:
            self._check_media(lang_x, media_mask)
            if attention_mask is None and media_mask is not None and past_key_values is not None:
                # Spreading may pad the new positions, and a mask is then needed over the old ones too.
                attention_mask = lang_x.new_ones(len(lang_x), _num_cached(past_key_values) + lang_x.shape[1])
            lang_x, attention_mask, expansion = self._expand_checked(lang_x, attention_mask, media_mask)
            media_counts = count_media(lang_x, self.config.media_token_id)
            if expansion is not None:
                position_ids = None
            if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -lang_x.shape[1] :]
        kwargs |= {
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "position_ids": position_ids,
            # Which of the language model's positions a token has is known where the logits are folded back.
            "logits_to_keep": logits_to_keep if expansion is None else 0,
        }
        num_items = kwargs.pop("num_items_in_batch", None)
        output = self._run_language_model(lang_x, Conditioning(lang_x, media, media_mask, media_counts), kwargs)
        if expansion is not None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = expansion.fold(output.logits)[:, kept]
        if labels is not None:
            output.loss = ForCausalLMLoss(
                output.logits, labels, vocab_size=output.logits.shape[-1], num_items_in_batch=num_items
            )
        return output

    @cached_property
    def _cache_argument(self) -> str:
        """What the language model calls its cache; the name changed between releases of Transformers."""
        names = ("cache", "past_key_values", "cache_params", "state")
        return next((x for x in names if x in self._language_model_arguments), "past_key_values")

    def _run_language_model(self, ids: Tensor, conditioning: Conditioning, kwargs: dict[str, Any]) -> Any:
        known = self._language_model_arguments
        kwargs = {key: x for key, x in kwargs.items() if key in known or ("kwargs" in known and x is not None)}
        if "kwargs" in known and "position_ids" not in known:
            kwargs.pop("position_ids", None)
        if "logits_to_keep" not in known:
            kwargs.pop("logits_to_keep", None)
        with self._condition(conditioning):
            output = self.lang_model(input_ids=ids, **kwargs)
            c = self._conditioning
        if output.logits.shape[-1] != self.config.first_added_id + self.added_tokens.num_tokens:
            # The model cuts its head's output down to its own vocabulary (inkling2).
            assert c is not None and c.head_input is not None
            hidden = c.head_input[:, -output.logits.shape[1] :]
            output.logits = self._with_added_logits(hidden, output.logits, c)
        return output

    # -- generation -----------------------------------------------------------------------------------------------

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
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        vision_tokens: Tensor | None = None,
        media_mask: Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        prompt_cache: PromptCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts; every option of `GenerationMixin.generate` applies.

        Media are encoded once, `<image>` is never generated, and rows are best padded at the left.

        Args:
            inputs: other name of `lang_x`.
            generation_config: as in Transformers.
            vision_x: float[B, T_img, F, C, H, W].
            lang_x: int[B, T_txt].
            attention_mask: int[B, T_txt]; None takes every token that is not padding.
            vision_mask: bool[B, T_img, F].
            input_ids: other name of `lang_x`.
            pixel_values: other name of `vision_x`.
            vision_tokens: float[B, T_img, n, d], as `encode_vision` returns them, instead of `vision_x`.
            media_mask: bool[B, T_img, n] of `vision_tokens`; None for all.
            logits_processor: as in Transformers.
            prompt_cache: what was read before, from which the prompt's beginning is taken; media are then given as
                `vision_tokens`.
            kwargs: as in Transformers.

        Returns:
            int[B, T_txt + new tokens], or Transformers' output object with such `sequences`.
        """
        lang_x = next((x for x in (lang_x, input_ids, inputs) if x is not None), None)
        vision_x = pixel_values if vision_x is None else vision_x
        if lang_x is None:
            raise ValueError("lang_x is missing: generate needs int[B, T_txt] tokens.")
        media, media_mask = self._resolve_media(vision_x, vision_mask, vision_tokens, media_mask)
        self._check_media(lang_x, media_mask)
        if attention_mask is None and self.config.pad_token_id is not None:
            attention_mask = (lang_x != self.config.pad_token_id).long()
        ids, mask, expansion = self._expand_checked(lang_x, attention_mask, media_mask)
        if generation_config is None:
            kwargs.setdefault("use_cache", True)  # MPT's own configuration says no
        wants_details = kwargs.get("return_dict_in_generate")
        if prompt_cache is not None:
            self._check_prompt_cache(vision_x, generation_config, kwargs)
            ids, mask, cache = prompt_cache.begin(self, ids, mask, vision_tokens, media_mask)
            kwargs |= {"return_dict_in_generate": True} | ({} if cache is None else {self._cache_argument: cache})
        output = super().generate(
            ids,
            generation_config,
            logits_processor=LogitsProcessorList([*(logits_processor or []), _ForbidToken(self.config.media_token_id)]),
            attention_mask=mask,
            media=media,
            media_mask=media_mask,
            # Grown, repeated for beams and cut into chunks by GenerationMixin, which knows this name.
            mm_token_type_ids=(ids == self.config.media_token_id).long(),
            **kwargs,
        )
        if prompt_cache is not None:
            prompt_cache.end(self, output.sequences, self.cache_of(output), vision_tokens, media_mask)
            output = output if wants_details else output.sequences
        elif expansion is None:
            return output
        return _with_prompt(output, lang_x, ids.shape[1])

    def _check_prompt_cache(self, vision_x: Tensor | None, generation_config: Any, kwargs: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: for what cannot go with a prompt cache.
        """
        if vision_x is not None:
            raise ValueError(
                "a prompt_cache compares vision tokens, so give vision_tokens and media_mask, as encode_vision returns "
                "them, instead of vision_x."
            )
        for name in ("num_beams", "num_return_sequences"):
            if (kwargs.get(name) or getattr(generation_config or self.generation_config, name, None) or 1) > 1:
                raise ValueError(f"a prompt_cache holds one sequence for each row, so {name} must be 1.")

    def cache_of(self, output: Any) -> Any:
        """The language model's cache among its outputs, or those of `generate`; None if there is none."""
        names = (self._cache_argument, "past_key_values", "cache")
        return next((x for name in names if (x := getattr(output, name, None)) is not None), None)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool = False,
        media: Tensor | None = None,
        media_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        # The language model drops, slices and adds what its own forward needs.
        inputs = self.lang_model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        counts = count_media(input_ids, self.config.media_token_id)
        if mm_token_type_ids is not None and mm_token_type_ids.shape[1] > counts.shape[1]:
            # `input_ids` is one chunk of the prompt, up to which the mask reaches.
            end = None if attention_mask is None else attention_mask.shape[1]
            counts = mm_token_type_ids[:, :end].cumsum(-1)
        # In memory of its own: a view of a row that grows has another layout at each step, and is compiled anew.
        inputs["media_counts"] = torch.empty_like(inputs["input_ids"]).copy_(counts[:, -inputs["input_ids"].shape[1] :])
        return inputs | {"media": media, "media_mask": media_mask}

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # Transformers chooses the kind of cache by the class of the model.
        return self.lang_model._prepare_cache_for_generation(*args, **kwargs)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Some language models carry what is no cache from step to step (rwkv).
        return self.lang_model._update_model_kwargs_for_generation(*args, **kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generator = super()._get_candidate_generator(*args, **kwargs)
        if hasattr(generator, "vocab_size"):
            generator.vocab_size = self.config.first_added_id + self.added_tokens.num_tokens
        return generator

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        theirs = self._language_model_arguments
        super()._validate_model_kwargs({key: x for key, x in model_kwargs.items() if key not in theirs})

    # -- training -------------------------------------------------------------------------------------------------

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, partial(self._checkpoint, gradient_checkpointing_func), **kwargs)

    def _checkpoint(
        self, recompute: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Checkpoint with the conditioning of now: with remote code, and with Transformers before 5.23, the hooks of a
        layer are among what is computed again. A block that such a hook runs is not checkpointed once more."""
        c = self._conditioning
        if c is not None and c.is_checkpointed:
            return function(*args, **kwargs)
        kept = None if c is None else replace(c, is_checkpointed=True)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._condition(kept):
                return function(*args, **kwargs)

        return recompute(run, *args, **kwargs)

    def part_modules(self) -> dict[str, nn.Module]:
        """The module of each part, by its name in `PARTS`."""
        return {part: self.get_submodule(prefix.removesuffix(".")) for part, prefix in self.PART_PREFIXES.items()}

    def trained_prefixes(self) -> list[str]:
        """Return what the tensor names of parts with a trainable parameter begin with."""
        modules = self.part_modules().items()
        return [self.PART_PREFIXES[part] for part, x in modules if any(p.requires_grad for p in x.parameters())]

    def set_trainable(self, parts: Iterable[str]) -> None:
        """Train these parts and freeze the others.

        Args:
            parts: names from `PARTS`.

        Raises:
            ValueError: for another name.
        """
        parts = {parts} if isinstance(parts, str) else set(parts)
        if unknown := parts - set(PARTS):
            raise ValueError(f"unknown parts {sorted(unknown)}. Known: {', '.join(PARTS)}.")
        for name, module in self.part_modules().items():
            module.requires_grad_(name in parts)
        self.vision_encoder.train(self.training)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for an optimizer: trainable parameters with and without the composition's weight decay."""
        composition = self.config.composition
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, module in self.part_modules().items():
            group = decayed if name in composition.weight_decay_on else others
            group += [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": decayed, "weight_decay": composition.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


class _ForbidToken(LogitsProcessor):
    """A token that is not generated. Not Transformers' own class, which would displace `suppress_tokens`."""

    def __init__(self, token_id: int) -> None:
        self.token_id = token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([self.token_id], device=scores.device), -torch.inf)


def _num_cached(cache: Any) -> int:
    """Positions in a cache."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return 0  # a purely recurrent state has no positions, and its model reads the mask of new ones only


def _with_prompt(output: Any, lang_x: Tensor, length: int) -> Any:
    """Generated sequences that begin with the prompt as it was given, not as it lies over `length` positions."""

    def fold(sequences: Tensor) -> Tensor:
        repeats = sequences.shape[0] // lang_x.shape[0]
        return torch.cat([lang_x.repeat_interleave(repeats, dim=0), sequences[:, length:]], dim=1)

    if isinstance(output, dict):
        output["sequences"] = fold(output["sequences"])
        return output
    return fold(output)


def __getattr__(name: str) -> Any:
    """The classes that lived here until 0.1, for packages that still import them from this module."""
    moved = {
        "VLMWithCrossAttention": "vlm_cli.modeling.fusion.cross_attention",
        "VLMWithLanguageStream": "vlm_cli.modeling.fusion.language_stream",
        "VLMWithLlamaCrossAttention": "vlm_cli.modeling.fusion.llama_cross_attention",
    }
    if name not in moved:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(moved[name]), name)
