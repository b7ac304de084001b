"""What people put around a Transformers model: auto classes, pipelines, adapters, quantization, offloading."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

import vlm_cli
from tests.support import disk, seed_torch, tiny
from tests.support.grid import first_of
from vlm_cli import VLM, VLMConfig, VLMProcessor
from vlm_cli.errors import CheckpointError

ROOT = Path(__file__).parents[2]
FUSIONS = {"flamingo": ("perceiver", "cross-attention"), "llava": ("mlp", "language-stream")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of each fusion."""
    path = tmp_path_factory.mktemp("ecosystem")
    named = f"local-dir:{disk.tower(path / 'tower')}", str(disk.language_model(path / "lm"))
    for name, parts in FUSIONS.items():
        disk.write(path / name, disk.composition(*named, *parts))
    return path


@pytest.fixture(params=FUSIONS)
def model(folder, request) -> str:
    return str(folder / request.param)


def prompt(processor, texts=("The <image> cat", "hi")):
    photo = Image.effect_noise((32, 40), 80).convert("RGB")
    return processor(text=list(texts), images=[[photo] * text.count("<image>") for text in texts])


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


# -- Transformers ------------------------------------------------------------------------------------------------------


def test_auto_classes(model):
    whole, processor = vlm_cli.load(model)
    auto = AutoModelForImageTextToText.from_pretrained(model).eval()
    assert type(auto) is type(whole) and isinstance(AutoConfig.from_pretrained(model), VLMConfig)
    their_processor = AutoProcessor.from_pretrained(model)
    assert isinstance(their_processor, VLMProcessor)
    seed_torch(0)
    batch = prompt(processor)
    assert torch.equal(logits(auto, batch), logits(whole, batch))
    with tiny.nudged(auto.vision_tokenizer.get_parameter(next(iter(auto.vision_tokenizer.state_dict())))):
        assert not torch.equal(logits(auto, batch), logits(whole, batch))
    ids = their_processor.tokenizer("a<image>b", split_special_tokens=True).input_ids
    assert ids == processor.tokenizer("a<image>b", split_special_tokens=True).input_ids


def test_rows_padded_at_the_right_have_the_same_logits(model):
    whole, processor = vlm_cli.load(model)
    photo = Image.new("RGB", (32, 40), "red")
    texts, images = ["The <image> cat", "A much longer text, <image>and more"], [[photo], [photo]]
    left, right = (processor(text=texts, images=images, padding_side=side) for side in ("left", "right"))
    assert not torch.equal(left["attention_mask"], right["attention_mask"])
    found, wanted = ((logits(whole, batch), batch["attention_mask"].bool()) for batch in (right, left))
    for row in range(2):
        torch.testing.assert_close(found[0][row, found[1][row]], wanted[0][row, wanted[1][row]])


def test_a_directory_whose_trainer_named_the_added_pad_token_loads(folder, tmp_path):
    whole, processor = vlm_cli.load(str(folder / "llava"))
    text = whole.config.get_text_config()
    text.pad_token_id = text.vocab_size  # as Transformers' Trainer does where <pad> is an added token
    vlm_cli.save(whole, processor, tmp_path / "again")
    again, _ = vlm_cli.load(str(tmp_path / "again"))
    assert again.config.get_text_config().pad_token_id is None
    batch = prompt(processor)
    assert torch.equal(logits(again, batch), logits(whole, batch))


def test_transformers_server_knows_the_classes(model):
    manager = pytest.importorskip("transformers.cli.serving.model_manager", exc_type=ImportError)
    whole, processor = vlm_cli.load(model)
    assert manager.ModelManager.get_model_modality(whole, processor).name == "MULTIMODAL"
    assert type(AutoModelForMultimodalLM.from_pretrained(model)) is type(whole)
    assert whole.config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


def test_pipeline(model):
    whole, processor = vlm_cli.load(model)
    photo = Image.effect_noise((32, 40), 80).convert("RGB")
    pipe = pipeline("image-text-to-text", model=model)
    [answer] = pipe(photo, text="The <image> cat", max_new_tokens=4, return_full_text=False)
    batch = processor(text="The <image> cat", images=[photo])
    ids = whole.generate(**batch, max_new_tokens=4, do_sample=False)
    assert answer["generated_text"] == processor.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


# -- adapters ----------------------------------------------------------------------------------------------------------

#: Targets of an adapter, and the part that they are in.
TARGETS = {
    "language model": (r"lang_model\..*\.(q_proj|v_proj)", "lang_model."),
    "fusion": (r"fusion\..*\.to_(q|kv|out)", "fusion."),
    "vision encoder": (r"vision_encoder\..*\.(c_fc|c_proj)", "vision_encoder."),
}


