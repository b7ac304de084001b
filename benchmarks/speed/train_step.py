"""How long one step of training takes.

python -m benchmarks.speed.train_step
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.measure import Run, Subject, compare, seconds
from benchmarks.speed.models import Contender, Models, Prompt
from benchmarks.speed.question import Question, Settings, run
from benchmarks.speed.results import Report
from vlm_cli.composition import FAMILIES

#: What trains of Transformers' models, as of ours.
PARTS = {"HF LLaVA": ("model.multi_modal_projector",), "HF BLIP-2": ("qformer", "language_projection")}


def measure(report: Report, models: Models, settings: Settings) -> None:
    """A forward and a backward pass and AdamW, over the parameters that the family trains."""
    size = models.size.name
    on_gpu = models.device != "cpu"
    prompt = Prompt(1, batch=16, text=128) if on_gpu else Prompt(1, batch=2)
    for family in ("flamingo", "llava") if on_gpu else FAMILIES:
        ours = models.ours(family)
        trained = sum(p.numel() for p in ours.model.parameters() if p.requires_grad)
        peers = [
            peer for peer in models.peers(family, partial(_peer_step, family, prompt)) if peer.name != "HF IDEFICS"
        ]
        outcomes = compare(
            Subject(ours.name, partial(_our_step, ours, prompt)), peers, settings.pairs, together=models.together
        )
        report.add(size, f"{prompt}, {trained:,} parameters train", ours.name, outcomes)


def step(model: Any, inputs: Mapping[str, Any], parameters: Iterable[Any]) -> Run:
    """One step; `parameters` are those of the optimizer, or groups of them."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    model.train()

    def once() -> None:
        optimizer.zero_grad()
        model(**inputs)["loss"].backward()
        optimizer.step()

    return seconds(once)


def _our_step(ours: Contender, prompt: Prompt) -> Run:
    model = ours.model
    inputs = ours.inputs(prompt)
    labels = _labels(inputs["lang_x"], model.config.media_token_id)
    return step(model, {**inputs, "labels": labels}, model.parameter_groups())


def _peer_step(family: str, prompt: Prompt, contender: Contender) -> Run:
    model, inputs = contender.model, contender.inputs(prompt)
    if contender.name == "reference":
        _choose_in_reference(model, family)
        ids, image = inputs["lang_x"], model.media_token_id
    else:
        _train_only(model, [model.get_submodule(name) for name in PARTS[contender.name]])
        ids, image = inputs["input_ids"], model.config.image_token_id
    trainable = [p for p in model.parameters() if p.requires_grad]
    return step(model, {**inputs, "labels": _labels(ids, image)}, trainable)


def _choose_in_reference(model: Any, family: str) -> None:
    """The same parts train as of ours; its own LLaVA would train the language model too."""
    model.set_trainable()
    if family == "kosmos":
        return
    lm = model.lang_model
    parts = [model.vision_tokenizer, lm.get_input_embeddings().additional_embedding]
    parts.append(lm.get_output_embeddings().additional_fc)
    _train_only(model, parts + ([lm.gated_cross_attn_layers] if family == "flamingo" else []))


def _train_only(model: nn.Module, parts: Iterable[nn.Module]) -> None:
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def _labels(ids: Tensor, image: int) -> Tensor:
    return ids.masked_fill(ids == image, -100)


QUESTION = Question(
    name="train_step",
    asks="How long does one training step of each family take, next to peers whose same parts train?",
    measure=measure,
    sizes=("tiny", "small", "standard", "large"),
)

if __name__ == "__main__":
    run(QUESTION)
