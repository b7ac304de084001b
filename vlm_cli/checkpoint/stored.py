"""The tensors of a built model, read from the disk one by one: a full directory, a delta directory, adapters.

    meta, _, _ = load_meta_model("my-flamingo")
    model = StoredModel.open("my-flamingo", meta)
    model.tensors                               # name -> shape and dtype
    model.read("fusion.blocks.0.attn_gate")     # as the loaded model has it, an adapter added

Nothing but the model's own files is fetched. Where the pretrained weights of a delta directory are not on this machine,
`missing` says so, and `tensors` lacks what they hold.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlm_cli.checkpoint.adapters import read_adapter_tensors
from vlm_cli.checkpoint.assembling import read_backbones
from vlm_cli.checkpoint.backbones import Backbone, BackbonePlaces, hash_sorted
from vlm_cli.checkpoint.delta import PREFIXES, own_tensors
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.stored_parts import FileTensors, TensorSource, open_backbone
from vlm_cli.composition import PARTS
from vlm_cli.errors import CheckpointError, explain_reading
from vlm_cli.modeling.adapters import adapter_layers, adapter_parameters
from vlm_cli.modeling.config import stored_dtype
from vlm_cli.modeling.vlm import VLM

__all__ = ["StoredModel", "StoredTensor", "part_of"]


def part_of(name: str) -> str:
    """Return the part that a tensor of a VLM belongs to.

    >>> part_of("lang_model.lm_head.weight")
    'language_model'
    """
    return next((part for part in PARTS if name.startswith(VLM.PART_PREFIXES[part])), name.partition(".")[0])


@dataclass(frozen=True)
class StoredTensor:
    """What is known of a tensor before it is read.

    Attributes:
        shape: its shape.
        dtype: as the loaded model has it.
        is_pretrained: whether it is a tensor of a pretrained part that a delta directory leaves out.
        has_adapter: whether an adapter stands beside it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_pretrained: bool = False
    has_adapter: bool = False


