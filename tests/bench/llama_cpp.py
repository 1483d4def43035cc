"""llama.cpp's own quantizer beside this project's roundings, on one model and one text.

    npm install node-llama-cpp        (for its libllama; or any build of llama.cpp with shared libraries)
    python -m tests.bench.llama_cpp LIBRARIES [--model DIR] [--ours] [--windows 32] [--only NAME]

The model is written as a GGUF file and quantized by ``llama_model_quantize`` with an importance matrix of
``calibration.txt``: mean squares per input channel, of an expert those of its own tokens. What comes out is read with
the ``gguf`` package's ``dequantize`` and put into the stock transformers model, which ``tests.bench.quality``
measures. The head and the embeddings stay as they are, in ours and in theirs; bits are those of all other Linears,
scales counted.

``Q3_K_M`` is the mixture of types that llama.cpp chooses for that name. ``Q3_K_M, rest q8_0`` gives the experts that
mixture's types and every other Linear 8 bits, as our recipes do: it compares the experts' types alone.

llama.cpp's types have blocks of 256. A row of a model that is narrower is joined with the one after it, so that two
rows share a block: what the type would do if it could, not what the tool does. The default model (hidden 128) is such
a one; ``recipes/demo/train.py --hidden 256`` makes one that needs none of it.
"""

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offload.quality.importance import measure_importance
from offload.quality.windows import Windows
from offload.text.tokenizer import load_tokenizer
from quant.checkpoint.checkpoint import Checkpoint
from quant.scheme import Scheme
from tests.bench.quality import DEMO, Method, Ruler, command, measured_row

BLOCK = 256
KINDS = {"Q2_K": 10, "IQ2_XS": 20, "Q3_K_M": 12, "IQ3_S": 26, "IQ4_XS": 30, "Q4_K_M": 15}  # llama_ftype
Q8_0, F32 = 8, 0  # ggml_type
DENSE = ("attn_.*", "ffn_.*_shexp.*")
_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
Rows = Mapping[str, tuple[tuple[str, ...], Tensor]]  # GGUF name → modules whose rows it holds, f32 [E, N, K]


