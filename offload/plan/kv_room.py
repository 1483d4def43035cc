"""KvRoom: how much of RAM a KV cache has whose older pages are on disk. Sizes in bytes."""

from dataclasses import dataclass, replace

from offload.batch.kv_tiers import KvTiers
from quant.errors import BudgetError
from quant.model.shape import ModelShape
from quant.sizes import KV_PAGE_TOKENS, format_size


@dataclass(frozen=True)
class KvRoom:
    """``nbytes`` of RAM for pages of the KV cache; None: what experts leave, and at least what a step needs."""

    nbytes: int | None = None

    def tiers(self, shape: ModelShape, context: int, chunk: int, page: int) -> KvTiers:
        """Which pages of ``page`` bytes are in RAM for ``context`` tokens, of which ``chunk`` are run at once. Raises
        BudgetError if there is less room than a step needs."""
        recent = -(-chunk // KV_PAGE_TOKENS) * KV_PAGE_TOKENS + KV_PAGE_TOKENS
        tiers = KvTiers(0, recent)
        most, least = shape.kv_pages(context), tiers.least_pages(shape, context)
        all_recent = most <= least
        needed = (most if all_recent else least + tiers.staging_pages) * page
        if self.nbytes is not None and self.nbytes < needed:
            raise BudgetError(
                f"--kv-ram is {format_size(self.nbytes)}, and a step needs {format_size(needed)} of the KV cache "
                "in RAM: give it that, or a smaller --prompt-chunk"
            )
        if all_recent:
            return replace(tiers, pages=most, staged=0)
        room = least if self.nbytes is None else self.nbytes // page - tiers.staging_pages
        return replace(tiers, pages=min(most, room))
