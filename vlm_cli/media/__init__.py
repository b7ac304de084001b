"""Load images from wherever they are kept, as upright RGB, or say why that is not possible.

`sources` reads the bytes, `decode` turns them into pixels, and `MediaLoader` does both.
"""

from vlm_cli.media.decode import MAX_PIXELS
from vlm_cli.media.loader import LoadedImage, MediaLoader
from vlm_cli.media.sources import MAX_BYTES, short_name

__all__ = ["MAX_BYTES", "MAX_PIXELS", "LoadedImage", "MediaLoader", "short_name"]
