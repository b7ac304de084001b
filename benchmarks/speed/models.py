"""The models that are compared: ours, the bare language model and peers, at equal sizes with random weights.

Nothing is downloaded. Gates of cross-attention stand open, so that no block is left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from benchmarks.speed import reference
from benchmarks.speed.measure import Run, Subject, now
from vlm_cli.checkpoint.create import create, plan
from vlm_cli.checkpoint.parts.vision_encoders import find_tower
from vlm_cli.checkpoint.saving import save
from vlm_cli.composition import Composition, VisionEncoderOptions
from vlm_cli.image_processor import OpenCLIPImageProcessor
from vlm_cli.modeling.fusion.gates import is_gate
from vlm_cli.modeling.towers import build_tower
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor

__all__ = [
    "FIRST_WORD",
    "PEERS",
    "SIZES",
    "Contender",
    "Models",
    "Prompt",
    "Size",
    "blocks_alone",
    "decode",
    "greedy",
    "prefill",
]

GATE = 0.3  # of every cross-attention block, before tanh
PAD, FIRST_WORD = 0, 4  # ids

#: Family -> models that have the same parts, by the names of their methods in `Models`.
PEERS = {
    "flamingo": {"HF IDEFICS": "idefics", "reference": "reference"},
    "kosmos": {"reference": "reference"},
    "blip": {"HF BLIP-2": "blip2", "reference": "reference"},
    "llava": {"HF LLaVA": "llava", "reference": "reference"},
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the two parts that would be pretrained; the others follow the families' presets.

    Attributes:
        encoder: OpenCLIP's name, or its configuration.
        llama: arguments of LlamaConfig.
    """

    name: str
    encoder: str | dict[str, Any]
    llama: Mapping[str, Any]

    def with_layers(self, number: int) -> Size:
        return replace(self, llama={**self.llama, "num_hidden_layers": number})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _llama(vocabulary: int, dim: int, dim_ff: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": dim_ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "pad_token_id": PAD,
    }


_TINY_VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}

#: Standard: the configuration of HuggingFaceTB/SmolLM2-135M; large: of meta-llama/Llama-3.2-1B; 7b: of Llama-2-7b.
SIZES = {
    size.name: size
    for size in (
        Size(
            name="tiny",
            encoder={"embed_dim": 24, "vision_cfg": _TINY_VIT},
            llama=_llama(256, 32, 48, 2, 4, 2),
        ),
        Size(name="small", encoder="ViT-S-32-alt", llama=_llama(16384, 384, 1024, 8, 6, 2)),
        Size(name="standard", encoder="ViT-B-32", llama=_llama(49152, 576, 1536, 30, 9, 3)),
        Size(name="large", encoder="ViT-L-14", llama=_llama(128256, 2048, 8192, 16, 32, 8)),
        Size(name="7b", encoder="ViT-L-14", llama=_llama(32000, 4096, 11008, 32, 32, 32)),
    )
}


@dataclass(frozen=True)
class Prompt:
    """Rows of images, each followed by a piece of the row's text."""

    images: int  # of a row
    batch: int = 1  # rows
    text: int = 32  # tokens of a row beside those of its images

    def __str__(self) -> str:
        images = f"{self.images} image{'s' * (self.images != 1)}"
        return f"{images}, {self.text} tokens" + (f", batch {self.batch}" if self.batch > 1 else "")

    def ids(self, image: Sequence[int], vocabulary: int) -> Tensor:
        """int[B, T]: random words, and `image` where an image stands."""
        draw = torch.Generator().manual_seed(0)
        words = torch.randint(FIRST_WORD, vocabulary - 1, (self.batch, self.text), generator=draw)
        medium = torch.tensor(image).expand(self.batch, -1)
        if not self.images:
            return words
        pieces = words.tensor_split(self.images, dim=1)
        return torch.cat([x for piece in pieces for x in (medium, piece)], dim=1)

    def pixels(self, size: int) -> Tensor:
        """float[B, T_img, 1, 3, size, size], each image another."""
        draw = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, self.images, 1, 3, size, size, generator=draw)


@dataclass(frozen=True)
class Contender:
    """A model, and what its `generate` takes for a prompt."""

    name: str
    model: Any
    inputs: Callable[[Prompt], dict[str, Any]]


