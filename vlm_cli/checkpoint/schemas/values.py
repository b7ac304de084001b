"""Values that several files of a model hold: ids, sizes, dtypes."""

from __future__ import annotations

from vlm_cli.schema import choice, either, list_of, whole

__all__ = ["DTYPE", "ID", "IDS", "IMAGE_SIZE", "MOST_CHANNELS", "MOST_ID", "MOST_LAYERS", "ONE_ID", "PIXELS"]

MOST_ID = 2**31 - 1  # the largest token id
MOST_CHANNELS = 10_000_000  # width of a layer, or rows of a table
MOST_LAYERS = 10_000
ID = whole(0, MOST_ID)
ONE_ID = whole(-1, MOST_ID)
IDS = either(ONE_ID, list_of(ID, least=1, most=10_000))
DTYPE = choice("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2")
PIXELS = whole(1, 16_384)
IMAGE_SIZE = either(PIXELS, list_of(PIXELS, least=2, most=2))
