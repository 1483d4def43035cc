"""Cards: consumer and workstation GPUs by name, and a machine around one, to plan for what is not there.

Figures are the vendor's (memory, bandwidth, dense bf16 with f32 accumulation); what PCIe gives to pinned
copies is about 0.8 of the link. The machine around the card is an ordinary desktop: eight cores, two
channels of DDR5-5600, one PCIe 4 NVMe disk; around a data centre's card a part of a server.
"""

import difflib
import re
from dataclasses import dataclass

from offload.hardware.framework import FRAMEWORK_RAM, GIB
from offload.hardware.gpu import Gpu
from offload.hardware.probe import Machine
from quant.errors import UsageError
from quant.sizes import parse_size

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
LEAST_CAPABILITY = 8.0  # Ampere, see offload/run/device.py
_SIZE = re.compile(r"(.*[^\s-])[\s-]+(\d{1,3}) ?gb\W*")
_ADDED = re.compile(
    r"nvidia|geforce|rtx|tesla|generation|gpu|graphics|blackwell|workstation|server|edition|hbm\d|sxm\d?|pcie"
)
_SOLD_BY = re.compile(r"nvidia|geforce|rtx")
OWN_CARD = "NAME,24GiB,1008GB/s,165TFLOPS,pcie4x16"
_LANE_GB_S = {3: 0.80, 4: 1.57, 5: 3.15}  # pinned copies, per lane


@dataclass(frozen=True)
class Card:
    """One GPU as sold: memory in GiB, its bandwidth in GB/s, PCIe generation and lanes, bf16 in 10^12 op/s,
    compute capability where that is too old to be used."""

    name: str
    vram_gib: float
    vram_gb_s: float
    pcie: int
    lanes: int
    bf16_tflops: float
    in_server: bool = False
    capability: float = LEAST_CAPABILITY

    @property
    def spellings(self) -> tuple[str, ...]:
        """Its name, and how it is called for short."""
        return (self.name, self.name[4:]) if self.name.startswith("RTX ") else (self.name,)

    def gpu(self) -> Gpu:
        """As a measured GPU would look."""
        rate = _LANE_GB_S[self.pcie] * self.lanes
        return Gpu(
            name=self.name,
            vram_bytes=int(self.vram_gib * GIB),
            vram_gb_s=self.vram_gb_s,
            h2d_gb_s=rate,
            d2h_gb_s=rate,
            bf16_tflops=self.bf16_tflops,
        )


