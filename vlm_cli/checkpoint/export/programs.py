"""Export the vision side of a VLM as a program of torch.export or as an ONNX graph.

N images, C channels, H W pixels, n vision tokens, d their channels.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vlm_cli.checkpoint.export.agreement import check_agreement
from vlm_cli.errors import CheckpointError, UsageError, first_line
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor

__all__ = ["VisionSide", "check_onnx", "check_program", "export_torch_program", "export_vision_onnx"]

logger = logging.getLogger(__name__)


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


def export_torch_program(model: VLM, processor: VLMProcessor, out: Path) -> dict[str, Any]:
    """Write `vision.pt2`, a program of `torch.export` in float32: float[N, C, H, W] -> float[N, n, d].

    Then load the program back and compare it with the model. The program takes any N if the tower allows it, else 1.

    Raises:
        CheckpointError: if the tower cannot be exported, or the program differs from the model.
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


def check_program(config: VLMConfig) -> None:
    """Check that the vision side of a model can be written as a program, which reads one view and knows no tiles.

    Raises:
        UsageError: naming the setting that does not fit.
    """
    tiling = config.composition.tiling
    if tiling.type != "none":
        raise UsageError(
            f"a program of the vision side reads one view, and this model's tiling is {tiling.type}: it cuts pictures "
            "into tiles, and the program would not. Choose --format delta, or a model without tiles."
        )


def check_onnx() -> None:
    """Check that the packages which write and run ONNX graphs are installed.

    Raises:
        UsageError: naming those that are missing.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the format vision-onnx needs {', '.join(missing)}. Install it: pip install 'vlm-cli[onnx]'. Or choose "
            "--format torch-export, which needs no other package."
        )


def export_vision_onnx(model: VLM, processor: VLMProcessor, out: Path) -> dict[str, Any]:
    """Write `vision.onnx` in float32, from input `pixels` to output `tokens`, and compare ONNX Runtime with the model.

    Raises:
        CheckpointError: if the tower cannot be exported, or the graph differs from the model.
        UsageError: if packages are missing.
    """
    check_onnx()
    import onnxruntime

    side = _float_side(model)
    program, is_dynamic = _program(side, _pixels(model, 2))
    file = out / "vision.onnx"
    with _quiet_exporters():
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
    encoder = model.vision_encoder
    return torch.randn(num, encoder.num_channels, *encoder.image_size, generator=generator)


def _program(side: VisionSide, pixels: Tensor) -> tuple[ExportedProgram, bool]:
    """Export the program; return it, and whether it takes any number of images."""
    with torch.no_grad(), _quiet_exporters():
        try:
            shapes = {"pixels": {0: torch.export.Dim("N")}}
            return torch.export.export(side, (pixels,), dynamic_shapes=shapes), True
        except Exception as error:
            logger.info("the program takes one image only: %s", first_line(error))
        try:
            return torch.export.export(side, (pixels[:1],)), False
        except Exception as error:
            raise CheckpointError(_cannot_export(side, "a program", error)) from None


@torch.no_grad()
def _compare(what: str, model: VLM, side: VisionSide, other: Callable[[Tensor], Tensor], is_dynamic: bool) -> float:
    """Compare at batch sizes that the export did not see; return the largest difference."""
    batches = [_pixels(model, num, seed=num) for num in ((1, 3) if is_dynamic else (1,))]
    return max(check_agreement(what, side(pixels), other(pixels)) for pixels in batches)


def _facts(model: VLM, side: VisionSide, is_dynamic: bool, difference: float) -> dict[str, Any]:
    batch = "N" if is_dynamic else 1
    with torch.no_grad():
        tokens = side(_pixels(model, 1))
    return {
        "input": [batch, model.vision_encoder.num_channels, *model.vision_encoder.image_size],
        "output": [batch, *tokens.shape[1:]],
        "dtype": "float32",
        "largest_difference": difference,
    }


def _cannot_export(side: VisionSide, what: str, error: Exception) -> str:
    kind = type(side.vision_encoder.visual).__name__
    return f"the vision side ({kind}) cannot be exported as {what}: {first_line(error)}."


@contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Keep the exporters' advice off the terminal: it is about their own code, and the user can do nothing."""
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
