"""The checks of `vlm doctor`: each holds on sound models, and fails when what it proves is broken."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.generation import LogitsProcessor, LogitsProcessorList

from benchmarks.compatibility.language_models import tiny_vlm
from tests.support import tiny
from tests.support.grid import first_of, grid
from vlm_cli import load
from vlm_cli.doctor import CHECKS, QUICK, Finding, check_invariants
from vlm_cli.modeling import announcement, generation
from vlm_cli.modeling import vlm as vlm_module
from vlm_cli.modeling.conditioning import Conditioning
from vlm_cli.modeling.fusion import language_stream
from vlm_cli.modeling.fusion.cross_attention import GatedCrossAttentionBlock, VLMWithCrossAttention
from vlm_cli.modeling.language_model import NO_LEFT_PADDING
from vlm_cli.modeling.vlm import VLM
from vlm_cli.models import DEMO

CROSS, STREAM = "cross-attention", "language-stream"
Patch = pytest.MonkeyPatch

both_fusions = pytest.mark.parametrize("fusion", [CROSS, STREAM])


def find(model: VLM, name: str) -> Finding:
    return next(iter(check_invariants(model, [name])))


@grid(
    fusion=[CROSS, STREAM], language_model=["llama", "llama-tied", "gpt2"], quick={"language_model": ["llama", "gpt2"]}
)
def test_every_check_holds(fusion, language_model):
    model = tiny.build(fusion=fusion, language_model=language_model)
    findings = list(check_invariants(model))
    assert [f.name for f in findings] == list(CHECKS)
    assert {f.name: (f.verdict, f.note) for f in findings if f.verdict != "holds"} == {}


def test_every_check_holds_without_an_added_word():
    """Then no row of the added embeddings is read: media stand in the place of `<image>`."""
    model = tiny.build(fusion=STREAM, added_tokens=["<image>"])
    assert {f.verdict for f in check_invariants(model)} == {"holds"}


@pytest.mark.sample(1)
@pytest.mark.parametrize(("mask", "skipped"), [("image", {"bare", "chunked-prefill"}), ("prefix", {"chunked-prefill"})])
def test_the_checks_know_the_masks(mask, skipped, monkeypatch):
    model = tiny.build(tokenizer="linear", fusion={"type": STREAM, "mask": mask})
    names = ("text-only", "bare", "media", "cached", "padded", "chunked-prefill")
    findings = {f.name: f for f in check_invariants(model, names)}
    assert {name for name, f in findings.items() if f.verdict == "skipped"} == skipped
    assert {f.verdict for name, f in findings.items() if name not in skipped} == {"holds"}
    assert f"fusion.mask={mask}" in findings["chunked-prefill"].note
    monkeypatch.setattr(model, "mask_call", lambda conditioning, kwargs: kwargs)
    assert find(model, "media").verdict == "fails"


TILED: dict[str, dict[str, Any]] = {
    "grid": {"type": "grid", "max_tiles": 2, "picture_text": "<{views}>", "tile_text": "{number}{image}"},
    "anyres": {"type": "anyres", "pinpoints": [[32, 64], [64, 32]]},
}


@grid(
    fusion=[CROSS, STREAM],
    tiling=list(TILED),
    quick={"fusion": [STREAM], "tiling": ["grid"]},
)
def test_every_check_holds_for_pictures_of_tiles(fusion, tiling, monkeypatch):
    model = tiny.build(tokenizer="linear", fusion=fusion, tiling=TILED[tiling])
    findings = {f.name: (f.verdict, f.note) for f in check_invariants(model)}
    assert {name: x for name, x in findings.items() if x[0] != "holds"} == {}
    if model.announcement is not None and fusion == STREAM:
        wrap(monkeypatch, announcement, "insert_media_ids", lambda x: replace(x, ids=x.ids.roll(1, 1)))
        assert find(model, "bare").verdict == "fails"


@pytest.fixture(scope="module")
def demo() -> VLM:
    return load(str(DEMO))[0]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CHECKS)
def test_every_check_holds_on_the_demo(demo, name):
    assert find(demo, name).verdict == "holds"


def test_the_quick_checks_are_some_of_all():
    assert set(QUICK) < set(CHECKS)


def test_seeds_draw_other_prompts():
    model = tiny.build()
    first, again, other = (next(iter(check_invariants(model, ["media"], seed=seed))).twin for seed in (0, 0, 1))
    assert first == again != other


# -- each check fails when what it proves is broken --------------------------------------------------------------------


@dataclass(frozen=True)
class Break:
    """A way to break a model, and the check that must notice."""

    check: str
    fusion: str
    function: Callable[[VLM, Patch], None]
    language_model: str
    error: str

    def __str__(self) -> str:
        return f"{self.check}-{self.function.__name__}-{self.fusion}"


BREAKS: list[Break] = []


def breaks(check: str, *fusions: str, language_model: str = "llama", error: str = "") -> Any:
    """Register a break; `error` is in the note of what raises, and most breaks do not."""

    def register(function: Callable[[VLM, Patch], None]) -> Callable[[VLM, Patch], None]:
        BREAKS.extend(Break(check, fusion, function, language_model, error) for fusion in fusions or (CROSS, STREAM))
        return function

    return register


def wrap(patch: Patch, owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Pass what a method returns through `change`."""
    method = getattr(owner, name)

    @functools.wraps(method)  # Transformers reads signatures
    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(method(*args, **kwargs))

    patch.setattr(owner, name, changed)


