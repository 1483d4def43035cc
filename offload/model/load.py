"""A runnable model: transformers' architecture, our modules where the weights are.

The model is built on the meta device, every Linear becomes one that keeps its stored form and every MoE block
one that asks the expert cache; then ``from_pretrained`` places what is left. Experts are never seen by it. The
seam is an ``HfQuantizer`` of our own, which transformers calls between building and loading.

Weights are read here, not by transformers: it would open the files by name again, when they may be another
model's, and map them, so that a file that is cut would kill the process.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from offload.experts.cache.oom import retry_with_less_vram
from offload.experts.storage.arena import Arena
from offload.experts.storage.page_cache import forget_pages
from offload.model.gate import gate_of
from offload.model.moe import ExpertRunner, RoutedExperts, RoutedLlama4Block
from quant.architecture.general_shape import GeneralShape
from quant.architecture.meta_model import attention_implementation, model_class, model_config
from quant.checkpoint.checkpoint import DTYPES, Checkpoint
from quant.checkpoint.inventory import find_weight
from quant.checkpoint.weight_files import TensorEntry
from quant.errors import LIBRARY_ERRORS, CheckpointError
from quant.linear import Compute, KeptEmbedding, QuantLinear
from quant.model.config import language_config
from quant.model.tensors import LinearSpec
from quant.progress import Progress, nobody
from quant.rounding.encode import check_finite
from quant.scheme import BF16, Scheme

_METHOD = "coldstream"
_SMALL = (".bias", ".weight_scale")
_LINE = 64  # bytes of a cache line: what a weight's first byte is aligned to
_LAYER = re.compile(r"layers\.(\d+)\.")


class SwapConfig(QuantizationConfigMixin):
    """Carries the swap to the quantizer that transformers makes from it."""

    def __init__(self, swap: Callable[[PreTrainedModel], None]) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]  # an own method has no place in their enum
        self.swap = swap

    def to_dict(self) -> dict[str, Any]:
        """What transformers logs of it."""
        return {"quant_method": _METHOD}


class SwapQuantizer(HfQuantizer):
    """Swaps modules while the model is on the meta device."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        assert isinstance(config, SwapConfig)
        config.swap(model)
        return model

    def is_serializable(self) -> bool:
        """Such a model is not saved: the checkpoint it came from is."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Inference only."""
        return False


def _register() -> None:
    if _METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(_METHOD)(SwapConfig)
        register_quantizer(_METHOD)(SwapQuantizer)


def text_config(checkpoint: Checkpoint) -> Any:
    """The language model's config for transformers, in a family of our tables made of the keys that its code reads,
    all of them checked.

    Raises CheckpointError if transformers rejects it all the same.
    """
    if not checkpoint.shape.is_native:
        return model_config(checkpoint.config)
    _, record = language_config(checkpoint.config)
    kind = "llama4_text" if checkpoint.shape.model_type == "llama4" else checkpoint.shape.model_type
    try:
        return AutoConfig.for_model(kind, **record.for_transformers())
    except (*LIBRARY_ERRORS, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.path / 'config.json'} is rejected by transformers: {said}") from None


def check_rope(config: PretrainedConfig, context: int) -> None:
    """Raise CheckpointError if a text of ``context`` tokens would change the RoPE frequencies on its way.

    RoPE of type dynamic and longrope takes other frequencies once a text is longer than the model was first
    trained for. Keys that are in the KV cache by then keep the old ones, so what comes out depends on how the text
    was cut into steps: transformers itself gives several answers.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("dynamic", "longrope"):
        return
    stated = rope.get("original_max_position_embeddings") if kind == "longrope" else None
    limit = stated or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    if context > limit:
        raise CheckpointError(
            f"RoPE of type {kind!r} changes within a text of over {limit:,} tokens, which is not supported: expected "
            f"a context of at most that, found {context:,}; give --context {limit}"
        )


class _Reading:
    """Reads tensors for transformers, and keeps the first error: it would wrap it in its own words."""

    def __init__(self, read: Callable[[str], Tensor], checked: Collection[str]) -> None:
        self._read, self._checked = read, checked  # those must be finite
        self._error: CheckpointError | None = None

    def tensor(self, key: str, entry: TensorEntry) -> Tensor:
        """Tensor ``key``; of arbitrary values once something has failed."""
        try:
            if self._error is None:
                tensor = self._read(key)
                if key in self._checked:
                    check_finite(tensor, f"tensor {key}")
                return tensor
        except CheckpointError as error:
            self._error = error
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])

    def check(self) -> None:
        """Raise what has failed."""
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class _Unread:
    """A tensor that is read when transformers asks for all of it, as it asks safetensors' slices."""

    reading: _Reading
    key: str
    entry: TensorEntry

    def __getitem__(self, index: Any) -> Tensor:
        return self.reading.tensor(self.key, self.entry)


