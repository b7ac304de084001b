"""Tiny checkpoints in published layouts, and their comparison with the implementation that wrote them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from tests.support import ROOT, seed_torch, tiny
from tests.support.tiny import nudged
from vlm_cli.checkpoint.create import configure
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint, TensorInfo
from vlm_cli.checkpoint.published.fill import KeyReport, plan_fill
from vlm_cli.checkpoint.published.importing import Imported, import_checkpoint
from vlm_cli.checkpoint.published.recognising import recognise
from vlm_cli.composition import MEDIA_TOKEN, Composition, CompositionRequest
from vlm_cli.modeling.towers import find_tower_shape
from vlm_cli.modeling.vlm import VLM

VOCABULARY = 80  # tokens of the language model before anything is added
SIZE = 32  # pixels


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tiny checkpoint.

    Attributes:
        source: file or directory that `--from` gets.
        logits: int[1, T] with `<image>` at media, float[1, T_img, 1, 3, H, W] -> float[T, VOCABULARY] of the
            implementation that the layout belongs to.
        options: settings over the checkpoint's composition.
        made_by: that implementation, in words.
        unused: how many tensors of the checkpoint a VLM does not have.
    """

    source: Path
    logits: Callable[[Tensor, Tensor], Tensor]
    options: CompositionRequest = field(default_factory=CompositionRequest)
    made_by: str
    unused: int = 0


def write_tokenizer(
    folder: Path, *added: str, pad: str | None = None, named: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Write a tokenizer of `VOCABULARY` words, with special tokens after them; some may have a name."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", extra_special_tokens=named or {})
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in added], special_tokens=True)
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(folder)
    return tokenizer


def load(case: Case, **options: Any) -> Imported:
    return import_checkpoint(case.source, composition_over=case.options.compose_over, **options)


def prompt(model: VLM, num_media: int = 2, length: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw int[1, T] tokens, `<image>` first and at every third from there, and float[1, T_img, 1, 3, H, W]."""
    seed_torch(seed)
    lang_x = torch.randint(1, VOCABULARY, (1, length))
    lang_x[0, : 3 * num_media : 3] = model.config.media_token_id
    return lang_x, torch.randn(1, num_media, 1, 3, *model.vision_encoder.image_size)


PAGE = ROOT / "docs" / "checkpoints.md"


def tell(row: str) -> None:
    """Check that docs/checkpoints.md has this row; write the row if VLM_UPDATE_DOCS is set."""
    text = PAGE.read_text(encoding="utf-8")
    if row in text.splitlines():
        return
    assert os.environ.get("VLM_UPDATE_DOCS"), (
        f"docs/checkpoints.md lacks {row}: VLM_UPDATE_DOCS=1 pytest tests/checkpoint/published"
    )
    key = " | ".join(row.split(" | ")[:2])
    lines = text.splitlines()
    start = lines.index("|---|---|--:|--:|--:|:-:|:-:|") + 1
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    lines[start:end] = sorted({row, *(x for x in lines[start:end] if not x.startswith(f"{key} | "))})
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


@torch.no_grad()
def check(case: Case, num_media: int = 2, *, is_told: bool = False) -> float:
    """Import a checkpoint and compare logits and greedy tokens; return the largest difference.

    A changed weight must make a difference.

    Args:
        case: the checkpoint.
        num_media: of the prompt.
        is_told: whether docs/checkpoints.md has a row for it.
    """
    imported = load(case)
    report, model = imported.report, imported.model
    assert model is not None, report
    assert len(report.unused) == case.unused, report.unused
    lang_x, vision_x = prompt(model, num_media)
    expected = case.logits(lang_x, vision_x)
    text = (lang_x[0] != model.config.media_token_id).nonzero().flatten()

    def ours() -> Tensor:
        return model(lang_x=lang_x, vision_x=vision_x).logits[0, text, :VOCABULARY]

    difference = float((ours() - expected[text]).abs().max())
    assert difference <= 1e-4, difference
    assert float((case.logits(lang_x, -vision_x)[text] - expected[text]).abs().max()) > 1e-2  # images matter
    with nudged(next(model.vision_tokenizer.parameters())):
        assert float((ours() - expected[text]).abs().max()) > 1e-3

    # The next word is chosen among words: added tokens have other ids there.
    sequence = lang_x
    for _ in range(4):
        token = case.logits(sequence, vision_x)[-1].argmax()
        sequence = torch.cat([sequence, token.view(1, 1)], dim=1)
    added = list(range(VOCABULARY, model.config.first_added_id + model.added_tokens.num_tokens))
    found = model.generate(
        lang_x=lang_x, vision_x=vision_x, max_new_tokens=4, do_sample=False, suppress_tokens=added, eos_token_id=None
    )
    assert torch.equal(found, sequence)
    if is_told:
        counts = [len(x) for x in (report.loaded, report.absent, report.unused)]
        tell(f"| {imported.layout.name} | {case.made_by} | {' | '.join(map(str, counts))} | ✓ | ✓ |")
    return difference


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a directory with one weight file."""
    file = folder / "model.safetensors"
    save_file({k: x.contiguous() for k, x in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def rewrite_config(folder: Path, name: str = "config.json", **values: Any) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}), encoding="utf-8")


class _Shapes(PublishedCheckpoint):
    """A checkpoint whose tensors are shapes alone."""

    def read(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())


def shapes_of(theirs: PreTrainedModel | Mapping[str, Tensor]) -> PublishedCheckpoint:
    """Make a checkpoint without weights from a model on the meta device, or from its tensors."""
    is_model = isinstance(theirs, PreTrainedModel)
    tensors = theirs.state_dict(keep_vars=True) if is_model else theirs
    tensors = {name: x for x, name in {id(x): (x, name) for name, x in reversed(tensors.items())}.values()}
    file = Path("model.safetensors")
    infos = {name: TensorInfo(tuple(x.shape), torch.float16, file) for name, x in tensors.items()}
    return _Shapes("ORG/NAME", Path("no-such-folder"), infos, theirs.config.to_dict() if is_model else {})


def sized(checkpoint: PublishedCheckpoint) -> tuple[VLM, KeyReport]:
    """Build the model that a checkpoint describes on the meta device, and plan where its tensors go."""
    found = recognise(checkpoint).description
    composition = Composition.compose(None, found.composition)
    text = dict(found.text_config)
    shape = find_tower_shape(found.vision_config, **composition.vision_encoder.feature_arguments)
    text_config = AutoConfig.for_model(text.pop("model_type"), **text)
    with torch.device("meta"):
        model = VLM(configure(composition, found.vision_config, shape, text_config, None, found.first_added_id))
    plan = plan_fill(
        model,
        checkpoint,
        found.targets_for(model.config),
        has_weights=lambda name: False,
        is_optional=found.is_optional,
    )
    return model, plan.report


def register_siglip(name: str, *, width: int, layers: int, heads: int, patch: int) -> str:
    """Give timm a tiny SigLIP of this name for images of `SIZE` pixels."""
    sizes = {"img_size": SIZE, "patch_size": patch, "embed_dim": width, "depth": layers, "num_heads": heads}
    return tiny.register(name, VisionTransformer, **sizes, mlp_ratio=2, class_token=False)


__all__ = [
    "MEDIA_TOKEN",
    "SIZE",
    "VOCABULARY",
    "Case",
    "check",
    "load",
    "prompt",
    "register_siglip",
    "shapes_of",
    "sized",
    "write_tokenizer",
]
