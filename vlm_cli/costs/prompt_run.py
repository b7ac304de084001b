"""`PromptRun`: a model of shapes reads a workload step by step, as `VLM.generate` reads a prompt.

B rows, P media per row, F views per medium, v patches, n vision tokens per medium, d channels, T tokens, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vlm_cli.costs.workload import Workload, measure_medium
from vlm_cli.modeling.media_layout import MediaLayout
from vlm_cli.modeling.vlm import VLM
from vlm_cli.tiling import MediumSize

__all__ = ["PromptRun"]


class PromptRun:
    """One prompt's way through a model. Call the steps in their order, each within `ShapesOnly`.

    Args:
        model: on the meta device, in evaluation mode.
        workload: the prompt.

    Attributes:
        size: of each medium.
        ids: int[B, T], the prompt: its media, then its text.
        positions: L, what the prompt takes in the language model.
    """

    def __init__(self, model: VLM, workload: Workload) -> None:
        self.model, self.workload = model, workload
        self.size: MediumSize = measure_medium(model, workload)
        rows, media = workload.rows, workload.pictures
        self.ids = torch.zeros(rows, workload.tokens, dtype=torch.long)
        self.ids[:, :media] = model.config.media_token_id
        self.mask = torch.ones(rows, media, self.size.num_frames, dtype=torch.bool)
        self.grid = torch.tensor(self.size.grid).expand(rows, media, -1) if self.size.rows else None
        self.positions = workload.tokens + media * (model.positions_of(self.size) - 1)
        self.pixels: Tensor | None = None
        self.features: Tensor | None = None
        self.tokens: Tensor | None = None
        self.token_mask: Tensor | None = None

    def encode(self) -> None:
        """Read the pixels: float[B, P, F, v, d] features."""
        if not self.workload.pictures:
            return
        encoder, shape = self.model.vision_encoder, self.mask.shape
        dtype = next(encoder.parameters()).dtype
        size = (encoder.num_channels, *encoder.image_size)
        self.pixels = torch.empty(*shape, *size, device="meta", dtype=dtype)
        if encoder.num_views is None:
            views = self.pixels.flatten(0, 2)[self.layout().views]
            self.features = encoder(views[:, None, None]).flatten(0, 2).unflatten(0, shape)
            return
        grid = None if self.grid is None else self.grid.flatten(0, 1)[:, None]
        views = self.pixels.flatten(0, 1)[:, None]
        self.features = encoder(views, self.mask.flatten(0, 1)[:, None], grid)[:, 0].unflatten(0, shape[:2])

    def layout(self) -> MediaLayout:
        """Return the layout of media that all differ."""
        return MediaLayout.of(torch.arange(self.mask.numel(), dtype=torch.float32).view(*self.mask.shape, 1), self.mask)

    def tokenize(self) -> None:
        """Make float[B, P, n, d] vision tokens of the features."""
        if self.features is None:
            return
        model, mask = self.model, self.mask
        if model.vision_encoder.num_views is not None:
            self.tokens = model.vision_tokenizer(self.features, mask)
            self.token_mask = model.vision_tokenizer.token_mask(mask)
        else:
            self.tokens, self.token_mask = model.encode_features(self.features, mask, self.grid, self.layout())
        self.features = None

    def project(self) -> Any:
        """Return what the fusion computes once from the vision tokens, such as keys and values; None without media."""
        if self.tokens is None or self.token_mask is None:
            return None
        return self.model.project_media(self.tokens, self.token_mask)

    def answer(self, after_call: Callable[[Any], None], new_tokens: int = 2) -> None:
        """Read the prompt, and then all but the last of so many new tokens.

        Args:
            after_call: called with the output of each call of the model: first that of the prompt, then of each token.
            new_tokens: number of calls.
        """
        media: dict[str, Any] = (
            {} if self.tokens is None else {"vision_tokens": self.tokens, "media_mask": self.token_mask}
        )
        hook = self.model.register_forward_hook(lambda model, args, output: after_call(output))
        try:
            self.model.generate(
                lang_x=self.ids,
                attention_mask=torch.ones_like(self.ids),
                vision_grid=self.grid,
                logits_processor=LogitsProcessorList([_AnyToken()]),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                **media,
            )
        finally:
            hook.remove()


class _AnyToken(LogitsProcessor):
    """Chooses a token where the logits are shapes, which say nothing."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.zeros(scores.shape)