@pytest.mark.parametrize("part", first_of(TARGETS))
def test_lora_trains_one_part_and_loads_back(folder, tmp_path, part):
    peft = pytest.importorskip("peft")
    targets, prefix = TARGETS[part]
    base, processor = vlm_cli.load(str(folder / "flamingo"))
    batch = prompt(processor)
    before = logits(base, batch)
    weights = {name: x.clone() for name, x in base.state_dict().items()}
    seed_torch(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    names = [name for name, x in adapted.named_parameters() if x.requires_grad]
    assert names and all("lora_" in name and f"model.{prefix}" in name for name in names)
    optimizer = torch.optim.SGD([x for x in adapted.parameters() if x.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        loss = adapted(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(x.grad is not None for x in adapted.parameters() if x.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    adapted.eval()
    trained = logits(adapted, batch)
    assert not torch.equal(trained, before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, batch), before)

    adapted.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again, _ = vlm_cli.load(str(folder / "flamingo"))
    again = peft.PeftModel.from_pretrained(again, tmp_path).eval()
    assert torch.equal(logits(again, batch), trained)
    whole = again.merge_and_unload()
    torch.testing.assert_close(logits(whole, batch), trained, atol=1e-4, rtol=0)
    changed = {name for name, x in whole.state_dict().items() if not torch.equal(x, weights[name])}
    assert changed and all(name.startswith(prefix) for name in changed)


def test_an_adapted_model_generates(folder):
    peft = pytest.importorskip("peft")
    base, processor = vlm_cli.load(str(folder / "llava"))
    batch = prompt(processor)
    wanted = base.generate(**batch, max_new_tokens=4)
    config = peft.LoraConfig(r=2, target_modules=TARGETS["language model"][0], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config).eval()  # whose second matrix starts at zero
    assert torch.equal(adapted.generate(**batch, max_new_tokens=4), wanted)


# -- quantization ------------------------------------------------------------------------------------------------------


def nbytes(model) -> int:
    """Bytes of the weights as torchao holds them."""

    def size(x):
        inner = x.__tensor_flatten__()[0] if hasattr(x, "__tensor_flatten__") else None
        return x.nbytes if inner is None else sum(size(getattr(x, name)) for name in inner)

    return sum(size(x) for x in model.parameters())


def test_int8_weights(model):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    whole, processor = vlm_cli.load(model)
    batch = prompt(processor)
    small = VLM.from_pretrained(model, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())).eval()
    assert nbytes(small) < 0.6 * nbytes(whole)
    wanted, found = logits(whole, batch), logits(small, batch)
    there = batch["attention_mask"].bool()
    error = (found - wanted)[there].norm() / wanted[there].norm()
    assert 0 < error < 0.05
    blank = batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])}
    assert (logits(whole, blank) - wanted)[there].norm() / wanted[there].norm() > 2 * error
    assert small.generate(**batch, max_new_tokens=3).shape == whole.generate(**batch, max_new_tokens=3).shape


# -- where the weights are ---------------------------------------------------------------------------------------------

MAPS = {
    "auto": "auto",
    "all but the vision encoder on disk": {
        "vision_encoder": "cpu",
        "vision_tokenizer": "disk",
        "fusion": "disk",
        "added_tokens": "disk",
        "lang_model": "disk",
    },
    "layers on disk": {
        "vision_encoder": "cpu",
        "vision_tokenizer": "cpu",
        "fusion": "cpu",
        "added_tokens": "cpu",
        "lang_model.model.embed_tokens": "cpu",
        "lang_model.model.layers": "disk",
        "lang_model.model.norm": "cpu",
        "lang_model.model.rotary_emb": "cpu",
        "lang_model.lm_head": "cpu",
    },
}


@pytest.mark.matrix
@pytest.mark.parametrize("where", first_of(reversed(MAPS)))
def test_device_map(model, tmp_path, where):
    whole, processor = vlm_cli.load(model)
    batch = prompt(processor)
    spread, _ = vlm_cli.load(model, device_map=copy.deepcopy(MAPS[where]), offload_folder=str(tmp_path))
    assert torch.equal(logits(spread, batch), logits(whole, batch))
    assert torch.equal(spread.generate(**batch, max_new_tokens=4), whole.generate(**batch, max_new_tokens=4))
    with tiny.nudged(whole.lang_model.model.norm.weight):
        assert not torch.equal(logits(spread, batch), logits(whole, batch))
    on_disk = [name for name, x in spread.named_parameters() if x.is_meta]
    assert bool(on_disk) == (where != "auto")


def test_a_vision_encoder_on_disk_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="the vision encoder cannot run from disk"):
        vlm_cli.load(str(folder / "flamingo"), device_map={"": "disk"}, offload_folder=str(tmp_path))


@pytest.mark.matrix
def test_two_processes_share_the_layers(model):
    """Tensor parallelism of Transformers: each process holds half of the weights of each layer."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "tests.support.tensor_parallel", model]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["error"] < 1e-5 < 1e-3 < found["twin"] and found["answers"][0] == found["answers"][1]
    halves = [
        name for name, shape in found["shared"].items() if math.prod(shape) * 2 == math.prod(found["whole"][name])
    ]
    assert any("self_attn.q_proj" in name for name in halves) and any("mlp.down_proj" in name for name in halves)
    assert all(name.startswith("lang_model.") for name in found["shared"])
