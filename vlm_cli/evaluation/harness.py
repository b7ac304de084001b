"""A model of vlm in lmms-eval: the entry point `vlm` of the group `lmms_eval.models`.

    lmms-eval --model vlm --model_args pretrained=DIR --tasks TASK

This module imports lmms_eval, and only lmms_eval imports it. Source: the abstract class `lmms_eval.api.model.lmms`, and
the registry `lmms_eval.models.registry_v2`, of version 0.7.3.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from vlm_cli.data.formats.turns import split_placeholders
from vlm_cli.errors import DataError, UsageError
from vlm_cli.generation.answers import RowAnswerer
from vlm_cli.generation.batch_size import BatchSize
from vlm_cli.generation.likelihood import LikelihoodScorer
from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.generation.rows import Row
from vlm_cli.media import MediaLoader
from vlm_cli.models import load
from vlm_cli.prompt import Medium, Slot, Text
from vlm_cli.writing.choice import TemplateChoice
from vlm_cli.writing.writer import PromptWriter

__all__ = ["HarnessModel", "manifest"]

MAX_NEW_TOKENS = 1024  # of an answer, unless the task says more, as lmms-eval's own models have it
MOST_DETAILS = 5  # requests without an answer that a message names

Parts = list[Text | Medium]


def manifest() -> ModelManifest:
    """Return what lmms-eval must know of the model."""
    return ModelManifest(model_id="vlm", simple_class_path=f"{__name__}.{HarnessModel.__name__}")


class HarnessModel(lmms):  # type: ignore[misc]  # the class is Any where lmms_eval is not installed
    """A model that lmms-eval asks.

    Args:
        pretrained: a directory that `vlm build` or `vlm train` wrote, or a hub id.
        batch_size: requests that are answered at once; fewer if memory does not suffice.
        device: such as cuda, cpu or auto.
        dtype: of the weights; auto keeps that of the files.
        chat_template: auto or all writes each prompt as a turn of the user; none leaves it as it stands.
        system: what the model is told before each prompt.
        max_tiles: the most tiles of one picture.
        trust_remote_code: whether the language model's own code may run.
        others: lmms-eval passes `max_batch_size`.

    Raises:
        UsageError: for another argument, and in several processes.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "demo",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        chat_template: str = "auto",
        system: str | None = None,
        max_tiles: int | None = None,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        if unknown := [key for key in others if key != "max_batch_size"]:
            known = "pretrained, batch_size, device, dtype, chat_template, system, max_tiles, trust_remote_code"
            raise UsageError(f"--model vlm does not know the argument {unknown[0]!r}. Known: {known}.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("--model vlm runs in one process. Leave out `accelerate launch`.")
        self.size = _read_batch_size(batch_size)
        self.model, self.processor = load(
            pretrained, device=_find_device(device), dtype=dtype, trust_remote_code=trust_remote_code
        )
        if max_tiles is not None:
            self.processor.image_processor.limit_tiles(int(max_tiles))
        self.writer = PromptWriter(self.processor, TemplateChoice.parse(chat_template), system=system)
        self.loader = MediaLoader()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests of (context, settings, doc_to_visual, doc_id, task, split)."""
        prompts, settings = [], []
        for context, given, doc_to_visual, doc_id, task, split in (x.args for x in requests):
            prompts.append(_write(context, doc_to_visual(self.task_dict[task][split][doc_id])))
            settings.append(given)
        answers = self._answer(prompts, settings)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], answer)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Rate the continuations of requests of (context, doc_to_target, doc_to_visual, doc_id, task, split).

        lmms-eval 0.7.3 takes the choice with the least value, since its own models return a loss. So a value is the
        negative log-probability of all tokens, beside whether the model would write them.
        """
        prompts, texts = [], []
        for args in (x.args for x in requests):
            context, target = args[:2]
            visuals: Any = []
            if len(args) > 2:
                _, _, doc_to_visual, doc_id, task, split = args
                document = self.task_dict[task][split][doc_id]
                target = target if isinstance(target, str) else target(document)
                visuals = doc_to_visual(document)
            prompts.append(_write(context, visuals))
            texts.append([str(target)])
        plan = self._plan({"max_new_tokens": 1})
        rows = self._rows(plan, prompts)
        found = LikelihoodScorer(plan, BatchSize(self.size)).score(rows, texts, self.loader)
        _check(rows)
        return [(-x.log_probability, x.is_greedy) for (x,) in found]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[tuple[str, ...]]:
        """Answer requests of several rounds; the task says what each round asks, and when it ends.

        A request is (context, settings, doc_to_visual, doc_to_text, doc_id, task, split). `doc_to_text` gives for the
        answers so far (visuals, context, whether it has ended, answers, what it wants to know in the next round).
        """
        args = [x.args for x in requests]
        documents = [self.task_dict[task][split][doc_id] for *_, doc_id, task, split in args]
        asked = {i: _write(x[0], x[2](document)) for i, (x, document) in enumerate(zip(args, documents, strict=True))}
        said: list[list[str]] = [[] for _ in requests]
        known: list[Any] = [None for _ in requests]
        round_index = 0
        while asked:
            answers = self._answer(list(asked.values()), [args[i][1] for i in asked])
            round_index += 1
            following = {}
            for i, answer in zip(list(asked), answers, strict=True):
                said[i].append(answer)
                visuals, context, has_ended, so_far, known[i] = args[i][3](
                    documents[i], previous_output=said[i], round_idx=round_index, previous_round_info=known[i]
                )
                said[i] = list(so_far)
                if not has_ended:
                    following[i] = _write(context, visuals)
            asked = following
        return [tuple(x) for x in said]

    def _answer(self, prompts: Sequence[Parts], settings: Sequence[Mapping[str, Any]]) -> list[str]:
        """Answer prompts, those with equal settings together."""
        groups: dict[str, list[int]] = {}
        for i, given in enumerate(settings):
            groups.setdefault(repr(sorted(given.items(), key=lambda x: x[0])), []).append(i)
        answers = [""] * len(prompts)
        for chosen in groups.values():
            plan = self._plan(settings[chosen[0]])
            rows = self._rows(plan, [prompts[i] for i in chosen])
            for _ in RowAnswerer(plan, BatchSize(self.size)).answer(iter(rows), self.loader):
                pass
            _check(rows)
            for i, row in zip(chosen, rows, strict=True):
                assert row.answers is not None
                answers[i] = row.answers[0].text
        return answers

    def _plan(self, settings: Mapping[str, Any]) -> GenerationPlan:
        """Return how the model answers by the settings of a task."""
        until = settings.get("until") or []
        stops = [x for x in ([until] if isinstance(until, str) else until) if x.strip()]
        temperature = float(settings.get("temperature") or 0)
        samples = bool(settings.get("do_sample")) and temperature > 0
        keywords = {
            "max_new_tokens": int(settings.get("max_new_tokens") or MAX_NEW_TOKENS),
            "do_sample": samples,
            "temperature": temperature if samples else None,
            "top_p": float(settings.get("top_p") or 1.0) if samples else None,
            "top_k": 0 if samples else None,
            "num_beams": int(settings.get("num_beams") or 1),
            "num_return_sequences": 1,
            "repetition_penalty": 1.0,
        }
        return GenerationPlan(self.model, self.processor, keywords, stops, self.writer)

    def _rows(self, plan: GenerationPlan, prompts: Sequence[Parts]) -> list[Row]:
        """Turn prompts into tokens.

        Raises:
            VLMError: if the model has no room for one.
        """
        rows = []
        for number, parts in enumerate(prompts, start=1):
            row = Row(line=number)
            row.encode(plan, parts, self.loader, is_turns=True)
            row.reserve(plan)
            rows.append(row)
        return rows


def _find_device(device: str | None) -> str:
    """Return the device that lmms-eval names, or the first one of this machine."""
    import torch

    if device is None or device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _read_batch_size(given: int | str) -> int:
    try:
        size = int(given)
    except ValueError:
        size = 0
    if size < 1:
        raise UsageError(f"batch_size must be a number of requests, got {given!r}. Give, for instance, batch_size=8.")
    return size


def _write(context: str, visuals: Any) -> Parts:
    """Return a prompt: each `<image>` takes a picture if there are as many; else all pictures stand in front."""
    media = [_medium(x) for x in _flatten(visuals)]
    parts = split_placeholders(context, ["image"])
    if sum(isinstance(part, Slot) for part in parts) != len(media):
        return [*media, Text(context)] if context else [*media]
    left = iter(media)
    return [next(left) if isinstance(part, Slot) else part for part in parts]


def _flatten(visuals: Any) -> Iterable[Any]:
    if visuals is None:
        return
    for x in visuals if isinstance(visuals, (list, tuple)) else [visuals]:
        if isinstance(x, (list, tuple)):
            yield from _flatten(x)
        elif x is not None:
            yield x


def _medium(visual: Any) -> Medium:
    """Return a picture of Pillow as an address that holds it, or the file of a clip.

    Raises:
        UsageError: for sound, and whatever else is neither.
    """
    from PIL.Image import Image

    if isinstance(visual, Image):
        data = io.BytesIO()
        picture = visual if visual.mode in ("RGB", "RGBA", "L", "LA", "P", "1") else visual.convert("RGB")
        picture.save(data, "PNG", compress_level=1)
        return Medium(f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}")
    if isinstance(visual, str):
        return Medium(visual, "video")
    raise UsageError(f"--model vlm sees pictures and clips, and the task shows a {type(visual).__name__}.")


def _check(rows: Sequence[Row]) -> None:
    """Refuse results in which requests have no answer: lmms-eval would count them as wrong.

    Raises:
        DataError: naming the first ones.
    """
    if failed := [row for row in rows if row.error is not None]:
        told = "\n".join(f"  request {row.line}: {row.error}" for row in failed[:MOST_DETAILS])
        raise DataError(f"{len(failed):,} of {len(rows):,} requests have no answer:\n{told}")
