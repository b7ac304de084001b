"""Draw curves into a file, SVG or PNG, with matplotlib. The same curves give the same SVG, byte for byte."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_cli.errors import UsageError
from vlm_cli.files import check_file, replacing_file

__all__ = ["FORMATS", "Panel", "check_plot", "draw_panels"]

FORMATS = (".svg", ".png")
_SIZE = (4.8, 3.2)  # inches of a panel
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Attributes:
        title: with the unit of the values.
        curves: name -> points (x, y).
    """

    title: str
    curves: Mapping[str, Sequence[tuple[float, float]]]


def check_plot(path: Path, *, overwrite: bool) -> None:
    """Check that a picture of curves can be written, before anything is computed for it.

    Raises:
        UsageError: if the name ends otherwise than .svg or .png, or matplotlib is missing.
        VLMError: if the file exists, or its folder does not.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{str(path)!r} is neither SVG nor PNG. Give a name that ends in {' or '.join(FORMATS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("pictures of curves need matplotlib: pip install 'vlm-cli[plot]'")
    check_file(path, overwrite=overwrite)


def draw_panels(path: Path, panels: Sequence[Panel], *, x: str, title: str, overwrite: bool = False) -> None:
    """Write a picture of diagrams beside each other, which share the meaning of their horizontal axis.

    Raises:
        as `check_plot`.
    """
    check_plot(path, overwrite=overwrite)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Without a salt and with a date, each SVG would have other ids.
    with rc_context({"svg.hashsalt": "vlm", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(_SIZE[0] * len(panels), _SIZE[1] + 0.6), layout="constrained")
        figure.suptitle(title)
        named: dict[str, Any] = {}
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            for number, (name, points) in enumerate(panel.curves.items()):
                style = _DASHES[number // 10 % len(_DASHES)]
                colour = f"C{number}" if name not in named else named[name].get_color()
                [named[name]] = axes.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3)
            axes.set(title=panel.title, xlabel=x, ylim=(0, None))
            axes.grid(alpha=0.3)
        place: Any = "outside lower center"
        figure.legend(named.values(), named, loc=place, ncols=min(4, len(named)), frameon=False)
        data = io.BytesIO()
        kind = path.suffix[1:].lower()
        figure.savefig(data, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    with replacing_file(path, overwrite=overwrite) as file:
        file.buffer.write(data.getvalue())  # the bytes below the text
