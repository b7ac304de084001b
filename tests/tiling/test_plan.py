"""Which views a picture has, compared with Transformers' own image processors, which are asked for sizes alone."""

from __future__ import annotations

import doctest

import pytest
from transformers import PerceptionLMImageProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.cohere2_vision.image_processing_cohere2_vision import (
    get_optimal_tiled_canvas as least_enlarged,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas as nearest_in_shape
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

import vlm_cli.tiling.grid
from vlm_cli.composition import AnyresOptions, Choice, GridOptions, SplitOptions, TilingOptions, limit_tiles
from vlm_cli.errors import CompositionError, MediaError
from vlm_cli.tiling import MediumSize, check_tiling, plan
from vlm_cli.tiling.anyres import unpad
from vlm_cli.tiling.texts import list_texts, render

SIZES = [(1, 1), (100, 100), (640, 480), (480, 640), (1920, 300), (300, 1921), (3000, 2000), (37, 4001), (5000, 5000)]
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def make(kind: str, options: TilingOptions) -> Choice:
    return Choice(type=kind, options=options)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize(("least", "most"), [(1, 12), (4, 9), (1, 1), (2, 6)])
def test_grid_is_the_published_one(width: int, height: int, least: int, most: int) -> None:
    views = plan(make("grid", GridOptions(min_tiles=least, max_tiles=most)), (448, 448), width, height)
    assert (views.columns, views.rows) == nearest_in_shape((height, width), (448, 448), least, most)
    assert views.num_views == views.rows * views.columns + (views.rows * views.columns > 1)
    views = plan(make("grid", GridOptions(choose="scale", max_tiles=most)), (448, 448), width, height)
    assert (views.columns, views.rows) == least_enlarged((height, width), (448, 448), 1, most)


@pytest.mark.parametrize(("width", "height"), [*SIZES, (448, 448), (447, 449), (900, 900), (1344, 449)])
@pytest.mark.parametrize("most", [36, 16, 2, 1])
def test_largest_grid_is_the_published_one(width: int, height: int, most: int) -> None:
    theirs = PerceptionLMImageProcessor(max_num_tiles=most)
    sizes = {"img_width": width, "img_height": height, "tile_size": 448}
    expected = theirs._fit_image_to_canvas(**sizes) or theirs._find_closest_aspect_ratio(**sizes)
    options = GridOptions(choose="largest", max_tiles=most, thumbnail_always=True)
    views = plan(make("grid", options), (448, 448), width, height)
    assert (views.columns, views.rows) == expected
    assert views.num_views == views.rows * views.columns + 1


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_canvas_of_anyres_is_the_published_one(width: int, height: int) -> None:
    views = plan(make("anyres", AnyresOptions(pinpoints=PINPOINTS)), (336, 336), width, height)
    assert views.canvas[::-1] == select_best_resolution((height, width), [list(x) for x in PINPOINTS])


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize(("edge", "tile"), [(1456, 364), (2048, 512), (1536, 384), (6000, 500)])
def test_split_is_the_published_one(width: int, height: int, edge: int, tile: int) -> None:
    views = plan(make("split", SplitOptions(longest_edge=edge)), (tile, tile), width, height)
    processor = Idefics3ImageProcessorPil(size={"longest_edge": edge}, max_image_size={"longest_edge": tile})
    number, rows, columns = processor.get_number_of_image_patches(height, width)
    assert views.num_views == number
    assert (views.size.rows, views.size.columns) == (rows, columns)


class _Tokens:
    """Stands for a tensor [C, H, W], of which unpad_image asks the shape and takes a slice."""

    def __init__(self, height: int, width: int) -> None:
        self.shape = (1, height, width)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> _Tokens:
        return _Tokens(*(len(range(n)[s]) for n, s in zip(self.shape[1:], index[1:], strict=True)))


@pytest.mark.parametrize(("width", "height"), [x for x in SIZES if x != (37, 4001)])
@pytest.mark.parametrize("shrink", [None, 9, 2])
def test_kept_tokens_are_the_published_ones(width: int, height: int, shrink: int | None) -> None:
    options = AnyresOptions(pinpoints=PINPOINTS, shrink_beyond=shrink)
    size = plan(make("anyres", options), (336, 336), width, height).size
    kept = unpad(options, size, (24, 24))
    theirs = unpad_image(_Tokens(size.rows * 24, size.columns * 24), (height, width)).shape[1:]
    assert (kept.height, kept.width) == theirs
    if shrink is not None:
        published = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        published.vision_aspect_ratio = f"anyres_max_{shrink}"
        tokens, newlines = published._get_unpadded_features(height, width, 24, 24, size.rows, size.columns)
        assert (kept.shape[0] * kept.shape[1], kept.shape[0]) == (tokens, newlines)


def test_most_tiles_hold_for_every_tiling() -> None:
    for kind, options in (
        ("grid", GridOptions()),
        ("grid", GridOptions(min_tiles=6)),
        ("anyres", AnyresOptions(pinpoints=((336, 336), *PINPOINTS))),
        ("split", SplitOptions(longest_edge=2000)),
        ("split", SplitOptions(longest_edge=1680, rules="nanovlm")),
    ):
        for most in (1, 2, 4):
            found = [plan(make(kind, limit_tiles(options, most)), (336, 336), w, h) for w, h in SIZES if w > 37]
            assert max(x.rows * x.columns for x in found) <= most
            assert most == 1 or max(x.rows * x.columns for x in found) > 1
    with pytest.raises(CompositionError, match="its tiling is none"):
        limit_tiles(TilingOptions(), 3)


def test_a_picture_of_one_view_is_as_one_without_tiling() -> None:
    assert plan(make("grid", GridOptions()), (448, 448), 448, 448).size == MediumSize()
    assert plan(make("none", TilingOptions()), (448, 448), 4480, 448).size == MediumSize()
    whole = plan(make("anyres", AnyresOptions(pinpoints=((448, 448),))), (448, 448), 100, 100).size
    assert whole == MediumSize(2, 1, 1, 100, 100) and whole.has_thumbnail


def test_thin_pictures_are_refused() -> None:
    options = AnyresOptions(pinpoints=PINPOINTS)
    with pytest.raises(MediaError, match="1x4001 pixels is too thin"):
        plan(make("anyres", options), (336, 336), 1, 4001)
    size = plan(make("anyres", options), (336, 336), 20, 4001).size
    with pytest.raises(MediaError, match="20x4001 pixels is too thin"):
        unpad(options, size, (24, 24))


def test_tiles_of_another_size_than_the_encoder_reads_are_refused() -> None:
    with pytest.raises(CompositionError, match=r"tile_size is 448, but the vision encoder reads 224x224 pixels"):
        check_tiling(make("grid", GridOptions(tile_size=448)), (224, 224))
    check_tiling(make("grid", GridOptions(tile_size=224)), (224, 224))
    with pytest.raises(CompositionError, match=r"holds \[336, 672\], which is .* Give multiples of 224\.$"):
        check_tiling(make("anyres", AnyresOptions(pinpoints=PINPOINTS)), (224, 224))
    with pytest.raises(CompositionError, match=r"the smallest of tiling.pinpoints has 2"):
        check_tiling(make("anyres", AnyresOptions(pinpoints=PINPOINTS, max_tiles=1)), (336, 336))
    with pytest.raises(CompositionError, match="not a multiple of the 224"):
        check_tiling(make("split", SplitOptions(longest_edge=500, rules="nanovlm")), (224, 224))


# -- texts -------------------------------------------------------------------------------------------------------------

SMOLVLM = SplitOptions(
    tile_text="<fake><row_{row}_col_{column}>{image}",
    row_end_text="\n",
    thumbnail_text="\n<fake><global-img>{image}<fake>",
    whole_text="<fake><global-img>{image}<fake>",
)


def test_texts_stand_where_the_published_processor_puts_them() -> None:
    for rows, columns in ((0, 0), (1, 2), (3, 2)):
        size = MediumSize(rows * columns + 1, rows, columns)
        runs = render(SMOLVLM, size)
        theirs = get_image_prompt_string(
            rows, columns, 2, fake_token_around_image="<fake>", image_token="I", global_image_token="<global-img>"
        )
        assert "".join("II" * x if isinstance(x, int) else x for x in runs) == theirs
        assert sum(x for x in runs if isinstance(x, int)) == size.num_frames


def test_views_without_texts_are_one_run() -> None:
    assert render(TilingOptions(picture_text="a{views}b"), MediumSize()) == ("a", 1, "b")
    assert render(GridOptions(picture_text="<img>{views}</img>"), MediumSize(5, 2, 2)) == ("<img>", 5, "</img>")
    assert render(GridOptions(tile_text="TILE_{number}{image}", thumbnail="none"), MediumSize(2, 1, 2)) == (
        *("TILE_1", 1, "TILE_2", 1),
    )
    assert render(SMOLVLM, MediumSize(8)) == (8,)  # the frames of a clip


def test_all_texts_of_a_tiling_are_listed() -> None:
    texts = list_texts(make("split", SMOLVLM), (512, 512))
    assert len(texts) == len(set(texts)) == 4 * 4 + 3  # tiles; the thumbnail, the whole picture, and what ends both
    for width, height in SIZES:
        size = plan(make("split", SMOLVLM), (512, 512), width, height).size
        assert {x for x in render(SMOLVLM, size) if isinstance(x, str)} <= set(texts)


def test_examples() -> None:
    assert doctest.testmod(vlm_cli.tiling.grid).failed == 0
