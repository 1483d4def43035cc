"""A run replayed, event by event, on a machine that need not be there."""
