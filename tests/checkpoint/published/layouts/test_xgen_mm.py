"""xGen-MM, against Transformers' SigLIP and Phi-3 with the same weights and a Perceiver of slow loops."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel
from transformers.image_processing_utils import select_best_resolution

from tests.support import reference
from tests.support.grid import first_of
from tests.support.photographs import photograph
from tests.support.published import (
    SIZE,
    VOCABULARY,
    Case,
    check,
    load,
    prompt,
    register_siglip,
    rewrite_config,
    shapes_of,
    sized,
    write_tokenizer,
)
from tests.support.swaps import check_swap, other_parts
from tests.support.tiled import AFTER, BEFORE, TiledCase, check_tiled
from tests.support.tiny import stir
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.checkpoint.published.recognising import recognise
from vlm_cli.checkpoint.published.towers import siglip
from vlm_cli.composition import CompositionRequest, PerceiverOptions
from vlm_cli.errors import CheckpointError, CompositionError
from vlm_cli.modeling.vision_tokenizers.perceiver import PerceiverResampler

WIDTH, LAYERS, HEADS, PATCH = 24, 2, 2, 8  # of the tower, which gives 4×4 patches
DIM = 32  # of the language model
IMAGE, PLACEHOLDER, END = range(VOCABULARY, VOCABULARY + 3)
TOWER = register_siglip("tiny_siglip_of_xgen_mm", width=WIDTH, layers=LAYERS, heads=HEADS, patch=PATCH)


@pytest.fixture(autouse=True)
def tower(monkeypatch):
    monkeypatch.setitem(siglip.SIGLIP_TOWERS, (WIDTH, LAYERS, HEADS, PATCH), TOWER)


class Parts:
    """xGen-MM's parts with random weights."""

    def __init__(self, *, has_head: bool = True) -> None:
        torch.manual_seed(3)
        vision = SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=SIZE,
            patch_size=PATCH,
            vision_use_head=has_head,
        )
        self.tower = stir(SiglipVisionModel(vision), seed=5)
        options = PerceiverOptions(depth=2, num_heads=2, head_dim=96, num_latents=3)
        self.perceiver = stir(PerceiverResampler(options, WIDTH, 16, DIM), 0.3, seed=5)
        self.text = Phi3Config(
            vocab_size=VOCABULARY + 8,  # rows are padded
            hidden_size=DIM,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=0,
            eos_token_id=1,
            max_position_embeddings=256,
            sliding_window=200,
        )
        self.lm = stir(Phi3ForCausalLM(self.text), seed=5)
        self.rows, self.fc = nn.Embedding(3, DIM), nn.Linear(DIM, 3)
        self.bias = torch.randn(VOCABULARY + 8)

    def tensors(self, prefix: str = "vlm.") -> dict[str, Tensor]:
        """Return all tensors under published names, with a bias of the head that Phi-3 does not have."""
        named = {f"vision_encoder.{k.removeprefix('vision_model.')}": x for k, x in self.tower.state_dict().items()}
        named |= {f"vision_tokenizer.{k}": x for k, x in self.perceiver.state_dict().items()}
        named |= {f"lang_model.{k}": x for k, x in self.lm.state_dict().items()}
        named["lang_model.model.embed_tokens.additional_embedding.weight"] = self.rows.weight
        named |= {f"lang_model.lm_head.additional_fc.{k}": x for k, x in self.fc.state_dict().items()}
        named["lang_model.lm_head.bias"] = self.bias
        return {f"{prefix}{k}": x.detach().clone() for k, x in named.items()}

    @torch.no_grad()
    def logits(self, lang_x: Tensor, vision_x: Tensor, *, has_bias: bool = True) -> Tensor:
        """int[1, T], float[1, T_img, 1, 3, H, W] -> float[T, VOCABULARY + 3], at the last position of each medium."""
        features = self.tower(vision_x[0, :, 0]).last_hidden_state  # [T_img, v, d]
        media = reference.perceiver(self.perceiver, features[None, :, None], torch.ones(1, len(features), 1).bool())
        table = self.lm.get_input_embeddings()

        def embed(token: int) -> Tensor:
            return self.rows.weight[token - IMAGE] if token >= IMAGE else table.weight[token]

        embeddings, last = reference.splice(lang_x[0], IMAGE, embed, list(media[0]))
        hidden = self.lm.model(inputs_embeds=embeddings[None]).last_hidden_state[0, last]
        words = hidden @ self.lm.lm_head.weight.T + (self.bias if has_bias else 0)
        return torch.cat([words[:, :VOCABULARY], self.fc(hidden)], dim=1)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts()


