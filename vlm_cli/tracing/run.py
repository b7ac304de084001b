"""`trace_prompt`: answer a prompt, and find out what the model saw.

A tokens of the answer, W words, T_img media, n vision tokens per medium.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vlm_cli.errors import PromptError
from vlm_cli.generation.plan import GenerationPlan, ignore_message
from vlm_cli.modeling.batching import pad_left
from vlm_cli.modeling.fusion.cross_attention import VLMWithCrossAttention
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.prompt import Medium, Text, TokenBreak
from vlm_cli.prompt import format as format_prompt
from vlm_cli.report.layout import lay_out_ids
from vlm_cli.templates.clip_text import add_clip_texts, chosen_of, split_clips
from vlm_cli.tracing.attention import RecordedAttention, gates_note, list_gates, record_model
from vlm_cli.tracing.geometry import natural_cells, patch_grid, spread
from vlm_cli.tracing.media import TracedMedia, read_media
from vlm_cli.tracing.occlusion import Falls, Occlusion, log_probabilities
from vlm_cli.tracing.origins import is_known
from vlm_cli.tracing.rollout import normalised, num_positions
from vlm_cli.tracing.trace import HeatMap, LayerShares, Measure, Trace
from vlm_cli.tracing.words import average_words, make_words, sum_words

if TYPE_CHECKING:
    from vlm_cli.media import LoadedClip, LoadedImage

__all__ = ["TraceOptions", "check_shows_pictures", "trace_prompt"]


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """What is traced.

    Attributes:
        top: alternatives of each token.
        cells: cells along a picture's longer side, of maps of occlusion; None for no occlusion.
        answer: the answer to trace; None for the model's own.
        seed: of the random numbers with which the model samples; None leaves them as they are.
    """

    top: int = 5
    cells: int | None = 8
    answer: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class _Row:
    """The prompt and the answer as the model reads them.

    Attributes:
        prompt: tokens, with one `<image>` for each medium.
        answer: tokens, without the one that stopped it.
        media: of the prompt.
    """

    prompt: list[int]
    answer: list[int]
    media: TracedMedia


@torch.no_grad()
def trace_prompt(
    plan: GenerationPlan,
    parts: Sequence[Text | Medium],
    media: Sequence[LoadedImage | LoadedClip],
    options: TraceOptions = TraceOptions(),
    *,
    name: str = "",
    notify: Callable[[str], None] = ignore_message,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Answer one prompt, and find out what the model saw.

    Args:
        plan: how the model answers.
        parts: the prompt, in reading order.
        media: the images and clips of the prompt.
        options: what is traced.
        name: of the model.
        notify: receives what the user should know before the answer.
        report: receives how many parts of pictures have been blanked, and of how many.

    Raises:
        PromptError: if the prompt has no media, is too long, or if the model answers nothing.
        MediaError: if a picture is too thin to be cut.
    """
    check_shows_pictures(media)
    model, processor = plan.model, plan.processor
    written = add_clip_texts(parts, processor, chosen_of(media))
    seen = read_media(model, processor, split_clips(media, processor))
    sizes = [x.size for x in seen.pixels]
    plan.budget.check_media(sizes)
    prompt = plan.writer.encode(written)
    row = _Row(prompt, _find_answer(plan, prompt, seen, options, notify), seen)
    with record_model(model) as recorded:
        logits = _read(row)
    found, _ = log_probabilities(model, logits, row.answer)
    words, numbers = make_words(processor.tokenizer, row.prompt, row.answer, found[0], options.top)
    attention, gates = recorded[0], list_gates(model)
    maps = _map_attention(row, attention, numbers) if attention.knows_media else []
    if options.cells is not None:
        occlusion = Occlusion(seen, processor, row.prompt, row.answer, options.cells)
        total = occlusion.total
        maps += _map_occlusion(occlusion.measure(lambda done: report(done, total)), numbers)
    return Trace(
        model=name,
        prompt=format_prompt(parts),
        answer="".join(word.text for word in words),
        words=tuple(words),
        pictures=seen.pictures,
        maps=tuple(maps),
        layout=lay_out_ids(model, processor, written, prompt, sizes),
        layers=tuple(_share_layers(row, attention, numbers)),
        gates=tuple(gates),
        notes=tuple(_write_notes(row, attention)),
    )


def check_shows_pictures(media: Sequence[LoadedImage | LoadedClip]) -> None:
    """Refuse a prompt without media.

    Raises:
        PromptError: saying how to show one.
    """
    if not media:
        raise PromptError(
            "the prompt shows no picture, so there is nothing to trace. Show one: "
            'vlm trace "<image:photo.jpg>A photo of". `vlm generate` answers a prompt of text alone.'
        )


def _find_answer(
    plan: GenerationPlan,
    prompt: list[int],
    media: TracedMedia,
    options: TraceOptions,
    notify: Callable[[str], None],
) -> list[int]:
    """Return the tokens of the answer, the given one or the model's own.

    Raises:
        PromptError: if there are none, or if the context has no room for them.
    """
    sizes = [x.size for x in media.pixels]
    positions = plan.budget.positions(len(prompt), sizes)
    room = plan.room(positions, notify, sizes)
    if options.answer is not None:
        given = plan.processor.encode(
            [TokenBreak(), Text(options.answer)],
            parse_special_tokens=plan.writer.parse_special_tokens,
            add_special_tokens=False,
        )
        left = plan.budget.left(positions)
        if not given or (left is not None and len(given) > left):
            raise PromptError(f"the answer to trace has {len(given)} tokens, and from 1 to {left} are possible.")
        return given
    if options.seed is not None:
        from transformers import set_seed

        set_seed(options.seed)
    ids, mask = pad_left([prompt], 0)
    output = plan.model.generate(
        input_ids=ids.to(plan.model.device),
        attention_mask=mask.to(plan.model.device),
        vision_tokens=media.tokens,
        media_mask=media.mask,
        vision_grid=media.grid,
        stopping_criteria=plan.stopping_criteria(),
        **plan.keywords | {"max_new_tokens": room},
    )
    written = output[0, len(prompt) :].tolist()
    stops = set(stop_token_ids(plan.model.generation_config))
    count = plan.read(prompt, written, room).new_tokens
    answer = [token for token in written[:count] if token not in stops]
    if not answer:
        raise PromptError(
            "the model answers nothing: its first token ends the answer. Ask in another way, or give an answer to "
            "trace: --answer TEXT."
        )
    return answer


