"""Load images and clips from wherever they are kept, as upright RGB, or say why that is not possible.

`sources` reads the bytes, `decode` turns those of an image into pixels, `video`, `animation` and `frame_folder` those
of a clip, `request` and `timeline` choose its frames, and `MediaLoader` does it all.
"""

from vlm_cli.media.decode import MAX_PIXELS
from vlm_cli.media.loader import ChosenFrames, LoadedClip, LoadedImage, MediaLoader
from vlm_cli.media.request import name_frame
from vlm_cli.media.sources import MAX_BYTES, is_uri, short_name

__all__ = ["MAX_BYTES", "MAX_PIXELS", "ChosenFrames", "LoadedClip", "LoadedImage", "MediaLoader", "name_frame"]
__all__ += ["is_uri", "short_name"]
