"""The loop of greedy and sampled answers: Transformers' own gives the same, and the host looks where it may."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.support import seed_torch, tiny
from tests.support.grid import grid
from tests.support.recorded_graph import waits
from tests.support.tiny import IMAGE, PAD
from vlm_cli.modeling.decoding import loop
from vlm_cli.modeling.decoding.choosing import draw
from vlm_cli.modeling.decoding.rows import GrowingRows
from vlm_cli.modeling.decoding.steps import EagerStep
from vlm_cli.modeling.vlm import VLM

GREEDY: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False}
SAMPLED: dict[str, Any] = {"max_new_tokens": 14, "do_sample": True}
#: Ways to answer, each with what changes the logits there.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "at least": GREEDY | {"min_new_tokens": 9},
    "repetition": GREEDY | {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "suppressed": GREEDY | {"suppress_tokens": [3, 4]},
    "sampled": SAMPLED,
    "cold": SAMPLED | {"temperature": 0.4, "top_k": 20},
    "nucleus": SAMPLED | {"temperature": 1.3, "top_p": 0.8, "top_k": 0},
    "several": SAMPLED | {"num_return_sequences": 2},
}
QUICK = ("llama", "mamba2", "mistral")


@pytest.fixture(scope="module")
def model() -> VLM:
    return tiny.open_gates(tiny.build())


@contextmanager
def theirs() -> Iterator[None]:
    """Transformers' own loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm_cli.modeling.generation.fits", lambda *_, **__: False)
        yield


@contextmanager
def looking(model: VLM, every: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "look_every", every, raising=False)
        yield


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.is_over = False

    def put(self, value: Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.is_over = True


class Ends(StoppingCriteria):
    """Ends a row after a token, which it reads on the host."""

    def __init__(self, token: int, *, may_wait: bool) -> None:
        self.token, self.may_wait = token, may_wait
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.lengths.append(input_ids.shape[1])
        return torch.tensor([row[-1] == self.token for row in input_ids.tolist()])


def answer(model: VLM, inputs: dict[str, Any], **options: Any) -> Any:
    seed_torch(7)
    return model.generate(**inputs, **options)


VIEWS = ("view", "_unsafe_view", "transpose", "t", "select", "unbind", "unsqueeze", "expand", "slice", "split", "alias")


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counted[function.__name__] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counting(model: VLM) -> Iterator[list[Counter[str]]]:
    """The operations of each step of a model."""
    found: list[Counter[str]] = []
    step = EagerStep.__call__

    def counted(self: EagerStep, ids: Tensor) -> Tensor:
        if self.model is not model:
            return step(self, ids)
        with Operations() as operations:
            logits = step(self, ids)
        found.append(operations.counted)
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerStep, "__call__", counted)
        yield found


def often(model: VLM, inputs: dict[str, Any], *, among: Any = None, **options: Any) -> int:
    """A token in the middle of an answer."""
    ids = answer(model, inputs, **GREEDY | options)[:, -GREEDY["max_new_tokens"] :]
    return int(ids[0, 5])


# -- the same answers -----------------------------------------------------------------------------------------------


@pytest.mark.sample(6)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("every", [1, 5])
def test_answers_are_those_of_transformers(model, way, every):
    inputs, options = tiny.batch(model, (2, 0, 1)), dict(WAYS[way])
    options["eos_token_id"] = often(model, inputs)
    options["pad_token_id"] = PAD
    with theirs():
        expected = answer(model, inputs, **options)
        other = answer(model, inputs | {"vision_x": inputs["vision_x"].flip(-1)}, **options)
    with looking(model, every):
        found = answer(model, inputs, **options)
    assert torch.equal(found, expected)
    assert not torch.equal(found, other)


@pytest.mark.sample(3)
@grid(
    language_model=tiny.LANGUAGE_MODELS, fusion=tiny.FUSIONS, quick={"language_model": ("llama", "mamba2", "mistral")}
)
def test_every_language_model_answers_the_same(language_model, fusion):
    model = tiny.open_gates(tiny.build(fusion=fusion, language_model=language_model))
    inputs = tiny.batch(model, (1, 1))
    with theirs():
        expected = answer(model, inputs, **GREEDY)
    with looking(model, 4):
        assert torch.equal(answer(model, inputs, **GREEDY), expected)


@pytest.mark.parametrize("details", [("output_scores",), ("output_logits", "output_scores")])
def test_details_end_with_the_answer(model, details):
    inputs = tiny.batch(model, (1,))
    asked = GREEDY | dict.fromkeys(details, True) | {"return_dict_in_generate": True}
    asked |= {"eos_token_id": often(model, inputs)}
    with theirs():
        expected = answer(model, inputs, **asked)
    with looking(model, 4):
        found = answer(model, inputs, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        theirs_, ours = getattr(expected, name), getattr(found, name)
        assert (theirs_ is None) == (ours is None)
        if ours is not None:
            torch.testing.assert_close(torch.stack(ours), torch.stack(theirs_))
    cached = model.lm_interface.cache_in(found).get_seq_length()
    assert cached == model.lm_interface.cache_in(expected).get_seq_length() == found.sequences.shape[1] - 1


def test_attentions_are_transformers_own(model):
    asked = GREEDY | {"return_dict_in_generate": True, "output_hidden_states": True}
    assert len(answer(model, tiny.batch(model, (1,)), **asked).hidden_states) == GREEDY["max_new_tokens"]


# -- what decoded tokens read -----------------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("fusion", tiny.FUSIONS)
@pytest.mark.parametrize(("counts", "is_open"), [((2, 2), True), ((2, 1), True), ((2, 0), False)])
def test_masks_that_hide_nothing_are_left_out(fusion, counts, is_open):
    model = tiny.open_gates(tiny.build(fusion=fusion))
    inputs = tiny.batch(model, counts)
    asked = GREEDY | {"output_scores": True, "return_dict_in_generate": True}
    with theirs():
        expected = torch.stack(answer(model, inputs, **asked).scores)[..., :IMAGE]
        other = torch.stack(answer(model, inputs | {"vision_x": inputs["vision_x"].neg()}, **asked).scores)[..., :IMAGE]
    with counting(model) as steps:
        found = torch.stack(answer(model, inputs, **asked).scores)[..., :IMAGE]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other, expected, atol=1e-3)
    assert (steps[-1]["any.dim"] == 0) == (is_open or fusion == "language-stream")


