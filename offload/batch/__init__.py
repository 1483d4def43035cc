"""Several sequences on one model: who runs when, and whose pages hold what. Policy only: no tensors."""
