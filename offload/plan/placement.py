"""Fit: how a model is laid into a budget, role by role, or why it cannot be. Sizes in bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from offload.hardware.framework import FRAMEWORK_RAM, FRAMEWORK_VRAM, GIB, MIB
from offload.plan.budget import Budget
from offload.plan.footprint import Footprint, slot_bytes_of
from offload.plan.kv_room import KvRoom
from offload.tiers import Tier, role_name
from quant.errors import BudgetError
from quant.model.families import TEXT_ROLES
from quant.scheme import Scheme
from quant.sizes import format_size

CHUNKS = (2048, 1024, 512, 256, 128, 64, 32, 16)
_SCRATCH_PART = 32  # activations of a chunk take at most this part of the budget that experts could have
_MIN_SLOTS = 2  # one expert computes while the next arrives
_MIN_CONTEXT = 128
_VRAM_RESERVE = 2


@dataclass(frozen=True)
class PlanRow:
    """``nbytes`` of ``role`` in ``tier``. Roles are those of the checkpoint, experts being called
    experts_hot, experts_warm and experts_cold by their tier; and kv_cache, scratch, padding (of slots to
    whole pages) and framework."""

    role: str
    tier: Tier
    nbytes: int


@dataclass(frozen=True)
class Fit:
    """A placement within a budget: ``vram_slots`` and ``ram_slots`` expert slots, of which ``in_vram``
    and ``in_ram`` are home to an expert each; ``ram_bytes`` are what experts in RAM take at the most."""

    rows: tuple[PlanRow, ...]
    prompt_chunk: int
    vram_slots: int
    ram_slots: int
    in_vram: int
    in_ram: int
    ram_bytes: int


@dataclass(frozen=True)
class Fitter:
    """Lays ``footprint`` into budgets; ``prompt_chunk`` None chooses the largest that costs little."""

    footprint: Footprint
    on_gpu: bool
    prompt_chunk: int | None = None

    @property
    def home(self) -> Tier:
        """The tier of all that every token reads."""
        return "vram" if self.on_gpu else "ram"

    @property
    def kv_can_spill(self) -> bool:
        """Whether a part of the KV cache could be on disk that is not now."""
        return not self.on_gpu and self.footprint.shape.layers_on_cpu and self.footprint.kv_room is None

    @property
    def grows_to(self) -> int:
        """See ModelShape; where transformers computes attention beside a GPU, no longer than asked."""
        shape = self.footprint.shape
        return shape.grows_to if shape.is_native or not self.on_gpu else 0

    def fit(self, budget: Budget) -> Fit:
        """The placement. Raises BudgetError with the numbers and the nearest thing that fits."""
        chunk = self.prompt_chunk or self._chunk(budget)
        short = self._short(budget, chunk)
        if short:
            raise BudgetError(self._refusal(budget, short))
        rows, total, slot = self._fixed(chunk), self.footprint.experts, self.footprint.slot_bytes
        free = self._free(budget, rows)
        vram_slots = min(total, free["vram"] // slot) if self.on_gpu else 0
        in_vram = vram_slots - vram_reserve(vram_slots, total)
        mean = slot if self.on_gpu else self.footprint.mean_slot_bytes
        ram_slots = min(max(total - in_vram, self._least("ram")), free["ram"] // mean)
        in_ram = min(ram_slots, total - in_vram)
        ram_bytes = ram_slots * mean if mean == slot else min(free["ram"], total * mean)
        rows += self._experts(in_vram, in_ram, vram_slots, ram_bytes)
        return Fit(tuple(row for row in rows if row.nbytes), chunk, vram_slots, ram_slots, in_vram, in_ram, ram_bytes)

    def with_kv_room(self, budget: Budget) -> "Fitter":
        """This one, in which a KV cache that may be on disk in part has of RAM what experts leave, where nobody said
        how much."""
        room = self.footprint.kv_room
        if room is None or room.nbytes is not None or not self.fits(budget):
            return self
        found = self.fit(budget)
        kept, _ = self.footprint.kv_parts(found.prompt_chunk)
        left = budget.ram + FRAMEWORK_RAM - sum(row.nbytes for row in found.rows if row.tier == "ram")
        return replace(self, footprint=replace(self.footprint, kv_room=KvRoom(kept + max(0, left))))

    def fits(self, budget: Budget) -> bool:
        """Whether there is a placement at all."""
        return not self._short(budget, self.prompt_chunk or self._chunk(budget))

    def _chunk(self, budget: Budget) -> int:
        room = (budget.vram if self.on_gpu else budget.ram) // _SCRATCH_PART
        sizes = [chunk for chunk in CHUNKS if chunk <= self.footprint.context] or [self.footprint.context]
        least = self.footprint.scratch(1, on_gpu=self.on_gpu)
        cheap = (size for size in sizes if self.footprint.scratch(size, on_gpu=self.on_gpu) - least <= room)
        return next((size for size in cheap if not self._short(budget, size)), sizes[-1])

    def _least(self, tier: Literal["vram", "ram"]) -> int:
        """Slots without which nothing runs: on the GPU one more than a token uses of a layer."""
        total = self.footprint.experts
        if tier == "vram":
            return min(total, self.footprint.shape.top_k + 1) if self.on_gpu else 0
        return min(total, _MIN_SLOTS)

    def _short(self, budget: Budget, chunk: int) -> dict[Literal["vram", "ram"], int]:
        """Bytes that each tier lacks."""
        free, slot = self._free(budget, self._fixed(chunk)), self.footprint.slot_bytes
        tiers: tuple[Literal["vram", "ram"], ...] = ("vram", "ram")
        lacking = {tier: self._least(tier) * slot - free[tier] for tier in tiers}
        return {tier: nbytes for tier, nbytes in lacking.items() if nbytes > 0}

    def _free(self, budget: Budget, rows: list[PlanRow]) -> dict[Tier, int]:
        """What is left for experts; the framework's share of RAM lies beside the budget."""
        taken = {tier: sum(row.nbytes for row in rows if row.tier == tier) for tier in ("vram", "ram")}
        return {"vram": budget.vram - taken["vram"], "ram": budget.ram - taken["ram"] + FRAMEWORK_RAM}

    def _fixed(self, chunk: int) -> list[PlanRow]:
        """Everything but experts."""
        footprint, rows = self.footprint, []
        for role, nbytes in footprint.roles().items():
            tier = self.home
            if role == "embeddings" and not footprint.shape.tie_word_embeddings:
                tier = "ram"  # a token reads one row
            if role == "vision":
                tier = "disk"  # text runs never load it
            rows.append(PlanRow(role, tier, nbytes))
        kept, on_disk = footprint.kv_parts(chunk)
        rows += [PlanRow("kv_cache", self.home, kept), PlanRow("kv_cache", "disk", on_disk)]
        rows.append(PlanRow("scratch", self.home, footprint.scratch(chunk, on_gpu=self.on_gpu)))
        rows.append(PlanRow("images", self.home, footprint.image_workspace(on_gpu=self.on_gpu)))
        rows.append(PlanRow("framework", "ram", FRAMEWORK_RAM))
        if self.on_gpu:
            rows.append(PlanRow("framework", "vram", FRAMEWORK_VRAM))
        return rows

    def _experts(self, in_vram: int, in_ram: int, vram_slots: int, ram_bytes: int) -> list[PlanRow]:
        size, slot = self.footprint.expert_bytes, self.footprint.slot_bytes
        return [
            PlanRow("experts_hot", "vram", in_vram * size),
            PlanRow("experts_warm", "ram", in_ram * size),
            PlanRow("experts_cold", "disk", (self.footprint.experts - in_vram - in_ram) * size),
            PlanRow("padding", "vram", vram_slots * slot - in_vram * size),
            # And the slots that hold no expert for good: what passes through on its way to the GPU.
            PlanRow("padding", "ram", max(0, ram_bytes - in_ram * size)),
        ]

    def _refusal(self, budget: Budget, short: Mapping[Literal["vram", "ram"], int]) -> str:
        tier, lacking = next(iter(short.items()))
        have: int = getattr(budget, tier)
        chunk = self.prompt_chunk or self._chunk(budget)
        rows = [row for row in self._fixed(chunk) if row.tier == tier and (tier, row.role) != ("ram", "framework")]
        largest = sorted(rows, key=lambda row: -row.nbytes)[:3]
        named = ", ".join(f"{role_name(row.role)} {format_size(row.nbytes)}" for row in largest)
        slots = ""
        if self.footprint.experts:
            slots = f", and room for {self._least(tier)} experts of {format_size(self.footprint.slot_bytes)}"
        return (
            f"this needs {format_size(have + lacking)} of {tier.upper()} ({named}{slots}) "
            f"but its budget is {format_size(have)}: use {' or '.join(self._remedies(budget, short))}"
        )

    def _remedies(self, budget: Budget, short: Mapping[Literal["vram", "ram"], int]) -> list[str]:
        """What fits, nearest first."""
        footprint, found = self.footprint, []
        needed = {tier: getattr(budget, tier) + lacking for tier, lacking in short.items()}
        if all(size <= budget.most.get(tier, size) for tier, size in needed.items()):
            found.append(" ".join(f"--{tier} {_rounded_up(size)}" for tier, size in needed.items()))
        limit, context = footprint.shape.max_position_embeddings, 1 << max(0, (footprint.context - 1).bit_length() - 1)
        if 0 < limit < footprint.context:
            context = limit
        while context >= _MIN_CONTEXT and not self._with(context=context).fits(budget):
            context = 1 << ((context - 1).bit_length() - 1)
        if context >= _MIN_CONTEXT:
            all_of_it = " (all that the model was made for)" if context == limit else ""
            found.append(f"--context {context}{all_of_it}")
        if self.kv_can_spill and replace(self, footprint=replace(footprint, kv_room=KvRoom())).fits(budget):
            found.append("--kv-disk DIR for the older part of the KV cache")
        if footprint.kv_bits > 8 and self._with(kv_bits=8).fits(budget):
            found.append("--kv int8")
        if self._lighter().fits(budget):
            found.append("--recipe fast for fewer bits, when it is quantized")
        if self.on_gpu and "vram" in short:
            alone, without = replace(self, on_gpu=False), replace(budget, vram=0)
            lacking = alone._short(without, alone.prompt_chunk or alone._chunk(without)).get("ram", 0)
            if lacking == 0:
                found.append("--vram 0 to leave the GPU alone")
            elif budget.ram + lacking <= budget.most.get("ram", 0):
                found.append(f"--vram 0 --ram {_rounded_up(budget.ram + lacking)} to leave the GPU alone")
        if not found:
            sizes = " and ".join(f"{_rounded_up(size)} of {tier.upper()}" for tier, size in needed.items())
            found.append(f"a machine with {sizes} free: this one cannot hold what stays in memory")
        return found

    def _with(self, *, context: int | None = None, kv_bits: int | None = None) -> "Fitter":
        footprint = self.footprint
        changed = replace(footprint, context=context or footprint.context, kv_bits=kv_bits or footprint.kv_bits)
        return replace(self, footprint=changed)

    def _lighter(self) -> "Fitter":
        """The same with every role at 4 bits."""
        lighter = replace(self.footprint, schemes={role: Scheme("int4") for role in TEXT_ROLES})
        slot = min(self.footprint.slot_bytes, slot_bytes_of(lighter.expert_bytes))
        return replace(self, footprint=replace(lighter, slot_bytes=slot))


def vram_reserve(vram_slots: int, experts: int) -> int:
    """How many of ``vram_slots`` hold no expert for good: one is copied while another computes. None where
    each of ``experts`` has a slot."""
    return 0 if vram_slots >= experts else min(_VRAM_RESERVE, -(-vram_slots // 2))


def _rounded_up(nbytes: int) -> str:
    unit, name = (GIB, "GiB") if nbytes >= GIB else (MIB, "MiB")
    tenths = -(-nbytes * 10 // unit)
    return f"{tenths / 10:.1f}{name}"
