"""Where a run computes: what is chosen of the machine."""

import os

import pytest
import torch

from offload.records import RunOptions
from offload.run.device import choose_compute
from quant.kernels import native


@pytest.mark.parametrize(
    ("device", "cpus", "threads", "asked", "used"),
    [
        ("cuda", 16, 16, 0, 15),  # no hyper-threads: one core is for the thread that launches steps
        ("cuda", 32, 16, 0, 16),
        ("cuda", 2, 2, 0, 2),
        ("cuda", 16, 16, 16, 16),  # as asked
        ("cpu", 16, 16, 0, 16),
    ],
)
def test_a_core_is_left_to_the_launch_of_steps(
    device: str, cpus: int, threads: int, asked: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = [threads]
    monkeypatch.setattr(native, "threads", lambda: count[0])
    monkeypatch.setattr(native, "set_threads", lambda wanted: count.__setitem__(0, wanted))
    monkeypatch.setattr(torch, "set_num_threads", lambda wanted: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    choose_compute(RunOptions(threads=asked or None), torch.device(device))
    assert count == [used]
