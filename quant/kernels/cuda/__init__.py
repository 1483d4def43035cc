"""Kernels for CUDA in Triton: a launcher and a torch reference per noun; the kernels are in ``device``."""
