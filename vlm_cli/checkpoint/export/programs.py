"""What a VLM becomes for other programs: its language model alone, or its vision side as a program or ONNX graph.

N images, C channels, H W pixels, n vision tokens, d their channels.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_cli.checkpoint.parts.remote_code import write_code
from vlm_cli.errors import CheckpointError, UsageError, first_line
from vlm_cli.files import EXPORT_FILE
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.version import __version__

__all__ = [
    "VisionSide",
    "check_onnx",
    "export_language_model",
    "export_vision_onnx",
    "export_vision_program",
    "must_agree",
    "write_mark",
]

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of outputs in float32, as a fraction of the largest one where that is above 1


def write_mark(out: Path, kind: str, source: str, facts: dict[str, Any]) -> None:
    """Say in a directory what it is, and that vlm may replace it."""
    mark = {"format": kind, "model": source, "vlm_cli": __version__, **facts}
    (out / EXPORT_FILE).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")


def must_agree(what: str, ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest difference between two outputs, as a fraction of the largest of ours where that is above 1.

    Raises:
        CheckpointError: if it is more than `tolerance`, or one of them is not finite.
    """
    if ours.shape != theirs.shape:
        raise CheckpointError(f"{what} gives {list(theirs.shape)}, the model {list(ours.shape)}. Nothing was written.")
    difference = ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)).item()
    if not difference <= tolerance:  # NaN is not
        raise CheckpointError(
            f"{what} differs from the model by {difference:.1e}, more than {tolerance:.0e}. Nothing was written; "
            "please report it with the composition."
        )
    return difference


# -- the language model alone ------------------------------------------------------------------------------------------


def export_language_model(
    model: VLM, processor: VLMProcessor, out: Path, *, max_shard_size: str = "5GB"
) -> dict[str, Any]:
    """Write the language model and its tokenizer as a plain Transformers directory, under its published names.

    Tokens for which it has no row, ours among them, are left out of the tokenizer.

    Raises:
        CheckpointError: if the tokenizer cannot be written without them.
    """
    lm, first = model.lang_model, model.config.first_added_id
    write_code(lm, out)
    settings = copy.deepcopy(model.generation_config)
    stops = [i for i in stop_token_ids(settings) if i < first]
    settings.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    settings.pad_token_id = None if (settings.pad_token_id or 0) >= first else settings.pad_token_id
    lm.generation_config = settings
    lm.save_pretrained(out, max_shard_size=max_shard_size)
    processor.tokenizer.save_pretrained(out)
    _forget_tokens(out, set(model.config.added_tokens))
    _check_tokenizer(out, first)
    return {"model_type": lm.config.model_type, "tokens": first}