@breaks("features")
def mixes_the_frames_of_a_batch(model, patch):
    wrap(patch, model.vision_encoder, "forward", lambda x: x + 0.01 * x.flatten(0, 2).mean(0))


@breaks("features", error="was declared")
def declares_another_width(model, patch):
    model.config.vision_config = model.config.vision_config | {"dim": model.config.vision_config["dim"] + 1}


@breaks("features", error="was declared")
def declares_another_number_of_patches(model, patch):
    model.config.vision_config = model.config.vision_config | {"num_patches": 3}


@breaks("features")
def sees_nothing(model, patch):
    wrap(patch, model.vision_encoder, "forward", torch.zeros_like)


@breaks("text-only")
def nudges_logits_where_it_adds_columns(model, patch):
    wrap(patch, model.added_tokens, "append_logits", lambda logits: logits + 1e-3)


@breaks("text-only")
def nudges_embeddings_of_the_text(model, patch):
    wrap(patch, model.added_tokens, "embed", lambda embeddings: embeddings * (1 + 1e-5))


@breaks("text-only")
def is_deaf_to_text(model, patch):
    model.lang_model.get_input_embeddings().weight.data.fill_(1)


@breaks("bare", CROSS)
def adds_something_behind_closed_gates(model, patch):
    wrap(patch, GatedCrossAttentionBlock, "_forward", lambda x: x + 0.01)


@breaks("bare", STREAM)
def places_media_one_position_late(model, patch):
    scatter_media = language_stream.scatter_media
    patch.setattr(
        language_stream,
        "scatter_media",
        lambda x, media, there, at: scatter_media(x, media, there.roll(1, 1), at.roll(1, 1)),
    )


@breaks("bare", STREAM)
def counts_vision_tokens_one_too_late(model, patch):
    wrap(patch, vlm_module, "count_media", lambda counts: counts - 1)


@breaks("bare")
def forgets_the_embeddings_of_added_tokens(model, patch):
    patch.setattr(model.added_tokens, "embed", lambda ids, embeddings: embeddings)


@breaks("media")
def shows_images_before_their_placeholders(model, patch):
    wrap(patch, vlm_module, "count_media", lambda counts: counts + 1)


@breaks("media", CROSS)
def shows_images_one_position_early(model, patch):
    patch.setattr(vlm_module, "count_media", lambda ids, media_token_id: (ids == tiny.IMAGE).roll(-1, 1).cumsum(-1))


