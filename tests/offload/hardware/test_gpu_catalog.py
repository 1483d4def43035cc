"""GPUs are found however they are spelled, and a desktop is put around them."""

import re
from dataclasses import replace

import pytest

from offload.hardware.gpu_catalog import CARDS, GIB, Card, card_names, described_machine, find_card
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


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("RTX 4090 24GB", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Max-Q"),
        ("NVIDIA RTX PRO 4000 Blackwell SFF Edition", "RTX PRO 4000 SFF"),
        ("NVIDIA RTX PRO 5000 72GB Blackwell", "RTX PRO 5000 72GB"),
        ("NVIDIA GeForce RTX 5070 Ti Laptop GPU", "RTX 5070 Ti Laptop"),
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090 D"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Quadro RTX 6000", "Quadro RTX 6000"),
    ],
)
def test_a_card_is_found_by_what_its_driver_calls_it(said: str, name: str) -> None:
    assert find_card(said).name == name


@pytest.mark.parametrize("unlike", ["MI300X", "RX 7900 XTX", "Apple M3", "Arc A770", "RTX 4090 16GB", ""])
def test_a_card_of_another_kind_is_not_taken_for_one_that_is_known(unlike: str) -> None:
    with pytest.raises(UsageError) as error:
        find_card(unlike)
    suggested = re.findall(r"mean (.*)\?", str(error.value))
    assert suggested == (["RTX 4090 or RTX 4090 D"] if "4090" in unlike else [])


def test_an_unknown_card_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(UsageError, match=r"did you mean RTX 4090.*--help` lists"):
        find_card("RTX 409O")
    with pytest.raises(UsageError, match="describe any other"):
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


def test_a_card_of_ones_own_is_its_figures_in_any_order() -> None:
    own = find_card("My card, 24GiB, 1008GB/s, 165TFLOPS, pcie4x16")
    assert own.gpu() == replace(find_card("RTX 4090").gpu(), name="My card")
    assert find_card("X,pcie5x8,1.5TFLOPS,80 GB/s,512MiB").vram_gib == 0.5
    for wrong in (
        "X,",
        "X,24GiB",
        ",24GiB,1008GB/s,165TFLOPS,pcie4x16",
        "X,24GiB,24GiB,165TFLOPS,pcie4x16",
        "X,0GiB,1008GB/s,165TFLOPS,pcie4x16",
        "X,24GiB,fast,165TFLOPS,pcie4x16",
        "X,1.2.3GiB,1008GB/s,165TFLOPS,pcie4x16",
        "X,24GiB,1.2.3GB/s,165TFLOPS,pcie4x16",
        f"X,24GiB,{'9' * 400}GB/s,165TFLOPS,pcie4x16",
        "X,24GiB,1008GB/s,165TFLOPS,pcie9x16",
    ):
        with pytest.raises(UsageError, match="describes no card"):
            find_card(wrong)


@pytest.mark.parametrize("card", [card for card in CARDS if card.capability < 8], ids=lambda card: card.name)
def test_a_card_that_runs_would_refuse_is_planned_without_and_said(card: Card) -> None:
    machine = described_machine(card.name)
    assert machine.gpu is None and f"{card.name} has compute capability" in machine.notes[0]
    assert card.name not in card_names()
