"""Pictures cut into tiles: the arrangement of their vision tokens and the text that announces them, against slow loops.

A tile has 2 x 2 vision tokens. `Tiled` holds pictures of several numbers of tiles in one batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import tiny
from tests.support.invariants import bare, differs, logits, opened, same
from tests.support.tiny import IMAGE, VOCABULARY
from vlm_cli.composition import AnyresOptions, Choice
from vlm_cli.errors import CompositionError
from vlm_cli.modeling.arrangement import Arrangement
from vlm_cli.modeling.batching import stack_media
from vlm_cli.modeling.budget import ContextBudget
from vlm_cli.modeling.prompt_cache import PromptCache
from vlm_cli.modeling.vlm import VLM
from vlm_cli.tiling import MediumSize, plan

PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32], [96, 96]]
ANYRES = {"type": "anyres", "pinpoints": PINPOINTS}
TEXTS = {
    "picture_text": "<{views}>",
    "tile_text": "r{row}c{column}{image}",
    "row_end_text": "\n",
    "thumbnail_text": "*{image}",
}
GRID = {"type": "grid", "max_tiles": 6}
TILINGS: dict[str, dict[str, Any]] = {
    "grid": GRID,
    "grid with texts": GRID | TEXTS,
    "thumbnail first": GRID | TEXTS | {"thumbnail": "first"},
    "no thumbnail": GRID | TEXTS | {"thumbnail": "none"},
    "none with texts": {"type": "none", "picture_text": "<{views}>"},
    "anyres": ANYRES,
    "anyres with texts": ANYRES | {"picture_text": "<{views}>", "thumbnail": "last"},
    "anyres shrinks": ANYRES | {"shrink_beyond": 2},
    "anyres keeps bars": ANYRES | {"unpad": False, "newline": False},
}


@cache
def tiled_model(tiling: str, fusion: str = "language-stream", tokenizer: str = "linear") -> VLM:
    return opened(fusion=fusion, tokenizer=tokenizer, tiling=TILINGS[tiling])


def size_of(model: VLM, rows: int, columns: int, height: int = 0, width: int = 0) -> MediumSize:
    """A picture of so many tiles, with a thumbnail where the tiling has one."""
    tiling = model.config.composition.tiling
    if tiling.type == "none" or rows * columns < (1 if tiling.type == "anyres" else 2):
        return MediumSize()
    num_views = rows * columns + (tiling.options.thumbnail != "none")
    return MediumSize(num_views, rows, columns, height or rows * tiny.SIZE, width or columns * tiny.SIZE)


@dataclass
class Tiled:
    """Rows of pictures, and the sizes of each row's."""

    sizes: list[list[MediumSize]]
    pixels: list[list[Tensor]]  # float[F, C, H, W] of each picture
    texts: list[list[int]]

    @classmethod
    def draw(cls, sizes: Sequence[Sequence[MediumSize]]) -> Tiled:
        tiny.seed_torch(7)
        pixels = [[torch.randn(size.num_frames, 3, tiny.SIZE, tiny.SIZE) for size in row] for row in sizes]
        texts = []
        for row in sizes:
            text = torch.randint(1, VOCABULARY, (3 + 2 * len(row),)).tolist()
            text[1 : 2 * len(row) : 2] = [IMAGE] * len(row)
            texts.append(text)
        return cls([list(row) for row in sizes], pixels, texts)

    def inputs(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        pixels, mask = stack_media(self.pixels[rows])
        grid, _ = stack_media([[torch.tensor([size.grid]) for size in row] for row in self.sizes[rows]])
        texts = self.texts[rows]
        length = max(map(len, texts))
        lang_x = torch.tensor([[tiny.PAD] * (length - len(text)) + text for text in texts])
        return {
            "vision_x": pixels,
            "vision_mask": mask,
            "vision_grid": grid[:, :, 0],
            "lang_x": lang_x,
            "attention_mask": (lang_x != tiny.PAD).long(),
        }


def draw(model: VLM) -> Tiled:
    wide, tall = size_of(model, 2, 2, 37, 90), size_of(model, 3, 1, 95, 20)
    return Tiled.draw([[wide, size_of(model, 1, 1), tall], [size_of(model, 1, 2, 21, 60), wide]])


# -- slow loops --------------------------------------------------------------------------------------------------------


def arrange_slowly(
    views: Tensor, size: MediumSize, options: Any, newline: Tensor | None, grid: tuple[int, int] = (2, 2)
) -> list[Tensor]:
    """float[F, v, d] -> the vision tokens of one picture, token by token.

    Source: section 3.1 of LLaVA-NeXT's and appendix of LLaVA-OneVision's reports, with Transformers' rounding.
    """
    h, w = grid
    ends = [] if newline is None else [newline]
    if not size.rows:
        return [*views.flatten(0, 1), *ends]
    first = options.thumbnail == "first"
    whole, tiles = (views[0], views[1:]) if first else (views[-1], views[:-1])
    rows, columns = size.rows * h, size.columns * w
    top = left = 0
    if options.unpad and size.width * rows > columns * size.height:  # bars above and below
        top = (rows - math.floor(size.height * columns / size.width + 1e-7)) // 2
    elif options.unpad:
        left = (columns - math.floor(size.width * rows / size.height + 1e-7)) // 2
    picture = [
        [tiles[(y // h) * size.columns + x // w][(y % h) * w + x % w] for x in range(left, columns - left)]
        for y in range(top, rows - top)
    ]
    if options.shrink_beyond is not None:
        ratio = math.sqrt(len(picture) * len(picture[0]) / (options.shrink_beyond * h * h))
        if ratio > 1.1:
            picture = shrink_slowly(picture, int(len(picture) // ratio), int(len(picture[0]) // ratio))
    of_tiles = [token for row in picture for token in (*row, *ends)]
    return [*whole, *of_tiles] if first else [*of_tiles, *whole]


def shrink_slowly(picture: list[list[Tensor]], height: int, width: int) -> list[list[Tensor]]:
    """Interpolate between the four tokens around each new one; centres are aligned, edges are repeated."""

    def between(place: int, new: int, old: int) -> tuple[int, int, float]:
        at = max((place + 0.5) * old / new - 0.5, 0)
        low = min(int(at), old - 1)
        return low, min(low + 1, old - 1), at - low

    found = []
    for y in range(height):
        y0, y1, down = between(y, height, len(picture))
        row = []
        for x in range(width):
            x0, x1, across = between(x, width, len(picture[0]))
            upper = (1 - across) * picture[y0][x0] + across * picture[y0][x1]
            lower = (1 - across) * picture[y1][x0] + across * picture[y1][x1]
            row.append((1 - down) * upper + down * lower)
        found.append(row)
    return found


def write_slowly(options: Any, size: MediumSize) -> list[str | int]:
    """What stands in the place of `<image>`: texts, and the number of a view for its tokens; -1 for all tokens."""
    before, after = options.picture_text.split("{views}")
    if not hasattr(options, "tile_text"):
        return [before, -1, after]
    if not size.rows:
        views: list[str | int] = [options.thumbnail_text.removesuffix("{image}"), 0]
    else:
        first = options.thumbnail == "first"
        whole = [options.thumbnail_text.removesuffix("{image}"), 0 if first else size.num_frames - 1]
        views = whole if first else []
        number = int(first)
        for row in range(size.rows):
            for column in range(size.columns):
                text = options.tile_text.removesuffix("{image}")
                views = [*views, text.format(row=row + 1, column=column + 1), number]
                number += 1
            views = [*views, options.row_end_text]
        views = [*views, *whole] if options.thumbnail == "last" else views
    return [before, *views, after]


@torch.no_grad()
def stream_logits_slowly(model: VLM, tiled: Tiled, b: int) -> Tensor:
    """float[T_txt, VOCABULARY] of one row, from embeddings that loops put together."""
    table, added = bare(model).get_input_embeddings(), model.added_tokens.embedding.weight
    options, newline = model.config.composition.tiling.options, getattr(model.arrangement, "newline", None)
    embeddings: list[Tensor] = []
    last, medium = [], 0
    for token in tiled.texts[b]:
        if token != IMAGE:
            embeddings.append(table(torch.tensor(token)) if token < VOCABULARY else added[token - VOCABULARY])
        else:
            features = model.vision_encoder(tiled.pixels[b][medium][None, None])
            views = model.vision_tokenizer.proj(features)[0, 0]  # [F, v, d]
            size = tiled.sizes[b][medium]
            for piece in write_slowly(options, size):
                if isinstance(piece, str):  # where texts meet, a tokenizer would read them as one; `spell` does not
                    embeddings += [table(torch.tensor(i)) for i in tiny.spell(piece)]
                elif model.arrangement is not None:
                    embeddings += arrange_slowly(views, size, options, newline)
                else:
                    embeddings += list(views.flatten(0, 1) if piece < 0 else views[piece])
            medium += 1
        last.append(len(embeddings) - 1)
    return bare(model)(inputs_embeds=torch.stack(embeddings)[None]).logits[0, last]


# -- the language stream -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiling", TILINGS)
def test_a_batch_of_tiled_pictures_equals_slow_loops(tiling):
    model = tiled_model(tiling)
    tiled = draw(model)
    found = logits(model, **tiled.inputs())[..., :VOCABULARY]
    for b, text in enumerate(tiled.texts):
        expected = stream_logits_slowly(model, tiled, b)
        same(found[b, -len(text) :], expected)
        if tiled.sizes[b][0].rows:
            tiled.pixels[b][0] = tiled.pixels[b][0].roll(1, 0)  # other tiles at each place
            assert differs(found[b, -len(text) :], stream_logits_slowly(model, tiled, b))


@pytest.mark.sample(3)
@pytest.mark.parametrize("height,width", [(40, 40), (30, 100), (100, 30), (17, 64), (64, 17), (96, 95), (20, 96)])
@pytest.mark.parametrize("shrink", [None, 1, 3])
@pytest.mark.parametrize("grid", [(2, 2), (3, 3)], ids=str)
def test_the_arrangement_equals_a_slow_loop(height, width, shrink, grid):
    """For pictures with bars at either side, and for odd grids."""
    options = AnyresOptions(pinpoints=PINPOINTS, shrink_beyond=shrink)
    arrangement = Arrangement(options, grid, 8)
    size = plan(Choice(type="anyres", options=options), (32, 32), width, height).size
    views = torch.randn(size.num_frames, grid[0] * grid[1], 8)
    expected = torch.stack(arrange_slowly(views, size, options, arrangement.newline, grid))
    found = arrangement.arrange(views.flatten(0, 1), size)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert arrangement.num_tokens(size) == len(found)
    assert differs(found, arrangement.arrange(views.roll(1, 0).flatten(0, 1), size))


# -- every fusion ------------------------------------------------------------------------------------------------------

each_fusion = pytest.mark.parametrize("fusion", tiny.FUSIONS)


@pytest.mark.sample(4)
@each_fusion
@pytest.mark.parametrize("tiling", TILINGS)
def test_positions_are_those_of_the_key_value_cache(tiling, fusion):
    model = tiled_model(tiling, fusion)
    tiled = draw(model)
    budget = ContextBudget.of(model)
    for b, text in enumerate(tiled.texts):
        output = model(**tiled.inputs(slice(b, b + 1)), use_cache=True)
        positions = budget.positions(len(text), tiled.sizes[b])
        assert positions == output.past_key_values.get_seq_length()
        assert (positions > len(text)) == (model.splices_media or bool(model.config.tiling_texts))


@pytest.mark.sample(3)
@each_fusion
@pytest.mark.parametrize("tiling", ["grid with texts", "anyres", "anyres with texts"])
def test_a_row_does_not_depend_on_its_batch_nor_on_padding(tiling, fusion):
    """Rows have other numbers of tiles, so views and vision tokens are padded; padding holds any number."""
    model = tiled_model(tiling, fusion)
    tiled = draw(model)
    inputs = tiled.inputs()
    padding = ~inputs["vision_mask"][..., None, None, None]
    together = logits(model, **inputs | {"vision_x": inputs["vision_x"].where(~padding, 1e3)})
    for b, text in enumerate(tiled.texts):
        alone = logits(model, **tiled.inputs(slice(b, b + 1)))[0]
        same(together[b, -len(text) :], alone[-len(text) :])
    assert differs(together, logits(model, **inputs | {"vision_x": inputs["vision_x"].flip(0)}))


@pytest.mark.sample(2)
@each_fusion
@pytest.mark.parametrize("tiling", ["grid with texts", "anyres"])
def test_decoding_with_a_cache_equals_reading_everything(tiling, fusion):
    model = tiled_model(tiling, fusion)
    inputs = draw(model).inputs()
    sequences = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(sequences[:, : inputs["lang_x"].shape[1]], inputs["lang_x"])
    for step in range(3, 0, -1):
        lang_x = sequences[:, :-step]
        mask = nnf.pad(inputs["attention_mask"], (0, 3 - step), value=1)
        found = logits(model, **inputs | {"lang_x": lang_x, "attention_mask": mask})[:, -1]
        found[:, IMAGE] = -torch.inf
        assert torch.equal(found.argmax(-1), sequences[:, -step])


@each_fusion
def test_encoded_media_and_a_prompt_cache_give_the_same_answer(fusion):
    model = tiled_model("grid with texts", fusion)
    tiled = draw(model)
    inputs = tiled.inputs(slice(1))
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    tokens, mask = model.encode_vision(inputs["vision_x"], inputs["vision_mask"], inputs["vision_grid"])
    given = {key: inputs[key] for key in ("lang_x", "attention_mask", "vision_grid")}
    encoded = given | {"vision_tokens": tokens, "media_mask": mask}
    cache = PromptCache()
    for _ in range(2):
        found = model.generate(**encoded, max_new_tokens=4, do_sample=False, prompt_cache=cache)
        assert torch.equal(found, expected)
    assert cache.reused == ContextBudget.of(model).positions(len(tiled.texts[0]), tiled.sizes[0]) - 1
    with model.conditioned(**{k: x for k, x in encoded.items() if k != "vision_tokens"}, vision_tokens=tokens) as words:
        ids = model.lang_model.generate(**words, max_new_tokens=4, do_sample=False)
    assert torch.equal(ids[:, -4:], expected[:, -4:])
    with pytest.raises(ValueError, match="row 0 has a medium of 20 vision tokens, but vision_grid says that"):
        model.generate(**encoded | {"vision_grid": inputs["vision_grid"].flip(1)}, max_new_tokens=1)


@pytest.mark.parametrize("tiling", ["grid", "grid with texts", "anyres"])
def test_with_attend_last_text_sees_all_views_of_the_last_picture_and_none_of_another(tiling):
    model = tiled_model(tiling, "cross-attention")
    tiled = draw(model)
    inputs, text = tiled.inputs(slice(1)), tiled.texts[0]
    expected = logits(model, **inputs)[0]
    starts = [i for i, token in enumerate(text) if token == IMAGE] + [len(text)]
    for medium, size in enumerate(tiled.sizes[0]):
        for view in range(size.num_frames):
            pixels = inputs["vision_x"].clone()
            pixels[0, medium, view] *= -1
            found = logits(model, **inputs | {"vision_x": pixels})[0]
            same(found[: starts[medium]], expected[: starts[medium]])
            here = slice(starts[medium], starts[medium + 1])
            assert differs(found[here], expected[here])


@pytest.mark.parametrize("tokenizer", ["perceiver", "qformer"])
@each_fusion
def test_a_tokenizer_that_reads_views_together_gives_its_tokens_once(fusion, tokenizer):
    model = tiled_model("grid", fusion, tokenizer)
    tiled = draw(model)
    inputs = tiled.inputs()
    tokens, mask = model.encode_vision(inputs["vision_x"], inputs["vision_mask"], inputs["vision_grid"])
    assert mask.sum(-1).tolist() == [[3, 3, 3], [3, 3, 0]]
    found = logits(model, **inputs)
    same(found[1, -len(tiled.texts[1]) :], logits(model, **tiled.inputs(slice(1, 2)))[0])


# -- work --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiling", ["grid with texts", "anyres"])
def test_each_distinct_view_is_encoded_once_and_padding_never(tiling, monkeypatch):
    model = tiled_model(tiling)
    tiled = draw(model)
    tiled.pixels[1][1] = tiled.pixels[0][0]  # a picture that another row shows too
    tiled.pixels[0][2][1] = tiled.pixels[0][2][0]  # two equal tiles
    read: list[int] = []
    forward = model.vision_encoder.forward
    monkeypatch.setattr(model.vision_encoder, "forward", lambda x: read.append(x.shape[:3].numel()) or forward(x))
    logits(model, **tiled.inputs())
    shown = sum(size.num_frames for row in tiled.sizes for size in row)
    assert read == [shown - tiled.sizes[1][1].num_frames - 1]
    read.clear()
    plain = Tiled.draw([[MediumSize()]])
    logits(model, **plain.inputs())
    assert read == [1]


class Operations(TorchDispatchMode):
    """Counts torch's operations by name, and the numbers that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.counts[str(function)] += 1
        self.numbers += sum(x.numel() for x in (found if isinstance(found, tuple) else [found]) if torch.is_tensor(x))
        return found


def count_operations(model: VLM, inputs: dict[str, Tensor]) -> Operations:
    with Operations() as found:
        logits(model, **inputs)
    return found


@pytest.mark.parametrize("fusion", ["language-stream", "cross-attention"])
def test_a_picture_without_tiles_costs_what_it_did(fusion):
    """As many operations, on as many numbers, as in a model that cuts no picture."""
    drawn = Tiled.draw([[MediumSize(), MediumSize()]])
    inputs = {k: x for k, x in drawn.inputs().items() if k != "vision_grid"}
    plain = count_operations(opened(fusion=fusion, tokenizer="linear"), inputs)
    found = count_operations(tiled_model("grid", fusion), inputs)
    assert found.counts == plain.counts and found.numbers == plain.numbers
    tiled = Tiled.draw([[size_of(tiled_model("grid", fusion), 1, 2), MediumSize()]])
    assert count_operations(tiled_model("grid", fusion), tiled.inputs()).numbers > 1.2 * found.numbers  # the twin


def test_a_picture_without_tiles_needs_no_grid():
    model = tiled_model("grid with texts")
    inputs = Tiled.draw([[MediumSize(), MediumSize()]]).inputs()
    expected = logits(model, **inputs)
    assert torch.equal(logits(model, **{k: x for k, x in inputs.items() if k != "vision_grid"}), expected)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_grid_of_another_shape_is_refused():
    model = tiled_model("anyres")
    inputs = draw(model).inputs()
    with pytest.raises(ValueError, match=r"vision_grid must be \(B, T_img, 4\) = \(2, 3, 4\), got \(2, 3, 3\)"):
        model(**inputs | {"vision_grid": inputs["vision_grid"][..., :3]})


@pytest.mark.parametrize("tokenizer", ["perceiver", "qformer", {"type": "linear", "frames": "mean"}], ids=str)
def test_anyres_needs_a_grid_of_tokens_for_each_tile(tokenizer):
    with pytest.raises(CompositionError, match="puts the vision tokens of tiles side by side"):
        tiny.build(tokenizer=tokenizer, tiling=ANYRES)


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_pool": 2},
        {"clip_pool": 2, "clip_newline": False},
        {"clip_pool": 2, "clip_pool_by": "bilinear", "clip_pool_at": "after"},
        {"newline": False},
    ],
    ids=str,
)
def test_clips_are_pooled_beside_pictures(settings):
    """The 2 x 2 patches of a frame become one, before the map or after it, and those of pictures stay."""
    model = opened(fusion="language-stream", tokenizer="mlp", tiling=ANYRES | settings)
    picture, clip, frame = size_of(model, 1, 2, 21, 60), MediumSize(3), MediumSize(1)
    drawn = Tiled.draw([[picture, clip], [clip], [frame, picture]])
    inputs = {key: x for key, x in drawn.inputs().items() if key.startswith("vision")}
    with torch.no_grad():
        tokens, mask = model.encode_vision(**inputs)
        for b, row in enumerate(drawn.sizes):
            for t, size in enumerate(row):
                found, pixels = tokens[b, t][mask[b, t]], drawn.pixels[b][t]
                assert len(found) == model.num_vision_tokens(size)
                alone = model.encode_vision(pixels[None, None], None, torch.tensor([[size.grid]]))[0][0, 0]
                torch.testing.assert_close(found, alone)
                if size.rows:
                    continue
                features, projection = model.vision_encoder(pixels[None, None])[0, 0], model.vision_tokenizer.proj
                if "clip_pool" not in settings:
                    expected = projection(features).flatten(0, 1)
                elif settings.get("clip_pool_at") == "after":
                    expected = projection(features).mean(1)
                else:
                    expected = projection(features.mean(1))
                newline = model.arrangement.newline
                if newline is not None and settings.get("clip_newline", True):
                    expected = torch.cat([expected, newline[None]])
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_patches_that_cannot_be_pooled_are_refused():
    with pytest.raises(
        CompositionError, match=r"tiling\.clip_pool=3 does not fit.*--set tiling\.clip_pool_by=bilinear"
    ):
        opened(fusion="language-stream", tokenizer="mlp", tiling=ANYRES | {"clip_pool": 3})
    shuffled = {"type": "mlp", "pool": 2}
    with pytest.raises(CompositionError, match=r"which merges patches itself\. Set tiling\.clip_pool_at to after"):
        opened(
            fusion="language-stream", tokenizer=shuffled, tiling=ANYRES | {"clip_pool": 2, "clip_pool_by": "bilinear"}
        )