@breaks("media", CROSS)
def shows_images_one_position_late(model, patch):
    patch.setattr(vlm_module, "count_media", lambda ids, media_token_id: (ids == tiny.IMAGE).roll(1, 1).cumsum(-1))


def change_later_steps(model: VLM, patch: Patch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what the language model is given after the first step of generation."""
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def changed(*args: Any, is_first_iteration: bool = False, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(*args, is_first_iteration=is_first_iteration, **kwargs)
        return inputs if is_first_iteration else change(inputs)

    patch.setattr(model, "prepare_inputs_for_generation", changed)


@breaks("cached", CROSS)
def forgets_media_after_the_first_step(model, patch):
    change_later_steps(model, patch, lambda inputs: inputs | {"media": None, "media_mask": None})


@breaks("cached", CROSS)
def counts_no_media_after_the_first_step(model, patch):
    def without(inputs):
        media = inputs["media"]
        masks = {} if media is None else {"media_mask": torch.ones(len(media), 1, media.shape[-2], dtype=torch.bool)}
        return inputs | masks | {"media_counts": 0 * inputs["media_counts"]}

    change_later_steps(model, patch, without)


@breaks("cached")
def shifts_positions_after_the_first_step(model, patch):
    change_later_steps(model, patch, lambda inputs: inputs | {"position_ids": inputs["position_ids"] + 1})


class BanBest(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, scores.argmax(1, keepdim=True), -torch.inf)


@breaks("greedy")
def bans_the_best_token(model, patch):
    bans = functools.partial(model.generate, logits_processor=LogitsProcessorList([BanBest()]))
    patch.setattr(model, "generate", bans)


def prefers_images(model: VLM, patch: Patch) -> None:
    wanted = nn.functional.one_hot(torch.tensor(tiny.IMAGE), tiny.VOCABULARY + 2)
    wrap(patch, model.added_tokens, "append_logits", lambda logits: logits + 100 * wanted)


@breaks("greedy", error="has 6 media tokens, but vision_x has 2")
def writes_image_placeholders(model, patch):
    prefers_images(model, patch)
    patch.setattr(generation.ForbidToken, "__call__", lambda self, ids, scores: scores)


@both_fusions
def test_an_image_placeholder_is_never_the_best_token(fusion, monkeypatch):
    """The twin of the one above."""
    model = tiny.build(fusion=fusion)
    prefers_images(model, monkeypatch)
    assert find(model, "greedy").verdict == "holds"


def change_call(model: VLM, patch: Patch, **changes: Any) -> None:
    """Change what the language model is called with."""
    call = model._run_language_model
    patch.setattr(model, "_run_language_model", lambda conditioning, kwargs: call(conditioning, kwargs | changes))


@breaks("padded")
def drops_the_attention_mask(model, patch):
    change_call(model, patch, attention_mask=None)


@breaks("padded", STREAM)
def forgets_the_attention_mask_where_it_spreads(model, patch):
    wrap(
        patch,
        language_stream,
        "expand_media_tokens",
        lambda x: replace(x, attention_mask=torch.ones_like(x.attention_mask)),
    )


@breaks("padded", language_model="gpt2")
def counts_positions_over_padding(model, patch):
    change_call(model, patch, position_ids=None)


@breaks("padded", error="has 1 media tokens, but vision_x has 2")
def drops_the_mask_of_media(model, patch):
    encode = model.encode_vision
    patch.setattr(model, "encode_vision", lambda vision_x, vision_mask=None, vision_grid=None: encode(vision_x))


@breaks("padded")
def reads_the_media_of_another_row(model, patch):
    wrap(patch, model, "project_media", lambda media: media + 0.01 * media.mean(0))


@breaks("chunked-prefill")
def counts_media_anew_in_each_chunk(model, patch):
    for_call = Conditioning.for_call

    def anew(self: Conditioning, ids: Tensor, media_token_id: int, end: int | None = None) -> Conditioning:
        return replace(for_call(self, ids, media_token_id, end), media_counts=(ids == media_token_id).cumsum(-1))

    patch.setattr(Conditioning, "for_call", anew)


@breaks("chunked-prefill")
def forgets_its_cache(model, patch):
    change_call(model, patch, **{model.lm_interface.cache_name: None})


@breaks("gradients")
def detaches_the_vision_tokenizer(model, patch):
    wrap(patch, model.vision_tokenizer, "forward", Tensor.detach)


@breaks("gradients")
def gives_the_vision_tokenizer_no_weight(model, patch):
    wrap(patch, model.vision_tokenizer, "forward", lambda x: 0 * x)


@breaks("gradients")
def freezes_what_is_declared(model, patch):
    model.added_tokens.requires_grad_(False)


@breaks("gradients")
def trains_what_is_not_declared(model, patch):
    model.lang_model.get_output_embeddings().weight.requires_grad_(True)


@breaks("gradients")
def does_not_use_a_parameter(model, patch):
    model.vision_tokenizer.register_parameter("idle", nn.Parameter(torch.zeros(1)))


def change_saved(model: VLM, patch: Patch, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors that are written."""
    save = model.save_pretrained
    patch.setattr(model, "save_pretrained", lambda folder: save(folder, state_dict=change(model.state_dict())))


@breaks("saved")
def loses_bits_when_it_is_written(model, patch):
    change_saved(model, patch, lambda tensors: {name: x.bfloat16().to(x) for name, x in tensors.items()})


@breaks("saved")
def leaves_a_part_unwritten(model, patch):
    change_saved(
        model, patch, lambda tensors: {name: x for name, x in tensors.items() if not name.startswith("added_tokens")}
    )


@breaks("saved")
def computes_with_what_is_not_written(model, patch):
    wrap(patch, model.vision_encoder, "forward", lambda x: x.roll(1, -1))


@breaks("saved", CROSS)
def renames_tensors_of_the_language_model(model, patch):
    build = VLMWithCrossAttention.build_fusion

    def wraps_the_norm(self: VLM, *args: Any) -> None:
        build(self, *args)
        self.lang_model.model.norm = nn.Sequential(self.lang_model.model.norm)

    patch.setattr(VLMWithCrossAttention, "build_fusion", wraps_the_norm)
    model.lang_model.model.norm = nn.Sequential(model.lang_model.model.norm)


@breaks("tied", language_model="llama-tied")
def copies_the_head(model, patch):
    head = model.lang_model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


@breaks("tied", language_model="llama-tied")
def loads_two_tensors_that_the_configuration_ties(model, patch):
    """Then Transformers does not tie them, and forgets that it was to."""
    copies_the_head(model, patch)
    model.all_tied_weights_keys = {}


@breaks("tied")
def writes_a_tensor_twice(model, patch):
    change_saved(model, patch, lambda tensors: tensors | {"twice": tensors["lang_model.lm_head.weight"].clone()})


def in_turns() -> list[Any]:
    """The fast tests break each check in each of its ways with one fusion: the two take turns."""
    ways = list(dict.fromkeys(b.function for b in BREAKS))
    quick = {way: [b for b in BREAKS if b.function is way] for way in ways}
    chosen = [found[i % len(found)] for i, found in enumerate(quick.values())]
    return [pytest.param(b, id=str(b), marks=() if b in chosen else pytest.mark.matrix) for b in BREAKS]


@pytest.mark.sample(2)
@pytest.mark.parametrize("broken", in_turns())
def test_a_check_notices_what_it_is_for(broken, monkeypatch):
    model = tiny.build(fusion=broken.fusion, language_model=broken.language_model)
    broken.function(model, monkeypatch)
    finding = find(model, broken.check)
    assert finding.verdict == "fails", finding
    assert broken.error in finding.note and ("Error" in finding.note) == bool(broken.error)
    json.dumps(finding.to_dict(), allow_nan=False)


def test_every_check_is_broken_with_both_fusions():
    assert {(b.check, b.fusion) for b in BREAKS} == {(name, fusion) for name in CHECKS for fusion in (CROSS, STREAM)}


@pytest.mark.sample(2)
@both_fusions
@pytest.mark.parametrize("name", ["media", "cached", "padded", "chunked-prefill"])
def test_a_check_that_sees_no_media_fails(fusion, name, monkeypatch):
    model = tiny.build(fusion=fusion)
    wrap(monkeypatch, model.vision_tokenizer, "forward", torch.zeros_like)
    finding = find(model, name)
    assert finding.verdict == "fails" and "saw nothing" in finding.note and finding.twin < finding.allowed


# -- what a limit is ---------------------------------------------------------------------------------------------------


@both_fusions
def test_a_limit_of_the_language_model_has_a_reason(fusion):
    finding = find(tiny.build(fusion=fusion, language_model="mamba"), "chunked-prefill")
    assert finding.verdict == "limit" and finding.note.startswith("the bare language model")


@both_fusions
def test_a_padding_that_was_added_is_no_error_of_the_bare_language_model(fusion):
    model = tiny_vlm("rwkv", fusion)
    model.config.pad_token_id = model.config.first_added_id
    finding = find(model, "padded")
    assert finding.verdict == "limit" and "it takes no mask" in finding.note and "IndexError" not in finding.note


@both_fusions
def test_refusing_what_the_language_model_can_do_is_no_limit(fusion, monkeypatch):
    monkeypatch.setitem(NO_LEFT_PADDING, "llama", "it is said to")
    finding = find(tiny.build(fusion=fusion), "padded")
    assert finding.verdict == "fails" and "it is said to" in finding.note


#: zamba2 decodes with other arithmetic than it reads with, so that a small difference is a limit of its own.
@pytest.mark.parametrize("broken", [forgets_media_after_the_first_step, counts_no_media_after_the_first_step])
def test_a_limited_language_model_hides_no_difference_of_ours(broken, monkeypatch):
    model = tiny.build(fusion=CROSS, language_model="zamba2")
    broken(model, monkeypatch)
    finding = find(model, "cached")
    assert finding.verdict == "fails" and finding.difference > 100 * finding.allowed


@both_fusions
def test_a_limited_language_model_hides_no_error_of_ours(fusion, monkeypatch):
    for language_model, name in (("zamba2", "cached"), ("mamba", "chunked-prefill")):
        model = tiny.build(fusion=fusion, language_model=language_model)
        monkeypatch.setattr(model, "project_media", lambda *args: int("of ours"))
        finding = find(model, name)
        assert finding.verdict == "fails" and finding.note, finding


# -- what a finding says -----------------------------------------------------------------------------------------------


def test_what_cannot_be_computed_is_null(monkeypatch):
    model = tiny.build()
    monkeypatch.setattr(model.vision_tokenizer, "forward", lambda *args: 1 / 0)
    findings = [f.to_dict() for f in check_invariants(model)]
    assert json.loads(json.dumps(findings, allow_nan=False)) == findings
    told = {f["name"]: (f["difference"], f["note"]) for f in findings if f["verdict"] == "fails"}
    assert set(told) == set(CHECKS) - {"features", "text-only", "tied"}
    assert set(told.values()) == {(None, "ZeroDivisionError: division by zero")}


@pytest.mark.matrix
@pytest.mark.parametrize("fusion", first_of([CROSS, STREAM]))
def test_numbers_that_are_none_fail(fusion, monkeypatch):
    model = tiny.build(fusion=fusion)
    wrap(monkeypatch, model.vision_tokenizer, "forward", lambda x: x * torch.nan)
    for name in ("bare", "media", "cached", "padded", "chunked-prefill"):
        finding = find(model, name)
        # Closed gates do not stop what is not a number.
        assert finding.verdict == "fails" and finding.to_dict()["difference"] is None, finding


@pytest.mark.matrix
@pytest.mark.parametrize("fusion", first_of([CROSS, STREAM]))
def test_weights_that_give_no_numbers_are_no_limit(fusion):
    model = tiny.build(fusion=fusion)
    name, broken = next((name, p) for name, p in model.named_parameters() if name.endswith("up_proj.weight"))
    broken.data[0, 0] = torch.nan
    found = {f.name: f for f in check_invariants(model)}
    assert {f.verdict for f in found.values()} == {"holds", "fails"}
    assert "NaN" in found["text-only"].note and found["saved"].note == f"{name} holds NaN"


def test_progress_tells_what_is_proved():
    told: list[str] = []
    findings = list(check_invariants(tiny.build(fusion=STREAM), ["bare", "media"], progress=told.append))
    assert (
        told == [f.proves for f in findings] and told[1] == CHECKS["media"].proves and told[0] != CHECKS["bare"].proves
    )


# -- the model is afterwards as it was ---------------------------------------------------------------------------------


def state(model: VLM) -> dict[str, Any]:
    """All that a check might leave behind."""
    return {
        "tensors": {name: x.clone() for name, x in model.state_dict().items()},
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules()},
        "hooks": {
            name: (list(m._forward_hooks.values()), list(m._forward_pre_hooks.values()))
            for name, m in model.named_modules()
        },
        "generation": [copy.deepcopy(m.generation_config.to_dict()) for m in (model, model.lang_model)],
        "conditioning": model.conditioning,
    }