class _Imatrix(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class _Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class _Parameters(ctypes.Structure):
    """llama_model_quantize_params of llama.cpp v0.5.0."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure")),
        *((name, ctypes.c_bool) for name in ("keep_split", "dry_run")),
        ("imatrix", ctypes.POINTER(_Imatrix)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.POINTER(_Override)),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    )


class LlamaCpp:
    """The quantizer of the shared libraries in ``folder``."""

    def __init__(self, folder: Path) -> None:
        for stem in ("libggml-base", "libggml.", "libllama."):
            found = [file for file in sorted(folder.iterdir()) if file.name.startswith(stem) and ".so" in file.name]
            if not found:
                sys.exit(f"{folder} has no {stem.rstrip('.')}*.so: expected llama.cpp's shared libraries")
            self.library = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
        self.library.llama_model_quantize_default_params.restype = _Parameters

    def quantize(self, source: Path, target: Path, kind: str, squares: Mapping[str, np.ndarray], wide: bool) -> None:
        """Write ``target`` in ``kind``; ``wide``: Linears that are no routed experts have 8 bits."""
        entries = (_Imatrix * (len(squares) + 1))()
        for entry, (name, values) in zip(entries, squares.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        overrides = (_Override * (len(DENSE) + 1))(*((pattern.encode(), Q8_0) for pattern in DENSE))
        parameters = self.library.llama_model_quantize_default_params()
        parameters.nthread, parameters.ftype, parameters.imatrix = 1, KINDS[kind], entries
        parameters.token_embedding_type, parameters.quantize_output_tensor = F32, False
        if wide:
            parameters.tt_overrides = overrides
        words = str(source).encode(), str(target).encode()
        if self.library.llama_model_quantize(*words, ctypes.byref(parameters)):
            sys.exit(f"llama.cpp could not quantize to {kind}")


def joined_rows(weights: Mapping[str, Tensor], experts: int) -> Rows:
    """Every weight by its name in a GGUF file, those of a layer's experts in one."""
    found: dict[str, tuple[list[str], list[Tensor]]] = {}
    for module, weight in weights.items():
        layer, last = module.split(".")[2], module.rpartition(".")[2]
        suffix = "_shexp" if "shared_expert" in module else "_exps" if ".experts." in module else ""
        name = f"blk.{layer}.{_NAMES.get(last) or _MLP[last] + suffix}.weight"
        modules, parts = found.setdefault(name, ([], []))
        modules.append(module)
        parts.append(weight.float())
    assert all(len(modules) in (1, experts) for modules, _ in found.values())
    return {name: (tuple(modules), torch.stack(parts)) for name, (modules, parts) in found.items()}


def fold(width: int) -> int:
    """How many rows of ``width`` are joined to fill a block."""
    return max(1, BLOCK // width)


def write_gguf(file: Path, checkpoint: Checkpoint, rows: Rows) -> None:
    """The model's Linears in f32, and as much else as the quantizer asks for."""
    from gguf import GGUFWriter

    shape = checkpoint.shape
    writer = GGUFWriter(file, "llama4")
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.dense_intermediate or shape.expert_intermediate)
    writer.add_expert_feed_forward_length(shape.expert_intermediate)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.num_experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_interleave_moe_layer_step(1)
    writer.add_rope_freq_base(5e4)
    writer.add_vocab_size(shape.vocab_size)
    for name, (modules, weights) in rows.items():
        narrow = weights.shape[-1]
        wide = weights.reshape(len(modules), -1, narrow * fold(narrow))
        writer.add_tensor(name, (wide if len(modules) > 1 else wide[0]).contiguous().numpy())
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, np.zeros((shape.vocab_size, BLOCK), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def squares_of(checkpoint: Checkpoint, text: Path, rows: Rows) -> dict[str, np.ndarray]:
    """Each tensor's importance, f32: mean squares of its input channels, expert after expert."""
    windows = Windows.cut(text.read_text(), load_tokenizer(checkpoint.path), 512)
    moments = measure_importance(checkpoint, windows).moments
    found = {}
    for name, (modules, weights) in rows.items():
        parts = [moments[module].square.repeat(fold(weights.shape[-1])) for module in modules]
        found[name] = np.ascontiguousarray(torch.cat(parts).numpy(), dtype=np.float32)
    return found


def read_gguf(file: Path, rows: Rows) -> tuple[float, dict[str, str], Method]:
    """Bits per weight, each tensor's type, and the weights as they come out."""
    from gguf import GGUFReader, dequantize

    nbytes = count = 0
    kinds: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    for tensor in GGUFReader(file).tensors:
        if tensor.name not in rows:
            continue
        modules, original = rows[tensor.name]
        nbytes, count = nbytes + tensor.n_bytes, count + original.numel()
        kinds[tensor.name] = tensor.tensor_type.name
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(original.shape)
        weights |= dict(zip(modules, values, strict=True))
    return nbytes * 8 / count, kinds, lambda module, weight: weights[module]


def theirs(library: LlamaCpp, model: Path, ruler: Ruler) -> Iterator[tuple[str, float, Method]]:
    """Each kind as llama.cpp mixes it, and with all but the experts in 8 bits."""
    checkpoint = Checkpoint.open(model)
    rows = joined_rows(ruler.original, checkpoint.shape.num_experts)
    squares = squares_of(checkpoint, DEMO / "calibration.txt", rows)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "plain.gguf", Path(folder) / "quantized.gguf"
        write_gguf(source, checkpoint, rows)
        for kind in KINDS:
            for wide in (False, True):
                library.quantize(source, target, kind, squares, wide)
                bits, kinds, method = read_gguf(target, rows)
                print(" ".join(f"{name} {kinds[name]}" for name in kinds if name.startswith("blk.0.")), file=sys.stderr)
                yield kind + (", rest q8_0" if wide else ""), bits, method


def ours(model: Path, ruler: Ruler) -> Iterator[tuple[str, float, Method]]:
    """Experts in each of our schemes, calibrated, the rest in 8 bits or as ``maverick-3bit`` has it."""
    weights = {module: weight.numel() for module, weight in ruler.original.items()}
    calibration = ("--calibrate", str(DEMO / "calibration.txt"))
    for experts in ("int2-g64", "int2-g32", "int3-g128", "int3-g64", "int4-g128", "int4-g32"):
        for shared in ("int4-g128", "int8-g128"):
            schemes = {".experts.": experts, "shared_expert": shared, "self_attn": "int8-g128"}
            bits = sum(
                count * next(Scheme.parse(text).bits_per_weight for part, text in schemes.items() if part in module)
                for module, count in weights.items()
            ) / sum(weights.values())
            asked = ("--experts", experts, "--shared-expert", shared, "--attention", "int8-g128", *calibration)
            yield f"experts {experts}, shared {shared}", bits, command(*asked, model=model)


def main() -> None:
    """Print a line per method as it is measured, then one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", type=Path, help="folder with libllama and libggml")
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--ours", action="store_true", help="our schemes, calibrated, as well (many minutes)")
    arguments = parser.parse_args()
    ruler = Ruler(arguments.windows or None, arguments.model)
    found: dict[str, dict[str, float]] = {}
    methods = [theirs(LlamaCpp(arguments.libraries), arguments.model, ruler)]
    methods += [ours(arguments.model, ruler)] if arguments.ours else []
    for name, bits, method in (one for group in methods for one in group):
        found[name] = measured_row(ruler, name, bits, method)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
