"""How a picture becomes views: which tiles of it, and the whole picture, a vision encoder reads one by one.

One module for each way to cut, named after the tiling: `plan(options, tile, width, height)` says what becomes of a
picture of this size, from its size alone. Plain Python and Pillow; nothing here imports torch.
"""

from vlm_cli.tiling.check import check_tiling
from vlm_cli.tiling.cutting import cut
from vlm_cli.tiling.plan import plan
from vlm_cli.tiling.size import MediumSize
from vlm_cli.tiling.views import Views

__all__ = ["MediumSize", "Views", "check_tiling", "cut", "plan"]
