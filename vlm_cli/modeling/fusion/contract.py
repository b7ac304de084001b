"""`Fusion`: what a fusion defines, whether it is one of this package or of another.

B batch, T_txt tokens of the prompt, T positions of a call, T_img media per row, n vision tokens per medium, d channels.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from vlm_cli.composition import Composition
from vlm_cli.modeling.conditioning import Conditioning
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.fusion.expansion import ExpandedPrompt
from vlm_cli.modeling.fusion.gates import is_gate
from vlm_cli.modeling.fusion.masks import prepare_masks
from vlm_cli.modeling.renamed import accept_old_hooks

__all__ = ["Fusion"]


class Fusion:
    """The methods by which a `VLM` and the rest of the package ask a fusion.

    A fusion is a subclass of `VLM`. It defines `media_width`, `build_fusion` and `project_media`, and each other method
    whose default does not fit: `embed_media` to change embeddings, `expand_prompt`, `num_positions`, `num_positions_of`
    and `splices_media` to give a medium several positions, `condition_call` to compute something once per call, and
    `media_seen` and `block_layers` to describe itself.

    Attributes:
        fusion: the module that `build_fusion` makes.
        lang_model: the language model.
        conditioning: what hooks read while the language model runs; None while no call runs.
        splices_media: whether vision tokens take the place of `<image>` among the text's embeddings.
        sees_ahead: what sees positions after its own: "nothing", "media" within themselves, or the whole "prompt".
        reads_before_media: whether text before its row's first medium reads the row's media.
        media_may_be_padded: whether rows that are decoded may stand beside rows with more media: `media_for_decoding`
            returns None, or float[B, …, T_img·n, k] whose padding the mask hides.
    """

    config: VLMConfig
    fusion: nn.Module
    lang_model: Any
    conditioning: Conditioning | None
    splices_media = False
    sees_ahead: Literal["nothing", "media", "prompt"] = "nothing"
    reads_before_media = False
    media_may_be_padded = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        accept_old_hooks(cls)

    @classmethod
    def media_width(cls, dim_embedding: int) -> int | None:
        """Return the channels that vision tokens must have; None takes any number.

        A fusion that asks for a width is expected to put vision tokens among the text's embeddings.

        Args:
            dim_embedding: channels of the language model's input embeddings.
        """
        raise TypeError(f"{cls.__name__} is not a fusion.")

    def build_fusion(self, parts: Composition, dim_layer: int) -> None:
        """Make `self.fusion`, a module with all parameters that the fusion adds, and attach its hooks.

        The language model, the vision encoder and the vision tokenizer exist already. Hooks read `self.conditioning`.

        Args:
            parts: the composition; `parts.fusion.options` are the fusion's own settings.
            dim_layer: channels of the language model's decoder layers.
        """
        raise TypeError(f"{type(self).__name__} is not a fusion.")

    def project_media(self, vision_tokens: Tensor, media_mask: Tensor) -> Tensor:
        """Compute what stays the same for every decoded token; `generate` calls this once.

        Args:
            vision_tokens: float[B, T_img, n, d]; padding may hold any number.
            media_mask: bool[B, T_img, n], true for vision tokens that are not padding.

        Returns:
            float[B, …], one row for each row of the prompt; hooks find it in `conditioning.media`.
        """
        raise TypeError(f"{type(self).__name__} is not a fusion.")

    def media_for_decoding(
        self, media: Tensor | None, media_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Keep of the media what tokens after the prompt see; only asked if `media_may_be_padded`.

        Args:
            media: what `project_media` returned.
            media_mask: bool[B, T_img, n] of it.
        """
        return media, media_mask

    def condition_call(self, prompt: Conditioning, ids: Tensor, end: int | None) -> Conditioning:
        """Return what the hooks read during one call of the language model.

        A fusion that computes something once per call, such as a mask, puts it into `fusion_state` of the result.

        Args:
            prompt: the conditioning of the whole prompt.
            ids: int[B, T] of the call; generation reads a prompt in chunks, and then one token at a time.
            end: positions read once the call is over; None if unknown.
        """
        return prompt.for_call(ids, self.config.media_token_id, end)

    def reads_all_media(self, media_counts: Tensor, media_mask: Tensor) -> bool:
        """Say whether the text after a prompt reads all vision tokens that `decoded_media` gets.

        Args:
            media_counts: int[B, 1] of the last position, on the CPU.
            media_mask: bool[B, T_img, n] of the prompt, on the CPU.
        """
        return False

    def decoded_media(
        self, media: Tensor | None, media_mask: Tensor | None, reads_all: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the media and the mask that the tokens after a prompt read; None for what they need not.

        Args:
            media: of the prompt, as `project_media` returned it.
            media_mask: bool[B, T_img, n].
            reads_all: what `reads_all_media` said.
        """
        return media, media_mask

    def find_prefix(self, lang_x: Tensor, labels: Tensor | None, segments: Tensor | None = None) -> Tensor | None:
        """Mark the tokens of a prompt that all see each other, if the fusion's mask has such: bool[B, T_txt] or None.

        Args:
            lang_x: int[B, T_txt].
            labels: int[B, T_txt] of the tokens to learn, -100 elsewhere; None without.
            segments: int[B, T_txt] of packed rows, each of which has a prefix; None if rows are not packed.
        """
        return None

    def mask_call(self, conditioning: Conditioning, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Change the arguments of one call of the language model, such as its `attention_mask`.

        By default, rows that are packed get masks in which none sees another.

        Args:
            conditioning: of the call.
            kwargs: what the language model is called with beside its ids.
        """
        if conditioning.segments is None:
            return kwargs
        masks = prepare_masks(self.lang_model, None, kwargs, None, conditioning.segments)
        return {**kwargs, "attention_mask": masks}

    def embed_media(self, embeddings: Tensor, conditioning: Conditioning) -> Tensor:
        """Change the embeddings of one call.

        Args:
            embeddings: float[B, T, d], of text and added tokens.
            conditioning: of the call. Its `media` is None without media; its `media_counts`, int[B, T], say how many
                media stand at or before each position, also while decoding.

        Returns:
            float[B, T, d].
        """
        return embeddings

    def expand_prompt(self, lang_x: Tensor, attention_mask: Tensor | None, media_mask: Tensor) -> ExpandedPrompt | None:
        """Repeat each `<image>` once per vision token. None if every token keeps one position.

        Args:
            lang_x: int[B, T_txt].
            attention_mask: int[B, T_txt], or with a cache int[B, cached positions + T_txt]; None for all ones.
            media_mask: bool[B, T_img, n], true for vision tokens that are not padding.
        """
        return None

    def num_positions(self, num_frames: int = 1) -> int:
        """Count the positions of the language model that a medium of so many frames takes."""
        return 1

    def num_positions_of(self, vision_tokens: Tensor) -> int:
        """Count the positions of the language model that a medium with float[n, d] vision tokens takes."""
        return 1

    def media_seen(self, num_media: int) -> list[int]:
        """Return the numbers, from 1, of the media that text after the `num_media`-th medium of its row reads."""
        return list(range(1, num_media + 1))

    def gates(self) -> dict[str, nn.Parameter]:
        """Return the fusion's gates by their names in it; a gate is one number, or one for each channel."""
        return {name: parameter for name, parameter in self.fusion.named_parameters() if is_gate(name)}

    @property
    def block_layers(self) -> list[int]:
        """The numbers, from 0, of the decoder layers before which the fusion runs a block."""
        return []

    def fusion_problem(self) -> str | None:
        """Say why the fusion does not fit the language model; None if it fits."""
        return None


accept_old_hooks(Fusion)
