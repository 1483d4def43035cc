"""Cards: consumer and workstation GPUs by name, and a machine around one, to plan for what is not there.

Figures are the vendor's (memory, bandwidth, dense bf16 with f32 accumulation); what PCIe gives to pinned
copies is about 0.8 of the link. The machine around the card is an ordinary desktop: eight cores, two
channels of DDR5-5600, one PCIe 4 NVMe disk; around a data centre's card a part of a server.
"""

import difflib
from dataclasses import dataclass

from offload.hardware.framework import FRAMEWORK_RAM
from offload.hardware.gpu import Gpu
from offload.hardware.probe import Machine
from quant.errors import UsageError

GIB = 2**30
RAM_GB_S = 70.0  # DDR5-5600, two channels: 89.6 by arithmetic, and what reading reaches of it
DISK_GB_S = 6.5
RAM_BYTES = 64 * GIB
_SYSTEM_BYTES = 4 * GIB
_CORES = 8
_GOPS_PER_CORE = 300.0  # int8, with VNNI
_CACHE_BYTES = 40 * 2**20  # a Ryzen 7 7700X or 9700X: 32 MiB of L3, 1 of L2 per core; a Core i7-14700K has 61
SERVER_RAM_GB_S = 150.0  # what sixteen cores of a server read, of more that it has
SERVER_DISK_GB_S = 2.5
SERVER_RAM_BYTES = 128 * GIB
_SERVER_CORES = 16
_SERVER_CACHE_BYTES = 64 * 2**20  # sixteen of a Xeon 8480's 56 cores: 30 of its 105 MiB of L3, 2 of L2 each
_LANE_GB_S = {3: 0.80, 4: 1.57, 5: 3.15}  # pinned copies, per lane


@dataclass(frozen=True)
class Card:
    """One GPU as sold: memory in GiB, its bandwidth in GB/s, PCIe generation and lanes, bf16 in 10^12
    op/s."""

    name: str
    vram_gib: int
    vram_gb_s: float
    pcie: int
    lanes: int
    bf16_tflops: float
    in_server: bool = False

    def gpu(self) -> Gpu:
        """As a measured GPU would look."""
        rate = _LANE_GB_S[self.pcie] * self.lanes
        return Gpu(
            name=self.name,
            vram_bytes=self.vram_gib * GIB,
            vram_gb_s=self.vram_gb_s,
            h2d_gb_s=rate,
            d2h_gb_s=rate,
            bf16_tflops=self.bf16_tflops,
        )


CARDS: tuple[Card, ...] = (
    Card("RTX 3060 12GB", 12, 360, 4, 16, 25),
    Card("RTX 3070", 8, 448, 4, 16, 40),
    Card("RTX 3080 10GB", 10, 760, 4, 16, 59),
    Card("RTX 3080 Ti", 12, 912, 4, 16, 68),
    Card("RTX 3090", 24, 936, 4, 16, 71),
    Card("RTX 3090 Ti", 24, 1008, 4, 16, 80),
    Card("RTX 4060", 8, 272, 4, 8, 30),
    Card("RTX 4060 Ti 8GB", 8, 288, 4, 8, 44),
    Card("RTX 4060 Ti 16GB", 16, 288, 4, 8, 44),
    Card("RTX 4070", 12, 504, 4, 16, 58),
    Card("RTX 4070 Super", 12, 504, 4, 16, 71),
    Card("RTX 4070 Ti", 12, 504, 4, 16, 80),
    Card("RTX 4070 Ti Super", 16, 672, 4, 16, 88),
    Card("RTX 4080", 16, 717, 4, 16, 97),
    Card("RTX 4080 Super", 16, 736, 4, 16, 104),
    Card("RTX 4090", 24, 1008, 4, 16, 165),
    Card("RTX 5060 Ti 16GB", 16, 448, 5, 8, 47),
    Card("RTX 5070", 12, 672, 5, 16, 62),
    Card("RTX 5070 Ti", 16, 896, 5, 16, 88),
    Card("RTX 5080", 16, 960, 5, 16, 113),
    Card("RTX 5090", 32, 1792, 5, 16, 209),
    Card("RTX A4000", 16, 448, 4, 16, 77),
    Card("RTX A5000", 24, 768, 4, 16, 111),
    Card("RTX A6000", 48, 768, 4, 16, 155),
    Card("RTX 6000 Ada", 48, 960, 4, 16, 364),
    Card("RTX PRO 6000", 96, 1792, 5, 16, 500),
    Card("H100", 79, 3350, 5, 16, 989, in_server=True),
    Card("H200", 140, 4800, 5, 16, 989, in_server=True),
)


def find_card(name: str) -> Card:
    """The card called ``name``, however it is spelled. Raises UsageError with the nearest names."""
    wanted = _plain(name)
    by_name = {_plain(card.name): card for card in CARDS}
    if wanted in by_name:
        return by_name[wanted]
    # "3060" is one card, "4060 Ti" either of two that differ in memory.
    same = [card for plain, card in by_name.items() if plain.endswith("gb") and _without_size(card) == wanted]
    if len(same) == 1:
        return same[0]
    near = [by_name[plain].name for plain in difflib.get_close_matches(wanted, by_name, n=3, cutoff=0.5)]
    names = ", ".join(card.name for card in CARDS)
    said = f"did you mean {' or '.join([card.name for card in same] or near)}? " if same or near else ""
    raise UsageError(f"no GPU is called {name!r}: {said}known: {names}")


def described_machine(
    gpu: str, *, ram: int | None = None, ram_gb_s: float | None = None, disk_gb_s: float | None = None
) -> Machine:
    """An ordinary desktop with the card ``gpu`` (a part of a server around a data centre's card) and, where
    ``ram`` is asked for, at least that much free.

    Raises UsageError for a card that is not in the table.
    """
    card = find_card(gpu)
    kind, cores = ("server", _SERVER_CORES) if card.in_server else ("desktop", _CORES)
    least = SERVER_RAM_BYTES if card.in_server else RAM_BYTES
    ram_bytes = max(least, (ram or 0) + FRAMEWORK_RAM + _SYSTEM_BYTES)
    return Machine(
        name=f"a {kind} with {card.name}",
        cpu=f"{cores}-core {kind} (assumed)",
        cores=cores,
        isa="avx2 (assumed)",
        ram_bytes=ram_bytes,
        ram_available_bytes=ram_bytes - _SYSTEM_BYTES,
        ram_gb_s=ram_gb_s or (SERVER_RAM_GB_S if card.in_server else RAM_GB_S),
        disk_gb_s=disk_gb_s or (SERVER_DISK_GB_S if card.in_server else DISK_GB_S),
        int8_gops=cores * _GOPS_PER_CORE,
        gpu=card.gpu(),
        cache_bytes=_SERVER_CACHE_BYTES if card.in_server else _CACHE_BYTES,
        measured=False,
    )


def _without_size(card: Card) -> str:
    return _plain(card.name.rpartition(" ")[0])


def _plain(name: str) -> str:
    """Lower case without vendor words, blanks and punctuation."""
    lowered = name.lower()
    for word in ("nvidia", "geforce", "rtx"):
        lowered = lowered.replace(word, "")
    return "".join(letter for letter in lowered if letter.isalnum())