def _read(row: _Row) -> Tensor:
    """Let the model read the prompt and the answer: float[1, tokens, V] logits."""
    media, model = row.media, row.media.model
    lang_x = torch.tensor([[*row.prompt, *row.answer]], device=model.device)
    in_prompt = torch.arange(lang_x.shape[1], device=model.device)[None] < len(row.prompt)
    return model(
        lang_x=lang_x,
        vision_tokens=media.tokens,
        media_mask=media.mask,
        vision_grid=media.grid,
        prefix_mask=in_prompt,
        use_cache=False,
    ).logits


# -- attention ---------------------------------------------------------------------------------------------------------


def _rows_of(row: _Row, attention: RecordedAttention) -> list[int]:
    """Return the positions whose logits give the tokens of the answer: each stands right before its token."""
    length = num_positions(attention.layers)
    return list(range(length - len(row.answer) - 1, length - 1))


def _map_attention(row: _Row, attention: RecordedAttention, numbers: Sequence[int]) -> list[HeatMap]:
    shares = average_words(attention.roll_out(_rows_of(row, attention)), numbers)  # [W, S]
    maps = []
    for picture, views in enumerate(row.media.features_of(shares)):
        shown = row.media.pictures[picture]
        rows, columns = natural_cells(shown.width, shown.height, shown.views)
        size = (shown.width, shown.height)
        cells = torch.stack(
            [spread(x, view, size, rows, columns) for x, view in zip(views, shown.views, strict=True)]
        ).sum(0)
        of_views = torch.stack([x.sum(-1) for x in views], dim=-1)  # [W, views]
        maps += _make_maps(picture, "attention", of_views.sum(-1), of_views, cells)
    return maps


def _share_layers(row: _Row, attention: RecordedAttention, numbers: Sequence[int]) -> list[LayerShares]:
    """Say to which pictures the words attend at each layer, and at each gated block."""
    found = []
    for i, layer in enumerate(attention.layers):
        if layer.block is not None:
            found.append(_share(row, i, "block", layer.block.weights[_rows_of(row, attention)], numbers))
        if layer.weights is not None:
            weights = normalised(layer.weights)[_rows_of(row, attention)]
            found.append(_share(row, i, "layer", attention.to_tokens(weights), numbers))
    return found


def _share(
    row: _Row, layer: int, kind: Literal["layer", "block"], shares: Tensor, numbers: Sequence[int]
) -> LayerShares:
    """Add up the shares of vision tokens, float[A, S], by picture; what is no picture's is text."""
    pictures = average_words(row.media.picture_shares(shares), numbers)  # [W, pictures]
    text = (1 - pictures.sum(-1)).clamp(min=0)
    return LayerShares(layer, kind, tuple(text.tolist()), tuple(tuple(x) for x in pictures.tolist()))


# -- occlusion ---------------------------------------------------------------------------------------------------------


def _map_occlusion(falls: Sequence[Falls], numbers: Sequence[int]) -> list[HeatMap]:
    maps = []
    for picture, fall in enumerate(falls):
        whole, views, cells = (sum_words(x, numbers) for x in (fall.whole, fall.views, fall.cells))
        maps += _make_maps(picture, "occlusion", whole, views, cells)
    return maps


def _make_maps(picture: int, measure: Measure, whole: Tensor, views: Tensor, cells: Tensor) -> list[HeatMap]:
    """Make the maps of all words over one picture of float[W], float[W, views] and float[W, rows, columns]."""
    return [
        HeatMap(word, picture, measure, of_whole, tuple(of_views), tuple(tuple(line) for line in of_cells))
        for word, (of_whole, of_views, of_cells) in enumerate(
            zip(whole.tolist(), views.tolist(), cells.tolist(), strict=True)
        )
    ]


# -- notes -------------------------------------------------------------------------------------------------------------


def _write_notes(row: _Row, attention: RecordedAttention) -> list[str]:
    """Say what could not be measured with this model, or only in another way."""
    model = row.media.model
    found = attention.notes(model.lang_model.config.model_type)
    if not isinstance(model, VLMWithCrossAttention) and not model.splices_media:
        fusion = model.config.composition.fusion.type
        found.append(
            f"The fusion {fusion!r} is of another package, and how it attends is not known: no maps of attention."
        )
    if not is_known(model.vision_tokenizer):
        found.append(
            f"The vision tokenizer {model.config.composition.vision_tokenizer.type!r} is of another package: where its "
            "tokens come from is measured by how far each moves when a feature of the encoder is left out."
        )
    if patch_grid(model) == (1, 1):
        found.append("The vision encoder's features are no grid, so attention spreads evenly over each view.")
    if note := gates_note(list_gates(model)):
        found.append(note)
    return found
