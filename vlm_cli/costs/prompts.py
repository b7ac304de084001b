"""What a prompt costs: positions, floating-point operations and bytes, counted on shapes.

vlm, dtype, _ = load_meta_model(resolve("my-composition.yaml"))
count_prompt(vlm, Workload(pictures=8, text=64)).flops.prefill
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from vlm_cli.costs.attention import fused_attention
from vlm_cli.costs.flops import FlopCount, Work
from vlm_cli.costs.live import LiveBytes, count_weights
from vlm_cli.costs.prompt_run import PromptRun
from vlm_cli.costs.shapes import ShapesOnly
from vlm_cli.costs.workload import Workload
from vlm_cli.errors import LanguageModelLimit, VLMError, first_line
from vlm_cli.modeling.language_model import context_length
from vlm_cli.modeling.vlm import VLM

__all__ = ["PromptCost", "PromptFlops", "count_prompt", "following"]


@dataclass(frozen=True)
class PromptFlops:
    """Floating-point operations of the steps of one prompt; `FlopCount` says which operations count.

    Attributes:
        encoder: from pixels to features.
        tokenizer: from features to vision tokens.
        fusion: what the fusion computes once from the vision tokens.
        prefill: the language model and the fusion's blocks over the prompt.
        decode: one new token after the prompt, which is not part of `total`.
    """

    encoder: int
    tokenizer: int
    fusion: int
    prefill: int
    decode: int

    @property
    def total(self) -> int:
        """Operations until the first new token."""
        return self.encoder + self.tokenizer + self.fusion + self.prefill


@dataclass(frozen=True)
class PromptCost:
    """What one prompt costs.

    Attributes:
        workload: the prompt.
        views: of each medium: tiles and thumbnail, or frames.
        vision_tokens: of each medium.
        positions: of the language model that the prompt takes, in each row.
        context: most positions of the language model; None for no limit.
        flops: operations of all rows.
        cache_bytes: of the language model's cache after the prompt, all rows.
        media_bytes: of what is kept of the media while tokens are decoded: keys and values, or vision tokens.
        weight_bytes: of the weights.
        peak_bytes: at the peak, weights included and libraries not.
        first: what each operation of torch does until the first new token.
        next: what each does for one more token.
    """

    workload: Workload
    views: int
    vision_tokens: int
    positions: int
    context: int | None
    flops: PromptFlops
    cache_bytes: int
    media_bytes: int
    weight_bytes: int
    peak_bytes: int
    first: list[Work] = field(repr=False)
    next: list[Work] = field(repr=False)

    @property
    def activation_bytes(self) -> int:
        """The most bytes beside the weights: caches, media and what operations make."""
        return self.peak_bytes - self.weight_bytes

    @property
    def fits(self) -> bool:
        """Whether the language model can read so many positions and one more."""
        return self.context is None or self.positions < self.context

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, by the names that the tables have."""
        found = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("workload", "flops", "first", "next")
        }
        counted = self.flops
        flops = {
            "encoder": counted.encoder,
            "tokenizer": counted.tokenizer,
            "prefill": counted.fusion + counted.prefill,
            "token": counted.decode,
            "total": counted.total,
        }
        derived = {"activation_bytes": self.activation_bytes, "fits": self.fits}
        return {**asdict(self.workload), **found, **derived, "flops": flops}


def count_prompt(model: VLM, workload: Workload) -> PromptCost:
    """Count what a prompt costs, from its media to its first and second new token.

    Args:
        model: on the meta device, in the dtype of its weights.
        workload: the prompt.

    Raises:
        UsageError: if the composition cannot cut or take such media.
        LanguageModelLimit: if the language model computes nothing without its weights.
    """
    run = PromptRun(model, workload)
    held = [*model.parameters(), *model.buffers()]
    calls: list[tuple[int, int]] = []  # operations so far
    caches: list[int] = []

    def note(output: Any) -> None:
        calls.append((count.total, len(count.works)))
        caches.append(sum(x.nbytes for x in _tensors(model.lm_interface.cache_in(output))))

    with following(model), torch.no_grad(), fused_attention(), LiveBytes(held) as live:
        with FlopCount() as encoder:
            run.encode()
        with FlopCount() as tokenizer:
            run.tokenize()
        vision_tokens = 0 if run.tokens is None else run.tokens.shape[2]
        with FlopCount() as fusion:
            media_bytes = sum(x.nbytes for x in _tensors(run.project()))
        with FlopCount() as count:
            run.answer(note)
    weights = count_weights(held)
    (prefill, first), (both, last) = calls
    return PromptCost(
        workload=workload,
        views=run.size.num_frames if workload.pictures else 0,
        vision_tokens=vision_tokens,
        positions=run.positions,
        context=context_length(model.config),
        flops=PromptFlops(encoder.total, tokenizer.total, fusion.total, prefill - fusion.total, both - prefill),
        cache_bytes=caches[0],
        media_bytes=media_bytes,
        weight_bytes=weights,
        peak_bytes=weights + live.peak,
        first=[*encoder.works, *tokenizer.works, *count.works[:first]],
        next=count.works[first:last],
    )


@contextmanager
def following(model: VLM) -> Iterator[None]:
    """Let a model on the meta device run for the sake of its shapes.

    Raises:
        LanguageModelLimit: if it needs a number that depends on its weights.
    """
    assert model.device.type == "meta", "costs are counted on shapes, not on weights"
    lm = model.lang_model
    before = None
    if lm._can_set_experts_implementation():
        # Each token is read by its chosen experts, as with any implementation; others ask which ones are chosen.
        before = lm.config._experts_implementation
        lm.set_experts_implementation("batched_mm")
    try:
        with ShapesOnly():
            yield
    except VLMError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise LanguageModelLimit(
            f"the costs of a language model of type {lm.config.model_type} cannot be counted without its weights: what "
            f"it computes depends on them ({first_line(error)})."
        ) from error
    finally:
        if before is not None:
            lm.set_experts_implementation(before)


def _tensors(tree: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors that a cache holds, whatever classes it is made of, each once."""
    seen = set() if seen is None else seen
    if id(tree) in seen:
        return
    seen.add(id(tree))
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for x in tree.values():
            yield from _tensors(x, seen)
    elif isinstance(tree, (list, tuple)):
        for x in tree:
            yield from _tensors(x, seen)
    elif type(tree).__module__.startswith("transformers") and hasattr(tree, "__dict__") and not callable(tree):
        yield from _tensors(vars(tree), seen)