def load_model(
    checkpoint: Checkpoint,
    runner: ExpertRunner,
    compute: Compute,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = nobody,
    read: Callable[[str], Tensor] | None = None,
) -> PreTrainedModel:
    """The causal language model of ``checkpoint`` with its dense weights on ``device``, experts left to
    ``runner``.

    Activations are of ``dtype``; weights keep their stored form. ``read`` gives a tensor by its key, as
    ``checkpoint.read`` does, which is taken otherwise. Raises CheckpointError for a tensor that is absent, and for
    a file that is no longer the one whose header was read; NonFiniteError for a small tensor, a scale or a weight of
    attention that holds NaN or Inf (looking at every weight would take as long as loading).
    """
    _register()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = text_config(checkpoint)
    keys = [key for key, name in checkpoint.names.items() if name.role not in ("experts", "vision")]
    reading = _Reading(read or checkpoint.read, {key for key in keys if _is_checked(checkpoint, key)})
    kind = model_class(config)
    loaded: Any = kind.from_pretrained(
        None,
        config=config,
        state_dict={key: _Unread(reading, key, checkpoint.entries[key]) for key in keys},
        dtype=dtype,
        quantization_config=SwapConfig(lambda built: swap_modules(built, checkpoint, runner, compute, dtype)),
        attn_implementation=attention_implementation(kind),
        output_loading_info=True,
        generation_config=GenerationConfig(),  # ours is read elsewhere, and checked
    )
    reading.check()
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    if info["missing_keys"] or info["mismatched_keys"]:
        names = ", ".join(sorted(str(key) for key in {*info["missing_keys"], *info["mismatched_keys"]})[:3])
        raise CheckpointError(f"{checkpoint.path} lacks weights of the model or has them in another shape: {names}")
    model.eval()
    if device.type != "cpu":
        retry_with_less_vram(lambda: _move(model, device, progress), runner.cache)
    return model


def _is_checked(checkpoint: Checkpoint, key: str) -> bool:
    """Whether ``key`` must be finite. Of what is not, the logits tell in the end; but torch's attention takes queries
    and keys that are NaN for masked ones, and goes on with zeros."""
    is_small = key.endswith(_SMALL) or len(checkpoint.entries[key].shape) < 2
    return is_small or checkpoint.names[key].role in ("norm", "router", "attention")


