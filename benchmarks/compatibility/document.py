"""docs/compatibility.md: what was found, as a page. The same findings give the same page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.compatibility.encoders import MOST_PATCHES, EncoderRow
from benchmarks.compatibility.language_models import model_types
from benchmarks.compatibility.reference import (
    REFERENCE_LANGUAGE_MODELS_FOUND,
    REFERENCE_LANGUAGE_MODELS_WORKING,
    REFERENCE_TOWERS,
)
from benchmarks.compatibility.towers import TowerRow
from vlm_cli.composition import UNSUITABLE_LANGUAGE_MODELS
from vlm_cli.doctor import CHECKS, Finding
from vlm_cli.modeling.language_model import NO_CHUNKED_PREFILL, NO_LEFT_PADDING

__all__ = [
    "FUSIONS",
    "PAGE",
    "LanguageModelRow",
    "encoder_row",
    "encoder_total",
    "language_model_row",
    "page",
    "tower_row",
    "versions",
]

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
FUSIONS = ("cross-attention", "language-stream")
MARKS = {"holds": "✓", "limit": "○", "fails": "✗", "skipped": "-"}
_TOWER_CHECKS = ("declared", "real", "folding", "distinct", "pixels")
_WORST = ("fails", "limit", "skipped", "holds")


@dataclass(frozen=True)
class LanguageModelRow:
    """Findings of one type, by fusion."""

    model_type: str
    findings: Mapping[str, Sequence[Finding]]

    def verdict(self, check: str) -> str:
        """The worse of the two fusions."""
        found = {f.verdict for findings in self.findings.values() for f in findings if f.name == check}
        return next(verdict for verdict in _WORST if verdict in found)


def versions() -> str:
    """The libraries that findings depend on."""
    names = ("transformers", "open_clip_torch", "timm", "torch")
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in names)


def language_model_row(row: LanguageModelRow) -> str:
    """A line of the table of language models."""
    name = row.model_type
    ours = [MARKS[row.verdict(check)] for check in CHECKS]
    theirs = [_mark(name in names) for names in (REFERENCE_LANGUAGE_MODELS_FOUND, REFERENCE_LANGUAGE_MODELS_WORKING)]
    return _line([name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name], *ours, *theirs])


def tower_row(row: TowerRow) -> str:
    """A line of the table of towers."""
    height, width = row.image_size
    size = str(height) if height == width else f"{height}×{width}"
    theirs = REFERENCE_TOWERS.get(row.name)
    return _line(
        [
            row.name,
            row.kind,
            size,
            str(row.patches),
            str(row.channels),
            f"{row.parameters:.1f}",
            row.ran,
            *[_mark(check.passed, MARKS["fails"]) for check in row.checks.values()],
            _mark(theirs is not None and theirs.own_size),
            _mark(theirs is not None and theirs.published),
        ]
    )


def encoder_row(kind: str, row: EncoderRow) -> str:
    """A line of the tables of encoders of Transformers (`hf`) and timm."""
    patches, channels = row.shape or ("-", "-")
    name = f"{kind}:{row.name}"
    if kind == "timm":
        return _line([name, row.model, str(patches), str(channels)])
    layers = str(row.layers) if row.layers else "-"
    return _line([name, row.model, str(patches), str(channels), str(row.beside), layers])


def encoder_total(what: str, rows: Sequence[EncoderRow]) -> str:
    """The line of the totals for such encoders."""
    return f"| {what}, of {len(rows)} | **{sum(row.shape is not None for row in rows)}** | - |"


def encoder_sections(types: Sequence[EncoderRow], families: Sequence[EncoderRow]) -> list[str]:
    """The lines of the tables of encoders of Transformers and of timm."""
    lines = [
        "## Vision models of Transformers",
        "",
        "`--vision-encoder hf:ORG/NAME` of each type that has a class for images alone, at its default settings: `v` "
        f"patches of `d` channels. Models of up to {MOST_PATCHES:,} patches run, with two layers where all layers are "
        "alike: their tokens are those that vlm found, an image alone gives what it gives among others, and another "
        "image gives other features. Of larger ones, and of those whose features vanish with random weights, only "
        "shapes are measured. **beside**: class and register tokens; "
        "**layers**: how many can be chosen.",
        "",
        _line(["vision type", "class", "v", "d", "beside", "layers"]),
        _line(["---", "---", "--:", "--:", "--:", "--:"]),
        *(encoder_row("hf", row) for row in types if row.shape is not None),
    ]
    lines += ["", "### Types that cannot be a vision encoder", "", *_encoder_reasons("hf", types)]
    lines += [
        "",
        "## Families of timm",
        "",
        "One model of each family, `--vision-encoder timm:NAME`, measured on the meta device.",
        "",
        _line(["timm family", "model", "v", "d"]),
        _line(["---", "---", "--:", "--:"]),
        *(encoder_row("timm", row) for row in families if row.shape is not None),
        "",
    ]
    if reasons := _encoder_reasons("timm", families):
        lines += ["### Families that cannot be a vision encoder", "", *reasons, ""]
    return lines


def _encoder_reasons(kind: str, rows: Sequence[EncoderRow]) -> list[str]:
    reasons = {f"{kind}:{row.name}": row.problem for row in rows if row.shape is None}
    return [f"- {reason}: {', '.join(f'`{x}`' for x in names)}" for reason, names in _by_reason(reasons).items()]


def page(
    language_models: Sequence[LanguageModelRow],
    towers: Sequence[TowerRow],
    types: Sequence[EncoderRow],
    families: Sequence[EncoderRow],
) -> str:
    """The whole page."""
    verdicts = [f.verdict for row in language_models for findings in row.findings.values() for f in findings]
    whole = sum(all(row.verdict(check) != "fails" for check in CHECKS) for row in language_models)
    spotless = sum(all(row.verdict(check) == "holds" for check in CHECKS) for row in language_models)
    types = len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found = [row.model_type for row in language_models if row.model_type in REFERENCE_LANGUAGE_MODELS_FOUND]
    working = [row.model_type for row in language_models if row.model_type in REFERENCE_LANGUAGE_MODELS_WORKING]
    passed = sum(row.verdict for row in towers)
    reference = [REFERENCE_TOWERS[row.name] for row in towers if row.name in REFERENCE_TOWERS]
    return "\n".join(
        [
            "# Compatibility",
            "",
            "Written by `python -m benchmarks.compatibility`, which runs every composition below; do not edit.",
            f"Versions: {versions()}.",
            "",
            "| | vlm | the published reference |",
            "|---|--:|--:|",
            f"| language model types × fusions, of {len(language_models)} × {len(FUSIONS)} "
            f"| **{whole * len(FUSIONS)}** | {len(working)} × 1 |",
            f"| OpenCLIP towers, of {len(towers)} | **{passed}** | {sum(x.own_size for x in reference)}, "
            f"as published {sum(x.published for x in reference)} |",
            encoder_total("vision models of Transformers", types),
            encoder_total("families of timm", families),
            "",
            f"Of the {types} types of `AutoModelForCausalLM`, {len(model_types())} are autoregressive decoders of text "
            f"that can stand alone; the other {types - len(model_types())} are listed last. {spotless} types hold "
            f"everything. Of {len(verdicts):,} checks {verdicts.count('holds'):,} hold, {verdicts.count('limit')} meet "
            f"a limit of the language model itself, and {verdicts.count('fails')} fail.",
            "",
            "The reference is mlfoundations/open_flamingo, branch reduce-scope-mllm, measured with Transformers 5.23 "
            f"and OpenCLIP 3.3: its table of names finds the layers of {len(found)} of these types, and {len(working)} "
            "run with unopened gates leaving their logits alone, once the random bias is taken out that it adds to a "
            "head without one.",
            "",
            "`vlm doctor MODEL` runs the same checks on a model of yours.",
            "",
            "## Language models",
            "",
            "A tiny random model of each type, made from its own configuration class, with both fusions and a "
            "Perceiver; a cell is the worse of the two. ✓ holds; ○ the bare language model fails in the same way, "
            "see [limits](#limits-of-language-models); ✗ fails.",
            "",
            *[f"- **{name}**: {check.proves}." for name, check in CHECKS.items()],
            "- **found**, **works**: the reference's table finds the layers; it works from end to end.",
            "",
            _line(["type", "class", *CHECKS, "found", "works"]),
            _line(["---", "---", *[":-:"] * (len(CHECKS) + 2)]),
            *map(language_model_row, language_models),
            "",
            "### Limits of language models",
            "",
            *_limits(language_models),
            "",
            "### Types that cannot be the language model of a VLM",
            "",
            "`vlm build` refuses them with the reason.",
            "",
            *[
                f"- {reason}: {', '.join(f'`{name}`' for name in sorted(names))}"
                for reason, names in _by_reason(UNSUITABLE_LANGUAGE_MODELS).items()
            ],
            "",
            "## OpenCLIP towers",
            "",
            "`v` patches of `d` channels. Towers of up to 130 M parameters run whole; of larger ones, a copy with two "
            "layers of each stack runs, and all of it on the meta device. **declared**: v and d are known before a "
            "weight is; **real**: a real pass gives them, from the last layer and the one before; **folding**: each "
            "frame of a batch of media is encoded alone; **distinct**: different images give different features; "
            "**pixels**: preprocessing equals OpenCLIP's, without weights and for each pretrained tag. **reference**: "
            "its code works at the tower's own image size, and at the 490 pixels that it passes for every tower.",
            "",
            _line(["tower", "class", "size", "v", "d", "M", "ran", *_TOWER_CHECKS, "reference", "at 490"]),
            _line(["---", "---", "--:", "--:", "--:", "--:", "---", *[":-:"] * (len(_TOWER_CHECKS) + 2)]),
            *map(tower_row, towers),
            "",
            *encoder_sections(types, families),
        ]
    )


def _limits(rows: Iterable[LanguageModelRow]) -> list[str]:
    known = {"padded": NO_LEFT_PADDING, "chunked-prefill": NO_CHUNKED_PREFILL}
    advice = {
        "padded": "; rows of several lengths are refused, so that `--batch-size 1` is the way",
        "chunked-prefill": "; a cache and several tokens are refused, as is `prefill_chunk_size`",
    }
    lines = []
    for row in rows:
        for check in CHECKS:
            if row.verdict(check) == "limit":
                reason = known.get(check, {}).get(row.model_type)
                lines.append(
                    f"- `{row.model_type}`, {check}: {reason}{advice[check]}."
                    if reason
                    else f"- `{row.model_type}`, {check}: the bare language model differs by more than rounding."
                )
    return lines


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def _mark(passed: bool, otherwise: str = "-") -> str:
    return MARKS["holds"] if passed else otherwise


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
