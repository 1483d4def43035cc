"""A model without experts is planned, replayed and refused as any other."""

import pytest
from transformers import CONFIG_MAPPING

from offload.plan.planned_run import PlannedModel, planned_run
from offload.records import RunOptions
from quant.architecture.shape import shape_of
from quant.errors import BudgetError
from tests.family_checkpoints import COMMON, FAMILIES
from tests.machines import machine

MODEL = PlannedModel(shape_of(CONFIG_MAPPING["llama"](**{**COMMON, **FAMILIES["llama"]}).to_dict()), {}, "as stored")


@pytest.mark.parametrize("on", [machine(), "RTX 4090"])
def test_a_dense_model_is_planned(on: object) -> None:
    run = planned_run(MODEL, RunOptions(ram=2**30), machine=on)  # type: ignore[arg-type]
    assert run.plan.experts == 0 and run.plan.predicted_tokens_per_s > 0
    assert sum(row.nbytes for row in run.plan.rows if row.role == "dense_mlp") > 0


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(BudgetError, match=r"needs .* of RAM \(.*\) but its budget is 20.00 MiB: use --ram"):
        planned_run(MODEL, RunOptions(ram=20 * 2**20), machine=machine())
