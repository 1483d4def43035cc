"""GPUs are found however they are spelled, and a desktop is put around them."""

import pytest

from offload.hardware.gpu_catalog import CARDS, GIB, described_machine, find_card
from quant.errors import UsageError


@pytest.mark.parametrize("card", CARDS, ids=[card.name for card in CARDS])
def test_every_card_is_found_by_its_name_in_any_spelling(card: object) -> None:
    name: str = card.name  # type: ignore[attr-defined]
    for spelling in (name, name.lower(), f"NVIDIA GeForce {name}", name.replace("RTX ", "").replace(" ", "-")):
        assert find_card(spelling) is card


def test_a_memory_size_may_be_left_out_where_there_is_only_one() -> None:
    assert find_card("RTX 3060").vram_gib == 12
    with pytest.raises(UsageError, match="RTX 4060 Ti 8GB or RTX 4060 Ti 16GB"):
        find_card("4060 ti")


def test_an_unknown_card_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(UsageError, match=r"did you mean RTX 4090.*known: RTX 3060"):
        find_card("RTX 409O")
    with pytest.raises(UsageError, match="known: "):
        find_card("")


def test_the_machine_around_a_card_has_room_for_the_ram_that_is_asked_for() -> None:
    assert described_machine("4090").ram_bytes == 64 * GIB
    asked = described_machine("4090", ram=192 * GIB, ram_gb_s=55.5, disk_gb_s=3)
    assert asked.ram_available_bytes > 192 * GIB
    assert (asked.ram_gb_s, asked.disk_gb_s, asked.measured) == (55.5, 3, False)
    assert asked.vram_gb_s == 1008 and asked.pcie_gb_s == pytest.approx(25, abs=1)


def test_around_a_data_centres_card_stands_a_server() -> None:
    server, desktop = described_machine("H200"), described_machine("RTX 4090")
    assert server.name == "a server with H200" and server.cores > desktop.cores
    assert server.ram_gb_s > desktop.ram_gb_s and server.ram_bytes == 128 * GIB
    assert described_machine("h200", ram_gb_s=400).ram_gb_s == 400
