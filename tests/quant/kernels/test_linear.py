"""The native product equals the torch reference on packed weights of any shape, on every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import SchemeError
from quant.kernels import native
from quant.kernels.native import Weight
from quant.kernels.weight import NativeKind
from quant.pack import Packed, dequantize, pack, quantize_absmax
from quant.scheme import GROUP_SIZES, Kind, Scheme

KINDS: list[Kind] = ["int2", "int3", "int4", "int8"]


def rounded(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x as the kernels see it: int8 per group, scale absmax / 127."""
    groups = x.reshape(x.shape[0], -1, group_size)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    q = torch.where(scale > 0, (groups / scale).round(), torch.zeros_like(groups))
    return (q.double() * scale.double()).reshape(x.shape)


def weight_of(packed: Packed) -> Weight:
    return Weight.from_tensors(packed.scheme.kind, packed.packed, packed.scale)


def error(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> float:
    """Largest error relative to the sum of magnitudes, the quantity that f32 rounding scales with."""
    magnitude = x.double().abs() @ dense.abs().T + 1e-30
    return float(((y.double() - x.double() @ dense.T).abs() / magnitude).max())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 90),
    groups=st.integers(1, 9),
    group_size=st.sampled_from(GROUP_SIZES),
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 65),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    seed=st.integers(0, 99),
)
def check_random_product(
    rows: int, groups: int, group_size: int, kind: Kind, tokens: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * group_size, generator=generator)
    weight *= torch.exp(torch.randn(rows, 1, generator=generator) * spread)
    x = torch.randn(tokens, groups * group_size, generator=generator) + 0.5
    x *= torch.exp(torch.randn(tokens, 1, generator=generator) * spread)
    packed = quantize_absmax(weight, Scheme(kind, group_size))
    dense = dequantize(packed).double()
    seen = rounded(x, group_size)
    assert error(native.linear(x, weight_of(packed)), seen, dense) < 2e-6
    assert error(native.linear(x, weight_of(packed), exact=True), x, dense) < 1e-6


def test_any_shape_equals_the_reference(isa: str) -> None:
    check_random_product()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    group_size=st.sampled_from(GROUP_SIZES),
    kind=st.sampled_from(KINDS),
    tokens=st.sampled_from([1, 4, 6, 20]),
    seed=st.integers(0, 999),
)
def check_random_bytes(rows: int, groups: int, group_size: int, kind: Kind, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = group_size * groups * Scheme(kind).bits // 32
    packed = torch.randint(-(2**31), 2**31, (rows, words), generator=generator, dtype=torch.int64).to(torch.int32)
    bits = torch.randint(-(2**15), 2**15, (rows, groups), generator=generator, dtype=torch.int64)
    scale = bits.to(torch.int16).view(torch.bfloat16)
    weight = Weight.from_tensors(kind, packed, scale)
    dense = dequantize(Packed(Scheme(kind, group_size), packed, scale)).double()
    x = torch.randn(tokens, group_size * groups, generator=generator)
    sane = (dense.abs().amax(1) < 1e30) & dense.isfinite().all(1)
    for exact, seen in ((True, x), (False, rounded(x, group_size))):
        y = native.linear(x, weight, exact=exact)[:, sane]
        assert error(y, seen, dense[sane]) < 2e-6 if sane.any() else y.numel() == 0


def test_any_bytes_are_some_weight(isa: str) -> None:
    check_random_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 19])
def test_integer_parts_are_exact(isa: str, kind: Kind, tokens: int) -> None:
    """Scales of one and whole activations up to 127 leave nothing to round: the result is the integer."""
    generator = torch.Generator().manual_seed(tokens)
    bits = Scheme(kind).bits
    half = 2 ** (bits - 1)
    for group_size in GROUP_SIZES:
        q = torch.randint(-half, half, (45, 3 * group_size), generator=generator, dtype=torch.int8)
        q[0] = -half
        q[1] = half - 1
        x = torch.randint(-127, 128, (tokens, 3 * group_size), generator=generator).float()
        x[0] = 127.0
        x[:, ::group_size] = -127.0
        words = pack(q, bits)
        weight = Weight.from_tensors(kind, words, torch.ones(45, 3, dtype=torch.bfloat16))
        expected = (x.double() @ q.double().T).float()
        assert torch.equal(native.linear(x, weight), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("rows", "groups"), [(37, 5), (5, 3), (64, 16), (48, 41)])
