"""Sessions whose experts lie where a test wants them, instead of where this machine has room."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.experts.storage.store import ExpertStore
from offload.model.paged_cache import PagedCache
from offload.plan.planned_run import PlannedModel, PlannedRun, planned_run
from offload.records import RunOptions
from offload.run.session import Session
from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.inventory import schemes_of_tensors
from quant.model.shape import ModelShape
from tests.machines import machine

_DEFAULTS = {"vram_slots": 0, "vram_seeds": (), "prompt_chunk": 512, "gpu_rows": 0, "prefetch_bytes": 0}


def planned(store: ExpertStore, options: RunOptions, **placed: Any) -> PlannedRun:
    """A run of the model of ``store`` whose plan is changed as ``placed`` says: ``ram_slots``, ``vram_slots``,
    ``gpu_rows`` and the like."""
    model = PlannedModel(store.shape, schemes_of_tensors(store.checkpoint), "as stored")
    run = planned_run(model, replace(options, device="cpu"), machine=machine(), slot_bytes=store.slot_bytes)
    plan = replace(run.plan, **{**_DEFAULTS, "guess_tokens": True, **placed})
    return replace(run, options=options, plan=plan)


def prompt_logits(session: Session, *parts: list[int]) -> Tensor:
    """Logits ``[V]`` of the last token of a text, which is run part after part from its beginning."""
    cache = PagedCache(session.kv_pool) if session.decoder.bound is None else session.decoder.bound
    cache.rewind(0)
    with torch.inference_mode():
        logits = [session.decoder.forward(ids, cache)[-1].clone() for ids in parts]
    cache.rewind(0)
    return logits[-1]


def session(model: Path, options: RunOptions, device: str = "cpu", **placed: Any) -> Session:
    """A session of the model in ``model`` on ``device``, placed like this. With slots in VRAM on a CPU, host
    memory stands for the device's."""
    store = ExpertStore(Checkpoint.open(model))
    return Session(store, planned(store, options, **placed), torch.device(device))


def shape(model: Path) -> ModelShape:
    """What the model in ``model`` looks like."""
    return ExpertStore(Checkpoint.open(model)).shape
