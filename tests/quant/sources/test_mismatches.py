"""Every form of quantized source against every way in which its tensors or its config may not be what they were: what
is read is what the form's own library makes of the very same tensors and config, or it is refused in one line.

GPTQ's and AWQ's libraries are not installed with the tests: their definitions are written down here once more, by
AutoGPTQ's and AutoAWQ's own reckoning.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quant.convert.convert import convert
from quant.errors import ColdstreamError
from quant.scheme import Scheme
from quant.sources.open import open_source
from tests import hostile
from tests.quant.sources import test_bitsandbytes, test_float8, test_gptq, test_integers
from tests.quant.sources.foreign import Tensors, foreign, save, tensors_of

Tiny = Callable[..., Path]
MODULE = "model.layers.0.block_sparse_moe.experts.1.w2"
KEY = f"{MODULE}.weight"
FUSED = "model.layers.0.feed_forward.experts.down_proj"
Config = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """How a form stores a weight, its config, and what its library makes of such tensors (by suffix) and config."""

    store: Callable[[Tensor], tuple[Tensors, Tensor]]
    config: Config
    library: Callable[[Tensors, Config], Tensor]


def by_compressed_tensors(parts: Tensors, config: Config) -> Tensor:
    """As its library decompresses a module by the config's one group."""
    (group,) = config["config_groups"].values()
    name = group.get("format") or config["format"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]), format=name)
    library: Any = BaseCompressor.get_value_from_registry(name)
    made: Tensor = library.decompress({name: part.clone() for name, part in parts.items()}, scheme)["weight"]
    return made