CARDS: tuple[Card, ...] = (
    Card("RTX 3050", 8, 224, 4, 8, 18),
    Card("RTX 3050 6GB", 6, 168, 4, 8, 14),
    Card("RTX 3060 12GB", 12, 360, 4, 16, 25),
    Card("RTX 3060 Ti", 8, 448, 4, 16, 32),
    Card("RTX 3070", 8, 448, 4, 16, 40),
    Card("RTX 3070 Ti", 8, 608, 4, 16, 43),
    Card("RTX 3080 10GB", 10, 760, 4, 16, 59),
    Card("RTX 3080 12GB", 12, 912, 4, 16, 61),
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
    Card("RTX 4090 D", 24, 1008, 4, 16, 147),
    Card("RTX 5050", 8, 320, 5, 8, 26),
    Card("RTX 5060", 8, 448, 5, 8, 38),
    Card("RTX 5060 Ti 8GB", 8, 448, 5, 8, 47),
    Card("RTX 5060 Ti 16GB", 16, 448, 5, 8, 47),
    Card("RTX 5070", 12, 672, 5, 16, 62),
    Card("RTX 5070 Ti", 16, 896, 5, 16, 88),
    Card("RTX 5080", 16, 960, 5, 16, 113),
    Card("RTX 5090", 32, 1792, 5, 16, 209),
    # Laptops: of the same name another chip, at the highest power that is sold.
    Card("RTX 3050 Laptop", 4, 192, 4, 8, 14),
    Card("RTX 3050 Ti Laptop", 4, 192, 4, 8, 17),
    Card("RTX 3060 Laptop", 6, 336, 4, 16, 26),
    Card("RTX 3070 Laptop", 8, 448, 4, 16, 33),
    Card("RTX 3080 Laptop", 16, 448, 4, 16, 42),
    Card("RTX 3080 Ti Laptop", 16, 512, 4, 16, 47),
    Card("RTX 4050 Laptop", 6, 192, 4, 8, 24),
    Card("RTX 4060 Laptop", 8, 256, 4, 8, 29),
    Card("RTX 4070 Laptop", 8, 256, 4, 8, 40),
    Card("RTX 4080 Laptop", 12, 432, 4, 16, 67),
    Card("RTX 4090 Laptop", 16, 576, 4, 16, 79),
    Card("RTX 5050 Laptop", 8, 384, 5, 8, 27),
    Card("RTX 5060 Laptop", 8, 384, 5, 8, 33),
    Card("RTX 5070 Laptop", 8, 384, 5, 8, 43),
    Card("RTX 5070 Ti Laptop", 12, 672, 5, 16, 52),
    Card("RTX 5080 Laptop", 16, 896, 5, 16, 70),
    Card("RTX 5090 Laptop", 24, 896, 5, 16, 91),
    Card("RTX A2000 12GB", 12, 288, 4, 16, 32),
    Card("RTX A4000", 16, 448, 4, 16, 77),
    Card("RTX A4500", 20, 640, 4, 16, 95),
    Card("RTX A5000", 24, 768, 4, 16, 111),
    Card("RTX A5500", 24, 768, 4, 16, 136),
    Card("RTX A6000", 48, 768, 4, 16, 155),
    Card("RTX 2000 Ada", 16, 224, 4, 8, 48),
    Card("RTX 4000 SFF Ada", 20, 280, 4, 16, 77),
    Card("RTX 4000 Ada", 20, 360, 4, 16, 107),
    Card("RTX 4500 Ada", 24, 432, 4, 16, 158),
    Card("RTX 5000 Ada", 32, 576, 4, 16, 261),
    Card("RTX 5880 Ada", 48, 960, 4, 16, 277),
    Card("RTX 6000 Ada", 48, 960, 4, 16, 364),
    Card("RTX PRO 2000", 16, 288, 5, 8, 68),
    Card("RTX PRO 4000", 24, 672, 5, 16, 188),
    Card("RTX PRO 4000 SFF", 24, 432, 5, 8, 96),
    Card("RTX PRO 4500", 32, 896, 5, 16, 220),
    Card("RTX PRO 5000 48GB", 48, 1344, 5, 16, 258),
    Card("RTX PRO 5000 72GB", 72, 1344, 5, 16, 258),
    Card("RTX PRO 6000", 96, 1792, 5, 16, 500),
    Card("RTX PRO 6000 Max-Q", 96, 1792, 5, 16, 439),
    Card("A2", 16, 200, 4, 8, 18, in_server=True),
    Card("A10", 24, 600, 4, 16, 125, in_server=True),
    Card("A30", 24, 933, 4, 16, 165, in_server=True),
    Card("A40", 48, 696, 4, 16, 150, in_server=True),
    Card("A100 40GB", 40, 1555, 4, 16, 312, in_server=True),
    Card("A100 80GB", 80, 1935, 4, 16, 312, in_server=True),
    Card("L4", 24, 300, 4, 16, 121, in_server=True),
    Card("L40", 48, 864, 4, 16, 181, in_server=True),
    Card("L40S", 48, 864, 4, 16, 362, in_server=True),
    Card("H100", 79, 3350, 5, 16, 989, in_server=True),
    Card("H100 PCIe", 79, 2039, 5, 16, 756, in_server=True),
    Card("H100 NVL", 93, 3900, 5, 16, 835, in_server=True),
    Card("H200", 140, 4800, 5, 16, 989, in_server=True),
    Card("B200", 179, 8000, 5, 16, 2250, in_server=True),
    # Too old for the kernels (no bf16), in the table so that asking for them has an answer. Rates in fp16.
    Card("RTX 2060", 6, 336, 3, 16, 26, capability=7.5),
    Card("RTX 2060 Super", 8, 448, 3, 16, 29, capability=7.5),
    Card("RTX 2070", 8, 448, 3, 16, 30, capability=7.5),
    Card("RTX 2070 Super", 8, 448, 3, 16, 36, capability=7.5),
    Card("RTX 2080", 8, 448, 3, 16, 40, capability=7.5),
    Card("RTX 2080 Super", 8, 496, 3, 16, 45, capability=7.5),
    Card("RTX 2080 Ti", 11, 616, 3, 16, 57, capability=7.5),
    Card("TITAN RTX", 24, 672, 3, 16, 130, capability=7.5),
    Card("Quadro RTX 5000", 16, 448, 3, 16, 89, capability=7.5),
    Card("Quadro RTX 6000", 24, 672, 3, 16, 130, capability=7.5),
    Card("Quadro RTX 8000", 48, 672, 3, 16, 130, capability=7.5),
    Card("GTX 1650", 4, 128, 3, 16, 6, capability=7.5),
    Card("GTX 1660", 6, 192, 3, 16, 10, capability=7.5),
    Card("GTX 1660 Super", 6, 336, 3, 16, 10, capability=7.5),
    Card("GTX 1660 Ti", 6, 288, 3, 16, 11, capability=7.5),
    Card("T4", 16, 320, 3, 16, 65, in_server=True, capability=7.5),
    Card("V100 16GB", 16, 900, 3, 16, 125, in_server=True, capability=7.0),
    Card("V100 32GB", 32, 900, 3, 16, 125, in_server=True, capability=7.0),
    Card("GTX 1060 6GB", 6, 192, 3, 16, 4, capability=6.1),
    Card("GTX 1070", 8, 256, 3, 16, 6, capability=6.1),
    Card("GTX 1070 Ti", 8, 256, 3, 16, 8, capability=6.1),
    Card("GTX 1080", 8, 320, 3, 16, 9, capability=6.1),
    Card("GTX 1080 Ti", 11, 484, 3, 16, 11, capability=6.1),
)