@dataclass
class StoredModel:
    """A built model on the disk.

    Attributes:
        name: directory or hub id.
        model: the model on the meta device, with its adapters.
        tensors: name -> what is known of it, in the order of the names within each part. Tied tensors stand here once.
        backbones: part -> where a delta directory has its pretrained weights.
        missing: part -> why these cannot be read here.
    """

    name: str
    model: VLM = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    backbones: Mapping[str, Backbone]
    missing: Mapping[str, str]
    _own: FileTensors = field(repr=False)
    _sources: Mapping[str, TensorSource] = field(repr=False)
    _layers: Mapping[str, nn.Module] = field(repr=False)
    _adapters: dict[str, Mapping[str, Tensor]] = field(repr=False, default_factory=dict)
    _hub: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @classmethod
    def open(
        cls,
        name: str,
        model: VLM,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        backbones: Mapping[str, str] | None = None,
    ) -> StoredModel:
        """Find the tensors of a model.

        Args:
            name: directory or hub id.
            model: it on the meta device, as `load_meta_model` makes it.
            revision: branch, tag or commit of a hub id.
            trust_remote_code: whether the language model's own code may run.
            backbones: for a delta directory, part -> where its pretrained weights are now, if they moved.

        Raises:
            CheckpointError: if the directory's own files cannot be read, or lack a tensor.
        """
        own = FileTensors(PublishedCheckpoint.open(name, revision=revision))
        held = {k: StoredTensor(x.shape, x.dtype) for k, x in own.files.tensors.items()}
        places = read_backbones(name, copy.copy(model.config), BackbonePlaces(backbones or {}))
        dtype = stored_dtype(model.config) or torch.float32
        sources: dict[str, TensorSource] = {}
        missing: dict[str, str] = {}
        left_out = {k: x for k, x in own_tensors(model).items() if k not in held}
        for part, place in places.items():
            wanted = {k: x for k, x in left_out.items() if k.startswith(PREFIXES[part])}
            try:
                source = open_backbone(model.config, part, place, wanted, trust_remote_code=trust_remote_code)
                _check_hash(part, place, source, wanted, dtype)
            except Exception as error:
                missing[part] = f"{place}: {explain_reading(error)}"
                continue
            source.release()  # of several parts, one is in memory
            sources[part] = source
            held |= {k: StoredTensor(tuple(x.shape), _cast(x, dtype).dtype, True) for k, x in wanted.items()}
        prefixes = tuple(PREFIXES[part] for part in places)
        if absent := [k for k in left_out if k not in held and not k.startswith(prefixes)]:
            raise CheckpointError(f"the files of {name!r} lack {len(absent)} tensors, e.g. {min(absent)!r}.")
        layers = _adapted_weights(model)
        order = {part: i for i, part in enumerate(PARTS)}
        tensors = {
            k: StoredTensor(held[k].shape, held[k].dtype, held[k].is_pretrained, k in layers)
            for k in sorted(held, key=lambda k: (order.get(part_of(k), len(order)), k))
        }
        hub = {} if revision is None else {"revision": revision}
        return cls(name, model, tensors, places, missing, own, sources, layers, {}, hub)

    def read(self, name: str) -> Tensor:
        """Read a tensor as the model computes with it: an adapter is added to it, in float32."""
        plain = self.read_plain(name)
        return self._merged(name, plain) if name in self._layers else plain

    def read_plain(self, name: str) -> Tensor:
        """Read a tensor without the adapter beside it."""
        info = self.tensors[name]
        if not info.is_pretrained:
            return self._own.read(name)
        return self._sources[part_of(name)].read(name).detach().to(info.dtype)

    def has_adapter(self, name: str) -> bool:
        """Tell whether an adapter stands beside a tensor, which may be one that is not at hand."""
        return name in self._layers

    def backbone(self, part: str) -> TensorSource | None:
        """Return the pretrained tensors of a part of a delta directory; None if they are not at hand."""
        return self._sources.get(part)

    def release(self) -> None:
        """Forget pretrained parts that were loaded to read their tensors."""
        for source in self._sources.values():
            source.release()

    @torch.no_grad()
    def _merged(self, name: str, weight: Tensor) -> Tensor:
        """Add to a weight what the adapter beside it adds, as PEFT does."""
        part = part_of(name)
        if part not in self._adapters:
            self._adapters[part] = read_adapter_tensors(self.name, part, self._hub)
        layer: Any = copy.deepcopy(self._layers[name]).to_empty(device="cpu").float()
        inside = name.removeprefix(VLM.PART_PREFIXES[part]).removesuffix(".weight")
        held = self._adapters[part]
        for own, parameter in adapter_parameters(layer):
            key = own.replace(".default", "")
            key = key.removesuffix(".weight") if "lora_magnitude_vector" in key else key
            parameter.copy_(held[f"{inside}.{key}"])
        base = layer.get_base_layer()
        base.weight.copy_(weight)
        layer.merge()
        return base.weight.detach().clone()


def _adapted_weights(model: VLM) -> dict[str, nn.Module]:
    """Return the layers of PEFT in a model, by the name of the weight beside which each adapter stands."""
    return {f"{name}.weight": layer for name, layer in adapter_layers(model)}


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor on the meta device in the dtype that a loaded model gives it."""
    return x.to(dtype) if x.is_floating_point() else x


def _check_hash(
    part: str, place: Backbone, source: TensorSource, wanted: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Check that a backbone holds the tensors that it held when the delta was written.

    Raises:
        CheckpointError: if it does not.
    """
    lacking = wanted.keys() - set(source.names())
    if lacking:
        raise CheckpointError(f"it lacks {len(lacking)} tensors, e.g. {min(lacking)!r}")
    found = hash_sorted((name, source.read(name).to(_cast(wanted[name], dtype).dtype)) for name in sorted(wanted))
    if found != place.sha256:
        raise CheckpointError(
            f"the {part.replace('_', ' ')} there is another one: the hash of its {len(wanted)} tensors is "
            f"{found[:12]}…, expected {place.sha256[:12]}…"
        )