def _move(model: PreTrainedModel, device: torch.device, progress: Progress = nobody) -> None:
    """Move all weights to ``device`` but the embeddings, of which a token reads one row; they stay on the
    host unless they are the output head, too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", object()):
        model.to(device)  # type: ignore[arg-type]
        return
    moved, total = 0, sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if module is not embedding:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
        moved += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        progress(moved, total, "loading")


def move_to_arena(model: PreTrainedModel, progress: Progress = nobody) -> Arena:
    """Move the weights of a model on the CPU into one arena of huge pages, which read half as fast again, and
    let go of the mapped files that they were loaded from, whose pages would count as resident beside it.

    The arena must live as long as the model; who holds addresses of weights must take them anew.
    """
    parameters = list(model.parameters())
    arena = Arena(1, sum(-(-parameter.nbytes // _LINE) * _LINE for parameter in parameters))
    memory, position = arena.slot(0), 0
    for parameter in parameters:
        stored = parameter.data
        place = memory[position : position + stored.nbytes].view(stored.dtype).view(stored.shape)
        parameter.data = place.copy_(stored)
        forget_pages(stored)
        progress(position + stored.nbytes, arena.slot_bytes, "loading")
        position += -(-stored.nbytes // _LINE) * _LINE
    return arena


def swap_modules(
    model: PreTrainedModel, checkpoint: Checkpoint, runner: ExpertRunner, compute: Compute, dtype: torch.dtype
) -> None:
    """Replace MoE blocks, Linears and the embedding of a model that is on the meta device."""
    shape = checkpoint.shape
    if isinstance(shape, GeneralShape):
        _swap_general(model, checkpoint, shape, runner, compute, dtype)
        return
    for name, module in list(model.named_modules()):
        place = _LAYER.search(name)
        if place is None or int(place[1]) not in shape.moe_layers:
            continue
        layer = int(place[1])
        if type(module).__name__ == "Llama4TextMoe":
            model.set_submodule(name, RoutedLlama4Block(module, layer, runner))
        elif name.endswith(f"layers.{layer}.{shape.family.runtime_block}.experts"):
            model.set_submodule(name, RoutedExperts(layer, runner))
    specs = {runtime_name(checkpoint, spec.module): spec for spec in shape.dense_linears()}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            scheme, stored = _stored(checkpoint, specs.get(name))
            linear = QuantLinear(
                module.out_features, module.in_features, scheme, compute, bias=module.bias is not None, dtype=stored
            )
            model.set_submodule(name, linear)
    embedding: Any = model.get_input_embeddings()
    stored = _stored_dtype(checkpoint, f"{shape.embedding_module}.weight")
    model.set_input_embeddings(KeptEmbedding(embedding.num_embeddings, embedding.embedding_dim, stored, dtype))


def _swap_general(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    shape: GeneralShape,
    runner: ExpertRunner,
    compute: Compute,
    dtype: torch.dtype,
) -> None:
    """As ``swap_modules``, by what the shape found in the model. Towers that see or hear are taken out."""
    for tower in shape.structure.towers:
        model.set_submodule(tower, nn.Identity())
    for layer, experts in shape.structure.experts.items():
        runner.gate = gate_of(model.get_submodule(experts.module))
        model.set_submodule(experts.module, RoutedExperts(layer, runner))
    linears = {shape.runtime_name(spec.module): _stored(checkpoint, spec) for spec in shape.dense_linears()}
    stored = _stored_dtype(checkpoint, f"{shape.embedding_module}.weight")
    embedding: Any = model.get_input_embeddings()
    if type(embedding) is nn.Embedding:
        model.set_input_embeddings(KeptEmbedding(embedding.num_embeddings, embedding.embedding_dim, stored, dtype))
        if shape.tie_word_embeddings:
            linears["lm_head"] = BF16, stored
    for name, (scheme, kept) in linears.items():
        module: Any = model.get_submodule(name)
        bias = module.bias is not None
        linear = QuantLinear(module.out_features, module.in_features, scheme, compute, bias=bias, dtype=kept)
        model.set_submodule(name, linear)


def runtime_name(checkpoint: Checkpoint, module: str) -> str:
    """The name in transformers' model of checkpoint module ``module``."""
    return checkpoint.shape.runtime_name(module)


def _stored(checkpoint: Checkpoint, spec: LinearSpec | None) -> tuple[Scheme, torch.dtype]:
    if spec is None:
        return BF16, torch.bfloat16
    scheme, entries = find_weight(checkpoint, spec)
    if scheme.kind == "nf4":
        raise CheckpointError(f"{checkpoint.path}: {spec.module} is nf4: only experts are run in nf4")
    return scheme, _kept(entries["weight"].dtype) if "weight" in entries else torch.bfloat16


def _stored_dtype(checkpoint: Checkpoint, key: str) -> torch.dtype:
    return _kept(checkpoint.find(key).dtype)


def _kept(dtype: str) -> torch.dtype:
    """What a dense weight stored in ``dtype`` is in memory: the same, but f32 for f64, in which nothing computes."""
    return torch.float32 if dtype == "F64" else DTYPES[dtype]
