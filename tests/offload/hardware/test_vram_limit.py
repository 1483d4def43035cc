"""What a run may take of a GPU that others use, too."""

import pytest
import torch

from offload.hardware import cuda_driver as driver
from offload.hardware import vram_limit as module
from offload.hardware.framework import FRAMEWORK_VRAM
from offload.hardware.vram_limit import CODE, Allowance
from quant.errors import BudgetError

GIB, MIB = 2**30, 2**20
TOTAL, CONTEXT = 24 * GIB, 400 * MIB


def allowance(asked: int | None, others: int = 0, context: int | None = CONTEXT, reserved: int = 0) -> Allowance:
    return Allowance.of(TOTAL, TOTAL - others - CONTEXT - reserved, asked, context, reserved)


def test_an_idle_card_gives_what_was_asked() -> None:
    found = allowance(20 * GIB)
    assert (found.budget, found.others, found.notes) == (20 * GIB, 0, ())


def test_more_than_the_card_has_is_cut_to_the_card() -> None:
    assert allowance(48 * GIB).budget == TOTAL


def test_what_torch_holds_already_is_ours() -> None:
    assert allowance(20 * GIB, reserved=3 * GIB).others == 0


def test_what_others_hold_is_taken_off_and_said() -> None:
    found = allowance(24 * GIB, others=6 * GIB)
    assert found.budget == 18 * GIB and "6.00 GiB of the GPU's 24.00 GiB" in found.notes[0]
    assert allowance(16 * GIB, others=6 * GIB).notes == ()


def test_without_a_wish_a_little_is_left_to_others() -> None:
    assert allowance(None).budget == int(TOTAL * 0.95)
    assert TOTAL - 6 * GIB - GIB < allowance(None, others=6 * GIB).budget < TOTAL - 6 * GIB


def test_a_desktop_that_holds_a_little_is_not_worth_a_note() -> None:
    assert allowance(24 * GIB, others=300 * MIB).notes == ()


def test_an_unknown_context_is_assumed_and_said() -> None:
    found = allowance(20 * GIB, context=None)
    assert 0 < found.context <= FRAMEWORK_VRAM and "assumed" in found.notes[0]


def test_a_card_that_others_fill_is_refused_with_the_numbers() -> None:
    with pytest.raises(BudgetError, match=r"other programs hold 23.* GiB of 24.00 GiB"):
        allowance(None, others=TOTAL - CONTEXT - CODE - 30 * MIB)


def test_a_plan_that_does_not_fit_names_the_others() -> None:
    refused = allowance(24 * GIB, others=6 * GIB).explain(BudgetError("this needs 20 GiB"))
    assert str(refused) == "this needs 20 GiB (other programs hold 6.00 GiB of the GPU's 24.00 GiB)"
    assert str(allowance(24 * GIB).explain(BudgetError("this needs 30 GiB"))) == "this needs 30 GiB"


def test_a_plan_counts_with_the_context_that_was_measured() -> None:
    small, large = (allowance(20 * GIB, context=size * MIB) for size in (200, 600))
    assert small.planned == 20 * GIB
    assert large.planned + 600 * MIB + CODE < 20 * GIB + FRAMEWORK_VRAM


def test_torch_is_told_the_number_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.device("cuda") has none, and torch.cuda.set_per_process_memory_fraction refuses that."""
    told = []
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: told.append(given), raising=False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (TOTAL - CONTEXT, TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 0)
    monkeypatch.setattr(module, "_context_bytes", lambda index: CONTEXT)
    assert Allowance.claim(torch.device("cuda"), 12 * GIB).budget == 12 * GIB
    assert told == [((12 * GIB - CONTEXT - CODE) / TOTAL, 0)]


@pytest.mark.parametrize("had", [False, True])
def test_a_context_is_measured_if_there_was_none_whatever_torch_was_asked_before(
    had: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([20 * GIB, 19 * GIB] if not had else [19 * GIB])
    monkeypatch.setattr(driver, "bus_id", lambda index: "0000:01:00.0")
    monkeypatch.setattr(driver, "has_context", lambda index: had)
    monkeypatch.setattr(driver, "free_vram", lambda bus: next(free))
    monkeypatch.setattr(module, "_make_context", lambda device: 32 * MIB)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # as after asking for the card's name
    module._context_bytes.cache_clear()
    try:
        assert module._context_bytes(0) == (None if had else GIB - 32 * MIB)
    finally:
        module._context_bytes.cache_clear()