def find_card(name: str) -> Card:
    """The card called ``name``, however it is spelled, or the one that it describes as OWN_CARD does. Raises
    UsageError with the nearest names."""
    if "," in name:
        return _own_card(name)
    wanted = _plain(name)
    by_name: dict[str, Card] = {}
    for card in CARDS:  # "pcie" tells an H100 PCIe from the H100, and only decorates other names
        by_name.setdefault(_plain(card.name), card)
        if _letters(_SOLD_BY.sub("", name.lower())) == _letters(_SOLD_BY.sub("", card.name.lower())):
            return card
    if wanted in by_name:
        return by_name[wanted]
    sized = _SIZE.fullmatch(_ADDED.sub("", name.lower()))
    whole = _plain(sized[1]) if sized else wanted
    if sized and whole in by_name and abs(by_name[whole].vram_gib - int(sized[2])) < 2:
        return by_name[whole]  # "4090 24GB": there is only one
    # "3060" is one card, "4060 Ti" either of two that differ in memory.
    same = [card for plain, card in by_name.items() if plain.endswith("gb") and _without_size(card) == wanted]
    if len(same) == 1:
        return same[0]
    close = difflib.get_close_matches(whole, by_name, n=9, cutoff=0.6)
    alike = difflib.get_close_matches(whole, by_name, n=9, cutoff=0.75)
    same_number = [plain for plain in close if _digits(plain) == _digits(whole)]
    near = [by_name[plain].name for plain in same_number or alike]
    said = f"did you mean {' or '.join([card.name for card in same] or near[:3])}? " if same or near else ""
    raise UsageError(
        f"no GPU is called {name!r}: {said}`coldstream plan --help` lists those that are known; describe any other as "
        f'"{OWN_CARD}"'
    )


def card_names() -> str:
    """Every card that can be used, for a reader: words that neighbours share are written once."""
    listed, before = "", ""
    for card in CARDS:
        if card.capability >= LEAST_CAPABILITY:
            kind, _, rest = card.name.partition(" ")
            listed += f", {rest}" if kind == before == "RTX" else f", {card.name}" if listed else card.name
            before = kind
    return listed


_FIGURE = r"(\d{1,6}(?:\.\d{1,6})?)"
_PARTS = {
    "vram": re.compile(rf"{_FIGURE} ?[MGT]i?B"),
    "vram_gb_s": re.compile(rf"{_FIGURE} ?GB/s"),
    "bf16_tflops": re.compile(rf"{_FIGURE} ?TFLOPS"),
    "pcie": re.compile(r"pcie ?([345]) ?x ?(16|8|4|1)", re.IGNORECASE),
}


def _own_card(text: str) -> Card:
    """A card from its figures. Raises UsageError naming the figure that is missing or makes no sense."""
    name, *parts = (part.strip() for part in text.split(","))
    found = {key: part.fullmatch(word) for word in parts for key, part in _PARTS.items() if part.fullmatch(word)}
    if not name or len(parts) != len(_PARTS) or len(found) != len(_PARTS):
        raise UsageError(
            f'--gpu "{text}" describes no card: expected a name, memory, its bandwidth, dense bf16 and PCIe, as in '
            f'"{OWN_CARD}"'
        )
    size, rate, flops, bus = (found[key] for key in ("vram", "vram_gb_s", "bf16_tflops", "pcie"))
    assert size and rate and flops and bus
    card = Card(name, parse_size(size[0]) / GIB, float(rate[1]), int(bus[1]), int(bus[2]), float(flops[1]))
    if not (card.vram_gib > 0 and card.vram_gb_s > 0 and card.bf16_tflops > 0):
        raise UsageError(f'--gpu "{text}" describes no card: expected figures above 0')
    return card


def described_machine(
    gpu: str, *, ram: int | None = None, ram_gb_s: float | None = None, disk_gb_s: float | None = None
) -> Machine:
    """An ordinary desktop with the card ``gpu`` (a part of a server around a data centre's card) and, where
    ``ram`` is asked for, at least that much free. A card too old to be used is left out, with a note.

    Raises UsageError for a card that is neither in the table nor described.
    """
    card = find_card(gpu)
    usable = card.capability >= LEAST_CAPABILITY
    note = (
        f"{card.name} has compute capability {card.capability}: a GPU is used from {LEAST_CAPABILITY} (Ampere) on, so "
        "this is planned without it"
    )
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
        gpu=card.gpu() if usable else None,
        cache_bytes=_SERVER_CACHE_BYTES if card.in_server else _CACHE_BYTES,
        measured=False,
        notes=() if usable else (note,),
    )


def _without_size(card: Card) -> str:
    return _plain(card.name.rpartition(" ")[0])


def _plain(name: str) -> str:
    """Lower case without vendor words and what drivers add to a name, blanks and punctuation."""
    return _letters(_ADDED.sub("", name.lower()))


def _letters(name: str) -> str:
    return "".join(letter for letter in name if letter.isalnum())


def _digits(plain: str) -> str:
    return max(re.findall(r"\d+", plain), key=len, default="")