def test_operations_of_a_block(model):
    """Those of one token and one cross-attention block, views left out; each is a launch on a GPU."""
    inputs = tiny.batch(model, (1,))
    closed = tiny.build(fusion="language-stream")
    with counting(model) as blocks, counting(closed) as bare:
        answer(model, inputs, **GREEDY)
        answer(closed, inputs, **GREEDY)
    both = len(model.fusion.blocks)
    each = Counter({name: n / both for name, n in (blocks[-1] - bare[-1]).items() if name.split(".")[0] not in VIEWS})
    attention = next(name for name in each if name.startswith("_scaled_dot_product"))
    expected = {"native_layer_norm.default": 2, "mm.default": 4, attention: 1, "gelu.default": 1}
    assert dict(each) == expected | {"tanh.default": 2, "addcmul.default": 2}


# -- looks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pads", [True, False])
def test_an_end_that_the_host_finds_late(model, pads):
    inputs = tiny.batch(model, (2, 1))
    token = often(model, inputs)
    options = GREEDY | ({"eos_token_id": 1, "pad_token_id": PAD} if pads else {"eos_token_id": None})
    with theirs():
        at_once, heard = Ends(token, may_wait=False), Heard()
        expected = answer(model, inputs, **options, stopping_criteria=StoppingCriteriaList([at_once]), streamer=heard)
        without = answer(model, inputs, **options)
    late, heard_late = Ends(token, may_wait=True), Heard()
    with looking(model, 4):
        found = answer(model, inputs, **options, stopping_criteria=StoppingCriteriaList([late]), streamer=heard_late)
    assert torch.equal(found, expected)
    assert not torch.equal(found, without[:, : found.shape[1]]) or not pads
    assert late.lengths == at_once.lengths
    assert heard.is_over and heard_late.is_over
    assert [x.tolist() for x in heard_late.values] == [x.tolist() for x in heard.values]


@pytest.mark.parametrize(("may_wait", "looks"), [(True, 4), (False, 14)])
def test_the_host_looks_every_few_tokens(model, may_wait, looks, monkeypatch):
    counted: list[int] = []
    look = GrowingRows.look
    monkeypatch.setattr(GrowingRows, "look", lambda rows: counted.append(rows.length) or look(rows))
    with looking(model, 4):
        options = {"stopping_criteria": StoppingCriteriaList([Ends(-1, may_wait=may_wait)])}
        answer(model, tiny.batch(model, (1,)), **GREEDY, **options)
    assert len(counted) == looks


def test_nothing_but_a_look_waits(model, monkeypatch):
    """Between two looks, no operation needs a number on the host; Transformers looks whether rows are padded."""
    seen: list[str] = []

    class Watched(GrowingRows):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.watch = Watch(seen)
            self.watch.__enter__()

        def look(self) -> bool:
            self.watch.__exit__(None, None, None)
            is_over = super().look()
            if not is_over:
                self.watch.__enter__()
            return is_over

    class Looking(LogitsProcessor):
        may_wait = True

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            assert float(scores[0, 0]) < 1e9
            return scores

    monkeypatch.setattr(loop, "GrowingRows", Watched)
    options = SAMPLED | {"top_k": 20, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.2, "eos_token_id": 1}
    with looking(model, 5):
        answer(model, tiny.batch(model, (2,)), **options)
        assert seen == []
        answer(model, tiny.batch(model, (2, 1)), **options)
        assert set(seen) <= {"masking_utils.py"} and len(seen) <= 13
        seen.clear()
        answer(model, tiny.batch(model, (1,)), **options, logits_processor=LogitsProcessorList([Looking()]))
        assert set(seen) == {"test_decoding.py"}


class Watch(TorchDispatchMode):
    """Notes the files whose lines look at numbers."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if waits(function, args):
            frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            self.seen.append(Path(frames[-2].filename).name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(3, 50), (1, 8)])
def test_tokens_are_drawn_as_multinomial_draws_them(shape):
    seed_torch(0)
    chances = torch.rand(shape).pow(4)
    chances[:, 1] = 0
    drawn = []
    for function in (draw, lambda x: torch.multinomial(x, 1)[:, 0]):
        torch.manual_seed(3)
        drawn.append(torch.stack([function(chances / chances.sum(-1, keepdim=True)) for _ in range(200)]))
    assert torch.equal(*drawn)
    assert not (drawn[0] == 1).any() and len(drawn[0].unique()) > 2


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(model, number):
    class Breaks(LogitsProcessor):
        may_wait = True

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[-1, 5] = number
            return scores

    inputs = tiny.batch(model, (1, 1))
    with looking(model, 4), pytest.raises(RuntimeError, match="NaN or infinite"):
        answer(model, inputs, **SAMPLED, logits_processor=LogitsProcessorList([Breaks()]))
    assert answer(model, inputs, **SAMPLED).shape[0] == 2