def xgen_mm(folder: Path, parts: Parts, tensors: dict[str, Tensor] | None = None, **text: Any) -> Case:
    """Write a directory as on the hub."""
    save_file(parts.tensors() if tensors is None else tensors, folder / "model.safetensors")
    # What older releases of Transformers wrote is in it, too.
    older = {
        "_attn_implementation": "flash_attention_2",
        "torch_dtype": "bfloat16",
        "max_length": 20,
        "tf_legacy_loss": 0,
    }
    own = {"initial_tokenizer_len": VOCABULARY, "rope_theta": 10000.0, "rope_scaling": None, **text}
    values = {k: x for k, x in parts.text.to_dict().items() if k not in ("rope_parameters", "dtype")}
    data = {"model_type": "xgenmm", "text_config": {**values, **older, **own}}
    (folder / "config.json").write_text(json.dumps(data))
    write_tokenizer(folder, pad="w0")

    def words(lang_x: Tensor, vision_x: Tensor) -> Tensor:
        return parts.logits(lang_x, vision_x)[:, :VOCABULARY]

    return Case(source=folder, logits=words, made_by="Transformers' SigLIP and Phi-3, a Perceiver of slow loops")


def raw(folder: Path, parts: Parts, tensors: dict[str, Tensor]) -> Case:
    """Write a file of training, and the language model's configuration elsewhere."""
    (folder / "lm").mkdir()
    parts.text.save_pretrained(folder / "lm")
    write_tokenizer(folder / "lm", pad="w0")
    torch.save({"model_state_dict": {f"module.{k}": x for k, x in tensors.items()}}, folder / "checkpoint.pt")
    flags = CompositionRequest(language_model=str(folder / "lm"))
    return replace(xgen_mm(folder, parts), source=folder / "checkpoint.pt", options=flags)


def worst(case: Case, parts: Parts, **settings: Any) -> float:
    """Return the largest difference of any logit; the prompt has each of the added tokens."""
    model = load(case).model
    lang_x, vision_x = prompt(model)
    theirs = lang_x.clone()
    for place, name, token in ((-1, "<image placeholder>", PLACEHOLDER), (-2, "<|endofchunk|>", END)):
        lang_x[0, place] = model.config.first_added_id + model.config.added_tokens.index(name)
        theirs[0, place] = token
    text = (lang_x[0] != model.config.media_token_id).nonzero().flatten()
    with torch.no_grad():
        ours = model(lang_x=lang_x, vision_x=vision_x).logits[0, text]
    expected = parts.logits(theirs, vision_x, **settings)[text]
    return float((ours[:, : expected.shape[1]] - expected).abs().max())


@pytest.mark.matrix
def test_published_directory(tmp_path, parts):
    case = xgen_mm(tmp_path, parts)
    check(case, is_told=True)
    assert worst(case, parts) <= 1e-4
    imported = load(case)
    assert imported.layout.name == "xGen-MM" and not imported.report.unused and not imported.report.absent
    assert imported.model.config.added_tokens == ["<image>", "<image placeholder>", "<|endofchunk|>"]
    assert imported.model.config.text_config.sliding_window == 200


@pytest.mark.matrix
@pytest.mark.parametrize("prefix", first_of(["", "vlm."]))
def test_file_of_training(tmp_path, parts, prefix):
    check(case := raw(tmp_path, parts, parts.tensors(prefix)))
    assert worst(case, parts) <= 1e-4