def by_transformers(parts: Tensors, config: Config) -> Tensor:
    """Blocks as DeepSeek's fp8 has them; of the size that the config says."""
    height, width = config["weight_block_size"]
    weight, scale = parts["weight"], parts["weight_scale_inv"]
    assert scale.shape == (-(-weight.shape[0] // height), -(-weight.shape[1] // width))
    theirs: Any = Fp8Dequantize(None)
    made: Tensor = theirs._dequantize_one(weight, scale, torch.float32)
    return made


def by_rows(parts: Tensors, config: Config) -> Tensor:
    """fbgemm's definition."""
    assert parts["weight_scale"].shape == (len(parts["weight"]), 1)
    return parts["weight"].float() * parts["weight_scale"].float()


def by_definition(parts: Tensors, config: Config) -> Tensor:
    """AutoGPTQ's and AutoAWQ's: W = (code - zero point) · scale of its group."""
    bits, is_awq = config["bits"], config["quant_method"] == "awq"
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    words, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"].float()
    assert words.dtype == zeros.dtype == torch.int32

    def along_columns(packed: Tensor) -> Tensor:
        codes = (packed[:, :, None] >> shifts) & (2**bits - 1)
        return (codes[:, :, [0, 4, 1, 5, 2, 6, 3, 7]] if is_awq else codes).flatten(1)

    if is_awq:
        codes = along_columns(words)
    else:
        codes = ((words[:, None, :] >> shifts[None, :, None]) & (2**bits - 1)).flatten(0, 1)
    size = config.get("group_size", -1)
    size = len(codes) if size < 1 else size
    if config.get("desc_act"):
        assert "g_idx" in parts
    group = parts.get("g_idx", torch.arange(len(codes)) // size).long()
    zero = along_columns(zeros)
    if not is_awq and config.get("checkpoint_format") != "gptq_v2":
        zero = (zero + 1) & (2**bits - 1)
    assert scales.shape == zero.shape == (-(-len(codes) // size), codes.shape[1]) and len(group) == len(codes)
    assert int(group.min()) >= 0
    return ((codes - zero[group]).float() * scales[group]).t()


def by_bitsandbytes(parts: Tensors, config: Config) -> Tensor:
    if "SCB" in parts:
        assert parts["SCB"].shape == parts["weight"].shape[:1] and parts["SCB"].dtype == torch.float32
        assert parts["weight"].dtype == torch.int8 and int(parts.get("weight_format", torch.zeros(()))) == 0
        made: Tensor = int8_vectorwise_dequant(parts["weight"], parts["SCB"])
        return made
    beside = {name.removeprefix("weight."): part for name, part in parts.items() if name != "weight"}
    assert {name for name in beside if "bitsandbytes" not in name} >= {"absmax", "quant_map"}
    state = QuantState.from_dict(beside, torch.device("cpu"))
    assert parts["weight"].dtype == torch.uint8 and parts["weight"].numel() * 2 == state.shape.numel()
    assert beside["absmax"].numel() == -(-state.shape.numel() // state.blocksize)
    assert beside["quant_map"].shape == (16,)
    return dequantize_4bit(parts["weight"].view(-1, 1), state)


def int8(weight: Tensor) -> tuple[Tensors, Tensor]:
    codes, largest, _ = int8_vectorwise_quant(weight.half())
    dense: Any = int8_vectorwise_dequant(codes, largest)
    return {"weight": codes, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}, dense


def awq(weight: Tensor) -> tuple[Tensors, Tensor]:
    rows, columns = weight.shape
    random = torch.Generator().manual_seed(5)
    parts = {
        "qweight": torch.randint(-(2**31), 2**31, (columns, rows // 8), dtype=torch.int32, generator=random),
        "qzeros": torch.randint(-(2**31), 2**31, (columns // 32, rows // 8), dtype=torch.int32, generator=random),
        "scales": torch.rand(columns // 32, rows, generator=random).half(),
    }
    return parts, by_definition(parts, AWQ)


def rows_of_fp8(weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    parts = {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    return parts, by_rows(parts, {})


def blocks_of_fp8(weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = torch.rand(weight.shape[0] // 64, weight.shape[1] // 32, generator=torch.Generator().manual_seed(6)) + 0.01
    parts = {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": scale}
    return parts, by_transformers(parts, BLOCKS)


AWQ: Config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
BLOCKS: Config = {"quant_method": "fp8", "weight_block_size": [64, 32], "activation_scheme": "dynamic", "fmt": "e4m3"}
FBGEMM: Config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
BNB8: Config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
KINDS: dict[str, Kind] = {
    **{
        name: Kind(*test_integers.compressed(*form), by_compressed_tensors)
        for name, form in test_integers.FORMS.items()
    },
    **{
        f"fp8 by compressed-tensors, {strategy}": Kind(
            *test_float8.compressed(strategy, **({"block_structure": [64, 32]} if strategy == "block" else {})),
            by_compressed_tensors,
        )
        for strategy in ("tensor", "channel", "block")
    },
    "fp8 in blocks": Kind(blocks_of_fp8, BLOCKS, by_transformers),
    "fp8 by rows": Kind(rows_of_fp8, FBGEMM, by_rows),
    "GPTQ": Kind(test_gptq.gptq, test_gptq.CONFIG, by_definition),
    "GPTQ in another order": Kind(lambda w: test_gptq.gptq(w, acts=True), test_gptq.CONFIG, by_definition),
    "AWQ": Kind(awq, AWQ, by_definition),
    "nf4": Kind(test_bitsandbytes.four_bits("nf4"), test_bitsandbytes.CONFIG, by_bitsandbytes),
    "fp4": Kind(test_bitsandbytes.four_bits("fp4"), test_bitsandbytes.CONFIG, by_bitsandbytes),
    "nf4, doubled": Kind(test_bitsandbytes.four_bits("nf4", double=True), test_bitsandbytes.CONFIG, by_bitsandbytes),
    "int8 by bitsandbytes": Kind(int8, BNB8, by_bitsandbytes),
}
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int32),
    *(torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
)


def edits(tensor: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """What may stand in the place of ``tensor``: nothing, another dtype, another shape, other numbers."""
    yield "missing", None
    for dtype in DTYPES:
        if dtype != tensor.dtype:
            yield f"as {dtype}", tensor.float().nan_to_num().to(dtype)
            if dtype.itemsize == tensor.dtype.itemsize:
                yield f"taken for {dtype}", tensor.view(dtype)
    yield "flat", tensor.flatten()
    yield "a dimension more", tensor[None]
    yield "a dimension more at the end", tensor[..., None]
    if tensor.dim():
        yield "empty", tensor[:0]
        yield "one row less", tensor[1:]
        yield "half the rows", tensor[::2]
        yield "the first alone", tensor[:1]
        yield "the first number", tensor.flatten()[0]
        yield "twice the rows", torch.cat((tensor, tensor))
        yield "each row twice", tensor.view(torch.uint8).repeat_interleave(2, 0).view(tensor.dtype)
    if tensor.dim() > 1:
        yield "turned", tensor.transpose(-1, -2)
        yield "one column less", tensor[:, 1:]
        yield "half the columns", tensor[:, ::2]
        yield "the first column", tensor[:, :1]
        yield "twice the columns", torch.cat((tensor, tensor), 1)
    if tensor.is_floating_point() and tensor.element_size() > 1:
        for value in (float("nan"), float("inf"), 0.0, -1.0):
            yield f"all {value}", torch.full_like(tensor, value)
    else:
        for fill in (0x00, 0x7F, 0x80, 0xFF):
            yield f"all bytes {fill:#x}", torch.full_like(tensor.view(torch.uint8), fill).view(tensor.dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found.to(expected.dtype), expected, 0, 0, equal_nan=True)


@pytest.fixture(scope="module")
def tiniest(tiny: Tiny) -> Path:
    return tiny("mixtral", num_hidden_layers=1, num_local_experts=2, num_attention_heads=2, vocab_size=256)


@pytest.fixture(params=KINDS)
def stored(request: pytest.FixtureRequest, tiniest: Path, tmp_path: Path) -> tuple[Kind, Path, Tensors, Tensor]:
    """A kind, a model with one weight of that kind, its tensors by suffix and what they stand for."""
    kind, folder = KINDS[request.param], tmp_path / "model"
    meant = foreign(tiniest, folder, kind.store, kind.config, re.compile(rf"^{re.escape(KEY)}$"))
    parts = {
        key.removeprefix(f"{MODULE}."): value for key, value in tensors_of(folder).items() if key.startswith(MODULE)
    }
    assert same(open_source(folder).read(KEY), meant[KEY]) and same(kind.library(parts, kind.config), meant[KEY])
    return kind, folder, parts, meant[KEY]


def judged(kind: Kind, folder: Path, parts: Tensors, config: Config, clean: Tensor) -> str:
    """What was said of ``parts`` and ``config``, or nothing where they are read as the library reads them; where it
    does not, what was changed must be without meaning."""
    try:
        source = open_source(folder)
        found = source.read(KEY)
        columns = found.shape[-1]
        some = source.read(KEY, 5 * columns * 4, (7, columns))
    except ColdstreamError as error:
        return str(error)
    try:
        expected = kind.library(parts, config)
        expected = expected if expected.shape == clean.shape else clean
    except Exception:  # noqa: BLE001 - whatever a library makes of it
        expected = clean
    assert same(found, expected), "read as something else than the library reads it"
    assert same(some, found.view(-1, columns)[5:12])
    return ""


def test_tensors_are_what_the_library_makes_of_them_or_refused(stored: tuple[Kind, Path, Tensors, Tensor]) -> None:
    kind, folder, parts, clean = stored
    rest, refused = {key: value for key, value in tensors_of(folder).items() if not key.startswith(MODULE)}, 0
    for name, part in parts.items():
        for what, other in edits(part):
            edited = {key: value for key, value in parts.items() if key != name}
            edited |= {} if other is None else {name: other.contiguous()}
            save(folder, rest | {f"{MODULE}.{key}": value for key, value in edited.items()})
            try:
                refused += bool(judged(kind, folder, edited, kind.config, clean))
            except Exception as error:
                raise AssertionError(f"{name}: {what}: {error}") from error
    assert refused > 10 * len(parts)


def test_a_config_is_what_the_library_makes_of_it_or_refused(stored: tuple[Kind, Path, Tensors, Tensor]) -> None:
    kind, folder, parts, clean = stored
    config = json.loads((folder / "config.json").read_text())
    base = config["quantization_config"]
    values = (
        *hostile.VALUES,
        4,
        16,
        64,
        128,
        [64, 64],
        [32, 64],
        "channel",
        "group",
        "tensor",
        "block",
        "int",
        "float",
    )
    values += ("pack-quantized", "int-quantized", "float-quantized", "gptq_v2", "gptq", "gemm", "gemv")
    for place in hostile.places(base):
        if place[-1] in ("input_activations", "ignore") or "input_activations" in place:
            continue  # of no weight
        for other in (hostile.without(base, place), *(hostile.replaced(base, place, value) for value in values)):
            (folder / "config.json").write_text(json.dumps(config | {"quantization_config": other}))
            try:
                judged(kind, folder, parts, other, clean)
            except Exception as error:
                raise AssertionError(f"{place}: {hostile.at(other, place[:-1])}: {error}") from error


def test_a_scale_that_is_no_number_is_refused_by_name(
    stored: tuple[Kind, Path, Tensors, Tensor], tmp_path: Path
) -> None:
    _, folder, parts, _ = stored
    tensors = tensors_of(folder)
    endings = ("nested_absmax", "scale", "scale_inv", "scales", "SCB", "absmax")
    name = next(name for ending in endings for name in parts if name.endswith(ending))
    tensors[f"{MODULE}.{name}"].view(-1)[-1] = float("nan")
    save(folder, tensors)
    with pytest.raises(ColdstreamError, match=re.escape(MODULE)):
        convert(folder, tmp_path / "out", {"experts": Scheme("int4", 32)}, rounding="rtn")


def test_experts_in_mxfp4_are_what_transformers_makes_of_them_or_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder, tensors = tmp_path / "model", tensors_of(tiny("llama4_text", num_hidden_layers=1, num_local_experts=4))
    shutil.copytree(tiny("llama4_text", num_hidden_layers=1, num_local_experts=4), folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    count, columns, rows = tensors.pop(FUSED).shape
    random = torch.Generator().manual_seed(0)
    parts = {
        "_blocks": torch.randint(256, (count, rows, columns // 32, 16), dtype=torch.uint8, generator=random),
        "_scales": torch.randint(100, 140, (count, rows, columns // 32), dtype=torch.uint8, generator=random),
    }
    clean = convert_moe_packed_tensors(*parts.values()).float()
    for name, part in parts.items():
        for what, other in edits(part):
            edited = {key: value for key, value in parts.items() if key != name}
            edited |= {} if other is None else {name: other.contiguous()}
            save(folder, tensors | {f"{FUSED}{key}": value for key, value in edited.items()})
            try:
                found = open_source(folder).read(FUSED)
            except ColdstreamError:
                continue
            expected = convert_moe_packed_tensors(edited["_blocks"], edited["_scales"]).float()
            ours = found.nan_to_num() if what == "all bytes 0xff" else found  # 2^128 there, no number by the format
            assert ours.shape == clean.shape and (name == "_scales" or same(ours, expected)), (name, what)
            assert same(ours, expected) or what == "all bytes 0xff", (name, what)
