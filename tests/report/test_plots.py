"""Curves as pictures: the same ones give the same file, and both formats are what their names say."""

from __future__ import annotations

import pytest

from vlm_cli.errors import OutputExistsError, UsageError
from vlm_cli.report.plots import Panel, draw_panels

PANELS = [Panel("GB", {"a": [(1, 2.0), (2, 3.0)], "b & <c>": [(1, 1.0), (2, 5.0)]}), Panel("s", {"a": [(1, 1.0)]})]


@pytest.mark.matrix
def test_an_svg_is_the_same_each_time_and_a_png_is_one(tmp_path):
    for name in ("a.svg", "b.svg", "c.png"):
        draw_panels(tmp_path / name, PANELS, x="tokens", title="costs")
    first, second, image = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg", "c.png"))
    assert first == second and b"<svg" in first and b"b &amp; &lt;c&gt;" in first
    assert image.startswith(b"\x89PNG")
    draw_panels(tmp_path / "d.svg", PANELS[:1], x="tokens", title="costs")
    assert (tmp_path / "d.svg").read_bytes() != first


def test_another_format_and_a_file_that_exists_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"is neither SVG nor PNG\. Give a name that ends in \.svg or \.png"):
        draw_panels(tmp_path / "a.pdf", PANELS, x="tokens", title="costs")
    (tmp_path / "a.svg").write_text("mine")
    with pytest.raises(OutputExistsError):
        draw_panels(tmp_path / "a.svg", PANELS, x="tokens", title="costs")
    assert (tmp_path / "a.svg").read_text() == "mine"
