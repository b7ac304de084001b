"""docs/compatibility.md says what is so: each row is measured again."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.compatibility import encoders
from benchmarks.compatibility.__main__ import check_type
from benchmarks.compatibility.document import FUSIONS, PAGE, encoder_row, language_model_row, tower_row, versions
from benchmarks.compatibility.encoders import check_family, check_vision_type
from benchmarks.compatibility.language_models import model_types, tiny_config, tiny_vlm
from benchmarks.compatibility.towers import check_tower, towers
from tests.support import ROOT
from vlm_cli.checkpoint.parts.unsuitable_encoders import UNSUITABLE_ENCODERS
from vlm_cli.composition import UNSUITABLE_LANGUAGE_MODELS
from vlm_cli.doctor import CHECKS
from vlm_cli.errors import LanguageModelLimit
from vlm_cli.modeling.language_model import NO_CHUNKED_PREFILL, NO_LEFT_PADDING

TEXT = PAGE.read_text(encoding="utf-8")
#: The page tells of one set of versions; with others a row may differ, and must hold all the same.
IS_CURRENT = f"Versions: {versions()}." in TEXT
ROWS = {line.split(" | ")[0].strip("| "): line for line in TEXT.splitlines() if line.startswith("| ")}


def stable(row: str) -> str:
    """A row without limits that are a matter of rounding, which another processor may not show."""
    return row.replace("○", "✓") if row.startswith("| zamba2 ") else row


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", model_types())
def test_language_model(model_type: str) -> None:
    row = check_type(model_type)
    failed = [f"{fusion}: {f}" for fusion, found in row.findings.items() for f in found if f.verdict == "fails"]
    assert not failed
    for fusion in FUSIONS:
        assert [f.name for f in row.findings[fusion]] == list(CHECKS)
    if IS_CURRENT:
        assert stable(ROWS[model_type]) == stable(language_model_row(row)), "run `python -m benchmarks.compatibility`"


@pytest.mark.matrix
@pytest.mark.parametrize("name", towers())
def test_tower(name: str) -> None:
    row = check_tower(name)
    assert row.verdict, row.reason
    if IS_CURRENT:
        assert ROWS[name] == tower_row(row), "run `python -m benchmarks.compatibility`"


def test_totals_are_those_of_the_rows() -> None:
    if not IS_CURRENT:
        pytest.skip(f"the page tells of other versions than {versions()}")
    types = [name for name in model_types() if name in ROWS]
    assert types == model_types() and all(name in ROWS for name in towers())
    good = sum("✗" not in ROWS[name] for name in types)
    assert f"| **{good * len(FUSIONS)}** |" in ROWS[f"language model types × fusions, of {len(types)} × {len(FUSIONS)}"]
    assert ROWS["type"].split(" | ")[2:-2] == list(CHECKS)
    assert "| **144** |" in ROWS[f"OpenCLIP towers, of {len(towers())}"]
    assert not [name for name, row in ROWS.items() if "✗" in row]


def test_each_limit_has_its_reason() -> None:
    limits = re.findall(r"^- `([\w.-]+)`, ([\w-]+): (.+)$", TEXT, re.MULTILINE)
    told = {check: {name for name, which, _ in limits if which == check} for check in CHECKS}
    if IS_CURRENT:
        assert told["chunked-prefill"] == set(NO_CHUNKED_PREFILL) and told["padded"] >= set(NO_LEFT_PADDING)
    for name, reason in UNSUITABLE_LANGUAGE_MODELS.items():
        assert re.search(rf"^- {re.escape(reason)}: .*`{name}`", TEXT, re.MULTILINE), name


@pytest.mark.sample(2)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3", "jamba", "qwen3_5"])
def test_tiny_models_are_tiny(model_type: str) -> None:
    """Sizes come from field names, of which a new type may have others."""
    config = tiny_config(model_type).get_text_config(decoder=True)
    assert config.vocab_size == 80 and config.hidden_size == 32
    assert sum(p.numel() for p in tiny_vlm(model_type, "cross-attention").lang_model.parameters()) < 3_000_000


def test_readme_totals() -> None:
    """The README repeats the totals."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if IS_CURRENT:
        assert f"{len(model_types())} types of language models and all {len(towers())} OpenCLIP towers" in readme
        assert f"| {len(model_types())} causal types |" in readme
        readme = " ".join(readme.split())
        vision, families = (
            re.search(rf"\| {kind}, of (\d+) \| \*\*(\d+)\*\*", TEXT)
            for kind in ("vision models of Transformers", "families of timm")
        )
        assert vision and f"{vision[2]} types of vision models of Transformers" in readme
        assert f"{vision[2]} types of Transformers, timm |" in readme
        assert families and families[1] == families[2] and f"all {families[1]} families of timm" in readme


