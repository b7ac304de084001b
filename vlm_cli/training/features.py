"""Features of pictures on the disk, so that a frozen vision encoder reads each picture once and not in each pass.

    DIR/
        3f2a…/              one folder for each encoder, preprocessing and precision
            9c/9c41….safetensors        the features of one picture, by the hash of its bytes; of a clip, of its pixels

A file appears under its name when it is complete. Other models that share DIR have folders of their own, and runs that
share a folder write equal files.
F views of a medium, v patches, d channels.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm_cli.errors import MediaError, PromptError, UsageError
from vlm_cli.image_processor import OpenCLIPImageProcessor
from vlm_cli.media import MediaLoader
from vlm_cli.modeling.batching import MediumPixels
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of
from vlm_cli.prompt import Medium
from vlm_cli.tiling import MediumSize

__all__ = ["FeatureCache", "check_cacheable"]

_LAYOUT = 1  # of the files; another number is another folder
_SPARE = 0.05  # share of the free space that stays free
_BATCH = 16  # views that the encoder reads at once


def check_cacheable(model: VLM) -> None:
    """Refuse a model whose features change while it trains, or that has none of a single view.

    Raises:
        UsageError: with the reason.
    """
    encoder = model.vision_encoder
    if encoder.is_trainable:
        raise UsageError(
            "--cache-features keeps what a frozen vision encoder gives, and vision_encoder trains here. Leave "
            "--cache-features out, or vision_encoder out of --trainable."
        )
    if encoder.num_views is not None:
        raise UsageError(
            "--cache-features keeps the features of each view, and this vision encoder reads the views of a picture "
            "together. Leave --cache-features out."
        )


@dataclass
class FeatureCache:
    """The features of media, in a folder.

    Attributes:
        folder: of one encoder, preprocessing and precision.
        dtype: of the features.
        digests: what `fill` found: a medium's kind and source -> the name of its file.
    """

    folder: Path
    dtype: torch.dtype
    digests: dict[tuple[str, str], str] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, model: VLM, images: OpenCLIPImageProcessor, *, bf16: bool) -> FeatureCache:
        """Choose the folder of a model below `root`.

        Args:
            root: DIR.
            model: whose encoder reads the media.
            images: turns media into pixels.
            bf16: whether the run computes in bfloat16.
        """
        dtype = torch.bfloat16 if bf16 else torch.float32
        options = model.config.composition.vision_encoder.feature_arguments
        facts = [_LAYOUT, str(dtype), model.config.vision_config, images.to_dict(), dict(options)]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        _hash_weights(digest, model.vision_encoder)
        return cls(root / digest.hexdigest()[:24], dtype)

    def find(self, medium: Medium) -> MediumPixels | None:
        """Return a medium with float[F, v, d] features as its views; None if it is not in the cache."""
        digest = self.digests.get((medium.kind, medium.source))
        return None if digest is None else self._read(digest)

    def fill(
        self,
        media: Iterable[Medium],
        loader: MediaLoader,
        images: OpenCLIPImageProcessor,
        model: VLM,
        *,
        device: torch.device,
        tell: Callable[[str], None],
    ) -> None:
        """Compute the features of media that are not in the cache yet, each once.

        A medium that cannot be read is left out; the step that needs it says why.

        Args:
            media: of all records.
            loader: loads them.
            images: turns them into pixels.
            model: whose encoder is frozen.
            device: where the encoder runs meanwhile.
            tell: is called with messages for the user.

        Raises:
            UsageError: if the features do not fit on the disk, or DIR cannot be written.
        """
        missing: dict[str, tuple[Medium, int]] = {}
        for medium in dict.fromkeys(media):
            try:
                digest, views = self._digest(medium, loader, images)
            except (MediaError, PromptError):
                continue
            self.digests[medium.kind, medium.source] = digest
            if digest not in missing and self._read(digest) is None:
                missing[digest] = (medium, views)
        try:
            self._check_space(sum(views for _, views in missing.values()), len(missing), model, tell)
            home, encoder = model.device, model.vision_encoder.to(device)
            for batch in _batches(missing):
                self._encode(batch, loader, images, encoder, device)
            encoder.to(home)
        except OSError as error:
            root = str(self.folder.parent)
            raise UsageError(f"--cache-features {root!r} cannot be written: {error.strerror}.") from None

    def _digest(self, medium: Medium, loader: MediaLoader, images: OpenCLIPImageProcessor) -> tuple[str, int]:
        """Return the name of a medium's file, and the number of its views."""
        if medium.kind == "video":
            views = images.read(loader.load_medium(medium.source, medium.kind)).views
            return hashlib.sha256(b"clip" + views.numpy().tobytes()).hexdigest(), len(views)
        digest = hashlib.sha256(loader.read(medium.source)).hexdigest()
        return digest, images.measure(*loader.measure(medium.source)).num_frames

    def _check_space(self, views: int, number: int, model: VLM, tell: Callable[[str], None]) -> None:
        """Tell how much is going to be written, before anything is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not number:
            tell(f"Features: all are in {self.folder}.")
            return
        config = model.config.vision_config
        size = views * config["num_patches"] * config["dim"] * self.dtype.itemsize
        free = shutil.disk_usage(self.folder).free
        tell(
            f"Features of {count_of(number, 'picture')} take {size / 1e6:,.1f} MB in {self.folder}; "
            f"{free / 1e6:,.0f} MB are free."
        )
        if size > (1 - _SPARE) * free:
            raise UsageError(
                f"the features take {size / 1e9:,.1f} GB, and {str(self.folder.parent)!r} has {free / 1e9:,.1f} GB "
                "free. Give a folder on a larger disk, or leave --cache-features out."
            )

    @torch.no_grad()
    def _encode(
        self,
        batch: Mapping[str, Medium],
        loader: MediaLoader,
        images: OpenCLIPImageProcessor,
        encoder: VisionEncoder,
        device: torch.device,
    ) -> None:
        """Encode a few media and write their features."""
        media = [images.read(loader.load_medium(medium.source, medium.kind)) for medium in batch.values()]
        views = torch.cat([medium.views for medium in media])  # [views, C, H, W]
        views = views.to(device, next(encoder.parameters()).dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            features = encoder.eval()(views[:, None, None]).flatten(0, 2)  # [views, v, d]
        parts = features.to("cpu", self.dtype).split([len(medium.views) for medium in media])
        for digest, part, medium in zip(batch, parts, media, strict=True):
            self._write(digest, part, medium.size)

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def _write(self, digest: str, features: Tensor, size: MediumSize) -> None:
        path = self._path(digest)
        path.parent.mkdir(exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
        os.close(handle)
        try:
            save_file({"features": features.contiguous(), "grid": torch.tensor(size.grid)}, partial)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def _read(self, digest: str) -> MediumPixels | None:
        """Read a file, which is mapped into memory; None if there is none, or none that is whole."""
        try:
            tensors = load_file(self._path(digest))
            features, grid = tensors["features"], tensors["grid"].tolist()
        except (OSError, SafetensorError, KeyError):
            return None
        return MediumPixels(features, MediumSize(len(features), *grid))


def _batches(media: Mapping[str, tuple[Medium, int]]) -> Iterator[dict[str, Medium]]:
    """Group media by number of views, so that the encoder reads at most `_BATCH` at once, or one medium."""
    batch: dict[str, Medium] = {}
    total = 0
    for digest, (medium, views) in media.items():
        if batch and total + views > _BATCH:
            yield batch
            batch, total = {}, 0
        batch[digest] = medium
        total += views
    if batch:
        yield batch


def _hash_weights(digest: Any, module: nn.Module) -> None:
    """Add the name, dtype, shape and bytes of each tensor of a module to a hash."""
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
