"""The vision tower: pixels to rows of hidden states, one Linear's weights in memory at a time.

A tower of a gigabyte is needed for seconds. So its weights are read from the checkpoint when a module of it runs
and dropped when that module is done (accelerate's offload hooks), which costs little beside what the tower
computes, and a budget holds nothing of it between images. A Linear in int8 (``quantize --vision int8``) is read as
such, brought to the device and made dense there.

Legend: T tiles of S × S pixels, P rows per tile, H hidden size of the language model.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import attach_align_device_hook
from torch import Tensor
from transformers import Llama4Config, Llama4VisionModel
from transformers.models.llama4.modeling_llama4 import Llama4MultiModalProjector, Llama4VisionRotaryEmbedding

from offload.hardware.system import give_back_freed
from offload.plan.footprint import TILES_AT_ONCE
from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.inventory import find_weight
from quant.errors import CheckpointError
from quant.model.tensors import LinearSpec
from quant.pack import Packed, dequantize
from quant.rounding.encode import check_finite

_TOWER, _PROJECTOR = "vision_model.", "multi_modal_projector."


class VisionTower:
    """Llama 4's vision tower and projector on ``device``, in ``dtype``. Nothing of it is read before an image comes.

    Raises CheckpointError if the checkpoint has no tower, or not all of it.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        weights = _Weights(checkpoint, device, dtype)
        if not weights.keys():
            raise CheckpointError(f"{checkpoint.path} has no vision tower: its model reads text only")
        sections = {name: checkpoint.config[name] for name in ("text_config", "vision_config")}
        config = Llama4Config(**sections)
        vision: Any = config.vision_config
        vision._attn_implementation = "sdpa"
        with torch.device("meta"):
            self._tower: Any = Llama4VisionModel(vision)
            self._projector: Any = Llama4MultiModalProjector(config)
        parts: list[tuple[str, Any]] = [(_TOWER, self._tower), (_PROJECTOR, self._projector)]
        for _, module in parts:
            module.to(dtype).eval()
        # The one part whose numbers are not stored, but computed when it is made.
        self._tower.rotary_embedding = Llama4VisionRotaryEmbedding(vision)
        for prefix, module in parts:
            _check(checkpoint, weights, prefix, module)
            attach_align_device_hook(
                module, execution_device=device, offload=True, weights_map=weights, module_name=prefix[:-1]
            )
        for layer in self._tower.model.layers:
            layer.register_forward_hook(_give_back)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels f32 ``[T, 3, S, S]`` → ``[T · P, H]`` in the tower's dtype, on its device.

        Raises CheckpointError if a weight cannot be read, or holds NaN or Inf.
        """
        rows = []
        for tiles in pixels.split(TILES_AT_ONCE):
            seen = self._tower(tiles.to(self.device, self.dtype)).last_hidden_state
            rows.append(self._projector(seen.reshape(-1, seen.shape[-1])))
        give_back_freed()
        return torch.cat(rows)


class _Weights(Mapping[str, Tensor]):
    """The tower's tensors by their names in transformers' modules, each read when it is asked for; what is packed, made
    dense in ``dtype`` on ``device``."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype
        keys = (key for key, name in checkpoint.names.items() if name.role == "vision")
        self._keys = {key.removeprefix("model."): key for key in keys}
        self._packed: dict[str, LinearSpec] = {}
        for linear in checkpoint.shape.vision_linears():
            if f"{linear.module}.weight_packed" in self._keys:
                self._packed[f"{linear.module}.weight"] = linear
                for suffix in ("packed", "scale", "shape"):
                    self._keys.pop(f"{linear.module}.weight_{suffix}", None)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._dense(self._packed[name]) if name in self._packed else self._checkpoint.read(self._keys[name])
        check_finite(tensor, f"tensor {self._keys.get(name, name)}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter((*self._keys, *self._packed))

    def __len__(self) -> int:
        return len(self._keys) + len(self._packed)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None if there is none of that name."""
        if name in self._packed:
            return self._packed[name].out_features, self._packed[name].in_features
        return self._checkpoint.entries[self._keys[name]].shape if name in self._keys else None

    def _dense(self, linear: LinearSpec) -> Tensor:
        scheme, entries = find_weight(self._checkpoint, linear)
        packed, scale = (self._checkpoint.read(entries[f"weight_{part}"].key) for part in ("packed", "scale"))
        return dequantize(Packed(scheme, packed.to(self._device), scale.to(self._device)), self._dtype)


def _give_back(*_: object) -> None:
    """After each layer: weights of a few megabytes, freed in turn with activations, otherwise leave the heap in pieces,
    a gigabyte of them by the end of Scout's tower."""
    give_back_freed()


def _check(checkpoint: Checkpoint, weights: _Weights, prefix: str, module: Any) -> None:
    parameters: dict[str, Any] = dict(module.named_parameters())
    for name, parameter in parameters.items():
        found = weights.shape(prefix + name)
        if found != tuple(parameter.shape):
            said = "it is not there" if found is None else f"found {list(found)}"
            raise CheckpointError(
                f"{checkpoint.path}: tensor {prefix}{name} of the vision tower: expected {list(parameter.shape)}, "
                f"{said}"
            )
