"""`StaticStep`: the call of the language model between two tokens, always in the same tensors.

Its cache has a fixed length, and what changes from token to token lies in tensors. So it can be compiled, and captured
in a CUDA graph, which holds the hooks and blocks with it: one launch for a token.

B rows, S positions of the cache, L positions so far, V columns of the logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from vlm_cli.errors import first_line

__all__ = ["Graph", "StaticStep", "find_graph", "make_static_cache"]

ROUND = 64  # positions to which the length of a cache is rounded up, so that answers of many lengths share a step
WARM_UP = 2  # calls before a capture, in which the compiler and libraries allocate what they need

Graph = Callable[[Callable[[], None]], Callable[[], None]]

_CAPTURING = ("reduce-overhead", "max-autotune")  # modes of the compiler that capture graphs themselves


def make_static_cache(config: Any, length: int) -> StaticCache:
    """Make a cache of fixed length that keeps its state in tensors alone.

    Transformers' layer for a sliding window counts its positions in Python, where a captured graph would not count on.
    A layer of full length serves as well: the language model's mask hides what lies before the window.

    Args:
        config: of the language model.
        length: positions.
    """
    cache = StaticCache(config=config, max_cache_len=length)
    for number, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            cache.layers[number] = StaticLayer(max_cache_len=length)
    return cache


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Capture what a function launches in a CUDA graph, and return what launches it again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def find_graph(model: Any, compile_mode: str | None) -> Graph | None:
    """Return what captures the step of a model on its device; None if nothing does.

    Args:
        model: the VLM.
        compile_mode: the compiler's, if it compiles the step.
    """
    return capture if model.device.type == "cuda" and compile_mode not in _CAPTURING else None


class StaticStep:
    """One token for each of B rows.

    Args:
        model: the VLM.
        forward: the model itself, or compiled.
        rows: B.
        length: S, positions that a row may take.
        graph: captures a function; None to run it each time.

    Attributes:
        cache: which the prompt is read into, before `begin`.
        inputs: the tensors that the step reads, by their names among the arguments of `prepare_inputs_for_generation`.
    """

    def __init__(
        self, model: Any, forward: Callable[..., Any], rows: int, length: int, graph: Graph | None = None
    ) -> None:
        self.model, self.forward, self.graph = model, forward, graph
        self.rows, self.length = rows, -(-length // ROUND) * ROUND
        self.cache = make_static_cache(model.lang_model.config, self.length)
        self.inputs: dict[str, Tensor] = {}
        self._fixed: dict[str, Any] = {}
        self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        self._logits: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._calls = 0
        self._place = self._find_place()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model has tensors of its own

    def serves(self, forward: Any, rows: int, length: int) -> bool:
        """Say whether an answer may use this step, whose tensors and weights are where they were."""
        same = (self.forward, self.rows, self._place) == (forward, rows, self._find_place())
        return same and length <= self.length <= 2 * -(-length // ROUND) * ROUND

    def _find_place(self) -> tuple[Any, ...]:
        """Where the weights are, and whether tensors are made that only inference may change."""
        weights = self.model.parameters() if self.graph is not None else ()
        return (self.model.device, torch.is_inference_mode_enabled(), *(x.data_ptr() for x in weights))

    def reset(self) -> None:
        """Forget the last answer, before another prompt is read."""
        self.cache.reset()

    def begin(self, kwargs: Mapping[str, Any]) -> None:
        """Take the arguments of the first step; those that are tensors are copied into this step's own.

        Args:
            kwargs: what `settle` returned.
        """
        given = {
            key: x for key, x in kwargs.items() if x is not None and key not in self.model.lm_interface.cache_names
        }
        if given.get("attention_mask") is not None:
            mask = given["attention_mask"]
            # What follows the prompt is hidden by its place until it is written.
            given["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), self.length - mask.shape[1])], dim=1)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"][..., -1:]
        tensors = {key: x for key, x in given.items() if isinstance(x, Tensor)}
        fixed = {key: x for key, x in given.items() if key not in tensors}
        if self._shapes(tensors) != self._shapes(self.inputs) or fixed != self._fixed:
            self._fixed = fixed
            self.replace({key: x.clone() for key, x in tensors.items()})
        for key, x in tensors.items():
            self.inputs[key].copy_(x)

    def replace(self, inputs: dict[str, Tensor]) -> None:
        """Read other tensors, which are captured anew."""
        self.inputs = inputs
        self._replay, self._calls, self._logits = None, 0, None

    @staticmethod
    def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {key: (x.shape, x.dtype) for key, x in tensors.items()}

    def __call__(self, ids: Tensor) -> Tensor:
        """int[B, L] so far -> float[B, V] logits of the next token, which the next call overwrites."""
        self._tokens.copy_(ids[:, -1:])
        if self.graph is not None and self._replay is None and self._calls == WARM_UP:
            self._replay = self._capture(self.graph)
        (self._replay or self._run)()
        self._calls += 1
        assert self._logits is not None
        return self._logits

    def _run(self) -> None:
        arguments = {**self._fixed, **self.inputs, self.model.lm_interface.cache_name: self.cache}
        inputs = self.model.prepare_inputs_for_generation(self._tokens, next_sequence_length=1, **arguments)
        logits = self.forward(**inputs, return_dict=True).logits[:, -1]
        if self._logits is None:
            self._logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        self._logits.copy_(logits)
        if "position_ids" in self.inputs:
            self.inputs["position_ids"].add_(1)

    def _capture(self, graph: Graph) -> Callable[[], None]:
        before = self._counted()
        try:
            replay = graph(self._run)
        except RuntimeError as error:
            # Not a warning: the commands hide those, and whoever asked for a graph must hear of this.
            logging.getLogger(__name__).error(
                "The step that writes a token could not be captured in a CUDA graph, and runs without one: %s",
                first_line(error),
            )
            self.graph = None
            return self._run
        assert self._counted() == before, "the cache counts in Python, where a graph does not"
        return replay

    def _counted(self) -> list[dict[str, Any]]:
        """What the layers of the cache keep outside of tensors."""
        return [{key: repr(x) for key, x in vars(layer).items() if _is_counter(x)} for layer in self.cache.layers]


def _is_counter(x: Any) -> bool:
    """Say whether a value may count: a number, or numbers by name."""
    return isinstance(x, (int, float)) or (isinstance(x, dict) and all(isinstance(y, (int, float)) for y in x.values()))