def assert_as_it_was(model: VLM, before: dict[str, Any]) -> None:
    after = state(model)
    for kind in ("tensors", "gradients"):
        old, new = before.pop(kind), after.pop(kind)
        assert old.keys() == new.keys()
        for name, x in old.items():
            assert (x is None and new[name] is None) or torch.equal(x, new[name]), name
    assert after == before


@pytest.fixture(params=[CROSS, STREAM])
def used(request: pytest.FixtureRequest) -> VLM:
    """A model in the middle of training, with its own way to write, and a gate or two that have hardly moved."""
    model = tiny.build(fusion=request.param)
    model.generation_config.update(do_sample=True, top_k=3, eos_token_id=7)
    model.train()
    model.lang_model.model.layers[0].eval()
    batch = tiny.batch(model)
    model(**batch, labels=batch["lang_x"]).loss.backward()
    for name, parameter in model.fusion.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(0.01)
    return model


def test_the_model_is_afterwards_as_it_was(used):
    before = state(used)
    assert {f.verdict for f in check_invariants(used)} == {"holds"}
    assert_as_it_was(used, before)


@pytest.mark.sample(2)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_also_when_a_check_raises(used, error, monkeypatch):
    before = state(used)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(used.lang_model.model.norm, "forward", fail)
        for name in set(CHECKS) - {"features", "tied"}:
            if error is KeyboardInterrupt:
                with pytest.raises(KeyboardInterrupt):
                    find(used, name)
            else:
                assert "in the middle" in find(used, name).note
    assert_as_it_was(used, before)


def test_also_when_no_more_findings_are_asked_for(used):
    before = state(used)
    findings = check_invariants(used)
    next(findings)
    findings.close()
    assert_as_it_was(used, before)


def test_closed_gates_are_opened_and_closed_again(monkeypatch):
    model = tiny.build()
    gates = {name: p for name, p in model.fusion.named_parameters() if name.endswith("_gate")}
    assert gates and not any(gate.any() for gate in gates.values())
    seen: list[float] = []
    wrap(monkeypatch, model, "encode_vision", lambda x: seen.extend(float(g.detach()) for g in gates.values()) or x)
    assert find(model, "media").verdict == "holds"
    assert set(seen) == {0.5}
    assert not any(gate.any() for gate in gates.values())


def test_gates_of_a_trained_model_stay_as_they_are(monkeypatch):
    model = tiny.open_gates(tiny.build())
    seen: list[float] = []
    wrap(
        monkeypatch,
        model,
        "encode_vision",
        lambda x: seen.append(float(model.fusion.blocks["0"].attn_gate.detach())) or x,
    )
    assert find(model, "media").verdict == "holds" and seen == pytest.approx([0.7] * len(seen)) and seen
