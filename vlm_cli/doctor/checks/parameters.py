"""Checks of the parameters: which train, which are saved, and which are one tensor."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vlm_cli.doctor.check import check_whole
from vlm_cli.doctor.compare import compare, is_same
from vlm_cli.doctor.finding import Decided, Measured
from vlm_cli.doctor.subject import Inputs, WholeModel
from vlm_cli.modeling.adapters import adapter_parameters
from vlm_cli.modeling.meta import meta_device
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of
from vlm_cli.trust import load_pretrained

__all__ = ["gradients", "saved", "tied"]


@check_whole(
    "gradients", "Gradients reach the declared parameters, and no others", "gradients reach the trainable parts only"
)
def gradients(subject: WholeModel) -> Decided:
    """Compare the parameters that one backward pass reaches with those that the model declares, by name."""
    model, modules = subject.model, subject.model.part_modules()
    trained = {id(p) for part in model.config.composition.trainable for p in modules[part].parameters()}
    trained |= {id(p) for _, p in adapter_parameters(model)}
    declared = {name for name, p in model.named_parameters() if id(p) in trained}
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    if not declared | training:
        return Decided("skipped", "nothing trains")
    inputs = subject.draw(2, 11)
    reached, zero = _reached(model, inputs)
    moved = reached - zero
    wrong = {f"{part} gets no gradient" for part in _parts(declared) - _parts(moved)}
    wrong |= {f"{name} trains and is not declared" for name in training - declared}
    wrong |= {f"{name} is declared and does not train" for name in declared - training}
    wrong |= {f"{name} gets no gradient" for name in (_always_used(model, inputs, declared) & training) - moved}
    if wrong:
        return Decided("fails", f"{len(wrong)} found, e.g. {min(wrong)}", difference=float(len(wrong)), allowed=0.0)
    unused = len((declared & training) - reached)
    more = f"; {unused} more are declared and this prompt does not use them" if unused else ""
    return Decided("holds", f"{count_of(len(reached), 'tensor')}{more}", difference=0.0, allowed=0.0)


def _parts(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def _always_used(model: VLM, inputs: Inputs, declared: set[str]) -> set[str]:
    """Return the declared parameters that every prompt uses.

    A tower may have a pooling, and a language model experts, that a prompt does not reach; every part that we build is
    used whole.
    """
    names = {name for name in declared if not name.startswith(("vision_encoder.", "lang_model."))}
    is_added = (inputs.lang_x >= model.config.first_added_id) & (inputs.lang_x != model.config.media_token_id)
    if not is_added.any():
        # Every added token stands for padding, or for media, whose vision tokens may replace its embedding.
        names.discard("added_tokens.embedding.weight")
    return names


def _reached(model: VLM, inputs: Inputs) -> tuple[set[str], set[str]]:
    """Return the names of the parameters that get a gradient, and of those among them whose gradient is zero."""
    labels = inputs.lang_x.masked_fill(inputs.lang_x == model.config.media_token_id, -100)
    before = [(p, p.grad) for p in model.parameters()]
    model.zero_grad()
    try:
        with torch.enable_grad():
            model(**inputs.to_dict(), labels=labels, use_cache=False).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return set(found), {name for name, gradient in found.items() if not gradient.any()}
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@check_whole(
    "saved", "A saved and loaded model has the same tensors, and the same logits", "saved and loaded = as before"
)
def saved(subject: WholeModel) -> Measured | Decided:
    """Save the model, load it, and compare tensors and logits; the twin changes the head of the added tokens.

    If there are none, it changes the language model's head.
    """
    model, inputs = subject.without_adapters, subject.draw(2, 11)
    loaded, report = _load(model, subject.saved)
    problem = _problem(model, loaded.state_dict(), report)
    if problem:
        return Decided("fails", problem, difference=math.inf)
    with torch.no_grad():
        expected = model(**inputs.to_dict()).logits[0]
        found = loaded(**inputs.to_dict()).logits[0]
        # Not every column: after a norm, channels may add up to nothing.
        added, own = loaded.added_tokens.head, loaded.lang_model.get_output_embeddings()
        (added if added.weight.numel() else own).weight[:, ::2].add_(0.5)
        changed = loaded(**inputs.to_dict()).logits[0]
    # The last bit may differ: a tensor begins at any byte of a file, and the order of a sum depends on that.
    return compare(found, expected, changed)


def _load(model: VLM, folder: Path) -> tuple[VLM, dict[str, set[str]]]:
    """Return the loaded model, and Transformers' report about missing and unexpected tensors."""
    loaded, report = load_pretrained(
        type(model), folder, config=copy.deepcopy(model.config), dtype=model.dtype, output_loading_info=True
    )
    return loaded.eval().to(model.device), report


def _problem(model: VLM, loaded: dict[str, Tensor], report: dict[str, set[str]]) -> str:
    """Return the first difference between the tensors of two models; "" for none."""
    tensors = model.state_dict()
    with meta_device():
        bare = type(model.lang_model)(copy.deepcopy(model.lang_model.config))
    problems = [f"{key}: {sorted(map(str, x))[0]}" for key, x in report.items() if x]
    problems += [f"{name} changed" for name, x in tensors.items() if not is_same(x, loaded[name])]
    problems += [f"{name} holds NaN" for name, x in tensors.items() if x.is_floating_point() and x.isnan().any()]
    published = {f"lang_model.{name}" for name in bare.state_dict()}
    if published != {name for name in tensors if name.startswith("lang_model.")}:
        problems.append("the language model's tensors have lost their published names")
    return problems[0] if problems else ""


@check_whole("tied", "Tied weights are one tensor: counted once, saved once", "tied weights = one tensor")
def tied(subject: WholeModel) -> Decided:
    """Compare how many numbers the model holds with how many its files hold; tied parameters must be one tensor.

    The counts alone are not enough: a copy is counted twice and saved twice.
    """
    model = subject.without_adapters
    names = set(model.state_dict())
    buffers = sum(x.numel() for name, x in model.named_buffers() if name in names)
    counted = sum(p.numel() for p in model.parameters()) + buffers
    stored = _num_saved(subject.saved)
    found = dict(model.named_parameters(remove_duplicate=False))
    # Ask the configuration too: Transformers forgets a tie if a checkpoint holds two different tensors.
    ties = model.get_expanded_tied_weights_keys(all_submodels=True) | model.all_tied_weights_keys
    copies = [(a, b) for a, b in ties.items() if found.get(a) is not found.get(b)]
    note = f"{counted:,} numbers in memory, {stored:,} in the files"
    if copies:
        note = f"{copies[0][0]} is tied to {copies[0][1]} and is another tensor; {note}"
    return Decided(
        "holds" if stored == counted and not copies else "fails",
        note,
        difference=float(abs(stored - counted) + sum(found[a].numel() for a, _ in copies if a in found)),
        allowed=0.0,
    )


def _num_saved(folder: Path) -> int:
    """Count the numbers in all weight files of a directory."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total