@pytest.mark.sample(2)
@pytest.mark.parametrize("model_type", sorted(NO_LEFT_PADDING))
def test_padding_at_the_left_is_refused(model_type: str) -> None:
    model = tiny_vlm(model_type, "cross-attention")
    ids, mask = torch.randint(1, 80, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    for call in (model, model.generate):
        with pytest.raises(LanguageModelLimit, match=f"of type {model_type} cannot read .*--batch-size 1"):
            call(lang_x=ids, attention_mask=mask)
    with torch.no_grad():
        # Padding that comes last does no harm.
        assert model(lang_x=ids, attention_mask=mask.flip(1)).logits.isfinite().all()


@pytest.mark.sample(2)
@pytest.mark.parametrize("model_type", ["jamba", "mamba", "zamba"])
def test_chunked_prefill_is_refused(model_type: str) -> None:
    model = tiny_vlm(model_type, "cross-attention")
    ids = torch.randint(1, 80, (1, 8))
    with torch.no_grad():
        output = model(lang_x=ids[:, :4], use_cache=True)
        cache = next(output[name] for name in ("cache", "past_key_values", "cache_params") if name in output)
        with pytest.raises(LanguageModelLimit, match="several tokens after a cache"):
            model(lang_x=ids[:, 4:], past_key_values=cache)
        assert model(lang_x=ids[:, 4:5], past_key_values=cache, use_cache=True).logits.shape[1] == 1


# -- encoders of Transformers and timm ---------------------------------------------------------------------------------

#: Types and families of each kind; to measure all of them takes a quarter of an hour.
TYPES = ("aimv2_vision_model", "beit", "convnext", "dinov2_with_registers", "hiera", "pvt", "segformer", "swin")
FAMILIES = ("beit", "coat", "convnext", "efficientvim", "mlp_mixer", "pit", "resnet", "swin_transformer", "volo")


_RUN = "run `python -m benchmarks.compatibility`"


def section(title: str) -> list[str]:
    """The lines of the page under a title."""
    lines = TEXT.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    return [line for line in lines if line.startswith(("| hf:", "| timm:", "- "))]


@pytest.mark.matrix
@pytest.mark.parametrize("kind", TYPES)
def test_vision_model_of_transformers(kind: str) -> None:
    row = check_vision_type(kind)
    assert row.shape is not None, row.problem
    if IS_CURRENT:
        assert encoder_row("hf", row) in section("Vision models of Transformers"), (
            "run `python -m benchmarks.compatibility`"
        )


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
def test_family_of_timm(family: str) -> None:
    row = check_family(family)
    assert row.shape is not None, row.problem
    if IS_CURRENT:
        assert encoder_row("timm", row) in section("Families of timm"), _RUN


def test_totals_of_encoders_are_those_of_the_rows() -> None:
    for title, what, kind in (
        ("Vision models of Transformers", "vision models of Transformers", "hf"),
        ("Families of timm", "families of timm", "timm"),
    ):
        lines = section(title)
        works = [line for line in lines if line.startswith("| ")]
        refused = {name for line in lines if line.startswith("- ") for name in re.findall(rf"`{kind}:([\w.-]+)`", line)}
        assert f"| {what}, of {len(works) + len(refused)} | **{len(works)}** | - |" in TEXT
        if kind == "hf":
            told = {f"- {reason}: " for reason in UNSUITABLE_ENCODERS.values()}
            assert refused & UNSUITABLE_ENCODERS.keys()
            assert {line.split("`")[0] for line in lines if line.startswith("- ") and "image" in line} & told
            for name in refused & UNSUITABLE_ENCODERS.keys():
                assert any(f"`hf:{name}`" in x and x.startswith(f"- {UNSUITABLE_ENCODERS[name]}: ") for x in lines)


@pytest.mark.matrix
def test_a_model_whose_features_mix_images_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = encoders.patch_features
    monkeypatch.setattr(encoders, "patch_features", lambda tower, pixels: original(tower, pixels) + len(pixels))
    row = check_vision_type("convnext")
    assert row.shape is None and row.problem == "an image depends on the others"
