"""Where experts live and how they reach compute.

The names below are imported when they are first used: importing ``offload`` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload.hardware.probe import Machine as Machine
    from offload.hardware.probe import probe as probe
    from offload.plan.plan import Plan as Plan
    from offload.plan.planned_run import PlannedRun as PlannedRun
    from offload.plan.planned_run import planned_run as planned_run
    from offload.plan.planner import make_plan as make_plan
    from offload.quality.evaluate import Evaluation as Evaluation
    from offload.quality.evaluate import evaluate as evaluate
    from offload.records import RunOptions as RunOptions
    from offload.records import Sampling as Sampling
    from offload.records import TokenRecord as TokenRecord
    from offload.run.report import RunReport as RunReport
    from offload.run.session import Session as Session

_MODULES = {
    "Evaluation": "offload.quality.evaluate",
    "Machine": "offload.hardware.probe",
    "Plan": "offload.plan.plan",
    "PlannedRun": "offload.plan.planned_run",
    "RunOptions": "offload.records",
    "RunReport": "offload.run.report",
    "Sampling": "offload.records",
    "Session": "offload.run.session",
    "TokenRecord": "offload.records",
    "evaluate": "offload.quality.evaluate",
    "make_plan": "offload.plan.planner",
    "planned_run": "offload.plan.planned_run",
    "probe": "offload.hardware.probe",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
