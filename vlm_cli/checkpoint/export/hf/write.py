"""Write a model as the class of Transformers that holds it, load it back, and compare the two."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from vlm_cli.checkpoint.export.hf.agreement import compare_pictures
from vlm_cli.checkpoint.export.hf.classes import CLASSES
from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass
from vlm_cli.checkpoint.export.hf.fit import Fit, Subject, fit_class
from vlm_cli.checkpoint.export.hf.idefics3 import NO_NUM2WORDS
from vlm_cli.checkpoint.export.hf.tensors import added_embedding
from vlm_cli.checkpoint.export.language_model import forget_tokens
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError, LanguageModelError, UsageError, first_line
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.generation_settings import inherit_settings
from vlm_cli.modeling.meta import SkipsFilling, meta_device
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.modeling.vlm import VLM
from vlm_cli.plain_data import read_json
from vlm_cli.processor import VLMProcessor
from vlm_cli.templates.pictures import MESSAGE
from vlm_cli.templates.render import render_template
from vlm_cli.templates.standalone import make_template
from vlm_cli.trust import load_pretrained, load_tokenizer

__all__ = ["check_hf", "export_hf", "judge_classes"]

_NEAREST = 3  # classes whose problems a message lists


def check_hf(config: VLMConfig, name: str | None = None, *, verbose: bool = False) -> None:
    """Check that a class of Transformers holds a model.

    Args:
        config: of the VLM.
        name: a key of `CLASSES`; None for any class.
        verbose: whether the error tells of each class, and not of the nearest alone.

    Raises:
        UsageError: naming the settings that stand in the way of the nearest classes.
    """
    _choose(judge_classes(config, None, name), verbose=verbose)


def judge_classes(
    config: VLMConfig, processor: VLMProcessor | None = None, name: str | None = None
) -> list[tuple[str, Fit]]:
    """Judge a model by each class: those that hold it first, then those with the fewest problems.

    Of those that hold it, one comes first that also treats clips as the model does. No class is judged after such a
    one.

    Args:
        config: of the VLM.
        processor: of the VLM, if it is known.
        name: a key of `CLASSES`; None for all.
    """
    subject = Subject.of(config, None if processor is None else processor.tokenizer)
    fits: list[tuple[str, Fit]] = []
    for word, target in CLASSES.items():
        if name in (None, word):
            fits.append((word, fit_class(target, subject)))
            if not fits[-1][1].problems and fits[-1][1].is_exact:
                break
    # A class that could not even be made of the parts was judged by less, and is none of the nearest.
    return sorted(fits, key=lambda item: (item[1].config is None, len(item[1].problems), not item[1].is_exact))


def _choose(fits: list[tuple[str, Fit]], *, verbose: bool = False) -> tuple[str, Fit]:
    """Return the class that a model is written as, of classes that judged it.

    Args:
        fits: of `judge_classes`.
        verbose: as of `check_hf`.

    Raises:
        UsageError: if none holds it.
    """
    if not fits[0][1].problems:
        return fits[0]
    told = fits if verbose else fits[:_NEAREST]
    common = [x for x in fits[0][1].problems if len(fits) > 1 and all(x in fit.problems for _, fit in fits)]
    own = {CLASSES[word].model: [x for x in fit.problems if x not in common] for word, fit in told}
    listed = {**({"every class": common} if common else {}), **own}
    lines = "".join(
        f"\n  {model}:" + "".join(f"\n    - {x}" for x in found) for model, found in listed.items() if found
    )
    if more := len(fits) - len(told):
        lines += f"\n  {more} other classes are no nearer; --verbose lists them"
    raise UsageError(
        "no class of Transformers that vlm writes holds this model. What stands in the way, the nearest class first:"
        f"{lines}\nExport another format, such as --format delta; Transformers also loads a directory of vlm as it is "
        "(AutoModel, with vlm-cli installed)."
    )


def export_hf(
    model: VLM,
    processor: VLMProcessor,
    out: Path,
    *,
    name: str | None = None,
    max_shard_size: str = "5GB",
    verbose: bool = False,
) -> dict[str, Any]:
    """Write a model and its processor as a class of Transformers, load both back, and compare what they give.

    Args:
        model: the VLM.
        processor: its processor.
        out: an empty directory.
        name: a key of `CLASSES`; None takes the first that holds the model.
        max_shard_size: largest size of one weight file.
        verbose: as of `check_hf`.

    Raises:
        UsageError: if no class holds the model.
        CheckpointError: if the two differ.
    """
    fits = judge_classes(model.config, processor, name)
    word, fit = _choose(fits, verbose=verbose)
    target = CLASSES[word]
    _write_weights(model, fit, target, out, max_shard_size)
    forgotten = set() if fit.draft.has_added_rows else set(model.config.added_tokens) - {*fit.draft.kept_tokens}
    _write_processor(processor, fit.draft, target, forgotten, out)
    theirs = load_pretrained(getattr(transformers, target.model), out, dtype=model.dtype).eval()
    their_processor = load_pretrained(getattr(transformers, target.processor), out)
    facts = {"class": target.model, "positions_per_image": model.num_positions()}
    try:
        found = compare_pictures(model, processor, theirs, their_processor, out, fit.draft)
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{target.model} does not run this model ({type(error).__name__}: {first_line(error)}). Nothing was "
            "written; please report it with the composition."
        ) from None
    return {**facts, **found, "notes": [*found["notes"], *_missed(fits, target)]}


def _missed(fits: list[tuple[str, Fit]], target: HFClass) -> list[str]:
    """Say which class would hold a model as well, if a package were installed."""
    return [
        f"written for {target.model}. {CLASSES[word].model} holds the model, too, and reads clips; its processor needs "
        "the package num2words. For that class: pip install num2words, and export again with --overwrite."
        for word, fit in fits
        if fit.problems == (NO_NUM2WORDS,)
    ]


def _write_weights(model: VLM, fit: Fit, target: HFClass, out: Path, max_shard_size: str) -> None:
    config, draft = fit.config, fit.draft
    assert fit.plan is not None
    tables = target.find_tables(model, config)
    tied = config.tie_word_embeddings and _is_tied(model, tables, has_added_rows=draft.has_added_rows)
    pad: int | None = model.config.pad_token_id
    if pad is not None and pad >= config.get_text_config().vocab_size:
        pad = None
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
    config.pad_token_id, config.dtype = pad, model.dtype
    with meta_device(), SkipsFilling():
        theirs = getattr(transformers, target.model)(config)
    state = fit.plan.gather(model, theirs, tables, has_added_rows=draft.has_added_rows)
    theirs.load_state_dict(state, assign=True, strict=False)
    theirs.tie_weights()
    left = [name for name, x in theirs.state_dict().items() if x.is_meta]
    assert not left, f"no number for {left[0]}"
    theirs.generation_config, _ = inherit_settings(model.generation_config)
    theirs.generation_config.suppress_tokens = _suppressed(model, config, draft) or None
    theirs.generation_config.pad_token_id = pad
    stops = [i for i in stop_token_ids(theirs.generation_config) if i < config.get_text_config().vocab_size]
    theirs.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    theirs.save_pretrained(out, max_shard_size=max_shard_size)


def _is_tied(model: VLM, tables: tuple[Tensor, Tensor], *, has_added_rows: bool) -> bool:
    """Say whether the tables are one tensor in the class: if they are in the language model, added rows and all."""
    if tables[0] is not tables[1]:
        return False
    return not has_added_rows or torch.equal(added_embedding(model), model.added_tokens.head.weight)


def _suppressed(model: VLM, config: Any, draft: Draft) -> list[int]:
    """List what a VLM never writes: the image token, and rows of the tables that belong to no token."""
    given = list(model.generation_config.suppress_tokens or [])
    first, num = model.config.first_added_id, len(model.config.added_tokens)
    own = [model.config.media_token_id] if draft.has_added_rows else []
    beyond = range(first + (num if draft.has_added_rows else 0), config.get_text_config().vocab_size)
    return sorted({*given, *own, *beyond})


def _write_processor(processor: VLMProcessor, draft: Draft, target: HFClass, names: set[str], out: Path) -> None:
    """Write the processor, with a tokenizer that knows the class's tokens by their names.

    Args:
        processor: of the VLM.
        draft: settings of the class.
        target: the class.
        names: tokens that the class does not have.
        out: the directory.
    """
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = None  # it may take no pictures, and the processor has one that does
    tokenizer.save_pretrained(out)
    forget_tokens(out, names)
    if draft.named_tokens:
        _name_tokens(out / "tokenizer_config.json", draft.named_tokens)
    takes_template = draft.plain_prompt is None
    template = {"chat_template": _make_template(processor, draft.media_token)} if takes_template else {}
    found = getattr(transformers, target.processor)(
        image_processor=draft.images,
        tokenizer=load_tokenizer(out),
        **template,
        **draft.processor,
        **draft.parts,
    )
    found.save_pretrained(out)


def _name_tokens(file: Path, names: Mapping[str, str]) -> None:
    data = read_json(file)
    kept = {key: x for key, x in data.items() if key not in ("extra_special_tokens", *names)}
    text = json.dumps({**kept, "extra_special_tokens": dict(names)}, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _make_template(processor: VLMProcessor, media_token: str) -> str:
    """Return a chat template that takes pictures: the model's own, if it writes the class's token for one."""
    if (given := processor.chat_program) is not None and _writes(given, processor, media_token):
        return given
    return make_template(processor).replace(MEDIA_TOKEN, media_token)


def _writes(template: str, processor: VLMProcessor, media_token: str) -> bool:
    """Say whether a template writes one token for a picture, and opens the answer."""
    try:
        return render_template(template, MESSAGE, processor.tokenizer.special_tokens_map).count(media_token) == 1
    except LanguageModelError:
        return False