def test_a_token_gets_the_same_bits_in_any_company(
    isa: str, kind: Kind, group_size: int, rows: int, groups: int
) -> None:
    """One token, a few and many go through three kernels; a row of y must not show which."""
    generator = torch.Generator().manual_seed(rows)
    weight = weight_of(
        quantize_absmax(torch.randn(rows, groups * group_size, generator=generator), Scheme(kind, group_size))
    )
    x = torch.randn(40, groups * group_size, generator=generator)
    whole = native.linear(x, weight)
    for tokens in (*range(1, 18), 24):
        assert torch.equal(native.linear(x[:tokens], weight), whole[:tokens]), tokens
        assert torch.equal(native.linear(x[-tokens:], weight), whole[-tokens:]), tokens


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_a_few_tokens_get_the_same_bits_from_plain_weights(isa: str, kind: NativeKind) -> None:
    generator = torch.Generator().manual_seed(2)
    plain = torch.randn(37, 300, generator=generator).to(torch.bfloat16 if kind == "bf16" else torch.float32)
    weight, x = Weight.from_tensors(kind, plain), torch.randn(16, 300, generator=generator)
    whole = native.linear(x, weight)
    for tokens in range(1, 16):
        assert torch.equal(native.linear(x[:tokens], weight), whole[:tokens]), tokens


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("columns", [1, 7, 64, 100, 2500])
def test_plain_weights_of_any_width_are_multiplied_exactly(isa: str, kind: NativeKind, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[kind]
    plain = torch.randn(37, columns, generator=generator).to(dtype)
    if kind == "f16":
        plain[0] = 2.0**-24  # the smallest there is, a subnormal
        plain[1] = 65504.0  # and the largest
    weight = Weight.from_tensors(kind, plain)
    for tokens in (1, 2, 3, 4, 9, 17, 40):
        x = torch.randn(tokens, columns, generator=generator)
        assert error(native.linear(x, weight), x, plain.double()) < 1e-6


def test_extreme_activations_neither_overflow_nor_vanish(isa: str) -> None:
    packed = quantize_absmax(torch.randn(8, 256, generator=torch.Generator().manual_seed(0)), Scheme("int4", 128))
    dense = dequantize(packed).double()
    for factor in (1e30, 1e-20):
        x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)) * factor
        assert error(native.linear(x, weight_of(packed)), rounded(x, 128), dense) < 2e-6
    for tiny in (0.0, 1e-40):
        assert torch.equal(native.linear(torch.full((1, 256), tiny), weight_of(packed)), torch.zeros(1, 8))


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_value_that_is_not_finite_surfaces_as_nan(isa: str, tokens: int) -> None:
    packed = quantize_absmax(torch.randn(8, 256, generator=torch.Generator().manual_seed(0)), Scheme("int4", 128))
    x = torch.ones(tokens, 256)
    x[0, 3] = float("inf")
    y = native.linear(x, weight_of(packed))
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


def test_weights_at_any_word_boundary_and_strided_inputs_are_read_in_place() -> None:
    packed = quantize_absmax(torch.randn(40, 128, generator=torch.Generator().manual_seed(0)), Scheme("int4", 64))
    store = torch.zeros(packed.packed.numel() + 3, dtype=torch.int32)
    store[3:] = packed.packed.flatten()
    moved = Weight("int4", 64, 40, 128, store.data_ptr() + 12, packed.scale.data_ptr(), (store, packed.scale))
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))[:, 7:135]
    out = torch.full((5, 50), 7.0)
    native.linear(x, moved, out=out[:, 5:45])
    assert torch.equal(out[:, 5:45], native.linear(x.contiguous(), weight_of(packed)))
    assert (out[:, :5] == 7).all() and (out[:, 45:] == 7).all()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    packed = quantize_absmax(torch.randn(300, 512, generator=torch.Generator().manual_seed(0)), Scheme("int4", 128))
    usual = native.threads()
    x = torch.randn(11, 512, generator=torch.Generator().manual_seed(1))
    one: torch.Tensor | None = None
    try:
        for count in (1, 2, 5):
            native.set_threads(count)
            assert native.threads() == count
            y = native.linear(x, weight_of(packed))
            one = y if one is None else one
            assert torch.equal(one, y)
    finally:
        native.set_threads(usual)


def test_shapes_that_do_not_fit_are_refused_before_any_byte_is_read() -> None:
    packed = quantize_absmax(torch.ones(4, 128), Scheme("int4", 128))
    with pytest.raises(SchemeError, match=r"expected \[tokens, 128\]"):
        native.linear(torch.ones(1, 64), weight_of(packed))
    with pytest.raises(SchemeError, match="is no int4 weight"):
        Weight.from_tensors("int4", packed.packed.float(), packed.scale)
    with pytest.raises(SchemeError, match="expected a scale for each group"):
        Weight("int4", 100, 4, 200, 4096, 4096)
    with pytest.raises(SchemeError, match="odd address"):
        Weight("int4", 128, 4, 128, 4098, 4096)
