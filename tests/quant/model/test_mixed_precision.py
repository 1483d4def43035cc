"""Linears of one role with different schemes: one standard checkpoint all the same."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quant.allocation.units import Granularity, units_of
from quant.checkpoint.config_groups import check_schemes, quantization_config
from quant.checkpoint.stored import stored_schemes
from quant.convert.convert import REPORT, convert
from quant.errors import RecipeError
from quant.model.mixed_precision import MixedPrecision, joined, scheme_of
from quant.model.shape import ModelShape
from quant.scheme import Scheme
from tests.quant.checkpoint.test_config_groups import group_of, shape_of
from tests.quant.convert.test_convert import logits
from tests.quant.dequantized import dequantized_twin, packed_weights

Tiny = Callable[..., Path]
ALL = [Scheme.parse(text) for text in ("int4-g128", "int4-g64", "int4-g32", "int8-g128", "int3-g64", "int2-g32")]


def mixed(shape: ModelShape, granularity: Granularity = "layer") -> MixedPrecision:
    """Every unit another scheme than its neighbours; experts of one where transformers fuses them."""
    units = units_of(shape, ["experts", "shared_expert", "dense_mlp", "attention", "lm_head"], granularity)
    pairs = []
    for index, unit in enumerate(units):
        fused = unit.role == "experts" and not shape.family.fused_transposed
        schemes = ALL[2:3] if fused else ALL
        pairs += [(linear, schemes[index % len(schemes)]) for linear in unit.linears]
    return MixedPrecision.of(pairs)


@pytest.mark.parametrize("granularity", ["layer", "expert"])
@pytest.mark.parametrize("family", ["llama4", "llama4_maverick", "mixtral", "qwen3_moe"])
def test_every_linear_gets_its_own_scheme_from_every_reader_of_the_config(
    tiny: Tiny, family: str, granularity: Granularity
) -> None:
    shape = shape_of(tiny(family))
    towers = [(linear, Scheme("int8", 32)) for linear in shape.vision_linears()]
    mixture = mixed(shape, granularity)
    mixture = MixedPrecision(
        mixture.modules | {linear.module: scheme for linear, scheme in towers},
        {**mixture, **{linear.role: scheme for linear, scheme in towers}},
    )
    check_schemes(shape, mixture)
    config = quantization_config(shape, mixture)
    linear = torch.nn.Linear(1, 1)
    for spec in shape.linears():
        expected = scheme_of(mixture, spec)
        for name in (spec.module, spec.module.removeprefix("language_model.")):
            assert group_of(config, name, linear) == (expected.bits, expected.group_size), name
    stored = stored_schemes({"quantization_config": config}, shape)
    assert isinstance(stored, MixedPrecision) and stored.modules == mixture.modules
    assert stored.identity == mixture.identity
    groups = config["config_groups"].values()
    assert sum("Linear" in group["targets"] for group in groups) == 1
    assert len({json.dumps(group["weights"]) for group in groups}) == len(groups)


@pytest.mark.parametrize(
    ("family", "granularity"), [("llama4_text", "expert"), ("llama4_maverick", "layer"), ("mixtral", "layer")]
)
def test_transformers_alone_computes_what_the_dequantized_model_computes(
    tiny: Tiny, tmp_path: Path, family: str, granularity: Granularity
) -> None:
    source, mixture = tiny(family), mixed(shape_of(tiny(family)), granularity)
    convert(source, tmp_path / "out", mixture)
    assert {module: p.scheme for module, p in packed_weights(tmp_path / "out").items()} == mixture.modules
    twin = dequantized_twin(source, tmp_path / "out", tmp_path / "twin")
    assert (logits(tmp_path / "out") - logits(twin)).abs().max() < 1e-5


def test_only_the_same_mixture_continues_a_run(tiny: Tiny, tmp_path: Path) -> None:
    source, shape = tiny("llama4_text"), shape_of(tiny("llama4_text"))
    layers, experts = mixed(shape), mixed(shape, "expert")
    convert(source, tmp_path / "out", layers)
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["recipe"]["mixture"] == layers.identity != experts.identity
    again = convert(source, tmp_path / "out", layers, resume=True)
    assert "already complete" in again.notes[0]


def test_experts_of_two_schemes_are_refused_where_transformers_could_not_load_them(tiny: Tiny) -> None:
    shape = shape_of(tiny("mixtral"))
    pairs = [
        (linear, Scheme("int8") if linear.layer == 0 else Scheme("int4"))
        for unit in units_of(shape, ["experts"])
        for linear in unit.linears
    ]
    with pytest.raises(RecipeError, match="int4-g128 and int8-g128 in one mixtral checkpoint"):
        check_schemes(shape, MixedPrecision.of(pairs))


def test_sizes_are_counted_linear_by_linear(tiny: Tiny, tmp_path: Path) -> None:
    shape = shape_of(tiny("llama4_text"))
    mixture = mixed(shape)
    counted = sum(
        scheme_of(mixture, linear).nbytes(linear.out_features, linear.in_features) for linear in shape.linears()
    )
    sizes = shape.role_nbytes(mixture)
    assert sum(sizes[role] for role in mixture) == counted
    assert shape.largest_expert(mixture) > shape.experts_nbytes(mixture) / 32


def test_one_scheme_per_role_is_no_mixture(tiny: Tiny) -> None:
    shape = shape_of(tiny("llama4_text"))
    same = joined((linear, Scheme("int4")) for linear in shape.linears())
    assert same == dict.fromkeys(("attention", "shared_expert", "lm_head", "experts"), Scheme("int4"))
