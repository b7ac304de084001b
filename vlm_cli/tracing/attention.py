"""What the words of an answer attend to, layer by layer and rolled out, down to the vision tokens.

A rows of an answer, L positions of the language model, T_img media, n vision tokens per medium, S = T_img·n.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_cli.modeling.fusion.cross_attention import VLMWithCrossAttention
from vlm_cli.modeling.language_model import decoder_layers
from vlm_cli.printable import count_of
from vlm_cli.tracing.recording import Recording, record_attention
from vlm_cli.tracing.rollout import Block, Layer, roll_out
from vlm_cli.tracing.trace import Gate

if TYPE_CHECKING:
    from vlm_cli.modeling.conditioning import Conditioning
    from vlm_cli.modeling.fusion.visibility import MediaVisibility
    from vlm_cli.modeling.vlm import VLM

__all__ = ["RecordedAttention", "gates_note", "list_gates", "record_model"]

_CLOSED = 1e-6  # opening of a gate that lets nothing through


@dataclass(frozen=True)
class RecordedAttention:
    """The attention of one row, that of a prompt and its answer.

    Attributes:
        layers: of the language model, with the gated blocks before them.
        media_positions: positions at which the language model reads vision tokens; none with cross-attention.
        tokens_read: the vision tokens that stand there, among all S of the prompt.
        num_tokens: S.
    """

    layers: Sequence[Layer]
    media_positions: Tensor
    tokens_read: Tensor
    num_tokens: int

    def roll_out(self, rows: Sequence[int]) -> Tensor:
        """Return the share of each vision token in what positions have in the end: float[A, S]."""
        text, media = roll_out(self.layers, rows)
        return self.to_tokens(text) + (media if media.shape[1] else 0)

    def to_tokens(self, text: Tensor) -> Tensor:
        """Take the shares of vision tokens out of those of positions: float[A, L] -> float[A, S]."""
        found = torch.zeros(len(text), self.num_tokens)
        found[:, self.tokens_read] = text[:, self.media_positions]
        return found

    @property
    def knows_media(self) -> bool:
        """Whether any attention to vision tokens was recorded."""
        is_read = len(self.media_positions) > 0
        return any(x.block is not None or (is_read and x.weights is not None) for x in self.layers)

    def notes(self, name: str) -> list[str]:
        """Say what the language model does not show.

        Args:
            name: the type of the language model.
        """
        missing = [i for i, layer in enumerate(self.layers) if layer.weights is None]
        found = []
        if len(missing) == len(self.layers):
            rest = "show the gated blocks alone" if self.knows_media else "are left out; occlusion needs none"
            found.append(f"The language model ({name}) shows no attention, so maps of attention {rest}.")
        elif missing:
            found.append(
                f"{_name_layers(missing, 'show')} no attention (the language model is {name}); maps of attention "
                "take what comes out of such a layer for what stood there before."
            )
        windows = {i: window for i, layer in enumerate(self.layers) if (window := _find_window(layer.weights))}
        if windows:
            sizes = sorted(set(windows.values()))
            words = " or ".join(map(str, sizes))
            found.append(f"{_name_layers(list(windows), 'attend')} to the last {words} positions alone.")
        sinks = [i for i, layer in enumerate(self.layers) if layer.weights is not None and _has_sink(layer.weights)]
        if sinks:
            found.append(f"{_name_layers(sinks, 'attend')} to a learned sink, too, which is left out.")
        return found


def _name_layers(numbers: Sequence[int], verb: str) -> str:
    """Name layers, and what they do.

    >>> _name_layers([0], "attend"), _name_layers([0, 2], "attend")
    ('Layer 0 attends', 'Layers 0, 2 attend')
    """
    if len(numbers) == 1:
        return f"Layer {numbers[0]} {verb}s"
    return f"Layers {', '.join(map(str, numbers[:6]))}{' …' * (len(numbers) > 6)} {verb}"


def _find_window(weights: Tensor | None) -> int | None:
    """Return how many positions the last one attends to, if those at the start of the row are out of its sight."""
    if weights is None:
        return None
    first = int((weights[-1] > 0).int().argmax())
    return len(weights) - first if first else None


def _has_sink(weights: Tensor) -> bool:
    return float(weights.sum(-1).min()) < 0.99


# -- recording ---------------------------------------------------------------------------------------------------------


@contextmanager
def record_model(model: VLM) -> Iterator[list[RecordedAttention]]:
    """Record the attention of a call of the model with one row and no cache; the list holds it afterwards."""
    layers = decoder_layers(model.lang_model, model.config.composition.language_model.decoder_layers)
    watched: dict[Any, nn.Module] = dict(enumerate(layers))
    blocks: Mapping[str, nn.Module] = model.fusion.blocks if isinstance(model, VLMWithCrossAttention) else {}
    watched |= {("block", int(key)): block for key, block in blocks.items()}
    calls: list[Conditioning] = []

    def note_call(module: nn.Module, args: Any) -> None:
        if model.conditioning is not None:
            calls.append(model.conditioning)

    found: list[RecordedAttention] = []
    handle = layers[0].register_forward_pre_hook(note_call)
    try:
        with record_attention(watched, is_square=True) as recording:
            yield found
    finally:
        handle.remove()
    found.append(_read(model, recording, calls[0], len(layers)))


def _read(model: VLM, recording: Recording, call: Conditioning, depth: int) -> RecordedAttention:
    assert call.media_mask is not None
    length = call.ids.shape[1]
    openings = {gate.layer: gate.opening for gate in list_gates(model) if gate.name == "attn_gate"}
    layers = []
    for i in range(depth):
        own = [x[0] for x in recording.weights.get(i, ()) if x.shape[1:] == (length, length)]
        weights = torch.stack(own).mean(0) if own else None
        assert weights is None or float(weights.sum(-1).max()) < 1.02, "a row of attention is more than a whole"
        products = recording.weights.get(("block", i))
        block = None if products is None else Block(_place(products[0], call, call.fusion_state), openings[i])
        layers.append(Layer(weights, block))
    is_read = (call.ids[0] == model.config.media_token_id) & model.splices_media
    tokens = call.media_mask.flatten().nonzero()[:, 0]
    positions = is_read.nonzero()[:, 0]
    read = tokens if model.splices_media else tokens[:0]
    return RecordedAttention(layers, positions.cpu(), read.cpu(), call.media_mask.numel())


def _place(weights: Tensor, call: Conditioning, visibility: MediaVisibility) -> Tensor:
    """Return the weights of a block by text position and vision token, zero where a position reads nothing: [T, S].

    Args:
        weights: float[1, T, S], or with readers float[T_img, P, n].
        call: of the language model.
        visibility: of the call.
    """
    assert call.media_mask is not None and visibility.reads is not None
    readers, num_media = visibility.readers, call.media_mask.shape[1]
    if readers is None:
        found = weights[0]
    else:
        own = readers.scatter(weights[:, None].to(readers.slots.device))[0, 0].cpu()  # [T, n], of the position's medium
        medium = call.media_counts[0].clamp(1, num_media).cpu() - 1
        found = torch.zeros(len(own), num_media, own.shape[1])
        found[torch.arange(len(own)), medium] = own
        found = found.flatten(1)
    return found.masked_fill(~visibility.reads[0].cpu(), 0)


def list_gates(model: VLM) -> list[Gate]:
    """List the gates of a model's fusion, by layer."""
    found = []
    for name, gate in model.gates().items():
        *places, own = name.split(".")
        layer = next((int(x) for x in reversed(places) if x.isdecimal()), 0)
        found.append(Gate(layer, own, float(gate.detach().float().tanh().abs().mean())))
    return sorted(found, key=lambda gate: gate.layer)


def gates_note(gates: Sequence[Gate]) -> str | None:
    """Say that a model's gates are closed; None if one is open, or if there is none."""
    if not gates or any(gate.opening > _CLOSED for gate in gates):
        return None
    return f"All {count_of(len(gates), 'gate')} of the fusion are closed, so the pictures change nothing yet."