def _forget_tokens(folder: Path, names: set[str]) -> None:
    """Take tokens out of a tokenizer's files, and whatever says that it belongs to a processor of ours."""

    def content(token: Any) -> Any:
        return token.get("content") if isinstance(token, dict) else token

    def without(data: Any) -> Any:
        if isinstance(data, list):
            return [x for x in data if content(x) not in names]
        return data

    def edit(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        file = folder / name
        if file.is_file():
            data = change(json.loads(file.read_text(encoding="utf-8")))
            file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def settings(data: dict[str, Any]) -> dict[str, Any]:
        ours = ("processor_class", "is_local", "local_files_only")
        kept = {key: without(x) for key, x in data.items() if key not in ours}
        decoder = kept.get("added_tokens_decoder") or {}
        if decoder:
            kept["added_tokens_decoder"] = {i: x for i, x in decoder.items() if content(x) not in names}
        return {key: x for key, x in kept.items() if not (key.endswith("_token") and content(x) in names)}

    edit("tokenizer.json", lambda data: {**data, "added_tokens": without(data.get("added_tokens") or [])})
    edit("tokenizer_config.json", settings)
    edit("special_tokens_map.json", settings)
    edit("added_tokens.json", lambda data: {name: i for name, i in data.items() if name not in names})


def _check_tokenizer(folder: Path, first: int) -> None:
    """
    Raises:
        CheckpointError: if the tokenizer in a directory gives ids that the language model does not have.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    beyond = [name for name, i in tokenizer.get_added_vocab().items() if i >= first]
    if beyond:
        raise CheckpointError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot be written without the tokens {', '.join(beyond)}, "
            "which the language model does not have. Take the tokenizer of the language model itself."
        )


# -- the vision side ---------------------------------------------------------------------------------------------------


class VisionSide(nn.Module):
    """The vision encoder and the vision tokenizer of a VLM, for media of one frame."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.vision_encoder = model.vision_encoder
        self.vision_tokenizer = model.vision_tokenizer

    def forward(self, pixels: Tensor) -> Tensor:
        """float[N, C, H, W] -> float[N, n, d]."""
        features = self.vision_encoder(pixels[:, None, None])  # [N, 1, 1, v, d]
        return self.vision_tokenizer(features)[:, 0]


def export_vision_program(model: VLM, processor: VLMProcessor, out: Path) -> dict[str, Any]:
    """Write `vision.pt2`, a program of `torch.export` in float32: float[N, C, H, W] -> float[N, n, d].

    It is loaded back and compared with the model. N is free where the tower allows it.

    Raises:
        CheckpointError: if the tower cannot be exported, or the program gives something else.
    """
    side = _float_side(model)
    program, is_dynamic = _program(side, _pixels(model, 2))
    written = io.BytesIO()  # on a full disk, torch's own writer ends the process
    torch.export.save(program, written)
    (out / "vision.pt2").write_bytes(written.getbuffer())
    loaded = torch.export.load(out / "vision.pt2").module()
    difference = _compare("the program", model, side, loaded, is_dynamic)
    processor.image_processor.save_pretrained(out)
    return _facts(model, side, is_dynamic, difference)


def check_onnx() -> None:
    """
    Raises:
        UsageError: if packages that write and check ONNX graphs are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the format vision-onnx needs {', '.join(missing)}. Install it: pip install 'vlm-cli[onnx]'. Or choose "
            "--format vision-program, which needs nothing more."
        )


def export_vision_onnx(model: VLM, processor: VLMProcessor, out: Path) -> dict[str, Any]:
    """Write `vision.onnx` in float32, from input `pixels` to output `tokens`, and compare ONNX Runtime with the model.

    Raises:
        CheckpointError: if the tower cannot be exported, or the graph gives something else.
        UsageError: if packages are missing.
    """
    check_onnx()
    import onnxruntime

    side = _float_side(model)
    program, is_dynamic = _program(side, _pixels(model, 2))
    file = out / "vision.onnx"
    with _quiet():
        try:
            torch.onnx.export(
                program, (), file, dynamo=True, input_names=["pixels"], output_names=["tokens"], verbose=False
            )
        except Exception as error:
            raise CheckpointError(_cannot_export(side, "an ONNX graph", error)) from None
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])

    difference = _compare("the ONNX graph", model, side, run, is_dynamic)
    processor.image_processor.save_pretrained(out)
    return _facts(model, side, is_dynamic, difference)


def _float_side(model: VLM) -> VisionSide:
    return copy.deepcopy(VisionSide(model)).eval().requires_grad_(False).float()


def _pixels(model: VLM, num: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, *model.vision_encoder.image_size, generator=generator)


def _program(side: VisionSide, pixels: Tensor) -> tuple[Any, bool]:
    """The exported program, and whether its batch is free."""
    with torch.no_grad(), _quiet():
        try:
            shapes = {"pixels": {0: torch.export.Dim("N")}}
            return torch.export.export(side, (pixels,), dynamic_shapes=shapes), True
        except Exception as error:
            logger.info("the batch cannot be free: %s", first_line(error))
        try:
            return torch.export.export(side, (pixels[:1],)), False
        except Exception as error:
            raise CheckpointError(_cannot_export(side, "a program", error)) from None


@torch.no_grad()
def _compare(what: str, model: VLM, side: VisionSide, other: Callable[[Tensor], Tensor], is_dynamic: bool) -> float:
    """Compare at batches that the export did not see."""
    batches = [_pixels(model, num, seed=num) for num in ((1, 3) if is_dynamic else (1,))]
    return max(must_agree(what, side(pixels), other(pixels)) for pixels in batches)


def _facts(model: VLM, side: VisionSide, is_dynamic: bool, difference: float) -> dict[str, Any]:
    batch = "N" if is_dynamic else 1
    with torch.no_grad():
        tokens = side(_pixels(model, 1))
    return {
        "input": [batch, 3, *model.vision_encoder.image_size],
        "output": [batch, *tokens.shape[1:]],
        "dtype": "float32",
        "largest_difference": difference,
    }


def _cannot_export(side: VisionSide, what: str, error: Exception) -> str:
    kind = type(side.vision_encoder.visual).__name__
    return f"the vision side ({kind}) cannot be exported as {what}: {first_line(error)}."


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' advice, which is about their own insides, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
