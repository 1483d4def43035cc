"""The Triton kernels themselves: imported by the launchers beside this package, and only when one is used."""
