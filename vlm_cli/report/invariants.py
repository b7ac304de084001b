"""What must hold for every composition, measured on a model: its own weights, dtype and device.

Each check compares two ways to the same logits, and has a twin: the same comparison with something changed, which must
show a difference, so that no check passes because it cannot fail. Where a comparison does not hold, it is repeated on
text alone, where the model is its bare language model; if that differs as much, the language model is the reason.

B rows, T tokens, V columns of the logits.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from vlm_cli.errors import LanguageModelLimit, first_line
from vlm_cli.modeling.language_model import forward_arguments
from vlm_cli.modeling.vlm import VLM

__all__ = ["CHECKS", "Finding", "check_invariants"]

Verdict = Literal["holds", "fails", "limit", "skipped"]

#: Name -> what it proves.
CHECKS = {
    "features": "Each frame is encoded alone, into the v patches of d channels that were declared",
    "text-only": "A prompt without media gives the bare language model's logits, bit for bit",
    "bare": "With its gates closed, the model is the bare language model fed the same embeddings",
    "media": "Another image changes the logits at and after its placeholder, and none before",
    "cached": "Decoding with a cache gives the logits of the full pass",
    "greedy": "Greedy decoding takes the token that the full pass puts first",
    "padded": "A row of a left-padded batch, read and decoded, gives the logits of that row alone",
    "pieces": "A prompt that is read in pieces gives the logits of the prompt read at once",
    "gradients": "Gradients reach the declared parameters, and no others",
    "saved": "A saved and loaded model has the same tensors, and the same logits",
    "tied": "Tied weights are one tensor: counted once, saved once",
}
QUICK = ("features", "text-only", "bare", "media", "cached")
_STEPS = 4  # tokens that a check decodes
_SPLICED = "Vision tokens among the text are the bare language model fed the same embeddings"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of `CHECKS`.
        proves: what a model that passes is known to do.
        verdict: "holds"; "fails"; "limit" where the bare language model fails the same way; "skipped".
        difference: largest absolute difference of what should be equal; infinite if it could not be computed.
        allowed: the largest that rounding explains.
        twin: the difference after a change that must be seen.
        note: reason of a verdict other than "holds".
        seconds: what it took.
    """

    name: str
    proves: str
    verdict: Verdict
    difference: float | None = None
    allowed: float | None = None
    twin: float | None = None
    note: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a difference that is no number is null."""
        data = asdict(self)
        return {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in data.items()}


@dataclass(frozen=True)
class Measured:
    """Two ways to the same logits: how far they are apart, and how far after a change.

    Attributes:
        difference: largest absolute difference.
        scale: largest absolute logit.
        twin: None where nothing is changed.
    """

    difference: float
    scale: float
    twin: float | None = None


@dataclass
class Row:
    """One prompt: int[1, T] tokens, and float[1, T_img, 1, C, H, W] media or None."""

    lang_x: Tensor
    vision_x: Tensor | None

    def inputs(self) -> dict[str, Tensor | None]:
        return {"lang_x": self.lang_x, "vision_x": self.vision_x}


def check_invariants(
    model: VLM, names: Sequence[str] = tuple(CHECKS), *, seed: int = 0, progress: Callable[[str], None] = lambda _: None
) -> Iterator[Finding]:
    """Run checks on a model, which is afterwards as it was.

    Gates that are closed, as in every new model, are opened for the checks that need to see media.

    Args:
        model: any `VLM`.
        names: of `CHECKS`.
        seed: of prompts and images.
        progress: is told what a check proves before it runs.
    """
    with ExitStack() as cleanup:
        cleanup.enter_context(_evaluation(model))
        trial = _Trial(model, seed, cleanup)
        for name in names:
            proves = _SPLICED if name == "bare" and trial.is_stream else CHECKS[name]
            progress(proves)
            started = time.monotonic()
            with _quiet(), trial.open_gates():
                finding = trial.check(name)
            yield Finding(name, proves, **finding, seconds=round(time.monotonic() - started, 3))


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module has its own mode again."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Models that read a short random prompt warn of what no user will see."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite for numbers that are none."""
    apart = torch.where(a == b, torch.zeros_like(a), a - b).abs().float()
    return float(apart.nan_to_num(nan=math.inf).max()) if apart.numel() else 0.0


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are the same; one that is none (NaN) is like another."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _scale(logits: Tensor) -> float:
    finite = logits[logits.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


@dataclass
class _Trial:
    """The checks, and the prompts that they share."""

    model: VLM
    seed: int
    cleanup: ExitStack
    is_bare: bool = False  # whether prompts are text and go to the bare language model
    gates: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.gates = self.model.gates()

    @property
    def is_stream(self) -> bool:
        return self.model.splices_media

    @property
    def pad_token_id(self) -> int:
        """Any known token pads where a mask hides it; the bare language model does not know those that were added."""
        padding, first = self.model.config.pad_token_id or 0, self.model.config.first_added_id
        return 0 if self.is_bare and padding >= first else padding

    @contextmanager
    def gates_at(self, value: float, *, only_closed: bool = False) -> Iterator[None]:
        """Gates at another value, for as long as the block runs."""
        before = {name: gate.detach().clone() for name, gate in self.gates.items()}
        for name, gate in self.gates.items():
            gate.data = torch.where(before[name].abs() < 0.05, value, before[name]) if only_closed else gate * 0 + value
        try:
            yield
        finally:
            for name, gate in self.gates.items():
                gate.data = before[name]

    def open_gates(self) -> Any:
        return self.gates_at(0.5, only_closed=True)

    # -- prompts --------------------------------------------------------------------------------------------------

    def row(self, num_media: int, length: int = 9, seed: int = 0) -> Row:
        """A random prompt, `<image>` at every other token from the second on; of text for the bare language model."""
        config, draw = self.model.config, torch.Generator().manual_seed(1000 * self.seed + 10 * seed + num_media)
        text = self.model.lang_model.config.get_text_config(decoder=True)
        # Tokens that stand for padding, or for media of the language model's own.
        special: set[int] = set()
        for k, x in (*vars(text).items(), *vars(config.text_config).items(), *vars(config).items()):
            if k.endswith("_token_id"):
                special.update(x if isinstance(x, (list, tuple)) else [x])
        known = torch.tensor([i for i in range(1, min(config.first_added_id, 50_000)) if i not in special])
        lang_x = known[torch.randint(len(known), (1, length), generator=draw)]
        if self.is_bare:
            return self.placed(lang_x, None)
        lang_x[0, 1 : 2 * num_media : 2] = config.media_token_id
        ours = range(config.first_added_id, config.first_added_id + len(config.added_tokens))
        if words := [i for i in ours if i not in (config.media_token_id, config.pad_token_id)]:
            lang_x[0, -2] = words[0]
        height, width = self.model.vision_encoder.image_size
        vision_x = torch.randn(1, num_media, 1, 3, height, width, generator=draw) if num_media else None
        return self.placed(lang_x, vision_x)

    def placed(self, lang_x: Tensor, vision_x: Tensor | None) -> Row:
        device, dtype = self.model.device, next(self.model.vision_encoder.parameters()).dtype
        return Row(lang_x.to(device), None if vision_x is None else vision_x.to(device, dtype))

    def other_media(self, row: Row, k: int | None = None) -> Row:
        """The same tokens with other images; with only the k-th changed, if it is given."""
        if row.vision_x is None:
            return row
        vision_x = row.vision_x.clone()
        at = slice(None) if k is None else slice(k, k + 1)
        vision_x[:, at] = 1 - vision_x[:, at].flip(-1)
        return Row(row.lang_x, vision_x)

    @torch.no_grad()
    def logits(self, row: Row) -> Tensor:
        """float[T, V]."""
        return self._call(**row.inputs()).logits[0]

    @torch.no_grad()
    def _call(self, lang_x: Tensor, attention_mask: Tensor | None = None, **keywords: Any) -> Any:
        """The model, or the bare language model."""
        if not self.is_bare:
            return self.model(lang_x=lang_x, attention_mask=attention_mask, **keywords)
        lm = self.model.lang_model
        if attention_mask is not None:
            keywords.setdefault("position_ids", (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -lang_x.shape[1] :])
        keywords |= {"attention_mask": attention_mask, self.model._cache_argument: keywords.get("past_key_values")}
        known = forward_arguments(lm)
        with _without_hooks(lm):
            return lm(input_ids=lang_x, **{k: x for k, x in keywords.items() if k in known and x is not None})

    # -- verdicts -------------------------------------------------------------------------------------------------

    def allowed(self, scale: float) -> float:
        """What rounding explains: sums in another order, layer after layer."""
        finfo = torch.finfo(self.model.dtype)
        return (256 if finfo.bits == 32 else 8) * finfo.eps * max(scale, 1.0)

    def judge(self, measure: Callable[[], Measured], *, exact: bool = False, has_bare: bool = True) -> dict[str, Any]:
        """The verdict on a comparison.

        Args:
            measure: the comparison.
            exact: whether no difference is allowed.
            has_bare: whether the comparison makes sense for the bare language model.
        """
        measured, note = self._attempt(measure)
        refused = note.startswith(LanguageModelLimit.__name__)  # by `VLM`, with the reason
        if measured is None:
            difference, allowed, twin = math.inf, None, None
        else:
            difference, twin = measured.difference, measured.twin
            note = "" if math.isfinite(difference) else "logits or features are no numbers (NaN), or infinite"
            allowed = 0.0 if exact else self.allowed(measured.scale)
        result: dict[str, Any] = {"difference": difference, "allowed": allowed, "twin": twin}
        if measured is not None and allowed is not None and difference <= allowed:
            # Where numbers are coarse, what is allowed is wide; a change must still stand out from the difference.
            if twin is None or twin > max(2 * difference, torch.finfo(self.model.dtype).eps * measured.scale):
                return {"verdict": "holds", **result}
            return {"verdict": "fails", **result, "note": "a change that must be seen was not: this check saw nothing"}
        if not has_bare:
            return {"verdict": "fails", **result, "note": note}
        bare, reason = self._bare(measure)
        if bare is None and (refused or reason.partition(":")[0] == note.partition(":")[0]):
            return {"verdict": "limit", **result, "note": f"the bare language model: {reason}"}
        if bare is None:  # it cannot be asked, and ours fails in another way
            return {"verdict": "fails", **result, "note": f"{note}. The bare language model: {reason}".strip(". ")}
        # Media add to what the language model's own rounding does.
        # Weights that give no numbers are broken; that is no limit of a type.
        bare_fails = self.allowed(bare.scale) / 2 < bare.difference < math.inf
        if bare_fails and (refused or difference <= 16 * bare.difference):
            reason = f"the bare language model differs by {bare.difference:.1e} in the same comparison"
            return {"verdict": "limit", **result, "note": f"{reason}. {note}".strip(". ")}
        return {"verdict": "fails", **result, "note": note}

    def _bare(self, measure: Callable[[], Measured]) -> tuple[Measured | None, str]:
        """The worst of a few times that the bare language model is measured."""
        worst, seed = None, self.seed
        self.is_bare = True
        try:
            for self.seed in range(seed, seed + 4):
                found, reason = self._attempt(measure)
                if found is None:
                    return None, reason
                worst = found if worst is None or found.difference > worst.difference else worst
            return worst, ""
        finally:
            self.is_bare, self.seed = False, seed

    @staticmethod
    def _attempt(measure: Callable[[], Measured]) -> tuple[Measured | None, str]:
        try:
            return measure(), ""
        except Exception as error:  # whatever a language model raises is a finding
            return None, f"{type(error).__name__}: {first_line(error)}"

    def check(self, name: str) -> dict[str, Any]:
        try:
            return getattr(self, f"check_{name.replace('-', '_')}")()
        except Exception as error:
            return {"verdict": "fails", "difference": math.inf, "note": f"{type(error).__name__}: {first_line(error)}"}

    # -- checks ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_features(self) -> dict[str, Any]:
        config, encoder = self.model.config.vision_config, self.model.vision_encoder
        declared = (config["num_patches"], config["dim"])
        media = torch.cat([self.row(2).vision_x, self.row(2, seed=1).vision_x], dim=2)  # [1, 2, 2, C, H, W]
        media = torch.cat([media, 1 - media])

        def measure() -> Measured:
            together = encoder(media)
            if together.shape != (*media.shape[:3], *declared):
                raise ValueError(f"features are {tuple(together.shape[3:])}, and {declared} was declared")
            alone = torch.stack([encoder(x[None, None, None])[0, 0, 0] for x in media.flatten(0, 2)])
            found = together.flatten(0, 2)
            return Measured(_difference(found, alone), _scale(alone), _difference(found.roll(1, 0), alone))

        return self.judge(measure, has_bare=False)

    def check_text_only(self) -> dict[str, Any]:
        model = self.model

        @torch.no_grad()
        def measure() -> Measured:
            ids = self.row(0, 11).lang_x
            ids = ids.masked_fill(ids >= model.config.first_added_id, int(ids[0, 0]))
            with _without_hooks(model.lang_model):
                expected = model.lang_model(input_ids=ids).logits[..., : model.config.first_added_id]
            found = model(lang_x=ids).logits[..., : model.config.first_added_id]
            changed = model(lang_x=ids.roll(1, dims=1)).logits[..., : model.config.first_added_id]
            return Measured(_difference(found, expected), _scale(expected), _difference(changed, expected))

        return self.judge(measure, exact=True, has_bare=False)

    def check_bare(self) -> dict[str, Any]:
        if not self.gates and not self.is_stream:
            return {"verdict": "skipped", "note": "this fusion has no gates (parameters whose names end in _gate)"}
        first = self.model.config.first_added_id

        def measure() -> Measured:
            row = self.row(2, 11)
            with self.gates_at(0.0):
                expected = self._bare_logits(row)
                found = self.logits(row)[:, :first]
            changed = self.logits(self.other_media(row))[:, :first]
            return Measured(_difference(found, expected), _scale(expected), _difference(changed, expected))

        return self.judge(measure)

    @torch.no_grad()
    def _bare_logits(self, row: Row) -> Tensor:
        """float[T, V] of the language model without our hooks, fed embeddings that a loop puts together.

        They are put in behind its own embedding: not every model takes `inputs_embeds`, and some use ids elsewhere.
        """
        model, config = self.model, self.model.config
        table = model.lang_model.get_input_embeddings()
        media: Iterator[Tensor] = iter(())
        if self.is_stream and row.vision_x is not None:
            tokens, mask = model.encode_vision(row.vision_x)
            media = iter([x[there] for x, there in zip(tokens[0], mask[0], strict=True)])
        ids: list[int] = []
        embeddings: list[Tensor] = []
        last: list[int] = []
        with _without_hooks(model.lang_model):
            for token in row.lang_x[0].tolist():
                if token == config.media_token_id and self.is_stream:
                    embeddings.append(next(media))
                elif token >= config.first_added_id:
                    embeddings.append(model.added_tokens.embedding.weight[token - config.first_added_id][None])
                else:
                    embeddings.append(table(torch.tensor([token], device=model.device)))
                ids += [token if token < config.first_added_id else 0] * len(embeddings[-1])
                last.append(len(ids) - 1)
            whole = torch.cat([x.to(embeddings[0].dtype) for x in embeddings])[None]
            put = table.register_forward_hook(lambda _, args, out: whole if out.shape == whole.shape else None)
            try:
                logits = model.lang_model(input_ids=torch.tensor([ids], device=model.device)).logits
            finally:
                put.remove()
        return logits[0, last, : config.first_added_id]

    def check_media(self) -> dict[str, Any]:
        row = self.row(2, 11)
        places = (row.lang_x[0] == self.model.config.media_token_id).nonzero().flatten().tolist()

        def measure() -> Measured:
            expected = self.logits(row)
            before, after = 0.0, math.inf
            for k, start in enumerate(places):
                changed = self.logits(self.other_media(row, k))
                before = max(before, _difference(changed[:start], expected[:start]))
                # Each by itself: a medium that is seen one position late would still change what follows.
                for part in (slice(start, start + 1), slice(start + 1, None)):
                    after = min(after, _difference(changed[part], expected[part]))
            return Measured(before, _scale(expected), after)

        return self.judge(measure, has_bare=False)

    def check_cached(self) -> dict[str, Any]:
        def measure() -> Measured:
            row = self.row(2)
            steps, sequence = self._decoded(row)
            full = self._full(row, sequence)
            changed = self._full(self.other_media(row), sequence)
            return Measured(_difference(steps, full), _scale(full), _difference(steps, changed))

        return self.judge(measure)

    def check_greedy(self) -> dict[str, Any]:
        def measure() -> Measured:
            row = self.row(2, seed=1)
            _, sequence = self._decoded(row)
            full = self._full(row, sequence)
            if not self.is_bare:
                full[:, self.model.config.media_token_id] = -torch.inf
            best, second = full.topk(2, dim=-1).values.T
            chosen = full.gather(-1, sequence[0, row.lang_x.shape[1] :, None])[:, 0]
            return Measured(_difference(chosen, best), _scale(best), _difference(second, best))

        return self.judge(measure)

    def check_padded(self) -> dict[str, Any]:
        def measure() -> Measured:
            rows = [self.row(n, 9 + n, seed=n) for n in (1, 0, 2)]
            together, sequences = self._decoded_batch(rows)
            difference, scale, twin = 0.0, 0.0, math.inf
            for row, found, sequence in zip(rows, together, sequences, strict=True):
                alone = self.logits(Row(sequence, row.vision_x))[:-1]
                changed = self.logits(Row(sequence, self.other_media(row).vision_x))[:-1]
                difference = max(difference, _difference(found, alone))
                scale = max(scale, _scale(alone))
                if row.vision_x is not None:
                    twin = min(twin, _difference(found, changed))
            return Measured(difference, scale, twin)

        return self.judge(measure)

    def check_pieces(self) -> dict[str, Any]:
        def measure() -> Measured:
            row = self.row(2, 11)
            whole, found = self._in_pieces(row), self._in_pieces(row, 3, 4)
            changed = self._in_pieces(self.other_media(row), 3, 4)
            return Measured(_difference(found, whole), _scale(whole), _difference(changed, whole))

        return self.judge(measure)

    @torch.no_grad()
    def _in_pieces(self, row: Row, *lengths: int) -> Tensor:
        """float[positions, V] of a prompt that is read in pieces of so many positions, and the rest."""
        model, keywords, ids = self.model, {}, row.lang_x
        if row.vision_x is not None:
            tokens, mask = model.encode_vision(row.vision_x)
            keywords = {"media": model.project_media(tokens, mask), "media_mask": mask}
            with model.conditioned(row.lang_x, tokens) as inputs:
                ids = inputs["input_ids"]
        positions = (ids == model.config.media_token_id).cumsum(-1)
        found: list[Tensor] = []
        cache, start = None, 0
        for length in (*lengths, ids.shape[1] - sum(lengths)):
            part = slice(start, start + length)
            output = self._call(
                ids[:, part],
                torch.ones_like(ids[:, : part.stop]),
                media_counts=positions[:, part],
                position_ids=torch.arange(start, part.stop, device=ids.device)[None],
                past_key_values=cache,
                use_cache=True,
                **keywords,
            )
            found.append(output.logits[0])
            if lengths:
                cache, start = _cache(output), part.stop
        return torch.cat(found)

    def check_gradients(self) -> dict[str, Any]:
        model, modules = self.model, self.model.part_modules()
        trained = {id(p) for part in model.config.composition.trainable for p in modules[part].parameters()}
        declared = {name for name, p in model.named_parameters() if id(p) in trained}
        training = {name for name, p in model.named_parameters() if p.requires_grad}
        if not declared | training:
            return {"verdict": "skipped", "note": "nothing trains"}
        row = self.row(2, 11)
        reached, zero = self._reached(row)
        # What we build is used whole; a tower has a pooling, and a language model experts, that a prompt may not reach.
        ours = {name for name in declared if not name.startswith(("vision_encoder.", "lang_model."))}
        if not ((row.lang_x >= model.config.first_added_id) & (row.lang_x != model.config.media_token_id)).any():
            # All that was added stands for media, which may take the place of it, or for padding.
            ours.discard("added_tokens.embedding.weight")
        parts = {name.partition(".")[0] for name in declared}
        wrong = {f"{part} gets no gradient" for part in parts - {name.partition(".")[0] for name in reached - zero}}
        wrong |= {f"{name} trains and is not declared" for name in training - declared}
        wrong |= {f"{name} is declared and does not train" for name in declared - training}
        wrong |= {f"{name} gets no gradient" for name in (ours & training) - (reached - zero)}
        unused = len((declared & training) - reached)
        return {
            "verdict": "fails" if wrong else "holds",
            "difference": float(len(wrong)),
            "allowed": 0.0,
            "note": f"{len(wrong)} found, e.g. {min(wrong)}"
            if wrong
            else f"{len(reached)} tensors"
            + (f"; {unused} more are declared and this prompt does not use them" if unused else ""),
        }

    def _reached(self, row: Row) -> tuple[set[str], set[str]]:
        """Names of the parameters that a loss gives a gradient, and of those whose gradient is zero."""
        model = self.model
        labels = row.lang_x.masked_fill(row.lang_x == model.config.media_token_id, -100)
        before = [(p, p.grad) for p in model.parameters()]
        model.zero_grad()
        try:
            with torch.enable_grad():
                model(**row.inputs(), labels=labels, use_cache=False).loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            return set(gradients), {name for name, gradient in gradients.items() if not gradient.any()}
        finally:
            for parameter, gradient in before:
                parameter.grad = gradient

    def check_saved(self) -> dict[str, Any]:
        model = self.model
        row = self.row(2, 11)
        again, info = type(model).from_pretrained(
            self.folder, config=copy.deepcopy(model.config), dtype=model.dtype, output_loading_info=True
        )
        ours, theirs = model.state_dict(), again.eval().to(model.device).state_dict()
        with torch.device("meta"):
            bare = type(model.lang_model)(copy.deepcopy(model.lang_model.config))
        published = {f"lang_model.{name}" for name in bare.state_dict()}
        problems = [f"{key}: {sorted(map(str, x))[0]}" for key, x in info.items() if x]
        problems += [f"{name} changed" for name, x in ours.items() if not _is_same(x, theirs[name])]
        problems += [f"{name} holds NaN" for name, x in ours.items() if x.is_floating_point() and x.isnan().any()]
        if published != {name for name in ours if name.startswith("lang_model.")}:
            problems.append("the language model's tensors have lost their published names")
        if problems:
            return {"verdict": "fails", "difference": math.inf, "note": problems[0]}

        @torch.no_grad()
        def measure() -> Measured:
            expected = self.logits(row)
            found = again(**row.inputs()).logits[0]
            again.added_tokens.head.weight[:, ::2].add_(0.5)  # not all: after a norm, channels may add up to nothing
            changed = again(**row.inputs()).logits[0]
            return Measured(_difference(found, expected), _scale(expected), _difference(changed, expected))

        # A last bit may differ: tensors begin at any byte of a file, and how a sum is split depends on that.
        return self.judge(measure, has_bare=False)

    def check_tied(self) -> dict[str, Any]:
        model = self.model
        kept = set(model.state_dict())
        buffers = sum(x.numel() for name, x in model.named_buffers() if name in kept)
        counted = sum(p.numel() for p in model.parameters()) + buffers
        saved = _num_saved(Path(self.folder))
        found = dict(model.named_parameters(remove_duplicate=False))
        # A copy is counted twice and saved twice, so that the numbers agree.
        # As the configuration says: Transformers forgets a tie when a checkpoint holds two different tensors.
        tied = model.get_expanded_tied_weights_keys(all_submodels=True) | model.all_tied_weights_keys
        copies = [(a, b) for a, b in tied.items() if found.get(a) is not found.get(b)]
        note = f"{counted:,} numbers in memory, {saved:,} in the files"
        return {
            "verdict": "holds" if saved == counted and not copies else "fails",
            "difference": float(abs(saved - counted) + sum(found[a].numel() for a, _ in copies if a in found)),
            "allowed": 0.0,
            "note": f"{copies[0][0]} is tied to {copies[0][1]} and is another tensor; {note}" if copies else note,
        }

    @cached_property
    def folder(self) -> str:
        """The model, saved; removed when the trial ends."""
        folder = self.cleanup.enter_context(tempfile.TemporaryDirectory(prefix="vlm-doctor-"))
        self.model.save_pretrained(folder)
        return folder

    # -- decoding -------------------------------------------------------------------------------------------------

    def _decoded(self, row: Row) -> tuple[Tensor, Tensor]:
        """float[_STEPS, V] of the steps, and int[1, T + _STEPS]."""
        output = self._generate(**row.inputs())
        return torch.stack(output.logits, dim=1)[0], output.sequences

    def _full(self, row: Row, sequence: Tensor) -> Tensor:
        """float[_STEPS, V] of the same steps, in one pass without a cache."""
        return self.logits(Row(sequence, row.vision_x))[-_STEPS - 1 : -1]

    def _decoded_batch(self, rows: Sequence[Row]) -> tuple[list[Tensor], list[Tensor]]:
        """For each row of a left-padded batch, float[T + _STEPS - 1, V] and int[1, T + _STEPS]."""
        lengths = [row.lang_x.shape[1] for row in rows]
        media = [row.vision_x for row in rows if row.vision_x is not None]
        lang_x = rows[0].lang_x.new_full((len(rows), max(lengths)), self.pad_token_id)
        attention_mask = torch.zeros_like(lang_x)
        inputs: dict[str, Any] = {"lang_x": lang_x, "attention_mask": attention_mask}
        if media:
            most = max(x.shape[1] for x in media)
            inputs["vision_x"] = vision_x = media[0].new_full((len(rows), most, *media[0].shape[2:]), 1e4)
            inputs["vision_mask"] = vision_mask = lang_x.new_zeros((len(rows), most, 1), dtype=torch.bool)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            lang_x[i, -length:], attention_mask[i, -length:] = row.lang_x[0], 1
            if row.vision_x is not None:
                vision_x[i, : row.vision_x.shape[1]] = row.vision_x[0]
                vision_mask[i, : row.vision_x.shape[1]] = True
        read = self._call(**inputs).logits
        output = self._generate(**inputs)
        steps = torch.stack(output.logits, dim=1)
        return (
            [torch.cat([read[i, -n:], steps[i, 1:]]) for i, n in enumerate(lengths)],
            [output.sequences[i : i + 1, -n - _STEPS :] for i, n in enumerate(lengths)],
        )

    def _generate(self, **inputs: Any) -> Any:
        model: Any = self.model.lang_model if self.is_bare else self.model
        if self.is_bare:
            inputs = {"input_ids": inputs["lang_x"], "attention_mask": inputs.get("attention_mask")}
        before = model.generation_config
        # Whatever ends or bends the answers of this model is left out.
        model.generation_config = GenerationConfig(pad_token_id=self.pad_token_id)
        options = {"max_new_tokens": _STEPS, "do_sample": False, "use_cache": True, "output_logits": True}
        try:
            with _without_hooks(model) if self.is_bare else nullcontext():
                return model.generate(**inputs, **options, return_dict_in_generate=True)
        finally:
            model.generation_config = before


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """A module as if nothing had ever been hooked to it."""
    before = [(m, m._forward_hooks, m._forward_pre_hooks) for m in module.modules()]
    for m, _, _ in before:
        m._forward_hooks, m._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for m, hooks, pre_hooks in before:
            m._forward_hooks, m._forward_pre_hooks = hooks, pre_hooks


def _cache(output: Any) -> Any:
    """The cache that a language model returned, under whatever name.

    Raises:
        ValueError: if it returned none.
    """
    names = ("cache", "past_key_values", "cache_params", "state")
    found = next((output[name] for name in names if output.get(name) is not None), None)
    if found is None:
        raise ValueError("it returns no cache")
    return found


def _num_saved(folder: Path) -> int:
    """Numbers in all weight files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total