class Tiled(nn.Module):
    """xGen-MM with tiles: its code from a picture to logits, by slow loops over the patches of the canvas."""

    def __init__(self, parts: Parts, folder: Path) -> None:
        super().__init__()
        self.parts, self.tokenizer = parts, PreTrainedTokenizerFast.from_pretrained(folder)

    def __call__(self, *, text: str = "", images: Any = None, **inputs: Any) -> Any:
        """Stand for the processor if there is a text, and for the model otherwise."""
        return self.read(text, images[0]) if text else SimpleNamespace(logits=self.logits(**inputs)[None])

    def read(self, text: str, image: Image.Image) -> dict[str, Any]:
        """`process_anyres_image`, and the ids with `<image>` once for each vision token."""
        canvases = [(c * SIZE, r * SIZE) for c, r in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
        height, width = select_best_resolution(image.size[::-1], [x[::-1] for x in canvases])
        scale = min(width / image.width, height / image.height)
        size = (min(ceil(image.width * scale), width), min(ceil(image.height * scale), height))
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image.resize(size), ((width - size[0]) // 2, (height - size[1]) // 2))
        boxes = [(x, y, x + SIZE, y + SIZE) for y in range(0, height, SIZE) for x in range(0, width, SIZE)]
        views = [image.resize((SIZE, SIZE)), *(canvas.crop(box) for box in boxes)]
        pixels = torch.stack([(to_tensor(view) - 0.5) / 0.5 for view in views])
        words = text.split()
        ids = [IMAGE if word == "<image>" else int(word[1:]) for word in words]
        at = ids.index(IMAGE)
        ids[at : at + 1] = [IMAGE] * (3 * len(views))
        shape = (height // SIZE, width // SIZE, *image.size)
        return {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "shape": torch.tensor(shape)}

    def media(self, pixel_values: Tensor, shape: Tensor) -> Tensor:
        features = self.parts.tower(pixel_values).last_hidden_state  # [F, v, d]
        rows, columns = shape.tolist()[:2]
        side = SIZE // PATCH
        patches = []  # (patch, whether it stands for the picture) of the canvas, row by row
        for y in range(rows * side):
            for x in range(columns * side):
                tile = 1 + (y // side) * columns + x // side
                patches.append((features[tile, (y % side) * side + x % side], self.shows(x, y, shape)))
        groups = [[(patch, True) for patch in features[0]]]
        groups += [patches[i : i + side**2] for i in range(0, len(patches), side**2)]
        return torch.cat([self.resample([patch for patch, shows in group if shows]) for group in groups])

    def shows(self, x: int, y: int, shape: Tensor) -> bool:
        rows, columns, width, height = shape.tolist()
        across, down = columns * SIZE // PATCH, rows * SIZE // PATCH
        if width / height > across / down:
            bar = (down - int(height * (across / width))) // 2
            return bar <= y < down - bar
        bar = (across - int(width * (down / height))) // 2
        return bar <= x < across - bar

    def resample(self, patches: list[Tensor]) -> Tensor:
        """The Perceiver over the patches that are not masked; a band of bars alone has none."""
        seen = torch.stack(patches) if patches else torch.zeros(0, WIDTH)
        return reference.perceiver(self.parts.perceiver, seen[None, None, None], torch.ones(1, 1, 1).bool())[0, 0]

    @torch.no_grad()
    def logits(self, input_ids: Tensor, pixel_values: Tensor, shape: Tensor, **_: Any) -> Tensor:
        ids, table = input_ids[0], self.parts.lm.get_input_embeddings().weight
        rows = table[ids.clamp(max=len(table) - 1)].clone()
        rows[ids == IMAGE] = self.media(pixel_values, shape)
        hidden = self.parts.lm.model(inputs_embeds=rows[None]).last_hidden_state[0]
        return (hidden @ self.parts.lm.lm_head.weight.T + self.parts.bias)[:, :VOCABULARY]

    def generate(self, input_ids: Tensor, *, max_new_tokens: int, pixel_values: Tensor, shape: Tensor, **_: Any) -> Any:
        for _step in range(max_new_tokens):
            token = self.logits(input_ids, pixel_values, shape)[-1].argmax()
            input_ids = torch.cat([input_ids, token.view(1, 1)], dim=1)
        return input_ids

    def get_output_embeddings(self) -> nn.Module:
        return self.parts.lm.lm_head


class TiledXGenMM(TiledCase):
    @property
    def made_by(self) -> str:
        return "its code for tiles as slow loops, over Transformers' SigLIP and Phi-3"


def tiled(folder: Path, parts: Parts) -> TiledCase:
    xgen_mm(folder, parts)
    theirs: Any = Tiled(parts, folder)
    return TiledXGenMM(source=folder, model=theirs, processor=theirs)


@pytest.mark.matrix
def test_tiles_of_photographs_of_many_shapes(tmp_path, parts):
    check_tiled(tiled(tmp_path, parts), is_told=True)


def test_tiles_of_a_photograph(tmp_path, parts):
    """The quick case of the test above."""
    imported = check_tiled(tiled(tmp_path, parts), ["4:1"])
    assert imported.model.bands is not None


@pytest.mark.matrix
def test_bands_are_no_tiles(tmp_path, parts):
    """Two tiles side by side are read as an upper and a lower half; tile by tile, the logits are others."""
    case = tiled(tmp_path, parts)
    imported = import_checkpoint(tmp_path)
    imported.model.bands = None
    with torch.no_grad():
        theirs = case.model(**case.read("4:1")).logits[0, -3:]
        inputs = imported.processor(text=f"{BEFORE} <image> {AFTER}", images=[photograph("4:1")])
        ours = imported.model(**inputs).logits[0, -3:, :VOCABULARY]
    assert float((ours - theirs).abs().max()) > 1e-3


def test_what_cannot_read_bands(tmp_path, parts):
    case = xgen_mm(tmp_path, parts)
    with pytest.raises(CompositionError, match="bands needs a vision tokenizer that leaves out the patches of bars"):
        load(replace(case, options=CompositionRequest(overrides=["vision_tokenizer.frames=together"])))
    rewrite_config(tmp_path, vision_encoder_config={"anyres_patch_sampling": False})
    with pytest.raises(CheckpointError, match="anyres_patch_sampling=false"):
        load(case)


def test_a_tower_without_a_head(tmp_path):
    parts = Parts(has_head=False)
    case = xgen_mm(tmp_path, parts)
    assert worst(case, parts) <= 1e-4
    assert load(case).model.vision_encoder.visual.trunk.attn_pool is None


def test_names_with_the_model_around_the_tower(tmp_path, parts):
    tensors = {k.replace("vision_encoder.", "vision_encoder.vision_model."): x for k, x in parts.tensors().items()}
    assert worst(xgen_mm(tmp_path, parts, tensors), parts) <= 1e-4


def test_a_tokenizer_that_knows_the_tokens(tmp_path, parts):
    case = xgen_mm(tmp_path, parts)
    write_tokenizer(tmp_path, "<image>", "<image placeholder>", "<|endofchunk|>", pad="w0")
    assert worst(case, parts) <= 1e-4


def test_a_pad_token_of_ours(tmp_path, parts):
    """The file has no row for it, so it starts at the mean of the others."""
    case = xgen_mm(tmp_path, parts)
    write_tokenizer(tmp_path)
    imported = load(case)
    assert imported.report.absent == [
        "added_tokens.embedding.weight",
        "added_tokens.head.weight",
        "added_tokens.head.bias",
    ]
    added = imported.model.added_tokens
    assert imported.model.config.added_tokens[3:] == ["<pad>"]
    assert torch.equal(added.embedding.weight[:3], parts.rows.weight) and torch.equal(
        added.head.bias[:3], parts.fc.bias
    )
    assert all(x.isfinite().all() for x in added.parameters())


# -- traps -------------------------------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_the_bias_of_the_head_was_trained(tmp_path, parts):
    case = xgen_mm(tmp_path, parts)
    assert worst(case, parts, has_bias=False) > 0.5  # a reference without it is another model
    model = load(case).model
    assert torch.equal(model.added_tokens.base_bias, parts.bias[:VOCABULARY])
    tensors = {k: x for k, x in parts.tensors().items() if not k.endswith(("lm_head.bias", "additional_fc.bias"))}
    (folder := tmp_path / "without").mkdir()
    assert worst(xgen_mm(folder, parts, tensors), parts) > 0.5
    with pytest.raises(CheckpointError, match=r"Add --set language_model\.head_bias=true"):
        load(replace(case, options=CompositionRequest(overrides=["language_model.head_bias=false"])))


@pytest.mark.matrix
def test_heads_are_96_wide(tmp_path, parts):
    case = xgen_mm(tmp_path, parts)
    wide = ["vision_tokenizer.num_heads=3", "vision_tokenizer.head_dim=64"]
    assert worst(replace(case, options=CompositionRequest(overrides=wide)), parts) > 1e-2
    with pytest.raises(CheckpointError, match=r"attention of 192 channels .* 8 heads of 96 channels make 768"):
        load(replace(case, options=CompositionRequest(overrides=["vision_tokenizer.num_heads=8"])))


def test_the_order_of_the_added_tokens(tmp_path, parts):
    case = xgen_mm(tmp_path, parts)
    order = "added_tokens=['<image>', '<|endofchunk|>', '<image placeholder>']"
    assert worst(replace(case, options=CompositionRequest(overrides=[order])), parts) > 1e-2


def test_another_width_is_named(tmp_path, parts):
    report = load(xgen_mm(tmp_path, parts, hidden_size=64)).report
    assert not report.is_complete
    assert report.mismatched["vlm.vision_tokenizer.projection.weight"] == ([DIM, WIDTH], [64, WIDTH])


def test_another_tower_is_refused(tmp_path, parts, monkeypatch):
    monkeypatch.delitem(siglip.SIGLIP_TOWERS, (WIDTH, LAYERS, HEADS, PATCH))
    with pytest.raises(CheckpointError, match="of 24 channels, 2 layers and patches of 8 pixels"):
        load(xgen_mm(tmp_path, parts))


def test_trained_tensors_alone(tmp_path):
    """Training saves all but the tower, which only the published width tells."""
    parts = Parts(has_head=False)
    tensors = {k: x for k, x in parts.tensors("").items() if not k.startswith("vision_encoder")}
    case = raw(tmp_path, parts, tensors)
    with pytest.raises(CompositionError, match="Add --vision-encoder"):
        load(case)
    vision_cfg = {"image_size": SIZE, "timm_model_name": TOWER, "timm_pool": "", "timm_proj": "none"}
    tower = {"embed_dim": WIDTH, "vision_cfg": {**vision_cfg, "act_kwargs": {"approximate": "tanh"}}}
    (tmp_path / "tower.json").write_text(json.dumps(tower))
    visual = load(xgen_mm(tmp_path, parts)).model.vision_encoder.visual
    save_file({f"visual.{k}": x.contiguous() for k, x in visual.state_dict().items()}, tmp_path / "tower.safetensors")
    flags = [f"vision_encoder.pretrained={tmp_path / 'tower.safetensors'}"]
    options = replace(case.options, vision_encoder=str(tmp_path / "tower.json"), overrides=flags)
    assert worst(replace(case, options=options), parts) <= 1e-4


# -- published sizes ---------------------------------------------------------------------------------------------------


def published(prefix: str = "vlm.") -> dict[str, Tensor]:
    """Shapes of https://huggingface.co/Salesforce/xgen-mm-phi3-mini-base-r-v1.5."""
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    options = PerceiverOptions(num_heads=16, head_dim=96, num_latents=128)
    found: Any = Parts.__new__(Parts)
    with torch.device("meta"):
        found.tower, found.lm = SiglipVisionModel(vision), Phi3ForCausalLM(Phi3Config())
        found.perceiver = PerceiverResampler(options, 1152, 729, 3072)
        found.rows, found.fc, found.bias = nn.Embedding(3, 3072), nn.Linear(3072, 3), torch.empty(32064)
        return found.tensors(prefix)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.matrix
def test_published_sizes():
    checkpoint = shapes_of(published())
    object.__setattr__(checkpoint, "config", {"text_config": {"initial_tokenizer_len": 32012, "sliding_window": 2047}})
    model, report = sized(checkpoint)
    assert report.is_complete and not report.unused
    assert count(model.vision_tokenizer) == 109_901_568
    assert count(model.vision_encoder) == 428_225_600
    assert model.lang_model.num_parameters() == 3_821_079_552
    assert model.config.vision_config["num_patches"] == 729 and model.num_positions() == 128
    assert model.config.composition.vision_encoder.name == "ViT-SO400M-14-SigLIP-384"
    assert model.config.composition.vision_tokenizer.options == PerceiverOptions(
        num_heads=16, head_dim=96, num_latents=128, frames="apart"
    )
    assert model.config.composition.tiling.options.pinpoints[-1] == (3 * 384, 384)


def test_published_sizes_of_trained_tensors():
    tensors = {k: x for k, x in published("").items() if not re.match("vision_encoder", k)}
    checkpoint = shapes_of(tensors)
    parts = CompositionRequest().compose_over(recognise(checkpoint).description.composition)
    assert (parts.vision_encoder.name, parts.vision_encoder.pretrained) == ("ViT-SO400M-14-SigLIP-384", "webli")
    assert parts.language_model.name == "microsoft/Phi-3-mini-4k-instruct" and parts.language_model.head_bias


@pytest.mark.matrix
def test_another_language_model(tmp_path, parts):
    (tmp_path / "xgen").mkdir()
    case, others = xgen_mm(tmp_path / "xgen", parts), other_parts(tmp_path)
    new = {"vision_tokenizer", "added_tokens", "language_model"}
    check_swap(case.source, new, case.options, language_model=others["language_model"])