class Models:
    """Models of one size, each made anew by its method.

    Args:
        size: of all of them.
        scratch: an empty folder.
        open_flamingo: a checkout of the reference, if there is one.
        device: where they all are.
        dtype: of their weights.
    """

    def __init__(
        self,
        size: Size,
        scratch: Path,
        open_flamingo: Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.size, self.scratch, self.open_flamingo = size, scratch, open_flamingo
        self.device, self.dtype = device, dtype
        self._kept: dict[tuple[str, str], Contender] = {}  # peers by family and method

    # -- configurations -------------------------------------------------------------------------------------------

    @property
    def together(self) -> bool:
        """Whether all peers fit into memory at once."""
        return self.size.name not in ("large", "7b")

    @property
    def text_config(self) -> LlamaConfig:
        return LlamaConfig(**self.size.llama)

    @property
    def vocabulary(self) -> int:
        return self.size.llama["vocab_size"]

    @cached_property
    def encoder(self) -> str:
        """Name or file of the tower."""
        if isinstance(self.size.encoder, str):
            return self.size.encoder
        path = self.scratch / "encoder.json"
        path.write_text(json.dumps(self.size.encoder), encoding="utf-8")
        return str(path)

    @cached_property
    def tower_config(self) -> dict[str, Any]:
        """As OpenCLIP has it."""
        return find_tower(VisionEncoderOptions(name=self.encoder)).config

    @property
    def image_size(self) -> int:
        return self.tower_config["vision_cfg"]["image_size"]

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.tower_config["vision_cfg"]["patch_size"]) ** 2

    @cached_property
    def language_model(self) -> Path:
        """A directory of a configuration and a tokenizer, without weights."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        folder = self.scratch / "language-model"
        self.text_config.save_pretrained(folder)
        special = ["<pad>", "<s>", "</s>", "<unk>"]
        words = [*special, *(f"w{i}" for i in range(len(special), self.vocabulary))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)
        return folder

    def _vision(self) -> dict[str, Any]:
        """Arguments that Transformers' vision configurations share."""
        vision = self.tower_config["vision_cfg"]
        return {
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": "quick_gelu" if self.tower_config.get("quick_gelu") else "gelu",
        }

    @property
    def vision_width(self) -> int:
        return self.tower_config["vision_cfg"]["width"]

    @property
    def clip_config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(hidden_size=self.vision_width, **self._vision())

    # -- ours -----------------------------------------------------------------------------------------------------

    def ours(self, family: str, *overrides: str, dtype: torch.dtype | None = None) -> Contender:
        """A family's composition; LLaVA with the two-layer projection of LLaVA-1.5, as Transformers has it."""
        encoder = {"name": self.encoder, "pretrained": None}
        parts: dict[str, Any] = {"vision_encoder": encoder, "language_model": str(self.language_model)}
        if family == "llava":
            parts["vision_tokenizer"] = "mlp"
        composition = Composition.compose(family, parts, overrides=overrides)
        model = create(plan(composition), random_weights=True, dtype=dtype or self.dtype).to(self.device)
        open_gates(model)
        return self.contender(f"ours, {family}", model)

    def contender(self, name: str, model: VLM) -> Contender:
        """A model of ours, however it was loaded."""

        def inputs(prompt: Prompt) -> dict[str, Any]:
            ids = prompt.ids([model.config.media_token_id], self.vocabulary)
            return self._inputs(vision_x=prompt.pixels(self.image_size), lang_x=ids)

        return Contender(name, model, inputs)

    def directory(self, family: str, dtype: torch.dtype | None = None) -> Path:
        """A directory that `vlm_cli.load` reads."""
        folder = self.scratch / f"ours-{family}"
        if not folder.exists():
            folder.mkdir()
            model = self.ours(family, dtype=dtype).model
            blueprint = plan(model.config.composition)
            processor = VLMProcessor(OpenCLIPImageProcessor(self.tower_config["preprocess"]), blueprint.tokenizer)
            save(model, processor, folder)
        return folder

    # -- peers ----------------------------------------------------------------------------------------------------

    def peers(self, family: str, run: Callable[[Contender], Run]) -> list[Subject]:
        """The peers of a family, each to be made when it is prepared, and what is measured of it."""
        return [Subject(name, partial(self._run_peer, family, how, run)) for name, how in PEERS[family].items()]

    def _run_peer(self, family: str, how: str, run: Callable[[Contender], Run]) -> Run:
        return run(self.peer(family, how))

    def peer(self, family: str, how: str) -> Contender:
        """A peer by the name of its method; kept until another family's is asked for, if all fit into memory.

        Raises:
            Skipped: if it is not at hand.
        """
        self._kept = {key: peer for key, peer in self._kept.items() if key[0] == family}
        if (kept := self._kept.get((family, how))) is not None:
            return kept
        peer = self.reference(family) if how == "reference" else getattr(self, how)()
        if self.together:
            self._kept[family, how] = peer
        return peer

    def bare(self, tokens_per_image: int) -> Contender:
        """The language model alone, as Transformers' users call it, at the length that a prompt has in ours."""
        model = self._plain_language_model()

        def inputs(prompt: Prompt) -> dict[str, Any]:
            text = Prompt(0, prompt.batch, prompt.text + prompt.images * tokens_per_image)
            return self._inputs(input_ids=text.ids([], self.vocabulary))

        return Contender("bare language model", model, inputs)

    def clip(self) -> nn.Module:
        return self.placed(CLIPVisionModel(self.clip_config))

    def llava(self) -> Contender:
        config = LlavaConfig(
            vision_config=self.clip_config,
            text_config=self.text_config,
            image_token_index=self.vocabulary - 1,
            image_seq_length=self.num_patches,
            vision_feature_layer=-1,
        )
        return self._of_transformers("HF LLaVA", LlavaForConditionalGeneration(config), self.num_patches)

    def blip2(self) -> Contender:
        """BLIP-2 with the LLaMA as its language model, which it accepts."""
        config = Blip2Config(
            vision_config=Blip2VisionConfig(hidden_size=self.vision_width, **self._vision()),
            qformer_config=Blip2QFormerConfig(),
            text_config=self.text_config,
            num_query_tokens=32,
            image_token_index=self.vocabulary - 1,
        )
        return self._of_transformers("HF BLIP-2", Blip2ForConditionalGeneration(config), config.num_query_tokens)

    def idefics(self) -> Contender:
        """A block before every layer, and the same perceiver; its LLaMA has no grouped queries."""
        text = self.text_config
        config = IdeficsConfig(
            **{x: getattr(text, x) for x in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
            num_attention_heads=text.num_attention_heads,
            max_position_embeddings=text.max_position_embeddings,
            tie_word_embeddings=True,
            alpha_initializer="ones",
            cross_layer_interval=1,
            use_resampler=True,
            perceiver_config={"resampler_n_heads": 8, "resampler_head_dim": 64},
            vision_config={"embed_dim": self.vision_width, **self._vision()},
            pad_token_id=PAD,
        )
        model = self.placed(IdeficsForVisionText2Text(config))

        def inputs(prompt: Prompt) -> dict[str, Any]:
            ids = prompt.ids([self.vocabulary - 1], self.vocabulary)
            latest = (ids == self.vocabulary - 1).cumsum(-1)[..., None]  # [B, T, 1]
            return self._inputs(
                pixel_values=prompt.pixels(self.image_size).squeeze(2),
                input_ids=ids,
                image_attention_mask=(latest == torch.arange(1, prompt.images + 1)).long(),
            )

        return Contender("HF IDEFICS", model, inputs)

    def reference(self, family: str) -> Contender:
        """Build the model of open_flamingo that a family follows.

        Raises:
            Skipped: if there is no checkout of it.
        """
        model_class = reference.find(self.open_flamingo, family)
        parts = self.tower(), self._plain_language_model()
        model: Any = self.placed(reference.build(model_class, *parts, self.vocabulary, self.vision_width))
        open_gates(model)

        def inputs(prompt: Prompt) -> dict[str, Any]:
            ids = prompt.ids([model.media_token_id], self.vocabulary)
            return self._inputs(vision_x=prompt.pixels(self.image_size), lang_x=ids)

        return Contender("reference", model, inputs)

    def tower(self) -> nn.Module:
        """OpenCLIP's own."""
        return self.placed(build_tower(self.tower_config))

    def _plain_language_model(self) -> Any:
        return self.placed(AutoModelForCausalLM.from_config(self.text_config))

    def placed(self, x: Any) -> Any:
        """A model or pixels, on the device and in the dtype of all models."""
        x = x.to(self.device, self.dtype)
        return x.eval() if isinstance(x, nn.Module) else x

    def _inputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        """What `generate` takes, with a mask, on the device."""
        ids = inputs["lang_x"] if "lang_x" in inputs else inputs["input_ids"]
        placed = {name: self.placed(x) if x.is_floating_point() else x.to(self.device) for name, x in inputs.items()}
        return {**placed, "attention_mask": torch.ones_like(ids, device=self.device)}

    def _of_transformers(self, name: str, model: Any, tokens_per_image: int) -> Contender:
        def inputs(prompt: Prompt) -> dict[str, Any]:
            ids = prompt.ids([self.vocabulary - 1] * tokens_per_image, self.vocabulary)
            return self._inputs(pixel_values=prompt.pixels(self.image_size).flatten(0, 2), input_ids=ids)

        return Contender(name, self.placed(model), inputs)


@torch.no_grad()
def open_gates(model: nn.Module) -> None:
    """Those of Flamingo's blocks, which are named alike in ours and in the reference."""
    for name, parameter in model.named_parameters():
        if is_gate(name):
            parameter.fill_(GATE)


# -- what is run -----------------------------------------------------------------------------------------------------


def greedy(num_tokens: int) -> dict[str, Any]:
    """Arguments of `generate`: so many new tokens, none of which ends the text."""
    return {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": PAD}


def prefill(contender: Contender, prompt: Prompt) -> Run:
    """Seconds from images and text to the first new token."""
    inputs = contender.inputs(prompt)

    @torch.inference_mode()
    def run() -> float:
        started = now()
        contender.model.generate(**inputs, **greedy(1))
        return now() - started

    return run


def decode(contender: Contender, prompt: Prompt, num_tokens: int) -> Run:
    """Seconds of each new token after the first, whose time the prefill is.

    A GPU may be behind the host, which a streamer would wait for at each token. There, the time of one token is
    subtracted from that of all.
    """
    inputs = contender.inputs(prompt)

    @torch.inference_mode()
    def run_on_gpu() -> float:
        times = [now()]
        for tokens in (1, num_tokens + 1):
            contender.model.generate(**inputs, **greedy(tokens))
            times.append(now())
        first, whole = times[1] - times[0], times[2] - times[1]
        return (whole - first) / num_tokens

    @torch.inference_mode()
    def run() -> float:
        clock = _Clock()
        contender.model.generate(**inputs, **greedy(num_tokens + 1), streamer=clock)
        times = clock.times[-num_tokens - 1 :]
        return (times[-1] - times[0]) / num_tokens

    return run if contender.model.device.type == "cpu" else run_on_gpu


class _Clock:
    """A streamer that notes when it was given what."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def blocks_alone(model: VLM, prompt: Prompt) -> Callable[[], None]:
    """The arithmetic of all cross-attention blocks at a prompt's shapes, in calls of torch, with their own weights."""
    from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

    blocks = list(model.fusion.blocks.values())
    first = blocks[0].attn
    heads, dim, dim_media = first.num_heads, first.to_q.weight.shape[1], first.to_kv.weight.shape[1]
    num_media = prompt.images * model.config.composition.vision_tokenizer.options.num_latents
    weight, length = first.to_q.weight, prompt.images + prompt.text
    x, media = (torch.randn(prompt.batch, n, d).to(weight) for n, d in ((length, dim), (num_media, dim_media)))
    mask = torch.ones(prompt.batch, 1, length, num_media, dtype=torch.bool, device=weight.device)

    def split(y: Tensor) -> Tensor:
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    @torch.inference_mode()
    def run() -> None:
        for block in blocks:
            attn, (norm, up, _, down) = block.attn, block.ff
            k, v = (split(y) for y in linear(media, attn.to_kv.weight).chunk(2, dim=-1))
            q = split(linear(layer_norm(x, (dim,), attn.norm.weight, attn.norm.bias), attn.to_q.weight))
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
            y = x + linear(out, attn.to_out.weight)
            hidden = linear(layer_norm(y, (dim,), norm.weight, norm.bias), up.weight)
            _ = y + linear(gelu(hidden), down.weight)

    return run
