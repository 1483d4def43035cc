"""Schemes: what can be said, what is refused, what they cost."""

import pytest

from quant.errors import SchemeError
from quant.scheme import BF16, GROUP_SIZES, Scheme


@pytest.mark.parametrize(
    ("text", "expected"),
    [("int4", Scheme("int4", 128)), ("INT8-g32", Scheme("int8", 32)), (" nf4 ", Scheme("nf4")), ("bf16", BF16)],
)
def test_a_scheme_is_read_as_it_is_written(text: str, expected: Scheme) -> None:
    assert Scheme.parse(text) == expected
    assert Scheme.parse(str(expected)) == expected


def test_the_group_size_given_beside_counts_where_the_text_has_none() -> None:
    assert Scheme.parse("int4", 64).group_size == 64
    assert Scheme.parse("int4-g32", 64).group_size == 32
    assert Scheme.parse("nf4", 128).group_size == 64 and Scheme.parse("bf16", 128).group_size == 0


@pytest.mark.parametrize("text", ["int5", "int4-g", "int4-gx", "int4-g100", "", "q4_0"])
def test_what_is_no_scheme_is_refused_naming_what_is(text: str) -> None:
    with pytest.raises(SchemeError, match="expected"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "bits"), [("int4", 4.125), ("int4-g32", 4.5), ("int8", 8.125), ("nf4", 4.5), ("bf16", 16.0)]
)
def test_bits_per_weight_count_the_scales(text: str, bits: float) -> None:
    scheme = Scheme.parse(text)
    assert scheme.bits_per_weight == bits
    assert scheme.nbytes(256, 512) * 8 == bits * 256 * 512


@pytest.mark.parametrize("columns", [96, 160, 192, 384, 5120])
def test_the_group_sizes_offered_do_fit(columns: int) -> None:
    fits = [size for size in GROUP_SIZES if columns % size == 0]
    for size in GROUP_SIZES:
        if size in fits:
            Scheme("int4", size).check("w", 8, columns)
        else:
            offer = " or ".join(map(str, fits))
            with pytest.raises(SchemeError, match=f"w has {columns} input features.*use --group-size {offer}$"):
                Scheme("int4", size).check("w", 8, columns)


def test_nf4_needs_whole_blocks_of_64() -> None:
    Scheme("nf4").check("w", 2, 96)
    with pytest.raises(SchemeError, match="w has 1x96 weights"):
        Scheme("nf4").check("w", 1, 96)


def test_bf16_holds_anything() -> None:
    BF16.check("w", 3, 5)
    assert BF16.nbytes(3, 5) == 30 and not BF16.is_packed
