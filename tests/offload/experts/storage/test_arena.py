"""Host memory for experts: aligned slots, pinned for a device as far as the system grants it."""

import pytest

from offload.experts.storage import arena
from offload.experts.storage.arena import Arena
from quant.checkpoint.layout import PAGE
from tests.offload.lagging import LaggingTransfer


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_WINDOW", 4 * PAGE)


def test_without_a_device_nothing_is_pinned() -> None:
    made = Arena(5, PAGE)
    assert not any(map(made.device_address, range(5))) and made.notes == []


@pytest.mark.parametrize(("slot", "grain"), [(5 * PAGE, PAGE), (33 * 2**20, 2 * 2**20)])
def test_where_experts_differ_a_slot_gives_back_what_the_next_one_leaves_over(slot: int, grain: int) -> None:
    made = Arena(3, slot, limit=2 * slot)
    assert made.nbytes == 2 * slot and made.taken(grain + 1) == 2 * grain
    for index in range(3):
        made.trim(index, slot)
        made.slot(index)[:slot].fill_(index + 1)
    made.trim(1, grain + 1)
    assert made.slot(1)[: 2 * grain].eq(2).all() and made.slot(1)[2 * grain : slot].eq(0).all()
    made.trim(1, slot)
    assert made.slot(1)[:grain].eq(2).all()
    assert made.slot(0)[:slot].eq(1).all() and made.slot(2)[:slot].eq(3).all()


def test_every_slot_of_a_pinned_arena_has_a_device_address() -> None:
    class Shifted(LaggingTransfer):
        """Its addresses are not the host's, as on some systems."""

        def register(self, address: int, nbytes: int) -> int:
            return super().register(address, nbytes) + 2**44

    made = Arena(10, PAGE, Shifted())
    assert all(map(made.device_address, range(10))) and made.notes == []
    for slot in range(10):
        assert made.device_address(slot) == made.slot(slot).data_ptr() + 2**44
        assert made.slot(slot).data_ptr() % PAGE == 0


def test_where_pinning_is_refused_the_slots_before_stay_pinned_and_the_price_is_said() -> None:
    made = Arena(10, PAGE, LaggingTransfer(pinnable=8 * PAGE))
    assert made.device_address(7) and not made.device_address(8)
    assert len(made.notes) == 1
    assert "32.00 KiB of 40.00 KiB" in made.notes[0] and "other 2 experts" in made.notes[0]


def test_unpinning_undoes_every_window() -> None:
    class Counting(LaggingTransfer):
        held: set[int] = set()  # noqa: RUF012  # one double per test

        def register(self, address: int, nbytes: int) -> int:
            self.held.add(address)
            return address

        def unregister(self, address: int) -> None:
            self.held.remove(address)

    transfer = Counting()
    made = Arena(10, PAGE, transfer)
    assert len(transfer.held) == 3
    made.unpin()
    assert not transfer.held and made.device_address(0) == 0
