"""Checks of one forward pass: features, text alone, closed gates, and which positions see which media."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlm_cli.doctor.check import check, check_whole
from vlm_cli.doctor.compare import compare, largest_difference, scale_of
from vlm_cli.doctor.finding import Decided, Measured
from vlm_cli.doctor.gates import closed_gates
from vlm_cli.doctor.subject import Inputs, Subject, WholeModel, without_hooks
from vlm_cli.modeling.vlm import VLM
from vlm_cli.tiling import MediumSize

__all__ = ["bare", "features", "media", "text_only"]


@check_whole(
    "features",
    "Each frame is encoded alone, into the v patches of d channels that were declared",
    "a frame alone = the frame among others",
    quick=True,
)
@torch.no_grad()
def features(subject: WholeModel) -> Measured:
    """Compare the features of a batch with those of each frame by itself; the twin exchanges the frames.

    An encoder that reads the views of a medium together gets each medium by itself.
    """
    config, encoder = subject.model.config.vision_config, subject.model.vision_encoder
    declared = (config["num_patches"], config["dim"])
    drawn = [_media_of(subject.draw(2)), _media_of(subject.draw(2, seed=1))]
    vision_x = torch.cat(drawn, dim=2)  # [1, 2, 2, C, H, W]
    vision_x = torch.cat([vision_x, 1 - vision_x])
    together = encoder(vision_x)
    if together.shape != (*vision_x.shape[:3], *declared):
        raise ValueError(f"features are {tuple(together.shape[3:])}, and {declared} was declared")
    units = vision_x.flatten(0, 2)[:, None] if encoder.num_views is None else vision_x.flatten(0, 1)
    alone = torch.cat([encoder(x[None, None])[0, 0] for x in units])
    found = together.flatten(0, 2)
    return compare(found, alone, changed=found.roll(1, 0))


@check_whole(
    "text-only",
    "A prompt without media gives the bare language model's logits, bit for bit",
    "without media = the language model alone",
    quick=True,
    exact=True,
)
@torch.no_grad()
def text_only(subject: WholeModel) -> Measured:
    """Compare the logits of text with those of the language model alone; the twin moves the text by one token.

    The text holds words and special tokens, which stand at the end of most vocabularies.
    """
    model, first = subject.model, subject.model.config.first_added_id
    ids = subject.draw(0, 11).lang_x
    ids = ids.masked_fill(ids >= first, int(ids[0, 0]))
    ids = torch.cat([ids, ids.new_tensor([subject.special_ids])], dim=1) if subject.special_ids else ids
    causal = torch.zeros_like(ids, dtype=torch.bool)  # with the mask `prefix`, text would see ahead
    with without_hooks(model.lang_model):
        expected = model.lang_model(input_ids=ids).logits[..., :first]
    return compare(
        model(lang_x=ids, prefix_mask=causal).logits[..., :first],
        expected,
        changed=model(lang_x=ids.roll(1, dims=1), prefix_mask=causal).logits[..., :first],
    )


@check(
    "bare",
    "With its gates closed, the model is the bare language model fed the same embeddings",
    "gates closed = the language model alone",
    quick=True,
    proves_in_stream="Vision tokens among the text are the bare language model fed the same embeddings",
    claim_in_stream="vision tokens = the same embeddings fed in",
)
def bare(subject: Subject) -> Measured | Decided:
    """Compare closed gates, or vision tokens among the text, with embeddings that a loop puts together.

    The twin shows other images, with open gates.
    """
    model, first = subject.model, subject.model.config.first_added_id
    if not model.gates() and not model.splices_media:
        return Decided("skipped", "this fusion has no gates (parameters whose names end in _gate)")
    if model.sees_ahead == "media":
        return Decided("skipped", "fusion.mask=image lets pictures see themselves; the bare language model does not")
    inputs = replace(subject.draw(2, 11), prefix=0)
    with closed_gates(model):
        expected = _bare_logits(model, inputs)
        found = subject.logits(inputs)[:, :first]
    return compare(found, expected, changed=subject.logits(inputs.with_other_media())[:, :first])


@torch.no_grad()
def _bare_logits(model: VLM, inputs: Inputs) -> Tensor:
    """Return float[T, V] of the language model without our hooks, fed embeddings that a loop puts together.

    A hook behind the embedding table puts them in: not every model takes `inputs_embeds`, and some use the ids
    elsewhere.
    """
    config, table = model.config, model.lang_model.get_input_embeddings()
    vision_tokens: Iterator[Tensor] = iter(())
    if model.splices_media and inputs.vision_x is not None:
        tokens, mask = model.encode_vision(**inputs.media)
        vision_tokens = iter(tokens[0][mask[0]])
    sizes = iter(inputs.sizes or [MediumSize()] * len(inputs.lang_x[0]))
    ids: list[int] = []
    embeddings: list[Tensor] = []
    last: list[int] = []  # last position of each token of the prompt
    with without_hooks(model.lang_model):
        for token in inputs.lang_x[0].tolist():
            for i in _ids_of(model, next(sizes)) if token == config.media_token_id else [token]:
                if i == config.media_token_id and model.splices_media:
                    embeddings.append(next(vision_tokens)[None])
                elif i >= config.first_added_id:
                    embeddings.append(model.added_tokens.embedding.weight[i - config.first_added_id][None])
                else:
                    embeddings.append(table(torch.tensor([i], device=model.device)))
                ids.append(i if i < config.first_added_id else 0)
            last.append(len(ids) - 1)
        whole = torch.cat([x.to(embeddings[0].dtype) for x in embeddings])[None]
        hook = table.register_forward_hook(lambda _, args, out: whole if out.shape == whole.shape else None)
        try:
            logits = model.lang_model(input_ids=torch.tensor([ids], device=model.device)).logits
        finally:
            hook.remove()
    return logits[0, last, : config.first_added_id]


def _ids_of(model: VLM, size: MediumSize) -> Sequence[int]:
    """Return what stands in the place of `<image>`."""
    if model.announcement is not None:
        return model.announcement.ids(size)
    return [model.config.media_token_id] * model.positions_of(size)


@check_whole(
    "media",
    "Another image changes the logits at and after its placeholder, and none before",
    "another image changes only what follows",
    quick=True,
)
def media(subject: WholeModel) -> Measured:
    """Change one image at a time: logits before its placeholder stay, those at and after it (the twin) change.

    If the fusion's mask lets positions see others after them, the twin also changes such a position. If text before the
    first image reads images, the prompt begins with an image.
    """
    inputs = replace(subject.draw(2, 11), prefix=0)
    if subject.model.reads_before_media:
        first = int((inputs.lang_x[0] == subject.model.config.media_token_id).nonzero()[0])
        inputs = replace(inputs, lang_x=inputs.lang_x[:, first:])
    starts = (inputs.lang_x[0] == subject.model.config.media_token_id).nonzero().flatten().tolist()
    expected = subject.logits(inputs)
    before, after = 0.0, _change_ahead(subject, inputs)
    for k, start in enumerate(starts):
        changed = subject.logits(inputs.with_other_media(k))
        before = max(before, largest_difference(changed[:start], expected[:start]))
        # The placeholder and the rest apart: a medium that is seen one position late would still change the rest.
        for part in (slice(start, start + 1), slice(start + 1, None)):
            after = min(after, largest_difference(changed[part], expected[part]))
    return Measured(before, scale_of(expected), twin=after)


@torch.no_grad()
def _change_ahead(subject: WholeModel, inputs: Inputs) -> float:
    """Change the last vision token of a picture, and return how much the logits at its first position change.

    With the mask `prefix` it is the first position of the prompt. Infinity if no position sees another after it.
    """
    model = subject.model
    tokens, mask = model.encode_vision(_media_of(inputs))
    if model.sees_ahead == "nothing" or int(mask[0, 0].sum()) < 2:
        return math.inf
    with model.conditioned(inputs.lang_x, tokens) as expanded:
        ids = expanded["input_ids"]
    is_media = ids == model.config.media_token_id
    found = []
    for sign in (1, -1):
        changed = tokens.clone()
        changed[:, 0, int(mask[0, 0].nonzero()[-1])] *= sign
        media = {"media": model.project_media(changed, mask), "media_mask": mask}
        whole = torch.ones_like(is_media) if model.sees_ahead == "prompt" else None
        found.append(subject.call(ids, media_counts=is_media.cumsum(-1), prefix_mask=whole, **media).logits[0])
    first = 0 if model.sees_ahead == "prompt" else int(is_media[0].nonzero()[0])
    return largest_difference(found[1][first], found[0][first])


def _media_of(inputs: Inputs) -> Tensor:
    assert inputs.vision_x is not None
    return inputs.vision_x
