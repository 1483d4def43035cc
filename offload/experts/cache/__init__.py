"""Which expert is in which tier, and what happens when one is not where it is wanted."""
