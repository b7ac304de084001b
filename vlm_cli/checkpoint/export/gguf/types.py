"""The types of numbers in which a GGUF file may hold weights. Importing this module does not import gguf."""

from __future__ import annotations

from vlm_cli.errors import UsageError

__all__ = ["OUT_TYPES", "check_out_type"]

#: Type -> what it is. `llama-quantize` of llama.cpp makes smaller ones out of f16 or f32.
OUT_TYPES = {
    "f32": "32-bit floats, exact",
    "f16": "16-bit floats",
    "bf16": "bfloat16",
    "q8_0": "8-bit integers, a scale for each 32 weights",
}


def check_out_type(name: str) -> None:
    """Check that there is such a type.

    Raises:
        UsageError: if there is none.
    """
    if name in OUT_TYPES:
        return
    known = ", ".join(OUT_TYPES)
    raise UsageError(
        f"--outtype is {name!r}; vlm writes {known}. For a smaller type, such as Q4_K_M, write f16 and give the file "
        "of the language model to llama.cpp's own tool: llama-quantize NAME-F16.gguf NAME-Q4_K_M.gguf Q4_K_M."
    )
